"""The sampler `gp`: what it learns from trials that were stopped early, and that it is Optuna's without them."""

from __future__ import annotations

import math
import warnings
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import GPSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.search.gp_sampler import ExtrapolatingGPSampler, extrapolate

SPACE: dict[str, BaseDistribution] = {"x": FloatDistribution(0.0, 1.0)}


def trial(number: int, state: TrialState, values: dict[int, float], x: float = 0.5) -> FrozenTrial:
    """A trial with these values by epoch; a completed one has the last of them as its value."""
    value = values[max(values)] if state == TrialState.COMPLETE else None
    made = create_trial(state=state, value=value, params={"x": x}, distributions=SPACE, intermediate_values=values)
    made.number = number
    return made


def values_of(trials: list[FrozenTrial]) -> dict[int, float]:
    return {each.number: each.values[0] for each in trials if each.state == TrialState.COMPLETE}


COMPLETED = [
    trial(0, TrialState.COMPLETE, {1: 0.1, 3: 0.4, 9: 0.5}),
    trial(1, TrialState.COMPLETE, {1: 0.2, 3: 0.4, 9: 0.8}),
    trial(2, TrialState.COMPLETE, {1: 0.3, 9: 0.5}),
]


def test_a_stopped_trial_gains_what_completed_ones_have_gained_from_its_epoch_on() -> None:
    stopped = [trial(3, TrialState.PRUNED, {1: 0.05}), trial(4, TrialState.PRUNED, {1: 0.1, 3: 0.2})]
    found = extrapolate([*COMPLETED, *stopped])
    assert values_of(found) == pytest.approx({0: 0.5, 1: 0.8, 2: 0.5, 3: 0.05 + 0.4, 4: 0.2 + (0.1 + 0.4) / 2})
    assert [each.state for each in stopped] == [TrialState.PRUNED] * 2, (
        "what the storage keeps in memory is not changed"
    )


def test_a_stopped_trial_that_nothing_compares_with_is_left_out() -> None:
    stopped = [
        trial(3, TrialState.PRUNED, {2: 0.5}),
        trial(4, TrialState.PRUNED, {1: math.nan}),
        trial(5, TrialState.PRUNED, {}),
    ]
    assert values_of(extrapolate([*COMPLETED, *stopped])) == {0: 0.5, 1: 0.8, 2: 0.5}
    assert extrapolate(stopped) == []


def test_of_many_trials_the_completed_ones_and_the_last_stopped_ones_count() -> None:
    stopped = [trial(3 + i, TrialState.PRUNED, {1: 0.1} if i % 2 else {1: 0.1, 3: 0.2}) for i in range(8)]
    running = trial(11, TrialState.RUNNING, {1: 0.1})
    found = extrapolate([*COMPLETED, *stopped, running], most=6)
    assert [each.number for each in found] == [0, 1, 2, 3, 5, 7, 11]
    assert [each.number for each in extrapolate([*COMPLETED, *stopped], most=2)] == [1, 2]


def study_with(sampler: Any, trials: list[FrozenTrial]) -> optuna.Study:
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials(trials)
    return study


def draw(sampler: type[GPSampler], trials: list[FrozenTrial]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study = study_with(sampler(seed=0, n_startup_trials=4, warn_independent_sampling=False), trials)
    return study.ask().suggest_float("x", 0.0, 1.0)


def completed_at(points: list[float]) -> list[FrozenTrial]:
    return [
        trial(i, TrialState.COMPLETE, {1: -((x - 0.7) ** 2), 2: -((x - 0.7) ** 2)}, x) for i, x in enumerate(points)
    ]


def test_without_stopped_trials_it_draws_what_optunas_sampler_draws() -> None:
    trials = completed_at([0.0, 0.2, 0.4, 0.9, 1.0])
    assert draw(ExtrapolatingGPSampler, trials) == draw(GPSampler, trials)


def test_it_learns_from_stopped_trials_that_optunas_sampler_ignores() -> None:
    completed = completed_at([0.0, 1.0])
    stopped = [trial(2 + i, TrialState.PRUNED, {1: -((x - 0.7) ** 2)}, x) for i, x in enumerate([0.2, 0.4, 0.6, 0.8])]
    assert abs(draw(ExtrapolatingGPSampler, [*completed, *stopped]) - 0.7) < 0.05
    assert abs(draw(GPSampler, [*completed, *stopped]) - 0.7) > 0.05, "with two completed trials, it draws at random"


def test_an_integer_of_many_values_is_not_searched_value_by_value(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def search_value_by_value(*_: Any) -> None:
        raise AssertionError("this takes most of the time of a draw")

    monkeypatch.setattr("optuna._gp.optim_mixed._discrete_line_search", search_value_by_value)
    space: dict[str, BaseDistribution] = {
        "many": IntDistribution(1, 1000, log=True),
        "stepped": IntDistribution(0, 200, step=4),
        "decimal": FloatDistribution(0.0, 1.0, step=0.02),
        "few": IntDistribution(1, 5),
        "choice": CategoricalDistribution(["a", "b"]),
    }
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study = optuna.create_study(sampler=ExtrapolatingGPSampler(seed=0, n_startup_trials=5))
    for _ in range(16):
        asked = study.ask(space)
        assert "independently" not in caplog.text, (
            "no value is drawn at random instead, since it is not on the grid of its parameter"
        )
        many, stepped, decimal, few, choice = (asked.params[name] for name in space)
        assert type(many) is int
        assert 1 <= many <= 1000
        assert stepped in range(0, 201, 4)
        assert decimal / 0.02 == pytest.approx(round(decimal / 0.02))
        found.append((math.log(many / 60) ** 2) + ((stepped - 120) / 100) ** 2 + (few - 3) ** 2 + (choice == "a"))
        study.tell(asked, found[-1])
    assert min(found) < 0.1 < min(found[:5])
