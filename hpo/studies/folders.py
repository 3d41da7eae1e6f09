"""Listing, measuring and deleting files, as far as possible."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def entries(folder: Path, problems: list[str]) -> list[Path]:
    """Return what is in a folder, by name; nothing if it is missing, not a folder, or not readable, which is a problem."""
    with errors_noted(folder, problems), suppress(FileNotFoundError, NotADirectoryError):
        return sorted(folder.iterdir())
    return []


@contextmanager
def errors_noted(path: Path, problems: list[str]) -> Iterator[None]:
    """Make an error of reading a problem: what else there is can be cleaned."""
    try:
        yield
    except OSError as error:
        problems.append(f"cannot read {error.filename or path}: {error.strerror or error}")


def statuses(path: Path | str) -> Iterator[os.stat_result]:
    """Yield the status of a file, or of each file below a folder. Links are not followed below it."""
    try:
        found = os.scandir(path)
    except NotADirectoryError:
        with suppress(OSError):
            yield os.lstat(path)
        return
    except OSError:  # missing, or not readable
        return
    with found:
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                yield from statuses(entry.path)
            else:
                with suppress(OSError):
                    yield entry.stat(follow_symlinks=False)


def count_bytes(path: Path | str) -> int:
    """Return the size of a file, or of all files below a folder; 0 if it is missing."""
    return sum(entry.st_size for entry in statuses(path))


def delete_path(path: Path) -> str:
    """Delete a file or a folder; return why it is still there, or an empty text."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        if os.path.lexists(path):
            return f"cannot delete {path}: {error.strerror or error}"
    return ""
