"""The hyperparameters of `hpo.train:train`. Does not import torch, so that checking a search space is fast."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hpo.errors import TrainableError, nearest

OPTIMIZERS = ("adam", "adamw", "sgd")
PRECISIONS = ("auto", "fp32", "bf16")
STEMS = ("imagenet", "cifar")
CIFAR_STEM_COST = 14  # training time of the cifar stem relative to the imagenet stem
SHAPE_PARAMS = ("batch_size", "stem", "precision", "optimizer")  # those that change what a training step computes


@dataclass(frozen=True)
class TrainParams:
    """The hyperparameters of `train`. The defaults are those of the documented grid.

    Attributes:
        batch_size: images per step, at least 2.
        lr: the learning rate, constant.
        optimizer: `adam`, `adamw` or `sgd`.
        momentum: of `sgd`.
        weight_decay: L2 penalty of `adam` and `sgd`, decoupled for `adamw`.
        stem: the first layers, `imagenet` or `cifar`, see `hpo.train.network.build_model`.
        precision: of the multiplications: `fp32`, `bf16`, or `auto` for bf16 where the hardware supports it.
    """

    batch_size: int = 64
    lr: float = 0.01
    optimizer: str = "adam"
    momentum: float = 0.0
    weight_decay: float = 0.0
    stem: str = "imagenet"
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise TrainableError(f"parameters.batch_size must be at least 2 (batch norm), got {self.batch_size}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise TrainableError(f"parameters.lr must be above 0, got {self.lr}")
        for name in ("momentum", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise TrainableError(f"parameters.{name} must be at least 0, got {value}")
        for name, choices in (("optimizer", OPTIMIZERS), ("stem", STEMS), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if value not in choices:
                raise TrainableError(f"parameters.{name}: no {name} {value!r}, {nearest(value, choices)}")


def read_params(params: Mapping[str, Any]) -> TrainParams:
    """Return the hyperparameters of a trial, typed.

    Raises:
        TrainableError: a name is unknown, or a value has the wrong type or is out of range.
    """
    types = {field.name: str(field.type) for field in fields(TrainParams)}
    for name, value in params.items():
        if name not in types:
            raise TrainableError(
                f"parameters.{name}: hpo.train:train has no parameter {name!r}, {nearest(name, types)}"
            )
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_right = {"int": is_number and isinstance(value, int), "float": is_number, "str": isinstance(value, str)}
        if not is_right[types[name]]:
            raise TrainableError(f"parameters.{name} must be of type {types[name]}, got {value!r}")
    return TrainParams(**params)
