"""The recipient of `on_finish`: a command, or a URL, which may contain a secret. Messages show its server only."""

from __future__ import annotations

import re
import shlex
from typing import Any
from urllib.parse import SplitResult, urlsplit

from hpo.errors import SettingError

Recipient = str | list[str]  # a command or a URL; a command as its arguments

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ALLOWED = "write a command, a list of its arguments, or a URL that begins with https:// or http://"


def is_url(recipient: Recipient) -> bool:
    """Return whether a recipient is a URL, not a command."""
    return isinstance(recipient, str) and _SCHEME.match(recipient) is not None


def check_recipient(value: Any) -> Any:
    """Return a recipient as it is, or None. Pydantic checks a file's value with it.

    Raises:
        ValueError: it is not a command or a URL. The message does not repeat it.
    """
    if isinstance(value, str):
        if is_url(value):
            _split(value)
        elif not _split_command(value):
            raise ValueError(f"is empty: {_ALLOWED}, or leave it out")
    elif isinstance(value, list):
        if not value or not all(isinstance(each, str) for each in value) or not value[0]:
            raise ValueError("the arguments of a command are a list of texts, the program first")
        if is_url(value[0]):
            raise ValueError("a URL is written without brackets")
    elif value is not None:
        raise ValueError(_ALLOWED)
    return value


def require_recipient(value: Any, name: str) -> None:
    """Raise SettingError if a value that is not from a file is no recipient.

    Args:
        value: the value; None is allowed.
        name: of what has it, for the message.
    """
    try:
        check_recipient(value)
    except ValueError as error:
        raise SettingError(f"{name}: {error}") from None


def arguments_of(recipient: Recipient) -> list[str]:
    """Return the program and the arguments of a command. No shell interprets them."""
    return _split_command(recipient) if isinstance(recipient, str) else recipient


def show_recipient(recipient: Recipient) -> str:
    """Return what messages call a recipient: the program of a command, the server of a URL."""
    if isinstance(recipient, str) and is_url(recipient):
        parts = _split(recipient)
        server = parts.netloc.rpartition("@")[2]
        return f"{parts.scheme}://{server}{'/...' if parts.path.strip('/') or parts.query else ''}"
    return arguments_of(recipient)[0]


def _split_command(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ValueError(f"the command cannot be split into arguments: {error}") from None


def _split(url: str) -> SplitResult:
    if re.search(r"[^!-~]", url):
        raise ValueError("a URL has no spaces, and other characters than those of ASCII are escaped, such as %20")
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError, too, whose text may repeat a part of the URL
    except ValueError:
        raise ValueError("this is no URL: write one, such as https://hooks.example/abc") from None
    if parts.scheme not in {"http", "https"}:
        raise ValueError(f"a URL of {parts.scheme}:// gets no POST: {_ALLOWED}")
    if not parts.hostname:
        raise ValueError("the URL has no server: write one, such as https://hooks.example/abc")
    return parts
