"""The file of a checkpoint, in the format of `torch.save`: `torch.load` reads it, with `weights_only`.

Importing torch takes seconds and hundreds of MB of memory, in each worker. Trainables of other libraries, and scripts, have
states without tensors, which are written and read without torch: a zip archive with one pickle of protocol 2, as torch's
own is.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from hpo.search.checkpoints.states import has_tensors

_PICKLE, _VERSION = "archive/data.pkl", "archive/version"  # torch's names
_FORMAT = "3\n"  # of torch's archives, since version 1.6
_IS_FOLDER = 0x10  # of the attributes of MS-DOS
_PROTOCOL = 2  # the only one that `weights_only` reads
# What the pickle of a plain value may call, by its name in protocol 2. `_codecs.encode` makes bytes.
_CALLABLE: dict[tuple[str, str], Callable[..., Any]] = {
    ("__builtin__", "set"): set,
    ("__builtin__", "complex"): complex,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): Counter,
    ("_codecs", "encode"): str.encode,
}


def write_archive(file: IO[bytes], content: Mapping[str, Any]) -> None:
    """Write a file.

    Args:
        file: open for writing.
        content: tensors and plain values, see `states.check_plain`.

    Raises:
        OSError: the file could not be written.
    """
    if not has_tensors(content):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(_PICKLE, pickle.dumps(content, _PROTOCOL))
            archive.writestr(_VERSION, _FORMAT)
        return
    import torch

    try:
        torch.save(content, file)
    except RuntimeError as error:  # of torch's writer, which hides the operating system's error
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(str(error).splitlines()[0]) from error


def read_archive(path: Path) -> Any:
    """Return the content of a file. Nothing in it is run.

    Args:
        path: the file.

    Raises:
        OSError, MemoryError, RuntimeError: it could not be read. It may be intact.
        Exception: it is damaged: of `zipfile`, `pickle` and torch.
    """
    with zipfile.ZipFile(path) as archive:
        # Torch does not verify the checksums, and reads no content of a file that is marked as a folder.
        if archive.testzip() is not None or any(info.external_attr & _IS_FOLDER for info in archive.infolist()):
            raise zipfile.BadZipFile(path.name)
        if _PICKLE in archive.namelist():
            with archive.open(_PICKLE) as file:
                try:
                    return _PlainUnpickler(file).load()
                except _NotPlainError:
                    pass
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


class _NotPlainError(Exception):
    """A pickle has more than plain values, such as tensors."""


class _PlainUnpickler(pickle.Unpickler):
    """Reads plain values. Anything else is left to torch."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        try:
            return _CALLABLE[module, name]
        except KeyError:
            raise _NotPlainError from None

    def persistent_load(self, _pid: Any) -> NoReturn:
        raise _NotPlainError
