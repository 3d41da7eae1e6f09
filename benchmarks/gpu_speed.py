"""What each technique of the training gains on a GPU, and what several trials on one GPU gain: parts of `benchmarks.gpu`.

Every technique is measured against the training as shipped, alone: a step with it changed and all others as they are.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from benchmarks.train_speed import CHECKPOINT_POLICIES, Contestant, take_turns, train_with_checkpoints
from hpo.search.mps import CONTROL, Mps, start_mps
from hpo.train import learner as learner_module
from hpo.train import optimizer as optimizer_module
from hpo.train.cuda_graph import GraphedStep
from hpo.train.data import load
from hpo.train.determinism import deterministic_kernels
from hpo.train.learner import Learner
from hpo.train.loop import train
from hpo.train.params import TrainParams
from hpo.train.precision import choose_precision

Rows = Iterator[tuple[str, bool, str]]  # what was checked, whether it is as it should be, what was found
SAMPLE = {"dataset": "fashion_mnist_sample", "val_samples": 0}
BATCH_SIZES = (64, 512)
MIN_STEPS = 10
MIN_SECONDS = 0.5
TOGETHER = 3  # trials on one GPU: the documented grid has as many
EPOCHS = 20  # of a turn
TURNS = 3  # the median counts
GRID_SECONDS = {"imagenet": 45, "cifar": 120}  # goals, from the first step to the last result


# --- techniques -------------------------------------------------------------------------------------------------------


@contextmanager
def eager_steps() -> Iterator[None]:
    """Let no step be captured."""
    before, GraphedStep.WARM_UP = GraphedStep.WARM_UP, 10**9
    try:
        yield
    finally:
        GraphedStep.WARM_UP = before


@contextmanager
def patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Replace attributes of modules inside the block."""
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def foreach_optimizer() -> AbstractContextManager[None]:
    """Let the optimizer use torch's foreach kernels, several for each operation, instead of one fused kernel."""

    def unfused(function: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments, **options: function(*arguments, **{**options, "fused": False, "foreach": True})

    return patched(*((optimizer_module, name, unfused(getattr(optimizer_module, name))) for name in ("adam", "sgd")))


def contiguous_maps() -> AbstractContextManager[None]:
    """Let images, maps and weights have torch's usual memory format, instead of channels-last."""
    return patched(
        (torch, "channels_last", torch.contiguous_format), (learner_module, "in_memory_order", lambda weight: weight)
    )


def fp32_convolutions() -> AbstractContextManager[None]:
    """Let the convolutions of fp32 be in fp32."""
    return patched((torch.backends.cudnn, "allow_tf32", False))


def fastest_convolutions() -> AbstractContextManager[None]:
    """Let cuDNN time its kernels in the first steps and choose the fastest."""
    return patched((torch.backends.cudnn, "benchmark", True))


AS_SHIPPED = "as shipped"
VARIANTS: dict[str, tuple[dict[str, Any], Callable[[], AbstractContextManager[None]]]] = {
    AS_SHIPPED: ({}, nullcontext),
    "without a CUDA graph": ({}, eager_steps),
    "foreach optimizer, not fused": ({}, foreach_optimizer),
    "fp32, convolutions in TF32": ({"precision": "fp32"}, nullcontext),
    "fp32 without TF32": ({"precision": "fp32"}, fp32_convolutions),
    "contiguous, not channels-last": ({}, contiguous_maps),
    "cudnn.deterministic": ({}, partial(deterministic_kernels, True)),
    "cudnn.benchmark": ({}, fastest_convolutions),
}


def time_step(params: Mapping[str, Any], device: str, data: Mapping[str, Any] = SAMPLE) -> tuple[float, bool | None]:
    """Return the milliseconds of a full training step, and whether it is replayed as a CUDA graph; None on a CPU."""
    images = load(**data, device=device).train
    train_params = TrainParams(**params)
    with closing(Learner(train_params, choose_precision(train_params.precision, device), images)) as learner:
        indices = torch.arange(min(train_params.batch_size, len(images)), device=device)
        learner.model.train()

        def take_steps(count: int) -> float:
            started = time.perf_counter()
            for _ in range(count):
                learner.take_step(indices)
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        take_steps(min(GraphedStep.WARM_UP, MIN_STEPS) + 2)
        steps, seconds = 0, 0.0
        while steps < MIN_STEPS or seconds < MIN_SECONDS:
            seconds += take_steps(MIN_STEPS)
            steps += MIN_STEPS
        return 1000 * seconds / steps, learner.is_graphed


def check_techniques(
    device: str, stem: str, batch_sizes: Sequence[int] = BATCH_SIZES, data: Mapping[str, Any] = SAMPLE, **params: Any
) -> Rows:
    """What each technique of a training step is worth."""
    for batch_size in batch_sizes:
        shipped = 0.0
        for name, (changes, context) in VARIANTS.items():
            with context():
                given = {"stem": stem, "batch_size": batch_size, **params, **changes}
                milliseconds, is_graphed = time_step(given, device, data)
            shipped = shipped or milliseconds  # the first variant
            text = f"{milliseconds:.2f} ms, {milliseconds / shipped:.2f} of the time {AS_SHIPPED}"
            is_right = is_graphed == (context is not eager_steps) if device == "cuda" else is_graphed is None
            yield f"a step, {stem} stem, batch {batch_size}: {name}", is_right, text


# --- trials that share a GPU ------------------------------------------------------------------------------------------


def measure_turns(params: dict[str, Any], data: dict[str, Any], device: str, epochs: int) -> Iterator[float]:
    """Train some epochs at each turn, and yield their images per second."""
    reports = train(params, data=data, seed=0, max_epochs=10**6, device=device)
    while True:
        started = time.perf_counter()
        done = [next(reports).metrics for _ in range(epochs)]
        images = sum(each["images_per_second"] * each["train_seconds"] for each in done)
        yield images / (time.perf_counter() - started)


def check_packing(
    device: str,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    data: Mapping[str, Any] = SAMPLE,
    *,
    together: int = TOGETHER,
    epochs: int = EPOCHS,
    turns: int = TURNS,
) -> Rows:
    """Several trials on one GPU: one after another, in processes that take turns, and under CUDA MPS."""

    def measure(batch_size: int, counts: Sequence[int]) -> dict[int, float]:
        given = {"batch_size": batch_size}, dict(data), device, epochs
        with ExitStack() as stack:
            trials = []
            for _ in range(max(counts)):
                trials.append(Contestant(measure_turns, *given))
                stack.callback(trials[-1].stop)
            return {count: take_turns(trials[:count], turns) for count in counts}

    alone: dict[int, float] = {}
    for batch_size in batch_sizes:
        speeds = measure(batch_size, (1, together))
        alone[batch_size] = speeds[1]
        yield f"{together} trials in turn, batch {batch_size}", True, f"{speeds[1]:,.0f} images/s"
        yield f"{together} processes, batch {batch_size}", True, _describe(speeds[together], speeds[1])
    with start_mps(is_wanted=True) as mps:
        if not mps.is_active:
            yield "CUDA MPS", not mps.failure, _describe_absence(mps)
            return
        for batch_size in batch_sizes:
            speeds = measure(batch_size, (1, together))
            text = f"{_describe(speeds[together], alone[batch_size])}; one trial alone: {speeds[1]:,.0f}"
            yield f"{together} processes under MPS, batch {batch_size}", True, text


# --- whole trials -----------------------------------------------------------------------------------------------------


def check_checkpoints(
    device: str,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    data: Mapping[str, Any] = SAMPLE,
    *,
    epochs: int = EPOCHS,
    turns: int = TURNS,
) -> Rows:
    """What checkpoints add to the time of a trial, next to an epoch of this size."""
    with tempfile.TemporaryDirectory(prefix="hpo-checkpoints-") as folder:
        for batch_size in batch_sizes:
            alone = 0.0
            for policy in CHECKPOINT_POLICIES:
                trial = Contestant(
                    train_with_checkpoints, policy, {"batch_size": batch_size}, dict(data), device, epochs, folder
                )
                with ExitStack() as stack:
                    stack.callback(trial.stop)
                    seconds = take_turns([trial], turns)
                alone = alone or seconds  # the first policy saves none
                text = f"{seconds:.2f} s, {seconds / alone - 1:+.1%}"
                yield f"{epochs} epochs, batch {batch_size}, checkpoints: {policy}", True, text


def check_grid(device: str, stem: str, data_dir: str | None, epochs: int = 50, **data: Any) -> Rows:
    """The documented grid as the service trains it: all trials at once, with evaluation and checkpoints."""
    name = f"the documented grid, {stem} stem, {epochs} epochs (goal {GRID_SECONDS[stem]} s on one H200)"
    if data_dir is None:
        yield name, True, "not measured: it needs --data-dir, a folder with the official images"
        return
    given = {"dataset": "fashion_mnist", "data_dir": data_dir, **data}
    with start_mps(is_wanted=device == "cuda") as mps, tempfile.TemporaryDirectory(prefix="hpo-grid-") as folder:
        trials = [
            Contestant(
                train_with_checkpoints, "auto", {"batch_size": size, "stem": stem}, given, device, epochs, folder
            )
            for size in (64, 256, 512)
        ]
        try:
            for trial in trials:
                trial.start_turn()
            seconds = [trial.end_turn() for trial in trials]
        finally:
            for trial in trials:
                trial.stop()
        how = "under MPS" if mps.is_active else "in turn"
        yield name, True, f"{max(seconds):.1f} s; " + ", ".join(f"{each:.1f} s" for each in seconds) + f", {how}"


def _describe(speed: float, alone: float) -> str:
    return f"{speed:,.0f} images/s in all, {speed / alone:.2f} times one after another"


def _describe_absence(mps: Mps) -> str:
    return f"it did not start: {mps.failure}" if mps.failure else f"not measured: {CONTROL} is not installed"
