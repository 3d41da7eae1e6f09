"""All paths under runs/, and atomic file writes."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hpo.errors import SettingError

PACKAGE_DIR = Path(__file__).resolve().parent  # of the package hpo
LOG_FILE = "log.txt"  # in a trial's folder: the output of its script
HANG_FILE = "hang.txt"  # in a trial's folder: the stack of every thread of a worker that hung
LOST_FILE = "device_lost.txt"  # in a trial's folder: the error after which its worker's process could not use the GPU
CONFIGURATION_FILE = "configuration.json"  # in a trial's folder: whose files these are
COPYING_FILE = "copying.json"  # in the folder of a study that is being copied: which study, to which database
DATABASES_FILE = "databases.txt"  # in a study's folder: which databases have trained its trials, one a line
DELETED_FILE = "deleted.txt"  # in a study's folder: the name under which `hpo delete` deletes it
PARENT_SUFFIX = ".parent"  # after a trial's number, in a copy: the folder with the files of the trial that it continues
SCRIPT_DIR = "script"  # in a trial's folder: {checkpoint_dir} of its script

MAX_FOLDER_BYTES = 200  # of the name of a report's folder; file systems allow 255
_UNSAFE = re.compile(r"[^\w.@+-]")
_SEPARATORS = re.compile(r"[/\0]")


def seed_log(folder: Path, seed: int) -> Path:
    """Return the log of one of several trainings of a trial."""
    return folder / f"{Path(LOG_FILE).stem}-seed-{seed}{Path(LOG_FILE).suffix}"


def logs_of(folder: Path) -> list[Path]:
    """Return the logs of a trial: the output of its script, or of its script for each seed."""
    return [path for path in (folder / LOG_FILE, *sorted(folder.glob("log-seed-*.txt"))) if path.is_file()]


@dataclass(frozen=True)
class RunsDir:
    """The folder that holds everything a run writes.

    Attributes:
        root: usually `runs`, in the folder that the command runs in.
        checkpoint_root: the folder with the checkpoints of all studies; None for one in `root`.
        bucket_url: where in a bucket checkpoints are stored, too; empty for nowhere. See `hpo.bucket.locate`.
    """

    root: Path = Path("runs")
    checkpoint_root: Path | None = None
    bucket_url: str = ""

    @property
    def default_storage(self) -> str:
        """The URL of the SQLite database that is used where no other storage is named."""
        return f"sqlite:///{self.root}/hpo.db"

    @property
    def artifacts(self) -> Path:
        """The files that the dashboard offers for download."""
        return self.root / "artifacts"

    @property
    def reports(self) -> Path:
        """The reports of all studies."""
        return self.root / "reports"

    @property
    def all_checkpoints(self) -> Path:
        """The checkpoints of all studies."""
        return self.root / "checkpoints" if self.checkpoint_root is None else self.checkpoint_root

    def checkpoints(self, unique_name: str) -> Path:
        """Return the folder of a study's checkpoints.

        Args:
            unique_name: `Study.unique_name`, which is unique across databases.
        """
        return self.all_checkpoints / _folder_name(unique_name)

    def trial(self, unique_name: str, number: int) -> Path:
        """Return the folder of one trial: its checkpoints, its log, its hang traceback."""
        return self.checkpoints(unique_name) / str(int(number))  # SQLite may hold a text there

    def bucket_study(self, unique_name: str) -> str:
        """Return the URL of a study's checkpoints in the bucket; empty without a bucket."""
        return f"{self.bucket_url}/{_folder_name(unique_name)}" if self.bucket_url else ""

    def bucket_trial(self, unique_name: str, number: int) -> str:
        """Return the URL of a trial's checkpoints in the bucket; empty without a bucket."""
        return f"{self.bucket_study(unique_name)}/{int(number)}" if self.bucket_url else ""

    def report(self, study_name: str) -> Path:
        """Return the folder of a study's report. A study of another program may have any name, even one with slashes."""
        return self.reports / _page_folder(study_name)

    def comparison(self, study_names: Sequence[str]) -> Path:
        """Return the folder of a page that compares studies."""
        return self.root / "comparisons" / _page_folder("+".join(study_names))

    def export(self, study_name: str, number: int) -> Path:
        """Return the folder of an exported trial."""
        return self.root / "exports" / _folder_name(f"{study_name}-{int(number)}")

    def make(self) -> RunsDir:
        """Create the folders and check that they can be written to; return them with absolute paths.

        Raises:
            SettingError: one cannot be created or written to.
        """
        _make(
            self.root, "A search writes all of its files there: make the folder writable, or start from another folder"
        )
        checkpoints = self.checkpoint_root
        if checkpoints is not None:
            _make(checkpoints, "--checkpoints names it: make it writable, or name another folder, or a bucket")
            checkpoints = checkpoints.resolve()
        return RunsDir(self.root.resolve(), checkpoints, self.bucket_url)


def _make(folder: Path, advice: str) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # private, unless it exists
        probe = folder / f".writable-{os.getpid()}-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SettingError(f"cannot write to {folder.absolute()}: {error.strerror}. {advice}") from None


def _page_folder(name: str) -> str:
    """Return the name of the folder of a page, for any name of a study."""
    safe = _UNSAFE.sub("_", name).lstrip(".")[:100].encode()[:MAX_FOLDER_BYTES].decode(errors="ignore") or "_"
    if safe != name:  # the hash tells it from others that would have the same folder; no name contains a ~
        safe += "~" + hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return safe


def _folder_name(name: str) -> str:
    """Return a name from the database as the name of one folder. The names of search spaces stay as they are."""
    name = _SEPARATORS.sub("_", name)
    return "_" if name in {"", ".", ".."} else name


DEFAULT_STORAGE = RunsDir().default_storage


def study_id_of(unique_name: str) -> str:
    """Return the random part of `Study.unique_name`, which no other study has."""
    return unique_name.rpartition("-")[2]


def is_new_database(url: str) -> bool:
    """Return whether a storage URL names a SQLite file that does not exist yet. Imports no database driver."""
    scheme, _, path = url.partition(":///")
    return scheme.partition("+")[0] == "sqlite" and not Path(path.partition("?")[0]).exists()


@contextmanager
def atomic_file(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """Open a file to be written atomically: a reader sees the old or the new content, never a part.

    Args:
        path: the file. It appears, or is replaced, when the `with` block ends without an error.
        sync: whether the content is flushed to disk before that, and the name after it, so that both survive a power cut.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged.
    """
    # The name is unique: a worker that outlives its driver for a moment may write the same file.
    draft = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with draft.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        draft.replace(path)
        if sync:
            sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file with `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content)


def link_or_copy(source: Path, path: Path) -> None:
    """Add a hard link to a file that never changes, such as a checkpoint: it needs no space. Else copy the file.

    Args:
        source: the file.
        path: its new name. A file that has it, such as one of an attempt that failed, is replaced.

    Raises:
        OSError: the file cannot be read, or the other one not be written.
    """
    path.unlink(missing_ok=True)
    try:
        path.hardlink_to(source)
    except FileExistsError:  # another process did the same just now
        pass
    except OSError:  # another file system, or one without hard links
        with source.open("rb") as original, atomic_file(path, sync=True) as file:
            shutil.copyfileobj(original, file)
