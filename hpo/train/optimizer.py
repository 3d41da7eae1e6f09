"""Adam, AdamW and SGD in torch's fused kernels, without the import of torch._dynamo.

`torch.optim.Adam(...)` imports torch._dynamo, which takes longer than importing torch (measured: 3.5 s and 2.7 s). The
functions that do the arithmetic, such as `torch.optim.adam.adam`, do not. Updates equal those of torch's classes bit by
bit, and `state_dict` has their format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from hpo.train.params import TrainParams


class Optimizer(Protocol):
    """Updates weights in place from their gradients."""

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take one step.

        Args:
            gradients: one for each weight, in the same order, with the shape and the strides of the weight.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return {"state": {index of a weight: {name: tensor}}}. The tensors are not copied."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy the values of a `state_dict`, of this optimizer on any device, or of torch's class."""
        ...


def build_optimizer(params: TrainParams, weights: Sequence[Tensor], lr: Tensor | None = None) -> Optimizer:
    """Return the optimizer that the hyperparameters name.

    Args:
        params: the hyperparameters.
        weights: fp32, all on one device. They must be contiguous: the CPU kernel copies others back and forth each step.
        lr: the learning rate, a scalar on the same device that each step reads; None for the constant `params.lr`.
    """
    rate = params.lr if lr is None else lr
    if not params.no_decay_norm:
        return _build(params, weights, rate, params.weight_decay)
    decayed = [i for i, weight in enumerate(weights) if weight.dim() > 1]
    others = [i for i, weight in enumerate(weights) if weight.dim() <= 1]  # batch norm and biases
    return Split(
        {
            tuple(indices): _build(params, [weights[i] for i in indices], rate, weight_decay)
            for indices, weight_decay in ((decayed, params.weight_decay), (others, 0.0))
        }
    )


def _build(params: TrainParams, weights: Sequence[Tensor], lr: float | Tensor, weight_decay: float) -> Optimizer:
    if params.optimizer == "sgd":
        return SGD(weights, lr=lr, momentum=params.momentum, nesterov=params.nesterov, weight_decay=weight_decay)
    return Adam(
        weights,
        lr=lr,
        betas=(params.beta1, params.beta2),
        weight_decay=weight_decay,
        decoupled_weight_decay=params.optimizer == "adamw",
    )


class Split:
    """Several optimizers, each for some of the weights.

    Args:
        parts: {positions of its weights among all weights: optimizer}.
    """

    def __init__(self, parts: Mapping[tuple[int, ...], Optimizer]) -> None:
        self._parts = parts

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take one step, see `Optimizer`."""
        for indices, optimizer in self._parts.items():
            optimizer.step([gradients[i] for i in indices])

    def state_dict(self) -> dict[str, Any]:
        """Return the state, see `Optimizer`. The indices are those among all weights."""
        return {
            "state": {
                indices[i]: state
                for indices, optimizer in self._parts.items()
                for i, state in optimizer.state_dict()["state"].items()
            }
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy the values of a state, see `Optimizer`."""
        saved = state["state"]
        for indices, optimizer in self._parts.items():
            optimizer.load_state_dict({"state": {i: saved[k] for i, k in enumerate(indices) if k in saved}})


class Adam:
    """`torch.optim.Adam`, or `torch.optim.AdamW` with decoupled weight decay. A CUDA graph can capture its steps."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        lr: float | Tensor,
        betas: tuple[float, float],
        weight_decay: float,
        decoupled_weight_decay: bool,
    ) -> None:
        self._weights = list(weights)
        self._lr = lr
        self._betas = betas
        self._weight_decay = weight_decay
        self._decoupled_weight_decay = decoupled_weight_decay
        self._steps = [torch.zeros((), device=weight.device) for weight in weights]
        self._averages = [torch.zeros_like(weight) for weight in weights]
        self._square_averages = [torch.zeros_like(weight) for weight in weights]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take one step, see `Optimizer`."""
        adam(
            self._weights,
            list(gradients),
            self._averages,
            self._square_averages,
            [],
            self._steps,
            fused=True,
            capturable=self._weights[0].is_cuda,
            decoupled_weight_decay=self._decoupled_weight_decay,
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=self._lr,
            weight_decay=self._weight_decay,
            eps=1e-8,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state, see `Optimizer`."""
        state = zip(self._steps, self._averages, self._square_averages, strict=True)
        return {
            "state": {
                i: {"step": step, "exp_avg": average, "exp_avg_sq": square}
                for i, (step, average, square) in enumerate(state)
            }
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy the values of a state, see `Optimizer`."""
        for i, saved in state["state"].items():
            self._steps[i].copy_(saved["step"])
            self._averages[i].copy_(saved["exp_avg"])
            self._square_averages[i].copy_(saved["exp_avg_sq"])


class SGD:
    """`torch.optim.SGD`, with momentum if it is not 0."""

    def __init__(
        self, weights: Sequence[Tensor], *, lr: float | Tensor, momentum: float, nesterov: bool, weight_decay: float
    ) -> None:
        self._weights = list(weights)
        self._lr = lr
        self._momentum = momentum
        self._nesterov = nesterov
        self._weight_decay = weight_decay
        self._velocities: list[Tensor | None] = [None] * len(weights) if momentum else []  # None until the first step

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take one step, see `Optimizer`."""
        sgd(
            self._weights,
            list(gradients),
            self._velocities,
            fused=True,
            weight_decay=self._weight_decay,
            momentum=self._momentum,
            lr=self._lr,
            dampening=0.0,
            nesterov=self._nesterov,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state, see `Optimizer`."""
        velocities = enumerate(self._velocities)
        return {"state": {i: {"momentum_buffer": velocity} for i, velocity in velocities if velocity is not None}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy the values of a state, see `Optimizer`. Without momentum, velocities of one with momentum are left out."""
        for i, saved in state["state"].items() if self._momentum else ():
            velocity = self._velocities[i]
            # In place if it exists: a CUDA graph has its address.
            self._velocities[i] = velocity = torch.empty_like(self._weights[i]) if velocity is None else velocity
            velocity.copy_(saved["momentum_buffer"])
