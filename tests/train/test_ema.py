"""The average of the weights: written by hand, bit by bit resumable, and of the right network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hpo.train.ema import WeightAverage, averaged_weights


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()


def change(model: nn.Module, seed: int) -> None:
    """What a step does: new weights, new statistics."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
        model(torch.randn(8, 3))


@pytest.mark.parametrize(("decay", "steps"), [(0.5, 1), (0.9, 4), (0.999, 3)])
def test_the_average_counts_each_step_by_its_power_of_the_decay(decay: float, steps: int) -> None:
    model = network()
    average = WeightAverage(model, decay)
    history = []
    for seed in range(steps):
        change(model, seed)
        average.update()
        history.append({name: tensor.double().clone() for name, tensor in model.state_dict().items()})
    counts = [decay ** (steps - 1 - i) for i in range(steps)]
    scored = copy.deepcopy(model)
    average.copy_to(scored)
    for name, found in scored.state_dict().items():
        expected = sum(count * each[name] for count, each in zip(counts, history, strict=True)) / sum(counts)
        if found.is_floating_point():
            # A difference of numbers of about 1 from sums of about 1 - decay^t.
            torch.testing.assert_close(found.double(), torch.as_tensor(expected), rtol=1e-5, atol=1e-5)
    exported = averaged_weights(model.state_dict(), average.state())
    assert all(torch.equal(exported[name], tensor) for name, tensor in scored.state_dict().items())


def test_the_network_in_training_does_not_change() -> None:
    model = network()
    change(model, 0)
    before = copy.deepcopy(model.state_dict())
    average = WeightAverage(model, 0.9)
    average.update()
    average.copy_to(copy.deepcopy(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_restored_average_continues_with_the_same_numbers_in_the_same_places() -> None:
    model = network()
    straight = WeightAverage(model, 0.9)
    change(model, 0)
    straight.update()
    state = copy.deepcopy(straight.state())
    restored = WeightAverage(model, 0.9)
    places = [tensor.data_ptr() for tensor in (*restored.state()["sums"].values(), restored.state()["remaining"])]
    restored.restore(state)
    change(model, 1)
    straight.update()
    restored.update()
    (ours, theirs) = (averaged_weights(model.state_dict(), each.state()) for each in (restored, straight))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert places == [
        tensor.data_ptr() for tensor in (*restored.state()["sums"].values(), restored.state()["remaining"])
    ]
