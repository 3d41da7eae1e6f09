"""Opening a database by its URL, retrying while it is down, and locks between processes.

Two databases are supported: SQLite for one machine, PostgreSQL for several. Any number of processes may open either at the
same time: the first one creates the tables while it holds a lock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, TypeVar

import optuna
import sqlalchemy as sa
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    DisconnectionError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
)

from storage import migrations, optuna_tables, sqlite_file
from storage.optuna_tables import SCHEMA
from storage.tables import metadata, schema
from storage.wal import STAMPS

BUSY_SECONDS = 60.0  # how long a SQLite writer waits for another writer
OPENING_SECONDS = 60.0  # how long a process waits for another one that creates or migrates the tables
_LOOK_SECONDS = 5.0  # how long a look at another database waits for its writer
RETRY_SECONDS = 600.0  # how long an operation is retried while the database is down

# A connection whose packets are dropped ends after about a minute instead of hours. PostgreSQL's names and units, for the
# client and, with the prefix `tcp_`, for the server.
_TCP_OPTIONS = {
    "keepalives_idle": 30,  # seconds
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # milliseconds
}

_DAMAGED = (
    "the file is damaged: recover it with `sqlite3 FILE .recover`, or restore a copy. Before you restore one, stop all "
    "programs that use the file, and delete FILE-wal and FILE-shm: SQLite would mix them with the copy"
)
_READ_ONLY = "the file is read-only: make it and its folder writable"

_DRIVERS = ("sqlite", "sqlite+pysqlite", "postgresql", "postgresql+psycopg")

_SECRET_OPTIONS = ("sslpassword",)  # after `?`, in URLs of PostgreSQL; not `password`, see `_parse_url`

# What a SQLite URL may say after `?`. Others change what a transaction is, or name something that is no file.
_SQLITE_OPTIONS = {"check_same_thread", "timeout"}

# {table: columns} of Optuna's tables and of ours. Other programs may have tables with these names, too.
_COLUMNS = {
    table.name: {column.name for column in table.columns}
    for tables in (optuna_tables.metadata, metadata)
    for table in tables.sorted_tables
}
_OPTUNA_TABLES = set(optuna_tables.metadata.tables)

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

T = TypeVar("T")
logger = logging.getLogger("hpo.storage")


class StorageError(Exception):
    """The database cannot be used. The message says why and what to do, and never contains a password."""


class UnavailableError(StorageError):
    """The database was down for longer than an operation is retried."""


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

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()
        self.optuna_storage.engine.dispose()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def transaction(self) -> AbstractContextManager[sa.Connection]:
        """Begin a transaction that reads and writes.

        On SQLite, it is the only one that writes, from its first statement on. On PostgreSQL, it locks the rows that it
        asks for (`with_for_update`).
        """
        return _transaction(self.engine)


def open_database(url: str, password: str | None = None, *, create: bool = True) -> Database:
    """Open a database. Create its tables, or migrate those of an older version. Any number of processes may do so at once.

    Args:
        url: an SQLAlchemy URL: `sqlite:///path/to/file.db` or `postgresql://user:password@host/name`.
        password: the password for a PostgreSQL URL without one.
        create: whether to create a missing SQLite file.

    Raises:
        StorageError: the URL is wrong; the database is down or forbids access; another program, a newer version
            of hpo or another version of Optuna created its tables.
    """
    parsed, safe_url = _parse_url(url, password)
    with translate_errors(safe_url):
        if parsed.get_backend_name() == "sqlite":
            _check_file(Path(str(parsed.database)), safe_url, may_be_missing=create, is_written=True)
            _create_folder(parsed, safe_url)
        options = _engine_options(parsed)
        engine = sa.create_engine(parsed, **options)
        _configure(engine)
        if engine.dialect.name == "postgresql":
            # Not on Optuna's engine: it builds objects while it reads, and locks nothing.
            sa.event.listen(engine, "connect", _limit_idle_transactions)
        try:
            # The first connection needs the lock, too: it turns on WAL, for which SQLite does not wait for other writers.
            with _schema_lock(engine, safe_url):
                version = _read_versions(engine, safe_url).ours
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
    parsed, safe_url = _parse_url(url, password)
    options = _engine_options(parsed)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    if is_sqlite:
        path = Path(str(parsed.database))
        options["creator"] = lambda: sqlite_file.connect(path, BUSY_SECONDS)
    with translate_errors(safe_url):
        if is_sqlite:
            _check_file(path, safe_url, may_be_missing=False, is_written=False)
        engine = sa.create_engine(parsed, **options)
        _configure(engine, is_written=False)
        try:
            if _read_again(lambda: _read_versions(engine, safe_url)).optuna is None:
                engine.dispose()
                return None
            missing = set(metadata.tables) - set(_read_again(lambda: sa.inspect(engine).get_table_names()))
            storage = _create_optuna_storage(parsed, options, skip_table_creation=True, is_written=False)
            return Database(safe_url, engine, storage, frozenset(missing))
        except BaseException:
            engine.dispose()
            raise


def open_existing(url: str, password: str | None = None) -> Database:
    """Open a database to read all of a study. It is only read, like by `open_for_reading`, unless its tables are older.

    Args:
        url: see `open_database`.
        password: see `open_database`.

    Raises:
        StorageError: see `open_database`; or there is no such SQLite file.
    """
    database = open_for_reading(url, password)
    if database is not None:
        if _read_again(lambda: _read_versions(database.engine, database.url)).ours == migrations.VERSION:
            return database
        database.close()
    return open_database(url, password, create=False)


def identify(database: Database) -> str:
    """Return what tells a database from every other one, whatever its URL is.

    It is the path of a SQLite file. Of a PostgreSQL database, it is a URL: of the server's number, the database's, and the
    schema; or the database's own URL, without the password, if the role may not read these.

    Raises:
        StorageError: the database cannot be used.
    """

    def read() -> str:
        with database.engine.connect() as connection:
            if not connection.scalar(sa.text("SELECT has_function_privilege('pg_control_system()', 'EXECUTE')")):
                return database.url
            row = connection.execute(
                sa.text(
                    "SELECT system_identifier, oid, current_schema() FROM pg_control_system(), pg_database "
                    "WHERE datname = current_database()"
                )
            ).one()
            return "postgresql://server-{}/database-{}/{}".format(*row)

    return retry_while_down(database, read) if database.file is None else str(database.file)


def hpo_ids(path: Path) -> set[str]:
    """Return the `hpo:id` of each study in a SQLite file, which may be of any program. The file is only read.

    Raises:
        StorageError: the file cannot be read.
    """

    def read() -> set[str]:
        with sqlite_file.engine(path, _LOOK_SECONDS) as engine, engine.connect() as connection:
            if not sa.inspect(connection).has_table(optuna_tables.study_user_attributes.name):
                return set()
            return {
                value for value in optuna_tables.read_study_attr(connection, "hpo:id").values() if value is not None
            }

    with translate_errors(str(path)):
        _check_wal(path, str(path))
        return _read_again(read)


def _create_tables(url: sa.URL, engine: sa.Engine, options: dict[str, Any]) -> RDBStorage:
    metadata.create_all(engine)  # first: without the right to create tables, RDBStorage would leak its connections
    storage = _create_optuna_storage(url, options, skip_table_creation=False)
    try:
        with _transaction(engine) as connection:
            migrations.complete(connection)
    except BaseException:
        storage.engine.dispose()
        raise
    return storage


def _migrate(engine: sa.Engine, version: int, safe_url: str) -> None:
    with _transaction(engine) as connection:
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


@contextlib.contextmanager
def _transaction(engine: sa.Engine) -> Iterator[sa.Connection]:
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


def _create_optuna_storage(
    url: sa.URL, options: dict[str, Any], *, skip_table_creation: bool, is_written: bool = True
) -> RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # no "A new study created" in the log
    storage = RDBStorage(
        url.render_as_string(hide_password=False),
        engine_kwargs=options,
        skip_compatibility_check=True,  # where it fails, it leaks its connections; _read_versions checks instead
        skip_table_creation=skip_table_creation,
    )
    _configure(storage.engine, is_written=is_written)
    storage.engine.dispose()  # connections opened so far were not configured
    return storage


def _parse_url(url: str, password: str | None) -> tuple[sa.URL, str]:
    """Return a URL, with the password if it has none, and without any password for messages."""
    examples = "for example sqlite:///runs/hpo.db or postgresql://user@host:5432/hpo"
    try:
        parsed = sa.make_url(url)
        parsed.get_dialect()
    except (NoSuchModuleError, ImportError):
        raise StorageError(f"no driver for {parsed.drivername}:// databases; {examples}") from None
    except (ArgumentError, ValueError):  # ValueError: the port is no number
        # The text is not repeated: it may contain a password that a typing mistake made unrecognizable.
        raise StorageError(f"the storage is not a database URL; write one, {examples}") from None
    if parsed.get_backend_name() not in {"sqlite", "postgresql"}:
        raise StorageError(f"{parsed.get_backend_name()} is not supported; {examples}")
    if parsed.drivername not in _DRIVERS:
        raise StorageError(f"hpo does not use the driver {parsed.drivername}; {examples}")
    if parsed.get_backend_name() == "sqlite":
        _check_sqlite_url(parsed, examples)
    if "@" in (parsed.host or ""):  # a password with an @ would end there, and messages would show the rest of it
        raise StorageError("the storage URL has more than one @: write an @ in a user name or password as %40")
    # SQLAlchemy would show a password in the query, and drop one without a user: both get their usual place.
    query = {name: found if isinstance(found, str) else found[0] for name, found in parsed.query.items()}
    user, password_in_url = parsed.username or query.get("user"), parsed.password or query.get("password")
    parsed = parsed.set(username=user, password=password_in_url).difference_update_query(["user", "password"])
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "postgresql" and parsed.password is None:
        parsed = parsed.set(password=password)
    return parsed, parsed.difference_update_query(_SECRET_OPTIONS).render_as_string(hide_password=True)


def without_password(url: str) -> str:
    """Return a storage URL as messages show it.

    Raises:
        StorageError: it is not a URL that hpo can use.
    """
    return _parse_url(url, None)[1]


def contains_password(url: str) -> bool:
    """Return whether a storage URL contains a password, in any of the places where a driver reads one.

    Raises:
        StorageError: it is not a URL that hpo can use.
    """
    parsed, _ = _parse_url(url, None)
    return parsed.password is not None or not parsed.query.keys().isdisjoint(_SECRET_OPTIONS)


def _check_sqlite_url(url: sa.URL, examples: str) -> None:
    """Refuse what names no file. SQLite takes a name that starts with `file:` for a URI, which may name memory."""
    name = url.database or ""
    if name in {"", ":memory:"} or url.query.get("mode") == "memory" or "vfs" in url.query:
        raise StorageError(f"a SQLite database in memory ends with the process; name a file, {examples}")
    if name.startswith("file:"):
        raise StorageError(f"hpo opens SQLite files by their path, not by a file: URI; {examples}")
    unknown = sorted(set(url.query) - _SQLITE_OPTIONS)
    if unknown:
        allowed = " and ".join(sorted(_SQLITE_OPTIONS))
        raise StorageError(
            f"hpo does not use the option {unknown[0]!r} of a SQLite URL (allowed: {allowed}); {examples}"
        )
    checks: tuple[tuple[str, str, Callable[[Any], object]], ...] = (
        ("timeout", "a number of seconds", float),
        ("check_same_thread", "true or false", sa.util.asbool),
    )
    for option, allowed, check in checks:
        try:
            check(url.query.get(option, "1"))
        except (TypeError, ValueError):  # TypeError: it is there twice
            raise StorageError(f"the option {option} of a SQLite URL must be {allowed}; {examples}") from None
    try:
        name.encode()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # see `_check_file`
            os.stat(name)  # noqa: PTH116 - Path.exists would hide a null character
    except UnicodeEncodeError:
        raise StorageError(
            "the name of the database is no Unicode: start in its folder, and name it from there"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise StorageError(f"the path of the database cannot be used: {reason}; {examples}") from None


def _create_folder(url: sa.URL, safe_url: str) -> None:
    folder = Path(str(url.database)).parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # private, unless it exists
    except OSError as error:
        raise StorageError(
            f"cannot create the folder {folder} for {safe_url}: {error.strerror}. "
            "Make it writable, or name another database with --storage or HPO_STORAGE"
        ) from None


def _engine_options(url: sa.URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_SECONDS}}
    # pre_ping: after a restart of the server, stale connections are replaced before a statement fails on one.
    # UTF-8, whatever the database's encoding: psycopg gives texts of SQL_ASCII as bytes, and some encodings lack letters.
    connect_args: dict[str, Any] = {"connect_timeout": 10, "application_name": "hpo", "keepalives": 1} | _TCP_OPTIONS
    given = {name: value for name, value in connect_args.items() if name not in url.query}
    return {
        "pool_pre_ping": True,
        # Whatever the database's default is: a transaction that waited for a lock must see what the one before it committed.
        "isolation_level": "READ COMMITTED",
        "connect_args": given | {"client_encoding": "utf8"},
    }


def _configure_postgresql(connection: Any, _record: object) -> None:
    # The server must notice, too: otherwise, a driver that a network lost would hold its locks for hours.
    settings = _SESSION | {f"tcp_{name.removeprefix('tcp_')}": str(value) for name, value in _TCP_OPTIONS.items()}
    listed = ", ".join(f"('{name}', '{value}')" for name, value in settings.items())
    connection.execute(
        f"SELECT set_config(wanted.name, value, false) FROM (VALUES {listed}) AS wanted (name, value) "
        "JOIN pg_settings ON pg_settings.name = wanted.name"  # an older server lacks some
    )
    connection.commit()


def _limit_idle_transactions(connection: Any, _record: object) -> None:
    connection.execute(f"SET idle_in_transaction_session_timeout = '{_IDLE_TRANSACTION_SECONDS}s'")
    connection.commit()


def _forbid_writing(connection: Any, _record: object) -> None:
    connection.execute("SET default_transaction_read_only = on")
    connection.commit()


def _configure(engine: sa.Engine, *, is_written: bool = True) -> None:
    """Configure the connections that an engine opens from now on.

    Args:
        engine: the engine.
        is_written: whether they may write. A SQLite file that is only read is opened so, see `sqlite_file.connect`.
    """
    if engine.dialect.name == "postgresql":
        sa.event.listen(engine, "connect", _configure_postgresql)
        if not is_written:
            sa.event.listen(engine, "connect", _forbid_writing)
    elif is_written:
        sa.event.listen(engine, "connect", _configure_sqlite)
    else:
        sa.event.listen(engine, "checkout", _replace_if_outdated)


def _configure_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # WAL: readers and the one writer do not wait for each other. NORMAL: a power cut may undo the last commits but does
    # not damage the file; a killed process loses nothing.
    if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _replace_if_outdated(connection: sqlite3.Connection, _record: object, _proxy: object) -> None:
    if not sqlite_file.can_go_on(connection):
        raise DisconnectionError  # SQLAlchemy opens another one


def _check_file(path: Path, safe_url: str, *, may_be_missing: bool, is_written: bool) -> None:
    """Refuse a SQLite file that hpo cannot use before anything is written: the lock next to it, and WAL in its header.

    Args:
        path: the file.
        safe_url: for messages.
        may_be_missing: whether the caller creates a missing file.
        is_written: whether the caller must be able to write.

    Raises:
        StorageError: see `_read_versions`; the file is missing or read-only, or the WAL next to it is of another file.
        sqlite3.Error: the file is not a database, or cannot be read.
    """
    if not path.exists():
        if may_be_missing:
            return
        raise StorageError(
            f"there is no database {safe_url} yet: `hpo run SPACE` creates it; or name another one with --storage "
            "or HPO_STORAGE"
        )
    if path.is_dir():
        raise StorageError(f"{safe_url} is a folder: name a file in it")
    if is_written and not os.access(path, os.W_OK):
        raise StorageError(f"{safe_url}: {_READ_ONLY}")
    _check_wal(path, safe_url)  # before the tables are read, which fails where the WAL is of another file

    def read(*, immutable: bool = False) -> None:
        with sqlite_file.engine(path, BUSY_SECONDS, immutable=immutable) as engine:
            _read_versions(engine, safe_url)

    try:
        _read_again(read)
    except DBAPIError as error:
        if "readonly" not in str(_driver_error(error)):
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
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return operation()
        except DBAPIError as error:
            if not sqlite_file.is_change(_driver_error(error)) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


class _Versions(NamedTuple):
    """The versions of our tables and of Optuna's; None where there are none, or they are not complete."""

    ours: int | None
    optuna: str | None


def _read_versions(engine: sa.Engine, safe_url: str) -> _Versions:
    """Return the versions of the tables of a database.

    Optuna's tables may be next to others: on PostgreSQL, programs share a database. Nothing of theirs is changed, unless
    their tables have names of ours.

    Raises:
        StorageError: another program, a newer version of hpo or another version of Optuna created the tables.
    """
    inspector = sa.inspect(engine)
    names = {*inspector.get_table_names(), *inspector.get_view_names()}
    if not names:
        return _Versions(None, None)

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
        return _Versions(version, optuna_version)
    if optuna_version == SCHEMA:
        strange = {name for name in known if not columns(name) >= _COLUMNS[name]}
        if not strange and known >= _OPTUNA_TABLES:
            return _Versions(None, optuna_version)
    elif optuna_version is None and version is None and schema.name in names:
        # hpo was killed while it created tables: ours come first, and the versions last.
        strange = {name for name in names - {"alembic_version"} if columns(name) != _COLUMNS.get(name)}
        if not strange:
            return _Versions(None, None)
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


@contextlib.contextmanager
def _schema_lock(engine: sa.Engine, safe_url: str) -> Iterator[None]:
    """Hold the lock under which tables are created. The lock of a process that dies is released.

    Raises:
        StorageError: another process has held it for `OPENING_SECONDS`.
    """
    if engine.dialect.name == "sqlite":
        # Whoever may write to the folder may use the lock: the umask decides, as for the database.
        file = Path(str(engine.url.database)).resolve()  # one lock, even if links lead to the file
        lock = FileLock(f"{file}.{zlib.crc32(b'schema'):08x}.lock", mode=0o666)
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


def _opened_elsewhere(safe_url: str, remedy: str) -> StorageError:
    return StorageError(
        f"{safe_url}: another process has been opening it for over {OPENING_SECONDS:.0f} s. If it migrates a large "
        f"database, wait until it is done. If it is suspended, continue or end it: {remedy}"
    )


# --- errors -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def translate_errors(safe_url: str) -> Iterator[None]:
    """Turn the errors of database drivers into a StorageError that names the remedy."""
    try:
        yield
    except (DBAPIError, StorageInternalError, sqlite3.Error) as error:
        _raise_interrupt(error)
        raise StorageError(f"{safe_url}: {_remedy(_driver_error(error))}") from None


def retry_while_down(
    database: Database,
    operation: Callable[[], T],
    timeout_seconds: float = RETRY_SECONDS,
    *,
    stopped: Event | None = None,
) -> T:
    """Run an operation and return its result. Retry it while the database is down.

    The operation must be idempotent: its transaction may have been committed although the answer was lost.

    Args:
        database: the database.
        operation: what to run.
        timeout_seconds: how long to retry. A single attempt may take longer.
        stopped: once it is set, the operation is not retried any more.

    Raises:
        UnavailableError: the database was down for longer than the timeout, or until `stopped` was set.
        StorageError: the error is not transient (disk full, missing rights, damaged file).
    """
    deadline = time.monotonic() + timeout_seconds
    pause_seconds = 0.1
    while True:
        try:
            return operation()
        except (DBAPIError, StorageInternalError) as error:
            _raise_interrupt(error)
            cause = _driver_error(error)
            if not _is_transient(cause):
                raise StorageError(f"{database.url}: {_remedy(cause)}") from None
            if time.monotonic() + pause_seconds > deadline:
                raise UnavailableError(
                    f"{database.url}: still unavailable after {timeout_seconds:.0f} s. {_remedy(cause)}"
                ) from None
            if pause_seconds == 0.1:
                logger.warning("the database is unavailable (%s): retrying", _first_line(cause))
        if stopped is None:
            time.sleep(pause_seconds)
        elif stopped.wait(pause_seconds):
            raise UnavailableError(f"{database.url}: still unavailable. {_remedy(cause)}")
        pause_seconds = min(2 * pause_seconds, 5.0)


def _raise_interrupt(error: BaseException) -> None:
    """Raise KeyboardInterrupt if it led to an error: Ctrl-C in a statement, whose connection then cannot be put back."""
    context = error.__context__
    while context is not None:
        if isinstance(context, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        context = context.__context__


def _driver_error(error: BaseException) -> BaseException:
    """Return the driver's error that Optuna and SQLAlchemy have wrapped."""
    if isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    return error


def _is_transient(error: BaseException) -> bool:
    """Return whether an error may disappear by waiting."""
    if isinstance(error, sqlite3.Error):
        return "locked" in str(error)
    state = getattr(error, "sqlstate", None)
    if state is not None:
        # 08: connection; 57P: shutdown or startup; 40: serialization failure and deadlock; 53300: too many connections;
        # 25P03, 25P04: this process was suspended in a transaction; 57014: somebody canceled the statement; 55P03: a lock.
        return state[:2] in {"08", "40"} or state[:3] == "57P" or state in {"53300", "25P03", "25P04", "57014", "55P03"}
    import psycopg

    return isinstance(error, psycopg.OperationalError | OperationalError | InterfaceError)


def _remedy(error: BaseException) -> str:
    text = _first_line(error)
    known = {
        "disk is full": "the disk is full: free some space, then run the same command again",
        "unable to open": "the file cannot be opened: check that its folder exists and is writable",
        "readonly": _READ_ONLY,
        "not a database": "the file is not a SQLite database: name another one with --storage",
        "malformed": _DAMAGED,
        "password authentication": "wrong user or password in the storage URL",
        "no password supplied": "the storage URL has no password",
        "permission denied for schema": f"the database user lacks rights ({text}): grant it USAGE and CREATE on the schema",
        "permission denied": (
            f"the database user lacks rights ({text}): grant it SELECT, INSERT, UPDATE and DELETE on all tables of the "
            "schema, and USAGE on its sequences"
        ),
        "must be owner": f"the database user lacks rights ({text}): let the owner of the tables open the database once",
        "read-only transaction": (
            f"the server only reads ({text}): name the primary server, or unset default_transaction_read_only"
        ),
        "no space left": f"the disk of the server is full ({text}): free some space, then run the same command again",
        "encoding": f"{text}: create the database with ENCODING 'UTF8'",
        "does not exist": f"{text}: create it, or correct the storage URL",
        "locked": f"another program locked the database for over {BUSY_SECONDS:.0f} s",
        "name or service not known": "the host in the storage URL does not exist",
        "connection refused": "no server answers there: start it, or correct host and port in the storage URL",
    }
    whole = str(error).lower()
    return next((remedy for sign, remedy in known.items() if sign in whole), text)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
