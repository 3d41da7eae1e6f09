"""Faster convolutions of small maps on the CPU, under bf16 autocast. On a GPU and in fp32, nothing changes.

The maps of a ResNet's late layers are 4x4 down to 1x1. There oneDNN reaches a fraction of its speed (measured: the weight
gradient of 512 -> 512 channels takes 1.7 times as long as the forward pass at 4x4, 2.4 times at 2x2), and most of a 3x3
kernel only meets padding. Two exact changes help: taps that never meet an image are cut off, and the weight gradient is one
matrix product over the patches.

The results differ from oneDNN's in rounding only, with one exception: on AMX, oneDNN (torch 2.15) does not initialize the
weight gradient of taps that only meet padding if the image is 1x1 and the stride above 1. Here it is 0. No convolution of
ResNet-18 on 28x28 images has this shape.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

LARGEST_MAP = 4  # pixels along a side of the output; from 7 on, oneDNN's gradient is as fast


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
    """A plain convolution that uses the faster kernels if its output is small."""

    def forward(self, images: Tensor) -> Tensor:
        kernel, stride, padding = self.kernel_size[0], self.stride[0], int(self.padding[0])
        height, width = images.shape[2:]
        out = (height + 2 * padding - kernel) // stride + 1
        if out > LARGEST_MAP or height != width or images.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(images)
        # Tap i meets rows i - padding, i - padding + stride, ... Cut the taps that meet no row of the image.
        first = max(0, padding - stride * (out - 1))
        last = min(kernel, height + padding)
        result: Tensor = _SmallMapConv.apply(images, self.weight, stride, padding - first, slice(first, last))
        return result


class _SmallMapConv(torch.autograd.Function):
    """A convolution in bf16 whose weight gradient is one matrix product.

    Shapes: N images, C channels in, D channels out, H rows, W columns, K taps along a side of the kernel.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, stride: int, padding: int, taps: slice) -> Tensor:
        images = images.to(torch.bfloat16)
        kernel = weight[:, :, taps, taps].to(torch.bfloat16, memory_format=torch.channels_last)
        ctx.save_for_backward(images, kernel)
        ctx.geometry = stride, padding, taps, weight.shape
        return torch.conv2d(images, kernel, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        images, kernel = ctx.saved_tensors
        stride, padding, taps, shape = ctx.geometry
        images_gradient = None
        geometry = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1
        if ctx.needs_input_grad[0]:
            images_gradient, _, _ = torch.ops.aten.convolution_backward(
                gradient, images, kernel, None, *geometry, [True, False, False]
            )
        d, c, k = kernel.shape[:3]
        n, _, out, _ = gradient.shape
        padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))  # (N, H, W, C)
        by_n, by_row, by_column, by_channel = padded.stride()
        patches = padded.as_strided(
            (n, out, out, k, k, c), (by_n, by_row * stride, by_column * stride, by_row, by_column, by_channel)
        ).reshape(n * out * out, k * k * c)
        product = (gradient.permute(0, 2, 3, 1).reshape(-1, d).t() @ patches).view(d, k, k, c)
        if k == shape[2]:
            weight_gradient = product.float()
        else:
            weight_gradient = torch.zeros(d, shape[2], shape[3], c)
            weight_gradient[:, taps, taps] = product
        return images_gradient, weight_gradient.permute(0, 3, 1, 2), None, None, None
