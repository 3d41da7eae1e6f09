"""Random changes of the training images: mirrored, moved, a box erased.

All random numbers of an epoch are drawn before its first step, on the CPU, and copied into buffers on the device that stay
where they are: a step draws nothing, so that it can be captured as a CUDA graph, and an epoch depends only on its seed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor

from hpo.train.params import SIDE, TrainParams

# Of random erasing, as published: the area of the box relative to the image, and its height relative to its width.
ERASED_AREA = (0.02, 0.4)
ERASED_ASPECT = (0.3, 1 / 0.3)


class Augmentation:
    """The changes of one epoch's images: each image is mirrored, then moved, then a box of it is erased.

    Args:
        params: the hyperparameters flip, translate and erase.
        count: the number of training images.
        device: the device of the images.
    """

    def __init__(self, params: TrainParams, count: int, device: torch.device) -> None:
        self._params = params
        self._count = count
        self._pixels = torch.arange(SIDE, device=device)
        self._mirrored = torch.zeros(count, dtype=torch.bool, device=device)
        self._moves = torch.zeros(2, count, dtype=torch.int64, device=device)  # pixels down, pixels to the right
        self._boxes = torch.zeros(4, count, dtype=torch.int64, device=device)  # top, bottom, left, right; ends excluded

    @staticmethod
    def is_used(params: TrainParams) -> bool:
        """Return whether the hyperparameters change any image."""
        return params.flip or params.translate > 0 or params.erase > 0

    def draw(self, generator: torch.Generator) -> None:
        """Draw the changes of every image for the next epoch.

        Args:
            generator: of the epoch, on the CPU.
        """
        if self._params.flip:
            self._mirrored.copy_(torch.rand(self._count, generator=generator) < 0.5)
        if self._params.translate:
            most = self._params.translate
            self._moves.copy_(torch.randint(-most, most + 1, (2, self._count), generator=generator))
        if self._params.erase:
            self._boxes.copy_(_draw_boxes(self._params.erase, self._count, generator))

    def apply(self, images: Tensor, indices: Tensor) -> Tensor:
        """Return changed images. What moves in from outside an image is 0, and so is an erased box.

        Args:
            images: uint8 of shape (B, 28, 28).
            indices: the position of each of them among the training images, int64 of shape (B,).
        """
        most = self._params.translate
        if self._params.flip or most:
            # Pixel (y, x) of the result is pixel (y - down, x - right) of the image, or its mirror image.
            down, right = self._moves[:, indices].unsqueeze(2)
            rows, columns = self._pixels - down, self._pixels - right
            columns = torch.where(self._mirrored[indices, None], SIDE - 1 - columns, columns)
            images = F.pad(images, (most, most, most, most))
            images = images.gather(1, (rows + most)[:, :, None].expand(-1, -1, images.shape[2]))
            images = images.gather(2, (columns + most)[:, None, :].expand(-1, SIDE, -1))
        if self._params.erase:
            top, bottom, left, right = self._boxes[:, indices].unsqueeze(2)
            in_rows = (self._pixels >= top) & (self._pixels < bottom)
            in_columns = (self._pixels >= left) & (self._pixels < right)
            images = images.masked_fill(in_rows[:, :, None] & in_columns[:, None, :], 0)
        return images


def _draw_boxes(probability: float, count: int, generator: torch.Generator) -> Tensor:
    """Return the tops, bottoms, lefts and rights of boxes, int64 of shape (4, count); 0 where nothing is erased."""
    chance, area, aspect, top, left = torch.rand(5, count, generator=generator).unbind()
    area = SIDE**2 * _between(*ERASED_AREA, area)
    aspect = _between(*ERASED_ASPECT, aspect)
    height = (area * aspect).sqrt().round().clamp(1, SIDE)
    width = (area / aspect).sqrt().round().clamp(1, SIDE)
    top = (top * (SIDE - height + 1)).floor()
    left = (left * (SIDE - width + 1)).floor()
    boxes = torch.stack([top, top + height, left, left + width]).long()
    return boxes * (chance < probability)


def _between(low: float, high: float, share: Tensor) -> Tensor:
    return low + (high - low) * share
