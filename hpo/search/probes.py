"""Processes that measure training steps before a search.

They train at the same time, as trials that run side by side would: they compete for the same resources.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hpo.errors import DataError, SettingError, TrainableError
from hpo.search.slots import Slots
from hpo.search.subprocesses import PythonProcess, start_python
from hpo.space.parameters import Params

PROBE_SECONDS = 1.5
ANSWER_SECONDS = {"cpu": 1800.0, "cuda": 300.0}  # for an answer: one step of a large batch on a slow CPU takes minutes
DATA_SECONDS = 1800.0  # for the description of the data, which may be downloaded
READY = "ready"
GO = "go"
STOP = "stop"
SCRATCH_PREFIX = "hpo-probe-"

ImageCounts = tuple[int, int, int]  # training, validation and test images
DataDescription = tuple[str, ImageCounts]  # sha256 of all images and labels, and their counts


@dataclass(frozen=True)
class Speed:
    """The measurement of one shape.

    Attributes:
        images_per_second: of one trial while the others run.
        memory_bytes: peak memory of one trial: of the GPU, or of the process where there is none.
        checkpoint_seconds: time to write a checkpoint.
        free_bytes: memory of the GPU that was free before, next to the CUDA context of one process; 0 on a CPU.
    """

    images_per_second: float
    memory_bytes: int
    checkpoint_seconds: float
    free_bytes: int = 0


class Probes:
    """Processes that load the data and train steps at the same time, as trials that run side by side would.

    The first process starts at once: it imports torch while Ray starts, and this process never imports it. A context
    manager: leaving the context ends the processes.

    Args:
        data: what the trainable gets as `data`.
        runs_dir: where trials store their checkpoints: writing one is timed there, if the folder exists.
    """

    def __init__(self, data: Mapping[str, Any], runs_dir: Path) -> None:
        # This process owns the folder: a probe that is killed leaves nothing behind.
        self._scratch = tempfile.TemporaryDirectory(
            prefix=SCRATCH_PREFIX, dir=runs_dir if os.access(runs_dir, os.W_OK) else None, ignore_cleanup_errors=True
        )
        self._setup = (dict(data), Path(self._scratch.name))
        self._processes: list[PythonProcess] = []
        self._started = time.perf_counter()
        self._start_processes(1)
        self.start_seconds = 0.0  # of one process: imports and data

    def __enter__(self) -> Probes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe_data(self) -> DataDescription:
        """Return the hash and the sizes of the data set.

        Raises:
            DataError: the data set is not there and cannot be downloaded.
        """
        pipe = self._processes[0][1]
        self._send(pipe, None)
        description: DataDescription = _unless_error(self._receive(pipe, DATA_SECONDS))
        self.start_seconds = time.perf_counter() - self._started
        return description

    def measure(self, shape: Params, slots: Slots) -> Speed | None:
        """Train steps of a shape in as many processes as share a device.

        Returns:
            The speed of one trial next to the others; None if their memory does not suffice.

        Raises:
            TrainableError: the trainable cannot be given this shape.
            SettingError: a process died, or does not answer.
        """
        count = slots.trials_per_device
        self._start_processes(count)
        pipes = [pipe for _, pipe in self._processes[:count]]
        for pipe in pipes:
            self._send(pipe, (shape, slots.threads, slots.device))
        answers = [self._receive(pipe, ANSWER_SECONDS[slots.device]) for pipe in pipes]
        is_ready = all(answer == READY for answer in answers)
        for pipe, answer in zip(pipes, answers, strict=True):
            if answer == READY:  # one that found no room or failed waits for nothing
                self._send(pipe, GO if is_ready else STOP)
        if is_ready:
            answers = [self._receive(pipe, ANSWER_SECONDS[slots.device]) for pipe in pipes]
        speeds = [answer for answer in map(_unless_error, answers) if isinstance(answer, Speed)]
        if len(speeds) < count:
            return None
        return Speed(
            sum(speed.images_per_second for speed in speeds) / count,
            max(speed.memory_bytes for speed in speeds),
            max(speed.checkpoint_seconds for speed in speeds),
            max(speed.free_bytes for speed in speeds),
        )

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.close()
        self._processes.clear()
        self._scratch.cleanup()

    def _start_processes(self, count: int) -> None:
        while len(self._processes) < count:
            child = start_python(serve)
            self._processes.append(child)
            self._send(child.pipe, self._setup)

    def _send(self, pipe: Connection, request: Any) -> None:
        with _deaths_reported():
            pipe.send(request)

    def _receive(self, pipe: Connection, seconds: float) -> Any:
        """Return an answer, which may be an error."""
        with _deaths_reported():
            if not pipe.poll(seconds):
                raise SettingError(
                    f"a process that measures training speed has not answered for {seconds:g} s. See what "
                    "uses the CPU or the GPU (`top`, `nvidia-smi`), and try again"
                )
            return pipe.recv()


def _unless_error(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextmanager
def _deaths_reported() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError):
        raise SettingError(
            "a process that measures training speed died, probably for lack of memory: set resources.cpu and "
            "resources.gpu to numbers, or close other programs"
        ) from None


def serve(file_descriptor: int) -> None:
    """Run a probe process: answer requests until the pipe closes.

    The first message is (data, scratch folder). Then None describes the data, and (shape, threads, device) trains steps, see
    `_train_steps`.

    Args:
        file_descriptor: of the pipe.
    """
    from hpo.train.probe import describe_data

    with suppress(EOFError, BrokenPipeError), Connection(file_descriptor) as pipe:
        data, scratch = pipe.recv()
        while True:
            request = pipe.recv()
            if request is None:
                try:
                    pipe.send(describe_data(data))
                except DataError as error:
                    pipe.send(error)
            else:
                _train_steps(pipe, data, scratch, *request)


def _train_steps(
    pipe: Connection, data: dict[str, Any], scratch: Path, shape: Params, threads: int, device: str
) -> None:
    """Prepare a shape, send `ready`, wait for `go`, train, send the speed; None if the memory does not suffice.

    After `stop` instead of `go`, nothing is sent: another process was not ready.
    """
    import torch

    from hpo.train.gpu import is_out_of_memory
    from hpo.train.probe import Probe

    try:
        torch.set_num_threads(threads)
        free = _free_bytes(device)
        with closing(Probe(shape, data=data, device=device)) as probe:
            pipe.send(READY)
            if pipe.recv() == STOP:
                return
            speed, memory = probe.measure(PROBE_SECONDS)
            pipe.send(Speed(speed, memory, _checkpoint_seconds(probe.state(), scratch), free))
    except EOFError:
        raise
    except Exception as error:  # noqa: BLE001 # every error is sent to the parent process
        if is_out_of_memory(error):
            pipe.send(None)
        else:
            pipe.send(TrainableError(f"a probe of {shape} failed: {type(error).__name__}: {error}"))


@cache
def _free_bytes(device: str) -> int:
    """Return the memory of the GPU that was free before this process used any; 0 for a CPU."""
    from hpo.train.probe import free_gpu_bytes

    return free_gpu_bytes() if device == "cuda" else 0


def _checkpoint_seconds(state: Mapping[str, Any], scratch: Path) -> float:
    from hpo.search.checkpoints.files import Checkpoint, save_checkpoint

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        started = time.perf_counter()
        save_checkpoint(Path(folder), Checkpoint(1, {}, dict(state)))
        return time.perf_counter() - started
