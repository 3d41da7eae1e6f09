"""A network in training: its weights, its optimizer and its training images, on one device."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from hpo.train.augmentation import Augmentation
from hpo.train.cuda_graph import GraphedStep, new_graph
from hpo.train.data import Images
from hpo.train.ema import WeightAverage
from hpo.train.fast_conv import in_memory_order, use_fast_convolutions
from hpo.train.network import MirrorAverage, build_model
from hpo.train.optimizer import build_optimizer
from hpo.train.params import TrainParams
from hpo.train.precision import autocast
from hpo.train.schedule import is_constant, learning_rate


class Learner:
    """A network in training. Its initial weights come from torch's global generator.

    Weights are fp32. With bf16, the multiplications of a step are in bf16 and its sums are not (autocast).

    Args:
        params: the hyperparameters.
        precision: `fp32` or `bf16`, see `choose_precision`.
        images: the training images. Their device is used.
        max_epochs: the last epoch, for a learning rate that depends on it.
    """

    def __init__(self, params: TrainParams, precision: str, images: Images, max_epochs: int = 1) -> None:
        self._params = params
        self._images = images
        self._max_epochs = max_epochs
        self._device = images.device
        self._precision = precision
        self._batch_size = min(params.batch_size, len(images))
        if self._device.type == "cpu":
            keep_freed_memory()
        model = build_model(stem=params.stem, width=params.width)
        self.model = use_fast_convolutions(model).to(self._device).to(memory_format=torch.channels_last)
        self._weights = list(self.model.parameters())
        # A learning rate that changes is a tensor, so that a CUDA graph reads it in each step. The GPU's kernels need fp32.
        dtype = torch.float64 if self._device.type == "cpu" else torch.float32
        self._lr = None if is_constant(params) else torch.zeros((), dtype=dtype, device=self._device)
        self._optimizer = build_optimizer(
            params, [in_memory_order(weight.detach()) for weight in self._weights], self._lr
        )
        self._augmentation = Augmentation(params, len(images), self._device) if Augmentation.is_used(params) else None
        self._average = WeightAverage(self.model, params.ema) if params.ema else None
        self._averaged_model = copy.deepcopy(self.model) if params.ema else None
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

    def model_to_score(self) -> nn.Module:
        """Return the network that is scored: with averaged weights or mirrored images, if the hyperparameters say so."""
        model = self.model
        if self._average is not None and self._averaged_model is not None:
            model = self._averaged_model
            self._average.copy_to(model)
        return MirrorAverage(model) if self._params.tta else model

    def state(self) -> dict[str, Any]:
        """Return the state of the network and of the optimizer. The tensors are not copied."""
        average = {} if self._average is None else {"average": self._average.state()}
        return {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict(), **average}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state` returned, on this device or another.

        The hyperparameters stay those of this learner: the state has none. They may differ from those with which the state
        was made, apart from `hpo.train.params.CHECKPOINT_PARAMS`.
        """
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._average is not None:
            self._average.restore(state["average"])

    def train_epoch(self, seed: int, epoch: int = 1) -> tuple[float, float]:
        """Train on every image once, in an order drawn from the seed.

        Args:
            seed: of this epoch.
            epoch: its number, from 1, for a learning rate that depends on it.

        Returns:
            The mean loss and the accuracy, each image scored by the weights of the step that trains on it.
        """
        self.model.train()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self._images), generator=generator).to(self._device)
        if self._augmentation is not None:
            self._augmentation.draw(generator)
        batches = split_into_batches(order, self._batch_size)
        self._loss_sum.zero_()
        self._correct.zero_()
        steps = len(batches)
        for i, indices in enumerate(batches, start=(epoch - 1) * steps):
            if self._lr is not None:
                self._lr.fill_(learning_rate(self._params, i, steps_per_epoch=steps, max_epochs=self._max_epochs))
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
        if self._augmentation is not None:
            batch = replace(batch, pixels=self._augmentation.apply(batch.pixels, indices))
        with autocast(self._device, self._precision):
            logits = self.model(batch.as_input())
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=self._params.label_smoothing)
        for weight in self._weights:
            weight.grad = None
        loss.backward()
        self._optimizer.step([in_memory_order(weight.grad) for weight in self._weights if weight.grad is not None])
        if self._average is not None:
            self._average.update()
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


@cache
def keep_freed_memory() -> None:
    """Let glibc keep memory that this process frees: each step needs the same buffers, and new pages cost page faults.

    Measured on two cores at batch size 512: 18 % more images/s with the cifar stem, 8 % with the imagenet stem.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    with suppress(OSError, AttributeError):  # another C library
        glibc = ctypes.CDLL(None)
        glibc.mallopt(m_mmap_max, 0)
        glibc.mallopt(m_trim_threshold, -1)
