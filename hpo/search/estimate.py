"""Estimate the time and memory of a search from measured training steps.

    shapes of training steps -> some steps of each, trials side by side -> trials at a time -> seconds, GPU-hours, memory

`hpo.search.probes` measures the steps.
"""

from __future__ import annotations

import heapq
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpo.errors import SettingError, TrainableError
from hpo.search.checkpoints.writer import COST_SHARE
from hpo.search.probes import ImageCounts, Probes, Speed
from hpo.search.slots import CONTEXT_BYTES, Node, Slots, count_room, share_cores
from hpo.space.model import Space
from hpo.space.parameters import Params
from hpo.train.params import CIFAR_STEM_COST, KEPT_NUMBERS, SHAPE_PARAMS, WEIGHTS, TrainParams

MAX_SHAPES = 6  # that are measured; the others count as the nearest batch size
MAX_TRIALS_PER_GPU = 8
WORTH_SECONDS = 60.0  # seconds; shorter searches are not optimized
GROWTH = 1.05  # more trials side by side must raise the throughput by this factor
GPU_MARGIN = 1.25  # on the measured peak: allocators fragment
SHORT_SEARCH_IMAGES = 60_000  # image passes; below this, measuring takes longer than it saves


@dataclass(frozen=True)
class SearchEstimate:
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

    @property
    def device_seconds(self) -> float:
        """Device-seconds of all trials, of GPUs or of trials on the CPU."""
        return self.trial_seconds * self.slots.devices


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
    examples = list(space.examples())
    cost = float(CIFAR_STEM_COST if ("stem", "cifar") in examples else 1)
    # The arithmetic of a convolution grows with its channels in and with its channels out.
    cost *= max((value**2 for name, value in examples if name == "width" and isinstance(value, int | float)), default=1)
    return trials * space.replicates * space.max_epochs * (train + validation / 3) * cost > SHORT_SEARCH_IMAGES


def estimate_search(
    space: Space,
    slots: Slots,
    trials: int | None,
    probes: Probes,
    images: ImageCounts,
    nodes: Sequence[Node],
    begun: Sequence[tuple[Params, int]] = (),
) -> SearchEstimate:
    """Measure the shapes of a space on this machine, choose how many trials run at a time, and add up their times.

    Where `resources` is auto, a GPU gets as many trials as its memory holds, as long as one more raises the throughput. If
    more trials side by side cannot be measured, for lack of memory or any other reason, fewer of them run. The
    CPU gets fewer trials with more threads each, if that is faster. A search of up to a minute is not optimized.

    Args:
        space: the search.
        slots: the division by `plan_slots`; it is kept where `resources` gives numbers.
        trials: how many trials there are to run; None if unknown.
        probes: the processes that measure.
        images: the sizes of the data set.
        nodes: the machines of the search.
        begun: (configuration, epoch) of the trials that start after an epoch of another trial. They run first.

    Raises:
        SettingError: a training step does not fit into the memory of the GPU, or a measuring process died.
        TrainableError: a training step failed.
    """
    shapes = _shapes(space)
    middle = list(shapes)[len(shapes) // 2]

    def side_by_side(slots: Slots) -> Slots:
        """Return those of one machine: its trials compete, not those of others."""
        return replace(slots, count=min(slots.count, max(node.room(slots.cpu, slots.gpu) for node in nodes)))

    def add_up(slots: Slots, speeds: dict[str, Speed]) -> SearchEstimate:
        lengths = [
            _trial_seconds(space, speeds[_nearest_shape(point, shapes)], images, _count_views(space, point), epochs)
            for point, epochs in _points(space, trials, begun)
        ]
        together = {slots.count: slots.count * speeds[middle].images_per_second}
        seconds = _makespan(lengths, slots.count) + probes.start_seconds
        return SearchEstimate(slots, speeds, together, trials, seconds, sum(lengths))

    alone = side_by_side(slots)
    measured = {name: _require(probes.measure(shape, alone), name, space, slots) for name, shape in shapes.items()}
    first = best = add_up(slots, measured)
    if first.seconds < WORTH_SECONDS:
        return first
    tried = dict(first.tried)
    for candidate in _candidates(space, slots, trials, nodes):
        speeds = _measure_together(probes, {middle: shapes[middle]}, side_by_side(candidate), space.replicates)
        if not speeds:
            break
        tried[candidate.count] = candidate.count * speeds[middle].images_per_second
        if tried[candidate.count] >= GROWTH * tried[best.slots.count]:
            speeds = _measure_together(probes, shapes, side_by_side(candidate), space.replicates)
            if not speeds:
                break
            best = add_up(candidate, speeds)
        elif slots.device == "cuda":
            break
    if best.slots.device == "cuda" and space.resources.gpu == "auto":
        most = max(speed.memory_bytes for speed in best.speeds.values())
        best = replace(best, slots=replace(best.slots, trial_bytes=int(space.replicates * GPU_MARGIN * most)))
    return replace(best, tried=tried)


def _require(speed: Speed | None, name: str, space: Space, slots: Slots) -> Speed:
    if speed is None:
        raise SettingError(
            f"{name} does not fit into the memory of the GPU: lower it, or give resources.gpu a larger share"
        )
    if space.replicates > 1 and not _fits(speed, slots, space.replicates):
        raise SettingError(
            f"{name} does not fit into the memory of the GPU {space.replicates} times, {speed.memory_bytes / 2**30:.1f} GiB "
            f"each of {speed.free_bytes / 2**30:.1f} GiB: lower it or replicates, or give resources.gpu a larger share"
        )
    return speed


def _measure_together(probes: Probes, shapes: Mapping[str, Params], slots: Slots, replicates: int) -> dict[str, Speed]:
    """Measure shapes for a division that the search can do without; empty if one of them does not fit or fails."""
    speeds: dict[str, Speed] = {}
    for name, shape in shapes.items():
        try:
            speed = probes.measure(shape, slots)
        except (SettingError, TrainableError):  # such as a process that died: with fewer trials at a time it worked
            return {}
        if speed is None or not _fits(speed, slots, replicates):
            return {}
        speeds[name] = speed
    return speeds


def _fits(speed: Speed, slots: Slots, replicates: int = 1) -> bool:
    """Return whether the trials that share a GPU fit into what was free of it, with a margin.

    The trainings of a trial, with one seed each, keep their weights and their CUDA graphs side by side.
    """
    count = slots.trials_per_device
    contexts = (count - 1) * CONTEXT_BYTES  # one process had its context when the free memory was read
    return slots.device == "cpu" or count * replicates * GPU_MARGIN * speed.memory_bytes + contexts <= speed.free_bytes


def _candidates(space: Space, slots: Slots, trials: int | None, nodes: Sequence[Node]) -> list[Slots]:
    """Return the other divisions of the machines that are worth measuring."""
    if slots.device == "cpu":
        is_free = space.resources.cpu == "auto"
        fewer = {1, slots.count // 2} - {0, slots.count} if is_free else set()
        divided = [share_cores(nodes, 0.0, count) for count in sorted(fewer, reverse=True)]
        # With a machine's cores for each trial, a cluster has room for one on each machine.
        rooms = [min(each.room(nodes)[""].count, trials or math.inf) for each in divided]
        return [replace(each, count=int(room)) for each, room in zip(divided, rooms, strict=True)]
    if space.resources.gpu != "auto":
        return []
    cores, gpus = (sum(getattr(node, name) for node in nodes if node.gpus) for name in ("cores", "gpus"))
    most = min(MAX_TRIALS_PER_GPU, int(cores // gpus), math.ceil(trials / gpus) if trials else MAX_TRIALS_PER_GPU)
    shares = [(int(k * gpus), 1 / k) for k in range(2, most + 1)]
    if space.resources.cpu == "auto":
        return [share_cores(nodes, gpu, count) for count, gpu in shares]
    return [Slots(count, slots.cpu, gpu) for count, gpu in shares if count_room(nodes, slots.cpu, gpu) >= count]


def _shapes(space: Space) -> dict[str, Params]:
    """Return {readable name: shape} of the training steps; of a large space, a sample with the largest."""
    values: dict[str, list[Any]] = {}
    for name, value in space.examples():
        if name in SHAPE_PARAMS and value not in values.setdefault(name, []):
            values[name].append(value)
    shapes = [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]
    sample = shapes if len(shapes) <= MAX_SHAPES else shapes[:: math.ceil(len(shapes) / (MAX_SHAPES - 1))]
    largest = max(shapes, key=_memory_order)
    return {_shape_name(shape): shape for shape in (sample if largest in sample else [*sample, largest])}


def _memory_order(shape: Mapping[str, Any]) -> float:
    """Return a number that orders shapes by the memory that they need: for maps, and for several copies of the weights."""
    stem, optimizer = shape.get("stem"), shape.get("optimizer")
    batch_size = float(shape.get("batch_size") or TrainParams.batch_size)
    width = float(shape.get("width") or TrainParams.width)
    maps = batch_size * width * KEPT_NUMBERS["cifar" if stem == "cifar" else "imagenet"]
    copies = 2 + (1 if optimizer == "sgd" else 2) + (2 if shape.get("ema") else 0)  # with the gradients
    return maps * (1.0 if shape.get("precision") == "fp32" else 0.5) + copies * WEIGHTS * width**2


def _shape_name(shape: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items()) or "the defaults"


def _nearest_shape(point: Mapping[str, Any], shapes: Mapping[str, Params]) -> str:
    defaults = {"batch_size": TrainParams.batch_size, "width": TrainParams.width}

    def distance(shape: Params) -> tuple[int, float]:
        others = sum(shape[name] != point.get(name) for name in shape if name not in defaults)
        logs = [
            [math.log(float(each.get(name) or default)) for name, default in defaults.items()]
            for each in (shape, point)
        ]
        return others, math.dist(*logs)

    return min(shapes, key=lambda name: distance(shapes[name]))


def _points(
    space: Space, trials: int | None, begun: Sequence[tuple[Params, int]]
) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Yield (configuration, epochs) of the trials to run: points of a grid, or the shapes in turn; one if unknown."""
    first = begun[:trials] if trials is not None else ()
    yield from ((point, space.max_epochs - epoch) for point, epoch in first)
    left = 1 if trials is None else trials - len(first)
    points: Iterator[Mapping[str, Any]] = itertools.cycle(_shapes(space).values())
    if space.is_grid:
        keys = {space.config_key(point) for point, _ in first}
        points = (each for each in space.planned_points() if not keys or space.config_key(each) not in keys)
    yield from ((point, space.max_epochs) for point in itertools.islice(points, left))


def _count_views(space: Space, point: Mapping[str, Any]) -> int:
    """Return how often an image is scored: twice with `tta`. Where only shapes are known, any trial may do so."""
    return 2 if point.get("tta", not space.is_grid and ("tta", True) in space.examples()) else 1


def _trial_seconds(space: Space, speed: Speed, images: ImageCounts, views: int, epochs: int) -> float:
    train, validation, test = images[0], views * images[1], views * images[2]
    # Evaluation is a forward pass, a third of the arithmetic of a step. The test images are scored once.
    epoch = (train + validation / 3) / speed.images_per_second
    work = epochs * epoch
    if space.checkpoint_every == "auto":
        checkpoints = min(COST_SHARE * work, (epochs - 1) * speed.checkpoint_seconds) + speed.checkpoint_seconds
    else:
        checkpoints = math.ceil(epochs / space.checkpoint_every) * speed.checkpoint_seconds
    return space.replicates * (work + test / 3 / speed.images_per_second + checkpoints)


def _makespan(lengths: Sequence[float], slots: int) -> float:
    """Return when the last trial ends, if each starts as soon as a slot is free, in order."""
    ends = [0.0] * slots
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def this_machine() -> Node:
    """Return this machine."""
    import torch

    return Node(float(len(os.sched_getaffinity(0))), float(torch.cuda.device_count()))


def can_measure(slots: Slots) -> bool:
    """Return whether this machine has the device of the trials: the driver of a cluster may have no GPU."""
    if slots.device == "cpu":
        return True
    import torch

    return torch.cuda.is_available()
