"""A SQLite file, read without changing its bytes or the files that SQLite keeps next to it.

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
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from storage import wal

DISTRUST = "PRAGMA trusted_schema=OFF"  # what somebody wrote into the schema calls no function with side effects
BUSY_SECONDS = 60.0  # how long a writer waits for another writer
_TICK_SECONDS = 0.02  # two changes of a file within this time may leave it with the same time of its last change
_WAL_MODE = 2  # bytes 18 and 19 of the header
_LOCKED_BYTE = 128  # SQLite's UNIX_SHM_DMS
_CHANGED = "database is locked: another program changed the file while it was read"  # "locked": it can be read again
_FLOCK = "hhqqi4x"  # Linux's `struct flock`: kind of the lock, meaning of the start, start, length, process


class _Cursor(sqlite3.Cursor):
    """Reads the whole answer at once, and refuses it if the file was changed meanwhile."""

    _rows: Iterator[Any] = iter(())

    def execute(self, sql: str, parameters: Any = ()) -> _Cursor:
        try:
            super().execute(sql, parameters)
            self._rows = iter(super().fetchall())
        finally:  # what looks like damage may be pages of two versions
            if isinstance(self.connection, _Alone):
                self.connection.check()
        return self

    def fetchone(self) -> Any:
        return next(self._rows, None)

    def fetchmany(self, size: int | None = None) -> list[Any]:
        return list(islice(self._rows, self.arraysize if size is None else size))

    def fetchall(self) -> list[Any]:
        return list(self._rows)

    def __next__(self) -> Any:
        return next(self._rows)


class _Alone(sqlite3.Connection):
    """A connection that reads a file without locks, as the file was when it was opened.

    SQLite expects that nobody changes the file. Others may: a run starts, and a checkpoint writes to it.
    """

    _path: Path | None = None
    _opened: tuple[int, ...] | None = None

    def watch(self, path: Path, opened: tuple[int, ...] | None) -> None:
        """Compare the file with what `_identity` returned before it was opened."""
        self._path, self._opened = path, opened

    def cursor(self, factory: Any = _Cursor) -> Any:
        return super().cursor(factory)

    def execute(self, sql: str, parameters: Any = ()) -> Any:
        return self.cursor().execute(sql, parameters)

    def is_current(self) -> bool:
        return self._path is None or _identity(self._path) == self._opened

    def check(self) -> None:
        if not self.is_current():
            raise sqlite3.OperationalError(_CHANGED)

    def can_go_on(self) -> bool:
        """Return whether the next transaction may use it: the file is current without a WAL."""
        return self.is_current() and (self._path is None or not has_wal(self._path))


def can_go_on(connection: sqlite3.Connection) -> bool:
    """Return whether a connection of `connect` may be used for another transaction. Otherwise, open a new one."""
    return not isinstance(connection, _Alone) or connection.can_go_on()


def is_change(error: BaseException) -> bool:
    """Return whether an error says that another program changed a file while it was read. Reading it again helps."""
    return str(error) == _CHANGED


def connect(path: Path, timeout_seconds: float, *, immutable: bool = False) -> sqlite3.Connection:
    """Open a file for reading. What SQLite would write, such as the rollback of a killed program's transaction, is an error.

    Where nobody has the file open, it is read alone: otherwise, SQLite would create the files of an empty WAL, and could not
    delete them. If another program changes it meanwhile, that is an error, see `is_change`.

    Args:
        path: the file.
        timeout_seconds: how long to wait for another program's transaction.
        immutable: whether to read the file alone in any case: without locks, its WAL, or its journal.

    Raises:
        sqlite3.Error: the file cannot be opened.
    """
    for pause_seconds in (0.01, 0.1, 0.5, None):
        opened = _identity(path)
        is_alone = immutable or (not has_wal(path) and not is_open_here(path) and _is_in_wal_mode(path))
        connection = sqlite3.connect(
            _uri(path, is_alone=is_alone),
            uri=True,
            timeout=timeout_seconds,
            check_same_thread=False,
            factory=_Alone if is_alone else sqlite3.Connection,
        )
        if isinstance(connection, _Alone):
            if opened is not None and abs(time.time_ns() - opened[-1]) < _TICK_SECONDS * 1e9:
                time.sleep(_TICK_SECONDS)
                opened = _identity(path)
            connection.watch(path, opened)
        try:
            connection.execute(DISTRUST)
            connection.execute("SELECT 1 FROM sqlite_master")  # only now, SQLite opens the files
        except sqlite3.OperationalError as error:
            connection.close()
            # The last program that had the file open may have deleted its WAL meanwhile.
            if pause_seconds is None or not (is_change(error) or "unable to open" in str(error)):
                raise
            time.sleep(pause_seconds)
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise AssertionError


def _uri(path: Path, *, is_alone: bool) -> str:
    options = "mode=ro"
    if is_alone:
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
    """Return whether this process has a file open that is in WAL mode, other than alone (see `connect`).

    Then it must not open and close the file again without SQLite, or alone: that ends the locks of its connections (POSIX),
    and other programs would delete the WAL that they write to.
    """
    with suppress(OSError):
        shared_memory = _beside(path, "shm").stat()
        for descriptor in Path("/dev/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                if os.path.samestat(os.fstat(int(descriptor.name)), shared_memory):
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
    """Return what changes when a file is written or replaced, the time of that last; None if it is missing."""
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
