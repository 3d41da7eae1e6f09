"""Hyperparameters near those of another trial."""

from __future__ import annotations

import random
from typing import Any

import pytest

from hpo.space.exploration import explore
from hpo.space.model import Space
from hpo.space.parameters import Params, sampling_order

SEEDS = range(200)


def space_of(**parameters: Any) -> Space:
    return Space.model_validate({"name": "s", "max_epochs": 3, "sampler": "random", "parameters": parameters})


def explored(
    space: Space, params: Params, seed: int, *names: str, resample: float = 0.0, factor: float = 1.5
) -> Params:
    ordered = {name: space.parameters[name] for name in sampling_order(space.parameters)}
    return explore(ordered, params, names, resample=resample, factor=factor, rng=random.Random(seed))


def values_of(parameter: dict[str, Any], value: Any, **options: Any) -> set[Any]:
    """Return what becomes of a value."""
    space = space_of(x=parameter)
    found = [explored(space, {"x": value}, seed, "x", **options) for seed in SEEDS]
    assert {space.find_misfit(each) for each in found} == {""}
    return {each["x"] for each in found}


def test_a_number_is_multiplied_or_divided_by_the_factor() -> None:
    assert values_of({"type": "float", "low": 0.0, "high": 10.0}, 3.0) == {2.0, 4.5}
    assert values_of({"type": "float", "low": 0.001, "high": 10.0, "log": True}, 3.0) == {2.0, 4.5}
    assert values_of({"type": "float", "low": -10.0, "high": 10.0}, -3.0) == {-2.0, -4.5}
    assert values_of({"type": "int", "low": 1, "high": 1000, "log": True}, 300) == {200, 450}


def test_a_number_stays_in_its_range() -> None:
    assert values_of({"type": "float", "low": 2.5, "high": 4.0}, 3.0) == {2.5, 4.0}
    assert values_of({"type": "int", "low": 250, "high": 400}, 300) == {250, 400}
    assert values_of({"type": "float", "low": 0.0, "high": 4.0}, 4.0) == {4.0 / 1.5, 4.0}


@pytest.mark.parametrize(
    ("parameter", "value", "expected"),
    [
        ({"type": "int", "low": 0, "high": 9}, 1, {0, 2}),
        ({"type": "int", "low": 0, "high": 9}, 0, {0, 1}),
        ({"type": "int", "low": -4, "high": 4, "step": 2}, -2, {-4, 0}),
        ({"type": "float", "low": 0.0, "high": 0.9, "step": 0.3}, 0.3, {0.0, 0.6}),
        ({"type": "float", "low": 0.0, "high": 0.9, "step": 0.3}, 0.9, {0.6, 0.3 * 3}),
        ({"type": "float", "low": 0.0, "high": 9.0, "step": 0.5}, 6.0, {4.0, 9.0}),
    ],
)
def test_with_steps_a_number_moves_by_at_least_one(parameter: dict[str, Any], value: Any, expected: set[Any]) -> None:
    assert values_of(parameter, value) == expected


def test_zero_stays_zero_on_a_continuous_range() -> None:
    assert values_of({"type": "float", "low": 0.0, "high": 1.0}, 0.0) == {0.0}


def test_a_value_may_be_drawn_anew() -> None:
    drawn = values_of({"type": "float", "low": 0.0, "high": 10.0}, 3.0, resample=1.0)
    assert len(drawn) == len(SEEDS)
    some = values_of({"type": "float", "low": 0.0, "high": 10.0}, 3.0, resample=0.25)
    assert {2.0, 4.5} < some
    assert 0.1 < (len(some) - 2) / len(SEEDS) < 0.4, "a quarter"
    assert values_of({"choices": ["a", "b", "c"]}, "a") == {"a"}, "a choice is kept"
    assert values_of({"choices": ["a", "b", "c"]}, "a", resample=1.0) == {"a", "b", "c"}


def test_only_the_named_parameters_change() -> None:
    space = space_of(x={"type": "float", "low": 0.0, "high": 9.0}, y={"type": "float", "low": 0.0, "high": 9.0}, z=1)
    for seed in SEEDS:
        found = explored(space, {"x": 3.0, "y": 3.0, "z": 1}, seed, "x", resample=0.5)
        assert found["x"] != 3.0
        assert (found["y"], found["z"]) == (3.0, 1)


def test_a_parameter_that_becomes_active_is_drawn_and_one_that_becomes_inactive_is_left_out() -> None:
    space = space_of(
        momentum={"type": "float", "low": 0.5, "high": 0.9, "when": {"kind": "sgd"}},
        beta={"type": "float", "low": 0.1, "high": 0.2, "when": {"kind": "adam"}},
        kind=["sgd", "adam"],
    )
    kinds = set()
    for seed in SEEDS:
        found = explored(space, {"kind": "sgd", "momentum": 0.6}, seed, "kind", resample=1.0)
        assert space.find_misfit(found) == ""
        if found["kind"] == "sgd":
            assert found["momentum"] == 0.6, "it is not named"
        kinds.add(found["kind"])
    assert kinds == {"sgd", "adam"}


def test_the_same_seed_gives_the_same_configuration() -> None:
    space = space_of(x={"type": "float", "low": 0.0, "high": 9.0}, kind=["a", "b", "c"])
    params: Params = {"x": 3.0, "kind": "a"}
    for seed in SEEDS:
        assert explored(space, params, seed, "x", "kind", resample=0.5) == explored(
            space, params, seed, "x", "kind", resample=0.5
        )
