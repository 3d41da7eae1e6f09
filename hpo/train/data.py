"""Data sets as tensors on the device: whole, in memory, split once and for all.

A data set is read once per process and kept; there are no DataLoader workers. The split into training and validation
images depends on nothing but the two sizes, so every trial of every search sees the same one.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from hpo.errors import DataError, nearest

SAMPLE_DIR = Path(__file__).parent / "sample_data"
SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class Images:
    """Images and their labels.

    Attributes:
        images: uint8 of shape (N, 28, 28).
        labels: int64 of shape (N,), classes 0 to 9.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str) -> Images:
        """Return the same images on a device."""
        return Images(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor) -> Images:
        """Return the images at some positions, in that order."""
        return Images(self.images[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in its three parts, on one device."""

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
        """The hash of every image and label, in the order of the split."""
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
    """Return a data set, split, on a device. Cached: trials of one worker share the tensors and must not change them.

    Args:
        dataset: fashion_mnist (downloaded by torchvision into data_dir) or fashion_mnist_sample (ships with the code).
        train_samples: how many images are trained on, stratified; None takes all that validation leaves.
        val_samples: how many of the training images are held out for validation, stratified.
        data_dir: the folder for downloads.
        device: where the tensors are put.

    Raises:
        DataError: no such data set, its files are missing and cannot be fetched, or it is too small for the split.
    """
    train, test = _read(dataset, data_dir)
    if val_samples + (train_samples or 1) > len(train):
        raise DataError(
            f"data set {dataset} has {len(train)} training images: too few for data.val_samples {val_samples} and "
            f"data.train_samples {train_samples or 'of at least 1'}"
        )
    order = stratified_order(train.labels)
    end = None if train_samples is None else val_samples + train_samples
    whole = Dataset(train.take(order[val_samples:end]), train.take(order[:val_samples]), test)
    return whole.to(device)


def stratified_order(labels: Tensor) -> Tensor:
    """Return an order, always the same, in which every stretch holds the classes in their proportions.

    Each class is shuffled and its members are spread evenly over the interval (0, 1); sorted by that place, any
    prefix has of each class its share, give or take one image.

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
        return _read_idx("train"), _read_idx("t10k")
    if dataset == "fashion_mnist":
        return _read_fashion_mnist(Path(data_dir))
    raise DataError(f"no data set {dataset!r}: {nearest(dataset, ['fashion_mnist', 'fashion_mnist_sample'])}")


def _read_idx(kind: str) -> Images:
    # The idx format: a header of 16 bytes (images: magic, count, rows, columns) or 8 (labels: magic, count), then uint8.
    pixels = bytearray(gzip.decompress((SAMPLE_DIR / f"{kind}-images-idx3-ubyte.gz").read_bytes())[16:])
    labels = bytearray(gzip.decompress((SAMPLE_DIR / f"{kind}-labels-idx1-ubyte.gz").read_bytes())[8:])
    return Images(
        torch.frombuffer(pixels, dtype=torch.uint8).reshape(-1, 28, 28),
        torch.frombuffer(labels, dtype=torch.uint8).long(),
    )


def _read_fashion_mnist(data_dir: Path) -> tuple[Images, Images]:
    from torchvision.datasets import FashionMNIST

    raw = data_dir / "FashionMNIST" / "raw"
    chatter = io.StringIO()  # torchvision prints what it downloads
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        # The lock: drivers that start together must not unpack into each other's files.
        with (
            contextlib.redirect_stdout(chatter),
            contextlib.redirect_stderr(chatter),
            FileLock(data_dir / ".fashion_mnist.lock"),
        ):
            parts = [FashionMNIST(str(data_dir), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:
        names = [name for name, _ in FashionMNIST.resources]
        if all((raw / name.removesuffix(".gz")).exists() for name in names):
            raise DataError(
                f"Fashion-MNIST in {raw} is damaged ({_first_line(error)}). Delete the unpacked files there, those "
                "without .gz, and start again"
            ) from None
        listed = "\n".join(f"  {name}" for name in names)
        raise DataError(
            f"Fashion-MNIST is not in {raw} and could not be fetched ({_first_line(error)}).\n"
            f"Put these four files there, from a machine with a network or another copy:\n{listed}\n"
            "or name a writable folder that has them by --data-dir. "
            "Without them, `python -m hpo.run quick` runs the same search on the small sample that ships with the code."
        ) from None
    train, test = (Images(part.data, part.targets) for part in parts)
    return train, test


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(":")
