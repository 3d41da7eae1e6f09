"""The optimizers: torch's classes, bit by bit, and their stored state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
    (
        TrainParams(optimizer="sgd", momentum=0.9, nesterov=True),
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "nesterov": True},
    ),
    (TrainParams(optimizer="adam", beta1=0.5, beta2=0.7), torch.optim.Adam, {"lr": 0.01, "betas": (0.5, 0.7)}),
    (
        TrainParams(optimizer="adamw", beta1=0.8, beta2=0.99, weight_decay=0.1),
        torch.optim.AdamW,
        {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1},
    ),
]
# In these, the first of the weights, which has one dimension, does not decay.
SPLIT_CASES: list[tuple[TrainParams, Callable[..., torch.optim.Optimizer], dict[str, Any]]] = [
    (replace(params, no_decay_norm=True, weight_decay=0.2), torch_class, {**options, "weight_decay": 0.2})
    for params, torch_class, options in CASES
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


def groups(params: TrainParams, weights: list[nn.Parameter]) -> list[dict[str, Any]]:
    """torch's parameter groups."""
    if not params.no_decay_norm:
        return [{"params": weights}]
    return [{"params": weights[1:]}, {"params": weights[:1], "weight_decay": 0.0}]


def are_equal(ours: list[Tensor], theirs: list[nn.Parameter]) -> bool:
    return all(torch.equal(our, their.detach()) for our, their in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("params", "torch_class", "options"), [*CASES, *SPLIT_CASES])
def test_steps_equal_those_of_torchs_class(
    params: TrainParams, torch_class: Callable[..., torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    weights, theirs = draw(0), [nn.Parameter(weight) for weight in draw(0)]
    take_steps(build_optimizer(params, weights), range(1, 5))
    take_torch_steps(torch_class(groups(params, theirs), fused=True, **options), theirs, range(1, 5))
    assert are_equal(weights, theirs)


@pytest.mark.parametrize(("params", "torch_class", "options"), [*CASES, *SPLIT_CASES])
def test_each_step_reads_a_learning_rate_that_changes(
    params: TrainParams, torch_class: Callable[..., torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    weights, theirs = draw(0), [nn.Parameter(weight) for weight in draw(0)]
    rate = torch.zeros((), dtype=torch.float64)
    ours, optimizer = build_optimizer(params, weights, rate), torch_class(groups(params, theirs), fused=True, **options)
    for seed, lr in enumerate((0.1, 0.03, 0.001)):
        rate.fill_(lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        take_steps(ours, range(seed, seed + 1))
        take_torch_steps(optimizer, theirs, range(seed, seed + 1))
    assert are_equal(weights, theirs)


@pytest.mark.parametrize("params", [case[0] for case in SPLIT_CASES])
def test_a_split_training_resumes_with_the_indices_of_all_weights(params: TrainParams) -> None:
    expected, weights = draw(0), draw(0)
    take_steps(build_optimizer(params, expected), range(1, 5))
    first = build_optimizer(params, weights)
    take_steps(first, range(1, 3))
    state = first.state_dict()
    for i, saved in state["state"].items():
        assert all(tensor.shape in {(), SHAPES[i]} for tensor in saved.values())
    second = build_optimizer(params, weights)
    second.load_state_dict(state)
    take_steps(second, range(3, 5))
    assert all(torch.equal(found, one) for found, one in zip(weights, expected, strict=True))


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
