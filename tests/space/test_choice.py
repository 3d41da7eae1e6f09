"""The sampler of a search that names none."""

from __future__ import annotations

import time
from typing import Any

import pytest

from hpo.space.choice import MAX_GP_TRIALS, MAX_LEARNING_TRIALS, SMALL_GRID
from hpo.space.grid_size import MAX_GRID_POINTS
from hpo.space.model import Space, load_space

LR = {"type": "float", "low": 0.1, "high": 1.0}
TWO = [{"metric": "accuracy", "direction": "maximize"}, {"metric": "seconds", "direction": "minimize"}]
SIX = {"lr": [0.1, 0.2, 0.3], "batch_size": [64, 128]}
OPTIMIZERS = {
    "optimizer": ["adam", "sgd"],
    "momentum": {"choices": [i / 10 for i in range(10)], "when": {"optimizer": "sgd"}},
}
SQUARE = {name: {"type": "int", "low": 1, "high": 6} for name in ("a", "b")}


def space_of(parameters: dict[str, Any], **changes: Any) -> Space:
    return Space.model_validate({"name": "s", "max_epochs": 3, "parameters": parameters} | changes)


@pytest.mark.parametrize(
    ("parameters", "changes", "name", "reason"),
    [
        (SIX, {}, "grid", "6 configurations"),
        ({"lr": 0.1}, {}, "grid", "1 configuration"),
        (SIX, {"budget": {"trials": 6}}, "grid", "6 configurations, within the budget of 6 trials"),
        (SIX, {"budget": {"trials": 5}}, "gp", "no parameter depends on another, and at most 250 trials"),
        (
            {"n": {"type": "int", "low": 1, "high": 10**9}},
            {"budget": {"trials": 50}},
            "tpe",
            "n has over 1,000,000 values, which gp would keep in memory",
        ),
        (
            {"n": {"type": "int", "low": 0, "high": 10**9, "step": 10_000}},
            {"budget": {"trials": 50}},
            "gp",
            "no parameter depends on another, and at most 250 trials",
        ),
        (
            {"n": {"type": "int", "low": 1, "high": SMALL_GRID}},
            {"budget": {"time": "1h"}},
            "grid",
            "100 configurations",
        ),
        (
            {"n": {"type": "int", "low": 0, "high": SMALL_GRID}},
            {"budget": {"time": "1h"}},
            "gp",
            "no parameter depends on another",
        ),
        (
            {"lr": LR, "layers": {"type": "int", "low": 1, "high": 3}, "momentum": 0.9},
            {"budget": {"trials": MAX_GP_TRIALS}},
            "gp",
            "no parameter depends on another, and at most 250 trials",
        ),
        (
            {"lr": LR},
            {"budget": {"trials": MAX_GP_TRIALS + 1}},
            "tpe",
            "251 trials, and gp is for at most 250",
        ),
        (OPTIMIZERS, {"budget": {"trials": 11}}, "grid", "11 configurations, within the budget of 11 trials"),
        (OPTIMIZERS, {"budget": {"trials": 10}}, "tpe", "momentum depends on another parameter"),
        (
            SQUARE,
            {"budget": {"trials": 6}, "constraints": ["a == b"]},
            "grid",
            "6 configurations, within the budget of 6",
        ),
        (
            SQUARE,
            {"budget": {"trials": 5}, "constraints": ["a == b"]},
            "gp",
            "no parameter depends on another, and at most 250 trials",
        ),
        (SQUARE, {"constraints": ["a == b"]}, "grid", "6 configurations"),
        (
            {"lr": LR},
            {"budget": {"trials": 9}, "scheduler": "asha", "max_epochs": 9},
            "gp",
            "no parameter depends on another, and at most 250",
        ),
        (
            {"lr": LR},
            {"budget": {"trials": 9}, "scheduler": {"name": "asha", "mode": "promote"}, "max_epochs": 9},
            "gp",
            "no parameter depends on another, and at most 250",
        ),
        (
            {"kind": ["a", "b"], "lr": LR | {"when": {"kind": "a"}}},
            {"budget": {"trials": 9}},
            "tpe",
            "lr depends on another parameter",
        ),
        (
            {"lr": LR, "n": {"type": "int", "low": 0, "high": 3}},
            {"scheduler": "pbt", "max_epochs": 9},
            "random",
            "the members of a population (pbt) start from independent draws",
        ),
        (SIX, {"scheduler": "pbt", "max_epochs": 9}, "random", "the members of a population (pbt) start from "),
        ({"lr": LR}, {"budget": {"trials": 9}, "objectives": TWO}, "tpe", "there are 2 objectives"),
        ({"lr": LR}, {"budget": {"trials": 9}, "objectives": TWO[:1]}, "gp", "no parameter depends on another"),
        (SIX, {"objectives": TWO}, "grid", "6 configurations"),
        ({"lr": LR}, {"budget": {"trials": MAX_LEARNING_TRIALS + 1}}, "random", "with more than 20,000 trials, a draw"),
    ],
)
def test_the_choice_and_its_reason(parameters: dict[str, Any], changes: dict[str, Any], name: str, reason: str) -> None:
    space = space_of(parameters, **changes)
    assert space.sampler.name == name
    assert space.sampler_reason.startswith(reason)
    named = space_of(parameters, **changes, sampler={"name": name})
    assert space.model_dump() == named.model_dump(), "in nothing else"


def test_counting_the_points_takes_a_bounded_time() -> None:
    """Of 10^10 combinations, the constraint leaves one."""
    parameters = {f"p{i}": {"type": "int", "low": 1, "high": 10} for i in range(10)}
    started = time.monotonic()
    sums = " + ".join(parameters)
    assert space_of(parameters, budget={"trials": 9}, constraints=[f"{sums} == 10"]).sampler.name == "gp"
    conditional = {"kind": ["a", "b"]} | {name: each | {"when": {"kind": "a"}} for name, each in parameters.items()}
    assert space_of(conditional, budget={"trials": MAX_GRID_POINTS + 1}).sampler.name == "random"
    assert time.monotonic() - started < 5


def test_auto_keeps_its_seed() -> None:
    assert space_of(SIX, sampler={"name": "auto", "seed": 4}).sampler.seed == 4


def test_a_named_sampler_needs_no_reason() -> None:
    assert not space_of(SIX, sampler="grid").sampler_reason


def test_the_study_stores_the_choice() -> None:
    settings = space_of(SIX).study_options["settings"]
    assert settings["sampler"] == {"name": "grid", "seed": None}
    assert Space.from_settings(settings).is_grid


def test_the_search_that_ships_for_the_whole_recipe_is_what_the_benchmark_found_best() -> None:
    space = load_space("extended")
    assert (space.sampler.name, space.scheduler.name) == ("gp", "asha")
