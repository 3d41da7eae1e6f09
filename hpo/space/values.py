"""The values of a parameter: their own form, those that are implied, and what to say of those that it does not have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from hpo.errors import list_names, nearest
from hpo.space.messages import Problem
from hpo.space.parameters import (
    Choices,
    Fixed,
    IntRange,
    Parameter,
    Scalar,
    as_list,
    describe_range,
    is_same,
    nearest_step,
)

MAX_SHOWN = 80  # characters of a value in a message


def own_value(parameter: Parameter, value: Scalar) -> Scalar:
    """Return a value that a parameter contains with its own type and digits, which the key of a configuration has."""
    if isinstance(parameter, Fixed | Choices):
        return next(known for known in parameter.grid_values() if is_same(known, value))
    assert isinstance(value, int | float)
    if isinstance(parameter, IntRange):
        return int(value)
    if parameter.step is not None:
        return nearest_step(value, parameter.low, parameter.high, parameter.step)
    return float(value) + 0.0  # not -0.0


def has_implied_value(parameter: Parameter) -> bool:
    """Return whether a configuration that does not name a parameter has a value of it."""
    return has_default(parameter) or parameter.count == 1


def implied_value(parameter: Parameter) -> Scalar:
    """Return the value of a parameter that is not named: its default, or its only value."""
    return parameter.default if has_default(parameter) else next(iter(parameter.grid_values()))  # type: ignore[union-attr]


def has_default(parameter: Parameter) -> bool:
    """Return whether the file gives a parameter a default."""
    if isinstance(parameter, Choices):
        return "default" in parameter.model_fields_set  # null may be a choice
    return not isinstance(parameter, Fixed) and parameter.default is not None


def describe_misfit(parameter: Parameter, value: Scalar) -> str:
    """Return a value that a parameter does not contain, and those that it does or the nearest one, for a message."""
    shown = _spell(value)
    shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
    if isinstance(parameter, Fixed | Choices):
        return f"{shown}, {nearest(shown, map(_spell, parameter.grid_values()))}"
    return f"{shown}, allowed: {describe_range(parameter)}"


def describe_values(parameter: Parameter) -> str:
    """Return which values a parameter may have, for messages."""
    if isinstance(parameter, Fixed | Choices):
        return list_names([_spell(value) for value in parameter.grid_values()])
    return describe_range(parameter)


def _spell(value: Scalar) -> str:
    """Return a value as it is written in a file: a text in quotes where it would be read as something else."""
    if isinstance(value, str):
        is_plain = re.fullmatch(r"[A-Za-z_][\w.-]*", value) and value not in {"null", "true", "false"}
        return value if is_plain else json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def find_when_problems(parameters: Mapping[str, Parameter], names: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for each `when` that names an unknown parameter, or a value that the parameter never has.

    Args:
        parameters: the valid parameters. The key paths of the problems start at their names.
        names: the names of all parameters in the file, valid or not.
    """
    for name, parameter in parameters.items():
        for other, expected in (parameter.when or {}).items():
            path = (name, "when", other)
            if other not in names:
                yield path, f"there is no parameter {other!r}, {nearest(other, [n for n in names if n != name])}"
            elif other in parameters:
                for value in as_list(expected):
                    if not parameters[other].contains(value):
                        yield path, f"{other} is never {describe_misfit(parameters[other], value)}"
