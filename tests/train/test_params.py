"""The hyperparameters: their defaults, and errors that say what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from hpo.errors import TrainableError
from hpo.train.params import TrainParams, read_params


def test_the_defaults_are_the_documented_recipe() -> None:
    assert read_params({}) == TrainParams(batch_size=64, lr=0.01, optimizer="adam", stem="imagenet")


def test_a_float_may_be_written_as_an_integer() -> None:
    assert read_params({"lr": 1}).lr == 1


@pytest.mark.parametrize(
    ("params", "fragments"),
    [
        ({"batchsize": 64}, ["parameters.batchsize: ", "no parameter 'batchsize'", "did you mean batch_size?"]),
        ({"dropout": 0.5}, ["parameters.dropout: ", "allowed: batch_size, lr, optimizer"]),
        ({"optimizer": "adm"}, ["parameters.optimizer: ", "'adm'", "did you mean adam?"]),
        ({"optimizer": "lion"}, ["parameters.optimizer: ", "'lion'", "allowed: adam, adamw, sgd"]),
        ({"stem": "cifr"}, ["parameters.stem: ", "'cifr'", "did you mean cifar?"]),
        ({"precision": "fp16"}, ["parameters.precision: ", "'fp16'", "did you mean bf16?"]),
        ({"batch_size": 64.0}, ["parameters.batch_size must be of type int", "64.0"]),
        ({"batch_size": True}, ["parameters.batch_size must be of type int", "True"]),
        ({"batch_size": "64"}, ["parameters.batch_size must be of type int", "'64'"]),
        ({"lr": "0.1"}, ["parameters.lr must be of type float", "'0.1'"]),
        ({"lr": None}, ["parameters.lr must be of type float", "None"]),
        ({"lr": False}, ["parameters.lr must be of type float", "False"]),
        ({"optimizer": 3}, ["parameters.optimizer must be of type str", "3"]),
        ({"batch_size": 1}, ["parameters.batch_size must be at least 2", "batch norm", "1"]),
        ({"lr": 0}, ["parameters.lr must be above 0", "got 0"]),
        ({"lr": float("inf")}, ["parameters.lr must be above 0", "inf"]),
        ({"momentum": -0.1}, ["parameters.momentum must be at least 0", "-0.1"]),
        ({"weight_decay": float("nan")}, ["parameters.weight_decay must be at least 0", "nan"]),
        ({"schedule": "cosin"}, ["parameters.schedule: ", "'cosin'", "did you mean cosine?"]),
        ({"warmup_epochs": -1}, ["parameters.warmup_epochs must be at least 0", "-1"]),
        ({"warmup_epochs": float("inf")}, ["parameters.warmup_epochs must be at least 0", "inf"]),
        ({"deterministic": 1}, ["parameters.deterministic must be of type bool", "1"]),
        ({"nesterov": 1}, ["parameters.nesterov must be of type bool", "1"]),
        ({"no_decay_norm": "true"}, ["parameters.no_decay_norm must be of type bool", "'true'"]),
        ({"flip": 0.5}, ["parameters.flip must be of type bool", "0.5"]),
        ({"tta": None}, ["parameters.tta must be of type bool", "None"]),
        ({"beta1": 1}, ["parameters.beta1 must be at least 0 and below 1", "got 1"]),
        ({"beta2": -0.1}, ["parameters.beta2 must be at least 0 and below 1", "-0.1"]),
        ({"label_smoothing": 1.0}, ["parameters.label_smoothing must be at least 0 and below 1", "1.0"]),
        ({"ema": float("nan")}, ["parameters.ema must be at least 0 and below 1", "nan"]),
        ({"translate": 28}, ["parameters.translate must be from 0 to 27", "28"]),
        ({"translate": 1.5}, ["parameters.translate must be of type int", "1.5"]),
        ({"erase": 1.1}, ["parameters.erase must be from 0 to 1", "1.1"]),
        ({"width": 0}, ["parameters.width must be from 0.125 to 16", "got 0"]),
        ({"width": float("nan")}, ["parameters.width must be from 0.125 to 16", "nan"]),
    ],
)
def test_a_wrong_parameter_is_an_error_with_what_is_allowed(params: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(TrainableError) as caught:
        read_params(params)
    for fragment in fragments:
        assert fragment in str(caught.value)
