"""The hyperparameters of `hpo.train:train`. Imports no torch, so that a search space is checked in no time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hpo.errors import TrainableError, nearest

OPTIMIZERS = ("adam", "adamw", "sgd")
PRECISIONS = ("auto", "fp32", "bf16")
STEMS = ("imagenet", "cifar")


@dataclass(frozen=True)
class TrainParams:
    """The hyperparameters that `train` knows, with the values of the documented grid as defaults."""

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
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise TrainableError(f"parameters.{name} must be at least 0, got {getattr(self, name)}")
        for name, known in (("optimizer", OPTIMIZERS), ("stem", STEMS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise TrainableError(
                    f"parameters.{name}: no {name} {getattr(self, name)!r}, {nearest(str(getattr(self, name)), known)}"
                )


def read_params(params: Mapping[str, Any]) -> TrainParams:
    """Return the parameters of a trial in their types.

    Raises:
        TrainableError: a name that `train` does not know, a value of the wrong type or outside its choices.
    """
    known = {field.name: str(field.type) for field in fields(TrainParams)}
    for name, value in params.items():
        if name not in known:
            raise TrainableError(
                f"parameters.{name}: hpo.train:train has no parameter {name!r}, {nearest(name, known)}"
            )
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not {"int": isinstance(value, int) and number, "float": number, "str": isinstance(value, str)}[known[name]]:
            raise TrainableError(f"parameters.{name} must be of type {known[name]}, got {value!r}")
    return TrainParams(**params)
