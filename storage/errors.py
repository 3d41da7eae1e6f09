"""Errors of a database: which may disappear by waiting, and what the user can do about the others."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from threading import Event
from typing import Protocol, TypeVar

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from storage import sqlite_file
from storage.optuna_internals import says_missing

RETRY_SECONDS = 600.0  # how long an operation is retried while the database is down

_DAMAGED = (
    "the file is damaged: recover it with `sqlite3 FILE .recover`, or restore a copy. Before you restore one, stop all "
    "programs that use the file, and delete FILE-wal and FILE-shm: SQLite would mix them with the copy"
)

_TOO_MANY = (
    "the server has no connection left: raise its max_connections, or start fewer drivers. Each holds one or two, and up "
    "to three for a moment, such as when it starts"
)

READ_ONLY = "the file is read-only: make it and its folder writable"

# What libraries and hpo raise about a value that they cannot read.
_OF_CONTENT = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, RecursionError)

T = TypeVar("T")
logger = logging.getLogger("hpo.storage")


class StorageError(Exception):
    """The database cannot be used. The message says why and what to do, and never contains a password."""


class MissingDatabaseError(StorageError):
    """There is no such SQLite file.

    Attributes:
        url: of the database, without a password.
    """

    def __init__(self, url: str) -> None:
        super().__init__(
            f"there is no database {url} yet: `hpo run SPACE` creates it; or name another one with --storage or HPO_STORAGE"
        )
        self.url = url


class UnavailableError(StorageError):
    """The database was down for longer than an operation is retried."""


class Named(Protocol):
    """What messages name by its URL: a `Database`."""

    @property
    def url(self) -> str:
        """The URL without its password."""


@contextlib.contextmanager
def translate_errors(safe_url: str) -> Iterator[None]:
    """Turn the errors of database drivers into a StorageError that names the remedy."""
    try:
        yield
    except (DBAPIError, StorageInternalError, sqlite3.Error) as error:
        _raise_interrupt(error)
        raise StorageError(f"{safe_url}: {_remedy(driver_error(error))}") from None


@contextlib.contextmanager
def name_strange_content(safe_url: str) -> Iterator[None]:
    """Turn the error of a value that cannot be read, because hpo does not write such values, into a StorageError.

    Other code than what reads must not run in it: its errors would be taken for those of the database. That a study or trial
    is missing is no such error.
    """
    try:
        yield
    except _OF_CONTENT as error:
        if says_missing(error):
            raise
        raise StorageError(
            f"{safe_url}: the database holds what hpo does not write ({type(error).__name__}: {_first_line(error):.200}); "
            "restore a copy, or delete the study"
        ) from error


def retry_while_down(
    database: Named,
    operation: Callable[[], T],
    timeout_seconds: float = RETRY_SECONDS,
    *,
    stopped: Event | None = None,
    runs_other_code: bool = False,
) -> T:
    """Run an operation and return its result. Retry it while the database is down.

    The operation must be idempotent: its transaction may have been committed although the answer was lost.

    Args:
        database: the database.
        operation: what to run.
        timeout_seconds: how long to retry. A single attempt may take longer.
        stopped: once it is set, the operation is not retried any more.
        runs_other_code: whether it does more than read and write rows, so that not every error is of what they hold, see
            `name_strange_content`.

    Raises:
        UnavailableError: the database was down for longer than the timeout, or until `stopped` was set.
        StorageError: the error is not transient (disk full, missing rights, damaged file), or rows hold what hpo does not
            write.
    """
    naming = contextlib.nullcontext if runs_other_code else name_strange_content
    deadline = time.monotonic() + timeout_seconds
    pause_seconds = 0.1
    while True:
        try:
            with naming(database.url):
                return operation()
        except (DBAPIError, StorageInternalError) as error:
            _raise_interrupt(error)
            cause = driver_error(error)
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


def driver_error(error: BaseException) -> BaseException:
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

    if "number of parameters" in str(error):  # psycopg's own: no server has seen the statement
        return False
    return isinstance(error, psycopg.OperationalError | OperationalError | InterfaceError)


def _remedy(error: BaseException) -> str:
    text = _first_line(error)
    known = {
        "disk is full": "the disk is full: free some space, then run the same command again",
        "unable to open": "the file cannot be opened: check that its folder exists and is writable",
        "readonly": READ_ONLY,
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
        "too many clients": _TOO_MANY,
        "connection slots are reserved": _TOO_MANY,
        "too many connections": f"{text}: raise this limit of the role or database, or start fewer drivers",
        "encoding": f"{text}: create the database with ENCODING 'UTF8'",
        "does not exist": f"{text}: create it, or correct the storage URL",
        "locked": f"another program locked the database for over {sqlite_file.BUSY_SECONDS:.0f} s",
        "name or service not known": "the host in the storage URL does not exist",
        "connection refused": "no server answers there: start it, or correct host and port in the storage URL",
    }
    whole = str(error).lower()
    return next((remedy for sign, remedy in known.items() if sign in whole), text)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
