"""The files of studies that were deleted.

`hpo delete` deletes the rows first, then the files. If it is killed in between, the same command deletes the files, and
nothing else: it must not take another study for the deleted one, such as an earlier revision. So it notes in the folder how
the study was called, which may have been renamed since the folder was created.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.bucket import Bucket, describe
from hpo.paths import DATABASES_FILE, DELETED_FILE, RunsDir, study_id_of, write_atomically
from hpo.search.checkpoints.files import list_set_aside
from hpo.studies.bucket_files import BucketFiles, of_deleted
from hpo.studies.folders import count_bytes, delete_path, entries
from hpo.studies.other_databases import OtherDatabases

if TYPE_CHECKING:
    from storage.database import Database


@dataclass(frozen=True)
class DeletedFiles:
    """The files of a study that was deleted.

    Attributes:
        name: of the study.
        paths: what can be deleted.
        kept: what must stay, and why.
        in_bucket: what can be deleted in the bucket; None without one.
    """

    name: str
    paths: Sequence[Path]
    kept: Sequence[str]
    in_bucket: BucketFiles | None = None

    @property
    def disk_bytes(self) -> int:
        """The size of what can be deleted."""
        return sum(map(count_bytes, self.paths)) + (self.in_bucket.size if self.in_bucket is not None else 0)

    def delete(self) -> list[str]:
        """Delete them; return what is left, and why."""
        problems = [*self.kept, *(problem for path in self.paths if (problem := delete_path(path)))]
        if self.in_bucket is not None:
            try:
                Bucket(self.in_bucket.url).delete_with_folder([each.name for each in self.in_bucket.objects])
            except OSError as error:
                problems.append(_in_bucket(self.in_bucket.url, error))
        return problems


def _in_bucket(url: str, error: OSError) -> str:
    return f"cannot delete {url}: {describe(error)}; `hpo clean` deletes it when the bucket answers"


def note_name(folder: Path, name: str) -> None:
    """Note in a study's folder the name under which it is deleted. It is a hint only: errors of the disk are ignored."""
    with suppress(OSError):
        if folder.is_dir():
            write_atomically(folder / DELETED_FILE, name.encode(errors="surrogatepass"))


def forget_name(folder: Path) -> None:
    """Undo `note_name`: the study stays."""
    with suppress(OSError):
        (folder / DELETED_FILE).unlink()


def find_deleted(database: Database, name: str, runs_dir: RunsDir) -> list[DeletedFiles]:
    """Return the files that are left of deleted studies with this name.

    Args:
        database: from which they were deleted.
        name: without a revision, it means all revisions.
        runs_dir: where the files are.

    Raises:
        SettingError: see `OtherDatabases`.
        StorageError: the database cannot be used.
    """
    from storage.studies import deleted_studies

    names = {folder: _name_of(folder) for folder in entries(runs_dir.all_checkpoints, [])}
    folders = [folder for folder, known in names.items() if _is_named(known, name)]
    deleted = deleted_studies(database) if folders else set()
    return [files_of(database, each, names[each], runs_dir) for each in folders if study_id_of(each.name) in deleted]


def files_of(database: Database, folder: Path, name: str, runs_dir: RunsDir) -> DeletedFiles:
    """Return the files of a study that was deleted: checkpoints, logs and artifacts.

    Args:
        database: from which it was deleted.
        folder: of the study; it may be missing.
        name: of the study.
        runs_dir: where its artifacts are.

    Raises:
        SettingError: see `OtherDatabases`.
        StorageError: the database cannot be used.
    """
    from storage.parents import continued_trials

    if other := OtherDatabases(database, runs_dir.root).find(folder):
        return DeletedFiles(name, [], [f"kept: {folder}, of a study that {other} has, too, or may have"])
    identity, problems = study_id_of(folder.name), list[str]()
    children = continued_trials(database).get(identity, {})
    paths, needed = not_continued(folder, children)
    kept = [
        f"kept: {path}, from which a trial of {child} may still start; `hpo clean` deletes it when none does any more"
        for path, child in needed.items()
    ]
    paths += artifacts_of(identity, entries(runs_dir.artifacts, problems))
    in_bucket = None
    if runs_dir.bucket_url:
        url = f"{runs_dir.bucket_url}/{folder.name}"
        try:
            in_bucket = of_deleted(url, children)
        except OSError as error:
            problems.append(_in_bucket(url, error))
    return DeletedFiles(name, paths, [*kept, *problems], in_bucket)


def not_continued(folder: Path, children: Mapping[int, str]) -> tuple[list[Path], dict[Path, str]]:
    """Return what can be deleted of a deleted study's folder, and {folder of a trial: study} of what others continue.

    Args:
        folder: of the study; it may be missing.
        children: {number of a trial: name of a study}, see `storage.parents.continued_trials`.
    """
    needed = {
        path: name
        for number, name in children.items()
        for path in (folder / str(number), *list_set_aside(folder / str(number)))
        if path.is_dir()
    }
    if not needed:
        return [folder] if folder.exists() else [], {}
    notes = {DATABASES_FILE, DELETED_FILE}  # what else is left needs them
    return [path for path in entries(folder, []) if path not in needed and path.name not in notes], needed


def artifacts_of(identity: str, artifacts: Sequence[Path]) -> list[Path]:
    """Return the artifacts of the study with this `hpo:id`."""
    return [path for path in artifacts if path.name.startswith(f"{identity}-")]


def _name_of(folder: Path) -> str:
    """Return the name of a deleted study: as noted, or the one that it had when its folder was created."""
    with suppress(OSError, ValueError):
        return (folder / DELETED_FILE).read_bytes().decode(errors="surrogatepass")
    return folder.name.rpartition("-")[0]


def _is_named(known: str, name: str) -> bool:
    """Return whether a user may have meant a study by a name, see `storage.studies.find_study`."""
    from storage.revisions import revisions_of

    return known in {name, name.removesuffix("@1")} if "@" in name else bool(revisions_of([known], name))
