"""The network: torchvision's ResNet-18 except for its first layer and its last."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from hpo.train.network import MirrorAverage, build_model
from hpo.train.params import KEPT_NUMBERS, STEMS, WEIGHTS

PUBLISHED_PARAMETERS = 11_689_512  # 1,000 classes, 3 channels, a 7x7 stem
KERNEL = {"imagenet": 7, "cifar": 3}
FEATURES = 512  # inputs of the last layer


@pytest.mark.parametrize(("stem", "classes"), [("imagenet", 10), ("cifar", 7)])
def test_the_number_of_parameters_is_the_published_one_except_for_stem_and_classes(stem: str, classes: int) -> None:
    published_stem, stem_now = 7 * 7 * 3 * 64, KERNEL[stem] ** 2 * 1 * 64
    published_head, head_now = (FEATURES + 1) * 1000, (FEATURES + 1) * classes
    expected = PUBLISHED_PARAMETERS - published_stem - published_head + stem_now + head_now
    assert sum(weight.numel() for weight in build_model(stem=stem, classes=classes).parameters()) == expected


def torchvision_model(stem: str) -> nn.Module:
    """torchvision's network with our stem, the way the first version of this project built it."""
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=10)
    stride = 2 if stem == "imagenet" else 1
    conv = nn.Conv2d(1, 64, kernel_size=KERNEL[stem], stride=stride, padding=KERNEL[stem] // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = conv
    if stem == "cifar":
        model.maxpool = nn.Identity()
    return model


@pytest.mark.slow  # imports torchvision
@pytest.mark.parametrize("stem", STEMS)
def test_the_network_equals_torchvisions_bit_by_bit(stem: str, one_thread: None) -> None:
    torch.manual_seed(0)
    theirs = torchvision_model(stem)
    torch.manual_seed(0)
    ours = build_model(stem=stem)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.rand(4, 1, 28, 28)
    outputs = []
    for model in (theirs, ours):
        training = model.train()(images)
        training.sum().backward()
        outputs.append([training, model.eval()(images), *(weight.grad for weight in model.parameters())])
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


def halved(size: int, times: int) -> int:
    """The side of a map after layers with stride 2 whose padding keeps the border."""
    for _ in range(times):
        size = math.ceil(size / 2)
    return size


# ResNet-18 halves three times in its blocks. The imagenet stem halves twice more, in its convolution and its max-pooling.
@pytest.mark.parametrize(("stem", "side"), [("imagenet", halved(28, 2 + 3)), ("cifar", halved(28, 3))])
def test_the_last_maps_have_the_expected_side(stem: str, side: int) -> None:
    assert side == {"imagenet": 1, "cifar": 4}[stem]
    model = build_model(stem=stem).eval()
    maps: list[Tensor] = []
    model.get_submodule("layer4").register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.no_grad():
        logits = model(torch.zeros(3, 1, 28, 28))
    assert tuple(logits.shape) == (3, 10)
    assert [tuple(found.shape) for found in maps] == [(3, FEATURES, side, side)]


def test_the_imagenet_stem_is_the_default() -> None:
    assert build_model().get_parameter("conv1.weight").shape[2:] == (7, 7)


def test_the_weights_come_from_torchs_global_generator() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(nn.utils.parameters_to_vector(build_model().parameters()))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("stem", STEMS)
def test_the_stem_is_initialized_as_in_he_et_al(stem: str) -> None:
    torch.manual_seed(0)
    weight = build_model(stem=stem).get_parameter("conv1.weight").detach()
    # He et al. 2015, fan-out: variance 2 / (outputs x kernel area).
    expected = math.sqrt(2 / (64 * KERNEL[stem] ** 2))
    # The standard deviation of n normal numbers has a relative standard error of 1 / sqrt(2 n). Four of them are safe.
    assert float(weight.std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * weight.numel()))


@pytest.mark.parametrize(
    ("width", "channels"), [(1.0, [64, 128, 256, 512]), (0.5, [32, 64, 128, 256]), (2, [128, 256, 512, 1024])]
)
@pytest.mark.parametrize("stem", STEMS)
def test_the_width_scales_the_channels_of_every_layer(stem: str, width: float, channels: list[int]) -> None:
    model = build_model(stem=stem, width=width)
    for i, count in enumerate(channels):
        for block in model.get_submodule(f"layer{i + 1}").children():
            assert [block.get_parameter(f"conv{k}.weight").shape[0] for k in (1, 2)] == [count, count]
    assert model.get_parameter("conv1.weight").shape[0] == channels[0]
    assert model.get_parameter("fc.weight").shape == (10, channels[3])
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_channels_are_multiples_of_eight() -> None:
    shapes = [weight.shape for weight in build_model(width=0.3).parameters() if weight.dim() == 4]
    assert {shape[0] for shape in shapes} == {16, 40, 80, 152}  # of 19.2, 38.4, 76.8, 153.6
    assert build_model(width=0.125).get_parameter("conv1.weight").shape[0] == 8


def test_mirror_average_gives_the_mean_of_the_logits_of_an_image_and_its_mirror_image() -> None:
    torch.manual_seed(0)
    model, images = build_model().eval(), torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        logits, mirrored = model(images), model(torch.tensor(images.numpy()[:, :, :, ::-1].copy()))
        assert torch.equal(MirrorAverage(model)(images), (logits + mirrored) / 2)
    assert not torch.equal(logits, mirrored)


def test_an_unknown_stem_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"imagenet, cifar.*'resnet'"):
        build_model(stem="resnet")


@pytest.mark.parametrize("stem", STEMS)
def test_the_memory_that_a_plan_assumes_is_that_of_the_network(stem: str) -> None:
    kept: dict[int, int] = {}  # {address: numbers}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    model, count = build_model(stem=stem).train(), 8
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(model(torch.rand(count, 1, 28, 28)), torch.arange(count))
    for weight in model.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    assert loss.requires_grad
    assert sum(kept.values()) / count == pytest.approx(KEPT_NUMBERS[stem], rel=0.1)
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(WEIGHTS, rel=0.01)
