"""The configurations that a search space names in `points_to_evaluate`: what they leave out, and mistakes in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hpo.errors import nearest
from hpo.space.parameters import (
    Fixed,
    Parameter,
    Params,
    Scalar,
    describe_values,
    is_active,
    own_value,
)


def complete_point(parameters: Mapping[str, Parameter], given: Mapping[str, Scalar]) -> Params:
    """Return the whole configuration: parameters that are left out have their only value, or their default.

    Args:
        parameters: in `sampling_order`.
        given: values without mistakes, see `find_point_mistakes`.
    """
    params: Params = {}
    for name, parameter in parameters.items():
        if is_active(parameter, params):
            params[name] = own_value(parameter, given[name] if name in given else _implied(parameter)[0])
    return params


def find_point_mistakes(
    parameters: Mapping[str, Parameter], given: Mapping[str, Scalar]
) -> Iterator[tuple[str | None, str]]:
    """Yield (name of the parameter, what is wrong); None for one that is missing.

    Args:
        parameters: in `sampling_order`.
        given: {name: value} as in the file.
    """
    for name in given:
        if name not in parameters:
            yield name, f"there is no parameter {name!r}, {nearest(name, parameters)}"
    params: Params = {}
    for name, parameter in parameters.items():
        if not is_active(parameter, params):
            if name in given:
                yield name, f"{name} is not active here, see its `when`: leave it out"
            continue
        if name in given and not parameter.contains(given[name]):
            yield name, f"{name} cannot be {given[name]!r}, allowed: {describe_values(parameter)}"
            return  # others may depend on it
        if name not in given and not _implied(parameter):
            yield None, f"{name} is missing, and has no default: give {describe_values(parameter)}"
            return
        params[name] = own_value(parameter, given[name] if name in given else _implied(parameter)[0])


def _implied(parameter: Parameter) -> list[Scalar]:
    """Return the value that a parameter has without being named, in a list; an empty list if there is none."""
    if not isinstance(parameter, Fixed) and "default" in parameter.model_fields_set:
        return [parameter.default]
    return list(parameter.grid_values()) if parameter.count == 1 else []
