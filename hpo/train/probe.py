"""Measures the data, and the speed and memory of a configuration, before a search."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from typing import Any

import torch

from hpo.train.data import load
from hpo.train.learner import Learner
from hpo.train.params import read_params
from hpo.train.precision import choose_precision


def describe_data(data: Mapping[str, Any]) -> tuple[str, tuple[int, int, int]]:
    """Return the SHA-256 hash of a data set, and the numbers of its training, validation and test images.

    Args:
        data: the arguments of `hpo.train.data.load`, without the device.

    Raises:
        DataError: the data set is missing or too small.
    """
    dataset = load(**data)
    return dataset.sha256, (len(dataset.train), len(dataset.validation), len(dataset.test))


class Probe:
    """Some training steps of one configuration, to measure their speed and their memory.

    Args:
        params: hyperparameters, see `hpo.train.params.TrainParams`.
        data: the arguments of `hpo.train.data.load`, without the device.
        device: `cpu` or `cuda`.

    Raises:
        TrainableError: a parameter is unknown or out of range.
        DataError: the data set is missing or too small.
    """

    GPU_STEPS = 6  # more than the warm-up, so that most of them are replayed as a CUDA graph

    def __init__(self, params: Mapping[str, Any], *, data: Mapping[str, Any], device: str) -> None:
        train_params = read_params(params)
        images = load(**data, device=device).train
        steps = 1 if device == "cpu" else self.GPU_STEPS
        self._images = images.take(torch.arange(min(steps * train_params.batch_size, len(images))))
        self._learner = Learner(train_params, choose_precision(train_params.precision, device), self._images)
        self._learner.train_epoch(seed=0)

    def measure(self, seconds: float) -> tuple[float, int]:
        """Train for at least this long.

        Returns:
            Images per second, and the peak memory in bytes: of the tensors on a GPU, of the whole process on a CPU.
        """
        started, trained = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - started) < seconds:
            self._learner.train_epoch(seed=0)
            trained += len(self._images)
        if self._images.device.type == "cuda":
            return trained / elapsed, torch.cuda.max_memory_reserved()
        return trained / elapsed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint of the configuration contains."""
        return self._learner.state()
