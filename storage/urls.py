"""The URL that names a database: which ones hpo can use, and how messages show them, without a password."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from storage.errors import StorageError

_DRIVERS = ("sqlite", "sqlite+pysqlite", "postgresql", "postgresql+psycopg")

# After `?`, in URLs of PostgreSQL: secrets by their name. `password` is one, too, and has another place: see `parse_url`.
_SECRET_OPTIONS = {"oauth_client_secret", "scram_client_key", "scram_server_key", "sslpassword"}

# Messages show the values of these. Of all others, also of those that a new version of libpq brings, they show the names.
_SHOWN_OPTIONS = re.compile(
    "(fallback_)?application_name|channel_binding|client_encoding|connect_timeout|dbname|gssdelegation|gssencmode|gsslib|host|"
    "hostaddr|keepalives(_count|_idle|_interval)?|krbsrvname|load_balance_hosts|oauth_(client_id|issuer|scope)|passfile|port|"
    "replication|require_auth|requirepeer|service|ssl(cert|certmode|compression|crl|crldir|key|mode|negotiation|rootcert|sni)|"
    "(ssl_)?(max|min)_protocol_version|target_session_attrs|tcp_user_timeout"
)

# What `options` may set without being hidden. It may set anything, such as a key.
_SEARCH_PATH = re.compile(r"\s*(-c\s*|--)search_path=(\\.|[^\s\\])+\s*")

# What a SQLite URL may say after `?`. Others change what a transaction is, or name something that is no file.
_SQLITE_OPTIONS = {"check_same_thread", "timeout"}


def parse_url(url: str, password: str | None) -> tuple[sa.URL, str]:
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
    return parsed, _show(parsed)


def _show(url: sa.URL) -> str:
    if url.get_backend_name() == "sqlite":
        return url.render_as_string()
    hidden = {
        name: "***"
        for name, value in url.query.items()
        if _SHOWN_OPTIONS.fullmatch(name) is None
        and not (name == "options" and isinstance(value, str) and _SEARCH_PATH.fullmatch(value))
    }
    return url.update_query_dict(hidden).render_as_string().replace("=%2A%2A%2A", "=***")


def without_password(url: str) -> str:
    """Return a storage URL as messages show it.

    Raises:
        StorageError: it is not a URL that hpo can use.
    """
    return parse_url(url, None)[1]


def contains_password(url: str) -> bool:
    """Return whether a storage URL contains a password or another secret, in any of the places where a driver reads one.

    Raises:
        StorageError: it is not a URL that hpo can use.
    """
    parsed, _ = parse_url(url, None)
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
