"""Faster convolutions on the CPU. On a GPU, nothing changes.

On the late maps of a ResNet, 4x4 down to 1x1, oneDNN reaches a fraction of its speed, and most of a 3x3 kernel only meets
padding. The weight gradient is slowest (512 -> 512 channels on 1x1 maps, fp32, one AVX2 thread: 4 GFLOP/s, where a matrix
product reaches 70). Three exact changes help:

- Where each output pixel meets the whole image, the convolution is a linear layer: one matrix product.
- The weight gradient is one matrix product over the patches, and so is the output. The gradient of the images is one matrix
  product for each tap. With AVX2, output and gradient of the images are faster so with 1x1 kernels only.
- Taps that never meet an image are cut off.

With AVX512, oneDNN computes the products in fp32, see `matmul`. What is faster depends on the instruction set: `LIMITS` was
measured, with `python -m benchmarks.train_speed convolutions`.

The results differ from oneDNN's in rounding only, with one exception: on AMX, oneDNN (torch 2.15) does not initialize the
weight gradient of taps that only meet padding if the image is 1x1 and the stride above 1. Here it is 0. No convolution of
ResNet-18 on 28x28 images has this shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn


class Geometry(NamedTuple):
    """A square convolution on square images, in pixels along a side."""

    kernel: int
    stride: int
    padding: int
    size: int  # of the image

    @property
    def out(self) -> int:
        """The size of the output."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def windows(self) -> list[tuple[slice, slice]]:
        """For each output pixel, the taps that meet an image, if all of the image is met."""
        starts = [self.padding - self.stride * i for i in range(self.out)]
        return [(slice(y, y + self.size), slice(x, x + self.size)) for y, x in product(starts, starts)]

    @property
    def is_linear(self) -> bool:
        """Whether each output pixel meets all of the image."""
        return self.padding >= self.stride * (self.out - 1) and self.size + self.padding <= self.kernel


class Limits(NamedTuple):
    """The largest output, in pixels along a side, for which a product is computed here; 0: never."""

    forward: int = 0
    images_gradient: int = 0
    weight_gradient: int = 0
    linear: int = 0  # all three, as those of a linear layer


class Choice(NamedTuple):
    """Which products of a convolution are computed here. torch computes the others."""

    forward: bool
    images_gradient: bool
    weight_gradient: bool
    linear: bool  # all three


# By precision, instruction set and size of the kernel. Where the batch sizes 64, 256 and 512 disagree, torch's is kept.
LIMITS: Mapping[tuple[torch.dtype, str], Mapping[int, Limits]] = {
    (torch.float32, "AVX2"): {
        1: Limits(forward=4, images_gradient=4, weight_gradient=4),
        3: Limits(weight_gradient=4, linear=2),
    },
    (torch.float32, "AVX512"): {
        1: Limits(forward=2, images_gradient=14, weight_gradient=1),
        3: Limits(forward=2, weight_gradient=2, linear=2),
    },
}
LIMITS_OF_BF16 = Limits(weight_gradient=4)  # measured with AVX512-BF16; from 7 on, oneDNN's gradient is as fast


@cache
def choose(geometry: Geometry, dtype: torch.dtype, capability: str) -> Choice:
    """Return which products are faster here than in torch, on a CPU of an instruction set (`get_cpu_capability`)."""
    if dtype is torch.bfloat16:
        limits = LIMITS_OF_BF16
    else:
        limits = LIMITS.get((dtype, capability), {}).get(geometry.kernel, Limits())
    if geometry.is_linear and geometry.out <= limits.linear:
        return Choice(forward=False, images_gradient=False, weight_gradient=False, linear=True)
    return Choice(*(geometry.out <= limit for limit in limits))._replace(linear=False)


def use_fast_convolutions(model: nn.Module) -> nn.Module:
    """Make the plain convolutions of a network use the faster kernels where they apply. Weights and names do not change.

    Plain: square, without bias, groups or dilation.

    Returns:
        The same module.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_plain(module):
            module.__class__ = _FastConv2d
    return model


def _is_plain(conv: nn.Conv2d) -> bool:
    square = all(
        not isinstance(pair, str) and len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding)
    )
    return square and set(conv.dilation) == {1} and conv.groups == 1 and conv.bias is None


class _FastConv2d(nn.Conv2d):
    """A plain convolution that uses the faster kernels where they are."""

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else images.dtype
        if images.device.type != "cpu" or height != width:
            return super().forward(images)
        geometry = Geometry(self.kernel_size[0], self.stride[0], int(self.padding[0]), height)
        choice = choose(geometry, dtype, torch.backends.cpu.get_cpu_capability())
        return convolve(images, self.weight, geometry, dtype, choice) if any(choice) else super().forward(images)


def convolve(images: Tensor, weight: Tensor, geometry: Geometry, dtype: torch.dtype, choice: Choice) -> Tensor:
    """Return the convolution of images with a weight, both rounded to a dtype. Gradients of the weight are in fp32."""
    function = _LinearConv if choice.linear else _PatchConv
    result: Tensor = function.apply(images, weight, geometry, dtype, choice)
    return result


# Shapes: N images, C channels in, D channels out, H rows and columns, K taps along a side of the kernel, O rows and columns
# of the output. Maps are in channels-last memory format: (N, H, W, C) is their order in memory.


class _LinearConv(torch.autograd.Function):
    """A convolution as a linear layer of H*H*C inputs and O*O*D outputs."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, geometry: Geometry, dtype: torch.dtype, choice: Choice
    ) -> Tensor:
        d, size, out = len(weight), geometry.size, geometry.out
        inputs = in_memory_order(images.to(dtype)).reshape(len(images), -1)  # (N, H*H*C)
        taps = in_memory_order(weight.to(dtype))
        rows = [taps[:, *window].reshape(d, -1) for window in geometry.windows]
        matrix = rows[0] if len(rows) == 1 else torch.cat(rows)  # (O*O*D, H*H*C)
        ctx.save_for_backward(inputs, matrix)
        ctx.geometry, ctx.size, ctx.taps_shape = geometry, size, taps.shape
        return _as_maps(matmul(inputs, matrix.t()).view(-1, out, out, d))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        inputs, matrix = ctx.saved_tensors
        geometry, size, (d, _, _, c) = ctx.geometry, ctx.size, ctx.taps_shape
        outputs = in_memory_order(gradient).reshape(len(gradient), -1)  # (N, O*O*D)
        images_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            images_gradient = _as_maps(matmul(outputs, matrix).view(-1, size, size, c))
        if ctx.needs_input_grad[1]:
            by_window = matmul(outputs.t(), inputs).view(-1, d, size, size, c)
            weight_gradient = gradient.new_zeros(ctx.taps_shape, dtype=torch.float32)
            for window, part in zip(geometry.windows, by_window, strict=True):
                weight_gradient[:, *window] += part
            weight_gradient = _as_maps(weight_gradient)
        return images_gradient, weight_gradient, None, None, None


class _PatchConv(torch.autograd.Function):
    """A convolution whose products are matrix products over patches, or torch's, as chosen."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, geometry: Geometry, dtype: torch.dtype, choice: Choice
    ) -> Tensor:
        kernel, stride, padding, size = geometry
        # Tap i meets rows i - padding, i - padding + stride, ... Cut the taps that meet no row of the image.
        first = max(0, padding - stride * (geometry.out - 1))
        taps = slice(first, min(kernel, size + padding))
        images = images.to(dtype)
        weight = weight[:, :, taps, taps].to(dtype, memory_format=torch.channels_last)
        geometry = Geometry(taps.stop - first, stride, padding - first, size)
        ctx.save_for_backward(images, weight)
        ctx.kernel, ctx.taps, ctx.geometry, ctx.choice = kernel, taps, geometry, choice
        if not choice.forward:
            return torch.conv2d(images, weight, None, stride, geometry.padding)
        outputs = matmul(_patches(images, geometry), in_memory_order(weight).reshape(len(weight), -1).t())
        return _as_maps(outputs.view(len(images), geometry.out, geometry.out, -1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        images, weight = ctx.saved_tensors
        geometry, choice = ctx.geometry, ctx.choice
        needed = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        from_torch = [needed[0] and not choice.images_gradient, needed[1] and not choice.weight_gradient, False]
        images_gradient = weight_gradient = None
        if any(from_torch):
            stride, padding = [geometry.stride] * 2, [geometry.padding] * 2
            images_gradient, weight_gradient, _ = torch.ops.aten.convolution_backward(
                gradient, images, weight, None, stride, padding, [1, 1], False, [0, 0], 1, from_torch
            )
        outputs = in_memory_order(gradient).reshape(-1, len(weight))  # (N*O*O, D)
        if needed[0] and choice.images_gradient:
            images_gradient = _images_gradient(outputs, images, weight, geometry)
        if needed[1] and choice.weight_gradient:
            d, c, k, _ = weight.shape
            weight_gradient = _as_maps(matmul(outputs.t(), _patches(images, geometry)).view(d, k, k, c))
        if weight_gradient is not None:
            weight_gradient = _with_all_taps(weight_gradient.float(), ctx.taps, ctx.kernel)
        return images_gradient, weight_gradient, None, None, None


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product, computed by the library that is faster on this CPU.

    Torch computes fp32 products by MKL, which does not use AVX512 on an AMD CPU: oneDNN is twice as fast there. In bf16,
    torch uses oneDNN itself.
    """
    if a.dtype is torch.float32 and _has_onednn_linear():
        linear = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 (the operation has no public name)
        product: Tensor = linear(_dense(a), _dense(b).t(), None, "none", [], "")
        return product
    return a @ b


def _dense(matrix: Tensor) -> Tensor:
    """Return a matrix without gaps between its rows or columns: oneDNN takes 400 times as long with gaps."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


@cache
def _has_onednn_linear() -> bool:
    """Whether fp32 products are computed by oneDNN: with AVX512, in builds of torch that have it."""
    is_built = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return is_built and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _patches(images: Tensor, geometry: Geometry) -> Tensor:
    """Return what each output pixel meets: (N*O*O, K*K*C)."""
    k, stride, p, _ = geometry
    n, c, out = *images.shape[:2], geometry.out
    padded = F.pad(in_memory_order(images), (0, 0, p, p, p, p))
    by_n, by_row, by_column, by_channel = padded.stride()
    return padded.as_strided(
        (n, out, out, k, k, c), (by_n, by_row * stride, by_column * stride, by_row, by_column, by_channel)
    ).reshape(n * out * out, k * k * c)


def _images_gradient(outputs: Tensor, images: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of the images, given that of the outputs (N*O*O, D)."""
    k, stride, p, size = geometry
    n, c, out = *images.shape[:2], geometry.out
    padded = outputs.new_zeros(n, size + 2 * p, size + 2 * p, c)
    for y, x in product(range(k), range(k)):
        met = padded[:, y : y + stride * out : stride, x : x + stride * out : stride][:, :out, :out]
        met += matmul(outputs, weight[:, :, y, x]).view(n, out, out, c)
    return _as_maps(padded[:, p : p + size, p : p + size])


def _with_all_taps(gradient: Tensor, taps: slice, kernel: int) -> Tensor:
    """Return the gradient of a weight, with zeros for the taps that were cut off."""
    d, c, k, _ = gradient.shape
    if k == kernel:
        return gradient
    whole = gradient.new_zeros(d, kernel, kernel, c)
    whole[:, taps, taps] = in_memory_order(gradient)
    return _as_maps(whole)


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return a view of maps or weights (N, C, H, W) as (N, H, W, C), and of other tensors as they are."""
    return tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor


def _as_maps(maps: Tensor) -> Tensor:
    """Return a view of maps or weights (N, H, W, C) as (N, C, H, W)."""
    return maps.permute(0, 3, 1, 2)
