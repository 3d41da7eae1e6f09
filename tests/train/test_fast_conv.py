"""Fast convolutions of small maps: exact up to rounding, and used only where they apply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpo.train.fast_conv import _FastConv2d, _SmallMapConv, use_fast_convolutions
from hpo.train.network import build_model

# (kernel, stride, padding)
OF_RESNET = [(3, 1, 1), (3, 2, 1), (1, 2, 0)]
UNUSUAL = [(1, 1, 0), (5, 1, 2), (7, 2, 3), (2, 1, 0), (4, 3, 2)]
GEOMETRIES = [
    pytest.param(kernel, stride, padding, size, marks=marks)
    for geometries, marks in ((OF_RESNET, ()), (UNUSUAL, pytest.mark.slow))
    for kernel, stride, padding in geometries
    for size in range(1, 9)  # pixels along a side of the image
    if (size + 2 * padding - kernel) // stride + 1 >= 1
]


def output_and_gradients(conv: nn.Conv2d, images: Tensor, output_gradient: Tensor) -> list[Tensor]:
    """The output, the gradient of the images and the gradient of the weights, in fp64."""
    images = images.clone().requires_grad_()
    output = conv(images)
    output.backward(output_gradient.to(output.dtype))
    assert images.grad is not None
    assert conv.weight.grad is not None
    return [output.detach().double(), images.grad.double(), conv.weight.grad.double()]


@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), GEOMETRIES)
def test_output_and_gradients_are_exact_up_to_rounding(kernel: int, stride: int, padding: int, size: int) -> None:
    torch.manual_seed(0)
    conv, exact_conv, magnitude_conv = (
        nn.Conv2d(6, 10, kernel, stride=stride, padding=padding, bias=False) for _ in range(3)
    )
    side = (size + 2 * padding - kernel) // stride + 1
    # All numbers are exact in bf16, so that only sums are rounded.
    weight = conv.weight.detach().bfloat16()
    images, output_gradient = torch.randn(5, 6, size, size).bfloat16(), torch.randn(5, 10, side, side).bfloat16()

    conv.load_state_dict({"weight": weight})
    with torch.autocast("cpu", torch.bfloat16):
        ours = output_and_gradients(use_fast_convolutions(conv), images.float(), output_gradient)  # type: ignore[arg-type]
    exact_conv.double().load_state_dict({"weight": weight})
    exact = output_and_gradients(exact_conv, images.double(), output_gradient)
    magnitude_conv.double().load_state_dict({"weight": weight.abs()})
    magnitudes = output_and_gradients(magnitude_conv, images.double().abs(), output_gradient.abs())

    for found, expected, magnitude in zip(ours, exact, magnitudes, strict=True):
        # Rounding a sum to bf16 (8 bits) errs by at most 2**-8 of the magnitudes of its terms. oneDNN rounds once, at the
        # end. On a CPU without AVX512, torch also rounds partial sums: measured, at most 1.4 * 2**-8.
        assert ((found - expected).abs() <= 2**-7 * magnitude).all()


@pytest.mark.slow
def test_only_convolutions_with_small_maps_use_the_fast_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = _SmallMapConv.forward

    def recording_forward(ctx: Any, images: Tensor, *arguments: Any) -> Tensor:
        sizes.append(images.shape[2])
        return forward(ctx, images, *arguments)

    monkeypatch.setattr(_SmallMapConv, "forward", recording_forward)
    model = use_fast_convolutions(build_model())
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.rand(2, 1, 28, 28))
    # Layer 2 from its first stride on (7x7 -> 4x4), layer 3 (-> 2x2), layer 4 (-> 1x1): five convolutions each.
    assert sorted(sizes) == sorted([7, 4, 7, 4, 4, 4, 2, 4, 2, 2, 2, 1, 2, 1, 1])
    sizes.clear()
    model(torch.rand(2, 1, 28, 28))  # fp32
    assert sizes == []


def test_names_and_weights_do_not_change() -> None:
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
    ids=["groups", "dilation", "not square", "padding same", "bias"],
)
def test_a_convolution_that_is_not_plain_is_not_changed(conv: nn.Conv2d) -> None:
    assert not isinstance(use_fast_convolutions(nn.Sequential(conv))[0], _FastConv2d)  # type: ignore[index]
