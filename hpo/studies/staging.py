"""The folder of a study that is being copied, before the database knows the copy.

Its name contains the random `hpo:id` that the copy will have. A file in it says which copy it is for, until the copy is in
the database. A lock says whether a process works on it: the lock of a process that dies is released.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
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
    identity = next(filter(may_continue, _find(order, runs_dir)), None) or secrets.token_hex(6)
    folder = runs_dir.checkpoints(f"{order.name}-{identity}")
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock_of(folder)
    try:
        with lock:
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
    order, left = _read(folder), leftovers(folder)
    if order is None:  # killed before it had copied anything
        return bool(left) and set(folder.iterdir()) <= set(left)
    return bool(left) and order.database == database


def leftovers(folder: Path) -> list[Path]:
    """Return the files that a copy leaves in its folder if it is killed; none while a process makes it."""
    lock = _lock_of(folder)
    path = Path(lock.lock_file)
    found = [*folder.glob(f".{COPYING_FILE}.*.tmp"), *(each for each in (folder / COPYING_FILE, path) if each.exists())]
    with suppress(Timeout, OSError), lock if path.exists() else nullcontext():
        return found
    return []


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
