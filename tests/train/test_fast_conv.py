"""Fast convolutions of small maps: the same numbers as PyTorch's own under autocast, and out of the way elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hpo.train.fast_conv import _FastConv2d, _SmallMapConv, use_fast_convolutions
from hpo.train.network import build_model

# (kernel, stride, padding, pixels along a side): every convolution of ResNet-18 whose map is small, and odder ones.
GEOMETRIES = [
    (kernel, stride, padding, size)
    for kernel, stride, padding in [
        (3, 1, 1),
        (3, 2, 1),
        (1, 2, 0),
        (1, 1, 0),
        (5, 1, 2),
        (7, 2, 3),
        (2, 1, 0),
        (4, 3, 2),
    ]
    for size in range(1, 9)
    if (size + 2 * padding - kernel) // stride + 1 >= 1
]


def gradients(conv: nn.Conv2d, images: Tensor, sent_back: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the images, gradient of the weights, under autocast."""
    images = images.clone().requires_grad_()
    conv.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        output = conv(images)
    output.backward(sent_back)
    assert images.grad is not None
    assert conv.weight.grad is not None
    return output.detach().float(), images.grad, conv.weight.grad


@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), GEOMETRIES)
def test_outputs_and_gradients_are_those_of_stock_autocast(kernel: int, stride: int, padding: int, size: int) -> None:
    torch.manual_seed(0)
    stock = nn.Conv2d(6, 10, kernel, stride=stride, padding=padding, bias=False)
    fast = copy.deepcopy(stock)
    use_fast_convolutions(fast)
    images = torch.randn(5, 6, size, size)
    side = (size + 2 * padding - kernel) // stride + 1
    sent_back = torch.randn(5, 10, side, side).bfloat16()
    for ours, theirs in zip(gradients(fast, images, sent_back), gradients(stock, images, sent_back), strict=True):
        # bf16 keeps 8 bits; the two differ only in the order of a sum that is rounded to them at its end.
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7 * theirs.abs().max().item())


def test_the_small_maps_of_the_network_take_the_fast_way_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    forward = _SmallMapConv.forward
    monkeypatch.setattr(
        _SmallMapConv,
        "forward",
        lambda ctx, images, *rest: (taken.append(images.shape[2]), forward(ctx, images, *rest))[1],
    )
    model = use_fast_convolutions(build_model())
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.rand(2, 1, 28, 28))
    # Layer 2 from its first stride on (7x7 -> 4x4), layer 3 (-> 2x2), layer 4 (-> 1x1): five convolutions each.
    assert taken == [7, 4, 7, 4, 4, 4, 2, 4, 2, 2, 2, 1, 2, 1, 1]
    taken.clear()
    model(torch.rand(2, 1, 28, 28))  # fp32
    assert taken == []


def test_names_and_weights_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = build_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = use_fast_convolutions(model).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, dilation=2, bias=False),
        nn.Conv2d(4, 4, (3, 1), bias=False),
        nn.Conv2d(4, 4, 3, padding="same", bias=False),
        nn.Conv2d(4, 4, 3),
    ],
)
def test_a_convolution_of_another_kind_is_left_alone(conv: nn.Conv2d) -> None:
    assert not isinstance(use_fast_convolutions(nn.Sequential(conv))[0], _FastConv2d)
