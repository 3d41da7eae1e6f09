"""Tables for the terminal: the trials of a study, failed trials, the studies of a database."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from hpo.report.formatting import format_number, format_seconds, format_value
from hpo.report.results import STATES, Results, TrialResult

if TYPE_CHECKING:
    from storage.studies import Summary

MAX_TABLE_ROWS = 50
MAX_PARAMS = 8  # with more parameters, only those that vary get a column

Column = tuple[str, Callable[[TrialResult], str]]


def trial_table(results: Results) -> Table:
    """Return the trials of a study as a table, best first, at most `MAX_TABLE_ROWS`; see `trial_columns`."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=escape(f"{results.study.name}: {len(results.trials)} trials"),
        title_justify="left",
        pad_edge=False,
    )
    columns = trial_columns(results)
    for name, _ in columns:
        words = name.split(" ")
        left = "left" if name == "state" else "right"
        table.add_column(escape("\n".join(words)), justify=left, vertical="bottom")  # type: ignore[arg-type]
    for trial in results.ranked[:MAX_TABLE_ROWS]:
        table.add_row(*(escape(cell(trial)) for _, cell in columns))
    if len(results.ranked) > MAX_TABLE_ROWS:
        table.caption = f"and {len(results.ranked) - MAX_TABLE_ROWS} more"
    return table


def trial_columns(results: Results) -> list[Column]:
    """Return the columns of a table of trials, each a (heading, function from a trial to its text) pair.

    The columns are: number, parameters, state, epochs, the last and the best value of the objective (or all objectives if
    there are several), test accuracy, seconds, and images per second where the trainable reports them.
    """
    params = results.param_names if len(results.param_names) <= MAX_PARAMS else results.varying_params
    columns: list[Column] = [("trial", lambda trial: str(trial.number))]
    columns += [(name, _param_of(name)) for name in params]
    columns += [("state", lambda trial: trial.state), ("epochs", lambda trial: str(trial.last_epoch or ""))]
    if len(results.objectives) > 1:
        columns += [(name, _objective_of(i)) for i, (name, _) in enumerate(results.objectives)]
    else:
        columns += [
            (f"last {results.metric}", lambda trial: format_number(trial.last.get(results.metric, _value(trial)))),
            (f"best {results.metric}", lambda trial: format_number(results.best_value(trial))),
        ]
    if any("test_accuracy" in trial.last for trial in results.trials):
        columns.append(("test_accuracy", lambda trial: format_number(trial.last.get("test_accuracy"))))
    columns.append(("seconds", lambda trial: f"{trial.seconds:,.1f}" if trial.seconds else ""))
    if any(trial.images_per_second for trial in results.trials):
        columns.append(("images/s", lambda trial: f"{trial.images_per_second:,.0f}" if trial.images_per_second else ""))
    return columns


def _param_of(name: str) -> Callable[[TrialResult], str]:
    return lambda trial: format_value(trial.params[name]) if name in trial.params else ""


def _objective_of(index: int) -> Callable[[TrialResult], str]:
    return lambda trial: format_number(trial.values[index]) if trial.values else ""


def _value(trial: TrialResult) -> float | None:
    return trial.values[0] if trial.values else None


def study_table(summaries: Sequence[Summary]) -> Table:
    """Return the studies of a database as a table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    states = [state for state in STATES if any(state in summary.counts for summary in summaries)]
    for name in ("study", "state", *states, "best", "metric", "last activity"):
        left = "left" if name in {"study", "state", "metric", "last activity"} else "right"
        table.add_column(name, justify=left, overflow="fold")  # type: ignore[arg-type]
    for each in summaries:
        table.add_row(
            escape(each.name),
            each.state or "another program's",
            *(f"{each.counts.get(state, 0):,}" for state in states),
            format_number(each.best),
            escape(each.metric),
            _ago(each.last_activity),
        )
    return table


def _ago(then: float | None) -> str:
    if then is None:
        return "never"
    seconds = max(0.0, time.time() - then)
    return f"{format_seconds(seconds)} ago" if seconds < 2 * 86400 else f"{datetime.date.fromtimestamp(then)}"


def failures(results: Results) -> list[str]:
    """Return a line with the reason for each failed trial, at most `MAX_TABLE_ROWS` and a count of the others."""
    lines = [f"trial {trial.number} failed: {trial.fail_reason}" for trial in results.trials if trial.state == "FAIL"]
    more = len(lines) - MAX_TABLE_ROWS
    return lines if more <= 0 else [*lines[:MAX_TABLE_ROWS], f"and {more:,} more failed"]
