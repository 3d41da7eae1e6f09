"""Rules between the sections of a search space.

A rule reads only valid sections. Where a section that it needs is invalid, the rule is skipped: the section's own problems
are reported instead. This way one error message has all problems of a file.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hpo.errors import nearest
from hpo.space.command import (
    CHECKPOINT_DIR,
    describe_option,
    find_command_mistakes,
    looks_like_option,
    positional_placeholders,
    uses_checkpoint_dir,
    uses_placeholder,
)
from hpo.space.expressions import FUNCTIONS, Expression, ExpressionError, Formulas, find_cycle
from hpo.space.messages import KeyPath, Problem
from hpo.space.parameters import (
    MAX_GP_VALUES,
    Choices,
    FloatRange,
    IntRange,
    Parameter,
    find_too_large,
    find_when_problems,
    iterate_grid,
    sample_params,
    sampling_order,
)
from hpo.space.patterns import EPOCH, PatternError, compile_pattern
from hpo.space.points import complete_point, find_point_mistakes
from hpo.space.sections import MAX_SEED
from hpo.trainable import DEFAULT_TRAINABLE

MAX_GRID_POINTS = 100_000
MAX_WORK = 2_000_000  # operations of constraints and derived values for all points of a grid: about 5 s
RANDOM_POINTS = 1000  # tried against constraints and derived values
POPULATION_SAMPLERS = ("random", "qmc")  # of the first members: they learn from no results


class _InvalidSectionError(Exception):
    """A rule needs a section that is invalid."""


@dataclass(frozen=True)
class ValidSections:
    """The valid sections of a search space that may be invalid as a whole.

    Attributes:
        values: {section: value}, values as in `Space`. Of `parameters`, the valid ones.
        data: {section: value} as in the file, to know which keys are present.
    """

    values: Mapping[str, Any]
    data: Mapping[str, Any]

    def __getitem__(self, section: str) -> Any:
        if section not in self.values:
            raise _InvalidSectionError
        return self.values[section]

    def names(self, section: str = "parameters") -> list[str]:
        """Return the names in `parameters` or `derived`, including invalid ones."""
        names = self.data.get(section)
        return list(names) if isinstance(names, Mapping) else []

    def all_parameters(self) -> dict[str, Parameter]:
        """Return all parameters in sampling order. Every one must be valid."""
        parameters: dict[str, Parameter] = self["parameters"]
        if set(self.names()) != set(parameters) or any(_conditions_are_consistent(self)):
            raise _InvalidSectionError
        return {name: parameters[name] for name in sampling_order(parameters)}


Rule = Callable[[ValidSections], Iterator[Problem]]


def check_rules(sections: ValidSections) -> list[Problem]:
    """Return the problems between the sections of a space."""
    found: list[Problem] = []
    for rule in RULES:
        with suppress(_InvalidSectionError):
            found += rule(sections)
    return found


# --- samplers and schedulers ----------------------------------------------------------------------------------------


def _grid_is_finite(sections: ValidSections) -> Iterator[Problem]:
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


def _search_ends(sections: ValidSections) -> Iterator[Problem]:
    sampler, budget = sections["sampler"], sections["budget"]
    if "scheduler" in sections.values and sections["scheduler"].replaces_trials:
        return  # after the last epoch of each member
    if not sampler.is_grid and not budget.ends_search:
        limits = "budget.trials, budget.time, budget.patience, budget.gpu_hours or budget.cost.limit"
        chosen = "" if "sampler" in sections.data else "there are infinitely many configurations, and "
        yield ("sampler",), f"{chosen}sampler {sampler.name} never ends: give {limits}"


def _sampler_fits_parameters(sections: ValidSections) -> Iterator[Problem]:
    sampler, parameters = sections["sampler"], sections["parameters"]
    conditional = [name for name, parameter in parameters.items() if parameter.when]
    if conditional and not sampler.allows_conditions:
        yield (
            ("sampler",),
            f"{sampler.name} samples all parameters jointly and cannot leave out {conditional[0]}, which depends on another "
            "parameter by `when`: use sampler tpe, random or nsga2",
        )
    large = find_too_large(parameters) if sampler.name == "gp" else None
    if large is not None:
        yield (
            ("parameters", large),
            f"gp would keep all values of this range in memory: it may have {MAX_GP_VALUES:,}. Give it a larger step, make "
            "it a float without a step, or use sampler tpe",
        )
    if sampler.needs_range:
        everything = sections.all_parameters().values()
        if not any(isinstance(p, IntRange | FloatRange) and p.low < p.high for p in everything):
            yield (
                ("sampler",),
                f"{sampler.name} needs an int or float range, and there is none: use sampler tpe or grid",
            )


def _scheduler_fits_max_epochs(sections: ValidSections) -> Iterator[Problem]:
    scheduler, max_epochs = sections["scheduler"], sections["max_epochs"]
    for name in sorted(scheduler.unused_options & scheduler.model_fields_set):
        yield ("scheduler", name), f"{scheduler.name} has no {name}: leave it out"
    if scheduler.stops_trials_early and max_epochs == 1:
        yield (
            ("scheduler",),
            f"{scheduler.name} stops trials between epochs, but max_epochs is 1: leave the scheduler out",
        )
    elif scheduler.replaces_trials:
        if scheduler.interval >= max_epochs:
            yield (
                ("scheduler", "interval"),
                f"scheduler {scheduler.name} never compares members: interval {scheduler.interval} must be below max_epochs "
                f"{max_epochs}",
            )
    elif scheduler.stops_trials_early and scheduler.min_epochs(max_epochs) >= max_epochs:
        yield (
            ("scheduler", "grace_period"),
            f"scheduler {scheduler.name} never stops a trial: grace_period {scheduler.grace_period} must be below "
            f"max_epochs {max_epochs}",
        )


def _promotion_fits_search(sections: ValidSections) -> Iterator[Problem]:
    scheduler, command = sections["scheduler"], sections["command"]
    if not scheduler.promotes_trials:
        return
    if command is not None and not uses_checkpoint_dir(command):
        yield (
            ("scheduler", "mode"),
            f"a trial that is promoted trains on from its checkpoint, and this script saves none: use {{{CHECKPOINT_DIR}}} "
            "in the command, or mode stop",
        )
    if sections["budget"].patience is not None:
        text = (
            f"with mode {scheduler.mode}, trials end only when the search does, so patience cannot end it: leave it out"
        )
        yield ("budget", "patience"), f"{text}, limit trials, time or gpu_hours, or use mode stop"


def _population_fits_search(sections: ValidSections) -> Iterator[Problem]:
    scheduler, budget = sections["scheduler"], sections["budget"]
    if not scheduler.replaces_trials:
        return
    if "sampler" in sections.values and sections["sampler"].name not in POPULATION_SAMPLERS:
        yield (
            ("sampler",),
            f"the members of a population start from independent draws, so {scheduler.name} takes sampler "
            f"{' or '.join(POPULATION_SAMPLERS)}, not {sections['sampler'].name}",
        )
    if budget.trials not in {None, scheduler.population}:
        yield (
            ("budget", "trials"),
            f"with scheduler {scheduler.name}, scheduler.population is the number of trials, {scheduler.population}: leave "
            f"budget.trials out, or set population to {budget.trials}",
        )
    if budget.patience is not None:
        text = f"the members of a population train side by side, so {scheduler.name} takes no patience: leave it out"
        yield ("budget", "patience"), f"{text}, or limit time or gpu_hours"
    if sections["replicates"] > 1:
        text = f"{scheduler.name} compares single trainings: leave replicates out, or use scheduler asha or median"
        yield ("replicates",), text
    if sections["command"] is not None:
        yield (
            ("scheduler",),
            f"{scheduler.name} copies the checkpoint of a training that runs, and the files of a script may change "
            "meanwhile: use a Python trainable, or scheduler asha, hyperband or median",
        )
    if sections["warm_start"]:
        yield (
            ("warm_start",),
            f"{scheduler.name} starts its members afresh and learns from no other study: leave it out",
        )
    if "continue" in sections.data:
        yield ("continue",), f"{scheduler.name} starts its members afresh: leave it out"
    if sections["points_to_evaluate"]:
        yield ("points_to_evaluate",), f"{scheduler.name} draws its members at random: leave it out"
    yield from _explored_parameters_exist(sections)


def _explored_parameters_exist(sections: ValidSections) -> Iterator[Problem]:
    scheduler, parameters = sections["scheduler"], sections["parameters"]
    for i, name in enumerate(scheduler.explore or ()):
        path = ("scheduler", "explore", i)
        if name not in sections.names():
            yield path, f"there is no parameter {name!r}, {nearest(name, sections.names())}"
        elif name in parameters and parameters[name].count == 1:
            yield path, f"{name} has a single value: name a range or choices"


# --- objectives -----------------------------------------------------------------------------------------------------


def _objectives(sections: ValidSections) -> list[tuple[KeyPath, str]]:
    """Return the key of each objective's metric in the file, and the metric."""
    if "objectives" not in sections.data or sections.data["objectives"] is None:
        return [(("metric",), sections["metric"])]
    several = sections["objectives"] or [None]  # one alone is held as metric and direction
    return [
        (("objectives", i, "metric"), sections["metric"] if each is None else each.metric)
        for i, each in enumerate(several)
    ]


def _objectives_are_clear(sections: ValidSections) -> Iterator[Problem]:
    if sections.data.get("objectives") is None:
        return
    for key in ("metric", "direction"):
        if key in sections.data:
            yield (key,), f"give either objectives or {key}, not both: each objective has its own metric and direction"
    seen: set[str] = set()
    for path, metric in _objectives(sections):
        if metric in seen:
            yield path, f"{metric} is an objective already: name each metric once"
        seen.add(metric)


def _several_objectives_can_be_searched(sections: ValidSections) -> Iterator[Problem]:
    count = len(_objectives(sections))
    if count == 1:
        return
    scheduler = sections["scheduler"]
    if scheduler.stops_trials_early:
        yield (
            ("scheduler",),
            f"{scheduler.name} stops a trial whose value is worse than that of others, and with {count} objectives there is "
            "no such order: leave the scheduler out, or give one `metric` and `direction`",
        )
    sampler = sections["sampler"]
    if not sampler.allows_objectives:
        yield (
            ("sampler",),
            f"{sampler.name} searches for one objective, and there are {count}: use sampler tpe, nsga2, gp, random, qmc or "
            "grid",
        )


def _metric_is_reported(sections: ValidSections) -> Iterator[Problem]:
    if sections["command"] is not None or sections["trainable"] != DEFAULT_TRAINABLE:
        return
    for path, metric in _objectives(sections):
        if metric.startswith("test_"):
            yield (
                path,
                "the test images are scored once, after the last epoch: no decision may depend on them. Give another "
                "metric, such as val_accuracy",
            )
        if sections["data"].val_samples == 0 and metric.startswith("val_"):
            yield (
                ("data", "val_samples"),
                f"without validation images there is no {metric}: give another metric, such as `metric: train_accuracy`, or "
                "hold images out",
            )


# --- parameters, constraints and derived values ---------------------------------------------------------------------


def _names_are_identifiers(sections: ValidSections) -> Iterator[Problem]:
    for section in ("parameters", "derived"):
        for name in sections.names(section):
            if not name.isidentifier():
                yield (section, name), f"a name is a Python identifier, got {name!r}"
    for name in sections.names("derived"):
        if name in sections.names() or name == "max_epochs":
            yield ("derived", name), "another value has this name already"


def _conditions_are_consistent(sections: ValidSections) -> Iterator[Problem]:
    parameters, names = sections["parameters"], sections.names()
    yield from ((("parameters", *path), text) for path, text in find_when_problems(parameters, names))
    cycle = find_cycle({name: parameter.when or () for name, parameter in parameters.items()})
    if cycle:
        yield ("parameters", cycle[0], "when"), f"the conditions form a cycle: {' -> '.join(cycle)}"


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
    earlier_rules = (_expressions_are_valid, _names_are_identifiers, _grid_is_finite)
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
    seen: dict[str, int] = {}
    for i, given in enumerate(points):
        path = ("points_to_evaluate", i)
        mistakes = list(find_point_mistakes(parameters, given))
        yield from ((path if name is None else (*path, name), text) for name, text in mistakes)
        if mistakes:
            continue
        point = complete_point(parameters, given)
        for _, text in [] if formulas is None else formulas.violations(point):
            yield path, f"it breaks the constraint {text}"
        known = seen.setdefault(repr(point), i)
        if known != i:
            yield path, f"it is the same configuration as point {known + 1}: leave it out"


def _command_is_complete(sections: ValidSections) -> Iterator[Problem]:
    if sections["command"] is None:
        return
    if "trainable" in sections.data:
        yield ("command",), "give either command or trainable, not both"
    mistakes = find_command_mistakes(sections["command"], [*sections.names(), *sections.names("derived")])
    for text in mistakes:
        yield ("command",), text
    positional = set() if mistakes else positional_placeholders(sections["command"])
    for name, parameter in sections["parameters"].items():
        for value in parameter.choices if isinstance(parameter, Choices) and name in positional else ():
            if looks_like_option(value):
                yield ("parameters", name), f"{value!r}: {describe_option(name)}"


def _patterns_are_valid(sections: ValidSections) -> Iterator[Problem]:
    patterns, command = sections["report"], sections["command"]
    if not patterns:
        return
    if command is None:
        yield ("report",), "patterns read the output of a script: give a command, or leave report out"
    for name, text in patterns.items():
        try:
            compile_pattern(text)
        except PatternError as error:
            yield ("report", name), str(error)
    for _, metric in _objectives(sections):
        if metric not in patterns:
            yield ("report",), f"no pattern reads the metric {metric}, {nearest(metric, patterns)}"
    if command is not None and uses_checkpoint_dir(command) and EPOCH not in patterns:
        yield ("report",), f"with {{{CHECKPOINT_DIR}}}, a pattern must read the epoch: give report.{EPOCH}"


def _sources_are_distinct(sections: ValidSections) -> Iterator[Problem]:
    seen: set[tuple[str, str | None]] = set()
    for i, source in enumerate(sections["warm_start"]):
        if (source.study, source.storage) in seen:
            yield ("warm_start", i), f"{source.study} is named twice"
        seen.add((source.study, source.storage))


def _replicates_differ(sections: ValidSections) -> Iterator[Problem]:
    command, replicates = sections["command"], sections["replicates"]
    if sections["seed"] + replicates > MAX_SEED + 1:
        yield ("seed",), f"the last of {replicates} seeds is above {MAX_SEED}: lower it"
    if command is not None and replicates > 1 and not uses_placeholder(command, "seed"):
        text = f"the {replicates} trainings of a configuration differ by their seed alone: use {{seed}} in the command"
        yield (
            ("replicates",),
            f"{text}, such as `python train.py --seed {{seed}}` or `env SEED={{seed}} python train.py`",
        )


RULES: tuple[Rule, ...] = (
    _grid_is_finite,
    _search_ends,
    _sampler_fits_parameters,
    _scheduler_fits_max_epochs,
    _promotion_fits_search,
    _population_fits_search,
    _objectives_are_clear,
    _several_objectives_can_be_searched,
    _metric_is_reported,
    _names_are_identifiers,
    _conditions_are_consistent,
    _expressions_are_valid,
    _some_configuration_is_valid,
    _points_are_configurations,
    _command_is_complete,
    _patterns_are_valid,
    _sources_are_distinct,
    _replicates_differ,
)
