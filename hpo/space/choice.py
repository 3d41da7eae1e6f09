"""The sampler of a search that names none: a rule, and its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hpo.space.parameters import MAX_GP_VALUES, Parameter, find_too_large
from hpo.space.sections import (
    AutoSampler,
    Budget,
    GPSampler,
    GridSampler,
    RandomSampler,
    Sampler,
    Scheduler,
    TPESampler,
)

SMALL_GRID = 100  # configurations that are tried one after another, if only time or money ends the search
MAX_GP_TRIALS = 250  # that the sampler sees, see `hpo.search.gp_sampler`: its cost grows with the third power of them
MAX_LEARNING_TRIALS = 20_000  # with more, a draw at random is cheaper than what it could learn


@dataclass(frozen=True)
class SamplerChoice:
    """A sampler, and why `auto` chose it.

    Attributes:
        sampler: with its default options.
        reason: without a full stop.
    """

    sampler: Sampler
    reason: str


def choose_sampler(
    auto: AutoSampler,
    parameters: Mapping[str, Parameter],
    budget: Budget,
    scheduler: Scheduler,
    count_points: Callable[[float], int | None],
    *,
    objectives: int = 1,
) -> SamplerChoice:
    """Return the sampler for a search that leaves it to `auto`.

    A population starts at random. A small grid is searched completely. A Gaussian process is for parameters that do not
    depend on each other, if there are not very many trials: measured by `benchmarks.worth`. TPE is for all else, and for
    several objectives, as in Optuna.

    Args:
        auto: its seed is kept.
        parameters: of the search, valid.
        budget: of the search.
        scheduler: of the search.
        count_points: returns how many configurations the grid has; None if it has more than its argument.
        objectives: how many there are.
    """
    most = budget.trials if budget.trials is not None else SMALL_GRID if budget.ends_search else math.inf
    if scheduler.replaces_trials:
        reason = f"the members of a population ({scheduler.name}) start from independent draws"
        return SamplerChoice(RandomSampler(name="random", seed=auto.seed), reason)
    points = count_points(most)
    if points is not None:
        return SamplerChoice(GridSampler(name="grid", seed=auto.seed), _say_grid(points, budget))
    if budget.trials is not None and budget.trials > MAX_LEARNING_TRIALS:
        reason = f"with more than {MAX_LEARNING_TRIALS:,} trials, a draw must cost little"
        return SamplerChoice(RandomSampler(name="random", seed=auto.seed), reason)
    if objectives > 1:
        return SamplerChoice(TPESampler(name="tpe", seed=auto.seed), f"there are {objectives} objectives")
    against_gp = _reason_against_gp(parameters, budget)
    if not against_gp:
        many = "" if budget.trials is None else f", and at most {MAX_GP_TRIALS} trials"
        reason = f"no parameter depends on another{many}"
        return SamplerChoice(GPSampler(name="gp", seed=auto.seed), reason)
    return SamplerChoice(TPESampler(name="tpe", seed=auto.seed), against_gp)


def _say_grid(points: int, budget: Budget) -> str:
    count = f"{points:,} configuration{'' if points == 1 else 's'}"
    return count if budget.trials is None else f"{count}, within the budget of {budget.trials:,} trials"


def _reason_against_gp(parameters: Mapping[str, Parameter], budget: Budget) -> str:
    """Return why a Gaussian process does not suit a search; empty if it does."""
    conditional = [name for name, parameter in parameters.items() if parameter.when]
    if conditional:
        return f"{conditional[0]} depends on another parameter"
    large = find_too_large(parameters)
    if large is not None:
        return f"{large} has over {MAX_GP_VALUES:,} values, which gp would keep in memory"
    if budget.trials is not None and budget.trials > MAX_GP_TRIALS:
        return f"{budget.trials:,} trials, and gp is for at most {MAX_GP_TRIALS}"
    return ""
