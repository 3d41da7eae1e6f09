"""Rules for the configurations of a search: parameters, constraints, derived values, points, and earlier studies."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator

from hpo.errors import nearest
from hpo.space.expressions import FUNCTIONS, Expression, ExpressionError, Formulas, find_cycle
from hpo.space.grid_size import MAX_WORK, count_grid, grid_is_finite
from hpo.space.messages import KeyPath, Problem
from hpo.space.parameters import Scalar, iterate_grid, sample_params
from hpo.space.points import complete_point
from hpo.space.valid_sections import Rule, ValidSections, conditions_are_consistent

RANDOM_POINTS = 1000  # tried against constraints and derived values


def _names_are_identifiers(sections: ValidSections) -> Iterator[Problem]:
    for section in ("parameters", "derived"):
        for name in sections.names(section):
            if not name.isidentifier():
                yield (section, name), f"a name is a Python identifier, got {name!r}"
    for name in sections.names("derived"):
        if name in sections.names() or name == "max_epochs":
            yield ("derived", name), "another value has this name already"


def _expressions_are_valid(sections: ValidSections) -> Iterator[Problem]:
    texts = [(("constraints", i), text) for i, text in enumerate(sections["constraints"])]
    texts += [(("derived", name), text) for name, text in sections["derived"].items()]
    known = [*sections.names(), *sections["derived"], "max_epochs"]
    dependencies: dict[str, frozenset[str]] = {}
    for path, text in texts:
        try:
            expression = Expression(text)
        except ExpressionError as error:
            yield path, str(error)
            continue
        for name in sorted(expression.names - set(known)):
            hint = "it is a function" if name in FUNCTIONS else nearest(name, [n for n in known if n != path[1]])
            yield path, f"there is no parameter {name!r}, {hint}"
        if path[0] == "derived":
            dependencies[str(path[1])] = expression.names
        elif not expression.is_condition:
            yield path, f"a constraint is a comparison such as lr <= 0.1, got {text!r}"
    cycle = find_cycle(dependencies)
    if cycle:
        yield ("derived", cycle[0]), f"the derived values form a cycle: {' -> '.join(cycle)}"


def _some_configuration_is_valid(sections: ValidSections) -> Iterator[Problem]:
    """Try constraints and derived values on the points of a grid, or else on random configurations."""
    parameters = sections.all_parameters()
    if not sections["constraints"] and not sections["derived"]:
        return
    earlier_rules = (_expressions_are_valid, _names_are_identifiers, grid_is_finite)
    if any(any(rule(sections)) for rule in earlier_rules):
        return
    formulas = Formulas(sections["constraints"], sections["derived"], sections["max_epochs"])
    is_grid = sections["sampler"].is_grid
    count = math.prod(each.count or 1 for each in parameters.values()) if is_grid else RANDOM_POINTS
    if formulas.size * count > MAX_WORK:
        yield (
            ("constraints" if sections["constraints"] else "derived",),
            f"{formulas.size:,} operations for each of {count:,} configurations are more than {MAX_WORK:,}: simplify the "
            "expressions, or give fewer values",
        )
        return
    rng = random.Random(0)
    points = iterate_grid(parameters) if is_grid else (sample_params(parameters, rng) for _ in range(RANDOM_POINTS))
    tried = "no configuration of the grid" if is_grid else f"none of {RANDOM_POINTS} random configurations"
    times_violated: Counter[KeyPath] = Counter()
    texts: dict[KeyPath, str] = {}
    tries = 0
    for point in points:
        violations = formulas.violations(point)
        if not violations:
            return
        times_violated.update(path for path, _ in violations)
        texts.update(violations)
        tries += 1
    always_violated = [path for path, times in times_violated.items() if times == tries]
    for path in always_violated:
        yield path, f"{tried} meets it: {texts[path]}"
    if not always_violated:
        yield ("constraints",), f"{tried} meets all of them together"


def _points_are_configurations(sections: ValidSections) -> Iterator[Problem]:
    parameters, points = sections.all_parameters(), sections["points_to_evaluate"]
    formulas: Formulas | None = None
    if not any(_expressions_are_valid(sections)):
        formulas = Formulas(sections["constraints"], sections["derived"], sections["max_epochs"])
    seen: dict[frozenset[tuple[str, Scalar]], int] = {}
    for i, given in enumerate(points):
        path = ("points_to_evaluate", i)
        point, mistakes = complete_point(parameters, given)
        yield from (((*path, name) if name in given else path, text) for name, text in mistakes.items())
        if mistakes:
            continue
        for broken, text in [] if formulas is None else formulas.violations(point):
            what = "it breaks a constraint" if broken[0] == "constraints" else "a value cannot be derived"
            yield path, f"{what}: {text}"
        known = seen.setdefault(frozenset(point.items()), i)
        if known != i:
            yield path, f"it is the same configuration as points_to_evaluate.{known}: leave it out"


def _points_fit_grid(sections: ValidSections) -> Iterator[Problem]:
    sampler, budget = sections["sampler"], sections["budget"]
    if not sections["points_to_evaluate"] or not sampler.is_grid or budget.trials is None:
        return
    count = count_grid(
        sections.all_parameters(), sections["constraints"], sections["derived"], sections["max_epochs"], math.inf
    )
    if count is not None and budget.trials < count:
        yield (
            ("points_to_evaluate",),
            f"budget.trials {budget.trials} leaves out points of this grid of {count}, in the order of the file: leave "
            "points_to_evaluate out, raise budget.trials, or use sampler random",
        )


def _sources_are_distinct(sections: ValidSections) -> Iterator[Problem]:
    seen: set[tuple[str, str | None]] = set()
    for i, source in enumerate(sections["warm_start"]):
        if (source.study, source.storage) in seen:
            yield ("warm_start", i), f"{source.study} is named twice"
        seen.add((source.study, source.storage))


RULES: tuple[Rule, ...] = (
    _names_are_identifiers,
    conditions_are_consistent,
    _expressions_are_valid,
    _some_configuration_is_valid,
    _points_are_configurations,
    _points_fit_grid,
    _sources_are_distinct,
)
