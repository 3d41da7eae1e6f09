"""What a list of studies shows of each: its state, its counts and its best value, without reading the trials."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC
from typing import Any

from storage import records
from storage.database import Database
from storage.errors import retry_while_down
from storage.lease import is_run_alive
from storage.optuna_internals import study_id
from storage.pareto import direction_of
from storage.records import NEVER_RUN
from storage.revisions import references
from storage.study import TOTAL, metric_names, settings_of, unique_name_of
from storage.usage import read_device_seconds


@dataclass(frozen=True)
class Summary:
    """One study in a list of studies.

    Attributes:
        name: what names the study, see `references`.
        state: see `state_of`.
        counts: {state: number of trials}, without trials never run.
        metric: the objective's name; those of several are joined by commas.
        best: the best value of a completed trial; None if there is none, if it is infinite, or with several objectives.
        last_activity: when a run or trial was last active, in seconds since 1970; None if there was none.
        unique_name: see `Study.unique_name`; empty for a study of another program.
        device_seconds: what its trials have used of GPUs, or of the CPU, as stored.
        cost: the price of that, where the settings name one; None otherwise.
        disk_bytes: the size of its files. Storage does not know them: the caller sets it.
        front: with several objectives, how many trials are on the Pareto front; None with one.
    """

    name: str
    state: str
    counts: dict[str, int]
    metric: str
    best: float | None
    last_activity: float | None
    unique_name: str = ""
    device_seconds: float = 0.0
    cost: float | None = None
    disk_bytes: int = 0
    front: int | None = None


def summarize(database: Database) -> list[Summary]:
    """Return a summary of each study, oldest first, without reading the trials."""
    # Before the trials: a search that ends meanwhile counts as running, which it was, and never as one with trials left.
    runs = retry_while_down(database, lambda: records.read_runs(database))
    running = {run.study for run in runs if is_run_alive(run)}
    counts: dict[int, dict[str, int]] = {}
    last: dict[int, float] = {}
    for row in retry_while_down(database, lambda: records.count_trials(database, without=NEVER_RUN)):
        counts.setdefault(row.study, {})[row.state] = row.trials
        if row.last is not None:  # Optuna stores UTC without a time zone
            last[row.study] = max(last.get(row.study, 0.0), row.last.replace(tzinfo=UTC).timestamp())
    for run in runs:
        last[run.study] = max(last.get(run.study, 0.0), run.last_heard)
    ended = retry_while_down(database, lambda: records.count_ended_keys(database))
    retried = retry_while_down(database, lambda: records.count_retried(database))
    used = retry_while_down(database, lambda: read_device_seconds(database))
    studies = retry_while_down(database, lambda: database.optuna_storage.get_all_studies())
    names = references(study.study_name for study in studies)
    summaries = []
    for study in studies:
        key = study_id(study)
        with contextlib.suppress(KeyError, ValueError):  # the study was deleted; another one may have its id
            summary = _summary(
                database,
                study,
                counts.get(key, {}),
                last.get(key),
                ended=ended.get(key, 0),
                retried=retried.get(key, 0),
                is_running=key in running,
            )
            seconds = used.get(key, 0.0)
            cost = _cost(settings_of(study.user_attrs), seconds)
            summaries.append(replace(summary, name=names[summary.name], device_seconds=seconds, cost=cost))
    return summaries


def _summary(
    database: Database,
    study: Any,
    counts: dict[str, int],
    last_activity: float | None,
    *,
    ended: int,
    retried: int,
    is_running: bool,
) -> Summary:
    best = None
    if len(study.directions) == 1 and "COMPLETE" in counts:
        trial = retry_while_down(database, lambda: database.optuna_storage.get_best_trial(study_id(study)))
        value = trial.value
        if records.LEARNED_FROM in trial.user_attrs:  # no result of this study
            is_maximized = study.directions[0].name == "MAXIMIZE"
            value = retry_while_down(
                database, lambda: records.read_best_value(database, study_id(study), maximize=is_maximized)
            )
        best = value if value is not None and math.isfinite(value) else None
    front = None
    if len(study.directions) > 1:
        directions = [direction_of(each) for each in study.directions]
        front = retry_while_down(database, lambda: records.count_front(database, study_id(study), directions))
    settings = settings_of(study.user_attrs)
    return Summary(
        study.study_name,
        state_of(study.user_attrs, counts, is_running=is_running, ended=ended, retried=retried),
        {state: count for state, count in counts.items() if count},
        ", ".join(metric_names(settings)),
        best,
        last_activity,
        unique_name_of(study.study_name, study.user_attrs),
        front=front,
    )


def _cost(settings: Mapping[str, Any], device_seconds: float) -> float | None:
    """Return the price of device time; None if the settings name none, or if another program has changed them."""
    budget = settings.get("budget")
    prices = budget.get("cost") if isinstance(budget, dict) else None
    price = prices.get("gpu_hour") if isinstance(prices, dict) else None
    return price * device_seconds / 3600 if isinstance(price, int | float) else None


def state_of(attrs: Mapping[str, Any], counts: Mapping[str, int], *, is_running: bool, ended: int, retried: int) -> str:
    """Return `running` while a run is alive, else `finished` or `resumable`; empty for a study of another program.

    A grid of which as many trials have ended as it has points counts as finished. They may be others than its points, which
    only the search space knows, see `hpo.search.earlier.continuation.lacks_points`.

    Args:
        attrs: the study's user attributes, see `Study.attrs`.
        counts: {state: number of trials}.
        is_running: whether a run is alive. Ask before the trials are read: those of one that ends later are all counted.
        ended: see `Study.count_ended_keys`. Runs compare the same number with the budget.
        retried: see `Study.count_retried`.
    """
    if not isinstance(attrs.get("hpo:settings"), dict):
        return ""
    if is_running:
        return "running"
    if TOTAL in attrs:
        wanted = attrs[TOTAL]
    else:  # opened by version 1 of our tables only, which stored the number of a grid's points
        budget = settings_of(attrs).get("budget")
        wanted = attrs.get("hpo:points", budget.get("trials") if isinstance(budget, dict) else None)
    wanted = wanted if isinstance(wanted, int) else None  # any program may change it
    # Beyond it, only trials are run that the user asked for; none that was interrupted before the budget was reduced.
    if wanted is not None:
        return "finished" if ended >= wanted and not retried else "resumable"
    left = counts.get("WAITING", 0) + counts.get("RUNNING", 0)
    return "finished" if ended and not left else "resumable"


def elapsed_seconds(runs: Iterable[Any]) -> float:
    """Return for how long any of these runs was active. Simultaneous runs count once.

    Args:
        runs: rows of `records.read_runs`, oldest first.
    """
    spent, covered_until = 0.0, 0.0
    for run in runs:
        spent += max(0.0, run.last_heard - max(run.started, covered_until))
        covered_until = max(covered_until, run.last_heard)
    return spent
