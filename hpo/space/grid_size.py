"""The size of a grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from hpo.space.expressions import Formulas
from hpo.space.messages import Problem
from hpo.space.parameters import Parameter, iterate_grid, sampling_order
from hpo.space.valid_sections import ValidSections

MAX_GRID_POINTS = 100_000
MAX_WORK = 2_000_000  # operations of constraints and derived values for all points of a grid: about 5 s


def grid_is_finite(sections: ValidSections) -> Iterator[Problem]:
    """A grid has finitely many points, and not too many."""
    if not sections["sampler"].is_grid:
        return
    counts = {name: parameter.count for name, parameter in sections["parameters"].items()}
    for name, count in counts.items():
        if count is None:
            yield (
                ("parameters", name),
                "sampler grid needs finitely many values, and this range is continuous: give a list or a step, or use "
                "sampler random or tpe",
            )
    points = math.prod(count or 1 for count in counts.values())
    if points > MAX_GRID_POINTS and max(count or 1 for count in counts.values()) <= MAX_GRID_POINTS:
        parameters = sections.all_parameters()
        if any(parameter.when for parameter in parameters.values()):  # the product of the counts is an upper bound
            points = sum(1 for _ in itertools.islice(iterate_grid(parameters), MAX_GRID_POINTS + 1))
    if points > MAX_GRID_POINTS:
        yield (
            ("parameters",),
            f"this grid has more than {MAX_GRID_POINTS} configurations: give fewer values, or use sampler random or tpe",
        )


def count_grid(
    parameters: Mapping[str, Parameter],
    constraints: Sequence[str],
    derived: Mapping[str, str],
    max_epochs: int,
    most: float,
) -> int | None:
    """Return how many configurations a grid has; None if it has more than `most`, or infinitely many.

    Points that break a constraint do not count. Where trying the points takes too long, so that `check_rules` refuses the
    grid, or where the file is not valid, all combinations of values count.
    """
    counts = [parameter.count for parameter in parameters.values()]
    if None in counts:
        return None
    combinations = math.prod(count or 1 for count in counts)
    upper_bound = combinations if combinations <= most else None
    try:
        ordered = {name: parameters[name] for name in sampling_order(parameters)}
        formulas = Formulas(constraints, derived, max_epochs)
    except ValueError:  # a cycle, or no expression: reported by the rules
        return upper_bound
    is_conditional = any(parameter.when for parameter in parameters.values())
    if formulas.size * combinations > MAX_WORK or (combinations > MAX_GRID_POINTS and not is_conditional):
        return upper_bound
    count = 0
    for tried, point in enumerate(iterate_grid(ordered)):
        if tried == MAX_GRID_POINTS:
            return upper_bound
        count += not formulas.violations(point)
        if count > most:
            return None
    return count
