"""Opening a database by its URL, retrying while it is down, and locks between processes.

Two databases are supported: SQLite for one machine, PostgreSQL for several. Any number of processes may open either at the
same time: the first one creates the tables while it holds a lock.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import optuna
import sqlalchemy as sa
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import NullPool

from storage import migrations
from storage.optuna_tables import SCHEMA
from storage.tables import metadata, schema

BUSY_SECONDS = 60.0  # how long a SQLite writer waits for another writer
OPENING_SECONDS = 60.0  # how long a process waits for another one that creates or migrates the tables
RETRY_SECONDS = 600.0  # how long an operation is retried while the database is down

# A connection whose packets are dropped ends after about a minute instead of hours. PostgreSQL's names and units, for the
# client and, with the prefix `tcp_`, for the server.
_TCP_OPTIONS = {
    "keepalives_idle": 30,  # seconds
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # milliseconds
}

_DRIVERS = ("sqlite", "sqlite+pysqlite", "postgresql", "postgresql+psycopg")

# Columns that Optuna's tables have in all versions. Other programs may have tables with these names, too.
_OPTUNA_COLUMNS = {"studies": {"study_id", "study_name"}, "trials": {"trial_id", "study_id"}}

# A transaction of ours never waits between two statements, unless its process is suspended. The server then ends it, and
# releases the rows that it locked: without this, all other runs on the study would wait until the process continues.
_IDLE_TRANSACTION_SECONDS = 60

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
    """

    url: str
    engine: sa.Engine
    optuna_storage: RDBStorage

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
        create: whether to create a missing SQLite file. Readers pass False.

    Raises:
        StorageError: the URL is wrong; the database is down or forbids access; another program, a newer version
            of hpo or another version of Optuna created its tables.
    """
    parsed = _parse_url(url)
    if parsed.get_backend_name() == "postgresql" and parsed.password is None:
        parsed = parsed.set(password=password)
    safe_url = parsed.render_as_string(hide_password=True)
    with translate_errors(safe_url):
        if parsed.get_backend_name() == "sqlite":
            if not create and not Path(str(parsed.database)).exists():
                raise StorageError(
                    f"there is no database {safe_url} yet: `hpo run SPACE` creates it; or name another one with --storage "
                    "or HPO_STORAGE"
                )
            _create_folder(parsed, safe_url)
            _check_file(Path(str(parsed.database)), safe_url)
        options = _engine_options(parsed)
        engine = sa.create_engine(parsed, **options)
        _configure(engine)
        if engine.dialect.name == "postgresql":
            # Not on Optuna's engine: it builds objects while it reads, and locks nothing.
            sa.event.listen(engine, "connect", _limit_idle_transactions)
        try:
            # The first connection needs the lock, too: it turns on WAL, for which SQLite does not wait for other writers.
            with _schema_lock(engine, safe_url):
                version = _read_version(engine, safe_url)
                if version is None:
                    return Database(safe_url, engine, _create_tables(parsed, engine, options))
                if version < migrations.VERSION:
                    _migrate(engine, version, safe_url)
            return Database(safe_url, engine, _create_optuna_storage(parsed, options, skip_table_creation=True))
        except BaseException:
            engine.dispose()
            raise


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
    with engine.connect() as connection:
        try:
            copy = migrations.back_up(connection, version)
        except OSError as error:
            raise StorageError(
                f"{safe_url} has tables of version {version}, which this version of hpo replaces, but the file cannot be "
                f"backed up first: {error.strerror}. Make its folder writable"
            ) from None
    with _transaction(engine) as connection:
        migrations.migrate(connection, version)
    kept = "" if copy is None else f"; the old file is kept as {copy}"
    logger.warning("%s: tables migrated from version %d to %d%s", safe_url, version, migrations.VERSION, kept)


@contextlib.contextmanager
def _transaction(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Begin a transaction, see `Database.transaction`. It may contain DDL."""
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection


def _create_optuna_storage(url: sa.URL, options: dict[str, Any], *, skip_table_creation: bool) -> RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # no "A new study created" in the log
    storage = RDBStorage(
        url.render_as_string(hide_password=False),
        engine_kwargs=options,
        skip_compatibility_check=True,  # where it fails, it leaks its connections; _read_version checks instead
        skip_table_creation=skip_table_creation,
    )
    _configure(storage.engine)
    storage.engine.dispose()  # connections opened so far were not configured
    return storage


def _parse_url(url: str) -> sa.URL:
    examples = "for example sqlite:///runs/hpo.db or postgresql://user:password@host:5432/hpo"
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
    if parsed.get_backend_name() == "sqlite" and parsed.database in {None, "", ":memory:"}:
        raise StorageError(f"a SQLite database in memory ends with the process; name a file, {examples}")
    if "password" in parsed.query:  # messages hide the password in its usual place only
        found = parsed.query["password"]
        password = parsed.password or (found if isinstance(found, str) else found[0])
        parsed = parsed.set(password=password).difference_update_query(["password"])
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed


def _create_folder(url: sa.URL, safe_url: str) -> None:
    folder = Path(str(url.database)).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot create the folder {folder} for {safe_url}: {error.strerror}. "
            "Make it writable, or name another database with --storage or HPO_STORAGE"
        ) from None


def _engine_options(url: sa.URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_SECONDS}}
    # pre_ping: after a restart of the server, stale connections are replaced before a statement fails on one.
    connect_args = {"connect_timeout": 10, "application_name": "hpo", "keepalives": 1} | _TCP_OPTIONS
    given = {name: value for name, value in connect_args.items() if name not in url.query}
    return {"pool_pre_ping": True, "connect_args": given}


def _configure_postgresql(connection: Any, _record: object) -> None:
    # The server must notice, too: otherwise, a driver that a network lost would hold its locks for hours.
    settings = ", ".join(
        f"set_config('tcp_{name.removeprefix('tcp_')}', '{value}', false)" for name, value in _TCP_OPTIONS.items()
    )
    connection.execute(f"SELECT {settings}")
    connection.commit()


def _limit_idle_transactions(connection: Any, _record: object) -> None:
    connection.execute(f"SET idle_in_transaction_session_timeout = '{_IDLE_TRANSACTION_SECONDS}s'")
    connection.commit()


def _configure(engine: sa.Engine) -> None:
    """Configure the connections that an engine opens from now on."""
    is_sqlite = engine.dialect.name == "sqlite"
    sa.event.listen(engine, "connect", _configure_sqlite if is_sqlite else _configure_postgresql)


def _configure_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # WAL: readers and the one writer do not wait for each other. NORMAL: a power cut may undo the last commits but does
    # not damage the file; a killed process loses nothing.
    if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _check_file(path: Path, safe_url: str) -> None:
    """Refuse a SQLite file that hpo cannot use before anything is written: the lock next to it, and WAL in its header.

    Raises:
        StorageError: see `_read_version`.
        sqlite3.Error: the file is not a database, or cannot be opened.
    """
    # Immutable: SQLite locks and writes nothing, and does not read the WAL. What is in use has been opened before.
    if not path.exists() or any(Path(f"{path}-{suffix}").exists() for suffix in ("wal", "journal")):
        return
    uri = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
    engine = sa.create_engine("sqlite://", creator=lambda: sqlite3.connect(uri, uri=True), poolclass=NullPool)
    try:
        _read_version(engine, safe_url)
    except DBAPIError as error:
        cause = _driver_error(error)
        if "not a database" in str(cause) or "unable to open" in str(cause):
            raise
    finally:
        engine.dispose()


def _read_version(engine: sa.Engine, safe_url: str) -> int | None:
    """Return the version of our tables; None for an empty database, or one whose tables are incomplete or Optuna's only.

    Raises:
        StorageError: another program, a newer version of hpo or another version of Optuna created the tables.
    """
    inspector = sa.inspect(engine)
    tables = set(inspector.get_table_names())
    is_known = bool(tables & {"studies", "hpo_schema"}) and all(
        columns <= {column["name"] for column in inspector.get_columns(table)}
        for table, columns in _OPTUNA_COLUMNS.items()
        if table in tables
    )
    if tables and not is_known:
        raise StorageError(
            f"{safe_url} belongs to another program (it has the tables {', '.join(sorted(tables)[:3])}, ...); "
            "name an empty database or one of Optuna's"
        )
    with engine.connect() as connection:
        version = connection.scalar(sa.select(schema.c.version)) if "hpo_schema" in tables else None
        if version is not None and version > migrations.VERSION:
            raise StorageError(
                f"{safe_url} was written by a newer version of hpo (its tables have version {version}, this one knows up to "
                f"{migrations.VERSION}); update hpo, or name another database"
            )
        found = None
        if "alembic_version" in tables:
            found = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
        # Ours are completed after Optuna's. Without a version of either, Optuna's are not completed yet.
        if found != SCHEMA and (found is not None or version is not None):
            raise StorageError(
                f"{safe_url} was written by another version of Optuna (its tables: {found}, expected: {SCHEMA}); back it up "
                "and run `optuna storage upgrade --storage URL`, or name another database"
            )
    return version


@contextlib.contextmanager
def _schema_lock(engine: sa.Engine, safe_url: str) -> Iterator[None]:
    """Hold the lock under which tables are created. The lock of a process that dies is released.

    Raises:
        StorageError: another process has held it for `OPENING_SECONDS`.
    """
    if engine.dialect.name == "sqlite":
        # Whoever may write to the folder may use the lock: the umask decides, as for the database.
        lock = FileLock(f"{engine.url.database}.{zlib.crc32(b'schema'):08x}.lock", mode=0o666)
        try:
            lock.acquire(timeout=OPENING_SECONDS)
        except Timeout:
            raise _opened_elsewhere(safe_url, f"`fuser {lock.lock_file}` shows its PID") from None
        except OSError as error:
            raise StorageError(f"cannot write {lock.lock_file}: {error.strerror}") from None
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
        finally:
            connection.exec_driver_sql("RESET lock_timeout")
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
        # 25P03: this process was suspended in a transaction.
        return state[:2] in {"08", "40"} or state[:3] == "57P" or state in {"53300", "25P03"}
    import psycopg

    return isinstance(error, psycopg.OperationalError | OperationalError | InterfaceError)


def _remedy(error: BaseException) -> str:
    text = _first_line(error)
    known = {
        "disk is full": "the disk is full: free some space, then run the same command again",
        "unable to open": "the file cannot be opened: check that its folder exists and is writable",
        "readonly": "the file is read-only: make it and its folder writable",
        "not a database": "the file is not a SQLite database: name another one with --storage",
        "malformed": "the file is damaged: restore a copy, or recover it with `sqlite3 FILE .recover`",
        "password authentication": "wrong user or password in the storage URL",
        "no password supplied": "the storage URL has no password",
        "permission denied": f"the database user lacks rights ({text}): grant it CREATE on the schema",
        "does not exist": f"{text}: create it, or correct the storage URL",
        "locked": f"another program locked the database for over {BUSY_SECONDS:.0f} s",
        "name or service not known": "the host in the storage URL does not exist",
        "connection refused": "no server answers there: start it, or correct host and port in the storage URL",
    }
    whole = str(error).lower()
    return next((remedy for sign, remedy in known.items() if sign in whole), text)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
