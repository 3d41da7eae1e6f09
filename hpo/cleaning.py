"""Finds and deletes what no search needs any more: `hpo clean`.

Nothing is deleted unless the database says whose it is, or its name says that it is a leftover. Several databases may share
a folder: what belongs to a study that this database does not know is kept. So is what a copy of the database may still need:
a study that was deleted from one of them is in the other under the same name. Exports, reports and copies of the database
are the user's.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psutil

from hpo.errors import SettingError, SpaceError
from hpo.paths import DATABASES_FILE, RunsDir, study_id_of
from hpo.search.probes import SCRATCH_PREFIX
from hpo.search.retention import checkpoint_files, is_of, superfluous_trials, trials_with_checkpoints
from hpo.space.model import Space
from hpo.staging import is_abandoned, leftovers

if TYPE_CHECKING:
    from storage.database import Database
    from storage.studies import Study

KILLED_COPY = "left by a copy that was killed; the same command goes on with it"
LEFTOVER_SECONDS = 86_400.0  # no process writes a file, or measures training steps, for so long
# See `hpo.paths.atomic_file` and `storage.migrations.back_up`. The user may have other hidden files.
_DRAFT = re.compile(r"\..+\.(?:(?P<pid>\d+)-[0-9a-f]{8}|version-\d+)\.tmp")
_MIGRATED = re.compile(r"\.version-\d+$")  # see `storage.migrations.back_up`
_SQLITE = b"SQLite format 3\0"  # a file starts with it
_SET_ASIDE = re.compile(r"\d+\.other-\d+")  # see `hpo.search.checkpoints.claim_folder`


@dataclass(frozen=True)
class Garbage:
    """Files in a folder that can be deleted for the same reason.

    Attributes:
        what: the reason, such as `damaged checkpoints`.
        folder: contains all of them.
        paths: the files and folders.
        disk_bytes: what their deletion frees. A file that also has a name elsewhere frees nothing.
    """

    what: str
    folder: Path
    paths: tuple[Path, ...]
    disk_bytes: int = 0


@dataclass(frozen=True)
class Cleaning:
    """What can be deleted, or was.

    Attributes:
        garbage: what can be deleted.
        unknown: {folder: bytes} of studies that the database does not know. They are kept.
        shared: {folder: the other database} of studies that were deleted from the database, but not from another. They are
            kept.
        running: names of the studies that are running. Their files are kept.
        problems: what could not be read or deleted, and why. What cannot be read is kept.
    """

    garbage: list[Garbage]
    unknown: dict[Path, int]
    shared: dict[Path, str]
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
    from storage.studies import all_studies, deleted_studies
    from storage.summaries import summarize

    problems: list[str] = []
    # First the folders, then the studies: a study that is created meanwhile has no folder here.
    folders = _entries(runs_dir.root / "checkpoints", problems)
    artifacts = _entries(runs_dir.artifacts, problems)
    own_name = identify(database)
    abandoned: set[Path] = set()
    for folder in folders:
        with _errors_noted(folder, problems):
            if folder.is_dir() and not folder.is_symlink() and is_abandoned(folder, own_name):
                abandoned.add(folder)
    studies = {study.unique_name: study for study in all_studies(database) if study.is_ours}
    deleted = deleted_studies(database) - {study_id_of(name) for name in studies}
    running = {summary.unique_name: summary.name for summary in summarize(database) if summary.state == "running"}

    others = _OtherDatabases(database, runs_dir.root)

    garbage: list[Garbage] = []
    unknown: dict[Path, int] = {}
    shared: dict[Path, str] = {}
    for folder in folders:
        with _errors_noted(folder, problems):
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
                    garbage += _of_study(studies[folder.name], folder, problems, is_shared=bool(other))
            elif is_deleted and other:
                shared[folder] = other
            elif is_deleted:
                garbage.append(Garbage("of a deleted study", folder, (folder,)))
                deleted.add(identity)
            elif folder in abandoned and not other:
                garbage.append(Garbage(KILLED_COPY, folder, (folder, *_artifacts_of(identity, artifacts))))
            else:
                unknown[folder] = count_bytes(folder)
    published = [
        path for path in artifacts if (name := path.name.partition("-")[0]) in deleted and not others.has(name)
    ]
    garbage += [
        Garbage("artifacts of deleted studies", runs_dir.artifacts, tuple(published)),
        Garbage(
            "left by searches that were killed", runs_dir.root, tuple(_leftovers(_entries(runs_dir.root, problems)))
        ),
        Garbage("unfinished files", runs_dir.artifacts, tuple(_drafts(artifacts, _is_old))),
    ]
    for folder in _entries(runs_dir.reports, problems):
        garbage.append(Garbage("unfinished files", folder, tuple(_drafts(_entries(folder, problems), _is_old))))
    found = _measured([each for each in garbage if each.paths])
    return Cleaning(found, unknown, shared, sorted(running.values()), problems)


def delete_garbage(found: Cleaning) -> Cleaning:
    """Delete garbage.

    Returns:
        The same, with further `problems`. The bytes of what could not be deleted are 0.
    """
    done, problems = [], list(found.problems)
    for each in found.garbage:
        errors = [problem for path in each.paths if (problem := _delete(path))]
        problems += errors
        done.append(replace(each, disk_bytes=0) if errors else each)
    return replace(found, garbage=done, problems=problems)


def deleted_folders(database: Database, name: str, runs_dir: RunsDir) -> list[Path]:
    """Return the folders of deleted studies that had this name when they were created."""
    from storage.studies import deleted_studies

    entries = _entries(runs_dir.root / "checkpoints", [])
    folders = [path for path in entries if path.name.rpartition("-")[0] == name]
    deleted = deleted_studies(database) if folders else set()
    return [folder for folder in folders if study_id_of(folder.name) in deleted]


def delete_files_of(database: Database, unique_name: str, runs_dir: RunsDir) -> list[str]:
    """Delete the checkpoints, logs and artifacts of a study that was deleted; return what is left, and why."""
    folder = runs_dir.checkpoints(unique_name)
    if other := _OtherDatabases(database, runs_dir.root).find(folder):
        return [f"kept: {folder}, of a study that {other} has, too, or may have"]
    problems: list[str] = []
    paths = _artifacts_of(study_id_of(unique_name), _entries(runs_dir.artifacts, problems))
    paths += [folder] if folder.exists() else []
    return problems + [problem for path in paths if (problem := _delete(path))]


def _artifacts_of(identity: str, artifacts: Sequence[Path]) -> list[Path]:
    """Return the artifacts of the study with this `hpo:id`."""
    return [path for path in artifacts if path.name.startswith(f"{identity}-")]


def count_bytes(path: Path | str) -> int:
    """Return the size of a file, or of all files below a folder; 0 if it is missing."""
    return sum(entry.st_size for entry in _files(path))


# --- what is garbage --------------------------------------------------------------------------------------------------


class _OtherDatabases:
    """The other databases that may have studies of this one: copies of it, or those that it is a copy of.

    They are found next to the database, in the folder to clean, and in what each run notes in its study's folder.

    Args:
        database: this one.
        root: the folder to clean.

    Raises:
        SettingError: a folder cannot be read.
    """

    def __init__(self, database: Database, root: Path) -> None:
        self._own = database.file
        self._names = _names_of(database)
        self._ids: dict[Path, set[str] | None] = {}  # None: the file cannot be read
        folders = {root.resolve(), *([] if database.file is None else [database.file.parent])}
        problems: list[str] = []
        entries = [path for folder in sorted(folders) for path in _entries(folder, problems)]
        if problems:  # a copy that is not found would lose its files
            raise SettingError(
                f"{problems[0]}: copies of the database may be there, which need the files of deleted studies"
            )
        # Without the database itself, under any name: to open and close its file here would end SQLite's locks on it.
        self._files = [path for path in entries if not self._is_own(path) and _is_sqlite(path)]

    def has(self, identity: str) -> str:
        """Return which database file may have a study with this `hpo:id`; empty if none has."""
        return next((str(path) for path in self._files if self._may_have(path, identity)), "")

    def find(self, folder: Path) -> str:
        """Return which database may have the study of a folder; empty if there is none."""
        identity = study_id_of(folder.name)
        for name in _noted_databases(folder):
            if "://" in name:
                if name not in self._names and _without_aliases(name) not in self._names:
                    return name
            elif self._may_have(Path(name), identity):
                return name
        return self.has(identity)

    def _may_have(self, path: Path, identity: str) -> bool:
        from storage.database import hpo_ids
        from storage.errors import StorageError

        if not path.exists() or self._is_own(path):
            return False
        if path not in self._ids:
            self._ids[path] = None
            with suppress(StorageError):
                self._ids[path] = hpo_ids(path)
        ids = self._ids[path]
        return ids is None or identity in ids

    def _is_own(self, path: Path) -> bool:
        """Return whether a path leads to this database, also by a link."""
        with suppress(OSError):
            return self._own is not None and path.samefile(self._own)
        return False


def note_database(folder: Path, database: Database) -> None:
    """Note in the folder of a study that this database needs it. It is a hint only: errors of the disk are ignored."""
    from storage.database import identify

    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        name, noted = identify(database), list[str]()
        with suppress(OSError):
            noted = _noted_databases(folder)
        if name not in noted:
            # A path may contain bytes that are no characters.
            with (folder / DATABASES_FILE).open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"{name}\n")


def _noted_databases(folder: Path) -> list[str]:
    """Return the databases that need the files of a study's folder. OSError if this cannot be read: any may need them."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return (folder / DATABASES_FILE).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return []


def _names_of(database: Database) -> set[str]:
    """Return the names of a database that a note may have. Older versions of hpo note the URL."""
    from storage.database import identify

    return {identify(database)} | (set() if database.file else {database.url, _without_aliases(database.url)})


def _without_aliases(url: str) -> str:
    """Return the URL of a PostgreSQL database in the same form for all names of this machine, and for all users."""
    with suppress(ValueError):
        parts = urlsplit(url)
        host = "localhost" if parts.hostname in {None, "127.0.0.1", "::1"} else parts.hostname
        return f"postgresql://{host}:{parts.port or 5432}{parts.path}?{parts.query}"
    return url


def _is_sqlite(path: Path) -> bool:
    if _MIGRATED.search(path.name):  # a copy that a migration made: only as old as the version that could use it
        return False
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(len(_SQLITE)) == _SQLITE
    return False


def _of_study(study: Study, folder: Path, problems: list[str], *, is_shared: bool) -> Iterator[Garbage]:
    """Yield what a study that is not running does not need of its folder.

    Args:
        study: the study.
        folder: of its checkpoints.
        problems: what cannot be read is added to it.
        is_shared: whether another database may have it, too. What was set aside may be of trials of that one.
    """
    with suppress(SpaceError):  # settings of another version
        space = Space.from_settings(study.settings)
        files: list[Path] = []
        for trial in superfluous_trials(space, study, trials_with_checkpoints(folder), timeout_seconds=0.0):
            trial_folder = folder / str(trial.number)
            with _errors_noted(trial_folder, problems):
                files += checkpoint_files(trial_folder) if is_of(trial_folder, trial) else []
        kept = space.checkpoints
        what = f"checkpoints of ended trials; checkpoints.keep is {kept.keep}: those of {kept.description}"
        yield Garbage(what, folder, tuple(files))
    trials = _entries(folder, problems)
    inside = [path for trial in trials if trial.name.isdecimal() for path in _entries(trial, problems)]
    aside = [path for path in trials if _SET_ASIDE.fullmatch(path.name)]
    aside += [path for path in inside if path.name.endswith(".other")]  # see `hpo.search.checkpoints.load_checkpoint`
    yield Garbage(
        "files of other configurations or earlier attempts, which were set aside",
        folder,
        () if is_shared else tuple(aside),
    )
    yield Garbage("damaged checkpoints", folder, tuple(path for path in inside if path.name.endswith(".damaged")))
    yield Garbage("unfinished files", folder, tuple(_drafts(inside, _is_abandoned)))


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


# --- files ------------------------------------------------------------------------------------------------------------


def _entries(folder: Path, problems: list[str]) -> list[Path]:
    """Return what is in a folder, by name; nothing if it is missing, not a folder, or not readable, which is a problem."""
    with _errors_noted(folder, problems), suppress(FileNotFoundError, NotADirectoryError):
        return sorted(folder.iterdir())
    return []


@contextmanager
def _errors_noted(path: Path, problems: list[str]) -> Iterator[None]:
    """Make an error of reading a problem: what else there is can be cleaned."""
    try:
        yield
    except OSError as error:
        problems.append(f"cannot read {error.filename or path}: {error.strerror or error}")


def _files(path: Path | str) -> Iterator[os.stat_result]:
    """Yield the status of a file, or of each file below a folder. Links are not followed below it."""
    try:
        entries = os.scandir(path)
    except NotADirectoryError:
        with suppress(OSError):
            yield os.lstat(path)
        return
    except OSError:  # missing, or not readable
        return
    with entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path)
            else:
                with suppress(OSError):
                    yield entry.stat(follow_symlinks=False)


def _measured(garbage: Sequence[Garbage]) -> list[Garbage]:
    """Return garbage with its bytes. A file with several names counts once, if all of its names are garbage."""
    files = [[status for path in each.paths for status in _files(path)] for each in garbage]
    names = Counter(_inode(status) for statuses in files for status in statuses)
    counted: set[tuple[int, int]] = set()
    measured = []
    for each, statuses in zip(garbage, files, strict=True):
        freed = 0
        for status in statuses:
            if names[_inode(status)] >= status.st_nlink and _inode(status) not in counted:
                freed += status.st_size
                counted.add(_inode(status))
        measured.append(replace(each, disk_bytes=freed))
    return measured


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _delete(path: Path) -> str:
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
