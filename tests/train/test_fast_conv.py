"""Fast convolutions: exact up to rounding, and used only where they were measured to be faster."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hpo.train.data import Images
from hpo.train.fast_conv import (
    Choice,
    Geometry,
    _FastConv2d,
    _has_onednn_linear,
    choose,
    convolve,
    matmul,
    use_fast_convolutions,
)
from hpo.train.learner import Learner
from hpo.train.network import build_model
from hpo.train.params import STEMS, TrainParams

# (kernel, stride, padding)
OF_RESNET = [(3, 1, 1), (3, 2, 1), (1, 2, 0)]
UNUSUAL = [(1, 1, 0), (5, 1, 2), (7, 2, 3), (2, 1, 0), (4, 3, 2)]
GEOMETRIES = [
    pytest.param(
        Geometry(kernel, stride, padding, size), marks=marks, id=f"{kernel}x{kernel}-{stride}-{padding}-{size}"
    )
    for geometries, marks in ((OF_RESNET, ()), (UNUSUAL, pytest.mark.slow))
    for kernel, stride, padding in geometries
    for size in range(1, 9)
    if (size + 2 * padding - kernel) // stride + 1 >= 1
]
PRODUCTS = ("forward", "images_gradient", "weight_gradient")
CHOICES = [Choice(*chosen) for chosen in product([False, True], [False, True], [False, True], [False])]
LINEAR = Choice(False, False, False, True)
# Rounding a sum to bf16 (8 bits) errs by at most 2**-8 of the magnitudes of its terms. oneDNN rounds once, at the end. On a
# CPU without AVX512, torch also rounds partial sums: measured, at most 1.4 * 2**-8. fp32 has 16 bits more.
TOLERANCES = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-21}


def conv_of(geometry: Geometry, weight: Tensor) -> nn.Conv2d:
    d, c = weight.shape[:2]
    kernel, stride, padding, _ = geometry
    conv = nn.Conv2d(c, d, kernel, stride=stride, padding=padding, bias=False).to(weight.dtype)
    conv.load_state_dict({"weight": weight})
    return conv.to(memory_format=torch.channels_last)


def output_and_gradients(
    conv: Callable[[Tensor], Tensor], weight: Tensor, images: Tensor, output_gradient: Tensor
) -> list[Tensor]:
    """The output, the gradient of the images and the gradient of the weight, in fp64."""
    images = images.clone(memory_format=torch.channels_last).requires_grad_()
    output = conv(images)
    output.backward(output_gradient.to(output.dtype))
    assert images.grad is not None
    assert weight.grad is not None
    return [output.detach().double(), images.grad.double(), weight.grad.double()]


def assert_exact_up_to_rounding(
    geometry: Geometry, dtype: torch.dtype, choice: Choice | None, channels: int = 8
) -> None:
    """Compare with fp64. Without a choice, that of this CPU."""
    torch.manual_seed(0)
    # Multiples of 8 channels, as in the network. With 6, oneDNN's weight gradient of a 1x1 kernel with stride 2 is wrong and
    # corrupts the heap (torch 2.15, AVX2, fp32).
    n, c, d = 5, channels, 16
    # All numbers are exact in bf16, so that only sums are rounded.
    weight = torch.randn(d, c, geometry.kernel, geometry.kernel).bfloat16()
    images = torch.randn(n, c, geometry.size, geometry.size).bfloat16()
    output_gradient = torch.randn(n, d, geometry.out, geometry.out).bfloat16()

    conv = conv_of(geometry, weight.float())
    ours: Callable[[Tensor], Tensor] = use_fast_convolutions(conv)
    if choice is not None:
        ours = lambda images: convolve(images, conv.weight, geometry, dtype, choice)  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        found = output_and_gradients(ours, conv.weight, images.float(), output_gradient)
    exact, magnitude = conv_of(geometry, weight.double()), conv_of(geometry, weight.double().abs())
    expected = output_and_gradients(exact, exact.weight, images.double(), output_gradient)
    magnitudes = output_and_gradients(magnitude, magnitude.weight, images.double().abs(), output_gradient.abs())
    for name, ours_, exactly, size in zip(PRODUCTS, found, expected, magnitudes, strict=True):
        assert ((ours_ - exactly).abs() <= TOLERANCES[dtype] * size).all(), name


def geometries_of(stem: str) -> list[Geometry]:
    """The convolutions of a network, in order."""
    found: list[Geometry] = []

    def record(conv: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(conv, nn.Conv2d)
        found.append(Geometry(conv.kernel_size[0], conv.stride[0], int(conv.padding[0]), inputs[0].shape[2]))

    model = build_model(stem=stem, width=0.125)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(record)
    model(torch.rand(2, 1, 28, 28))
    return found


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_each_choice_is_exact_up_to_rounding(geometry: Geometry, dtype: torch.dtype) -> None:
    choices = [None, CHOICES[1]]  # of this CPU, and the weight gradient alone, as bf16 has it on some maps
    if dtype is torch.float32:
        choices += [CHOICES[0], CHOICES[-1], *([LINEAR] if geometry.is_linear else [])]
    for choice in choices:
        assert_exact_up_to_rounding(geometry, dtype, choice)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("stem", STEMS)
def test_every_convolution_of_the_network_is_exact_up_to_rounding(stem: str, dtype: torch.dtype) -> None:
    first, *others = geometries_of(stem)
    for channels, geometry in [(1, first), *((8, each) for each in set(others))]:
        for capability in ("AVX2", "AVX512"):
            assert_exact_up_to_rounding(geometry, dtype, choose(geometry, dtype, capability), channels)


class RecordedConvolutions(TorchDispatchMode):
    """Records the products that torch's convolution computes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is torch.ops.aten.convolution_backward.default:
            self.found.update(name for name, used in zip(PRODUCTS[1:], arguments[-1][:2], strict=True) if used)
        elif function is torch.ops.aten.convolution.default:
            self.found.add("forward")
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("choice", [*CHOICES, LINEAR], ids=lambda choice: "".join("01"[each] for each in choice))
def test_torch_computes_only_what_was_not_chosen(choice: Choice) -> None:
    images, weight = torch.rand(3, 4, 2, 2, requires_grad=True), torch.rand(5, 4, 3, 3, requires_grad=True)
    with RecordedConvolutions() as recorded:
        convolve(images, weight, Geometry(3, 1, 1, 2), torch.float32, choice).sum().backward()
    assert recorded.found == {
        name for name, chosen in zip(PRODUCTS, choice, strict=False) if not chosen and not choice.linear
    }


def test_gradients_that_nothing_needs_are_not_computed() -> None:
    weight = torch.rand(5, 4, 3, 3, requires_grad=True)
    for choice in (CHOICES[0], CHOICES[-1], LINEAR):
        with RecordedConvolutions() as recorded:
            images = torch.rand(3, 4, 2, 2)
            convolve(images, weight, Geometry(3, 1, 1, 2), torch.float32, choice).sum().backward()
        assert "images_gradient" not in recorded.found


@pytest.mark.parametrize(
    ("stem", "dtype", "capability", "expected"),
    [
        # The first convolution, layer 1, then layers 2 to 4: a 1x1 and a 3x3 kernel of stride 2, three 3x3 kernels.
        ("imagenet", torch.float32, "AVX2", "- - - - - fiw w w w w fiw w l l l fiw l l l l"),
        ("cifar", torch.float32, "AVX2", "- - - - - - - - - - - - - - - fiw w w w w"),
        ("imagenet", torch.float32, "AVX512", "- - - - - i - - - - fi fw l l l fiw l l l l"),
        ("cifar", torch.float32, "AVX512", "- - - - - i - - - - i - - - - i - - - -"),
        ("imagenet", torch.float32, "DEFAULT", " ".join("-" * 20)),
        ("imagenet", torch.bfloat16, "AVX512", "- - - - - w w w w w w w w w w w w w w w"),
        ("cifar", torch.bfloat16, "AVX512", "- - - - - - - - - - - - - - - w w w w w"),
    ],
)
def test_choices_for_the_network(stem: str, dtype: torch.dtype, capability: str, expected: str) -> None:
    choices = [choose(geometry, dtype, capability) for geometry in geometries_of(stem)]
    letters = ["".join(letter for letter, chosen in zip("fiwl", choice, strict=True) if chosen) for choice in choices]
    assert [each or "-" for each in letters] == expected.split()


def test_a_convolution_asks_for_the_choice_of_its_precision_and_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Geometry, torch.dtype, str]] = []

    def record(*question: Any) -> Choice:
        asked.append(question)
        return CHOICES[0]

    monkeypatch.setattr("hpo.train.fast_conv.choose", record)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NEW")
    conv = use_fast_convolutions(nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False))
    conv(torch.rand(2, 1, 7, 7))
    with torch.autocast("cpu", torch.bfloat16):
        conv(torch.rand(2, 1, 7, 7))
    conv(torch.rand(2, 1, 7, 9))  # not square: torch's
    assert asked == [(Geometry(3, 2, 1, 7), dtype, "NEW") for dtype in (torch.float32, torch.bfloat16)]


class RecordedLinear(TorchDispatchMode):
    """Records the matrices that oneDNN's linear layer gets."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is torch.ops.mkldnn._linear_pointwise.default:
            self.found += arguments[:2]
        return function(*arguments, **(options or {}))


def test_onednn_gets_no_matrix_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    # With gaps, a step of the network takes ten times as long.
    monkeypatch.setattr("hpo.train.fast_conv._has_onednn_linear", lambda: True)
    with RecordedLinear() as recorded:
        for geometry in set(geometries_of("imagenet")):
            choice = LINEAR if geometry.is_linear else CHOICES[-1]
            images = torch.rand(4, 16, geometry.size, geometry.size, requires_grad=True)
            weight = torch.rand(16, 16, geometry.kernel, geometry.kernel, requires_grad=True)
            convolve(images, weight, geometry, torch.float32, choice).sum().backward()
    assert len(recorded.found) > 2 * 3 * 10  # two matrices a product, three products a geometry, more with taps
    assert all(matrix.is_contiguous() or matrix.t().is_contiguous() for matrix in recorded.found)


def test_fp32_products_are_onednns_with_avx512_only(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.rand(8, 4), torch.rand(4, 6)
    for capability, expected in (("AVX2", 0), ("DEFAULT", 0), ("AVX512", 2)):
        _has_onednn_linear.cache_clear()
        with monkeypatch.context() as patch, RecordedLinear() as recorded:
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
            assert torch.allclose(matmul(a, b), a @ b)
            matmul(a.bfloat16(), b.bfloat16())
        assert len(recorded.found) == expected, capability
    _has_onednn_linear.cache_clear()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_learner_uses_them(precision: str) -> None:
    images = Images(torch.zeros(4, 28, 28, dtype=torch.uint8), torch.arange(4))
    model = Learner(TrainParams(batch_size=2, width=0.125), precision, images).model
    assert {type(module) for module in model.modules() if isinstance(module, nn.Conv2d)} == {_FastConv2d}


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
