"""The network: torchvision's ResNet-18 but for its first layer and its last."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18

from hpo.train.network import STEMS, build_model

KERNEL = {"imagenet": 7, "cifar": 3}
FEATURES = 512  # what the last layer of ResNet-18 reads


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("classes", [10, 7])
def test_the_network_has_the_parameters_of_the_published_one_but_for_stem_and_classes(stem: str, classes: int) -> None:
    published: int = ResNet18_Weights.IMAGENET1K_V1.meta["num_params"]  # 1,000 classes, 3 channels, 7x7 stem
    stem_before, stem_now = 7 * 7 * 3 * 64, KERNEL[stem] ** 2 * 1 * 64
    head_before, head_now = (FEATURES + 1) * 1000, (FEATURES + 1) * classes
    expected = published - stem_before - head_before + stem_now + head_now
    assert count_parameters(build_model(stem=stem, classes=classes)) == expected


@pytest.mark.parametrize("stem", STEMS)
def test_every_layer_behind_the_stem_has_torchvisions_name_and_shape(stem: str) -> None:
    ours = {name: tuple(tensor.shape) for name, tensor in build_model(stem=stem).state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in resnet18(num_classes=10).state_dict().items()}
    assert ours.pop("conv1.weight") == (64, 1, KERNEL[stem], KERNEL[stem])
    theirs.pop("conv1.weight")
    assert ours == theirs


def halved(size: int, times: int) -> int:
    """The side of a map after layers of stride 2 whose padding keeps the border."""
    for _ in range(times):
        size = math.ceil(size / 2)
    return size


# ResNet-18 halves three times in its blocks; the imagenet stem twice more, in its convolution and its max-pool.
@pytest.mark.parametrize(("stem", "side"), [("imagenet", halved(28, 2 + 3)), ("cifar", halved(28, 3))])
def test_images_of_28_by_28_become_logits_through_maps_of(stem: str, side: int) -> None:
    model = build_model(stem=stem).eval()
    maps: list[Tensor] = []
    model.get_submodule("layer4").register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.no_grad():
        logits = model(torch.zeros(3, 1, 28, 28))
    assert tuple(logits.shape) == (3, 10)
    assert [tuple(found.shape) for found in maps] == [(3, FEATURES, side, side)]


def test_the_maps_are_one_pixel_behind_the_imagenet_stem_and_four_by_four_behind_the_cifar_stem() -> None:
    assert (halved(28, 2 + 3), halved(28, 3)) == (1, 4)


def test_the_imagenet_stem_is_the_default() -> None:
    assert count_parameters(build_model()) == count_parameters(build_model(stem="imagenet"))
    assert count_parameters(build_model()) != count_parameters(build_model(stem="cifar"))


@pytest.mark.parametrize("stem", STEMS)
def test_the_weights_come_from_torchs_global_generator(stem: str) -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(nn.utils.parameters_to_vector(build_model(stem=stem).parameters()))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("stem", STEMS)
def test_the_stem_starts_with_the_spread_of_he(stem: str) -> None:
    torch.manual_seed(0)
    weight = build_model(stem=stem).get_parameter("conv1.weight").detach()
    # He et al. 2015, fan-out: variance 2 / (outputs x kernel area).
    expected = math.sqrt(2 / (64 * KERNEL[stem] ** 2))
    # The standard error of a spread of n normal numbers is 1 / sqrt(2 n); four of them are never exceeded by chance.
    assert float(weight.std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * weight.numel()))


def test_an_unknown_stem_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"imagenet, cifar.*'resnet'"):
        build_model(stem="resnet")
