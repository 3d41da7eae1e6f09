"""An average of a network's weights over the steps of its training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of all weights and of the statistics of batch norm, in which later steps count more.

    After step t, step s counts in proportion to decay^(t - s). As in Adam, the sums start at 0 and are divided by the sum of
    these factors when they are read, so that the initial weights do not count.

    Args:
        model: the network, on its device. Its tensors must stay where they are.
        decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        self._sums = {name: torch.zeros_like(tensor) for name, tensor in self._tensors.items()}
        # On the device: in a CUDA graph, nothing of the host runs.
        self._remaining = torch.ones((), dtype=torch.float64, device=next(iter(self._sums.values())).device)

    @torch.no_grad()
    def update(self) -> None:
        """Include the weights after one more step. A CUDA graph can capture this."""
        torch._foreach_lerp_(list(self._sums.values()), list(self._tensors.values()), 1 - self._decay)
        self._remaining *= self._decay

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Copy the average into a network of the same shape."""
        target = model.state_dict()
        for name, average in averaged_weights(self._tensors, self.state()).items():
            target[name].copy_(average)

    def state(self) -> dict[str, Any]:
        """Return {"sums": {name: tensor}, "remaining": decay^t, a scalar}. The tensors are not copied."""
        return {"sums": self._sums, "remaining": self._remaining}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state` returned, on this device or another."""
        for name, total in self._sums.items():
            total.copy_(state["sums"][name])
        self._remaining.copy_(state["remaining"])


def averaged_weights(weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return weights with their averages instead of them, where there are any.

    Args:
        weights: the state dict of the network.
        state: of its `WeightAverage`, after at least one step.
    """
    share = 1 - float(state["remaining"])
    return {name: state["sums"][name] / share if name in state["sums"] else each for name, each in weights.items()}
