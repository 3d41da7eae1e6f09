"""Data sets as tensors on the device: whole, in memory, and always split in the same way.

A process reads a data set once and keeps it; there are no DataLoader workers. On a CPU, the images are mapped from their
files, and the parts of the split are positions in them: all trials on a machine share one copy in memory. The split into
training and validation images depends only on their two numbers, so every trial of every search has the same one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from hpo.errors import DataError, nearest
from hpo.train.fashion_mnist import read_fashion_mnist, read_sample

SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class Images:
    """Images and their labels.

    Attributes:
        pixels: uint8 of shape (M, 28, 28). Those of a file may be mapped from it, see `map_idx`, and must not be changed.
        labels: int64 of shape (N,), classes 0 to 9.
        positions: of the N images in `pixels`, int64 of shape (N,); None if they are all of them, in their order.
    """

    pixels: Tensor
    labels: Tensor
    positions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.labels.device

    @property
    def images(self) -> Tensor:
        """The images, uint8 of shape (N, 28, 28): a copy, if they have positions."""
        return self.pixels if self.positions is None else self.pixels[self.positions]

    def to(self, device: str) -> Images:
        """Return the same images on a device; on another one, without the images that have no position."""
        if torch.device(device) == self.device:
            return self
        return Images(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor) -> Images:
        """Return the images at some positions, in that order."""
        where = indices if self.positions is None else self.positions[indices]
        return Images(self.pixels[where], self.labels[indices])

    def select(self, indices: Tensor) -> Images:
        """Return the same as `take`, without a copy of the images."""
        where = indices if self.positions is None else self.positions[indices]
        return Images(self.pixels, self.labels[indices], where)

    def split(self, size: int) -> list[Images]:
        """Return the images in batches of a size, the last one smaller if necessary."""
        labels = self.labels.split(size)
        if self.positions is not None:
            return [Images(self.pixels, *parts) for parts in zip(labels, self.positions.split(size), strict=True)]
        return [Images(*parts) for parts in zip(self.pixels.split(size), labels, strict=True)]

    def as_input(self) -> Tensor:
        """Return the network's input: float of shape (N, 1, 28, 28) in [0, 1], in channels-last memory format."""
        return self.images.unsqueeze(1).float().div_(255).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in three parts, on one device."""

    train: Images
    validation: Images
    test: Images

    def to(self, device: str) -> Dataset:
        """Return the same data set on a device."""
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 hash of every image and label, in the order of the split."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            for tensor in (part.images, part.labels):
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.contiguous().cpu().numpy().data)
        return digest.hexdigest()


@lru_cache(maxsize=2)
def load(
    *,
    dataset: str = "fashion_mnist",
    train_samples: int | None = None,
    val_samples: int = 5000,
    data_dir: str = "data",
    device: str = "cpu",
) -> Dataset:
    """Return a data set, split, on a device. It is cached: trials in one worker share the tensors and must not change them.

    Args:
        dataset: `fashion_mnist`, downloaded into `data_dir` if it is not there, or `fashion_mnist_sample`, which is part
            of the package.
        train_samples: the number of training images, stratified by class; None takes all but the validation images.
        val_samples: the number of official training images that are held out for validation, stratified by class.
        data_dir: the folder of downloaded data sets.
        device: the device of the tensors.

    Raises:
        DataError: there is no such data set, its files are missing and cannot be downloaded, or it has too few images.
    """
    train, test = _read(dataset, data_dir)
    if val_samples + (train_samples or 1) > len(train):
        raise DataError(
            f"data set {dataset} has {len(train)} training images: too few for data.val_samples {val_samples} and "
            f"data.train_samples {train_samples or 'of at least 1'}"
        )
    order = stratified_order(train.labels)
    end = None if train_samples is None else val_samples + train_samples
    whole = Dataset(train.select(order[val_samples:end]), train.select(order[:val_samples]), test)
    return whole.to(device)


def stratified_order(labels: Tensor) -> Tensor:
    """Return an order, always the same, in which every prefix has each class in proportion, within one image.

    The members of a class are shuffled and spaced evenly over the interval (0, 1). All images are then sorted by their
    place in it.

    Args:
        labels: int64 of shape (N,).

    Returns:
        The positions 0 to N-1, int64 of shape (N,).
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        shuffled = members[torch.randperm(len(members), generator=generator)]
        place[shuffled] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return place.argsort(stable=True)


def _read(dataset: str, data_dir: str) -> tuple[Images, Images]:
    """Return the official training and test images."""
    if dataset == "fashion_mnist_sample":
        train, test = read_sample()
    elif dataset == "fashion_mnist":
        train, test = read_fashion_mnist(Path(data_dir))
    else:
        raise DataError(f"no data set {dataset!r}: {nearest(dataset, ['fashion_mnist', 'fashion_mnist_sample'])}")
    return Images(*train), Images(*test)
