"""Some training steps of one configuration, to measure speed and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from typing import Any

import torch

from hpo.train.data import load
from hpo.train.loop import Learner, choose_precision, keep_freed_memory
from hpo.train.params import read_params


def describe_data(data: Mapping[str, Any]) -> tuple[str, tuple[int, int, int]]:
    """Return the sha256 of all images and labels of a data set, and the counts of its training, validation and test images.

    Raises:
        DataError: the data set is not there and cannot be downloaded.
    """
    dataset = load(**data)
    return dataset.sha256, (len(dataset.train), len(dataset.validation), len(dataset.test))


class Probe:
    """Some training steps of one configuration, to see how fast they are and what memory they take.

    Args:
        params: hyperparameters, see TrainParams.
        data: what `hpo.train.data.load` takes, but for the device.
        device: `cpu` or `cuda`.
    """

    STEPS = 6  # on a GPU: past the warm-up, most of them replayed as a graph

    def __init__(self, params: Mapping[str, Any], *, data: Mapping[str, Any], device: str) -> None:
        settings = read_params(params)
        images = load(**data, device=device).train
        if device == "cpu":
            keep_freed_memory()
        steps = 1 if device == "cpu" else self.STEPS
        self._images = images.take(torch.arange(min(steps * settings.batch_size, len(images))))
        self._learner = Learner(settings, choose_precision(settings.precision, device), self._images)
        self._learner.train_epoch(seed=0)

    def measure(self, seconds: float) -> tuple[float, int]:
        """Train for at least so long; return images per second and the peak of memory in bytes.

        That is the memory of the GPU that tensors took, or all that this process ever took where there is none.
        """
        started, trained = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - started) < seconds:
            self._learner.train_epoch(seed=0)
            trained += len(self._images)
        if self._images.labels.is_cuda:
            return trained / elapsed, torch.cuda.max_memory_reserved()
        return trained / elapsed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint of the configuration would hold."""
        return self._learner.state()
