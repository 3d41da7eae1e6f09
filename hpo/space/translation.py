"""A configuration of an earlier search, as a configuration of this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hpo.space.model import Space
from hpo.space.parameters import Choices, Fixed, Parameter, Params, Scalar, is_active, is_same, sampling_order
from hpo.space.values import describe_values, has_default, implied_value, own_value


class TranslationError(Exception):
    """The search has no such configuration. The message says why, in words that fit several trials."""


@dataclass(frozen=True)
class Translation:
    """A configuration of this search.

    Attributes:
        params: {name: value}.
        is_same: whether it is trained with the same values. If not, the earlier one had parameters that are not active here.
    """

    params: Params
    is_same: bool


def translate(space: Space, params: Mapping[str, Scalar], *, defaults: Mapping[str, Scalar]) -> Translation:
    """Return a configuration of an earlier search as one of this search.

    - Choices are matched by value, and values must be in the ranges of this search.
    - A parameter that the earlier search did not have gets the trainable's default, where that is known and a value of this
      search, else its own `default`.
    - A derived value must be the one that the trial was trained with.
    - A parameter that this search does not have must have had the trainable's default, so that it changes nothing.
    - A parameter that is not active here (`when`) is left out.

    Args:
        space: this search.
        params: {name: value} with which the earlier trial was trained, derived values included.
        defaults: {name: value} that the trainable uses for parameters that it does not get.

    Raises:
        TranslationError: there is no such configuration.
    """
    translated: Params = {}
    is_exact = True
    for name in sampling_order(space.parameters):
        parameter = space.parameters[name]
        if is_active(parameter, translated):
            translated[name], is_known = _value_of(name, parameter, params, defaults)
            is_exact = is_exact and is_known
        elif name in params and not _is_default(name, params[name], defaults):
            is_exact = False
    if broken := space.broken_constraint(translated):
        raise TranslationError(f"it breaks the constraint {broken}")
    derived = space.derive(translated)
    for name, value in derived.items():
        if name not in params and name not in defaults:
            raise TranslationError(f"{name} is derived here, and was not known there")
        if not is_same(params.get(name, defaults.get(name)), value):
            raise TranslationError(f"{name} was not the value that is derived here")
    for name, value in params.items():
        if name not in space.parameters and name not in derived and not _is_default(name, value, defaults):
            raise TranslationError(f"{name} is no parameter here")
    return Translation(translated, is_exact)


def _value_of(
    name: str, parameter: Parameter, params: Mapping[str, Scalar], defaults: Mapping[str, Scalar]
) -> tuple[Scalar, bool]:
    """Return the value of a parameter, and whether the earlier trial was trained with it."""
    is_declared = has_default(parameter)
    if name in params:
        value = params[name]
    elif name in defaults and (parameter.contains(defaults[name]) or not is_declared):
        value = defaults[name]
    elif is_declared:
        value = implied_value(parameter)
    else:
        raise TranslationError(f"{name} is new here, and has no default")
    is_known = name in params or name not in defaults or is_same(value, defaults[name])
    if parameter.contains(value):
        return own_value(parameter, value), is_known
    if isinstance(parameter, Fixed | Choices):
        raise TranslationError(f"{name} {value!r} is not in this search")
    raise TranslationError(f"{name} was not from {describe_values(parameter)}")


def _is_default(name: str, value: Scalar, defaults: Mapping[str, Scalar]) -> bool:
    return name in defaults and is_same(defaults[name], value)
