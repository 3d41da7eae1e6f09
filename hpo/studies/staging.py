"""The folder of a study that is being copied, before the database knows the copy.

Its name contains the random `hpo:id` that the copy will have. A file in it says which copy it is for, until the copy is in
the database. A lock says whether a process works on it: the lock of a process that dies is released.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from hpo.errors import SettingError
from hpo.paths import COPYING_FILE, RunsDir, study_id_of, write_atomically


@dataclass(frozen=True)
class CopyOrder:
    """Which copy a folder is for.

    Attributes:
        source: `hpo:id` of the study that is copied.
        database: of the copy, see `storage.database.identify`.
        name: of the copy.
    """

    source: str
    database: str
    name: str


@contextmanager
def stage(order: CopyOrder, runs_dir: RunsDir, may_continue: Callable[[str], bool]) -> Iterator[str]:
    """Yield the `hpo:id` of a copy, whose folder is ready: that of the same copy which was killed, or a new one.

    If the `with` block ends without an error, the folder is that of a study from then on. Otherwise it stays as it is.

    Args:
        order: the copy.
        runs_dir: where the folder is.
        may_continue: returns whether the `hpo:id` of one that was killed is still that of this copy, or of none.

    Raises:
        SettingError: another process makes the same copy.
        OSError: the folder cannot be created.
    """
    found = next(filter(may_continue, _find(order, runs_dir)), None)
    identity = found or secrets.token_hex(6)
    folder = runs_dir.checkpoints(f"{order.name}-{identity}")
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock_of(folder)
    try:
        with lock:
            if found and (_read(folder) != order or not may_continue(found)):
                Path(lock.lock_file).unlink()
                raise SettingError(
                    f"another process has just ended the copy {order.name!r} in {folder}, or deleted its files: try again"
                )
            # The lock is older than this file: without it, `hpo clean` could take the folder for abandoned.
            write_atomically(folder / COPYING_FILE, json.dumps(asdict(order)).encode())
            yield identity
            (folder / COPYING_FILE).unlink(missing_ok=True)
    except Timeout:
        raise SettingError(
            f"another process makes the copy {order.name!r} in {folder}: wait until it has ended"
        ) from None
    Path(lock.lock_file).unlink(missing_ok=True)


def is_abandoned(folder: Path, database: str) -> bool:
    """Return whether a folder is for a copy to this database that no process makes: it was killed, or failed.

    Args:
        folder: of a study, or of a copy.
        database: see `CopyOrder`. Whether a copy to another database is complete is not known here.
    """
    order = _read(folder)
    return is_incomplete(folder, leftovers(folder)) and (order is None or order.database == database)


def is_incomplete(folder: Path, left: Collection[Path]) -> bool:
    """Return whether a folder with these `leftovers` is of a copy that has not ended, instead of a study."""
    if _read(folder) is None:  # it has not copied anything yet
        return bool(left) and set(folder.iterdir()) <= set(left)
    return bool(left)


def leftovers(folder: Path) -> list[Path]:
    """Return the files that a copy leaves in its folder if it is killed; none while a process makes it."""
    with held_leftovers(folder) as found:
        return found


@contextmanager
def held_leftovers(folder: Path) -> Iterator[list[Path]]:
    """Yield the `leftovers` of a folder. Inside the `with` block, no process continues the copy."""
    lock = _lock_of(folder)
    path = Path(lock.lock_file)
    with ExitStack() as held:
        try:
            held.enter_context(lock if path.exists() else nullcontext())
        except (Timeout, OSError):
            yield []
            return
        files = (folder / COPYING_FILE, path)
        yield [*folder.glob(f".{COPYING_FILE}.*.tmp"), *(each for each in files if each.exists())]


def _find(order: CopyOrder, runs_dir: RunsDir) -> Iterator[str]:
    """Yield the `hpo:id` of each copy of this kind that was killed."""
    for marker in sorted(runs_dir.all_checkpoints.glob(f"*/{COPYING_FILE}")):
        identity = study_id_of(marker.parent.name)
        if _read(marker.parent) == order and marker.parent == runs_dir.checkpoints(f"{order.name}-{identity}"):
            yield identity


def _read(folder: Path) -> CopyOrder | None:
    with suppress(OSError, ValueError, TypeError):
        return CopyOrder(**json.loads((folder / COPYING_FILE).read_bytes()))
    return None


def _lock_of(folder: Path) -> FileLock:
    return FileLock(folder / f"{COPYING_FILE}.lock", timeout=0, mode=0o600)
