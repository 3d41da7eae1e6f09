"""Studies side by side: their best values, and how soon they found them, over trials and over device time."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hpo.report.curves import COLOURS, CurveFigure, Line
from hpo.report.formatting import describe_seeds, format_number, format_seconds, format_value, shorten
from hpo.report.reading import read_results
from hpo.report.results import Results
from hpo.report.trials import TrialResult
from storage.pareto import Direction, find_front

if TYPE_CHECKING:
    from storage.study import Study

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
class ObjectiveProgress:
    """What one study found for one of its objectives.

    Attributes:
        metric: the objective.
        maximize: whether it is maximized.
        best: the best value of a completed trial; None without one.
        best_trial: its number and parameters; empty without one.
        steps: in order; empty without a value.
    """

    metric: str
    maximize: bool
    best: float | None
    best_trial: str
    steps: list[Step]


@dataclass(frozen=True)
class StudyProgress:
    """What one study found, and what for.

    Attributes:
        name: what names it on the command line.
        storage: the URL of its database, without a password.
        state: see `storage.summaries.state_of`.
        objectives: what it found for each; at least one.
        front: the values of each trial on the Pareto front; empty for a single objective.
        trials: how many trials have ended that the study trained.
        reused: how many results it has from earlier studies. They are its best values from the start, and cost it nothing.
        epochs: how many epochs the study trained, those of unfinished trials included.
        device_seconds: how long devices were used for them: a trial that had a quarter of a GPU counts a quarter.
        settings: {what: value} that decides whether values can be compared; only `objective` if hpo cannot read the others.
    """

    name: str
    storage: str
    state: str
    objectives: list[ObjectiveProgress]
    front: list[list[float]]
    trials: int
    reused: int
    epochs: int
    device_seconds: float
    settings: dict[str, str]

    def objective(self, like: ObjectiveProgress) -> ObjectiveProgress | None:
        """Return the objective with the same metric and direction as another study's; None without one."""
        same = (each for each in self.objectives if (each.metric, each.maximize) == (like.metric, like.maximize))
        return next(same, None)


@dataclass(frozen=True)
class Comparison:
    """Studies side by side.

    Attributes:
        studies: in the order in which they were named.
        differences: what differs between them, one line each: their values may then not be comparable.
    """

    studies: list[StudyProgress]
    differences: list[str]

    def drawn(self, like: ObjectiveProgress) -> list[tuple[StudyProgress, ObjectiveProgress]]:
        """Return the studies in the figures of an objective, each with its own: those that have a value of it."""
        same = [(study, found) for study in self.studies if (found := study.objective(like)) is not None]
        return [(study, found) for study, found in same if found.steps][:MAX_LINES]

    def joint_front(self) -> list[int]:
        """Return how many trials of each study are on the Pareto front of the trials of all studies.

        It has a number for each study; empty if fewer than two have a front, or if their objectives differ.
        """
        fronts = [study for study in self.studies if study.front]
        directions = {tuple((each.metric, each.maximize) for each in study.objectives) for study in fronts}
        if len(fronts) < 2 or len(directions) > 1:
            return []
        owners = [place for place, study in enumerate(self.studies) for _ in study.front]
        joint = find_front([values for study in self.studies for values in study.front], _directions(fronts[0]))
        counts = Counter(owners[place] for place in joint)
        return [counts[place] for place in range(len(self.studies))]

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
    return StudyProgress(
        results.name,
        study.database.url,
        results.state,
        [_read_objective(results, place) for place in range(len(results.objectives))],
        [list(trial.values) for trial in results.best_trials] if len(results.objectives) > 1 else [],
        sum(trial.has_ended for trial in results.trained),
        len(results.trials) - len(results.trained),
        sum(_count_trained(trial, epochs.get(trial.trial_id, 0)) for trial in results.trained),
        sum(map(_device_seconds, results.trained)),
        _settings(results),
    )


def _read_objective(results: Results, place: int) -> ObjectiveProgress:
    metric, maximize = results.objectives[place]
    values = {trial.number: value for trial in results.trials if (value := _value(trial, place)) is not None}
    best = (max if maximize else min)(values.values(), default=None)
    trial = next((each for each in results.ranked if values.get(each.number) == best), None) if values else None
    label = "" if trial is None else results.label(trial)
    return ObjectiveProgress(metric, maximize, best, label, list(_steps(results, place)))


def _directions(study: StudyProgress) -> list[Direction]:
    return ["maximize" if each.maximize else "minimize" for each in study.objectives]


def _count_trained(trial: TrialResult, epochs: int) -> int:
    """Return how many of a trial's epochs its study trained: not those of a trial that it continues."""
    return max(0, epochs - trial.continued_epochs)


def _device_seconds(trial: TrialResult) -> float:
    """Return for how long a trial held its device. Of a trial of another program, only start and end are known."""
    return sum(trial.device_seconds.values()) or trial.wall_seconds


def _steps(results: Results, place: int) -> Iterator[Step]:
    ended = sorted(
        (trial for trial in results.trained if trial.has_ended),
        key=lambda trial: (trial.completed or datetime.min, trial.number),
    )
    reused = [value for trial in results.trials if trial.reused_from and (value := _value(trial, place)) is not None]
    better = max if results.objectives[place][1] else min
    best = better(reused, default=None)
    last = None if best is None else Step(0, 0.0, best)
    if last is not None:
        yield last
    spent = 0.0
    for trials, trial in enumerate(ended, start=1):
        spent += _device_seconds(trial)
        value = _value(trial, place)
        if value is not None and (best is None or better(value, best) != best):
            best = value
            yield (last := Step(trials, spent, best))
    if last is not None and best is not None and last.trials < len(ended):
        yield Step(len(ended), spent, best)


def _value(trial: TrialResult, place: int) -> float | None:
    """Return an objective of a completed trial; None if it has none, or an infinite one."""
    has_value = trial.state == "COMPLETE" and place < len(trial.values)
    return trial.values[place] if has_value and math.isfinite(trial.values[place]) else None


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
    """Return the headings of a table of studies, and rows of texts: one for each objective of each study.

    What is of the whole study is in the row of its first objective.
    """
    metrics = {objective.metric for study in comparison.studies for objective in study.objectives}
    best = f"best {min(metrics)}" if len(metrics) == 1 else "best"
    found = [best, "best trial", "found after"]
    joint = comparison.joint_front() or [0] * len(comparison.studies)
    has_databases = len({study.storage for study in comparison.studies}) > 1
    optional = {
        "reused": any(study.reused for study in comparison.studies),
        "Pareto front": any(len(study.objectives) > 1 for study in comparison.studies),
        "of the joint one": any(joint),
    }
    shown = [name for name, is_shown in optional.items() if is_shown]
    columns = ["study", "state", "trials", *shown, *found, "epochs", "device time"]
    rows = []
    for study, count in zip(comparison.studies, joint, strict=True):
        row = {
            "study": f"{study.name} in {study.storage}" if has_databases else study.name,
            "state": study.state or "another program's",
            "trials": f"{study.trials:,}",
            "reused": f"{study.reused:,}",
            "Pareto front": f"{len(study.front):,}" if len(study.objectives) > 1 else "",
            "of the joint one": f"{count:,} of {sum(joint):,}" if study.front else "",
            "epochs": f"{study.epochs:,}",
            "device time": format_seconds(study.device_seconds),
        }
        for objective in study.objectives:
            value = format_number(objective.best)
            is_named = len(metrics) > 1 and objective.best is not None
            cells = (f"{value} {objective.metric}" if is_named else value, shorten(objective.best_trial))
            rows.append(row | dict(zip(found, (*cells, _found_after(study, objective)), strict=True)))
            row = {}
    return columns, [[row.get(column, "") for column in columns] for row in rows]


def _found_after(study: StudyProgress, objective: ObjectiveProgress) -> str:
    first = next((step for step in objective.steps if step.best == objective.best), None)
    if first is None:
        return ""
    return f"{first.trials:,} of {study.trials:,}, {format_seconds(first.device_seconds)}"


def comparison_remarks(comparison: Comparison) -> list[str]:
    """Return what a reader of a comparison must know: what differs, and which studies are not drawn."""
    drawn = {id(study) for objective in comparison.studies[0].objectives for study, _ in comparison.drawn(objective)}
    left_out = [study.name for study in comparison.studies if id(study) not in drawn]
    return [
        *comparison.differences,
        *(["The joint Pareto front is that of the trials of all these studies"] if comparison.joint_front() else []),
        *([f"Not drawn, with another metric or without a completed trial: {', '.join(left_out)}"] if left_out else []),
    ]


def progress_figures(comparison: Comparison) -> list[CurveFigure]:
    """Return the best value so far of each objective of the first study, over trials and over device time.

    An objective without a value in any study has no figures.
    """
    return [
        figure
        for objective in comparison.studies[0].objectives
        if (drawn := comparison.drawn(objective))
        for figure in _figures_of(drawn, objective.metric)
    ]


def _figures_of(drawn: Sequence[tuple[StudyProgress, ObjectiveProgress]], metric: str) -> list[CurveFigure]:
    longest = max(objective.steps[-1].device_seconds for _, objective in drawn)
    unit = next((name for name, seconds in UNITS.items() if longest >= 3 * seconds), "seconds")
    by_time = [[step.device_seconds / UNITS[unit] for step in objective.steps] for _, objective in drawn]
    by_trials = [[float(step.trials) for step in objective.steps] for _, objective in drawn]
    return [
        _figure(f"Best {metric} over trials", "trials that have ended", drawn, by_trials, has_whole_x=True),
        _figure(f"Best {metric} over device time", f"device time, {unit}", drawn, by_time, has_whole_x=False),
    ]


def _figure(
    title: str,
    x_title: str,
    drawn: Sequence[tuple[StudyProgress, ObjectiveProgress]],
    places: Sequence[Sequence[float]],
    *,
    has_whole_x: bool,
) -> CurveFigure:
    several = len({study.storage for study, _ in drawn}) > 1
    lines = []
    for (study, objective), xs, colour in zip(drawn, places, COLOURS, strict=False):
        x, y = _as_steps(xs, [step.best for step in objective.steps])
        # Not shortened with a database: long paths may have the same start.
        label = f"{study.name} in {study.storage}" if several else shorten(study.name)
        lines.append(Line(x, y, colour, label, hover=(label, objective.metric)))
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
