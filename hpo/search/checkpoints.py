"""Checkpoints of a trial on disk: written whole or not at all, the one before kept as a fallback.

A checkpoint holds the trainable's state and the reports of all epochs so far, so that an epoch that was finished but not
yet stored in SQL when the driver died is reported again instead of trained again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

# torch is imported late: the driver, which only trims, starts seconds sooner.

KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """What a trial goes on from.

    Attributes:
        epoch: the last finished epoch.
        history: {epoch: metrics} of all finished epochs.
        state: the trainable's own.
    """

    epoch: int
    history: dict[int, dict[str, float]]
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint under its final name only when it is whole; drop all but the newest two.

    Raises:
        OSError: it could not be written (disk full, no rights); the earlier checkpoints stand.
        TypeError: the state holds something that could not be loaded again.
    """
    import torch

    _check_plain(checkpoint.state, "state")
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"epoch-{checkpoint.epoch:06d}.pt"
    # Named after the process: a worker that outlived its driver for a moment may write the same epoch.
    temporary = final.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"epoch": checkpoint.epoch, "history": checkpoint.history, "state": checkpoint.state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)
    except RuntimeError as error:  # torch's writer wraps the operating system's error
        raise OSError(str(error).splitlines()[0]) from error
    finally:
        temporary.unlink(missing_ok=True)
    for old in _newest_first(folder)[KEEP:]:
        old.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that can be read, None if there is none. A damaged one is set aside."""
    import torch

    for leftover in folder.glob("*.tmp"):  # of a worker that was killed while it wrote
        leftover.unlink(missing_ok=True)
    for path in _newest_first(folder):
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:  # torch itself does not look at the checksums
                    raise zipfile.BadZipFile(path.name)
            # weights_only: tensors and plain values, nothing that runs code.
            found = torch.load(path, map_location="cpu", weights_only=True)
            return Checkpoint(found["epoch"], found["history"], found["state"])
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError,
                zipfile.BadZipFile):  # fmt: skip
            with contextlib.suppress(OSError):
                path.replace(path.with_suffix(".damaged"))
    return None


def trim_checkpoints(folder: Path) -> None:
    """Keep only the newest checkpoint of a finished trial."""
    for old in _newest_first(folder)[1:]:
        old.unlink(missing_ok=True)


def _check_plain(value: Any, where: str) -> None:
    """Refuse, while the trial's author can still read it, what weights_only would refuse at the next start."""
    from torch import Tensor

    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple | set):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif not isinstance(value, Tensor) and type(value) not in {NoneType, bool, int, float, complex, str, bytes}:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"a checkpoint holds tensors and plain values, but {where} is a {kind}")


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*.pt"), reverse=True)
