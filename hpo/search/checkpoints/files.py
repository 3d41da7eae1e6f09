"""The folder of a trial, and its checkpoints. They are written atomically; the previous one is the fallback.

A checkpoint holds the trainable's state and the metrics of all epochs so far. If the driver died before it stored an epoch,
the epoch is reported again from the checkpoint instead of being trained again.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import pickle
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hpo.paths import CONFIGURATION_FILE, atomic_file
from hpo.search.checkpoints.archive import read_archive, write_archive
from hpo.search.checkpoints.states import check_plain

KEPT_CHECKPOINTS = 2
_UNREADABLE = (
    OSError,
    MemoryError,
    RuntimeError,  # torch's reader, and its allocator
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,  # of a flipped bit that says that the archive is compressed
)


@dataclass(frozen=True)
class Checkpoint:
    """The state from which a trial resumes.

    Attributes:
        epoch: the last finished epoch.
        history: {epoch: metrics} of all finished epochs.
        state: what the trainable's `EpochReport.state` returned.
        key: whose it is, see `owner_key`; empty if an earlier version of hpo wrote it.
    """

    epoch: int
    history: dict[int, dict[str, float]]
    state: dict[str, Any]
    key: str = ""


def owner_key(key: str, attempt: str) -> str:
    """Return whose a trial's folder is: an attempt to train a configuration.

    Args:
        key: the configuration's key.
        attempt: see `storage.records.attempt_of`; `1` for the first.
    """
    return key if attempt == "1" else f"{key}-{attempt}"


class TakenOverError(Exception):
    """Another worker has claimed the trial's folder. This one must not write to it any more."""


def claim_folder(folder: Path, key: str, token: int = 0, claimed_milliseconds: int = 0) -> str:
    """Make a folder that of a configuration and of one worker.

    Files of another configuration are never taken for its own: folders are named after trial numbers, and a database that
    was restored from a copy gives numbers out again. A worker that had claimed the folder before can save no checkpoint
    any more, see `save_checkpoint`.

    Args:
        folder: the trial's folder. It is created, or kept if it is that of the same configuration, else renamed first.
        key: see `owner_key`.
        token: of the claim of the trial.
        claimed_milliseconds: when that was made, by the database's clock.

    Returns:
        A warning if files of another configuration were renamed; else empty.

    Raises:
        OSError: a folder of another configuration cannot be renamed, or the claim cannot be written (disk full).
    """
    before = read_claim(folder)
    owner, warning = before.key, ""
    if owner not in {None, key}:
        aside = next(
            path
            for number in itertools.count(1)
            if not (path := folder.with_name(f"{folder.name}.other-{number}")).exists()
        )
        folder.rename(aside)
        if str(owner).partition("-")[0] != key.partition("-")[0]:  # else of an earlier attempt
            warning = f"the files in {folder} were of another configuration; they are now in {aside.name}"
    if before != (key, token, claimed_milliseconds):
        folder.mkdir(parents=True, exist_ok=True)
        content = {"key": key, "token": token, "claimed": claimed_milliseconds}
        with atomic_file(folder / CONFIGURATION_FILE, sync=True) as file:
            file.write(json.dumps(content).encode())
    return warning


def list_set_aside(folder: Path) -> list[Path]:
    """Return the folders to which `claim_folder` has renamed earlier ones of a trial, if it has."""
    return sorted(folder.parent.glob(f"{folder.name}.other-*"))


def belongs_to(folder: Path, key: str) -> bool:
    """Return whether a trial's folder is that of a configuration. Folders of older versions do not say whose they are."""
    return read_claim(folder).key in {None, key}


class FolderClaim(NamedTuple):
    """Who has claimed a trial's folder last.

    Attributes:
        key: whose it is, see `owner_key`; None if it does not say.
        token: of the claim.
        claimed_milliseconds: when the claim was made, by the database's clock; 0 if unknown.
    """

    key: str | None = None
    token: int = 0
    claimed_milliseconds: int = 0


def read_claim(folder: Path) -> FolderClaim:
    """Return who has claimed a trial's folder."""
    # Earlier versions did not flush the file to the disk: after a power cut it may be empty.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        content = json.loads((folder / CONFIGURATION_FILE).read_bytes())
        return FolderClaim(str(content["key"]), int(content.get("token", 0)), int(content.get("claimed", 0)))
    return FolderClaim()


def check_claim(folder: Path, token: int) -> None:
    """Raise TakenOverError if another worker has claimed a trial's folder.

    Args:
        folder: the trial's folder.
        token: of the claim of the trial, see `claim_folder`.
    """
    claim = read_claim(folder)
    if claim.key is not None and claim.token != token:
        raise TakenOverError(f"another worker trains this trial in {folder}")


def save_checkpoint(folder: Path, checkpoint: Checkpoint, token: int = 0, *, interval: int = 0) -> None:
    """Write a checkpoint atomically, flushed to disk, and delete all but the newest two.

    Args:
        folder: the trial's folder.
        checkpoint: the state after an epoch.
        token: of the claim of the trial, see `claim_folder`.
        interval: the newest two of epochs that are multiples of it stay, too: other trials start from them. 0 for none.

    Raises:
        TakenOverError: another worker has claimed the folder.
        OSError: it could not be written (disk full, no rights); earlier checkpoints are unchanged.
        TypeError: the state holds something that could not be loaded again.
    """
    check_claim(folder, token)
    check_plain(checkpoint.state)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(checkpoint_file(folder, checkpoint.epoch), sync=True) as file:
        write_archive(file, vars(checkpoint))
    found = list_checkpoints(folder)
    shared = [path for path in found if interval and epoch_of(path) % interval == 0]
    for old in found[KEPT_CHECKPOINTS:]:
        if old not in shared[:KEPT_CHECKPOINTS]:
            old.unlink(missing_ok=True)


def load_checkpoint(folder: Path, key: str) -> Checkpoint | None:
    """Return the newest readable checkpoint, or None. Damaged ones are renamed to `*.damaged`, those of others to `*.other`.

    Args:
        folder: the trial's folder.
        key: whose checkpoint it must be, see `owner_key`. Those of earlier versions do not say whose they are.

    Raises:
        OSError, MemoryError, RuntimeError: no checkpoint could be read, and at least one may be intact.
    """
    for leftover in folder.glob("*.tmp"):  # of a worker that was killed while it wrote
        leftover.unlink(missing_ok=True)
    passing: Exception | None = None
    for path in list_checkpoints(folder):
        try:
            checkpoint = _read(path)
            if checkpoint.key in {"", key}:
                return checkpoint
            path.replace(path.with_suffix(".other"))
        except FileNotFoundError:  # deleted meanwhile
            continue
        except _UNREADABLE as error:
            if _may_pass(error):
                passing = error
                continue
            with contextlib.suppress(OSError):
                path.replace(path.with_suffix(".damaged"))
    if passing is not None:
        raise passing
    return None


def read_checkpoint(folder: Path, key: str, epoch: int = 0) -> Checkpoint | None:
    """Return a readable checkpoint of another trial, or None. Its folder stays as it is.

    Args:
        folder: the trial's folder.
        key: whose checkpoint it must be, see `owner_key`.
        epoch: the checkpoint after this epoch is returned; without it the next later one, else the next earlier one. 0 for
            the newest.

    Raises:
        OSError, MemoryError, RuntimeError: no checkpoint could be read, and at least one may be intact.
    """
    paths = list_checkpoints(folder)
    return read_first(sorted(paths, key=lambda path: distance(epoch_of(path), epoch)), key)


def distance(found: int, epoch: int) -> tuple[bool, int]:
    """Return by what `read_checkpoint` chooses: the smallest is the best."""
    return (found < epoch, abs(found - epoch)) if epoch else (False, -found)


def read_first(paths: Iterable[Path], key: str) -> Checkpoint | None:
    """Return the first checkpoint that can be read; see `read_checkpoint`.

    Args:
        paths: the files.
        key: whose checkpoint it must be, see `owner_key`.
    """
    passing: Exception | None = None
    for path in paths:
        try:
            checkpoint = _read(path)
        except FileNotFoundError:  # deleted meanwhile
            continue
        except _UNREADABLE as error:
            passing = error if _may_pass(error) else passing
            continue
        if checkpoint.key in {"", key}:
            return checkpoint
    if passing is not None:
        raise passing
    return None


def _read(path: Path) -> Checkpoint:
    found = read_archive(path)
    return Checkpoint(found["epoch"], found["history"], found["state"], found.get("key", ""))


def _may_pass(error: Exception) -> bool:
    """Return whether an error of reading says nothing about the file: a stale file handle, no memory."""
    if isinstance(error, OSError):
        # A damaged file can name a position before its start, or a compression, whose errors have no number.
        return error.errno not in {None, errno.EINVAL}
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error))


def trim_checkpoints(folder: Path, token: int, keep: int = 1) -> None:
    """Delete all but the newest checkpoints, unless another worker has claimed the folder. An ended trial needs no fallback.

    Best effort: a file that stays takes room on the disk, but an error here would end the search.

    Args:
        folder: the trial's folder.
        token: of the claim of the trial.
        keep: how many stay.
    """
    with contextlib.suppress(OSError):
        if read_claim(folder).token == token:
            for old in list_checkpoints(folder)[keep:]:
                old.unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint files of a trial, newest first."""
    return sorted(folder.glob("epoch-*.pt"), reverse=True)


def checkpoint_file(folder: Path, epoch: int) -> Path:
    """Return the file of the checkpoint after an epoch."""
    return folder / f"epoch-{epoch:06d}.pt"


def epoch_of(path: Path) -> int:
    """Return the epoch of a checkpoint, by its name; 0 for a name that hpo does not give."""
    digits = path.stem.removeprefix("epoch-")
    return int(digits) if digits.isdecimal() else 0
