"""The sampler `gp`: Optuna's, which also learns from trials that a scheduler has stopped.

Optuna's Gaussian process sees completed trials only. Where most trials are stopped early, that is a few, and none of the bad
ones. Here, a stopped trial counts as if it had completed, with an extrapolated value: its last one, and what the completed
trials have gained from that epoch to their last one, by the median.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from optuna.samplers import GPSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState

from hpo.space.choice import MAX_GP_TRIALS

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution


class ExtrapolatingGPSampler(GPSampler):
    """Optuna's GPSampler, which draws the same points where no trial was stopped early."""

    _search_space: IntersectionSearchSpace | None = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the parameters that all completed and stopped trials have."""
        if self._search_space is None:
            self._search_space = IntersectionSearchSpace(include_pruned=True)
        found = self._search_space.calculate(study)
        return {name: distribution for name, distribution in found.items() if not distribution.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw the parameters of a trial."""
        view: Any = _ExtrapolatedStudy(study)
        return super().sample_relative(view, trial, search_space)


class _ExtrapolatedStudy:
    """A study whose stopped trials have completed. Everything else is that of the study behind it."""

    def __init__(self, study: Study) -> None:
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(self, *, states: Collection[TrialState], **options: Any) -> list[FrozenTrial]:
        wanted = {*states, TrialState.PRUNED} if TrialState.COMPLETE in states else states
        trials = self._study._get_trials(states=tuple(wanted), **options)  # noqa: SLF001 # as GPSampler does
        return extrapolate(trials) if TrialState.COMPLETE in states else trials


def extrapolate(trials: Sequence[FrozenTrial], most: int = MAX_GP_TRIALS) -> list[FrozenTrial]:
    """Return trials in which stopped ones have completed, with an extrapolated value.

    Args:
        trials: in any state, of one objective if any was stopped. They are not changed.
        most: how many completed and stopped ones are returned at most: first those that completed, then those that were
            stopped last. Trials in other states are all returned.

    Returns:
        The trials, by number, without stopped ones of whose last epoch no completed trial has a value.
    """
    completed = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    stopped = [trial for trial in trials if trial.state == TrialState.PRUNED and trial.last_step is not None]
    others = [trial for trial in trials if not trial.state.is_finished()]
    if not stopped:
        return [*completed, *others]
    gains: dict[int, float | None] = {}
    found = []
    for trial in sorted(stopped, key=lambda each: (-(each.last_step or 0), each.number)):
        epoch = trial.last_step or 0
        if epoch not in gains:
            gains[epoch] = _median_gain(completed, epoch)
        gain, value = gains[epoch], trial.intermediate_values[epoch]
        if gain is not None and math.isfinite(value):
            found.append(copy.copy(trial))
            found[-1].state, found[-1].values = TrialState.COMPLETE, [value + gain]
    latest = sorted(completed, key=lambda trial: trial.number)[-most:]
    return sorted([*latest, *found[: most - len(latest)], *others], key=lambda trial: trial.number)


def _median_gain(completed: Sequence[FrozenTrial], epoch: int) -> float | None:
    """Return by how much the value changes from an epoch to the end; None if no trial says so."""
    gains = [trial.values[0] - trial.intermediate_values[epoch] for trial in completed if _has_both(trial, epoch)]
    return statistics.median(gains) if gains else None


def _has_both(trial: FrozenTrial, epoch: int) -> bool:
    return math.isfinite(trial.values[0]) and math.isfinite(trial.intermediate_values.get(epoch, math.nan))
