"""Connections: what is set on each of them, and how a transaction that writes begins."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DisconnectionError

from storage import sqlite_file
from storage.wal import STAMPS

# A connection whose packets are dropped ends after about a minute instead of hours. PostgreSQL's names and units, for the
# client and, with the prefix `tcp_`, for the server.
_TCP_OPTIONS = {
    "keepalives_idle": 30,  # seconds
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # milliseconds
}

# A transaction of ours never waits between two statements, unless its process is suspended. The server then ends it, and
# releases the rows that it locked: without this, all other runs on the study would wait until the process continues.
_IDLE_TRANSACTION_SECONDS = 60

# What a server, a database or a role may have set for its sessions: no wait is cut short, and a number is read as it was
# written. {name: value}
_SESSION = {
    "statement_timeout": "0",
    "lock_timeout": "0",
    "transaction_timeout": "0",  # since PostgreSQL 17
    "extra_float_digits": "1",
}


def _only(*kinds: type) -> Callable[[object], object]:
    """Return a function that returns a value of one of these types, or None, and raises ValueError for any other."""

    def check(value: object) -> object:
        if value is None or type(value) in kinds:
            return value
        raise ValueError(f"{value!r:.60} in a column of {kinds[0].__name__}")

    return check


# SQLite stores anything in a column of any type, such as a text among numbers. Reading it is a ValueError.
class _Integer(sa.Integer):
    def result_processor(self, _dialect: sa.Dialect, _coltype: object) -> Any:
        return _only(int)


class _Float(sa.Float[Any]):
    def result_processor(self, _dialect: sa.Dialect, _coltype: object) -> Any:
        return _only(float, int)


class _String(sa.String):
    def result_processor(self, _dialect: sa.Dialect, _coltype: object) -> Any:
        return _only(str)


_STRICT = {sa.Integer: _Integer, sa.Float: _Float, sa.String: _String, sa.Enum: sa.Enum}  # an Enum checks its values


def engine_options(url: sa.URL) -> dict[str, Any]:
    """Return the arguments of `sa.create_engine` for a URL."""
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": sqlite_file.BUSY_SECONDS}}
    # pre_ping: after a restart of the server, stale connections are replaced before a statement fails on one.
    # UTF-8, for every encoding of the database: psycopg gives texts of SQL_ASCII as bytes, and some encodings lack letters.
    connect_args: dict[str, Any] = {"connect_timeout": 10, "application_name": "hpo", "keepalives": 1} | _TCP_OPTIONS
    given = {name: value for name, value in connect_args.items() if name not in url.query}
    return {
        "pool_pre_ping": True,
        # Not the default of the database: a transaction that waited for a lock must see what the one before it committed.
        "isolation_level": "READ COMMITTED",
        "connect_args": given | {"client_encoding": "utf8"},
    }


def pool_options(url: sa.URL) -> dict[str, Any]:
    """Return more arguments of `sa.create_engine`, for the engine with which a driver writes.

    Mostly, one of a driver's three threads needs a connection. Those that the others open meanwhile are closed again: many
    drivers share a PostgreSQL, where each connection is a process, and there are 100 by default.
    """
    return {} if url.get_backend_name() == "sqlite" else {"pool_size": 1}


def configure(engine: sa.Engine, *, is_written: bool = True) -> None:
    """Configure the connections that an engine opens from now on.

    Args:
        engine: the engine.
        is_written: whether they may write. A SQLite file that is only read is opened so, see `sqlite_file.connect`.
    """
    if engine.dialect.name == "sqlite":
        engine.dialect.colspecs = {**engine.dialect.colspecs, **_STRICT}
    if engine.dialect.name == "postgresql":
        sa.event.listen(engine, "connect", _configure_postgresql)
        if not is_written:
            sa.event.listen(engine, "connect", _forbid_writing)
    elif is_written:
        sa.event.listen(engine, "connect", _configure_sqlite)
    else:
        sa.event.listen(engine, "checkout", _replace_if_outdated)


def _configure_postgresql(connection: Any, _record: object) -> None:
    # The server must notice, too: otherwise, a driver that a network lost would hold its locks for hours.
    settings = _SESSION | {f"tcp_{name.removeprefix('tcp_')}": str(value) for name, value in _TCP_OPTIONS.items()}
    listed = ", ".join(f"('{name}', '{value}')" for name, value in settings.items())
    connection.execute(
        f"SELECT set_config(wanted.name, value, false) FROM (VALUES {listed}) AS wanted (name, value) "
        "JOIN pg_settings ON pg_settings.name = wanted.name"  # an older server lacks some
    )
    connection.commit()


def limit_idle_transactions(connection: Any, _record: object) -> None:
    """End transactions of a PostgreSQL connection that stay idle. A listener of SQLAlchemy's event "connect"."""
    connection.execute(f"SET idle_in_transaction_session_timeout = '{_IDLE_TRANSACTION_SECONDS}s'")
    connection.commit()


def _forbid_writing(connection: Any, _record: object) -> None:
    connection.execute("SET default_transaction_read_only = on")
    connection.commit()


def _configure_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # WAL: readers and the one writer do not wait for each other. NORMAL: a power cut may undo the last commits but does
    # not damage the file; a killed process loses nothing.
    if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute(sqlite_file.DISTRUST)


def _replace_if_outdated(connection: sqlite3.Connection, _record: object, _proxy: object) -> None:
    if not sqlite_file.can_go_on(connection):
        raise DisconnectionError  # SQLAlchemy opens another one


@contextlib.contextmanager
def snapshot(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Begin a transaction that only reads, see `Database.snapshot`."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN")  # Python's driver begins a transaction only before it writes
        else:
            connection = connection.execution_options(isolation_level="REPEATABLE READ")
        yield connection


@contextlib.contextmanager
def transaction(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Begin a transaction, see `Database.transaction`. It may contain DDL."""
    with engine.begin() as connection:
        if engine.dialect.name != "sqlite":
            yield connection
            return
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        driver: sqlite3.Connection = connection.connection.driver_connection  # type: ignore[assignment]
        changes = driver.total_changes
        yield connection
        if driver.total_changes != changes:
            # A number in the file's first page, so that the WAL has a version of the page from each transaction: see `wal`.
            (number,) = driver.execute("PRAGMA user_version").fetchone()
            driver.execute(f"PRAGMA user_version = {(number + 1) % STAMPS}")
