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
SCHEDULES = ("constant", "cosine", "one_cycle")
HORIZON_SCHEDULES = ("cosine", "one_cycle")  # whose learning rate at an epoch depends on max_epochs
CIFAR_STEM_COST = 14  # training time of the cifar stem relative to the imagenet stem
# Of the published network: numbers that a step keeps for the backward pass, for each image, and weights.
KEPT_NUMBERS = {"imagenet": 94_000, "cifar": 917_000}
WEIGHTS = 11_200_000
# Those that change what a training step costs, in time or memory.
SHAPE_PARAMS = ("batch_size", "stem", "width", "precision", "optimizer", "ema", "deterministic")
# Those that cannot change when a training resumes from a checkpoint: they decide what its state holds, or which kernels run
CHECKPOINT_PARAMS = ("stem", "width", "optimizer", "ema", "precision", "deterministic")
SIDE = 28  # pixels along a side of an image
CHOICES = {"optimizer": OPTIMIZERS, "stem": STEMS, "precision": PRECISIONS, "schedule": SCHEDULES}


@dataclass(frozen=True)
class TrainParams:
    """The hyperparameters of `train`. The defaults are those of the documented grid. README.md names their sources.

    Attributes:
        batch_size: images per step, at least 2.
        lr: the learning rate; with a schedule, the highest one.
        optimizer: `adam`, `adamw` or `sgd`.
        momentum: of `sgd`.
        nesterov: whether the momentum of `sgd` is Nesterov's. It has no effect if momentum is 0.
        beta1: of `adam` and `adamw`: the decay of the average of the gradients.
        beta2: of `adam` and `adamw`: the decay of the average of their squares.
        weight_decay: L2 penalty of `adam` and `sgd`, decoupled for `adamw`.
        no_decay_norm: whether the weights of batch norm and all biases are free of weight decay.
        schedule: `constant`, `cosine` or `one_cycle`, see `hpo.train.schedule`.
        warmup_epochs: epochs, not necessarily whole, in which the learning rate rises. 0 with `one_cycle`: 30 % of them.
        label_smoothing: the share of the target that is spread over all classes.
        flip: whether each image is mirrored left to right in half of the epochs, at random.
        translate: each image is moved by up to this many pixels in each direction, at random.
        erase: the probability that a random box of an image is set to 0.
        ema: the decay, per step, of the average of the weights that is scored and exported; 0 scores the weights.
        tta: whether the score of an image is the mean over the image and its mirror image.
        stem: the first layers, `imagenet` or `cifar`, see `hpo.train.network.build_model`.
        width: the number of channels of each layer, relative to the published network.
        precision: of the multiplications: `fp32`, `bf16`, or `auto` for bf16 where the hardware supports it. On a GPU, the
            convolutions of `fp32` are in TF32, as torch has it by default.
        deterministic: whether cuDNN uses only kernels that add in a fixed order. It changes nothing on a CPU.
    """

    batch_size: int = 64
    lr: float = 0.01
    optimizer: str = "adam"
    momentum: float = 0.0
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    no_decay_norm: bool = False
    schedule: str = "constant"
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    flip: bool = False
    translate: int = 0
    erase: float = 0.0
    ema: float = 0.0
    tta: bool = False
    stem: str = "imagenet"
    width: float = 1.0
    precision: str = "auto"
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise TrainableError(f"parameters.batch_size must be at least 2 (batch norm), got {self.batch_size}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise TrainableError(f"parameters.lr must be above 0, got {self.lr}")
        for name in ("momentum", "weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise TrainableError(f"parameters.{name} must be at least 0, got {value}")
        for name in ("beta1", "beta2", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainableError(f"parameters.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name, low, high in (("translate", 0, SIDE - 1), ("erase", 0, 1), ("width", 0.125, 16)):
            if not low <= getattr(self, name) <= high:
                raise TrainableError(f"parameters.{name} must be from {low} to {high}, got {getattr(self, name)}")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise TrainableError(f"parameters.{name}: no {name} {value!r}, {nearest(value, choices)}")

    @property
    def depends_on_horizon(self) -> bool:
        """Whether an epoch's training depends on max_epochs.

        Then a training to fewer epochs is not the beginning of one to more: its numbers cannot be continued, and those of
        an epoch before the last say less about the end, because the learning rate has not come down yet.
        """
        return self.schedule in HORIZON_SCHEDULES


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
        is_bool = isinstance(value, bool)
        is_number = isinstance(value, int | float) and not is_bool
        is_right = {
            "int": is_number and isinstance(value, int),
            "float": is_number,
            "str": isinstance(value, str),
            "bool": is_bool,
        }
        if not is_right[types[name]]:
            raise TrainableError(f"parameters.{name} must be of type {types[name]}, got {value!r}")
    return TrainParams(**params)
