"""The placeholders of `command: python train.py --lr {lr}`.

The command is split into arguments once, and each value is put into its argument: no shell interprets the values.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from hpo.errors import nearest

CHECKPOINT_DIR = "checkpoint_dir"
# The placeholders that are allowed in addition to parameters and derived values.
PLACEHOLDERS = ("seed", "max_epochs", "device", "data_dir", CHECKPOINT_DIR)

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)([^{}]*)\}")


def find_command_mistakes(command: str, known_names: Iterable[str]) -> list[str]:
    """Return a message for each mistake in a command.

    Args:
        command: the command as written in the file.
        known_names: the names of parameters and derived values.
    """
    try:
        arguments = shlex.split(command)
    except ValueError as error:
        return [f"cannot be split into arguments: {error}"]
    if not arguments:
        return ["is empty"]
    if _PLACEHOLDER.search(arguments[0]):
        return ["the program cannot be a placeholder"]
    names = [*known_names, *PLACEHOLDERS]
    mistakes = []
    for name, rest in _PLACEHOLDER.findall(command):
        if rest:
            mistakes.append(f"write {{{name}}} without {rest!r}")
        elif name not in names:
            mistakes.append(f"there is no value {{{name}}}, {nearest(name, names)}")
    return mistakes


def uses_checkpoint_dir(command: str) -> bool:
    """Return whether the script saves its own checkpoints, and resumes from them when it is started again."""
    return uses_placeholder(command, CHECKPOINT_DIR)


def uses_placeholder(command: str, placeholder: str) -> bool:
    """Return whether a command has a placeholder."""
    return any(name == placeholder for name, _ in _PLACEHOLDER.findall(command))


def positional_placeholders(command: str) -> set[str]:
    """Return the names of placeholders that begin an argument and follow no flag, such as `{name}` in `train.py {name}`."""
    found, follows_flag = set(), False
    for argument in shlex.split(command):
        placeholder = _PLACEHOLDER.match(argument)
        if placeholder and not follows_flag:
            found.add(placeholder[1])
        follows_flag = argument.startswith("-") and "{" not in argument
    return found


def looks_like_option(value: Any) -> bool:
    """Return whether a program would take a positional argument with this value for an option. Numbers are none."""
    return isinstance(value, str) and value.startswith("-")


def describe_option(name: str) -> str:
    """Return what is wrong with such a value, and the remedy."""
    return f"the script would take it for an option: write --{name}={{{name}}} in the command, not {{{name}}} alone"


def build_arguments(command: str, values: Mapping[str, Any]) -> list[str]:
    """Return the program and its arguments.

    Args:
        command: a command without mistakes.
        values: the values of the placeholders. A placeholder without a value is an inactive parameter: the argument that
            contains it is left out, together with the flag before it.

    Raises:
        ValueError: a positional argument would be taken for an option.
    """
    for name in positional_placeholders(command):
        if looks_like_option(values.get(name)):
            raise ValueError(f"{name} {values[name]!r}: {describe_option(name)}")
    arguments: list[str] = []
    follows_flag = False
    for argument in shlex.split(command):
        names = [name for name, _ in _PLACEHOLDER.findall(argument)]
        if all(name in values for name in names):
            arguments.append(_PLACEHOLDER.sub(lambda match: _format_value(values[match[1]]), argument))
        elif follows_flag and argument.startswith("{"):
            arguments.pop()
        follows_flag = argument.startswith("-") and not names
    return arguments


def _format_value(value: Any) -> str:
    """Return a value as YAML writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
