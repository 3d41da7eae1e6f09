"""A trial of a study, with every metric, as reports show it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hpo.trainable import STDERR_SUFFIX
from storage.imports import Origin
from storage.parents import Parent
from storage.records import CONTINUED_FROM

if TYPE_CHECKING:
    from storage.records import Metrics

STATES = ("COMPLETE", "PRUNED", "RUNNING", "WAITING", "FAIL")  # in the order of the ranking
ENDED_STATES = ("COMPLETE", "PRUNED", "FAIL")


@dataclass(frozen=True)
class TrialResult:
    """One trial: its configuration, its metrics, and the device that it ran on.

    Attributes:
        number: counts from 0 within the study.
        params: {name: value}. Only active parameters are present, so trials may have different names.
        state: `COMPLETE`, `PRUNED`, `RUNNING`, `WAITING` or `FAIL`.
        values: one float per objective; empty while the trial has no result. May be infinite.
        epochs: {epoch: {metric: value}}, epochs from 1 in ascending order. Values may be NaN or infinite.
        fail_reason: one line; empty unless the state is `FAIL`.
        traceback: of the exception that ended the trial; empty if there was none.
        provenance: the device, its name, and the share of a GPU. Run-wide facts are in `Results.runs`.
        wall_seconds: from start to end as Optuna recorded it; 0.0 if the trial has not ended.
        attrs: Optuna's user attributes of the trial.
        device_seconds: {`cuda` or `cpu`: for how long it held how many of them}, with epochs that were lost and earlier
            attempts. On the CPU, a trial holds one.
        trial_id: the key in the database, unique across its studies.
        completed: when it ended, in UTC without a time zone; None if it has not.
        replicates: how many trainings it is, with one seed each.
    """

    number: int
    params: dict[str, Any]
    state: str
    values: tuple[float, ...] = ()
    epochs: Metrics = field(default_factory=dict)
    fail_reason: str = ""
    traceback: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    wall_seconds: float = 0.0
    attrs: Mapping[str, Any] = field(default_factory=dict)
    device_seconds: Mapping[str, float] = field(default_factory=dict)
    trial_id: int = 0
    completed: datetime | None = None
    replicates: int = 1

    @property
    def has_ended(self) -> bool:
        """Whether the trial is in a final state."""
        return self.state in ENDED_STATES

    @property
    def reused_from(self) -> str:
        """The trial of an earlier study whose result this is, such as `grid #3`; empty if this study trained it."""
        origin = Origin.of(self.attrs)
        return "" if origin is None else f"{origin.study} #{origin.number}"

    @property
    def continued_from(self) -> str:
        """The shorter trial from whose checkpoint it started, such as `grid@1 #3`; empty for none."""
        return str(self.parent) if self.continued_epochs else ""

    @property
    def continued_epochs(self) -> int:
        """How many of its epochs that trial has trained."""
        return 0 if self.parent is None else self.parent.epoch

    @property
    def parent(self) -> Parent | None:
        """The trial that it continues, as stored; None for none."""
        return Parent.read(self.attrs.get(CONTINUED_FROM))

    @property
    def last_epoch(self) -> int:
        """The last epoch that storage holds; 0 without epochs."""
        return max(self.epochs, default=0)

    @property
    def last(self) -> dict[str, float]:
        """The metrics of the last epoch; empty without epochs."""
        return self.epochs.get(self.last_epoch, {})

    def standard_error(self, metric: str) -> float | None:
        """The standard error of a metric's mean over several seeds, after the last epoch; None with a single seed."""
        return self.last.get(metric + STDERR_SUFFIX) if self.replicates > 1 else None

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Return the epochs that have a metric, and its values: two lists of the same length, empty if none has it."""
        points = [(epoch, values[metric]) for epoch, values in self.epochs.items() if metric in values]
        return [epoch for epoch, _ in points], [value for _, value in points]

    @cached_property
    def seconds(self) -> float:
        """The seconds that its epochs took, training and validation; not those of a trial that it continues. Without epochs,
        `wall_seconds`.
        """
        own = (values for epoch, values in self.epochs.items() if epoch > self.continued_epochs)
        seconds = sum(values.get("epoch_seconds", 0.0) for values in own)
        return seconds or self.wall_seconds

    @cached_property
    def images(self) -> float:
        """The images trained on, counted once per epoch; 0.0 if the trainable does not report its speed."""
        return math.fsum(
            values["images_per_second"] * values["train_seconds"]
            for values in self.epochs.values()
            if "images_per_second" in values and "train_seconds" in values
        )

    @property
    def images_per_second(self) -> float | None:
        """The mean training speed over all epochs, or None if the trainable does not report it."""
        _, speeds = self.curve("images_per_second")
        return sum(speeds) / len(speeds) if speeds else None
