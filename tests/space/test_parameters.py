"""What is drawn and what a grid holds where parameters depend on each other."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from hpo.errors import SpaceError
from hpo.space.model import Space, load_space
from hpo.space.parameters import sample

Make = Callable[..., Space]

CHAIN = {
    # Declared before what they depend on: the order of the file does not matter.
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


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(parameters: dict[str, Any], **more: Any) -> Space:
        path = tmp_path / "space.yaml"
        fields = {"sampler": "random", "max_epochs": 4, "budget": {"trials": 9}, "parameters": parameters}
        path.write_text(json.dumps(fields | more))
        return load_space(str(path))

    return make


def is_consistent(params: dict[str, Any]) -> bool:
    """Whether exactly the active parameters of CHAIN are there, said in another way than the code does."""
    wanted = {"optimizer", "big"}
    if params["optimizer"] == "sgd":
        wanted |= {"momentum"} | ({"nesterov"} if params["momentum"] > 0 else set())
    elif params["big"] is True:
        wanted |= {"beta"}
    return set(params) == wanted


def test_a_grid_expands_only_where_a_parameter_is_active(make: Make) -> None:
    points = list(make(CHAIN, sampler="grid").grid())
    assert all(map(is_consistent, points))
    # sgd: big x (momentum 0 | two momenta x nesterov); adam and adamw: two betas if big, else none.
    assert len(points) == 2 * (1 + 2 * 2) + 2 * (2 + 1)
    assert len({json.dumps(point, sort_keys=True) for point in points}) == len(points)


def test_a_draw_has_the_active_parameters_and_no_others(make: Make) -> None:
    space = make(CHAIN)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen: Counter[frozenset[str]] = Counter()
    for _ in range(200):
        trial = study.ask()
        assert space.draw(trial) == ""
        assert is_consistent(trial.params)
        seen[frozenset(trial.params)] += 1
        study.tell(trial, 0.5)
    assert len(seen) == 4, "every combination occurs"


def test_true_is_not_one_and_one_is_one_point_zero(make: Make) -> None:
    points = list(
        make(
            {
                "a": [0, 1],
                "b": {"choices": ["x"], "when": {"a": 1.0}},
                "c": [True],
                "d": {"choices": [5], "when": {"c": True}},
            },
            sampler="grid",
        ).grid()
    )
    assert points == [{"a": 0, "c": True, "d": 5}, {"a": 1, "b": "x", "c": True, "d": 5}]
    with pytest.raises(SpaceError, match="a is never True"):
        make({"a": [0, 1], "b": {"choices": ["x"], "when": {"a": True}}})


def test_grid_points_that_break_a_constraint_are_left_out(make: Make) -> None:
    space = make(
        {"a": [1, 2, 3], "b": [1, 2, 3]}, sampler="grid", constraints=["a < b", "sum != 4"], derived={"sum": "a + b"}
    )
    assert list(space.grid_points()) == [{"a": 1, "b": 2}, {"a": 2, "b": 3}]


def test_a_draw_that_breaks_a_constraint_says_which(make: Make) -> None:
    space = make({"a": {"type": "int", "low": 1, "high": 9}}, constraints=["a > 4", "a < 8"])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(40):
        trial = study.ask()
        broken = space.draw(trial)
        a = trial.params["a"]
        assert broken == ("a > 4" if a <= 4 else "a < 8" if a >= 8 else "")


def test_derived_values_are_of_the_configuration_and_its_epochs(make: Make) -> None:
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
def test_a_random_sample_lies_in_the_distribution_that_storage_is_told(make: Make, parameter: Any) -> None:
    space = make({"p": parameter})
    distribution = space.distributions()["p"]
    rng = random.Random(0)
    values = [sample(space.parameters, rng)["p"] for _ in range(300)]
    assert all(distribution._contains(distribution.to_internal_repr(value)) for value in values)
    assert all(space.parameters["p"].takes(value) for value in values)
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
def test_a_default_may_be_any_value_of_the_distribution(make: Make, parameter: Any) -> None:
    assert make({"p": parameter}).parameters["p"].default == parameter["default"]  # type: ignore[union-attr]


def test_a_space_may_have_two_hundred_parameters_in_one_chain(make: Make) -> None:
    chain = {f"p{i}": {"choices": [1], "when": {f"p{i - 1}": 1}} for i in range(199, 0, -1)} | {"p0": [1]}
    space = make(chain, sampler="grid")
    assert list(space.grid_points()) == [dict.fromkeys((f"p{i}" for i in range(200)), 1)]
