"""What storage knows of a study, read once: its trials with every metric, its runs, what they cost. Knows no figures.

The published results of the documented search are here too, to be held beside those of a study that repeats it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hpo.report.formatting import ENDED, format_value
from hpo.trainable import is_timing

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from storage.studies import Study
    from storage.tables import Metrics

STATES = ("COMPLETE", "PRUNED", "RUNNING", "WAITING", "FAIL")  # the nearest to a result first


@dataclass(frozen=True)
class TrialResult:
    """A trial as storage has it.

    Attributes:
        values: of the objectives; empty until the trial has ended with some. May hold infinities.
        epochs: {epoch: {metric: value}}, epochs in order; values may be NaN or infinite.
        fail_reason: in one line; empty for a trial that has not failed.
        provenance: where and on what it ran, without what its run says.
        attrs: what the run, or whatever program it was, has written with it.
        trial_id: its key in storage; no two trials of a database share one.
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
    trial_id: int = 0

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it changes any more."""
        return self.state in ENDED

    @property
    def last_epoch(self) -> int:
        """The last epoch that storage holds; 0 where there is none."""
        return max(self.epochs, default=0)

    @property
    def last(self) -> dict[str, float]:
        """The metrics of the last epoch."""
        return self.epochs.get(self.last_epoch, {})

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Return the epochs that have a metric, and its values."""
        points = [(epoch, values[metric]) for epoch, values in self.epochs.items() if metric in values]
        return [epoch for epoch, _ in points], [value for _, value in points]

    @cached_property
    def seconds(self) -> float:
        """How long its epochs took, training and validation; without epochs, how long it ran."""
        seconds = sum(values.get("epoch_seconds", 0.0) for values in self.epochs.values())
        return seconds or self.wall_seconds

    @cached_property
    def images(self) -> float:
        """How many images it was trained on, each counted once an epoch; 0 where the trainable does not say."""
        return math.fsum(
            values["images_per_second"] * values["train_seconds"]
            for values in self.epochs.values()
            if "images_per_second" in values and "train_seconds" in values
        )

    @property
    def gpus(self) -> float:
        """The share of a GPU that it had to itself; 0 on the CPU."""
        return float(self.provenance.get("gpu", 1.0)) if self.provenance.get("device") == "cuda" else 0.0

    @property
    def images_per_second(self) -> float | None:
        """The mean over its epochs."""
        _, speeds = self.curve("images_per_second")
        return sum(speeds) / len(speeds) if speeds else None


@dataclass(frozen=True)
class Results:
    """All that a report says, still as numbers.

    Attributes:
        study: where it was read from; Optuna's own plots want it.
        objectives: (metric, is it to be maximized) each.
        trials: by number; what was never run is left out.
        attrs: the study's attributes, see `Study.attrs`.
        runs: the rows of hpo_runs, oldest first.
    """

    study: Study
    objectives: list[tuple[str, bool]]
    trials: list[TrialResult]
    attrs: dict[str, Any]
    runs: list[Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the study was opened with; empty for a study of another program."""
        settings: dict[str, Any] = self.attrs.get("hpo:settings", {})
        return settings

    @property
    def metric(self) -> str:
        """The first objective."""
        return self.objectives[0][0]

    @property
    def maximize(self) -> bool:
        """Whether the first objective is to be maximized."""
        return self.objectives[0][1]

    @cached_property
    def counts(self) -> Counter[str]:
        """{state: trials}."""
        return Counter(trial.state for trial in self.trials)

    @cached_property
    def params(self) -> list[str]:
        """The names of all parameters, in the order in which trials name them."""
        return list(dict.fromkeys(name for trial in self.trials for name in trial.params))

    @cached_property
    def varying(self) -> list[str]:
        """The parameters that are not the same in all trials: what tells the trials apart."""
        absent = object()
        return [
            name for name in self.params if len({repr(trial.params.get(name, absent)) for trial in self.trials}) > 1
        ]

    @cached_property
    def ranked(self) -> list[TrialResult]:
        """All trials: those nearest to a result first, among them the best; of several objectives, the Pareto front."""
        return sorted(self.trials, key=self._rank)

    def _rank(self, trial: TrialResult) -> tuple[Any, ...]:
        value = trial.values[0] if trial.values else math.nan
        worth = 0.0 if math.isnan(value) else -value if self.maximize else value
        return (STATES.index(trial.state), trial.number not in self.front, math.isnan(value), worth, trial.number)

    @property
    def best(self) -> TrialResult | None:
        """The best completed trial; of several objectives, the first one on the Pareto front."""
        first = next(iter(self.ranked), None)
        return first if first is not None and first.state == "COMPLETE" and first.values else None

    @cached_property
    def front(self) -> set[int]:
        """The numbers of the trials on the Pareto front; empty for a single objective."""
        if len(self.objectives) < 2:
            return set()
        return {trial.number for trial in self.study.optuna_study.best_trials}

    def best_value(self, trial: TrialResult) -> float | None:
        """Return the best value of the first objective over a trial's epochs."""
        values = [value for value in trial.curve(self.metric)[1] if math.isfinite(value)]
        return (max(values) if self.maximize else min(values)) if values else None

    def label(self, trial: TrialResult) -> str:
        """Return a trial's number and what tells it from the others."""
        params = ", ".join(f"{n} {format_value(trial.params[n])}" for n in self.varying if n in trial.params)
        return f"#{trial.number} {params}".strip()

    @property
    def wall_seconds(self) -> float:
        """For how long any run was at work; without runs, what the trials took."""
        from storage.studies import elapsed_seconds

        return elapsed_seconds(self.runs) if self.runs else sum(trial.seconds for trial in self.trials)

    @property
    def gpu_hours(self) -> float:
        """The hours of GPUs that the trials took, the share of one where they shared it."""
        return sum(trial.seconds * trial.gpus for trial in self.trials) / 3600

    @property
    def devices(self) -> Counter[str]:
        """{name of a device: trials that ran on it}."""
        names = (trial.provenance.get("device_name") or trial.provenance.get("device") for trial in self.trials)
        return Counter(str(name) for name in names if name)

    @cached_property
    def curve_families(self) -> dict[str, list[str]]:
        """{what is drawn together: its metrics}, validation first: {"accuracy": ["val_accuracy", "train_accuracy"], ...}.

        Timings are left out, and what has no more than one value a trial, as the test images' score.
        """
        named: set[str] = set()
        repeated: set[str] = set()
        for trial in self.trials:
            seen: set[str] = set()
            for values in trial.epochs.values():
                repeated |= seen & values.keys()
                seen |= values.keys()
            named |= seen
        # After a single epoch nothing is repeated yet; what scores test images will not be.
        drawn = {name for name in repeated or named if not is_timing(name)}
        drawn -= set() if repeated else {name for name in named if name.startswith("test_")}
        families: dict[str, list[str]] = {}
        # The objective's family first, then the common two in their usual order, then the others.
        order = [self.metric.removeprefix("val_").removeprefix("train_"), "accuracy", "loss"]
        for name in sorted(drawn, key=lambda name: (not name.startswith("val_"), name)):
            families.setdefault(name.removeprefix("val_").removeprefix("train_"), []).append(name)
        return {family: families[family] for family in [*dict.fromkeys(order), *sorted(families)] if family in families}


def read_results(study: Study, *, epochs: bool = True) -> Results:
    """Read a study, whole and once.

    Args:
        study: the study.
        epochs: False leaves out the epochs of all trials, the bulk of a large study; see `read_epochs`.
    """
    from storage.studies import without_garbage_collection

    with without_garbage_collection():
        trials = study.run_trials()
        metrics: dict[int, Metrics | None] = dict.fromkeys(trial.number for trial in trials)
        if epochs:
            metrics |= study.metrics(trials)
        provenances = study.provenances(trials)
    names = study.optuna_study.metric_names or []
    directions = study.optuna_study.directions
    if len(directions) == 1:
        names = [study.metric if study.settings else next(iter(names), "value")]
    elif not names:
        names = [f"objective {i}" for i in range(len(directions))]
    return Results(
        study,
        [(name, direction.name == "MAXIMIZE") for name, direction in zip(names, directions, strict=True)],
        [_result(trial, metrics[trial.number], provenances[trial.number], names[0]) for trial in trials],
        study.attrs,
        study.runs(),
    )


def read_epochs(results: Results, numbers: Container[int]) -> Results:
    """Return the same results with the epochs of these trials and of no others."""
    wanted = [trial.trial_id for trial in results.trials if trial.number in numbers]
    found = results.study.metrics_of(wanted)
    return replace(results, trials=[replace(trial, epochs=found.get(trial.trial_id, {})) for trial in results.trials])


def _result(trial: FrozenTrial, epochs: Metrics | None, provenance: Mapping[str, Any], metric: str) -> TrialResult:
    if epochs == {}:  # made through Optuna: all there is are the values that were reported for pruning
        epochs = {step: {metric: value} for step, value in sorted(trial.intermediate_values.items())}
    failed = trial.state.name == "FAIL"
    return TrialResult(
        trial.number,
        trial.params,
        trial.state.name,
        tuple(trial.values or ()),
        epochs or {},
        str(trial.user_attrs.get("fail_reason", "for an unknown reason")) if failed else "",
        str(trial.user_attrs.get("traceback", "")),
        provenance,
        trial.duration.total_seconds() if trial.duration else 0.0,
        trial.user_attrs,
        trial._trial_id,
    )
