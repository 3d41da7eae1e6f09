"""Who created the tables of a database, in which version, and the lock under which they are created and migrated."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa
from filelock import FileLock, Timeout
from sqlalchemy.exc import DBAPIError, OperationalError

from storage import migrations, optuna_tables
from storage.errors import StorageError
from storage.optuna_tables import SCHEMA
from storage.tables import metadata, schema

OPENING_SECONDS = 60.0  # how long a process waits for another one that creates or migrates the tables

# {table: columns} of Optuna's tables and of ours. Other programs may have tables with these names, too.
_COLUMNS = {
    table.name: {column.name for column in table.columns}
    for tables in (optuna_tables.metadata, metadata)
    for table in tables.sorted_tables
}

_OPTUNA_TABLES = set(optuna_tables.metadata.tables)


class Versions(NamedTuple):
    """The versions of our tables and of Optuna's; None where there are none, or they are not complete."""

    ours: int | None
    optuna: str | None


def read_versions(engine: sa.Engine, safe_url: str) -> Versions:
    """Return the versions of the tables of a database.

    Optuna's tables may be next to others: on PostgreSQL, programs share a database. Nothing of theirs is changed, unless
    their tables have names of ours.

    Raises:
        StorageError: another program, a newer version of hpo or another version of Optuna created the tables.
    """
    inspector = sa.inspect(engine)
    names = {*inspector.get_table_names(), *inspector.get_view_names()}
    if engine.dialect.name == "sqlite":  # HPO_Runs and hpo_runs are the same table there
        names = {name.lower() for name in names}
    if not names:
        return Versions(None, None)
    with engine.connect() as connection:
        refuse_views(connection, safe_url)

    def columns(table: str) -> set[str]:
        return {column["name"] for column in inspector.get_columns(table)} if table in names else set()

    version: int | None = None
    optuna_version: str | None = None
    with engine.connect() as connection:
        if columns(schema.name) == {"version"}:
            version = connection.scalar(sa.select(schema.c.version))
        if "version_num" in columns("alembic_version"):
            optuna_version = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    if version is not None and version > migrations.VERSION:
        raise StorageError(
            f"{safe_url} was written by a newer version of hpo (its tables have version {version}, this one knows up to "
            f"{migrations.VERSION}); update hpo, or name another database"
        )
    known = names & set(_COLUMNS)
    if optuna_version == SCHEMA and version is not None:
        return Versions(version, optuna_version)
    if optuna_version == SCHEMA:
        strange = {name for name in known if not columns(name) >= _COLUMNS[name]}
        if not strange and known >= _OPTUNA_TABLES:
            return Versions(None, optuna_version)
    elif optuna_version is None and version is None and schema.name in names:
        # hpo was killed while it created tables: ours come first, and the versions last.
        strange = {name for name in names - {"alembic_version"} if columns(name) != _COLUMNS.get(name)}
        if not strange:
            return Versions(None, None)
    else:
        strange = names
        if version is not None or ("version_info" in names and columns("studies") >= {"study_id", "study_name"}):
            raise StorageError(
                f"{safe_url} was written by another version of Optuna (its tables: {optuna_version}, expected: {SCHEMA}); "
                "back it up and run `optuna storage upgrade --storage URL`, or name another database"
            )
    raise StorageError(
        f"{safe_url} belongs to another program (it has the tables {', '.join(sorted(strange or names)[:3])}, ...); "
        "name an empty database or one of Optuna's"
    )


def refuse_views(connection: sa.Connection, safe_url: str) -> None:
    """Refuse a database in which one of our names, or Optuna's, is not that of an ordinary table.

    hpo and Optuna create tables only. A view gives another answer each time, or none at all.

    Raises:
        StorageError: one of them is a view, a virtual table or a foreign table.
    """
    if connection.dialect.name == "sqlite":
        query = "SELECT name FROM sqlite_master WHERE type = 'view' OR type = 'table' AND rootpage = 0"  # 0: virtual
        found = set(connection.exec_driver_sql(query).scalars())
        # What SQLite takes it for; the file may name another type. Before version 3.37, SQLite returns nothing.
        found |= {row.name for row in connection.exec_driver_sql("PRAGMA table_list") if row.type != "table"}
        found = {name.lower() for name in found}
    else:
        query = (
            "SELECT relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace "
            "WHERE nspname = current_schema() AND relkind NOT IN ('r', 'p')"
        )
        found = set(connection.exec_driver_sql(query).scalars())
    strange = found & {*_COLUMNS, "alembic_version"}
    if strange:
        raise StorageError(
            f"{safe_url} belongs to another program, or somebody has changed it: {min(strange)} is not an ordinary table "
            "(but a view, for example); restore a copy, or name another database"
        )


@contextlib.contextmanager
def schema_lock(engine: sa.Engine, safe_url: str) -> Iterator[None]:
    """Hold the lock under which tables are created. The lock of a process that dies is released.

    Raises:
        StorageError: another process has held it for `OPENING_SECONDS`.
    """
    if engine.dialect.name == "sqlite":
        file = Path(str(engine.url.database)).resolve()  # one lock, even if links lead to the file
        lock = FileLock(f"{file}.{zlib.crc32(b'schema'):08x}.lock", mode=0o600)
        _share_lock(Path(lock.lock_file), file)
        try:
            lock.acquire(timeout=OPENING_SECONDS)
        except Timeout:
            raise _opened_elsewhere(safe_url, f"`fuser {lock.lock_file}` shows its PID") from None
        except OSError as error:
            raise StorageError(
                f"{safe_url}: cannot write {lock.lock_file}: {error.strerror}. Every process that opens the database needs "
                "this file: make it and its folder writable"
            ) from None
        try:
            yield
        finally:
            lock.release()
        return
    number = zlib.crc32(b"hpo/schema")
    # A separate connection without a transaction: the lock is held until it is released or the connection ends.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"SET lock_timeout = {OPENING_SECONDS * 1000:.0f}")
        try:
            connection.execute(sa.select(sa.func.pg_advisory_lock(number)))
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) != "55P03":
                raise
            pid = connection.exec_driver_sql(
                "SELECT pid FROM pg_locks JOIN pg_database ON pg_database.oid = database "
                f"WHERE datname = current_database() AND locktype = 'advisory' AND objid = {number} AND granted"
            ).scalar()
            raise _opened_elsewhere(safe_url, f"`SELECT pg_terminate_backend({pid})` ends its connection") from None
        connection.exec_driver_sql("SET lock_timeout = 0")  # not after an error: the connection may have ended
        try:
            yield
        finally:
            try:
                connection.execute(sa.select(sa.func.pg_advisory_unlock(number)))
            except DBAPIError:  # the server is down, which released the lock
                connection.invalidate()


def _share_lock(lock: Path, database: Path) -> None:
    """Create a lock, or change its rights: who may write to the database may use it, and nobody else.

    Who may only read the lock could hold it, and so keep everybody from opening the database. A new database is its owner's.
    """
    with contextlib.suppress(OSError):  # it is another user's. FileLock says so, if this one may not use it
        descriptor = os.open(lock, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            rights = database.stat() if database.exists() else os.fstat(descriptor)
            os.fchown(descriptor, rights.st_uid if os.geteuid() == 0 else -1, rights.st_gid)
            writers = rights.st_mode & 0o022
            os.fchmod(descriptor, 0o600 | writers | writers << 1)  # they read it, too
        finally:
            os.close(descriptor)


def _opened_elsewhere(safe_url: str, remedy: str) -> StorageError:
    return StorageError(
        f"{safe_url}: another process has been opening it for over {OPENING_SECONDS:.0f} s. If it migrates a large "
        f"database, wait until it is done. If it is suspended, continue or end it: {remedy}"
    )
