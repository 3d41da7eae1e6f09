"""A trial that continues another one: the worker copies the parent's checkpoint into the trial's own folder.

The parent's folder is only read. The copy is atomic: what is missing after a kill is copied by the next worker.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from hpo.paths import PARENT_SUFFIX, SCRIPT_DIR, RunsDir, sync_folder
from hpo.search.checkpoints.bucket import BucketTrial, nearest_file
from hpo.search.checkpoints.files import (
    Checkpoint,
    belongs_to,
    check_claim,
    list_set_aside,
    read_checkpoint,
    read_first,
    save_checkpoint,
)
from hpo.search.script import ScriptError

_PARTIAL = f"{SCRIPT_DIR}.partial-"  # a copy of a script's folder that is not complete; the token of its claim follows


@dataclass(frozen=True)
class Adopted:
    """The checkpoint of a parent, as one of the trial.

    Attributes:
        checkpoint: from which the trial starts.
        warning: why it could not be saved for the trial; empty if it was.
    """

    checkpoint: Checkpoint
    warning: str = ""


def parent_folder(runs_dir: RunsDir, folder: Path, files: str, number: int) -> Path:
    """Return where the files of the trial are that a trial continues.

    Args:
        runs_dir: where checkpoints are.
        folder: of the trial.
        files: the name of the folder of the parent's study.
        number: of the parent.
    """
    copied = folder.with_name(folder.name + PARENT_SUFFIX)  # its study was copied from another database
    return copied if copied.is_dir() else runs_dir.trial(files, number)


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
    bucket: BucketTrial | None = None,
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
        epoch: see `read_checkpoint`. The parent may continue to train.
        interval: see `save_checkpoint`.
        bucket: the trial that is continued, in a bucket; its checkpoint may be there only. None without one.

    Returns:
        The checkpoint; None if the parent has none any more.

    Raises:
        TakenOverError: another worker has claimed the folder.
        ScriptError: the files of the script could not be copied. Without them, it would train from its first epoch.
        OSError, MemoryError, RuntimeError: the checkpoint could not be read, and may be intact.
    """
    if not belongs_to(parent, parent_key):
        # A later attempt of the parent may have set its files aside.
        parent = next((each for each in list_set_aside(parent) if belongs_to(each, parent_key)), parent)
    nearest = nullcontext() if bucket is None else nearest_file(folder, parent, bucket, epoch)
    with nearest as file:
        found = None if file is None else read_first([file], parent_key)
    found = found or read_checkpoint(parent, parent_key, epoch)
    if found is None or (is_script and not (parent / SCRIPT_DIR).is_dir()):
        return None
    history = {
        epoch: {name: value for name, value in metrics.items() if name not in left_out}
        for epoch, metrics in found.history.items()
    }
    checkpoint = Checkpoint(found.epoch, history, found.state, key)
    if is_script:  # first: with the checkpoint, the copy counts as complete
        try:
            _copy_script_files(parent / SCRIPT_DIR, folder, token)
        except OSError as error:  # also shutil.Error
            check_claim(folder, token)  # its successor deletes the draft
            raise ScriptError(
                f"the files of its parent could not be copied to {folder}: {error}. After you have fixed the cause, "
                "`hpo retry` continues the parent"
            ) from error
    try:
        save_checkpoint(folder, checkpoint, token, interval=interval)
    except OSError as error:  # the training itself needs no file; after a crash, the parent is read again
        return Adopted(checkpoint, f"the checkpoint of its parent could not be copied: {error}")
    return Adopted(checkpoint)


def _copy_script_files(source: Path, folder: Path, token: int) -> None:
    """Copy the files of a script, which may change them: no hard links.

    The trial has no checkpoint. So what is there already is a copy that a killed worker has made, or of epochs whose
    checkpoints are damaged: the script must not start from these, because the epochs before would be missing.

    A worker that has lost the trial may do the same at the same time, until it notices. Each has its own draft, and both
    copy the same files: it does not matter whose becomes the folder.
    """
    check_claim(folder, token)
    for leftover in folder.glob(f"{_PARTIAL}*"):  # of claims before this one
        shutil.rmtree(leftover, ignore_errors=True)
    target, draft = folder / SCRIPT_DIR, folder / f"{_PARTIAL}{token}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(source, draft, symlinks=True, copy_function=_copy_synced)
        check_claim(folder, token)  # the copy may have taken minutes
        if target.exists():
            former = folder / f"{_PARTIAL}{token}-former"
            target.rename(former)
            shutil.rmtree(former, ignore_errors=True)
        try:
            draft.rename(target)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
        sync_folder(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _copy_synced(source: str, target: str, *, follow_symlinks: bool = True) -> str:
    shutil.copy2(source, target, follow_symlinks=follow_symlinks)
    if not Path(target).is_symlink():
        with Path(target).open("rb") as file:
            os.fsync(file.fileno())
    return target
