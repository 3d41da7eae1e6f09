"""Passwords from the environment: they are read once, and other processes can no longer see them there."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

from hpo.errors import SettingError

SECRET_VARIABLES = (
    "PGPASSWORD",
    "HPO_STORAGE",
    "HPO_DASHBOARD_PASSWORD",
    "HPO_DASHBOARD_READER_PASSWORD",
    "HPO_ON_FINISH",
)

# Of libraries: they name a file with a password, a token or a key.
_FILE_VARIABLES = (
    "PGPASSFILE",
    "PGSSLKEY",
    "RAY_AUTH_TOKEN_PATH",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "GOOGLE_APPLICATION_CREDENTIALS",
)


def take_secrets() -> dict[str, str]:
    """Return {variable: value} of passwords. Ray's processes and scripts do not inherit them.

    Each may be in the first line of a file, such as a secret of Docker Compose. `NAME_FILE` names it.

    Raises:
        SettingError: a file cannot be read, or both variables are set.
    """
    secrets = take_from_environment(SECRET_VARIABLES)
    for name in SECRET_VARIABLES:
        variable = f"{name}_FILE"
        file = os.environ.get(variable)
        if file and name in secrets:
            raise SettingError(f"{name} and {variable} are both set: unset one of them")
        if file:
            secrets[name] = read_secret_file(file, variable)
    return secrets


def secret_files() -> list[Path]:
    """Return the files with passwords, tokens and keys that environment variables name."""
    names = (*(f"{name}_FILE" for name in SECRET_VARIABLES), *_FILE_VARIABLES)
    return [Path(path) for name in names if (path := os.environ.get(name))]


def take_from_environment(names: Iterable[str]) -> dict[str, str]:
    """Return the values of environment variables, and remove them.

    A program that is started later does not inherit them. Linux shows the environment that a process was started with in
    /proc/PID/environ, even after the process has deleted the variable, so the values are overwritten in memory, too.

    Args:
        names: of the variables. Those that are not set, or empty, are left out.
    """
    taken = {name: value for name in names if (value := os.environ.get(name))}
    for name, value in taken.items():
        _overwrite(name, len(os.fsencode(value)))
        del os.environ[name]
    return taken


def _overwrite(name: str, size: int) -> None:
    """Fill the value of an environment variable with zeros, where the C library finds it."""
    getenv = ctypes.CDLL(None).getenv
    getenv.argtypes, getenv.restype = [ctypes.c_char_p], ctypes.c_void_p
    address = getenv(os.fsencode(name))
    if address:
        ctypes.memset(address, 0, size)


def read_secret_file(path: str, variable: str) -> str:
    """Return the first line of a file, such as a secret of Docker Compose.

    Args:
        path: the file.
        variable: the environment variable that names it, for the message.

    Raises:
        SettingError: the file cannot be read, or its first line is empty.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingError(f"{variable} names {path}, which cannot be read: {reason}") from None
    if not lines or not lines[0].strip():
        raise SettingError(f"{variable} names {path}, whose first line is empty")
    return lines[0].strip()
