"""Studies side by side: their best values, and how soon they found them, over trials and over device time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hpo.report.curves import COLOURS, CurveFigure, Line
from hpo.report.formatting import describe_seeds, format_number, format_seconds, format_value, shorten
from hpo.report.reading import read_results
from hpo.report.results import Results
from hpo.report.trials import TrialResult

if TYPE_CHECKING:
    from storage.studies import Study

MAX_LINES = len(COLOURS)  # more colours cannot be distinguished
UNITS = {"hours": 3600.0, "minutes": 60.0, "seconds": 1.0}  # of device time, in seconds


@dataclass(frozen=True)
class Step:
    """A moment at which a study found a better value, or at which its last trial ended.

    Attributes:
        trials: how many trials had ended.
        device_seconds: how long devices had been used for them.
        best: the best value so far.
    """

    trials: int
    device_seconds: float
    best: float


@dataclass(frozen=True)
class StudyProgress:
    """What one study found, and what for.

    Attributes:
        name: what names it on the command line.
        storage: the URL of its database, without a password.
        state: see `storage.summaries.state_of`.
        metric: the first objective, which is compared.
        maximize: whether it is maximized.
        objectives: how many there are.
        trials: how many trials have ended that the study trained.
        reused: how many results it has from earlier studies. They are its best values from the start, and cost it nothing.
        best: the best value of a completed trial; None without one.
        best_trial: its number and parameters; empty without one.
        epochs: how many epochs the study trained, those of unfinished trials included.
        device_seconds: how long devices were used for them: a trial that had a quarter of a GPU counts a quarter.
        steps: in order; empty without a value.
        settings: {what: value} that decides whether values can be compared; only `objective` if hpo cannot read the others.
    """

    name: str
    storage: str
    state: str
    metric: str
    maximize: bool
    objectives: int
    trials: int
    reused: int
    best: float | None
    best_trial: str
    epochs: int
    device_seconds: float
    steps: list[Step]
    settings: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """Studies side by side.

    Attributes:
        studies: in the order in which they were named.
        differences: what differs between them, one line each: their values may then not be comparable.
    """

    studies: list[StudyProgress]
    differences: list[str]

    @property
    def drawn(self) -> list[StudyProgress]:
        """The studies in one figure: those with the metric and direction of the first one that have a value."""
        first = self.studies[0]
        same = [each for each in self.studies if (each.metric, each.maximize) == (first.metric, first.maximize)]
        return [each for each in same if each.steps][:MAX_LINES]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)


def compare(studies: Sequence[Study]) -> Comparison:
    """Read studies and compare them. Their epochs are not read, only counted.

    Raises:
        StorageError: a database cannot be used.
    """
    progress = [read_progress(study) for study in studies]
    return Comparison(progress, list(_differences(progress)))


def read_progress(study: Study) -> StudyProgress:
    """Return what a study found, and what for.

    Raises:
        StorageError: the database cannot be used.
    """
    results, epochs = read_results(study, epochs=False), study.count_epochs()
    best = results.best
    return StudyProgress(
        results.name,
        study.database.url,
        results.state,
        results.metric,
        results.maximize,
        len(results.objectives),
        sum(trial.has_ended for trial in results.trained),
        len(results.trials) - len(results.trained),
        None if best is None else best.values[0],
        "" if best is None else results.label(best),
        sum(_count_trained(trial, epochs.get(trial.trial_id, 0)) for trial in results.trained),
        sum(map(_device_seconds, results.trained)),
        list(_steps(results)),
        _settings(results),
    )


def _count_trained(trial: TrialResult, epochs: int) -> int:
    """Return how many of a trial's epochs its study trained: not those of a trial that it continues."""
    return max(0, epochs - trial.continued_epochs)


def _device_seconds(trial: TrialResult) -> float:
    """Return for how long a trial held its device. Of a trial of another program, only start and end are known."""
    return sum(trial.device_seconds.values()) or trial.wall_seconds


def _steps(results: Results) -> Iterator[Step]:
    ended = sorted(
        (trial for trial in results.trained if trial.has_ended),
        key=lambda trial: (trial.completed or datetime.min, trial.number),
    )
    reused = [value for trial in results.trials if trial.reused_from and (value := _value(trial)) is not None]
    better = max if results.maximize else min
    best = better(reused, default=None)
    last = None if best is None else Step(0, 0.0, best)
    if last is not None:
        yield last
    spent = 0.0
    for trials, trial in enumerate(ended, start=1):
        spent += _device_seconds(trial)
        value = _value(trial)
        if value is not None and (best is None or better(value, best) != best):
            best = value
            yield (last := Step(trials, spent, best))
    if last is not None and best is not None and last.trials < len(ended):
        yield Step(len(ended), spent, best)


def _value(trial: TrialResult) -> float | None:
    """Return the first objective of a completed trial; None if it has none, or an infinite one."""
    is_result = trial.state == "COMPLETE" and trial.values and math.isfinite(trial.values[0])
    return trial.values[0] if is_result else None


def _settings(results: Results) -> dict[str, str]:
    space = results.space
    objectives = " and ".join(
        f"{name} ({'maximize' if maximize else 'minimize'})" for name, maximize in results.objectives
    )
    found = {"objective": objectives}
    if space is None:
        return found
    found |= {f"data.{name}": format_value(value) for name, value in space.data.model_dump().items()}
    hashes = {str(run.provenance["data_sha256"]) for run in results.runs if "data_sha256" in run.provenance}
    return found | {
        "content of the data": " and ".join(sorted(each[:12] for each in hashes)) or "unknown",
        "trained by": space.trainable if space.command is None else str(space.command),
        "max_epochs": str(space.max_epochs),
        "seed": describe_seeds(space).partition(" ")[2],
    }


def _differences(studies: Sequence[StudyProgress]) -> Iterator[str]:
    for name in dict.fromkeys(name for study in studies for name in study.settings):
        values: dict[str, list[str]] = {}
        for study in studies:
            if name in study.settings:
                values.setdefault(study.settings[name], []).append(study.name)
        if len(values) > 1:
            each = "; ".join(f"{shorten(value)} in {', '.join(owners)}" for value, owners in values.items())
            yield f"{name} differs, so values may not be comparable: {each}"
    unknown = [study.name for study in studies if len(study.settings) == 1]
    if unknown:
        yield f"hpo cannot read the settings of {', '.join(unknown)}, which may differ in data, seed or epochs"


# --- tables and figures -----------------------------------------------------------------------------------------------


def comparison_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the headings of a table of studies, and a row of texts for each."""
    metrics = {study.metric for study in comparison.studies}
    best = f"best {comparison.studies[0].metric}" if len(metrics) == 1 else "best"
    columns = ["study", "state", "trials", best, "best trial", "found after", "epochs", "device time"]
    has_reused = any(study.reused for study in comparison.studies)
    several = len({study.storage for study in comparison.studies}) > 1
    if has_reused:
        columns.insert(3, "reused")
    rows = []
    for study in comparison.studies:
        found = [step for step in study.steps if step.best == study.best][:1]
        rows.append(
            [
                f"{study.name} in {study.storage}" if several else study.name,
                study.state or "another program's",
                f"{study.trials:,}",
                *([f"{study.reused:,}"] if has_reused else []),
                format_number(study.best) + ("" if len(metrics) == 1 or study.best is None else f" {study.metric}"),
                shorten(study.best_trial),
                "".join(
                    f"{step.trials:,} of {study.trials:,}, {format_seconds(step.device_seconds)}" for step in found
                ),
                f"{study.epochs:,}",
                format_seconds(study.device_seconds),
            ]
        )
    return columns, rows


def comparison_remarks(comparison: Comparison) -> list[str]:
    """Return what a reader of a comparison must know: what differs, and which studies are not drawn."""
    left_out = [study.name for study in comparison.studies if study not in comparison.drawn]
    has_several = any(study.objectives > 1 for study in comparison.studies)
    return [
        *comparison.differences,
        *(["Of several objectives, the first one is compared"] if has_several else []),
        *([f"Not drawn, with another metric or without a completed trial: {', '.join(left_out)}"] if left_out else []),
    ]


def progress_figures(comparison: Comparison) -> list[CurveFigure]:
    """Return the best value so far, over trials and over device time; nothing if no study has a value."""
    drawn = comparison.drawn
    if not drawn:
        return []
    longest = max(study.steps[-1].device_seconds for study in drawn)
    unit = next((name for name, seconds in UNITS.items() if longest >= 3 * seconds), "seconds")
    by_time = [[step.device_seconds / UNITS[unit] for step in study.steps] for study in drawn]
    by_trials = [[float(step.trials) for step in study.steps] for study in drawn]
    metric = drawn[0].metric
    return [
        _figure(f"Best {metric} over trials", "trials that have ended", drawn, by_trials, has_whole_x=True),
        _figure(f"Best {metric} over device time", f"device time, {unit}", drawn, by_time, has_whole_x=False),
    ]


def _figure(
    title: str, x_title: str, drawn: Sequence[StudyProgress], places: Sequence[Sequence[float]], *, has_whole_x: bool
) -> CurveFigure:
    several = len({study.storage for study in drawn}) > 1
    lines = []
    for study, xs, colour in zip(drawn, places, COLOURS, strict=False):
        x, y = _as_steps(xs, [step.best for step in study.steps])
        label = f"{study.name} in {study.storage}" if several else shorten(study.name)  # long paths may begin alike
        lines.append(Line(x, y, colour, label, hover=(label, study.metric)))
    end = math.ceil(max(max(each) for each in places))
    return CurveFigure(title, lines, [], end, is_log=False, x_title=x_title, has_whole_x=has_whole_x)


def _as_steps(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float | None], list[float | None]]:
    """Return a line that keeps each value until the next one."""
    x: list[float | None] = []
    y: list[float | None] = []
    for place, value in zip(xs, ys, strict=True):
        if y and value != y[-1]:
            x.append(place)
            y.append(y[-1])
        x.append(place)
        y.append(value)
    return x, y
