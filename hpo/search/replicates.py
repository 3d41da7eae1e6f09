"""Several trainings of one configuration, with one seed each, as one trial: `replicates: 3`.

    epoch 1 with seed 0 -> epoch 1 with seed 1 -> epoch 1 with seed 2 -> the report of epoch 1: means and standard errors
    -> epoch 2 with seed 0 -> ...

The trainings advance together, so that a scheduler judges their mean, and a trial that is pruned ends all of them. Each
training gets the numbers that it would get alone.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from hpo.search.script import ScriptError
from hpo.train.imported import imported_torch
from hpo.trainable import STDERR_SUFFIX, EpochReport, is_timing

STATES = "replicates"  # the only key of a trial's state: a list with the state of each training
SEEDS = "seeds"  # in the provenance of the last epoch: the metrics of each training
SEED_NOTE = "in the training with seed "  # of an exception, followed by the seed

StartTraining = Callable[[int, Mapping[str, Any] | None], Generator[Any, None, None]]


class EndedEarlyError(Exception):
    """One of the trainings has ended before its last epoch."""


@dataclass(frozen=True)
class MeanReport(EpochReport):
    """The result of one epoch of all trainings.

    Attributes:
        seconds: for which they have trained in this epoch, all together, also before the trial was resumed.
    """

    seconds: float = 0.0


@dataclass(frozen=True)
class EpochPart:
    """Some of the trainings have finished an epoch that others have not. Nothing is reported yet.

    Attributes:
        state: returns the state of all trainings, from which the trial can resume.
    """

    state: Callable[[], dict[str, Any]]


@dataclass
class _Training:
    """One of the trainings.

    Attributes:
        seed: of the training.
        start: starts it, or continues it from a state.
        epoch: the last one that it has finished.
        metrics: of that epoch.
        seconds: for which it trained in that epoch.
        state: returns the state after that epoch; None before the first.
        report: of that epoch; None if it was read from a state.
    """

    seed: int
    start: StartTraining
    epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    state: Callable[[], Mapping[str, Any]] | None = None
    report: Any = None
    _epochs: Generator[Any, None, None] | None = None
    _random: _RandomState | None = None

    @classmethod
    def resumed(cls, seed: int, start: StartTraining, saved: Mapping[str, Any] | None) -> _Training:
        """Return a training that has not started, or one with a state that `save` returned."""
        if saved is None or not saved["epoch"]:
            return cls(seed, start)
        state = saved["state"]
        return cls(seed, start, saved["epoch"], dict(saved["metrics"]), saved["seconds"], lambda: state)

    def save(self) -> dict[str, Any]:
        """Return all that `resumed` needs."""
        return {"epoch": self.epoch, "metrics": self.metrics, "seconds": self.seconds, "state": self._read_state()}

    def _read_state(self) -> Mapping[str, Any] | None:
        if self.state is None:
            return None
        if self._random is None:  # it was read, and the training has not started
            return self.state()
        others = _RandomState.read()
        self._random.restore()  # it may be part of the state
        try:
            return self.state()
        finally:
            others.restore()

    def advance(self, max_epochs: int) -> None:
        """Train one epoch.

        Raises:
            EndedEarlyError: the training has ended before it.
            Exception: of the trainable, with a note that names the seed.
        """
        started = time.perf_counter()
        try:
            with self._own_random_numbers():
                if self._epochs is None:
                    self._epochs = self.start(self.seed, self._read_state())
                report = next(self._epochs, None)
        except ScriptError as error:
            raise ScriptError(f"seed {self.seed}: {error}") from None
        except Exception as error:
            error.add_note(f"{SEED_NOTE}{self.seed}")
            raise
        if report is None:
            raise EndedEarlyError(f"seed {self.seed}: the trainable ended after epoch {self.epoch} of {max_epochs}")
        self.metrics = {str(name): float(value) for name, value in report.metrics.items()}
        # A script may print more epochs than it was asked for: then this was its last one.
        self.epoch, self.state, self.report = min(int(report.epoch), max_epochs), report.state, report
        self.seconds = time.perf_counter() - started

    def close(self) -> None:
        """End the training."""
        if self._epochs is not None:
            self._epochs.close()

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Continue the global generators of random numbers where this training left them, not where another one did."""
        if self._random is not None:
            self._random.restore()
        yield
        self._random = _RandomState.read()


@dataclass(frozen=True)
class _RandomState:
    """The states of the global generators of random numbers, of Python, and of numpy and torch if they are imported."""

    python: Any
    numpy: Any
    torch: Any
    cuda: Any

    @classmethod
    def read(cls) -> _RandomState:
        numpy, torch = sys.modules.get("numpy"), imported_torch()
        return cls(
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
            None if torch is None else torch.get_rng_state(),
            None if torch is None or not torch.cuda.is_initialized() else torch.cuda.get_rng_state(),
        )

    def restore(self) -> None:
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        if self.torch is not None:
            sys.modules["torch"].set_rng_state(self.torch)
        if self.cuda is not None:
            sys.modules["torch"].cuda.set_rng_state(self.cuda)


def train_replicates(
    start: StartTraining, seeds: Sequence[int], *, max_epochs: int, state: Mapping[str, Any] | None = None
) -> Generator[EpochReport | EpochPart, None, None]:
    """Train one configuration with several seeds, an epoch of each in turn.

    An epoch is reported when all trainings have reported it. Scripts may leave epochs out; such an epoch is not reported.

    Args:
        start: starts a training from a seed and, unless it is None, from a state of the trainable.
        seeds: at least two.
        max_epochs: the last epoch.
        state: of an earlier report or part, to continue from it.

    Yields:
        A MeanReport for each epoch: the mean of each metric, and the standard error of the mean as NAME_stderr; timings
        are means alone. The last one has the metrics of each training in its provenance. Before it, an EpochPart whenever a
        training has finished an epoch that another has not.

    Raises:
        EndedEarlyError: a training ended before the last epoch.
        ValueError: the trainable reports a metric whose name ends in _stderr, or the state is not of these seeds.
    """
    saved = _saved_states(state, seeds)
    trainings = [_Training.resumed(seed, start, each) for seed, each in zip(seeds, saved, strict=True)]
    reported = min(training.epoch for training in trainings)

    def all_states() -> dict[str, Any]:
        return {STATES: [{"seed": training.seed, **training.save()} for training in trainings]}

    with ExitStack() as stack:
        for training in trainings:
            stack.enter_context(closing(training))
        while reported < max_epochs:
            behind = _first_behind(trainings, reported)
            if behind is not None:
                behind.advance(max_epochs)
                if _first_behind(trainings, reported) is not None:
                    yield EpochPart(all_states)
                continue
            reported = trainings[0].epoch
            yield _report(trainings, reported, all_states, is_last=reported >= max_epochs)


def _saved_states(state: Mapping[str, Any] | None, seeds: Sequence[int]) -> Sequence[Mapping[str, Any] | None]:
    if state is None:
        return [None] * len(seeds)
    saved = state.get(STATES)
    if not isinstance(saved, list) or [each["seed"] for each in saved] != list(seeds):
        raise ValueError(f"the checkpoint is not of {len(seeds)} replicates with the seeds {seeds[0]} to {seeds[-1]}")
    return saved


def _first_behind(trainings: Sequence[_Training], reported: int) -> _Training | None:
    """Return the training that comes next; None if all have finished the same epoch, which is not reported yet."""
    furthest = max(max(training.epoch for training in trainings), reported + 1)
    return next((training for training in trainings if training.epoch < furthest), None)


def _report(
    trainings: Sequence[_Training], epoch: int, state: Callable[[], dict[str, Any]], *, is_last: bool
) -> EpochReport:
    # Others were read from a state.
    reports = [training.report for training in trainings if training.report is not None]
    provenance: dict[str, Any] = {}
    for report in reports:
        provenance |= getattr(report, "provenance", {})
    if is_last:
        provenance |= list_seeds({STATES: [{"seed": each.seed, "metrics": each.metrics} for each in trainings]})
    warnings = dict.fromkeys([*(getattr(report, "warning", "") for report in reports), *_differences(trainings)])
    return MeanReport(
        epoch,
        summarize([training.metrics for training in trainings]),
        state,
        provenance=provenance,
        warning="; ".join(filter(None, warnings)),
        needs_new_process=any(getattr(report, "needs_new_process", False) for report in reports),
        seconds=sum(training.seconds for training in trainings),
    )


def list_seeds(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a trial's provenance that has the metrics of each training, from the state of all of them."""

    def finite(metrics: Mapping[str, float]) -> dict[str, float]:
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    return {SEEDS: [{"seed": each["seed"], "metrics": finite(each["metrics"])} for each in state[STATES]]}


def _differences(trainings: Sequence[_Training]) -> Iterator[str]:
    """Say which training lacks a metric that others have, or has a value that is not finite."""
    names = dict.fromkeys(name for training in trainings for name in training.metrics)
    for training in trainings:
        for name in names:
            value = training.metrics.get(name)
            if value is None:
                yield f"seed {training.seed} reported no {name}, so it has no mean"
            elif not math.isfinite(value):
                yield f"seed {training.seed}: {name} is {value}"


def summarize(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric that all trainings have, and the standard error of the mean as NAME_stderr.

    Args:
        metrics: {name: value} of each training, at least two. With a value that is not finite, neither are the results.
            The mean of `images_per_second` is that of all images over all of their `train_seconds`.

    Raises:
        ValueError: the name of a metric ends in _stderr.
    """
    summary: dict[str, float] = {}
    for name in metrics[0]:
        values = [each[name] for each in metrics if name in each]
        if len(values) < len(metrics):
            continue
        if name.endswith(STDERR_SUFFIX):
            raise ValueError(f"with replicates, the name of a metric must not end in {STDERR_SUFFIX}, as {name!r} does")
        weights = [each.get("train_seconds", 1.0) if name == "images_per_second" else 1.0 for each in metrics]
        total = sum(weights) or 1.0
        summary[name] = sum(value * weight for value, weight in zip(values, weights, strict=True)) / total
        if not is_timing(name):
            is_finite = all(map(math.isfinite, values))
            summary[name + STDERR_SUFFIX] = _standard_error(values) if is_finite else math.nan
    return summary


def _standard_error(values: Sequence[float]) -> float:
    try:
        return statistics.stdev(values) / math.sqrt(len(values))
    except OverflowError:
        return math.inf
