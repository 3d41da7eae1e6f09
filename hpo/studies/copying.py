"""Copying a study with its files: checkpoints, logs, artifacts. A kill leaves a complete copy, or none that anybody sees.

First the files are copied, to a folder that belongs to no study yet (`hpo.studies.staging`). Then one transaction stores
the copy, and the folder is its own. The same command again continues with the folder of one that was killed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.bucket import describe
from hpo.dashboard.copying import DashboardCopy
from hpo.errors import SettingError
from hpo.paths import (
    CONFIGURATION_FILE,
    HANG_FILE,
    LOST_FILE,
    PARENT_SUFFIX,
    SCRIPT_DIR,
    RunsDir,
    atomic_file,
    link_or_copy,
    logs_of,
    sync_folder,
)
from hpo.search.adoption import parent_folder
from hpo.search.checkpoints.files import belongs_to, list_checkpoints
from hpo.search.checkpoints.retention import trials_with_checkpoints
from hpo.studies.bucket_files import copy_objects, delete_objects
from hpo.studies.other_databases import note_database
from hpo.studies.staging import CopyOrder, stage

if TYPE_CHECKING:
    from storage.database import Database
    from storage.study import Study


MAX_SNAPSHOTS = 5  # of a study whose search deletes checkpoints faster than they are copied


class _CheckpointGoneError(Exception):
    """A trial has lost its checkpoints before they were copied: in these rows it may be the best, or unfinished."""


def copy_with_files(study: Study, target: Database, name: str, runs_dir: RunsDir) -> int:
    """Copy a study and its files. If it is killed, the same call resumes it.

    Args:
        study: the study. Searches may work on it.
        target: the database of the copy.
        name: of the copy.
        runs_dir: the folder with the files of the study, and of the copy.

    Returns:
        How many artifacts the copy lacks, because their files are not in `runs_dir`.

    Raises:
        SettingError: a file cannot be copied, or another process makes the same copy.
        StorageError: see `storage.copying.copy_study`.
    """
    from storage.copying import NameTakenError, copy_study, may_have
    from storage.database import identify

    source = runs_dir.checkpoints(study.unique_name)
    order = CopyOrder(str(study.identity), identify(target), name)
    try:
        with stage(order, runs_dir, lambda known: may_have(target, name, known)) as identity:
            unique_name = f"{name}-{identity}"
            folder = runs_dir.checkpoints(unique_name)
            is_other = identify(target) != identify(study.database)

            def copy_all_files() -> None:
                copy_files(source, folder)
                copy_objects(runs_dir, study.unique_name, unique_name)
                if is_other:
                    copy_parents(study, runs_dir, folder)

            copy_all_files()
            note_database(folder, target)
            shown = DashboardCopy(runs_dir.artifacts, study.unique_name, unique_name)

            def copy_rows(known: Collection[int]) -> None:
                def copy_again() -> None:  # a running search has written and deleted checkpoints meanwhile
                    copy_all_files()
                    if not set(known) <= set(trials_with_checkpoints(folder)):
                        raise _CheckpointGoneError

                copy_study(study, target, name, identity, on_snapshot=copy_again, translate=shown.translate)

            try:
                for _ in range(MAX_SNAPSHOTS):
                    with suppress(_CheckpointGoneError):
                        copy_rows(trials_with_checkpoints(source))
                        break
                else:
                    copy_rows(())
            except NameTakenError:
                shutil.rmtree(folder, ignore_errors=True)  # no command continues it
                delete_objects(runs_dir, unique_name)
                raise
    except OSError as error:
        raise SettingError(
            f"cannot copy the files of {study.name} in {runs_dir.root}: {error.strerror or describe(error)}. Nothing of "
            "the copy is visible. After you have fixed the cause, the same command resumes it"
        ) from None
    return shown.missing


def copy_files(source: Path, target: Path) -> None:
    """Let a folder of checkpoints have the same files as that of another study. What it has already is not copied again.

    Files are complete when they appear, and flushed to disk. Those that disappear meanwhile are left out: a search that runs
    deletes old checkpoints after it has written new ones. What the copy has of a trial whose checkpoints are gone stays: it
    has ended since, and `checkpoints.keep` has deleted them, but in the copy it may be unfinished.

    Args:
        source: the folder of a study; it may be missing.
        target: the folder of its copy.

    Raises:
        OSError: a file cannot be copied.
    """
    found = [path.name for path in source.iterdir()] if source.is_dir() else []
    numbers = [name for name in found if name.removesuffix(PARENT_SUFFIX).isdecimal()]
    for number in sorted(numbers, key=lambda name: int(name.removesuffix(PARENT_SUFFIX))):
        _copy_trial(source / number, target / number)
    sync_folder(target)


def copy_parents(study: Study, runs_dir: RunsDir, target: Path) -> None:
    """Copy the files of the trials that a study's trials may still start from.

    For a copy in another database: the database of the study does not know that the copy needs them.

    Args:
        study: the study.
        runs_dir: where the files are.
        target: the folder of its copy.

    Raises:
        OSError: a file cannot be copied.
        StorageError: the database cannot be used.
    """
    from storage.parents import unfinished_children

    for number, parent in unfinished_children(study).items():
        folder = parent_folder(runs_dir, runs_dir.trial(study.unique_name, number), parent.files, parent.number)
        if folder.is_dir() and belongs_to(folder, parent.key):
            _copy_trial(folder, target / f"{number}{PARENT_SUFFIX}")
    sync_folder(target)


def _copy_trial(source: Path, target: Path) -> None:
    """Copy the files of a trial, see `copy_files`."""
    files = dict(_files_of_trial(source))
    target.mkdir(exist_ok=True)
    for name, is_immutable in files.items():
        with suppress(FileNotFoundError):
            _copy_file(source / name, target / name, is_immutable=is_immutable)
    newest = next((name for name, is_immutable in files.items() if is_immutable), None)
    # Last: while the source has its checkpoint, nobody is deleting the files next to it, and the copy is complete.
    if newest is not None and (source / newest).exists() and (target / newest).exists():
        for former, _ in list(_files_of_trial(target)):
            if former not in files:
                (target / former).unlink()
    sync_folder(target)


def _files_of_trial(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the path of each file of a trial in its folder, the newest checkpoint first, and whether it never changes."""
    for checkpoint in list_checkpoints(folder):
        yield checkpoint.relative_to(folder), True
    for path in (folder / CONFIGURATION_FILE, folder / HANG_FILE, folder / LOST_FILE, *logs_of(folder)):
        if path.is_file():
            yield path.relative_to(folder), False
    for parent, _, names in os.walk(folder / SCRIPT_DIR):  # does not follow links
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(folder), False


def _copy_file(source: Path, target: Path, *, is_immutable: bool) -> None:
    status = source.stat()
    with suppress(FileNotFoundError):
        known = target.stat()
        if os.path.samestat(status, known) or (status.st_size, status.st_mtime_ns) == (
            known.st_size,
            known.st_mtime_ns,
        ):
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_immutable:
        link_or_copy(source, target)
    else:
        with source.open("rb") as original, atomic_file(target, sync=True) as file:
            shutil.copyfileobj(original, file)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))  # so that the file is known to be copied
