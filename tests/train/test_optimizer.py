"""The optimizers: torch's classes, bit by bit, and their stored state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpo.train.optimizer import Optimizer, build_optimizer
from hpo.train.params import TrainParams

pytestmark = pytest.mark.slow  # torch's classes import torch._dynamo

SHAPES = [(3,), (5, 7), (4, 3, 3, 2)]
CASES: list[tuple[TrainParams, Callable[..., torch.optim.Optimizer], dict[str, Any]]] = [
    (TrainParams(optimizer="adam", lr=0.01), torch.optim.Adam, {"lr": 0.01}),
    (TrainParams(optimizer="adam", weight_decay=0.1), torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    (TrainParams(optimizer="adamw", weight_decay=0.1), torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (TrainParams(optimizer="adamw"), torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.0}),
    (TrainParams(optimizer="sgd"), torch.optim.SGD, {"lr": 0.01}),
    (
        TrainParams(optimizer="sgd", momentum=0.9, weight_decay=0.1, lr=0.1),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    ),
]


def draw(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def take_steps(optimizer: Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimizer.step(draw(seed))


def take_torch_steps(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        for weight, gradient in zip(weights, draw(seed), strict=True):
            weight.grad = gradient
        optimizer.step()


@pytest.mark.parametrize(("params", "torch_class", "options"), CASES)
def test_steps_equal_those_of_torchs_class(
    params: TrainParams, torch_class: Callable[..., torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    weights, theirs = draw(0), [nn.Parameter(weight) for weight in draw(0)]
    take_steps(build_optimizer(params, weights), range(1, 5))
    take_torch_steps(torch_class(theirs, fused=True, **options), theirs, range(1, 5))
    assert all(torch.equal(ours, their.detach()) for ours, their in zip(weights, theirs, strict=True))


@pytest.mark.parametrize(("params", "torch_class", "options"), CASES)
def test_training_resumes_from_a_stored_state_of_either(
    params: TrainParams, torch_class: Callable[..., torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    expected = draw(0)
    take_steps(build_optimizer(params, expected), range(1, 5))

    theirs = [nn.Parameter(weight) for weight in draw(0)]
    first = torch_class(theirs, fused=True, **options)
    take_torch_steps(first, theirs, range(1, 3))
    weights = [weight.detach().clone() for weight in theirs]
    second = build_optimizer(params, weights)
    second.load_state_dict(first.state_dict())
    take_steps(second, range(3, 4))
    third = build_optimizer(params, weights)
    third.load_state_dict(second.state_dict())
    take_steps(third, range(4, 5))
    assert all(torch.equal(found, one) for found, one in zip(weights, expected, strict=True))
