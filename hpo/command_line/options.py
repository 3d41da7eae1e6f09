"""Options that several verbs of the command line share, and the passwords that come with them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from hpo.credentials import take_secrets
from hpo.errors import SettingError
from hpo.paths import DEFAULT_STORAGE

_ON_FINISH = "on_finish="  # how --set begins that overrides it
_WARM_START = "warm_start"  # how --set begins that may name databases
_URL = re.compile(r"[\w+.-]+://[^\s'\",\]}]*")
_REVISION = re.compile(r"[\w.-]+@[0-9]+\b(?![.:/@])")  # the name of a study: its @ is not one of a URL
# In `click.Context.meta`:
_SECRETS = "hpo.command_line.options.secrets"  # {variable: value}
# Whether the command needs --storage to find the same storage again.
_STORAGE_OPTION = "hpo.command_line.options.storage"


def _complete_space(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    names = [path.stem for path in sorted(Path("search_spaces").glob(f"{incomplete}*.yaml"))]
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


def storage_option(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Add --storage."""
    return click.option(
        "--storage",
        metavar="URL",
        default=DEFAULT_STORAGE,
        envvar="HPO_STORAGE",
        show_default=True,
        show_envvar=True,
        callback=_read_storage,
        help="An SQLAlchemy URL: sqlite:///FILE or postgresql://USER@HOST:PORT/NAME, without a password.",
    )(verb)


def data_option(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Add --data-dir."""
    return click.option(
        "--data-dir",
        metavar="DIR",
        type=click.Path(path_type=Path),
        default="data",
        envvar="HPO_DATA_DIR",
        show_default=True,
        show_envvar=True,
        help="Folder of the data sets. Missing ones are downloaded to it.",
    )(verb)


def checkpoints_option(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Add --checkpoints."""
    return click.option(
        "--checkpoints",
        metavar="URL",
        envvar="HPO_CHECKPOINTS",
        show_envvar=True,
        help="Where checkpoints are: a folder, or s3://BUCKET/FOLDER or gs://BUCKET/FOLDER, to which they are "
        "uploaded.  [default: runs/checkpoints]",
    )(verb)


def given_option(name: str) -> list[str]:
    """Return an option as it was given on the command line: what a command that the user can copy needs."""
    context = click.get_current_context()
    parameter = name.removeprefix("--").replace("-", "_")
    is_given = context.get_parameter_source(parameter) is ParameterSource.COMMANDLINE
    return [name, str(context.params[parameter])] if is_given else []


def exit_option(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Add --exit-after, in seconds; None without it."""
    return click.option(
        "--exit-after",
        metavar="DURATION",
        callback=_read_duration,
        help="Stop after this time, such as 3h30m, as Ctrl-C does: for queues that limit it.",
    )(verb)


def _read_duration(_context: click.Context, _parameter: click.Parameter, text: str | None) -> float | None:
    from hpo.space.sections import parse_duration

    if text is None:
        return None
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if not isinstance(seconds, float) or seconds <= 0:
        raise click.BadParameter(f"{text} is no time at all")
    return seconds


def space_arguments(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Add SPACE and --set."""
    verb = click.option(
        "--set",
        "overrides",
        metavar="KEY=VALUE",
        multiple=True,
        callback=_check_overrides,
        help="Override a key of the file, such as max_epochs=1 or parameters.lr=0.02. Repeatable.",
    )(verb)
    return click.argument("space", metavar="SPACE", shell_complete=_complete_space)(verb)


def _check_overrides(_context: click.Context, _parameter: click.Parameter, overrides: Sequence[str]) -> Sequence[str]:
    """Return what --set overrides.

    Raises:
        SettingError: the command line contains a URL of on_finish. The command line is recorded, too.
    """
    if any(each.startswith(_ON_FINISH) and "://" in each for each in overrides):
        raise SettingError(
            "every user of this machine can read the URL of on_finish on the command line, and it may contain a secret: put "
            "it in the file of the search space, in HPO_ON_FINISH, or in a file that HPO_ON_FINISH_FILE names"
        )
    return overrides


def read_recipient(overrides: Sequence[str]) -> str | None:
    """Return HPO_ON_FINISH, which replaces on_finish of the file; None if it is not set, or --set is to override it.

    Raises:
        SettingError: it is not a command or a URL.
    """
    from hpo.space.recipient import require_recipient

    recipient = None if any(each.startswith(_ON_FINISH) for each in overrides) else secret("HPO_ON_FINISH")
    require_recipient(recipient, "HPO_ON_FINISH")
    return recipient


def _read_storage(context: click.Context, parameter: click.Parameter, url: str) -> str:
    """Return the storage URL.

    Raises:
        SettingError: the command line contains a password, or see `take_secrets`.
    """
    secrets = context.meta[_SECRETS] = take_secrets()
    default = secrets.get("HPO_STORAGE", DEFAULT_STORAGE)
    is_given = context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    # Every word: click takes the last --storage, and the whole command line is recorded.
    words = shlex.split(context.obj or "")
    typed = [word.partition("=")[2] if word.startswith("--") and "=" in word else word for word in words]
    if any(_has_password(word) for word in [*typed, *([url] if is_given else [])]):
        raise SettingError(
            "every user of this machine can read a password on the command line. Leave it out of the URL, and put "
            "it in PGPASSWORD or ~/.pgpass; or put the URL in HPO_STORAGE, or in a file that HPO_STORAGE_FILE names"
        )
    context.meta[_STORAGE_OPTION] = is_given and url != default
    return url if is_given else default


def _has_password(word: str) -> bool:
    if "://" not in word or not ("@" in word or "?" in word):
        return False
    if word.startswith(_WARM_START):  # YAML with URLs in it
        urls = _URL.findall(word)
        rest = _REVISION.sub("", _URL.sub("", word))
        return "@" in rest or "password=" in word or any(_has_password(url) for url in urls)
    from storage.errors import StorageError
    from storage.urls import contains_password

    try:
        return contains_password(word)
    except StorageError:  # even in text that is no URL, what stands before an @ may be a password
        return "@" in word


def secret(name: str) -> str | None:
    """Return the value that a variable of `SECRET_VARIABLES` had in the environment, or in its file."""
    secrets: dict[str, str] = click.get_current_context().meta[_SECRETS]
    return secrets.get(name)


def needs_storage_option() -> bool:
    """Return whether a command that the user can copy needs --storage to find the same database."""
    return bool(click.get_current_context().meta[_STORAGE_OPTION])
