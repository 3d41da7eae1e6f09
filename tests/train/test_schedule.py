"""The learning rate of each step: the values of torch's own schedulers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from hpo.train.params import TrainParams
from hpo.train.schedule import is_constant, learning_rate

pytestmark = pytest.mark.slow  # torch's classes import torch._dynamo

LR, STEPS, EPOCHS = 0.3, 5, 4


def ours(**params: str | float) -> list[float]:
    options = TrainParams(lr=LR, **params)  # type: ignore[arg-type]
    return [learning_rate(options, i, steps_per_epoch=STEPS, max_epochs=EPOCHS) for i in range(STEPS * EPOCHS)]


def theirs(build: Callable[[SGD], LRScheduler]) -> list[float]:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = build(optimizer)
    rates = []
    for step in range(STEPS * EPOCHS):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if step + 1 < STEPS * EPOCHS:
            scheduler.step()
    return rates


def after_warmup(optimizer: SGD, steps: int, rest: LRScheduler) -> LRScheduler:
    """A straight line from lr / steps up to lr, then another scheduler."""
    line = LinearLR(optimizer, start_factor=1 / steps, total_iters=steps - 1)
    return SequentialLR(optimizer, [line, rest], milestones=[steps])


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # SequentialLR itself passes it
@pytest.mark.parametrize(
    ("params", "build"),
    [
        ({"schedule": "constant"}, lambda o: ConstantLR(o, factor=1.0)),
        ({"schedule": "constant", "warmup_epochs": 1.4}, lambda o: after_warmup(o, 7, ConstantLR(o, factor=1.0))),
        ({"schedule": "cosine"}, lambda o: CosineAnnealingLR(o, STEPS * EPOCHS)),
        (
            {"schedule": "cosine", "warmup_epochs": 1},
            lambda o: after_warmup(o, STEPS, CosineAnnealingLR(o, STEPS * (EPOCHS - 1))),
        ),
        ({"schedule": "one_cycle"}, lambda o: OneCycleLR(o, LR, STEPS * EPOCHS, cycle_momentum=False)),
        (
            {"schedule": "one_cycle", "warmup_epochs": 2},
            lambda o: OneCycleLR(o, LR, STEPS * EPOCHS, pct_start=0.5, cycle_momentum=False),
        ),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_the_learning_rates_are_those_of_torchs_scheduler(
    params: dict[str, str | float], build: Callable[[SGD], LRScheduler]
) -> None:
    found = ours(**params)
    assert found == pytest.approx(theirs(build), rel=1e-9)
    assert (len(set(found)) == 1) == is_constant(TrainParams(lr=LR, **params))  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
def test_a_warmup_longer_than_the_training_is_cut_off_by_its_end(schedule: str) -> None:
    rates = ours(schedule=schedule, warmup_epochs=2 * EPOCHS)
    assert rates == sorted(rates)
    assert 0 < rates[0] < rates[-1] <= LR


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_training_of_a_few_steps_has_a_learning_rate(schedule: str, steps: int) -> None:
    params = TrainParams(lr=LR, schedule=schedule)
    rates = [learning_rate(params, i, steps_per_epoch=steps, max_epochs=1) for i in range(steps)]
    assert all(0 < rate <= LR for rate in rates)


def test_the_schedules_that_depend_on_the_horizon_are_marked() -> None:
    for schedule in ("constant", "cosine", "one_cycle"):
        params = TrainParams(schedule=schedule, warmup_epochs=1)
        rates = {learning_rate(params, 7, steps_per_epoch=STEPS, max_epochs=epochs) for epochs in (4, 8)}
        assert params.depends_on_horizon == (len(rates) > 1)
