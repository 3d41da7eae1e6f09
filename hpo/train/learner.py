"""A network in training: its weights, its optimizer and its training images, on one device."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor

from hpo.train.cuda_graph import GraphedStep, new_graph
from hpo.train.data import Images
from hpo.train.fast_conv import use_fast_convolutions
from hpo.train.network import build_model
from hpo.train.optimizer import build_optimizer
from hpo.train.params import TrainParams
from hpo.train.precision import autocast


class Learner:
    """A network in training. Its initial weights come from torch's global generator.

    Weights are fp32. With bf16, the multiplications of a step are in bf16 and its sums are not (autocast).

    Args:
        params: the hyperparameters.
        precision: `fp32` or `bf16`, see `choose_precision`.
        images: the training images. Their device is used.
    """

    def __init__(self, params: TrainParams, precision: str, images: Images) -> None:
        self._images = images
        self._device = images.device
        self._precision = precision
        self._batch_size = min(params.batch_size, len(images))
        if self._device.type == "cpu":
            _keep_freed_memory()
        self.model = build_model(stem=params.stem).to(self._device).to(memory_format=torch.channels_last)
        if precision == "bf16":
            use_fast_convolutions(self.model)
        self._weights = list(self.model.parameters())
        self._optimizer = build_optimizer(params, [_in_memory_order(weight.detach()) for weight in self._weights])
        # Summed on the device and read once per epoch: reading them in each step would make the device wait for Python.
        self._loss_sum = torch.zeros((), device=self._device)
        self._correct = torch.zeros((), dtype=torch.int64, device=self._device)
        graph = new_graph(self._device)
        self._graphed = None if graph is None else GraphedStep(self._batch_size, self._device, graph)

    @property
    def is_graphed(self) -> bool | None:
        """Whether the steps are replayed as a CUDA graph; None on a CPU."""
        return None if self._graphed is None else self._graphed.is_captured

    @property
    def graph_failure(self) -> str:
        """Why the steps could not be captured as a CUDA graph; empty if nothing failed."""
        return "" if self._graphed is None else self._graphed.failure

    def close(self) -> None:
        """Free the CUDA graph. The state can still be read."""
        if self._graphed is not None:
            self._graphed.close()

    def state(self) -> dict[str, Any]:
        """Return the state of the network and of the optimizer. The tensors are not copied."""
        return {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state` returned, on this device or another."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def train_epoch(self, seed: int) -> tuple[float, float]:
        """Train on every image once, in an order drawn from the seed.

        Returns:
            The mean loss and the accuracy, each image scored by the weights of the step that trains on it.
        """
        self.model.train()
        order = torch.randperm(len(self._images), generator=torch.Generator().manual_seed(seed)).to(self._device)
        self._loss_sum.zero_()
        self._correct.zero_()
        for indices in split_into_batches(order, self._batch_size):
            self.take_step(indices)
        return float(self._loss_sum) / len(order), float(self._correct) / len(order)

    def take_step(self, indices: Tensor) -> None:
        """Take one step on the images at some positions, int64 of shape (B,), on the device."""
        if self._graphed is None:
            self._train_batch(indices)
        else:
            self._graphed(self._train_batch, indices)

    def _train_batch(self, indices: Tensor) -> None:
        """Take one step on the images at some positions, int64 of shape (B,)."""
        batch = self._images.take(indices)
        with autocast(self._device, self._precision):
            logits = self.model(batch.as_input())
            loss = F.cross_entropy(logits, batch.labels)
        for weight in self._weights:
            weight.grad = None
        loss.backward()
        self._optimizer.step([_in_memory_order(weight.grad) for weight in self._weights if weight.grad is not None])
        self._loss_sum += loss.detach() * len(indices)
        self._correct += (logits.detach().argmax(1) == batch.labels).sum()


def split_into_batches(order: Tensor, batch_size: int) -> list[Tensor]:
    """Return positions in batches of a size. The last batch is smaller if necessary, but not of one image.

    Batch norm cannot train on a single value, and the last maps are 1x1: the last image joins the batch before.
    """
    batches = list(order.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _in_memory_order(weight: Tensor) -> Tensor:
    """Return a contiguous view of a weight: (D, C, H, W) in channels-last memory format becomes (D, H, W, C)."""
    return weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight


@cache
def _keep_freed_memory() -> None:
    """Let glibc keep memory that this process frees: each step needs the same buffers, and new pages cost page faults.

    Measured on two cores at batch size 512: 18 % more images/s with the cifar stem, 8 % with the imagenet stem.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    with suppress(OSError, AttributeError):  # another C library
        glibc = ctypes.CDLL(None)
        glibc.mallopt(m_mmap_max, 0)
        glibc.mallopt(m_trim_threshold, -1)
