"""The Python API for whole studies: compare, copy, rename, delete. `hpo.api` has the other functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.bucket import Bucket, describe, locate
from hpo.errors import SettingError, nearest
from hpo.paths import DEFAULT_STORAGE, RunsDir

if TYPE_CHECKING:
    from hpo.report.comparison import Comparison
    from storage.database import Database
    from storage.study import Study

# A file name has at most 255, and folders have the name of the study, a random part, and the number of a revision or trial.
MAX_NAME_BYTES = 200


@contextmanager
def opened_study(
    name: str, storage: str, password: str | None, *, is_written: bool = False, may_migrate: bool = True
) -> Iterator[Study]:
    """Open a study, and close its connections at the end. It can be read after that: it connects again.

    Args:
        name: its name; without a revision, the latest one.
        storage: the database; it is not created.
        password: the PostgreSQL password, used if the URL has none.
        is_written: whether the caller writes to the database.
        may_migrate: whether tables of an older version are migrated, even if the caller only reads.

    Raises:
        SettingError: there is no such study; the message suggests the nearest name.
        StorageError: the database cannot be used, or has tables of an older version, and `may_migrate` is false.
    """
    from storage.database import open_database, open_existing

    if is_written:
        opened = open_database(storage, password, create=False)
    else:
        opened = open_existing(storage, password, may_migrate=may_migrate)
    with opened as database:
        yield find_study(database, name)


def find_study(database: Database, name: str) -> Study:
    """Return a study of an open database.

    Raises:
        SettingError: there is no such study; the message suggests the nearest name.
        StorageError: the database cannot be used.
    """
    from storage import studies
    from storage.study import study_names

    study = studies.find_study(database, name)
    if study is None:
        names, renamed = study_names(database), studies.renamed_from(database, name)
        hint = nearest(name, names) if names else "it has none yet"
        hint = f"it was renamed to {' or '.join(renamed)}" if renamed else hint
        raise SettingError(f"there is no study {name!r} in {database.url}: {hint}")
    return study


def require_ours(study: Study, what: str = "hpo cannot run its trials") -> None:
    """Raise SettingError for a study of another program: nothing says how its trials are run, or what its files are."""
    if not study.is_ours:
        raise SettingError(f"study {study.name} was not created by hpo, so {what}")


def compare_studies(
    studies: Sequence[str],
    *,
    others: Sequence[tuple[str, str]] = (),
    storage: str = DEFAULT_STORAGE,
    password: str | None = None,
) -> Comparison:
    """Compare studies: best values, and how soon each was found, over trials and over device time.

    Args:
        studies: their names; without a revision, the latest one.
        others: (name, storage) of studies in other databases.
        storage: the database of `studies`. All databases are only read, not even migrated.
        password: the PostgreSQL password, used for URLs without one.

    Returns:
        The studies, `studies` first, and what differs between them.

    Raises:
        SettingError: there is no such study, only one is named, or one is named twice.
        StorageError: a database cannot be used, or has tables of an older version of hpo.
    """
    from hpo.report.comparison import compare
    from storage.database import identify
    from storage.errors import MissingDatabaseError

    named = [*((name, storage) for name in studies), *others]
    if len(named) < 2:
        raise SettingError("name at least two studies, of this database or, with --other, of another one")
    with ExitStack() as opened:
        found: dict[tuple[str, int], tuple[str, Study]] = {}
        for name, url in named:
            try:
                study = opened.enter_context(opened_study(name, url, password, may_migrate=False))
            except MissingDatabaseError as error:
                if url == storage:
                    raise
                raise SettingError(f"there is no database {error.url}: correct the URL after --other {name}") from None
            key = identify(study.database), study.study_id
            if key in found:
                names = " and ".join(dict.fromkeys((found[key][0], name)))
                raise SettingError(f"{names}: this is one study, named twice. Name each study once")
            found[key] = name, study
        return compare([study for _, study in found.values()])


def write_comparison(comparison: Comparison, *, runs_dir: Path | str = "runs") -> Path:
    """Write a page with studies side by side: one HTML file that needs no network. An earlier one is replaced.

    Args:
        comparison: see `compare_studies`.
        runs_dir: the page is written to a folder below it.

    Returns:
        The path of the page.

    Raises:
        SettingError: the folder cannot be written.
    """
    from hpo.report.comparison_page import write_comparison

    return write_comparison(comparison, RunsDir(Path(runs_dir)))


@dataclass(frozen=True)
class CopiedStudy:
    """A study that was copied.

    Attributes:
        source: what names the study, see `storage.revisions.references`.
        name: of the copy.
        storage: the URL of its database, without a password.
        counts: {state: number of trials} of the copy.
        disk_bytes: the size of its checkpoints and logs, some of which may be hard links.
        remarks: what the copy lacks.
    """

    source: str
    name: str
    storage: str
    counts: dict[str, int]
    disk_bytes: int
    remarks: list[str]


def copy_study(
    study: str,
    new_name: str,
    *,
    to: str | None = None,
    storage: str = DEFAULT_STORAGE,
    password: str | None = None,
    runs_dir: Path | str = "runs",
    checkpoints: Path | str | None = None,
) -> CopiedStudy:
    """Copy a study with its metrics, provenance, checkpoints, logs and artifacts: all of it, or nothing.

    The copy is of one moment. A search may work on the study: trials that are RUNNING wait in the copy, to be resumed from
    their checkpoints. If it is killed, the same call resumes it.

    Args:
        study: its name; without a revision, the latest one. The others are not copied.
        new_name: of the copy. `hpo run` resumes it with a search space of this name, which may be changed.
        to: the database of the copy, which is created if it does not exist, and migrated if its tables are of an older
            version; None for that of the study.
        storage: the database of the study. It is only read, not even migrated, unless the copy is stored there.
        password: the PostgreSQL password, used for URLs without one.
        runs_dir: the folder with the files of the study, and of the copy.
        checkpoints: where checkpoints are: a folder, or a URL in a bucket, see `hpo.bucket.locate`; None for `runs_dir`.

    Raises:
        SettingError: there is no such study, hpo did not create it, the name cannot be used, or a file cannot be copied.
        StorageError: a database cannot be used, or has a study with this name; or that of the study has tables of an older
            version of hpo, and the copy is for another one.
    """
    from hpo.studies.copying import copy_with_files
    from hpo.studies.folders import count_bytes
    from storage.database import identify, open_database

    _check_name(new_name)
    with opened_study(study, storage, password, is_written=to is None, may_migrate=False) as source:
        require_ours(source, "hpo does not know its files: copy it with `optuna.copy_study`")
        opened = nullcontext(source.database) if to is None else open_database(to, password)
        with opened as target:
            if target is not source.database and identify(target) == identify(source.database):
                source = find_study(target, study)  # another URL of the same database
            runs = locate(runs_dir, checkpoints).make()
            missing = copy_with_files(source, target, new_name, runs)
            copied = find_study(target, new_name)
            folder = runs.checkpoints(source.unique_name)
            remarks = [
                *([] if folder.is_dir() else [f"no checkpoints and logs: {folder} is not on this machine"]),
                *([f"{missing} artifacts are not in {runs.artifacts}, so the copy lacks them"] if missing else []),
            ]
            disk_bytes = count_bytes(runs.checkpoints(copied.unique_name))
            return CopiedStudy(source.reference, new_name, target.url, dict(copied.counts()), disk_bytes, remarks)


def rename_study(study: str, new_name: str, *, storage: str = DEFAULT_STORAGE, password: str | None = None) -> str:
    """Give a study another name. Its files stay where they are, under the name that it had first.

    Args:
        study: its name; without a revision, the latest one. The others keep their names.
        new_name: the new name. `hpo run` resumes the study with a search space of this name.
        storage: the database; it is not created.
        password: the PostgreSQL password, used if the URL has none.

    Returns:
        What named the study before.

    Raises:
        SettingError: there is no such study, hpo did not create it, or the name cannot be used.
        StorageError: a run works on the study, the database has a study with this name, or cannot be used.
    """
    from storage import management

    _check_name(new_name)
    with opened_study(study, storage, password, is_written=True) as opened:
        require_ours(opened, "hpo does not rename it")
        if opened.name == new_name:
            raise SettingError(f"the study has the name {new_name!r} already")
        former = opened.reference
        management.rename_study(opened, new_name)
        return former


@dataclass(frozen=True)
class DeletedStudy:
    """A study that is to be deleted, or was.

    Attributes:
        name: what names it, see `storage.revisions.references`.
        storage: the URL of its database, without a password.
        has_rows: whether its rows are in the database. They are not if its deletion was killed.
        counts: {state: number of trials}.
        disk_bytes: the size of its checkpoints and logs, with those in the bucket.
        problems: which files could not be deleted, and why; or why they are kept.
        remaining: without rows: what names another study that this name means now, and that is not deleted; else empty.
    """

    name: str
    storage: str
    has_rows: bool
    counts: dict[str, int]
    disk_bytes: int
    problems: list[str]
    remaining: str = ""


def delete_study(
    study: str,
    *,
    confirm: Callable[[DeletedStudy], bool],
    storage: str = DEFAULT_STORAGE,
    password: str | None = None,
    runs_dir: Path | str = "runs",
    checkpoints: Path | str | None = None,
) -> DeletedStudy | None:
    """Delete a study: first its rows, all or none, then its checkpoints, logs and artifacts. Reports and exports stay.

    Files that another database needs are kept, see `clean_runs`, and those of trials that unfinished ones of other studies
    continue. If it is killed after the rows are gone, the same call, or `clean_runs`, deletes the files. Such a call deletes
    nothing else, even if the name means another study by then, such as the revision before.

    Args:
        study: its name; without a revision, the latest one. The others are kept.
        confirm: returns whether to delete it. It is called once.
        storage: the database; it is not created.
        password: the PostgreSQL password, used if the URL has none.
        runs_dir: the folder with the files of the study.
        checkpoints: where checkpoints are: a folder, or a URL in a bucket, see `hpo.bucket.locate`; None for `runs_dir`.

    Returns:
        What was deleted; None if it was not confirmed.

    Raises:
        SettingError: there is no such study, hpo did not create it, or the bucket cannot be read.
        StorageError: a run works on the study, it has other trials than those that were confirmed, or the database cannot
            be used.
    """
    from hpo.studies.deleting import files_of, find_deleted, forget_name, note_name
    from hpo.studies.folders import count_bytes
    from storage import management, studies
    from storage.database import open_database
    from storage.revisions import references
    from storage.study import study_names

    runs = locate(runs_dir, checkpoints)
    with open_database(storage, password, create=False) as database:
        left, known = find_deleted(database, study, runs), studies.find_study(database, study)
        if known is not None:  # what must stay is no reason to keep this one
            left = [each for each in left if each.paths]
        killed = {each.name for each in left}
        if left:  # its deletion was killed
            named = references([*study_names(database), *(each.name for each in left)])
            names, disk_bytes = ", ".join(named[each.name] for each in left), sum(each.disk_bytes for each in left)
            remaining = named[known.name] if known is not None else ""
            found = DeletedStudy(names, database.url, False, {}, disk_bytes, [], remaining)
        else:
            opened = find_study(database, study)
            require_ours(
                opened, "hpo does not know its files: delete it in the dashboard, or with `optuna.delete_study`"
            )
            folder = runs.checkpoints(opened.unique_name)
            disk_bytes = count_bytes(folder) + _bytes_in_bucket(runs, opened.unique_name)
            found = DeletedStudy(opened.reference, database.url, True, dict(opened.counts()), disk_bytes, [])
        if not confirm(found):
            return None
        if not left:
            note_name(folder, opened.name)
            try:
                management.delete_study(opened, found.counts)
            except (management.StudyRunningError, management.StudyChangedError):
                forget_name(folder)
                raise
            left = [files_of(database, folder, opened.name, runs)]
        else:  # a trial may continue another one of them by now
            left = [each for each in find_deleted(database, study, runs) if each.name in killed]
        return replace(found, problems=[problem for each in left for problem in each.delete()])


def _bytes_in_bucket(runs: RunsDir, unique_name: str) -> int:
    """Return the size of a study's checkpoints in the bucket; 0 without one."""
    url = runs.bucket_study(unique_name)
    try:
        return sum(each.size for each in Bucket(url).list_objects()) if url else 0
    except OSError as error:
        raise SettingError(f"nothing is deleted: {url} cannot be read: {describe(error)}") from None


def _check_name(name: str) -> None:
    """Raise SettingError for a name that no search space has: the study could not be resumed; or that is too long."""
    if len(name.encode(errors="replace")) > MAX_NAME_BYTES:
        raise SettingError(f"a study cannot be named {name[:40]!r}...: at most {MAX_NAME_BYTES} bytes are allowed")
    is_strange = not name.strip() or name != name.strip() or not name.isprintable()
    if is_strange or "@" in name or "/" in name or name in {".", ".."}:
        raise SettingError(
            f"a study cannot be named {name!r}: it has the name of a file in search_spaces/, without its ending and "
            "without @, the sign before the number of a revision"
        )
