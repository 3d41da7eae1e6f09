"""What must hold between the sections of a search space, each rule with its reason.

A rule looks at sections that are well by themselves; where one of them is not, the rule is left out. So a file's mistakes
are told all at once: those of single keys and those of keys that do not go together.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hpo.errors import nearest
from hpo.space.command import find_command_mistakes
from hpo.space.document import KeyPath, Problem
from hpo.space.expressions import FUNCTIONS, Expression, ExpressionError, Formulas, find_cycle
from hpo.space.parameters import FloatRange, IntRange, Parameter, check_when, draw_order, grid_points_of, sample

MAX_GRID = 100_000  # configurations
SAMPLES = 1000  # random configurations on which constraints and derived values are tried
NOT_BUILT = {
    ("objectives",): "several objectives are not built yet: give one `metric` and `direction`",
    ("warm_start",): "learning from earlier studies is not built yet: leave warm_start out",
    ("budget", "gpu_hours"): "a budget of GPU-hours is not built yet: give budget.trials or budget.time",
}


class _InvalidSectionError(Exception):
    """A rule needs a section that has mistakes of its own."""


@dataclass(frozen=True)
class Draft:
    """What of a space is well by itself.

    Attributes:
        given: {section: value} as the models hold it; of `parameters` those that are well.
        written: {key: value} as it was written, to know what is there at all.
    """

    given: Mapping[str, Any]
    written: Mapping[str, Any]

    def __getitem__(self, section: str) -> Any:
        if section not in self.given:
            raise _InvalidSectionError
        return self.given[section]

    def names(self, section: str = "parameters") -> list[str]:
        """Return the names of all parameters, or derived values, also of those with mistakes."""
        written = self.written.get(section)
        return list(written) if isinstance(written, Mapping) else []

    def all_parameters(self) -> dict[str, Parameter]:
        """Return the parameters in an order to draw them in, if every one is well."""
        parameters: dict[str, Parameter] = self["parameters"]
        if set(self.names()) != set(parameters) or any(_conditions_hold_together(self)):
            raise _InvalidSectionError
        return {name: parameters[name] for name in draw_order(parameters)}


Rule = Callable[[Draft], Iterator[Problem]]


def check_rules(draft: Draft) -> list[Problem]:
    """Return what is wrong between the sections of a space."""
    found: list[Problem] = []
    for rule in RULES:
        with suppress(_InvalidSectionError):
            found += rule(draft)
    return found


# --- samplers and schedulers ----------------------------------------------------------------------------------------


def _grid_is_finite(draft: Draft) -> Iterator[Problem]:
    if draft["sampler"].name != "grid":
        return
    counts = {name: parameter.count for name, parameter in draft["parameters"].items()}
    for name, count in counts.items():
        if count is None:
            yield (
                ("parameters", name),
                "sampler grid needs finitely many values, and this range is continuous: give a list or a step, or take "
                "sampler random or tpe",
            )
    points = math.prod(count or 1 for count in counts.values())
    if points > MAX_GRID and max(count or 1 for count in counts.values()) <= MAX_GRID:
        parameters = draft.all_parameters()
        if any(parameter.when for parameter in parameters.values()):  # then there are fewer
            points = sum(1 for _ in itertools.islice(grid_points_of(parameters), MAX_GRID + 1))
    if points > MAX_GRID:
        yield (
            ("parameters",),
            f"this grid has more than {MAX_GRID} configurations: give fewer values, or take sampler random or tpe",
        )


def _search_ends(draft: Draft) -> Iterator[Problem]:
    sampler, budget = draft["sampler"], draft["budget"]
    if sampler.name != "grid" and budget.trials is None and budget.time is None and budget.gpu_hours is None:
        yield ("sampler",), f"sampler {sampler.name} never ends by itself: give budget.trials or budget.time"


def _sampler_fits(draft: Draft) -> Iterator[Problem]:
    name, parameters = draft["sampler"].name, draft["parameters"]
    conditional = [name for name, parameter in parameters.items() if parameter.when]
    if name in {"qmc", "cmaes", "gp"} and conditional:
        yield (
            ("sampler",),
            f"{name} draws all parameters jointly and cannot leave out {conditional[0]}, which depends on another one by "
            "`when`: take sampler tpe, random or nsga2",
        )
    if name == "tpe" and draft["sampler"].group and draft["sampler"].multivariate is False:
        yield ("sampler", "group"), "group is a kind of multivariate draw: leave multivariate out, or set it to true"
    if name == "cmaes":
        everything = draft.all_parameters().values()
        if not any(isinstance(p, IntRange | FloatRange) and p.low < p.high for p in everything):
            yield ("sampler",), "cmaes learns int and float ranges, and there is none: take sampler tpe, or grid"


def _scheduler_has_room(draft: Draft) -> Iterator[Problem]:
    scheduler, max_epochs = draft["scheduler"], draft["max_epochs"]
    if scheduler.name == "pbt":
        yield ("scheduler",), "pbt is not built yet: take asha, hyperband or median"
    elif scheduler.name != "none" and max_epochs == 1:
        yield (
            ("scheduler",),
            f"{scheduler.name} stops trials between epochs, but max_epochs is 1: leave the scheduler out",
        )
    elif scheduler.name != "none" and scheduler.grace_period >= max_epochs:
        yield (
            ("scheduler", "grace_period"),
            f"scheduler {scheduler.name} has no room: grace_period {scheduler.grace_period} must be below max_epochs "
            f"{max_epochs}",
        )
    if scheduler.name == "median" and "reduction_factor" in scheduler.model_fields_set:
        yield ("scheduler", "reduction_factor"), "median has no reduction_factor: leave it out"


# --- parameters, constraints and derived values ---------------------------------------------------------------------


def _names_are_identifiers(draft: Draft) -> Iterator[Problem]:
    for section in ("parameters", "derived"):
        for name in draft.names(section):
            if not name.isidentifier():
                yield (section, name), f"a name is a Python identifier, got {name!r}"
    for name in draft.names("derived"):
        if name in draft.names() or name == "max_epochs":
            yield ("derived", name), "another value has this name already"


def _conditions_hold_together(draft: Draft) -> Iterator[Problem]:
    parameters, names = draft["parameters"], draft.names()
    yield from ((("parameters", *path), text) for path, text in check_when(parameters, names))
    circle = find_cycle({name: parameter.when or () for name, parameter in parameters.items()})
    if circle:
        yield ("parameters", circle[0], "when"), f"in a circle each depends on the next: {' -> '.join(circle)}"


def _expressions_are_known(draft: Draft) -> Iterator[Problem]:
    texts = [(("constraints", i), text) for i, text in enumerate(draft["constraints"])]
    texts += [(("derived", name), text) for name, text in draft["derived"].items()]
    known = [*draft.names(), *draft["derived"], "max_epochs"]
    needs: dict[str, frozenset[str]] = {}
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
            needs[str(path[1])] = expression.names
        elif not expression.is_condition:
            yield path, f"a constraint is a comparison such as lr <= 0.1, got {text!r}"
    circle = find_cycle(needs)
    if circle:
        yield ("derived", circle[0]), f"in a circle each is derived from the next: {' -> '.join(circle)}"


def _some_configuration_is_left(draft: Draft) -> Iterator[Problem]:
    """Try constraints and derived values: on the points of a grid, else on random configurations."""
    parameters = draft.all_parameters()
    if not draft["constraints"] and not draft["derived"]:
        return
    if any(_expressions_are_known(draft)) or any(_names_are_identifiers(draft)) or any(_grid_is_finite(draft)):
        return
    formulas = Formulas(draft["constraints"], draft["derived"], draft["max_epochs"])
    is_grid = draft["sampler"].name == "grid"
    rng = random.Random(0)
    points = grid_points_of(parameters) if is_grid else (sample(parameters, rng) for _ in range(SAMPLES))
    tried = "no configuration of the grid" if is_grid else f"none of {SAMPLES} random configurations"
    times: Counter[KeyPath] = Counter()
    texts: dict[KeyPath, str] = {}
    count = 0
    for point in points:
        broken = formulas.broken(point)
        if not broken:
            return
        times.update(path for path, _ in broken)
        texts.update(broken)
        count += 1
    never = [path for path, n in times.items() if n == count]
    for path in never:
        yield path, f"{tried} is possible with it: {texts[path]}"
    if not never:
        yield ("constraints",), f"{tried} meets all of them together"


def _command_is_complete(draft: Draft) -> Iterator[Problem]:
    if draft["command"] is None:
        return
    if "trainable" in draft.written:
        yield ("command",), "give either command or trainable, not both"
    for text in find_command_mistakes(draft["command"], [*draft.names(), *draft.names("derived")]):
        yield ("command",), text


def _nothing_is_ignored(draft: Draft) -> Iterator[Problem]:
    for path, text in NOT_BUILT.items():
        value: Any = draft.written
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value:
            yield path, text
    if draft["replicates"] > 1:
        yield ("replicates",), "several seeds a configuration are not built yet: leave replicates at 1"


RULES: tuple[Rule, ...] = (
    _grid_is_finite,
    _search_ends,
    _sampler_fits,
    _scheduler_has_room,
    _names_are_identifiers,
    _conditions_hold_together,
    _expressions_are_known,
    _some_configuration_is_left,
    _command_is_complete,
    _nothing_is_ignored,
)
