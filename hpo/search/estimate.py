"""What a search will take, measured before anything is spent on it.

    shapes of training steps -> some steps of each, trials side by side -> how many at a time -> seconds, GPU-hours, memory

The steps are trained in processes of their own, as many at the same time as trials would be: what they share, they share
in the measurement too.
"""

from __future__ import annotations

import heapq
import itertools
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hpo.errors import SettingError, TrainableError
from hpo.search.slots import Slots
from hpo.space.model import Space
from hpo.space.parameters import Params

SHAPE_PARAMS = ("batch_size", "stem", "precision", "optimizer")  # those that change what a training step computes
MAX_SHAPES = 6  # that are measured; the others count as the nearest batch size
MAX_ROWS = 50  # of a grid that is listed
MAX_TRIALS_A_GPU = 8
PROBE_SECONDS = 1.5
WORTH_SECONDS = 60.0  # a search shorter than this takes the first way to share the machine
GROWTH = 1.05  # more trials side by side must raise the throughput by this much to be worth it
GPU_MARGIN = 1.25  # of the measured peak: allocators fragment
CONTEXT_BYTES = 2**30  # that a process takes of a GPU for CUDA itself, generously


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """What a probe of one shape found.

    Attributes:
        images_per_second: of one trial, beside the others.
        memory_bytes: the peak of one trial: of the GPU, or of the process where there is none.
        checkpoint_seconds: to write one.
    """

    images_per_second: float
    memory_bytes: int
    checkpoint_seconds: float


class Probes:
    """Processes that train some steps at the same time, as trials side by side would."""

    def __init__(self, data: Mapping[str, Any], device: str) -> None:
        self._data = dict(data)
        self._device = device
        self._context = multiprocessing.get_context("spawn")
        self._children: list[tuple[Any, Connection]] = []
        self.start_seconds = 0.0  # of one process: imports and data

    def measure(self, shape: Params, slots: Slots) -> Speed | None:
        """Train steps of a shape in as many processes as share a device; None where their memory does not suffice.

        Raises:
            TrainableError: the trainable cannot be given this shape.
        """
        started, count = time.perf_counter(), _trials_per_device(slots)
        while len(self._children) < count:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_answer_probes, args=(theirs, self._data, self._device), daemon=True)
            process.start()
            theirs.close()
            self._children.append((process, ours))
        chosen = [pipe for _, pipe in self._children[:count]]
        for pipe in chosen:
            pipe.send((shape, slots.threads))
        ready = [self._hear(pipe) for pipe in chosen]
        self.start_seconds = self.start_seconds or time.perf_counter() - started
        if not all(ready):
            return None
        for pipe in chosen:
            pipe.send("go")
        speeds = [speed for pipe in chosen if (speed := self._hear(pipe)) is not None]
        if len(speeds) < count:
            return None
        return Speed(
            sum(speed.images_per_second for speed in speeds) / count,
            max(speed.memory_bytes for speed in speeds),
            max(speed.checkpoint_seconds for speed in speeds),
        )

    def _hear(self, pipe: Connection) -> Any:
        try:
            answer = pipe.recv()
        except EOFError:
            raise SettingError(
                "a probe died; give resources.cpu and resources.gpu yourself to go without probes"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._children:
            pipe.close()
            process.kill()
            process.join()
        self._children.clear()


def _answer_probes(pipe: Connection, data: dict[str, Any], device: str) -> None:
    """Prepare a shape, say so, wait for `go`, train, answer; again and again."""
    import torch

    from hpo.train.probe import Probe

    with suppress(EOFError, KeyboardInterrupt):
        while True:
            shape, threads = pipe.recv()
            try:
                torch.set_num_threads(threads)
                probe = Probe(shape, data=data, device=device)
                pipe.send("ready")
                pipe.recv()
                speed, memory = probe.measure(PROBE_SECONDS)
                pipe.send(Speed(speed, memory, _checkpoint_seconds(probe.state())))
                del probe
            except (torch.OutOfMemoryError, MemoryError):
                pipe.send(None)
            except Exception as error:  # noqa: BLE001 # whatever it is, the process that asked must hear of it
                pipe.send(TrainableError(f"a probe of {shape} failed: {type(error).__name__}: {error}"))


def _checkpoint_seconds(state: Mapping[str, Any]) -> float:
    from hpo.search.checkpoints import Checkpoint, save_checkpoint

    with tempfile.TemporaryDirectory(prefix="hpo-probe-", dir=".") as folder:
        started = time.perf_counter()
        save_checkpoint(Path(folder), Checkpoint(1, {}, dict(state)))
        return time.perf_counter() - started


# --- from measurements to a plan ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchPlan:
    """What a search will take.

    Attributes:
        slots: how trials share the machine.
        speeds: what was measured, by shape.
        tried: {trials side by side: images per second of all together}, of every way that was tried.
        trials: how many are to be run.
        seconds: from the start of the first trial to the end of the last; an upper bound where a scheduler stops trials.
        trial_seconds: of all trials together.
    """

    slots: Slots
    speeds: dict[str, Speed]
    tried: dict[int, float]
    trials: int | None
    seconds: float
    trial_seconds: float

    @property
    def gpu_hours(self) -> float:
        """What the trials take of GPUs."""
        return self.trial_seconds * self.slots.gpu / 3600


def measure_plan(
    space: Space, slots: Slots, trials: int | None, data: Mapping[str, Any], size: tuple[float, float]
) -> SearchPlan:
    """Measure the shapes of a space on this machine, choose how many trials go side by side, and add up.

    Where `resources` says auto: on a GPU as many trials as its memory bears, as long as one more raises the throughput; on
    the CPU fewer trials with more threads each, if that is faster. A search of a minute is not worth the look.

    Args:
        slots: what `plan_slots` says; kept where `resources` names numbers.
        trials: how many are to be run, None if not known.
        data: what the trainable is given.
        size: cores and GPUs of the machine or cluster.
    """
    from hpo.train.data import load

    images, shapes = load(**data), _shapes(space)
    counts = (len(images.train), len(images.validation), len(images.test))
    middle = list(shapes)[len(shapes) // 2]
    with closing(Probes(data, slots.device)) as opened:

        def plan(slots: Slots) -> SearchPlan:
            speeds = {name: _require(opened.measure(shape, slots), name) for name, shape in shapes.items()}
            points = _points(space, trials)
            lengths = [_trial_seconds(space, speeds[_nearest_shape(point, shapes)], counts) for point in points]
            together = {slots.count: slots.count * speeds[middle].images_per_second}
            return SearchPlan(
                slots, speeds, together, trials, _makespan(lengths, slots.count) + opened.start_seconds, sum(lengths)
            )

        first = best = plan(slots)
        if first.seconds < WORTH_SECONDS:
            return first
        tried = dict(first.tried)
        for candidate in _candidates(space, slots, trials, *size):
            speed = opened.measure(shapes[middle], candidate)
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


def _trials_per_device(slots: Slots) -> int:
    """Return how many trials share one GPU, or the CPU."""
    return slots.count if slots.gpu == 0 else max(1, int(1 / slots.gpu))


def _fits(speed: Speed, slots: Slots) -> bool:
    if slots.device == "cpu":
        return True
    import torch

    whole: int = torch.cuda.get_device_properties(0).total_memory
    return _trials_per_device(slots) * (GPU_MARGIN * speed.memory_bytes + CONTEXT_BYTES) <= whole


def _candidates(space: Space, slots: Slots, trials: int | None, cores: float, gpus: float) -> list[Slots]:
    """Return the other ways to share the machine that are worth a look."""
    if slots.device == "cpu":
        is_free = space.resources.cpu == "auto"
        fewer = {1, slots.count // 2} - {0, slots.count} if is_free else set()
        return [Slots(count, float(max(1, cores // count)), 0.0) for count in sorted(fewer, reverse=True)]
    if space.resources.gpu != "auto":
        return []
    most = min(MAX_TRIALS_A_GPU, int(cores // gpus), math.ceil(trials / gpus) if trials else MAX_TRIALS_A_GPU)
    shares = [(int(k * gpus), 1 / k) for k in range(2, most + 1)]
    if space.resources.cpu == "auto":
        return [Slots(count, float(max(1, cores // count)), gpu) for count, gpu in shares]
    return [Slots(count, slots.cpu, gpu) for count, gpu in shares if count * slots.cpu <= cores]


def _shapes(space: Space) -> dict[str, Params]:
    """Return the distinct shapes of training steps, by a name for people; of a large space some of them."""
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
    """Return the configurations to run: of a grid its own, of a search the shapes in turn."""
    if space.is_grid:
        return list(itertools.islice(space.grid_points(), trials))
    shapes = list(_shapes(space).values())
    return [shapes[i % len(shapes)] for i in range(trials or 1)]


def _trial_seconds(space: Space, speed: Speed, images: tuple[int, int, int]) -> float:
    train, validation, test = images
    # Evaluation is the forward third of the arithmetic; the test images are scored once.
    epoch = (train + validation / 3) / speed.images_per_second
    checkpoints = math.ceil(space.max_epochs / space.checkpoint_every) * speed.checkpoint_seconds
    return space.max_epochs * epoch + test / 3 / speed.images_per_second + checkpoints


def _makespan(lengths: Sequence[float], slots: int) -> float:
    """Return when the last trial ends if each starts as soon as a slot is free, in order."""
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
    """Tell whether this machine has the device of the trials: the driver of a cluster may have none."""
    if slots.device == "cpu":
        return True
    import torch

    return torch.cuda.is_available()
