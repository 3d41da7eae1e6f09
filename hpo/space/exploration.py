"""Hyperparameters that change while a member of a population trains: explore, as in population-based training.

Source: Jaderberg et al., Population Based Training of Neural Networks, 2017. A number is multiplied or divided by a factor,
or drawn again; a choice is kept, or drawn again.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping

from hpo.space.parameters import FloatRange, IntRange, Parameter, Params, Scalar, is_active


def explore(
    parameters: Mapping[str, Parameter],
    params: Mapping[str, Scalar],
    names: Collection[str],
    *,
    resample: float,
    factor: float,
    rng: random.Random,
) -> Params:
    """Return a configuration near another one. The same `rng` returns the same configuration.

    Args:
        parameters: in `sampling_order`.
        params: the other one.
        names: the parameters that may change. Another one stays as it is, unless it becomes active or inactive, because a
            parameter on which it depends has changed: then it is drawn, or left out.
        resample: the probability that a parameter is drawn again.
        factor: by what numbers are multiplied or divided, above 1.
        rng: the source of randomness.
    """
    explored: Params = {}
    for name, parameter in parameters.items():
        if not is_active(parameter, explored):
            continue
        if name not in params:
            explored[name] = parameter.sample(rng)
        elif name not in names:
            explored[name] = params[name]
        elif rng.random() < resample:
            explored[name] = parameter.sample(rng)
        elif isinstance(parameter, IntRange | FloatRange):
            explored[name] = _perturb(parameter, params[name], factor, rng)
        else:
            explored[name] = params[name]
    return explored


def _perturb(parameter: IntRange | FloatRange, value: Scalar, factor: float, rng: random.Random) -> float:
    """Return a number that is multiplied or divided by a factor, within the range.

    With steps, it moves by at least one, if the range has one on that side. On a continuous range, 0 stays 0.
    """
    assert isinstance(value, int | float)
    grows = rng.random() < 0.5
    target = value * factor if grows else value / factor
    if parameter.step is None or parameter.count is None:
        return min(parameter.high, max(parameter.low, target))
    before, after = (round((each - parameter.low) / parameter.step) for each in (value, target))
    if after == before:
        after += 1 if target > value or (target == value and grows) else -1
    index = min(parameter.count - 1, max(0, after))
    return min(parameter.high, parameter.low + index * parameter.step)
