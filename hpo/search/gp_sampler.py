"""The sampler `gp`: Optuna's, which also learns from trials that have not been trained to their last epoch.

Optuna's Gaussian process sees completed trials only. Where most trials are stopped early, that is a few, and none of the bad
ones. At the start of a search, it is none at all. Here, each trial that has trained an epoch counts as if it had completed,
with an extrapolated value: its last one, and what the completed trials have gained from that epoch to their last one, by the
median. Until one has completed, the trials that have got furthest stand in for it. It does not matter whether a trial was
stopped, waits, or still trains.

Optuna's also learns constraints, from the values of trials that broke them. Here no such trial is trained, and whether a
configuration breaks a constraint is known without one. So the largest value of the acquisition function is looked for among
the configurations that break none and, in a space without continuous ranges, that no trial has. Where it is elsewhere, the
same point would be drawn, and refused, again and again.

An integer, or a range with steps, of many values is a real number while that value is looked for, and rounded then. Optuna
searches over such values one after another, which took three quarters of the time of a draw.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import FloatDistribution
from optuna.samplers import GPSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState

from hpo.space.choice import MAX_GP_TRIALS
from hpo.space.parameters import nearest_step

if TYPE_CHECKING:
    import torch
    from optuna import Study
    from optuna.distributions import BaseDistribution

# Whether a configuration, {name: value}, meets the constraints.
IsAllowed = Callable[[Mapping[str, Any]], bool]

# Of a trial that counts once it has an epoch. An interrupted one waits, as one does that waits at a rung.
_PARTIAL = (TrialState.RUNNING, TrialState.WAITING, TrialState.PRUNED)
_MAX_TRIED_VALUES = 16  # of an integer: Optuna, too, tries every one of so few
_PENALTY = 1e9  # of a point that must not be drawn: the logarithm of an expected improvement is never so low
_DIGITS = 9  # of normalized values that are compared


class ExtrapolatingGPSampler(GPSampler):
    """Optuna's GPSampler, with the changes above.

    It draws the same points where all trials with an epoch have completed, there are no constraints, and some range is
    continuous but no number has many values with steps between them.

    Args:
        is_allowed: says which configurations meet the constraints; None if there are none. It gets the parameters with more
            than one value.
        options: of GPSampler.
    """

    _search_space: IntersectionSearchSpace | None = None

    def __init__(self, *, is_allowed: IsAllowed | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._is_allowed = is_allowed
        # Of the draw:
        self._distributions: Mapping[str, BaseDistribution] = {}
        self._tried: list[FrozenTrial] = []  # their configurations are not drawn again

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the parameters that all completed and extrapolated trials have."""
        if self._search_space is None:
            self._search_space = IntersectionSearchSpace(include_pruned=True)
        view: Any = _ExtrapolatedStudy(study)
        found = self._search_space.calculate(view)
        return {name: distribution for name, distribution in found.items() if not distribution.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw the parameters of a trial."""
        view: Any = _ExtrapolatedStudy(study)
        self._distributions = search_space
        self._tried = [] if any(map(_is_continuous, search_space.values())) else _with_parameters(study, search_space)
        return _with_own_digits(super().sample_relative(view, trial, search_space), search_space)

    def _optimize_acqf(self, acqf: Any, best_params: np.ndarray | None) -> np.ndarray:
        """Return the normalized parameters with the largest acquisition function. Optuna lets subclasses override this."""
        space = acqf.search_space
        values = dict(zip(space.discrete_indices, space.get_choices_of_discrete_params(), strict=True))
        is_allowed = None if self._is_allowed is None else self._meets_constraints
        allowed = _AllowedOnly(acqf, values, is_allowed, space.get_normalized_params(self._tried))
        with np.errstate(invalid="ignore"):  # it divides by 0 where one point of its sample alone is allowed
            found: np.ndarray = super()._optimize_acqf(allowed, best_params)  # type: ignore[arg-type]
        return _round(found, values)

    def _meets_constraints(self, params: Mapping[str, Any]) -> bool:
        assert self._is_allowed is not None
        return self._is_allowed(_with_own_digits(params, self._distributions))


def _is_continuous(distribution: BaseDistribution) -> bool:
    return isinstance(distribution, FloatDistribution) and distribution.step is None


def _with_parameters(study: Study, search_space: Mapping[str, BaseDistribution]) -> list[FrozenTrial]:
    """Return the trials, in any state, that have all parameters of a search space."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if all(trial.distributions.get(name) == distribution for name, distribution in search_space.items())
    ]


def _with_own_digits(params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """Return drawn values with the digits that grids and other samplers give them."""
    own = dict(params)
    for name, value in params.items():
        distribution = distributions[name]
        if isinstance(distribution, FloatDistribution) and distribution.step is not None:
            own[name] = nearest_step(value, distribution.low, distribution.high, distribution.step)
    return own


def _relax(search_space: Any, values: Mapping[int, np.ndarray]) -> Any:
    """Return Optuna's search space with its numbers of many values as continuous ones.

    Args:
        search_space: it is not changed.
        values: {index of a discrete parameter: its normalized values}.
    """
    relaxed = copy.copy(search_space)
    few = [i for i, each in values.items() if search_space.is_categorical[i] or len(each) <= _MAX_TRIED_VALUES]
    relaxed.discrete_indices = np.array(few, dtype=int)
    relaxed.continuous_indices = np.setdiff1d(np.arange(search_space.dim), few)
    return relaxed


def _round(points: np.ndarray, values: Mapping[int, np.ndarray]) -> np.ndarray:
    """Return the nearest points whose discrete parameters have values that they can have.

    Args:
        points: (..., parameters), normalized.
        values: {index of a discrete parameter: its normalized values, ascending}.
    """
    rounded = points.copy()
    for index, each in values.items():
        rounded[..., index] = each[np.searchsorted((each[1:] + each[:-1]) / 2, points[..., index])]
    return rounded


def _identify(points: np.ndarray) -> list[bytes]:
    """Return what is equal for equal points; their shape is (points, parameters), and they are normalized."""
    return [point.tobytes() for point in np.round(points, _DIGITS) + 0.0]  # -0.0 has other bytes than 0.0


class _AllowedOnly:
    """An acquisition function that is low at points that must not be drawn.

    A point is judged as `_round` would leave it.

    Args:
        acqf: Optuna's acquisition function.
        values: {index of a discrete parameter: its normalized values}.
        is_allowed: see `ExtrapolatingGPSampler`.
        tried: (points, parameters), normalized: these are not drawn again.
    """

    def __init__(
        self, acqf: Any, values: Mapping[int, np.ndarray], is_allowed: IsAllowed | None, tried: np.ndarray
    ) -> None:
        self.search_space, self.length_scales = _relax(acqf.search_space, values), acqf.length_scales
        self._acqf = acqf
        self._values = values
        self._is_allowed = is_allowed
        self._tried = set(_identify(tried))

    def eval_acqf(self, x: torch.Tensor) -> torch.Tensor:
        """Return the value at each point of `x`, of shape (..., parameters)."""
        values: torch.Tensor = self._acqf.eval_acqf(x)
        return values - values.new_tensor(self._penalties(x.detach().numpy()))

    def eval_acqf_no_grad(self, x: np.ndarray) -> np.ndarray:
        """Return the same for an array."""
        values: np.ndarray = self._acqf.eval_acqf_no_grad(x) - self._penalties(x)
        return values

    def _penalties(self, x: np.ndarray) -> np.ndarray:
        if self._is_allowed is None and not self._tried:
            return np.zeros(x.shape[:-1])
        points = _round(x.reshape(-1, x.shape[-1]), self._values)
        is_free = np.array([point not in self._tried for point in _identify(points)])
        if self._is_allowed is not None:
            space = self._acqf.search_space
            is_free &= [self._is_allowed(space.get_unnormalized_param(point)) for point in points]
        return np.where(is_free, 0.0, _PENALTY).reshape(x.shape[:-1])


class _ExtrapolatedStudy:
    """A study whose trials have completed once they have an epoch. Everything else is that of the study behind it."""

    def __init__(self, study: Study) -> None:
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(self, *, states: Collection[TrialState] | None = None, **options: Any) -> list[FrozenTrial]:
        trials = self._study._get_trials(states=None, **options)  # noqa: SLF001 # as GPSampler does
        if len(self._study.directions) == 1:  # of several objectives, storage has the epochs of the first one only
            trials = extrapolate(trials)
        return [trial for trial in trials if states is None or trial.state in states]


def extrapolate(trials: Sequence[FrozenTrial], most: int = MAX_GP_TRIALS) -> list[FrozenTrial]:
    """Return trials in which those with an epoch have completed, with an extrapolated value.

    Args:
        trials: in any state, of one objective. They are not changed.
        most: how many that count as completed are returned at most: first those that have, the latest ones, then those that
            got furthest.

    Returns:
        The trials, by number. One whose value is not known, or that is one too many, is left out if it has ended.
    """
    completed = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    partial = [  # (last epoch, trial)
        (epoch, trial)
        for trial in trials
        if trial.state in _PARTIAL
        and (epoch := trial.last_step) is not None
        and math.isfinite(trial.intermediate_values[epoch])
    ]
    furthest = max((epoch for epoch, _ in partial), default=0)
    curves = [(trial.values[0], trial.intermediate_values) for trial in completed] or [
        (trial.intermediate_values[furthest], trial.intermediate_values)
        for epoch, trial in partial
        if epoch == furthest
    ]
    gains: dict[int, float | None] = {}
    found = sorted(completed, key=lambda trial: trial.number)[-most:]
    for epoch, trial in sorted(partial, key=lambda each: (-each[0], each[1].number)):
        if len(found) == most:
            break
        if epoch not in gains:
            gains[epoch] = _median_gain(curves, epoch)
        gain = gains[epoch]
        if gain is not None:
            found.append(copy.copy(trial))
            found[-1].state, found[-1].values = TrialState.COMPLETE, [trial.intermediate_values[epoch] + gain]
    counted = {trial.number for trial in found}
    others = [trial for trial in trials if not trial.state.is_finished() and trial.number not in counted]
    return sorted([*found, *others], key=lambda trial: trial.number)


def _median_gain(curves: Sequence[tuple[float, Mapping[int, float]]], epoch: int) -> float | None:
    """Return by how much the value changes from an epoch to the end; None if no trial says so.

    Args:
        curves: of some trials, the final value and {epoch: value}.
        epoch: the epoch.
    """
    gains = [final - values.get(epoch, math.nan) for final, values in curves]
    known = [gain for gain in gains if math.isfinite(gain)]
    return statistics.median(known) if known else None
