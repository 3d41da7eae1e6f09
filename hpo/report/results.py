"""The results of a study: what its trials show together. Draws nothing."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hpo.report.formatting import format_value
from hpo.report.trials import STATES, TrialResult
from hpo.space.model import Space
from hpo.trainable import is_error, is_timing
from storage.imports import TakenOver, read_sources
from storage.pareto import Direction, find_front, rank_best
from storage.summaries import elapsed_seconds

if TYPE_CHECKING:
    from types import ModuleType

    import pandas as pd

    from storage.study import Study

MAX_RANKED = 1000  # sorting all fronts of ten thousand trials takes a second, and no table shows as many


@dataclass(frozen=True)
class Results:
    """The results of a study at the moment it was read.

    `study` can still be read, which Optuna's plots do: it connects to the database when needed.

    Attributes:
        study: the study that was read.
        objectives: a (metric, whether it is maximized) pair per objective; at least one.
        trials: all trials by number. Draws that were never run (duplicates, broken constraints) are left out.
        attrs: the study's user attributes, see `Study.attrs`.
        runs: the rows of `hpo_runs`, oldest first.
        space: the search space that the study was opened with. None if another program made the study, or if this
            version of hpo cannot read its stored settings.
        name: what names the study on the command line: `NAME@1` for the first revision if there are later ones.
        state: `running`, `finished` or `resumable`; empty for a study of another program.
    """

    study: Study
    objectives: list[tuple[str, bool]]
    trials: list[TrialResult]
    attrs: dict[str, Any]
    runs: list[Any]
    space: Space | None = None
    name: str = ""
    state: str = ""

    @property
    def metric(self) -> str:
        """The name of the first objective."""
        return self.objectives[0][0]

    @property
    def maximize(self) -> bool:
        """Whether the first objective is maximized."""
        return self.objectives[0][1]

    @property
    def directions(self) -> list[Direction]:
        """The direction of each objective."""
        return ["maximize" if is_maximized else "minimize" for _, is_maximized in self.objectives]

    @cached_property
    def counts(self) -> Counter[str]:
        """{state: number of trials}. A state without trials counts 0."""
        return Counter(trial.state for trial in self.trials)

    @property
    def trained(self) -> list[TrialResult]:
        """The trials that this study trained: not those whose results it has from an earlier study."""
        return [trial for trial in self.trials if not trial.reused_from]

    @property
    def sources(self) -> list[TakenOver]:
        """The earlier studies from which trials were taken over, or could not be."""
        return [TakenOver.read(each) for each in read_sources(self.attrs)]

    @cached_property
    def param_names(self) -> list[str]:
        """The names of all parameters, in the order in which the trials first mention them."""
        return list(dict.fromkeys(name for trial in self.trials for name in trial.params))

    @cached_property
    def varying_params(self) -> list[str]:
        """The names of the parameters that differ between trials."""
        absent = object()
        return [
            name
            for name in self.param_names
            if len({repr(trial.params.get(name, absent)) for trial in self.trials}) > 1
        ]

    @cached_property
    def ranked(self) -> list[TrialResult]:
        """All trials by state in the order of `STATES`, then best value first.

        With several objectives, completed trials have the order of `storage.pareto.rank_best`, beyond the first `MAX_RANKED`
        by the first objective only.
        """
        places = self._places
        return sorted(self.trials, key=lambda trial: (places.get(trial.number, len(places)), self._rank(trial)))

    @cached_property
    def _places(self) -> dict[int, int]:
        """{number: place} of the best completed trials of several objectives; empty for a single one."""
        if len(self.objectives) < 2:
            return {}
        completed = self._completed
        best = rank_best([trial.values for trial in completed], self.directions, MAX_RANKED)
        return {completed[i].number: place for place, i in enumerate(best)}

    @property
    def _completed(self) -> list[TrialResult]:
        """The completed trials with a value for each objective: a trial of another program may lack some."""
        is_whole = len(self.objectives)
        return [trial for trial in self.trials if trial.state == "COMPLETE" and len(trial.values) == is_whole]

    def _rank(self, trial: TrialResult) -> tuple[Any, ...]:
        value = trial.values[0] if trial.values else math.nan
        cost = 0.0 if math.isnan(value) else -value if self.maximize else value
        return (STATES.index(trial.state), math.isnan(value), cost, trial.number)

    @property
    def best(self) -> TrialResult | None:
        """The best completed trial, or None without one. With several objectives, the one on the Pareto front that is best
        in the first objective.
        """
        first = next(iter(self.ranked), None)
        return first if first is not None and first.state == "COMPLETE" and first.values else None

    @property
    def ties(self) -> list[TrialResult]:
        """Completed trials that are not clearly worse than the best one; empty with a single seed.

        The difference of their means is at most its standard error, the root of the sum of both squares.
        """
        best = self.best
        error = None if best is None or len(self.objectives) > 1 else best.standard_error(self.metric)
        if best is None or error is None:
            return []
        return [
            trial
            for trial in self.ranked
            if trial.state == "COMPLETE"
            and trial is not best
            and (own := trial.standard_error(self.metric)) is not None
            and abs(trial.values[0] - best.values[0]) <= math.hypot(error, own)
        ]

    @cached_property
    def pareto_front(self) -> set[int]:
        """The numbers of the trials on the Pareto front; empty for a single objective."""
        if len(self.objectives) < 2:
            return set()
        # Optuna's `best_trials` counts trials of earlier studies, too, from which only the sampler learns.
        completed = self._completed
        return {completed[i].number for i in find_front([trial.values for trial in completed], self.directions)}

    @property
    def best_trials(self) -> list[TrialResult]:
        """The trials on the Pareto front, best first by the first objective; with a single objective, the best one."""
        if len(self.objectives) > 1:
            return sorted((trial for trial in self.trials if trial.number in self.pareto_front), key=self._rank)
        return [] if self.best is None else [self.best]

    def line(self, trial: TrialResult) -> list[tuple[TrialResult, int]]:
        """Return the trials of a population that led to one, which is last, each with the last epoch that it contributed."""
        by_number = {each.number: each for each in self.trials}
        line, last = [(trial, trial.last_epoch)], math.inf
        while (parent := line[0][0].parent) is not None and parent.epoch and parent.identity == self.study.identity:
            earlier = by_number.get(parent.number)
            if earlier is None or any(each is earlier for each, _ in line):  # any program may change it
                break
            last = min(parent.epoch, last)
            line.insert(0, (earlier, int(last)))
        return line

    def best_value(self, trial: TrialResult) -> float | None:
        """Return the best finite value of the first objective over a trial's epochs, or None if it has none."""
        values = [value for value in trial.curve(self.metric)[1] if math.isfinite(value)]
        return (max(values) if self.maximize else min(values)) if values else None

    def label(self, trial: TrialResult) -> str:
        """Return a trial's number and its varying parameters, for example `#3 batch_size 64, lr 0.01`."""
        params = ", ".join(f"{n} {format_value(trial.params[n])}" for n in self.varying_params if n in trial.params)
        return f"#{trial.number} {params}".strip()

    @property
    def wall_seconds(self) -> float:
        """The seconds during which at least one run was active. Without runs, the sum over all trials."""
        return elapsed_seconds(self.runs) if self.runs else sum(trial.seconds for trial in self.trained)

    @property
    def gpu_hours(self) -> float:
        """The GPU-hours that all trials used; a trial on a quarter of a GPU counts a quarter."""
        return sum(trial.device_seconds.get("cuda", 0.0) for trial in self.trials) / 3600

    @property
    def device_seconds(self) -> float:
        """The device-seconds that all trials used, of GPUs and of the CPU. Each trial on the CPU holds one device."""
        return sum(sum(trial.device_seconds.values()) for trial in self.trials)

    @property
    def devices(self) -> Counter[str]:
        """{device name: number of trials that ran on it}."""
        names = (trial.provenance.get("device_name") or trial.provenance.get("device") for trial in self.trained)
        return Counter(str(name) for name in names if name)

    @cached_property
    def curve_families(self) -> dict[str, list[str]]:
        """The metrics to draw together, validation first: {"accuracy": ["val_accuracy", "train_accuracy"], ...}.

        Timings are left out, and metrics with at most one value per trial, such as the test score.
        """
        named: set[str] = set()
        repeated: set[str] = set()
        for trial in self.trials:
            seen: set[str] = set()
            for values in trial.epochs.values():
                repeated |= seen & values.keys()
                seen |= values.keys()
            named |= seen
        has_errors = self.space is not None and self.space.replicates > 1
        # After a single epoch no metric is repeated yet. Test scores are never repeated.
        drawn = {name for name in repeated or named if not is_timing(name) and not (has_errors and is_error(name))}
        drawn -= set() if repeated else {name for name in named if name.startswith("test_")}
        families: dict[str, list[str]] = {}
        for name in sorted(drawn, key=lambda name: (not name.startswith("val_"), name)):
            families.setdefault(name.removeprefix("val_").removeprefix("train_"), []).append(name)
        first = [self.metric.removeprefix("val_").removeprefix("train_"), "accuracy", "loss"]
        return {family: families[family] for family in [*dict.fromkeys(first), *sorted(families)] if family in families}

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per trial, by number.

        Columns:
            number: int.
            state: see `TrialResult.state`.
            params_NAME: one column per parameter; missing where the trial does not have it.
            value: the objective; NaN without a result. With several objectives, one column `value_METRIC` each.
            last_METRIC: one column per metric: its value after the trial's last epoch.
            epochs: int, the epochs that storage holds.
            seconds: see `TrialResult.seconds`.
            fail_reason: empty unless the state is `FAIL`.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = _import_pandas()
        metrics = dict.fromkeys(name for trial in self.trials for name in trial.last)
        several = len(self.objectives) > 1
        columns: dict[str, list[Any]] = {
            "number": [trial.number for trial in self.trials],
            "state": [trial.state for trial in self.trials],
        }
        for name in self.param_names:
            columns[f"params_{name}"] = [trial.params.get(name) for trial in self.trials]
        for i, (metric, _) in enumerate(self.objectives):
            values = [trial.values[i] if trial.values else math.nan for trial in self.trials]
            columns[f"value_{metric}" if several else "value"] = values
        for metric in metrics:
            columns[f"last_{metric}"] = [trial.last.get(metric, math.nan) for trial in self.trials]
        columns["epochs"] = [len(trial.epochs) for trial in self.trials]
        columns["seconds"] = [trial.seconds for trial in self.trials]
        columns["fail_reason"] = [trial.fail_reason for trial in self.trials]
        frame: pd.DataFrame = pandas.DataFrame(columns)
        return frame

    def epochs_to_dataframe(self) -> pd.DataFrame:
        """Return one row per trial and epoch, by number and epoch.

        Columns:
            number: int, the trial.
            epoch: int, from 1.
            METRIC: one column per metric that the trainable reported, under its own name; NaN where an epoch lacks it.
                Names that end in `_seconds` are in seconds. A metric called `number` or `epoch` is left out.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = _import_pandas()
        rows = [
            {"number": trial.number, "epoch": epoch}
            | {name: value for name, value in metrics.items() if name not in {"number", "epoch"}}
            for trial in self.trials
            for epoch, metrics in trial.epochs.items()
        ]
        frame: pd.DataFrame = pandas.DataFrame(rows) if rows else pandas.DataFrame(columns=["number", "epoch"])
        return frame


def _import_pandas() -> ModuleType:
    try:
        import pandas
    except ModuleNotFoundError as error:
        if error.name != "pandas":
            raise
        raise ImportError("data frames need pandas, which hpo does not install: `pip install pandas`") from None
    return pandas
