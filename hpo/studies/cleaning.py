"""Finds and deletes what no search needs any more: `hpo clean`.

Nothing is deleted unless the database says whose it is, or its name says that it is a leftover. Several databases may share
a folder: what belongs to a study that this database does not know is kept. So is what a copy of the database may still need:
a study that was deleted from one of them is in the other under the same name. Exports, reports and copies of the database
are the user's.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from hpo.bucket import Bucket, describe
from hpo.errors import SpaceError
from hpo.paths import PARENT_SUFFIX, RunsDir, study_id_of
from hpo.search.checkpoints.retention import checkpoint_files, is_of, superfluous_trials, trials_with_checkpoints
from hpo.search.probes import SCRATCH_PREFIX
from hpo.space.model import Space
from hpo.studies.bucket_files import BucketFiles, not_needed, of_deleted
from hpo.studies.deleting import artifacts_of, not_continued
from hpo.studies.folders import count_bytes, delete_path, entries, errors_noted, statuses
from hpo.studies.other_databases import OtherDatabases
from hpo.studies.staging import held_leftovers, is_abandoned, is_incomplete, leftovers

if TYPE_CHECKING:
    from storage.database import Database
    from storage.study import Study

KILLED_COPY = "left by a copy that was killed; the same command resumes it"
LEFTOVER_SECONDS = 86_400.0  # no process writes a file, or measures training steps, for so long
# See `hpo.paths.atomic_file` and `storage.migrations.back_up`. The user may have other hidden files.
_DRAFT = re.compile(r"\..+\.(?:(?P<pid>\d+)-[0-9a-f]{8}|version-\d+)\.tmp")
_PARENT = re.compile(rf"\d+{re.escape(PARENT_SUFFIX)}")
_SET_ASIDE = re.compile(r"\d+\.other-\d+")  # see `hpo.search.checkpoints.files.claim_folder`


@dataclass(frozen=True)
class Garbage:
    """Files in a folder that can be deleted for the same reason.

    Attributes:
        what: the reason, such as `damaged checkpoints`.
        folder: contains all of them.
        paths: the files and folders.
        objects: or their names in a bucket, below its URL; `folder` is a text then.
        disk_bytes: what their deletion frees. A file that also has a name elsewhere frees nothing.
    """

    what: str
    folder: Path | str
    paths: tuple[Path, ...]
    disk_bytes: int = 0
    objects: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cleaning:
    """What can be deleted, or was.

    Attributes:
        garbage: what can be deleted.
        unknown: {folder: bytes} of studies that the database does not know. They are kept.
        shared: {folder: the other database} of studies that were deleted from the database, but not from another. They are
            kept.
        continued: {folder of a trial: name of a study} of studies that were deleted: a trial of the other study may still
            start from this one. They are kept.
        running: names of the studies that are running. Their files are kept.
        problems: what could not be read or deleted, and why. What cannot be read is kept.
    """

    garbage: list[Garbage]
    unknown: dict[Path, int]
    shared: dict[Path, str]
    continued: dict[Path, str]
    running: list[str]
    problems: list[str]

    @property
    def disk_bytes(self) -> int:
        """What the deletion of all garbage frees."""
        return sum(each.disk_bytes for each in self.garbage)


def find_garbage(database: Database, runs_dir: RunsDir) -> Cleaning:
    """Return what can be deleted, without deleting it.

    Args:
        database: says which studies there are, which were deleted, and which are running.
        runs_dir: the folder to clean.

    Raises:
        SettingError: a folder that may have copies of the database cannot be read.
        StorageError: the database cannot be used.
    """
    from storage.database import identify
    from storage.parents import continued_trials
    from storage.studies import all_studies, deleted_studies

    problems: list[str] = []
    # First the folders, then the studies: a study that is created meanwhile has no folder here.
    folders = entries(runs_dir.all_checkpoints, problems)
    artifacts = entries(runs_dir.artifacts, problems)
    own_name = identify(database)
    abandoned: set[Path] = set()
    for folder in folders:
        with errors_noted(folder, problems):
            if folder.is_dir() and not folder.is_symlink() and is_abandoned(folder, own_name):
                abandoned.add(folder)
    studies = {study.unique_name: study for study in all_studies(database) if study.is_ours}
    deleted = deleted_studies(database) - {study_id_of(name) for name in studies}
    running = _running(studies, database)

    children = continued_trials(database)
    others = OtherDatabases(database, runs_dir.root)

    garbage: list[Garbage] = []
    unknown: dict[Path, int] = {}
    shared: dict[Path, str] = {}
    continued: dict[Path, str] = {}
    for folder in folders:
        with errors_noted(folder, problems):
            if folder.is_symlink():
                continue
            identity = study_id_of(folder.name)
            is_deleted = identity in deleted
            deleted.discard(identity)  # its artifacts stay, unless nobody else needs the folder
            if not folder.is_dir():
                continue
            other = others.find(folder)
            if folder.name in studies:
                garbage.append(Garbage(KILLED_COPY, folder, tuple(leftovers(folder))))
                if folder.name not in running:
                    parents = children.get(identity, {})
                    garbage += _of_study(studies[folder.name], folder, problems, parents, is_shared=bool(other))
            elif is_deleted and other:
                shared[folder] = other
            elif is_deleted:
                paths, needed = not_continued(folder, children.get(identity, {}))
                garbage.append(Garbage("of a deleted study", folder, tuple(paths)))
                continued |= needed
                deleted.add(identity)
            elif folder in abandoned and not other:
                garbage.append(Garbage(KILLED_COPY, folder, (folder, *artifacts_of(identity, artifacts))))
            else:
                unknown[folder] = count_bytes(folder)
    published = [
        path for path in artifacts if (name := path.name.partition("-")[0]) in deleted and not others.has(name)
    ]
    garbage += [
        Garbage("artifacts of deleted studies", runs_dir.artifacts, tuple(published)),
        Garbage(
            "left by searches that were killed", runs_dir.root, tuple(_leftovers(entries(runs_dir.root, problems)))
        ),
        Garbage("unfinished files", runs_dir.artifacts, tuple(_drafts(artifacts, _is_old))),
    ]
    for folder in entries(runs_dir.reports, problems):
        garbage.append(Garbage("unfinished files", folder, tuple(_drafts(entries(folder, problems), _is_old))))
    found = _measured([each for each in garbage if each.paths])
    if runs_dir.bucket_url:
        try:
            for files in _in_bucket(
                database, runs_dir, studies, others, children, running, {folder.name for folder in abandoned}
            ):
                names = tuple(each.name for each in files.objects)
                found.append(Garbage(files.what, files.url, (), files.size, names))
        except OSError as error:
            problems.append(f"cannot read {runs_dir.bucket_url}: {describe(error)}")
    # A search that has started meanwhile writes files that look abandoned, and may need those of other studies.
    started = {name: reference for name, reference in _running(studies, database).items() if name not in running}
    now = continued_trials(database)
    overtaken = {each for each, numbers in now.items() if numbers.keys() - children.get(each, {}).keys()}
    found = [
        each for each in found if (name := Path(each.folder).name) not in started and study_id_of(name) not in overtaken
    ]
    running |= started
    return Cleaning(found, unknown, shared, continued, sorted(running.values()), problems)


def delete_garbage(found: Cleaning) -> Cleaning:
    """Delete garbage.

    Returns:
        The same, with further `problems`. The bytes of what could not be deleted are 0.
    """
    done, problems = [], list(found.problems)
    copies_left: set[str] = set()
    for each in found.garbage:
        name = Path(each.folder).name
        if each.paths and each.what == KILLED_COPY:
            errors = _delete_copy(Path(each.folder), each.paths)
            copies_left |= {name} if errors else set()
        else:
            errors = [problem for path in each.paths if (problem := delete_path(path))]
        if each.objects and name not in copies_left:
            try:
                Bucket(str(each.folder)).delete_with_folder(each.objects)
            except OSError as error:
                errors.append(f"cannot delete objects in {each.folder}: {describe(error)}")
        problems += errors
        done.append(replace(each, disk_bytes=0) if errors else each)
    return replace(found, garbage=done, problems=problems)


def _delete_copy(folder: Path, paths: Collection[Path]) -> list[str]:
    """Delete what a killed copy has left, unless a process has continued the copy since. Return what went wrong."""
    with held_leftovers(folder) as left:
        if not left or (folder in paths and not is_incomplete(folder, left)):
            return [f"kept: {folder}, a copy that has been continued meanwhile"]
        return [problem for path in paths if (problem := delete_path(path))]


def _running(studies: Mapping[str, Study], database: Database) -> dict[str, str]:
    """Return {unique name: what names it} of the studies on which a run works."""
    from storage.errors import retry_while_down
    from storage.lease import is_run_alive
    from storage.records import read_runs

    alive = {run.study for run in retry_while_down(database, lambda: read_runs(database)) if is_run_alive(run)}
    return {name: study.reference for name, study in studies.items() if study.study_id in alive}


# --- what is garbage --------------------------------------------------------------------------------------------------


def _of_study(
    study: Study, folder: Path, problems: list[str], needed: Collection[int], *, is_shared: bool
) -> Iterator[Garbage]:
    """Yield what a study that is not running does not need of its folder.

    Args:
        study: the study.
        folder: of its checkpoints.
        problems: what cannot be read is added to it.
        needed: numbers of its trials that others continue, perhaps from an earlier attempt.
        is_shared: whether another database may have it, too. What was set aside, or continued, may be of its trials.
    """
    with suppress(SpaceError):  # settings of another version
        space = Space.from_settings(study.settings)
        files: list[Path] = []
        for trial in superfluous_trials(space, study, trials_with_checkpoints(folder), timeout_seconds=0.0):
            trial_folder = folder / str(trial.number)
            with errors_noted(trial_folder, problems):
                files += checkpoint_files(trial_folder) if is_of(trial_folder, trial) else []
        kept = space.checkpoints
        what = f"checkpoints of ended trials; checkpoints.keep is {kept.keep}: those of {kept.description}"
        yield Garbage(what, folder, tuple(files))
    trials = entries(folder, problems)
    inside = [path for trial in trials if trial.name.isdecimal() for path in entries(trial, problems)]
    aside = [path for path in trials if _SET_ASIDE.fullmatch(path.name) and int(path.stem) not in needed]
    # See `hpo.search.checkpoints.files.load_checkpoint`.
    aside += [path for path in inside if path.name.endswith(".other")]
    yield Garbage(
        "files of other configurations or earlier attempts, which were set aside",
        folder,
        () if is_shared else tuple(aside),
    )
    parents = [path for path in trials if _PARENT.fullmatch(path.name)]
    if parents and not is_shared:
        from storage.parents import unfinished_children

        children = unfinished_children(study)
        ended = [path for path in parents if int(path.name.partition(".")[0]) not in children]
        yield Garbage("of trials that were continued", folder, tuple(ended))
    yield Garbage("damaged checkpoints", folder, tuple(path for path in inside if path.name.endswith(".damaged")))
    yield Garbage("unfinished files", folder, tuple(_drafts(inside, _is_abandoned)))


def _in_bucket(
    database: Database,
    runs_dir: RunsDir,
    studies: Mapping[str, Study],
    others: OtherDatabases,
    children: Mapping[str, Mapping[int, str]],
    running: Collection[str],
    abandoned: Collection[str],
) -> Iterator[BucketFiles]:
    """Yield what no search needs in the bucket. What the database does not know is kept: others may use the bucket."""
    from storage.studies import deleted_studies

    identities = {study_id_of(name) for name in studies}
    deleted = deleted_studies(database) - identities
    folders = Bucket(runs_dir.bucket_url).list_folders()
    by_folder = {runs_dir.checkpoints(name).name: name for name in studies}
    for folder in folders:
        url, identity = f"{runs_dir.bucket_url}/{folder}", study_id_of(folder)
        needed, other = children.get(identity, {}), others.find(runs_dir.checkpoints(folder))
        name = by_folder.get(folder)
        if name is not None and name not in running:
            yield from not_needed(studies[name], url, needed, is_shared=bool(other))
        elif name is None and (identity in deleted or folder in abandoned) and not other:
            files = of_deleted(url, needed, "of a deleted study" if identity in deleted else KILLED_COPY)
            if files.objects:
                yield files


def _leftovers(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.name.startswith((SCRATCH_PREFIX, ".writable-")) and _is_old(path):
            yield path
    yield from _drafts(paths, _is_old)


def _drafts(paths: Sequence[Path], is_leftover: Callable[[Path], bool]) -> list[Path]:
    return [path for path in paths if _DRAFT.fullmatch(path.name) and is_leftover(path)]


def _is_old(path: Path) -> bool:
    with suppress(OSError):
        return time.time() - path.lstat().st_mtime > LEFTOVER_SECONDS
    return False


def _is_abandoned(path: Path) -> bool:
    """Return whether nobody writes a draft any more, given that no run on its study is alive, on any machine."""
    match = _DRAFT.fullmatch(path.name)
    pid = match["pid"] if match else None
    return _is_old(path) or (pid is not None and not psutil.pid_exists(int(pid)))


# --- bytes ------------------------------------------------------------------------------------------------------------


def _measured(garbage: Sequence[Garbage]) -> list[Garbage]:
    """Return garbage with its bytes. A file with several names counts once, if all of its names are garbage."""
    files = [[status for path in each.paths for status in statuses(path)] for each in garbage]
    names = Counter(_inode(status) for own in files for status in own)
    counted: set[tuple[int, int]] = set()
    measured = []
    for each, own in zip(garbage, files, strict=True):
        freed = 0
        for status in own:
            if names[_inode(status)] >= status.st_nlink and _inode(status) not in counted:
                freed += status.st_size
                counted.add(_inode(status))
        measured.append(replace(each, disk_bytes=freed))
    return measured


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
