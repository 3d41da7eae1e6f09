"""Estimate the time and memory of a search from measured training steps.

    shapes of training steps -> some steps of each, trials side by side -> trials at a time -> seconds, GPU-hours, memory

The steps run in separate processes, as many at the same time as trials would: they compete for the same resources.
"""

from __future__ import annotations

import heapq
import itertools
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hpo.errors import DataError, SettingError, TrainableError
from hpo.search.slots import Slots
from hpo.space.model import Space
from hpo.space.parameters import Params

SHAPE_PARAMS = ("batch_size", "stem", "precision", "optimizer")  # those that change what a training step computes
MAX_SHAPES = 6  # that are measured; the others count as the nearest batch size
MAX_TRIALS_PER_GPU = 8
PROBE_SECONDS = 1.5
WORTH_SECONDS = 60.0  # seconds; shorter searches are not optimized
GROWTH = 1.05  # more trials side by side must raise the throughput by this factor
GPU_MARGIN = 1.25  # on the measured peak: allocators fragment
CONTEXT_BYTES = 2**30  # upper bound of CUDA's own GPU memory per process
SHORT_SEARCH_IMAGES = 60_000  # image passes; below this, measuring takes longer than it saves
CIFAR_STEM_COST = 14  # training time of the cifar stem relative to the imagenet stem

ImageCounts = tuple[int, int, int]  # training, validation and test images
DataDescription = tuple[str, ImageCounts]  # sha256 of all images and labels, and their counts


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """The measurement of one shape.

    Attributes:
        images_per_second: of one trial while the others run.
        memory_bytes: peak memory of one trial: of the GPU, or of the process where there is none.
        checkpoint_seconds: time to write a checkpoint.
    """

    images_per_second: float
    memory_bytes: int
    checkpoint_seconds: float


class Probes:
    """Processes that load the data and train steps at the same time, as trials that run side by side would.

    The first process starts at once: it imports torch while Ray starts, and this process never imports it. A context
    manager: leaving the context ends the processes.

    Args:
        data: what the trainable gets as `data`.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = dict(data)
        self._context = multiprocessing.get_context("spawn")
        self._processes: list[tuple[Any, Connection]] = []
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
        description: DataDescription = self._receive(pipe)
        self.start_seconds = time.perf_counter() - self._started
        return description

    def measure(self, shape: Params, slots: Slots) -> Speed | None:
        """Train steps of a shape in as many processes as share a device.

        Returns:
            The speed of one trial next to the others; None if their memory does not suffice.

        Raises:
            TrainableError: the trainable cannot be given this shape.
        """
        count = slots.trials_per_device
        self._start_processes(count)
        pipes = [pipe for _, pipe in self._processes[:count]]
        for pipe in pipes:
            self._send(pipe, (shape, slots.threads, slots.device))
        ready = [self._receive(pipe) for pipe in pipes]
        if not all(ready):
            return None
        for pipe in pipes:
            self._send(pipe, "go")
        speeds = [speed for pipe in pipes if (speed := self._receive(pipe)) is not None]
        if len(speeds) < count:
            return None
        return Speed(
            sum(speed.images_per_second for speed in speeds) / count,
            max(speed.memory_bytes for speed in speeds),
            max(speed.checkpoint_seconds for speed in speeds),
        )

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._processes:
            pipe.close()
            process.kill()
            process.join()
        self._processes.clear()

    def _start_processes(self, count: int) -> None:
        while len(self._processes) < count:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve_probe, args=(theirs, self._data), daemon=True)
            process.start()
            theirs.close()
            self._processes.append((process, ours))

    def _send(self, pipe: Connection, request: Any) -> None:
        with _deaths_reported():
            pipe.send(request)

    def _receive(self, pipe: Connection) -> Any:
        with _deaths_reported():
            answer = pipe.recv()
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


def _serve_probe(pipe: Connection, data: dict[str, Any]) -> None:
    """Answer requests until the pipe closes: None describes the data, (shape, threads, device) trains steps."""
    from hpo.train.probe import describe_data

    with suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            request = pipe.recv()
            if request is None:
                try:
                    pipe.send(describe_data(data))
                except DataError as error:
                    pipe.send(error)
            else:
                _train_steps(pipe, data, *request)


def _train_steps(pipe: Connection, data: dict[str, Any], shape: Params, threads: int, device: str) -> None:
    """Prepare a shape, send `ready`, wait for `go`, train, send the speed; None if the memory does not suffice."""
    import torch

    from hpo.train.probe import Probe

    try:
        torch.set_num_threads(threads)
        probe = Probe(shape, data=data, device=device)
        pipe.send("ready")
        pipe.recv()
        speed, memory = probe.measure(PROBE_SECONDS)
        pipe.send(Speed(speed, memory, _checkpoint_seconds(probe.state())))
    except (torch.OutOfMemoryError, MemoryError):
        pipe.send(None)
    except EOFError:
        raise
    except Exception as error:  # noqa: BLE001 # every error is sent to the parent process
        pipe.send(TrainableError(f"a probe of {shape} failed: {type(error).__name__}: {error}"))


def _checkpoint_seconds(state: Mapping[str, Any]) -> float:
    from hpo.search.checkpoints import Checkpoint, save_checkpoint

    with tempfile.TemporaryDirectory(prefix="hpo-probe-", dir=".") as folder:
        started = time.perf_counter()
        save_checkpoint(Path(folder), Checkpoint(1, {}, dict(state)))
        return time.perf_counter() - started


# --- from measurements to a plan --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchPlan:
    """The estimated time and memory of a search.

    Attributes:
        slots: how trials share the machine.
        speeds: {shape: its measurement}.
        tried: {trials at a time: images per second of all together}, for every division that was measured.
        trials: how many trials there are to run; None if unknown.
        seconds: from the start of the first trial to the end of the last; an upper bound if a scheduler stops trials.
        trial_seconds: the time of all trials, added up.
    """

    slots: Slots
    speeds: dict[str, Speed]
    tried: dict[int, float]
    trials: int | None
    seconds: float
    trial_seconds: float

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all trials."""
        return self.trial_seconds * self.slots.gpu / 3600


def is_worth_measuring(space: Space, trials: int | None, images: ImageCounts) -> bool:
    """Return whether measuring is likely to save more time than it takes.

    Args:
        space: the search.
        trials: how many trials there are to run; None if unknown.
        images: the sizes of the data set.
    """
    if trials is None:
        return True
    train, validation, _ = images
    cost = CIFAR_STEM_COST if ("stem", "cifar") in space.examples() else 1
    return trials * space.max_epochs * (train + validation / 3) * cost > SHORT_SEARCH_IMAGES


def measure_plan(
    space: Space,
    slots: Slots,
    trials: int | None,
    probes: Probes,
    images: ImageCounts,
    size: tuple[float, float],
) -> SearchPlan:
    """Measure the shapes of a space on this machine, choose how many trials run at a time, and add up their times.

    Where `resources` is auto, a GPU gets as many trials as its memory holds, as long as one more raises the throughput. The
    CPU gets fewer trials with more threads each, if that is faster. A search of up to a minute is not optimized.

    Args:
        space: the search.
        slots: the division by `plan_slots`; it is kept where `resources` gives numbers.
        trials: how many trials there are to run; None if unknown.
        probes: the processes that measure.
        images: the sizes of the data set.
        size: cores and GPUs of the machine or cluster.

    Raises:
        SettingError: a training step does not fit into the memory of the GPU, or a measuring process died.
        TrainableError: a training step failed.
    """
    shapes = _shapes(space)
    middle = list(shapes)[len(shapes) // 2]

    def plan(slots: Slots) -> SearchPlan:
        speeds = {name: _require(probes.measure(shape, slots), name) for name, shape in shapes.items()}
        points = _points(space, trials)
        lengths = [_trial_seconds(space, speeds[_nearest_shape(point, shapes)], images) for point in points]
        together = {slots.count: slots.count * speeds[middle].images_per_second}
        seconds = _makespan(lengths, slots.count) + probes.start_seconds
        return SearchPlan(slots, speeds, together, trials, seconds, sum(lengths))

    first = best = plan(slots)
    if first.seconds < WORTH_SECONDS:
        return first
    tried = dict(first.tried)
    for candidate in _candidates(space, slots, trials, *size):
        speed = probes.measure(shapes[middle], candidate)
        if speed is None or not _fits(speed, candidate):
            break
        tried[candidate.count] = candidate.count * speed.images_per_second
        if tried[candidate.count] >= GROWTH * tried[best.slots.count]:
            best = plan(candidate)
        elif slots.device == "cuda":
            break
    return replace(best, tried=tried)


def _require(speed: Speed | None, name: str) -> Speed:
    if speed is None:
        raise SettingError(
            f"{name} does not fit into the memory of the GPU: lower it, or give resources.gpu a larger share"
        )
    return speed


def _fits(speed: Speed, slots: Slots) -> bool:
    if slots.device == "cpu":
        return True
    import torch

    whole: int = torch.cuda.get_device_properties(0).total_memory
    return slots.trials_per_device * (GPU_MARGIN * speed.memory_bytes + CONTEXT_BYTES) <= whole


def _candidates(space: Space, slots: Slots, trials: int | None, cores: float, gpus: float) -> list[Slots]:
    """Return the other divisions of the machine that are worth measuring."""
    if slots.device == "cpu":
        is_free = space.resources.cpu == "auto"
        fewer = {1, slots.count // 2} - {0, slots.count} if is_free else set()
        return [Slots(count, float(max(1, cores // count)), 0.0) for count in sorted(fewer, reverse=True)]
    if space.resources.gpu != "auto":
        return []
    most = min(MAX_TRIALS_PER_GPU, int(cores // gpus), math.ceil(trials / gpus) if trials else MAX_TRIALS_PER_GPU)
    shares = [(int(k * gpus), 1 / k) for k in range(2, most + 1)]
    if space.resources.cpu == "auto":
        return [Slots(count, float(max(1, cores // count)), gpu) for count, gpu in shares]
    return [Slots(count, slots.cpu, gpu) for count, gpu in shares if count * slots.cpu <= cores]


def _shapes(space: Space) -> dict[str, Params]:
    """Return {readable name: shape} of the training steps; a sample of them for a large space."""
    values: dict[str, list[Any]] = {}
    for name, value in space.examples():
        if name in SHAPE_PARAMS and value not in values.setdefault(name, []):
            values[name].append(value)
    shapes = [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]
    step = max(1, math.ceil(len(shapes) / MAX_SHAPES))
    return {_shape_name(shape): shape for shape in shapes[::step]}


def _shape_name(shape: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items()) or "the defaults"


def _nearest_shape(point: Mapping[str, Any], shapes: Mapping[str, Params]) -> str:
    def distance(shape: Params) -> tuple[int, float]:
        others = sum(shape[name] != point.get(name) for name in shape if name != "batch_size")
        sizes = [float(each.get("batch_size") or 64) for each in (shape, point)]
        return others, abs(math.log(sizes[0] / sizes[1]))

    return min(shapes, key=lambda name: distance(shapes[name]))


def _points(space: Space, trials: int | None) -> Sequence[Mapping[str, Any]]:
    """Return the configurations to run: the points of a grid, or the shapes in turn."""
    if space.is_grid:
        return list(itertools.islice(space.grid_points(), trials))
    shapes = list(_shapes(space).values())
    return [shapes[i % len(shapes)] for i in range(trials or 1)]


def _trial_seconds(space: Space, speed: Speed, images: ImageCounts) -> float:
    train, validation, test = images
    # Evaluation is a forward pass, a third of the arithmetic of a step. The test images are scored once.
    epoch = (train + validation / 3) / speed.images_per_second
    checkpoints = math.ceil(space.max_epochs / space.checkpoint_every) * speed.checkpoint_seconds
    return space.max_epochs * epoch + test / 3 / speed.images_per_second + checkpoints


def _makespan(lengths: Sequence[float], slots: int) -> float:
    """Return when the last trial ends, if each starts as soon as a slot is free, in order."""
    ends = [0.0] * slots
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def machine_size() -> tuple[float, float]:
    """Return the cores and the GPUs of this machine."""
    import torch

    return float(os.process_cpu_count() if hasattr(os, "process_cpu_count") else len(os.sched_getaffinity(0))), float(
        torch.cuda.device_count()
    )


def can_measure(slots: Slots) -> bool:
    """Return whether this machine has the device of the trials: the driver of a cluster may have no GPU."""
    if slots.device == "cpu":
        return True
    import torch

    return torch.cuda.is_available()
