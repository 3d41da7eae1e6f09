"""A configuration of an earlier search, as one of this search."""

from __future__ import annotations

from typing import Any

import pytest

from hpo.space.translation import TranslationError, translate
from tests.space.conftest import Load

CATEGORICAL = {"type": "categorical", "choices": ["adam", "sgd"]}
LR = {"type": "float", "low": 0.001, "high": 0.1, "log": True}


def test_values_are_matched_by_value_and_get_the_types_of_this_search(make: Load) -> None:
    space = make({"batch_size": [64, 128], "lr": LR, "layers": {"type": "int", "low": 1, "high": 4}, "stem": "cifar"})
    found = translate(space, {"batch_size": 64.0, "lr": 0.01, "layers": 2.0, "stem": "cifar"}, defaults={})
    assert found.params == {"batch_size": 64, "lr": 0.01, "layers": 2, "stem": "cifar"}
    assert [type(value) for value in found.params.values()] == [int, float, int, str]
    assert found.is_same


@pytest.mark.parametrize(
    ("parameters", "params", "reason"),
    [
        ({"batch_size": [64, 128]}, {"batch_size": 32}, "batch_size 32 is not in this search"),
        ({"flag": [True, 2]}, {"flag": 1}, "flag 1 is not in this search"),
        ({"stem": "cifar"}, {"stem": "imagenet"}, "stem 'imagenet' is not in this search"),
        ({"lr": LR}, {"lr": 0.5}, "lr was not from 0.001 to 0.1"),
        ({"n": {"type": "int", "low": 2, "high": 8, "step": 2}}, {"n": 3}, "n was not from 2 to 8 in steps of 2"),
        ({"n": {"type": "int", "low": 2, "high": 8}}, {"n": "3"}, "n was not from 2 to 8"),
        ({"lr": LR}, {"lr": 0.01, "momentum": 0.9}, "momentum is no parameter here"),
        ({"lr": LR, "width": [1, 2]}, {"lr": 0.01}, "width is new here, and has no default"),
        ({"lr": LR, "width": 2}, {"lr": 0.01}, "width is new here, and has no default"),
    ],
)
def test_what_this_search_does_not_have_is_refused(
    make: Load, parameters: dict[str, Any], params: dict[str, Any], reason: str
) -> None:
    with pytest.raises(TranslationError) as error:
        translate(make(parameters), params, defaults={})
    assert str(error.value) == reason


def test_a_new_parameter_gets_its_default_or_the_trainables(make: Load) -> None:
    space = make({"lr": LR, "optimizer": {**CATEGORICAL, "default": "sgd"}, "ema": [0.0, 0.5], "stem": "cifar"})
    found = translate(space, {"lr": 0.01}, defaults={"ema": 0.0, "stem": "cifar"})
    assert found.params == {"lr": 0.01, "optimizer": "sgd", "ema": 0.0, "stem": "cifar"}
    assert found.is_same
    known = translate(space, {"lr": 0.01}, defaults={"optimizer": "adam", "ema": 0.0, "stem": "cifar"})
    assert (known.params["optimizer"], known.is_same) == ("adam", True), (
        "what the trainable did, not what the file says"
    )
    strange = translate(space, {"lr": 0.01}, defaults={"optimizer": "lion", "ema": 0.0, "stem": "cifar"})
    assert (strange.params["optimizer"], strange.is_same) == ("sgd", False), "the nearest that this search has"
    with pytest.raises(TranslationError, match=r"ema 0\.25 is not in this search"):
        translate(space, {"lr": 0.01, "stem": "cifar"}, defaults={"ema": 0.25})


def test_a_value_of_a_range_with_steps_has_the_digits_of_the_range(make: Load) -> None:
    space = make({"x": {"type": "float", "low": 0.0, "high": 0.9, "step": 0.1}}, sampler="grid")
    known = {point["x"] for point in space.grid_points()}
    assert {translate(space, {"x": value}, defaults={}).params["x"] for value in (0.3, 0.6, 0.7, 0.9)} <= known


def test_a_parameter_that_is_gone_must_have_had_the_trainables_default(make: Load) -> None:
    space = make({"lr": LR})
    assert translate(space, {"lr": 0.01, "ema": 0.0}, defaults={"ema": 0.0}).is_same
    with pytest.raises(TranslationError, match="ema is no parameter here"):
        translate(space, {"lr": 0.01, "ema": 0.5}, defaults={"ema": 0.0})


def test_conditional_parameters_follow_the_conditions_of_this_search(make: Load) -> None:
    momentum = {"type": "float", "low": 0.0, "high": 0.99, "default": 0.9}
    space = make({"momentum": momentum | {"when": {"optimizer": "sgd"}}, "optimizer": CATEGORICAL})
    assert translate(space, {"optimizer": "sgd"}, defaults={}).params == {"optimizer": "sgd", "momentum": 0.9}
    dropped = translate(space, {"optimizer": "adam", "momentum": 0.5}, defaults={"momentum": 0.0})
    assert dropped.params == {"optimizer": "adam"}
    assert not dropped.is_same, "it was trained with another momentum than this search would"
    assert translate(space, {"optimizer": "adam", "momentum": 0.0}, defaults={"momentum": 0.0}).is_same


def test_a_derived_value_is_the_one_that_the_trial_was_trained_with(make: Load) -> None:
    space = make({"lr": LR}, derived={"warmup_epochs": "0.5 * max_epochs"})
    assert translate(space, {"lr": 0.01, "warmup_epochs": 2}, defaults={}).params == {"lr": 0.01}
    with pytest.raises(TranslationError, match="warmup_epochs was not the value that is derived here"):
        translate(space, {"lr": 0.01, "warmup_epochs": 1}, defaults={})
    with pytest.raises(TranslationError, match="warmup_epochs was not the value that is derived here"):
        translate(space, {"lr": 0.01}, defaults={"warmup_epochs": 0.0})
    with pytest.raises(TranslationError, match="warmup_epochs is derived here, and was not known there"):
        translate(space, {"lr": 0.01}, defaults={})


def test_a_value_that_was_derived_may_be_a_parameter_now(make: Load) -> None:
    space = make({"lr": LR, "warmup_epochs": [0, 2]})
    assert translate(space, {"lr": 0.01, "warmup_epochs": 2.0}, defaults={}).params["warmup_epochs"] == 2


def test_constraints_of_this_search_hold(make: Load) -> None:
    space = make({"lr": LR, "batch_size": [64, 128]}, constraints=["lr <= 0.001 * batch_size"])
    with pytest.raises(TranslationError, match=r"it breaks the constraint lr <= 0\.001 \* batch_size"):
        translate(space, {"lr": 0.1, "batch_size": 64}, defaults={})
