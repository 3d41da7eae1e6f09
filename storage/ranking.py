"""Which ended trials a study can do without: all but the best, or all but the last. The database ranks them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from storage import optuna_tables, tables
from storage.errors import RETRY_SECONDS, retry_while_down
from storage.pareto import Direction, find_front, rank_best
from storage.records import CONTINUED_FROM, attempt_columns, attempt_of, read_attempt, read_final_values
from storage.study import Study

MAX_NUMBERS = 1000  # in one query; with more, the caller gets all trials and picks


@dataclass(frozen=True)
class SinceBest:
    """How long ago a study found its best value.

    Attributes:
        best: number of the trial with the best value, of equal ones the first; with several objectives, of the last trial
            that joined the Pareto front. None if none completed.
        ended: how many trials with a higher number have ended; 0 if none completed.
        has_earlier: whether a trial with a lower number has not ended: it may become the best one.
    """

    best: int | None
    ended: int
    has_earlier: bool = False


def count_since_best(study: Study, directions: Sequence[Direction]) -> SinceBest:
    """Count the trials that have ended and were created after the one with the best value.

    With several objectives, a trial counts as better if no trial with a lower number dominates or equals it: it joined the
    Pareto front. The last of these trials is on the front of all trials, too.

    Numbers give the order, not times: drivers store the times, and their clocks may differ. Failed trials do not count, nor
    those that were taken over from earlier studies, nor those that continue a trial of one: they come best first, so each
    next one is likely to be worse. The result of one may be the best.

    Args:
        study: the study.
        directions: of each objective.

    Raises:
        StorageError: the database cannot be used.
    """
    trial, value, attr = optuna_tables.trials, optuna_tables.trial_values, optuna_tables.trial_user_attributes
    own = sa.and_(trial.c.study_id == study.study_id, ~tables.is_imported(trial, tables.LEARNED))
    completed = (own, trial.c.state == TrialState.COMPLETE)
    best = (
        sa.select(trial.c.number)
        .join(value, sa.and_(value.c.trial_id == trial.c.trial_id, value.c.objective == 0))
        .where(*completed, value.c.value.is_not(None))
        .order_by(value.c.value.desc() if directions[0] == "maximize" else value.c.value, trial.c.number)
        .limit(1)
    )
    has_ended = trial.c.state.in_((TrialState.COMPLETE, TrialState.PRUNED))
    is_open = trial.c.state.in_(optuna_tables.UNFINISHED)

    def read() -> SinceBest:
        with study.database.snapshot() as connection:  # else, one that becomes the best meanwhile counts as no better
            several = len(directions) > 1
            number = _last_of_front(connection, completed, directions) if several else connection.scalar(best)
            if number is None:
                return SinceBest(None, 0)
            is_continued = sa.exists().where(attr.c.trial_id == trial.c.trial_id, attr.c.key == CONTINUED_FROM)
            is_imported = sa.exists().where(tables.imports.c.trial == trial.c.trial_id)
            is_trained = ~sa.or_(is_imported, is_continued)
            later = sa.select(sa.func.count()).where(own, has_ended, is_trained, trial.c.number > number)
            has_earlier = sa.select(sa.exists().where(own, is_open, trial.c.number < number))
            return SinceBest(number, int(connection.scalar(later) or 0), bool(connection.scalar(has_earlier)))

    return retry_while_down(study.database, read)


def count_created_since(study: Study, best: int) -> float:
    """Return how many trials were created after one that was the best; infinity if another one may be the best by now.

    That may be one with a lower number that runs again after a failure, or any, if the database was restored from a copy.

    Args:
        study: the study.
        best: the number of the best trial when it was looked for last. Those with lower numbers had ended then.

    Raises:
        StorageError: the database cannot be used.
    """
    trial = optuna_tables.trials
    of_study = trial.c.study_id == study.study_id
    is_open = trial.c.state.in_(optuna_tables.UNFINISHED)
    query = sa.select(
        sa.select(sa.func.max(trial.c.number)).where(of_study).scalar_subquery().label("last"),
        sa.exists().where(of_study, is_open, trial.c.number < best).label("has_earlier"),
        sa.exists().where(of_study, trial.c.number == best, trial.c.state == TrialState.COMPLETE).label("stands"),
    )

    def read() -> float:
        with study.database.engine.connect() as connection:
            row = connection.execute(query).one()
            return row.last - best if row.stands and not row.has_earlier else math.inf

    return retry_while_down(study.database, read)


@dataclass(frozen=True)
class EndedTrial:
    """A trial that is COMPLETE or PRUNED: it never runs again.

    Attributes:
        number: its number.
        key: of its configuration.
        attempt: see `records.attempt_of`.
    """

    number: int
    key: str
    attempt: str


def superfluous_trials(
    study: Study,
    count: int,
    directions: Sequence[Direction] | None,
    *,
    among: Collection[int] | None = None,
    timeout_seconds: float = RETRY_SECONDS,
) -> list[EndedTrial]:
    """Return the trials that ended, by number, without the first `count` completed ones.

    FAIL is not an end here: a failed trial may run again. With one objective, a trial that is returned once is always
    returned later, unless trials are deleted: values of ended trials do not change. With several, it may become one of the
    best again when a new trial dominates some of those that were better.

    Args:
        study: the study.
        count: how many completed trials are left out.
        directions: of each objective: those with the best values are left out, ties by lower number, an infinite value last;
            with several objectives, in the order of `pareto.rank_best`. None leaves out those that ended last.
        among: numbers of trials; others are not returned. They do count in the ranking. None for all.
        timeout_seconds: how long to retry while the database is down.

    Raises:
        StorageError: the database cannot be used.
    """
    several = directions is not None and len(directions) > 1
    query = _query(study, count, None if directions is None else directions[0], keeps_all=several)
    is_short = among is not None and len(among) <= MAX_NUMBERS
    if among is not None and is_short:
        query = query.where(optuna_tables.trials.c.number.in_(among))

    def read() -> list[EndedTrial]:
        with study.database.snapshot() as connection:  # else, a trial that completes meanwhile is not among the best
            best = _read_best(connection, study, count, directions) if directions is not None and several else set()
            rows = connection.execute(query)
            return [
                EndedTrial(row.number, row.key, attempt_of(read_attempt(row))) for row in rows if row.number not in best
            ]

    found = retry_while_down(study.database, read, timeout_seconds)
    return found if among is None or is_short else [trial for trial in found if trial.number in set(among)]


def _last_of_front(
    connection: sa.Connection, completed: Sequence[sa.ColumnElement[bool]], directions: Sequence[Direction]
) -> int | None:
    """Return the number of the last trial that joined the Pareto front; None without one."""
    found = read_final_values(connection, completed, len(directions))
    front = find_front(list(found.values()), directions)
    first: dict[tuple[float, ...], int] = {}  # of equal trials, only the first one was new
    for number, values in [list(found.items())[place] for place in front]:
        first.setdefault(values, number)
    return max(first.values(), default=None)


def _read_best(connection: sa.Connection, study: Study, count: int, directions: Sequence[Direction]) -> set[int]:
    """Return the numbers of the best trials that completed, of those that may have files."""
    found = read_final_values(connection, _may_be_kept(study), len(directions))
    numbers = list(found)
    return {numbers[place] for place in rank_best(list(found.values()), directions, count)}


def _has_files(study: Study) -> tuple[sa.ColumnElement[bool], ...]:
    if tables.imports.name in study.database.missing_tables:
        return ()
    # An earlier study has the files of a reused trial.
    return (~sa.exists().where(tables.imports.c.trial == optuna_tables.trials.c.trial_id),)


def _may_be_kept(study: Study) -> tuple[sa.ColumnElement[bool], ...]:
    trial = optuna_tables.trials
    return (
        trial.c.study_id == study.study_id,
        trial.c.state == TrialState.COMPLETE,
        # Without such a row, another program added the trial.
        sa.exists().where(tables.trials.c.trial == trial.c.trial_id),
        *_has_files(study),
    )


def _query(study: Study, count: int, direction: Direction | None, *, keeps_all: bool) -> sa.Select[Any]:
    """Return the query of the trials that ended, without `count` of them, which are left out unless `keeps_all` is set."""
    trial, value = optuna_tables.trials, optuna_tables.trial_values
    kept = sa.select(trial.c.trial_id).where(*_may_be_kept(study))
    if direction is None:
        kept = kept.order_by(trial.c.datetime_complete.desc(), trial.c.number.desc())
    else:
        order = value.c.value.desc() if direction == "maximize" else value.c.value.asc()
        kept = kept.join(value, sa.and_(value.c.trial_id == trial.c.trial_id, value.c.objective == 0))
        kept = kept.order_by(order.nulls_last(), trial.c.number)
    return (
        sa.select(trial.c.number, tables.trials.c.key, *attempt_columns())
        .join(tables.trials, tables.trials.c.trial == trial.c.trial_id)
        .where(
            trial.c.study_id == study.study_id,
            trial.c.state.in_((TrialState.COMPLETE, TrialState.PRUNED)),
            *(() if keeps_all else (trial.c.trial_id.not_in(kept.limit(count)),)),
            *_has_files(study),
        )
        .order_by(trial.c.number)
    )
