"""Measures the data, and the speed and memory of a configuration, before a search."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from typing import Any

import torch

from hpo.train.data import Dataset, load
from hpo.train.determinism import deterministic_kernels
from hpo.train.evaluation import GPU_BATCH, evaluate
from hpo.train.gpu import free_memory
from hpo.train.learner import Learner, split_into_batches
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


def free_gpu_bytes() -> int:
    """Return the memory of the GPU that is free, in bytes. This process has a context on it afterwards."""
    free: int = torch.cuda.mem_get_info()[0]
    return free


class Probe:
    """Some training steps of one configuration, to measure their speed and their memory.

    On a GPU the memory is that of a trial: its full batches, its smaller last batch, and a batch of the evaluation. What an
    earlier probe of this process needed does not count.

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
        precision = choose_precision(train_params.precision, device)
        if device == "cuda":
            free_memory()
            torch.cuda.reset_peak_memory_stats()
        dataset = load(**data, device=device)
        steps = 1 if device == "cpu" else self.GPU_STEPS
        self._images = dataset.train.take(torch.arange(min(steps * train_params.batch_size, len(dataset.train))))
        self._learner = Learner(train_params, precision, self._images)
        self._is_deterministic = train_params.deterministic
        try:
            with deterministic_kernels(self._is_deterministic):
                self._learner.train_epoch(seed=0)
                if device == "cuda":
                    self._run_other_batches(dataset, train_params.batch_size, precision)
        except BaseException:
            self.close()
            raise

    def _run_other_batches(self, dataset: Dataset, batch_size: int, precision: str) -> None:
        """Take a step on the last batch of an epoch, and score a batch, as a trial does."""
        last = split_into_batches(torch.arange(len(dataset.train)), batch_size)[-1]
        self._learner.take_step(torch.arange(len(last), device=self._images.device) % len(self._images))
        evaluate(self._learner.model, dataset.test.split(GPU_BATCH)[0], precision)

    def measure(self, seconds: float) -> tuple[float, int]:
        """Train for at least this long.

        Returns:
            Images per second, and the peak memory in bytes: of the tensors on a GPU, of the whole process on a CPU.
        """
        started, trained = time.perf_counter(), 0
        with deterministic_kernels(self._is_deterministic):
            while (elapsed := time.perf_counter() - started) < seconds:
                self._learner.train_epoch(seed=0)
                trained += len(self._images)
        if self._images.device.type == "cuda":
            return trained / elapsed, torch.cuda.max_memory_reserved()
        return trained / elapsed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint of the configuration contains."""
        return self._learner.state()

    def close(self) -> None:
        """Free the CUDA graph."""
        self._learner.close()
