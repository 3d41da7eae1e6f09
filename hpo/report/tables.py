"""Tables for the terminal: the trials of a study, failed trials, the studies of a database."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.measure import Measurement
from rich.table import Table

from hpo.report.comparison import Comparison, comparison_rows
from hpo.report.formatting import (
    format_amount,
    format_bytes,
    format_device_time,
    format_mean,
    format_number,
    format_params,
    format_seconds,
    format_value,
)
from hpo.report.results import Results
from hpo.report.trials import STATES, TrialResult

if TYPE_CHECKING:
    from rich.console import Console

    from storage.summaries import Summary

MAX_TABLE_ROWS = 50
SOURCES = ("reused from", "continued from")  # columns that say which trial of an earlier study a trial is from
MAX_PARTS = 20  # of a schedule of hyperparameters
MAX_TIES = 10  # that are named
MAX_PARAMS = 8  # with more parameters, only those that vary get a column
MAX_NARROW_PARAMS = 4  # with more that vary, they share a column where the table would be too wide
ALL_PARAMS = "parameters"  # the heading of that column

Column = tuple[str, Callable[[TrialResult], str]]


def trial_table(results: Results, console: Console) -> Table:
    """Return the trials of a study as a table for `console`, best first, at most `MAX_TABLE_ROWS`; see `trial_columns`.

    In a narrow console, headings are folded, then many parameters share a column, and then the least important columns are
    left out, so that no number is cut. The caption names these columns.
    """
    unlimited = console.options.update(max_width=sys.maxsize)
    for table in _layouts(results):
        if Measurement.get(console, unlimited, table).minimum <= console.width:
            break
    return table


def _layouts(results: Results) -> Iterator[Table]:
    """Yield tables of the same trials, each narrower than the one before."""
    columns = trial_columns(results)
    yield _build_trial_table(results, columns)
    yield _build_trial_table(results, columns, fold=True)
    fixed = [name for name in results.param_names if name not in results.varying_params]
    left_out: list[str] = []
    if len(results.varying_params) > MAX_NARROW_PARAMS:
        columns = _join_params(results, columns)
        left_out = [name for name in fixed if len(results.param_names) <= MAX_PARAMS]
        yield _build_trial_table(results, columns, left_out, fold=True)
    for name in [*fixed, "images/s", "seconds", *SOURCES, f"last {results.metric}", "test_accuracy", "epochs"]:
        if any(name == heading for heading, _ in columns):
            columns = [column for column in columns if column[0] != name]
            left_out.append(name)
            yield _build_trial_table(results, columns, left_out, fold=True)


def _join_params(results: Results, columns: Sequence[Column]) -> list[Column]:
    """Return columns with one for all parameters that vary, instead of one for each: they would be a few letters wide."""

    def describe(trial: TrialResult) -> str:
        return format_params({name: trial.params[name] for name in results.varying_params if name in trial.params})

    return [*(column for column in columns if column[0] not in results.param_names), (ALL_PARAMS, describe)]


def _build_trial_table(
    results: Results, columns: Sequence[Column], left_out: Sequence[str] = (), *, fold: bool = False
) -> Table:
    """Return the table of trials with these columns; `fold` breaks the headings at underscores too."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{results.name}: {len(results.trials)} trials",
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
    )
    headings = [name.replace(" ", "\n").replace("_", "_\n" if fold else "_") for name, _ in columns]
    lines = max(heading.count("\n") for heading in headings)
    for (name, _), heading in zip(columns, headings, strict=True):
        # Headings stand at the bottom, and cells at the top: one with all parameters may have several lines.
        text = "\n" * (lines - heading.count("\n")) + heading
        left = "left" if name in {"state", "front", ALL_PARAMS} else "right"
        table.add_column(text, justify=left, overflow="fold")  # type: ignore[arg-type]
    for trial in results.ranked[:MAX_TABLE_ROWS]:
        table.add_row(*(cell(trial) for _, cell in columns))
    captions = []
    if len(results.ranked) > MAX_TABLE_ROWS:
        captions.append(f"and {len(results.ranked) - MAX_TABLE_ROWS} more")
    if left_out:
        captions.append(f"too narrow for: {', '.join(left_out)}")
    table.caption = "; ".join(captions) or None
    return table


def trial_columns(results: Results) -> list[Column]:
    """Return the columns of a table of trials, each a (heading, function from a trial to its text) pair.

    The columns are: number, parameters (more than `MAX_PARAMS` come last), state, epochs, the last and the best value of the
    objective (if there are several, whether the trial is on the Pareto front, and the last value of each), test accuracy,
    seconds, and images per second where the trainable reports them. Where results of an earlier study stand, a column says
    which trial they are from; where trials continue others, which ones.
    """
    params = results.param_names if len(results.param_names) <= MAX_PARAMS else results.varying_params
    param_columns: list[Column] = [(name, _param_of(name)) for name in params]
    last_columns = param_columns if len(params) > MAX_PARAMS else []  # with results behind them, nobody would see these
    columns: list[Column] = [("trial", lambda trial: str(trial.number))]
    columns += [] if last_columns else param_columns
    columns += [("state", lambda trial: trial.state), ("epochs", lambda trial: str(trial.last_epoch or ""))]
    if any(trial.reused_from for trial in results.trials):
        columns.append((SOURCES[0], lambda trial: trial.reused_from))
    if any(trial.continued_from for trial in results.trials):
        columns.append((SOURCES[1], lambda trial: trial.continued_from))
    if len(results.objectives) > 1:
        columns.append(("front", lambda trial: "yes" if trial.number in results.pareto_front else ""))
        columns += [(name, _objective_of(i, name)) for i, (name, _) in enumerate(results.objectives)]
    else:
        columns += [
            (f"last {results.metric}", lambda trial: _last(trial, results.metric, _value(trial))),
            (f"best {results.metric}", lambda trial: format_number(results.best_value(trial))),
        ]
    if any("test_accuracy" in trial.last for trial in results.trials):
        columns.append(("test_accuracy", lambda trial: _last(trial, "test_accuracy")))
    columns.append(("seconds", lambda trial: f"{trial.seconds:,.1f}" if trial.seconds else ""))
    if any(trial.images_per_second for trial in results.trials):
        columns.append(("images/s", lambda trial: f"{trial.images_per_second:,.0f}" if trial.images_per_second else ""))
    return [*columns, *last_columns]


def _param_of(name: str) -> Callable[[TrialResult], str]:
    return lambda trial: format_value(trial.params[name]) if name in trial.params else ""


def _objective_of(index: int, name: str) -> Callable[[TrialResult], str]:
    return lambda trial: format_mean(trial.values[index], trial.standard_error(name)) if trial.values else ""


def _last(trial: TrialResult, metric: str, otherwise: float | None = None) -> str:
    """Return a metric after the last epoch; with several seeds, with its standard error."""
    return format_mean(trial.last.get(metric, otherwise), trial.standard_error(metric))


def _value(trial: TrialResult) -> float | None:
    return trial.values[0] if trial.values else None


def study_table(summaries: Sequence[Summary]) -> Table:
    """Return the studies of a database as a table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    states = [state for state in STATES if any(state in summary.counts for summary in summaries)]
    costs = ["cost"] if any(summary.cost is not None for summary in summaries) else []
    for name in ("study", "state", *states, "best", "metric", "device-hours", *costs, "last activity", "on disk"):
        left = "left" if name in {"study", "state", "metric", "last activity"} else "right"
        table.add_column(name, justify=left, overflow="fold")  # type: ignore[arg-type]
    for each in summaries:
        table.add_row(
            each.name,
            each.state or "another program's",
            *(f"{each.counts.get(state, 0):,}" for state in states),
            format_number(each.best) if each.front is None else f"front of {each.front:,}",
            each.metric,
            format_amount(each.device_seconds / 3600) if each.unique_name else "",
            *("" if each.cost is None else format_amount(each.cost) for _ in costs),
            _ago(each.last_activity),
            format_bytes(each.disk_bytes) if each.unique_name else "",
        )
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Return studies side by side as a table."""
    columns, rows = comparison_rows(comparison)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        left = "left" if name in {"study", "state", "best trial"} else "right"
        table.add_column(name, justify=left, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*row)
    return table


def _ago(then: float | None) -> str:
    if then is None:
        return "never"
    seconds = max(0.0, time.time() - then)
    return f"{format_seconds(seconds)} ago" if seconds < 2 * 86400 else f"{datetime.date.fromtimestamp(then)}"


def device_time(results: Results) -> list[str]:
    """Return a line with the device time of a study and its cost, if its budget limits or prices it."""
    if results.space is None or not results.space.budget.shows_device_time:
        return []
    return [f"Used so far: {format_device_time(results.space.budget, results.device_seconds)}."]


def describe_schedule(results: Results, trial: TrialResult) -> str:
    """Return how the hyperparameters of a trial of a population changed while it trained; empty if they did not."""
    line = results.line(trial)
    if len(line) == 1:
        return ""
    names = [name for name in results.param_names if len({repr(each.params.get(name)) for each, _ in line}) > 1]
    parts = []
    for each, last in line[-MAX_PARTS:]:
        params = ", ".join(f"{name} {format_value(each.params[name])}" for name in names if name in each.params)
        start = each.continued_epochs + 1
        if start <= last:
            epochs = f"epoch {last}" if start == last else f"epochs {start} to {last}"
            parts.append(f"{params or 'the same'} in {epochs} (#{each.number})")
    more = "..., " if len(line) > MAX_PARTS else ""
    return f"{more}{'; '.join(parts)}"


def describe_ties(results: Results) -> str:
    """Return which trials are as good as the best one, as far as several seeds can tell; empty for none."""
    numbers = [f"#{trial.number}" for trial in results.ties]
    if not numbers:
        return ""
    named = ", ".join(numbers[:MAX_TIES]) + (
        f" and {len(numbers) - MAX_TIES:,} more" if len(numbers) > MAX_TIES else ""
    )
    return f"not clearly better, within the standard error of the difference, than {named}"


def failures(results: Results) -> list[str]:
    """Return a line with the reason for each failed trial, at most `MAX_TABLE_ROWS` and a count of the others."""
    lines = [f"trial {trial.number} failed: {trial.fail_reason}" for trial in results.trials if trial.state == "FAIL"]
    more = len(lines) - MAX_TABLE_ROWS
    return lines if more <= 0 else [*lines[:MAX_TABLE_ROWS], f"and {more:,} more failed"]
