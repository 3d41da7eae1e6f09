"""Sampling and grids, also where parameters depend on each other."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import optuna
import pytest

from hpo.errors import SpaceError
from hpo.space.parameters import is_same, sample_params
from tests.space.conftest import Load

CHAIN = {
    # Each is declared before the parameters that it depends on: the order of the file does not matter.
    "nesterov": {"choices": [True, False], "when": {"momentum": [0.5, 0.9]}},
    "momentum": {"type": "categorical", "choices": [0, 0.5, 0.9], "when": {"optimizer": "sgd"}},
    "optimizer": ["sgd", "adam", "adamw"],
    "beta": {
        "type": "float",
        "low": 0.5,
        "high": 1.0,
        "step": 0.5,
        "when": {"optimizer": ["adam", "adamw"], "big": True},
    },
    "big": [True, False],
}


def is_consistent(params: dict[str, Any]) -> bool:
    """Return whether exactly the active parameters of CHAIN are present. This is independent of the code under test."""
    expected = {"optimizer", "big"}
    if params["optimizer"] == "sgd":
        expected |= {"momentum"} | ({"nesterov"} if params["momentum"] > 0 else set())
    elif params["big"] is True:
        expected |= {"beta"}
    return set(params) == expected


def test_a_grid_varies_a_parameter_only_where_it_is_active(make: Load) -> None:
    points = list(make(CHAIN, sampler="grid").grid_points())
    assert all(map(is_consistent, points))
    # sgd: big x (momentum 0 | two momenta x nesterov); adam and adamw: two betas if big, else none.
    assert len(points) == 2 * (1 + 2 * 2) + 2 * (2 + 1)
    assert len({json.dumps(point, sort_keys=True) for point in points}) == len(points)


def test_a_trial_has_exactly_the_active_parameters(make: Load) -> None:
    space = make(CHAIN)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen: Counter[frozenset[str]] = Counter()
    for _ in range(200):
        trial = study.ask()
        assert space.draw(trial) == ""
        assert is_consistent(trial.params)
        seen[frozenset(trial.params)] += 1
        study.tell(trial, 0.5)
    assert len(seen) == 4  # every combination


def test_a_condition_distinguishes_true_from_1_but_not_1_from_1_point_0(make: Load) -> None:
    points = list(
        make(
            {
                "a": [0, 1],
                "b": {"choices": ["x"], "when": {"a": 1.0}},
                "c": [True],
                "d": {"choices": [5], "when": {"c": True}},
            },
            sampler="grid",
        ).grid_points()
    )
    assert points == [{"a": 0, "c": True, "d": 5}, {"a": 1, "b": "x", "c": True, "d": 5}]
    with pytest.raises(SpaceError, match="a is never true"):
        make({"a": [0, 1], "b": {"choices": ["x"], "when": {"a": True}}})


def test_a_grid_leaves_out_points_that_violate_a_constraint(make: Load) -> None:
    space = make(
        {"a": [1, 2, 3], "b": [1, 2, 3]}, sampler="grid", constraints=["a < b", "sum != 4"], derived={"sum": "a + b"}
    )
    assert list(space.grid_points()) == [{"a": 1, "b": 2}, {"a": 2, "b": 3}]


def test_a_draw_returns_the_first_constraint_that_it_violates(make: Load) -> None:
    space = make({"a": {"type": "int", "low": 1, "high": 9}}, constraints=["a > 4", "a < 8"])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(40):
        trial = study.ask()
        violated = space.draw(trial)
        a = trial.params["a"]
        assert violated == ("a > 4" if a <= 4 else "a < 8" if a >= 8 else "")


def test_derived_values_use_the_parameters_and_max_epochs(make: Load) -> None:
    space = make({"lr": [0.5, 0.25]}, derived={"warmup_epochs": "0.5 * max_epochs", "lr_end": "lr / warmup_epochs"})
    assert space.derive({"lr": 0.5}) == {"warmup_epochs": 2.0, "lr_end": 0.25}
    assert set(space.examples()) == {
        ("lr", 0.5), ("lr", 0.25), ("warmup_epochs", 2.0), ("lr_end", 0.25), ("lr_end", 0.125),
    }  # fmt: skip


@pytest.mark.parametrize(
    "parameter",
    [
        [1, "x", None],
        5,
        {"type": "int", "low": 3, "high": 17, "step": 7},
        {"type": "int", "low": 1, "high": 1000, "log": True},
        {"type": "float", "low": 0.1, "high": 0.7, "step": 0.2},
        {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
        {"type": "float", "low": -1, "high": -1},
        {"type": "int", "low": -(2**53), "high": 2**53},
    ],
)
def test_a_random_sample_is_in_the_optuna_distribution(make: Load, parameter: Any) -> None:
    space = make({"p": parameter})
    distribution = space.distributions()["p"]
    rng = random.Random(0)
    values = [sample_params(space.parameters, rng)["p"] for _ in range(300)]
    assert all(distribution._contains(distribution.to_internal_repr(value)) for value in values)
    assert all(space.parameters["p"].contains(value) for value in values)
    assert distribution.single() == (len(set(values)) == 1)


@pytest.mark.parametrize(
    "parameter",
    [
        {"choices": ["sgd", None], "default": None},
        {"type": "int", "low": 0, "high": 10, "step": 5, "default": 5},
        {"type": "float", "low": 0, "high": 1, "step": 0.1, "default": 0.3},
        {"type": "float", "low": 0, "high": 1, "default": 1},
    ],
)
def test_a_default_can_be_any_value_of_the_parameter(make: Load, parameter: Any) -> None:
    assert make({"p": parameter}).parameters["p"].default == parameter["default"]  # type: ignore[union-attr]


def test_two_hundred_parameters_can_depend_on_each_other_in_one_chain(make: Load) -> None:
    chain = {f"p{i}": {"choices": [1], "when": {f"p{i - 1}": 1}} for i in range(199, 0, -1)} | {"p0": [1]}
    space = make(chain, sampler="grid")
    assert list(space.grid_points()) == [dict.fromkeys((f"p{i}" for i in range(200)), 1)]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(1, 1.0, True), (1, True, False), (0, False, False), ("1", 1, False), (None, None, True), (None, 0, False)],
)
def test_values_are_compared_as_the_user_sees_them(one: Any, other: Any, same: bool) -> None:
    assert is_same(one, other) == same


@pytest.mark.parametrize(
    ("parameter", "inside", "outside"),
    [
        (5, [5, 5.0], [6, "5", None]),
        ([1, "x", None], [1.0, "x", None], [True, "y"]),
        ({"type": "int", "low": 0, "high": 10, "step": 5}, [0, 5, 10.0], [-5, 3, 15, 5.5, True, "5", None]),
        ({"type": "float", "low": 0, "high": 1}, [0, 0.3, 1], [-0.1, 1.1, True, "0"]),
        ({"type": "float", "low": 0, "high": 1, "step": 0.1}, [0.3, 0.7, 1], [0.35]),
    ],
)
def test_a_parameter_contains_its_values(make: Load, parameter: Any, inside: list[Any], outside: list[Any]) -> None:
    found = make({"p": parameter}).parameters["p"]
    assert [value for value in inside if not found.contains(value)] == []
    assert [value for value in outside if found.contains(value)] == []
