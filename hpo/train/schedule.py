"""The learning rate of each step, as a function of the step alone: a resumed training needs no state of it.

    constant    lr
    cosine      lr after the warm-up, then half a cosine wave down to 0 after the last step
    one_cycle   half a cosine wave from lr / 25 up to lr, then another one down to lr / 250,000 in the last step

The warm-up of `constant` and `cosine` is a straight line. `one_cycle` is `torch.optim.lr_scheduler.OneCycleLR` with its
default numbers. Momentum and betas do not change.
"""

from __future__ import annotations

import math

from hpo.train.params import TrainParams

ONE_CYCLE_RISE = 0.3  # of the steps
ONE_CYCLE_START = 1 / 25  # of lr
ONE_CYCLE_END = ONE_CYCLE_START / 1e4  # of lr


def is_constant(params: TrainParams) -> bool:
    """Return whether every step has the learning rate `lr`."""
    return params.schedule == "constant" and params.warmup_epochs == 0


def learning_rate(params: TrainParams, step: int, *, steps_per_epoch: int, max_epochs: int) -> float:
    """Return the learning rate of a step.

    A warm-up that is longer than the training is cut off by its end.

    Args:
        params: the hyperparameters.
        step: the number of the step in the training, from 0.
        steps_per_epoch: steps.
        max_epochs: the last epoch.
    """
    total, warmup = max_epochs * steps_per_epoch, round(params.warmup_epochs * steps_per_epoch)
    if params.schedule == "one_cycle":
        return params.lr * _one_cycle(step, total, warmup or ONE_CYCLE_RISE * total)
    if step < warmup:
        return params.lr * (step + 1) / warmup
    if params.schedule == "cosine":
        return params.lr * _half_wave(1.0, 0.0, (step - warmup) / (total - warmup))
    return params.lr


def _one_cycle(step: int, total: int, rise: float) -> float:
    """Return the learning rate relative to its highest."""
    top, last = min(rise, total) - 1, total - 1
    if step <= top:
        return _half_wave(ONE_CYCLE_START, 1.0, step / top if top else 1.0)
    return _half_wave(1.0, ONE_CYCLE_END, (step - top) / (last - top))


def _half_wave(start: float, end: float, progress: float) -> float:
    """Return a value between two numbers, on half a cosine wave. Progress is in [0, 1]."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
