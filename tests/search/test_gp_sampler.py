"""The sampler `gp`: what it learns from trials without their last epoch, and that it is Optuna's without them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import GPSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.search.gp_sampler import ExtrapolatingGPSampler, extrapolate
from hpo.space.parameters import FloatRange

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


@pytest.mark.parametrize("state", [TrialState.PRUNED, TrialState.WAITING, TrialState.RUNNING])
def test_a_trial_that_was_stopped_waits_or_trains_counts(state: TrialState) -> None:
    partial = trial(3, state, {1: 0.05})
    assert values_of(extrapolate([*COMPLETED, partial])) == pytest.approx({0: 0.5, 1: 0.8, 2: 0.5, 3: 0.05 + 0.4})
    assert partial.state == state, "what the storage keeps in memory is not changed"


def test_until_a_trial_has_completed_those_that_got_furthest_stand_in_for_it() -> None:
    partial = [
        trial(0, TrialState.PRUNED, {1: 0.1}),
        trial(1, TrialState.RUNNING, {1: 0.2, 3: 0.6}),
        trial(2, TrialState.WAITING, {1: 0.3, 3: 0.5}),
        trial(3, TrialState.RUNNING, {1: 0.4, 2: 0.5}),
        trial(4, TrialState.RUNNING, {}),
    ]
    found = extrapolate(partial)
    assert values_of(found) == pytest.approx({0: 0.1 + 0.3, 1: 0.6, 2: 0.5}), "none of the furthest has epoch 2"
    assert [each.number for each in found] == [0, 1, 2, 3, 4], "the others still train"


def test_a_trial_that_nothing_compares_with_is_left_out_or_still_trains() -> None:
    stopped = [
        trial(3, TrialState.PRUNED, {2: 0.5}),
        trial(4, TrialState.PRUNED, {1: math.nan}),
        trial(5, TrialState.PRUNED, {}),
    ]
    running = [trial(6, TrialState.RUNNING, {2: 0.5}), trial(7, TrialState.RUNNING, {1: math.inf})]
    found = extrapolate([*COMPLETED, *stopped, *running])
    assert values_of(found) == {0: 0.5, 1: 0.8, 2: 0.5}
    assert [each.number for each in found] == [0, 1, 2, 6, 7]
    assert extrapolate([trial(0, TrialState.PRUNED, {}), trial(1, TrialState.FAIL, {1: 0.5})]) == []


def test_of_many_trials_the_completed_ones_and_those_that_got_furthest_count() -> None:
    stopped = [trial(3 + i, TrialState.PRUNED, {1: 0.1} if i % 2 else {1: 0.1, 3: 0.2}) for i in range(8)]
    running = trial(11, TrialState.RUNNING, {1: 0.1})
    found = extrapolate([*COMPLETED, *stopped, running], most=6)
    assert [each.number for each in found] == [0, 1, 2, 3, 5, 7, 11]
    assert found[-1].state == TrialState.RUNNING
    assert [each.number for each in extrapolate([*COMPLETED, *stopped], most=2)] == [1, 2]
    assert [each.number for each in extrapolate([*COMPLETED, running], most=2)] == [1, 2, 11]


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


def test_it_learns_before_a_trial_has_completed() -> None:
    partial = [
        trial(i, TrialState.RUNNING, {1: -((x - 0.7) ** 2)}, x) for i, x in enumerate([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    ]
    assert abs(draw(ExtrapolatingGPSampler, partial) - 0.7) < 0.05


def test_of_several_objectives_it_extrapolates_nothing() -> None:
    """Storage has the epochs of the first one only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        sampler = ExtrapolatingGPSampler(seed=0, n_startup_trials=2, warn_independent_sampling=False)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    options: dict[str, Any] = {"distributions": SPACE, "intermediate_values": {1: 0.5}}
    study.add_trials(create_trial(values=[x, x], params={"x": x}, **options) for x in (0.2, 0.8))
    study.add_trial(create_trial(state=TrialState.RUNNING, params={"x": 0.5}, **options))
    assert 0.0 <= study.ask().suggest_float("x", 0.0, 1.0) <= 1.0


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


def draws_of(
    space: dict[str, BaseDistribution],
    value: Callable[[dict[str, Any]], float],
    is_allowed: Callable[[Mapping[str, Any]], bool] = lambda _: True,
    count: int = 8,
) -> list[dict[str, Any]]:
    """Return what the sampler draws after 8 allowed trials at random. None that it draws itself has a result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        gp = ExtrapolatingGPSampler(seed=0, n_startup_trials=8, is_allowed=is_allowed)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    while len(study.get_trials(states=[TrialState.COMPLETE])) < 8:
        asked = study.ask(space)
        if is_allowed(asked.params):
            study.tell(asked, value(asked.params))
        else:
            study.tell(asked, state=TrialState.FAIL)
    study.sampler = gp
    found = []
    for _ in range(count):
        asked = study.ask(space)
        found.append(asked.params)
        study.tell(asked, state=TrialState.FAIL)
    return found


BATCH, SHARE = IntDistribution(16, 512, step=16), FloatDistribution(0.0, 0.9, step=0.05)


@pytest.mark.parametrize(
    ("space", "is_allowed", "value"),
    [
        ({"b": BATCH, "y": FloatDistribution(0, 1)}, lambda p: p["b"] <= 250, lambda p: p["b"] - (p["y"] - 0.3) ** 2),
        ({"b": BATCH, "s": SHARE}, lambda p: p["b"] * (1 - p["s"]) <= 200, lambda p: p["b"] / 512 - p["s"] / 4),
        ({"s": SHARE, "y": FloatDistribution(0, 1)}, lambda p: p["s"] > 0.2, lambda p: -p["s"]),
        ({"b": IntDistribution(1, 1024, log=True), "y": FloatDistribution(0, 1)}, lambda p: p["b"] <= 20, lambda p: p["b"]),
    ],
)  # fmt: skip
def test_a_value_is_rounded_to_one_that_meets_the_constraints(
    space: dict[str, BaseDistribution],
    is_allowed: Callable[[Mapping[str, Any]], bool],
    value: Callable[[dict[str, Any]], float],
) -> None:
    assert all(map(is_allowed, draws_of(space, value, is_allowed)))


def test_no_configuration_is_drawn_twice_where_no_range_is_continuous() -> None:
    space: dict[str, BaseDistribution] = {
        "n": IntDistribution(1, 30),
        "s": FloatDistribution(-1.0, 1.0, step=0.5),
        "c": CategoricalDistribution([True, None, "a"]),
    }
    found = draws_of(space, lambda params: float(params["n"]), count=12)
    assert len({tuple(params.values()) for params in found}) == 12
    assert min(params["n"] for params in found) > 20, "it still draws where it expects good values"


def test_a_draw_has_the_digits_of_a_grid() -> None:
    """Others would be another configuration: the same training twice."""
    space: dict[str, BaseDistribution] = {"x": FloatDistribution(-1.0, 1.0, step=0.2)}
    parameter = FloatRange(type="float", low=-1.0, high=1.0, step=0.2)
    found = {params["x"] for params in draws_of(space, lambda params: abs(params["x"]), count=3)}
    assert found <= set(parameter.grid_values())
