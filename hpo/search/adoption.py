"""A trial that continues another one: the worker copies the parent's checkpoint into the trial's own folder.

The parent's folder is only read. The copy is atomic: what is missing after a kill is copied by the next worker.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hpo.paths import SCRIPT_DIR, sync_folder
from hpo.search.checkpoints import Checkpoint, read_checkpoint, save_checkpoint

_PARTIAL = f"{SCRIPT_DIR}.partial-"  # a copy of a script's folder that is not complete


@dataclass(frozen=True)
class Adopted:
    """The checkpoint of a parent, as one of the trial.

    Attributes:
        checkpoint: from which the trial starts.
        warning: why it could not be saved for the trial; empty if it was.
    """

    checkpoint: Checkpoint
    warning: str = ""


def adopt_checkpoint(
    folder: Path,
    key: str,
    token: int,
    *,
    parent: Path,
    parent_key: str,
    is_script: bool,
    left_out: Collection[str] = (),
    epoch: int = 0,
    interval: int = 0,
) -> Adopted | None:
    """Save a checkpoint of a trial, by default its last, as one of the trial that continues it. Repeating it is harmless.

    Args:
        folder: the trial's folder, claimed.
        key: whose checkpoint it becomes, see `owner_key`.
        token: of the claim of the trial.
        parent: the folder of the trial that is continued.
        parent_key: whose that must be.
        is_script: whether a script has saved its own files, too.
        left_out: names of metrics that belong to the end of the parent, and are not those of an epoch.
        epoch: see `read_checkpoint`. The parent may go on training.
        interval: see `save_checkpoint`.

    Returns:
        The checkpoint; None if the parent has none any more.

    Raises:
        TakenOverError: another worker has claimed the folder.
        OSError, MemoryError, RuntimeError: the checkpoint could not be read, and may be intact; or the files of the script
            could not be copied.
    """
    found = read_checkpoint(parent, parent_key, epoch)
    if found is None or (is_script and not (parent / SCRIPT_DIR).is_dir()):
        return None
    history = {
        epoch: {name: value for name, value in metrics.items() if name not in left_out}
        for epoch, metrics in found.history.items()
    }
    checkpoint = Checkpoint(found.epoch, history, found.state, key)
    if is_script:  # first: with the checkpoint, the copy counts as complete
        _copy_script_files(parent / SCRIPT_DIR, folder)
    try:
        save_checkpoint(folder, checkpoint, token, interval=interval)
    except OSError as error:  # the training itself needs no file; after a crash, the parent is read again
        return Adopted(checkpoint, f"the checkpoint of its parent could not be copied: {error}")
    return Adopted(checkpoint)


def _copy_script_files(source: Path, folder: Path) -> None:
    """Copy the files of a script, which may change them: no hard links. Do nothing if they are there."""
    for leftover in folder.glob(f"{_PARTIAL}*"):  # of a worker that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    target = folder / SCRIPT_DIR
    if target.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{_PARTIAL}{secrets.token_hex(4)}"
    try:
        shutil.copytree(source, draft, symlinks=True, copy_function=_copy_synced)
        draft.rename(target)
        sync_folder(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _copy_synced(source: str, target: str, *, follow_symlinks: bool = True) -> str:
    shutil.copy2(source, target, follow_symlinks=follow_symlinks)
    if not Path(target).is_symlink():
        with Path(target).open("rb") as file:
            os.fsync(file.fileno())
    return target
