"""The configurations that a search space names in `points_to_evaluate`: what they leave out, and mistakes in them."""

from __future__ import annotations

from collections.abc import Mapping

from hpo.errors import nearest
from hpo.space.parameters import Parameter, Params, Scalar, is_active
from hpo.space.values import describe_misfit, describe_values, has_implied_value, implied_value, own_value

Mistakes = dict[str, str]  # {name of a parameter: what is wrong}


def complete_point(parameters: Mapping[str, Parameter], given: Mapping[str, Scalar]) -> tuple[Params, Mistakes]:
    """Return the whole configuration, with the default or the only value of parameters that are left out, and mistakes.

    Args:
        parameters: in `sampling_order`.
        given: {name: value} as in the file.
    """
    params: Params = {}
    mistakes = {
        name: f"there is no parameter {name!r}, {nearest(name, parameters)}" for name in given if name not in parameters
    }
    for name, parameter in parameters.items():
        if mistakes.keys() & (parameter.when or {}):
            mistakes.setdefault(name, "")  # whether it is active is unknown
        elif not is_active(parameter, params):
            if name in given:
                mistakes[name] = f"{name} is not active here, see its `when`: leave it out"
        elif name in given and not parameter.contains(given[name]):
            mistakes[name] = f"{name} cannot be {describe_misfit(parameter, given[name])}"
        elif name not in given and not has_implied_value(parameter):
            mistakes[name] = f"{name} is missing, and has no default: give {describe_values(parameter)}"
        else:
            params[name] = own_value(parameter, given[name] if name in given else implied_value(parameter))
    return params, {name: text for name, text in mistakes.items() if text}
