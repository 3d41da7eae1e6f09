"""Runs a search in simulated time: trials take as long as their learning curves say, and nothing is trained."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.worth.task import Curve, Task

METRIC = "value"  # the name of the objective in every search


@dataclass(frozen=True)
class Trial:
    """A trial that a search wants to be run.

    Attributes:
        key: the search's name of it.
        params: its configuration.
        epoch: the last epoch that is trained already; 0 for a new trial.
    """

    key: str
    params: Mapping[str, Any]
    epoch: int = 0


class Search(Protocol):
    """Chooses trials, and ends them."""

    def next_trial(self) -> Trial | None:
        """Return a trial for a worker that is free; None if there is none now."""

    def report(self, trial: Trial, epoch: int, value: float, seconds: float) -> bool:
        """Take the result of an epoch; return whether the trial continues.

        Args:
            trial: the trial.
            epoch: the epoch, from 1.
            value: the objective, larger is better.
            seconds: how long the epoch took.
        """


@dataclass
class Trajectory:
    """What a search found, and when.

    Attributes:
        seconds: device time at which a better value was found, ascending: the wall-clock time times the number of workers.
        values: the best value of any epoch until then.
        trials: how many trials were started.
        epochs: how many epochs were trained.
    """

    seconds: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    trials: int = 0
    epochs: int = 0

    def best_at(self, seconds: float) -> float | None:
        """Return the best value found within this device time; None before the first epoch has ended."""
        found = [value for at, value in zip(self.seconds, self.values, strict=True) if at <= seconds]
        return found[-1] if found else None

    def note(self, seconds: float, value: float) -> None:
        """Add the result of an epoch."""
        self.epochs += 1
        if not self.values or value > self.values[-1]:
            self.seconds.append(seconds)
            self.values.append(value)


def simulate(search: Search, task: Task, workers: int, device_seconds: float) -> Trajectory:
    """Run a search until its device time is spent.

    Args:
        search: the search.
        task: what is trained.
        workers: how many trials run at a time.
        device_seconds: the device time, that of idle workers included.
    """
    trajectory = Trajectory()
    order = itertools.count()  # of events at the same time
    running: list[tuple[float, int, Trial, int, Curve]] = []  # (end of the epoch, order, trial, epoch, curve)
    now = 0.0
    while True:
        while len(running) < workers and (trial := search.next_trial()) is not None:
            trajectory.trials += trial.epoch == 0
            curve = task.curve(trial.params)
            heapq.heappush(
                running, (now + float(curve.seconds[trial.epoch]), next(order), trial, trial.epoch + 1, curve)
            )
        if not running:
            return trajectory
        now, _, trial, epoch, curve = heapq.heappop(running)
        if now * workers > device_seconds:
            return trajectory
        value = float(curve.values[epoch - 1])
        trajectory.note(now * workers, value)
        goes_on = search.report(trial, epoch, value, float(curve.seconds[epoch - 1]))
        if goes_on:
            heapq.heappush(running, (now + float(curve.seconds[epoch]), next(order), trial, epoch + 1, curve))
