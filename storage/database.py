"""Opening a database by its URL: for a search, to read a study, or to look at what is there.

Two databases are supported: SQLite for one machine, PostgreSQL for several. Any number of processes may open either at the
same time: the first one creates the tables while it holds a lock.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy as sa
from optuna.storages import RDBStorage
from sqlalchemy.exc import DBAPIError

from storage import migrations, sqlite_file
from storage.engines import configure, engine_options, limit_idle_transactions, pool_options, snapshot, transaction
from storage.errors import (
    READ_ONLY,
    MissingDatabaseError,
    StorageError,
    driver_error,
    name_strange_content,
    retry_while_down,
    translate_errors,
)
from storage.mounts import network_file_system
from storage.tables import metadata, schema
from storage.urls import parse_url
from storage.versions import read_versions, refuse_views, schema_lock

_LOOK_SECONDS = 5.0  # how long a look at another database waits for its writer

_UNREADABLE = {"42501", "58P01", "58030"}  # insufficient_privilege, undefined_file, io_error

T = TypeVar("T")
logger = logging.getLogger("hpo.storage")


@dataclass(frozen=True)
class Database:
    """An open database.

    Attributes:
        url: the URL without its password, for messages.
        engine: SQLAlchemy's engine, for our tables.
        optuna_storage: Optuna's storage. It has its own engine with the same options.
        missing_tables: names of our tables that it lacks. Only `open_for_reading` leaves it so.
    """

    url: str
    engine: sa.Engine
    optuna_storage: RDBStorage
    missing_tables: frozenset[str] = frozenset()

    @property
    def file(self) -> Path | None:
        """The SQLite file; None for PostgreSQL."""
        return Path(str(self.engine.url.database)).resolve() if self.engine.dialect.name == "sqlite" else None

    def now_seconds(self) -> sa.ColumnElement[float]:
        """Return an SQL expression for the database's time, in seconds since 1970.

        Leases compare times by this clock, so the clocks of several machines need not agree.
        """
        if self.engine.dialect.name == "sqlite":
            return sa.cast((sa.func.julianday("now") - 2440587.5) * 86400.0, sa.Float)
        return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Float)

    def close_idle(self) -> None:
        """Close the connection that Optuna keeps after it has read: most samplers do not read through it again."""
        self.optuna_storage.remove_session()
        self.optuna_storage.engine.dispose()

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()
        self.optuna_storage.engine.dispose()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def snapshot(self) -> AbstractContextManager[sa.Connection]:
        """Begin a transaction that only reads, whose statements all see the database at the same moment.

        Otherwise, each statement also sees what others have stored since the one before it.
        """
        return snapshot(self.engine)

    def transaction(self) -> AbstractContextManager[sa.Connection]:
        """Begin a transaction that reads and writes.

        On SQLite, it is the only one that writes, from its first statement on. On PostgreSQL, it locks the rows that it
        asks for (`with_for_update`).
        """
        return transaction(self.engine)


def open_database(url: str, password: str | None = None, *, create: bool = True) -> Database:
    """Open a database. Create its tables, or migrate those of an older version. Any number of processes may do so at once.

    Args:
        url: an SQLAlchemy URL: `sqlite:///path/to/file.db` or `postgresql://user:password@host/name`.
        password: the password for a PostgreSQL URL without one.
        create: whether to create a missing SQLite file.

    Raises:
        StorageError: the URL is wrong; the database is down or forbids access; another program, a newer version
            of hpo or another version of Optuna created its tables; a SQLite file is on a network file system.
    """
    parsed, safe_url = parse_url(url, password)
    with translate_errors(safe_url):
        if parsed.get_backend_name() == "sqlite":
            _refuse_network(Path(str(parsed.database)), safe_url)
            _check_file(Path(str(parsed.database)), safe_url, may_be_missing=create, is_written=True)
            _create_folder(parsed, safe_url)
        options = engine_options(parsed)
        engine = sa.create_engine(parsed, **options | pool_options(parsed))
        configure(engine)
        if engine.dialect.name == "postgresql":
            # Not on Optuna's engine: it builds objects while it reads, and locks nothing.
            sa.event.listen(engine, "connect", limit_idle_transactions)
        try:
            # The first connection needs the lock, too: it turns on WAL, for which SQLite does not wait for other writers.
            with schema_lock(engine, safe_url):
                version = read_versions(engine, safe_url).ours
                if version is None:
                    return Database(safe_url, engine, _create_tables(parsed, engine, options))
                if version < migrations.VERSION:
                    _migrate(engine, version, safe_url)
            return Database(safe_url, engine, _create_optuna_storage(parsed, options, skip_table_creation=True))
        except BaseException:
            engine.dispose()
            raise


def open_for_reading(url: str, password: str | None = None) -> Database | None:
    """Open a database to look at its studies: nothing is created, migrated or changed, not even files next to it.

    What reads runs and the states of trials works with the tables of every version, and with Optuna's alone.

    Args:
        url: see `open_database`.
        password: see `open_database`.

    Returns:
        The database; None if it has no tables yet, or not all of them.

    Raises:
        StorageError: see `open_database`; or there is no such SQLite file.
    """
    parsed, safe_url = parse_url(url, password)
    options = engine_options(parsed)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    if is_sqlite:
        path = Path(str(parsed.database))
        options["creator"] = lambda: sqlite_file.connect(path, sqlite_file.BUSY_SECONDS)
    with translate_errors(safe_url):
        if is_sqlite:
            _check_file(path, safe_url, may_be_missing=False, is_written=False)
        engine = sa.create_engine(parsed, **options)
        configure(engine, is_written=False)
        try:
            if _read_again(lambda: read_versions(engine, safe_url)).optuna is None:
                engine.dispose()
                return None
            missing = set(metadata.tables) - set(_read_again(lambda: sa.inspect(engine).get_table_names()))
            storage = _create_optuna_storage(parsed, options, skip_table_creation=True, is_written=False)
            return Database(safe_url, engine, storage, frozenset(missing))
        except BaseException:
            engine.dispose()
            raise


def open_existing(url: str, password: str | None = None, *, may_migrate: bool = True) -> Database:
    """Open a database to read all of a study. It is only read, like by `open_for_reading`, unless its tables are older.

    Args:
        url: see `open_database`.
        password: see `open_database`.
        may_migrate: whether older tables are migrated, after which older versions of hpo refuse the database. Otherwise they
            are an error.

    Raises:
        StorageError: see `open_database`; there is no such SQLite file; or its tables are older, and stay so.
    """
    database = open_for_reading(url, password)
    version = None
    if database is not None:
        version = _read_again(lambda: read_versions(database.engine, database.url)).ours
        if version == migrations.VERSION:
            return database
        database.close()
    if not may_migrate:
        safe_url = parse_url(url, password)[1]
        what = "no tables of hpo" if version is None else f"tables of version {version}, not {migrations.VERSION}"
        raise StorageError(
            f"{safe_url} has {what}, and is only read here. `hpo migrate --storage URL` brings it forward; older versions "
            "of hpo refuse it then, so migrate a copy of it if you still need them"
        )
    return open_database(url, password, create=False)


def identify(database: Database) -> str:
    """Return what identifies a database, even if it has several URLs.

    It is the path of a SQLite file. Of a PostgreSQL database, it is a URL: of the server's number, the database's, and the
    schema; or the database's own URL, without the password, if the role or the server may not read these.

    Raises:
        StorageError: the database cannot be used.
    """

    def read() -> str:
        with database.engine.connect() as connection:
            if not connection.scalar(sa.text("SELECT has_function_privilege('pg_control_system()', 'EXECUTE')")):
                return database.url
            query = sa.text(
                "SELECT system_identifier, oid, current_schema() FROM pg_control_system(), pg_database "
                "WHERE datname = current_database()"
            )
            try:
                row = connection.execute(query).one()
            except DBAPIError as error:
                # The server reads a file by its path, which its user may not be able to enter.
                if getattr(error.orig, "sqlstate", None) not in _UNREADABLE:
                    raise
                return database.url
            return "postgresql://server-{}/database-{}/{}".format(*row)

    return retry_while_down(database, read) if database.file is None else str(database.file)


def look_at(path: Path, read: Callable[[sa.Connection], T]) -> T:
    """Return what a function reads from a SQLite file, which may be of any program. The file is only read.

    Args:
        path: the file.
        read: is called with a connection, maybe several times.

    Raises:
        StorageError: the file cannot be read, or a view has the name of a table.
    """

    def look() -> T:
        with sqlite_file.engine(path, _LOOK_SECONDS) as engine, engine.connect() as connection:
            refuse_views(connection, str(path))
            return read(connection)

    with translate_errors(str(path)), name_strange_content(str(path)):
        _check_wal(path, str(path))
        return _read_again(look)


def _create_tables(url: sa.URL, engine: sa.Engine, options: dict[str, Any]) -> RDBStorage:
    metadata.create_all(engine)  # first: without the right to create tables, RDBStorage would leak its connections
    storage = _create_optuna_storage(url, options, skip_table_creation=False)
    try:
        with transaction(engine) as connection:
            migrations.complete(connection)
    except BaseException:
        storage.engine.dispose()
        raise
    return storage


def _migrate(engine: sa.Engine, version: int, safe_url: str) -> None:
    with transaction(engine) as connection:
        # An older version of hpo may hold another lock, and have migrated the tables while this one waited.
        version = connection.scalar(sa.select(schema.c.version)) or version
        if version >= migrations.VERSION:
            return
        try:
            copy = migrations.back_up(connection, version)
        except OSError as error:
            raise StorageError(
                f"{safe_url} has tables of version {version}, which this version of hpo replaces, but the file cannot be "
                f"backed up first: {error.strerror}. Make its folder writable"
            ) from None
        migrations.migrate(connection, version)
    kept = "" if copy is None else f"; the old file is kept as {copy}"
    logger.warning("%s: tables migrated from version %d to %d%s", safe_url, version, migrations.VERSION, kept)


def _create_optuna_storage(
    url: sa.URL, options: dict[str, Any], *, skip_table_creation: bool, is_written: bool = True
) -> RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # no "A new study created" in the log
    storage = RDBStorage(
        url.render_as_string(hide_password=False),
        engine_kwargs=options,
        skip_compatibility_check=True,  # where it fails, it leaks its connections; read_versions checks instead
        skip_table_creation=skip_table_creation,
    )
    configure(storage.engine, is_written=is_written)
    storage.engine.dispose()  # connections opened so far were not configured
    return storage


def _refuse_network(path: Path, safe_url: str) -> None:
    """Raise StorageError for a file on a network file system: machines would not see each other's locks and WAL."""
    if kind := network_file_system(path):
        raise StorageError(
            f"{safe_url} is on a network file system ({kind}), on which SQLite may lose or damage results. Name a file on a "
            "local disk with --storage or HPO_STORAGE, or a PostgreSQL database for several machines"
        )


def _create_folder(url: sa.URL, safe_url: str) -> None:
    folder = Path(str(url.database)).parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # private, unless it exists
    except OSError as error:
        raise StorageError(
            f"cannot create the folder {folder} for {safe_url}: {error.strerror}. "
            "Make it writable, or name another database with --storage or HPO_STORAGE"
        ) from None


def _check_file(path: Path, safe_url: str, *, may_be_missing: bool, is_written: bool) -> None:
    """Refuse a SQLite file that hpo cannot use before anything is written: the lock next to it, and WAL in its header.

    Args:
        path: the file.
        safe_url: for messages.
        may_be_missing: whether the caller creates a missing file.
        is_written: whether the caller must be able to write.

    Raises:
        StorageError: see `read_versions`; the file is missing or read-only, or the WAL next to it is of another file.
        sqlite3.Error: the file is not a database, or cannot be read.
    """
    if not path.exists():
        if may_be_missing:
            return
        raise MissingDatabaseError(safe_url)
    if path.is_dir():
        raise StorageError(f"{safe_url} is a folder: name a file in it")
    if is_written and not os.access(path, os.W_OK):
        raise StorageError(f"{safe_url}: {READ_ONLY}")
    _check_wal(path, safe_url)  # before the tables are read, which fails where the WAL is of another file

    def read(*, immutable: bool = False) -> None:
        with sqlite_file.engine(path, sqlite_file.BUSY_SECONDS, immutable=immutable) as engine:
            read_versions(engine, safe_url)

    try:
        _read_again(read)
    except DBAPIError as error:
        if "readonly" not in str(driver_error(error)):
            raise
        # Opening the file would undo the transaction of a program that was killed: only if the file is ours.
        _read_again(lambda: read(immutable=True))


def _check_wal(path: Path, safe_url: str) -> None:
    """Refuse a SQLite file next to the WAL of another one.

    Raises:
        StorageError: the WAL is of another file, or cannot be read.
    """
    try:
        fits = not sqlite_file.has_wal_of_another_file(path)
    except OSError as error:
        raise StorageError(f"{safe_url}: cannot read {error.filename}: {error.strerror}") from None
    if not fits:
        wal, shm = f"{path.resolve().name}-wal", f"{path.resolve().name}-shm"
        raise StorageError(
            f"{safe_url} and the file {wal} next to it do not fit together. If you restored a copy: stop all programs that "
            f"use it, then delete {wal} and {shm}, which are of the file before. If {wal} is of this file (you copied both, "
            f"or changed the rights of the file): run `touch {wal}`"
        )


def _read_again(operation: Callable[[], T]) -> T:
    """Run an operation that reads. Run it again if another program changed a SQLite file meanwhile; return its result."""
    deadline = time.monotonic() + sqlite_file.BUSY_SECONDS
    while True:
        try:
            return operation()
        except DBAPIError as error:
            if not sqlite_file.is_change(driver_error(error)) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
