"""A SQLite file, read without changing it: neither its bytes, nor the files that SQLite keeps next to it.

Whether hpo may use a file must be known before its first write. An ordinary connection writes when it opens a file: WAL in
its header, a rollback of what a killed program left, a checkpoint when it is closed.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

_WAL_MODE = 2  # bytes 18 and 19 of the header


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


def is_newer_than_its_wal(path: Path) -> bool:
    """Return whether a file changed after the WAL next to it: if it was replaced, the WAL is of the file before.

    SQLite changes a file itself when it moves the WAL into it, so this is no proof. The time is that of the last change
    (ctime): programs that copy files can set the other times.
    """
    return has_wal(path) and _status(path, "st_ctime_ns") >= _status(_beside(path, "wal"), "st_ctime_ns")


def is_intact(path: Path, timeout_seconds: float) -> bool:
    """Return whether every page of a file, with its WAL, is where it should be. Reads the whole file: 7 s a GB.

    Raises:
        sqlite3.Error: the file cannot be opened.
    """
    with closing(connect(path, timeout_seconds)) as connection:
        try:
            answer: str = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.DatabaseError as error:
            if "malformed" in str(error):
                return False
            raise
    return answer == "ok"


def _is_in_wal_mode(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return _WAL_MODE in file.read(20)[18:]
    return False  # SQLite says what is wrong


def _beside(path: Path, suffix: str) -> Path:
    return Path(f"{path.resolve()}-{suffix}")


def _status(path: Path, field: str) -> int:
    try:
        return int(getattr(path.stat(), field))
    except FileNotFoundError:
        return 0
