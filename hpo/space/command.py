"""The `command:` of a search space: a script's command line with a placeholder for each value.

`command: python train.py --lr {lr}` is split into arguments once, as a shell would. Values then replace placeholders inside
an argument, so no value is ever interpreted by a shell. `hpo.search.script` runs the result.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from hpo.errors import nearest

CHECKPOINT_DIR = "checkpoint_dir"
# Allowed in addition to parameters and derived values.
PLACEHOLDERS = ("seed", "max_epochs", "device", "data_dir", CHECKPOINT_DIR)

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)([^{}]*)\}")


def find_command_mistakes(command: str, known: Iterable[str]) -> list[str]:
    """Return the mistakes in a command, one text each.

    Args:
        command: the value of `command:`.
        known: the names of parameters and derived values.
    """
    try:
        arguments = shlex.split(command)
    except ValueError as error:
        return [f"cannot be split into arguments: {error}"]
    if not arguments:
        return ["names no program"]
    if _PLACEHOLDER.search(arguments[0]):
        return ["the program cannot be a placeholder"]
    names = [*known, *PLACEHOLDERS]
    found = []
    for name, format_spec in _PLACEHOLDER.findall(command):
        if format_spec:
            found.append(f"write {{{name}}} without {format_spec!r}")
        elif name not in names:
            found.append(f"there is no value {{{name}}}, {nearest(name, names)}")
    return found


def uses_checkpoint_dir(command: str) -> bool:
    """Return whether the script keeps checkpoints, and so resumes from them when it is restarted."""
    return any(name == CHECKPOINT_DIR for name, _ in _PLACEHOLDER.findall(command))


def build_arguments(command: str, values: Mapping[str, Any]) -> list[str]:
    """Return the program and its arguments.

    Args:
        command: a command without mistakes.
        values: the values of the placeholders. A placeholder without a value is an inactive parameter: its argument is
            left out, together with the flag before it.
    """
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
    """Return a value in YAML's notation: true and null, not True and None."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
