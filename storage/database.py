"""URL -> engine and Optuna's RDBStorage, tuned per dialect; waiting out an outage; locks between processes.

Two databases are supported: SQLite for one machine, PostgreSQL for several. Both are opened by any number of
processes at once: whoever comes first creates the tables, under a lock, and the others find them.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy as sa
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError

BUSY_SECONDS = 60.0  # how long a SQLite writer waits for another one
RETRY_SECONDS = 600.0  # how long a run waits for a database that went away
SCHEMA_VERSION = 1  # of our own tables

T = TypeVar("T")
logger = logging.getLogger("hpo.storage")


class StorageError(Exception):
    """The database cannot be used; the text says why and what to do. Never holds a password."""


@dataclass(frozen=True)
class Database:
    """An open database.

    Attributes:
        url: without the password, for people to read.
        engine: SQLAlchemy's, for our own tables.
        optuna_storage: Optuna's storage over the same engine settings.
    """

    url: str
    engine: sa.Engine
    optuna_storage: RDBStorage

    def seconds(self) -> sa.ColumnElement[float]:
        """The database's own clock in SQL, in seconds since 1970: several machines need not agree on the time."""
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

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold a lock that at most one process holds at a time; it goes with the process that dies."""
        with _lock(self.engine, name):
            yield


def open_database(url: str, password: str | None = None, *, create: bool = True) -> Database:
    """Open a database and create what tables it lacks. Safe for many processes at once.

    Args:
        url: an SQLAlchemy URL: `sqlite:///path/to/file.db` or `postgresql://user:password@host/name`.
        password: for a URL without one.
        create: False for those who only read: a SQLite file that is not there is not made.

    Raises:
        StorageError: the URL is wrong, or the database is away, forbidden, not ours or of another version.
    """
    parsed = _parse_url(url)
    if parsed.get_backend_name() == "postgresql" and parsed.password is None:
        parsed = parsed.set(password=password)
    shown = parsed.render_as_string(hide_password=True)
    with translate_errors(shown):
        if parsed.get_backend_name() == "sqlite":
            if not create and not Path(str(parsed.database)).exists():
                raise StorageError(
                    f"there is no database {shown} yet: `hpo run SPACE` makes it; or name another one by --storage or "
                    "HPO_STORAGE"
                )
            _make_folder(parsed, shown)
        options = _engine_options(parsed)
        engine = sa.create_engine(parsed, **options)
        if engine.dialect.name == "sqlite":
            sa.event.listen(engine, "connect", _tune_sqlite)
        try:
            # The first look is under the lock too: it turns WAL on, for which SQLite waits for nobody.
            with _lock(engine, "schema"):
                if not _is_ready(engine, shown):
                    return Database(shown, engine, _create_tables(parsed, engine, options))
            return Database(shown, engine, _open_optuna(parsed, options, shown))
        except BaseException:
            engine.dispose()
            raise


def _create_tables(url: sa.URL, engine: sa.Engine, options: dict[str, Any]) -> RDBStorage:
    metadata.create_all(engine)  # first: where it may not, Optuna's storage would leave its connections open
    storage = _rdb_storage(url, options, skip_table_creation=False)
    with engine.begin() as connection:
        connection.execute(schema.insert().values(version=SCHEMA_VERSION))  # last: with it, the tables are complete
    return storage


def _open_optuna(url: sa.URL, options: dict[str, Any], shown: str) -> RDBStorage:
    storage = _rdb_storage(url, options, skip_table_creation=True)
    found, wanted = storage.get_current_version(), storage.get_head_version()
    if found != wanted:
        storage.engine.dispose()
        raise StorageError(
            f"{shown} was written by another version of Optuna (tables {found}, this one reads {wanted}); back it up and "
            "run `optuna storage upgrade --storage URL`, or name another database"
        )
    return storage


def _rdb_storage(url: sa.URL, options: dict[str, Any], *, skip_table_creation: bool) -> RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # "A new study created" is not news to anyone
    storage = RDBStorage(
        url.render_as_string(hide_password=False),
        engine_kwargs=options,
        skip_compatibility_check=True,  # it would leave its connections open where it fails
        skip_table_creation=skip_table_creation,
    )
    if storage.engine.dialect.name == "sqlite":
        sa.event.listen(storage.engine, "connect", _tune_sqlite)
        storage.engine.dispose()  # the connections that it has opened were not tuned
    return storage


metadata = sa.MetaData()
schema = sa.Table("hpo_schema", metadata, sa.Column("version", sa.Integer, primary_key=True))


def _parse_url(url: str) -> sa.URL:
    examples = "for example sqlite:///runs/hpo.db or postgresql://user:password@host:5432/hpo"
    try:
        parsed = sa.make_url(url)
        parsed.get_dialect()
    except (NoSuchModuleError, ImportError):
        raise StorageError(f"no driver for {parsed.drivername}:// databases; {examples}") from None
    except ArgumentError:
        # The text may hold a password that a typing mistake made unrecognisable: it is not repeated.
        raise StorageError(f"the storage is not a database URL; write one, {examples}") from None
    if parsed.get_backend_name() not in {"sqlite", "postgresql"}:
        raise StorageError(f"{parsed.get_backend_name()} is not supported; {examples}")
    if parsed.get_backend_name() == "sqlite" and parsed.database in {None, "", ":memory:"}:
        raise StorageError(f"a SQLite database in memory would not outlive the run; name a file, {examples}")
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed


def _make_folder(url: sa.URL, shown: str) -> None:
    folder = Path(str(url.database)).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot create the folder {folder} for {shown}: {error.strerror}. "
            "Make it writable, or name another database by --storage or HPO_STORAGE"
        ) from None


def _engine_options(url: sa.URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_SECONDS}}
    # pre_ping: a restarted server is noticed when a connection is taken, not by the write that then fails.
    connect_args = {"connect_timeout": 10, "application_name": "hpo"}
    return {"pool_pre_ping": True, "connect_args": connect_args}


def _tune_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # WAL: readers and the one writer do not wait for each other. NORMAL: a power cut may undo the last commits but
    # never harms the file; a killed process loses nothing.
    if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _is_ready(engine: sa.Engine, shown: str) -> bool:
    """Tell whether the tables are there; False for an empty database, or one of Optuna's.

    Raises:
        StorageError: the database is another program's, or of another version.
    """
    tables = set(sa.inspect(engine).get_table_names())
    if tables and not tables & {"studies", "hpo_schema"}:
        raise StorageError(
            f"{shown} belongs to another program (it has the tables {', '.join(sorted(tables)[:3])}, ...); "
            "name an empty database or one of Optuna's"
        )
    if "hpo_schema" not in tables:
        return False
    with engine.connect() as connection:
        version = connection.scalar(sa.select(schema.c.version))
    if version not in {None, SCHEMA_VERSION}:
        raise StorageError(
            f"{shown} was written by another version of hpo (tables of version {version}, this one reads "
            f"{SCHEMA_VERSION}); use that version, or name another database"
        )
    return version is not None


@contextlib.contextmanager
def _lock(engine: sa.Engine, name: str) -> Iterator[None]:
    if engine.dialect.name == "sqlite":
        lock = FileLock(f"{engine.url.database}.{zlib.crc32(name.encode()):08x}.lock")
        try:
            lock.acquire()
        except OSError as error:
            raise StorageError(f"cannot write {lock.lock_file}: {error.strerror}") from None
        try:
            yield
        finally:
            lock.release()
        return
    number = zlib.crc32(f"hpo/{name}".encode())
    # A connection of its own, without a transaction: the lock lives as long as the connection, or until released.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.select(sa.func.pg_advisory_lock(number)))
        try:
            yield
        finally:
            try:
                connection.execute(sa.select(sa.func.pg_advisory_unlock(number)))
            except DBAPIError:  # the server went away, and the lock with it
                connection.invalidate()


# --- what a database error means ----------------------------------------------------------------------------------


@contextlib.contextmanager
def translate_errors(shown: str) -> Iterator[None]:
    """Turn the errors of database drivers into a StorageError that names the remedy."""
    try:
        yield
    except (DBAPIError, StorageInternalError, sqlite3.Error) as error:
        raise StorageError(f"{shown}: {_remedy(_driver_error(error))}") from None


def retry_while_down(database: Database, operation: Callable[[], T], patience: float = RETRY_SECONDS) -> T:
    """Run an operation, again and again while the database is away.

    The operation must be repeatable: it may have been carried out though its answer was lost.

    Raises:
        StorageError: the database stayed away for longer than `patience` seconds, or fails in a way that waiting does
            not mend (disk full, no rights, a damaged file).
    """
    deadline = time.monotonic() + patience
    pause = 0.1
    while True:
        try:
            return operation()
        except (DBAPIError, StorageInternalError) as error:
            cause = _driver_error(error)
            if not _is_transient(cause):
                raise StorageError(f"{database.url}: {_remedy(cause)}") from None
            if time.monotonic() + pause > deadline:
                raise StorageError(f"{database.url}: still away after {patience:.0f} s. {_remedy(cause)}") from None
            if pause == 0.1:
                logger.warning("the database is away (%s): waiting for it", _first_line(cause))
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def _driver_error(error: BaseException) -> BaseException:
    """Unwrap Optuna's and SQLAlchemy's envelopes."""
    if isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    return error


def _is_transient(error: BaseException) -> bool:
    """Tell an outage, which ends by itself, from an error that stays."""
    if isinstance(error, sqlite3.Error):
        return "locked" in str(error)
    state = getattr(error, "sqlstate", None)
    if state is not None:
        # 08: connection; 57P: shut down or starting up; 40: serialization and deadlock; 53300: too many connections.
        return state[:2] in {"08", "40"} or state[:3] == "57P" or state == "53300"
    import psycopg

    return isinstance(error, psycopg.OperationalError | OperationalError | InterfaceError)


def _remedy(error: BaseException) -> str:
    text = _first_line(error)
    known = {
        "disk is full": "the disk is full: free some space, then run the same command again",
        "unable to open": "the file cannot be opened: check that its folder exists and is writable",
        "readonly": "the file is read-only: make it and its folder writable",
        "not a database": "the file is not a SQLite database: name another one by --storage",
        "malformed": "the file is damaged: restore a copy, or recover it by `sqlite3 FILE .recover`",
        "password authentication": "wrong user or password in the storage URL",
        "no password supplied": "the storage URL has no password",
        "permission denied": f"the database user has not the rights ({text}): grant them CREATE on the schema",
        "does not exist": f"{text}: create it, or correct the storage URL",
        "locked": f"another program held the database for over {BUSY_SECONDS:.0f} s",
        "name or service not known": "no such host in the storage URL",
        "connection refused": "no server answers there: start it, or correct host and port in the storage URL",
    }
    whole = str(error).lower()
    return next((remedy for sign, remedy in known.items() if sign in whole), text)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
