"""Fashion-MNIST on disk: reads the idx files of the sample that is part of the package, maps those of the full data set."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import math
import mmap
import shutil
import struct
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from hpo.errors import DataError

SAMPLE_DIR = Path(__file__).parent / "sample_data"
CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
# Of the official files, unpacked. The download is over plain HTTP, and torchvision compares MD5 sums, which can be forged.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
Content = bytearray | mmap.mmap  # of a file; torch takes memory that can be written to
Part = tuple[Tensor, Tensor]  # images, uint8 of shape (N, 28, 28), and labels, int64 of shape (N,)

_UINT8 = 0x08  # the code of the element type in the idx format


def read_sample() -> tuple[Part, Part]:
    """Return 2,000 training and 500 test images, which are part of the package."""
    files = [gzip.decompress((SAMPLE_DIR / f"{name}.gz").read_bytes()) for name in FILES]
    return _decode(*map(bytearray, files))


def read_fashion_mnist(data_dir: Path) -> tuple[Part, Part]:
    """Return the 60,000 training and 10,000 test images. Files that are missing are downloaded.

    The images are mapped from the files, see `map_file`.

    Args:
        data_dir: the files are in FashionMNIST/raw below it, where torchvision puts them.

    Raises:
        DataError: the files are damaged, or missing and cannot be downloaded.
    """
    raw = data_dir / "FashionMNIST" / "raw"
    paths = [raw / name for name in FILES]
    with contextlib.suppress(OSError, ValueError):
        return _decode(*map(map_file, paths))
    try:
        # Missing or damaged, or another process is unpacking them at this moment.
        _download(data_dir, paths)
        return _decode(*map(map_file, paths))
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:
        if all(path.exists() for path in paths):
            raise DataError(
                f"Fashion-MNIST in {raw} is damaged ({_first_line(error)}). Delete the unpacked files there, those "
                "without .gz, and start again"
            ) from None
        listed = "\n".join(f"  {path.name}.gz" for path in paths)
        raise DataError(
            f"Fashion-MNIST is not in {raw} and could not be downloaded ({_first_line(error)}).\n"
            f"Put these four files there, from a machine with a network or from another copy:\n{listed}\n"
            "or pass a writable folder that contains them with --data-dir. "
            "Without them, `python -m hpo.run quick` runs a smaller search on a sample that is part of the package."
        ) from None


def _download(data_dir: Path, paths: list[Path]) -> None:
    """Download the files that are missing, unpack them, and check what was unpacked before anybody can read it.

    Raises:
        ValueError: a file is not the official one. It is not used.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    # Processes that start at the same time must not unpack into the same files.
    with FileLock(data_dir / ".fashion_mnist.lock"):
        if all(path.exists() for path in paths):
            return
        from torchvision.datasets import FashionMNIST  # takes seconds

        with tempfile.TemporaryDirectory(prefix=".fashion_mnist-", dir=data_dir) as scratch:
            raw = Path(scratch) / "FashionMNIST" / "raw"
            raw.mkdir(parents=True)
            for path in paths:
                packed = path.with_name(f"{path.name}.gz")
                if packed.exists():
                    shutil.copyfile(packed, raw / packed.name)
            output = io.StringIO()  # torchvision prints progress
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                FashionMNIST(scratch, download=True)
            for path in paths:
                if hashlib.sha256((raw / path.name).read_bytes()).hexdigest() != SHA256[path.name]:
                    raise ValueError(f"{path.name}.gz is not the official file")
            paths[0].parent.mkdir(parents=True, exist_ok=True)
            for path in paths:
                (raw / path.name).replace(path)


def map_file(path: Path) -> Content:
    """Return a file as memory that all processes share which map it, until one writes to it: then it has a copy of the page.

    Where the file system cannot map files, this process gets a copy. The file must not be changed while it is mapped.
    Nothing here does: `_download` only adds files.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty.
    """
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError:
            return bytearray(file.read())


def _decode(
    train_images: Content, train_labels: Content, test_images: Content, test_labels: Content
) -> tuple[Part, Part]:
    """Return the training and the test images.

    Raises:
        ValueError: the files are not idx files, or do not fit together.
    """
    train, test = (
        (decode_idx(images, dimensions=3), decode_idx(labels, dimensions=1).long())
        for images, labels in ((train_images, train_labels), (test_images, test_labels))
    )
    for images, labels in (train, test):
        if len(images) != len(labels) or images.shape[1:] != (28, 28):
            raise ValueError(f"{len(labels)} labels for images of shape {tuple(images.shape)}")
    return train, test


def decode_idx(content: Content, *, dimensions: int) -> Tensor:
    """Return the array of an idx file, uint8, in the same memory.

    The format: two zero bytes, the element type, the number of dimensions, each size as a big-endian int32, the elements.

    Raises:
        ValueError: it is not an idx file of uint8 with this number of dimensions, or its length does not match its sizes.
    """
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, _UINT8, dimensions]):
        raise ValueError(f"not an idx file of uint8 with {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}i", content[4:header])
    count = len(content) - header
    if min(shape) < 1 or count != math.prod(shape):
        raise ValueError(f"{count} bytes for an array of shape {shape}")
    return torch.frombuffer(content, dtype=torch.uint8, offset=header).reshape(shape)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(":")
