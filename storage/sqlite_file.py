"""A SQLite file, read without changing it: neither its bytes, nor the files that SQLite keeps next to it.

Whether hpo may use a file must be known before its first write. An ordinary connection writes when it opens a file: WAL in
its header, a rollback of what a killed program left, a checkpoint when it is closed.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from storage import wal

_WAL_MODE = 2  # bytes 18 and 19 of the header
_LOCKED_BYTE = 128  # SQLite's UNIX_SHM_DMS
_FLOCK = "hhqqi4x"  # Linux's `struct flock`: kind of the lock, meaning of the start, start, length, process


def connect(path: Path, timeout_seconds: float, *, immutable: bool = False) -> sqlite3.Connection:
    """Open a file for reading. What SQLite would write, such as the rollback of a killed program's transaction, is an error.

    Args:
        path: the file.
        timeout_seconds: how long to wait for another program's transaction.
        immutable: whether to read the file alone: without locks, its WAL, or its journal.

    Raises:
        sqlite3.Error: the file cannot be opened.
    """
    for pause_seconds in (0.01, 0.1, 0.5, None):
        connection = sqlite3.connect(
            _uri(path, immutable=immutable), uri=True, timeout=timeout_seconds, check_same_thread=False
        )
        try:
            connection.execute("SELECT 1 FROM sqlite_master")  # only now, SQLite opens the files
        except sqlite3.OperationalError as error:
            connection.close()
            # The last program that had the file open may have deleted its WAL meanwhile.
            if pause_seconds is None or "unable to open" not in str(error):
                raise
            time.sleep(pause_seconds)
        else:
            return connection
    raise AssertionError


def _uri(path: Path, *, immutable: bool) -> str:
    options = "mode=ro"
    if immutable or (_is_in_wal_mode(path) and not has_wal(path)):
        # The file is complete. Otherwise, SQLite would create the files of an empty WAL, and could not delete them.
        options += "&immutable=1"
    elif has_wal(path) and _beside(path, "shm").exists():
        options += "&readonly_shm=1"
    return f"{path.resolve().as_uri()}?{options}"


@contextmanager
def engine(path: Path, timeout_seconds: float, *, immutable: bool = False) -> Iterator[sa.Engine]:
    """Yield an SQLAlchemy engine with connections of `connect`."""

    def create() -> sqlite3.Connection:
        return connect(path, timeout_seconds, immutable=immutable)

    opened = sa.create_engine("sqlite://", creator=create, poolclass=NullPool)
    try:
        yield opened
    finally:
        opened.dispose()


def has_wal(path: Path) -> bool:
    """Return whether there is a WAL next to a file: a program has the file open, or was killed while it had."""
    return _status(_beside(path, "wal"), "st_size") > 0


def has_wal_of_another_file(path: Path) -> bool:
    """Return whether the WAL next to a file is of the file that a copy has replaced.

    It costs little, unless the file changed after the WAL and nobody has it open: then the WAL is read.

    Raises:
        OSError: one of the files cannot be read.
    """
    path = path.resolve()
    before = None
    while before != (before := (_identity(path), _identity(_beside(path, "wal")))):
        # A program that has the file open uses the WAL. So it belongs to the file, which checkpoints change at any time.
        if not _is_newer_than_its_wal(path) or is_open_here(path) or _is_open_elsewhere(path):
            return False
        try:
            if wal.belongs(path):
                return False
        except FileNotFoundError:  # the last program that had the file open has deleted it
            continue
    return not _is_open_elsewhere(path)  # others may have opened the file meanwhile


def _is_newer_than_its_wal(path: Path) -> bool:
    """Return whether a file changed after the WAL next to it: a checkpoint, or a copy that replaced the file.

    The time is that of the last change (ctime): programs that copy files can set the other times.
    """
    return has_wal(path) and _status(path, "st_ctime_ns") > _status(_beside(path, "wal"), "st_ctime_ns")


def is_open_here(path: Path) -> bool:
    """Return whether this process has a file open.

    Then it must not open and close the file again without SQLite: that ends the locks of its connections (POSIX), and other
    programs would delete the WAL that they write to.
    """
    with suppress(OSError):
        status = path.stat()
        for descriptor in Path("/dev/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                if os.path.samestat(os.fstat(int(descriptor.name)), status):
                    return True
    return False


def _is_open_elsewhere(path: Path) -> bool:
    """Return whether another process has a file open that is in WAL mode. This process must not: see `is_open_here`.

    Every connection holds a lock on a byte of the file's shared memory. The operating system takes it from a killed process.
    """
    try:
        descriptor = os.open(_beside(path, "shm"), os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        descriptor = os.open(_beside(path, "shm"), os.O_RDONLY)
    try:
        if sys.platform == "linux":
            question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _LOCKED_BYTE, 1, 0)
            kind: int = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, question))[0]
            return kind != fcntl.F_UNLCK
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _LOCKED_BYTE)
        except OSError:
            return True
        return False
    finally:
        os.close(descriptor)


def _is_in_wal_mode(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return _WAL_MODE in file.read(20)[18:]
    return False  # SQLite says what is wrong


def _beside(path: Path, suffix: str) -> Path:
    return Path(f"{path.resolve()}-{suffix}")


def _identity(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is written or replaced; None if it is missing."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _status(path: Path, field: str) -> int:
    try:
        return int(getattr(path.stat(), field))
    except FileNotFoundError:
        return 0
