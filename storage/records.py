"""Reading and writing the rows of our tables."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from storage import optuna_tables
from storage.database import Database
from storage.optuna_internals import FIXED_PARAMS
from storage.pareto import Direction, find_front
from storage.tables import LEARNED, REUSED, imports, is_imported, metrics, rungs, runs, trials

DUPLICATE = "duplicate of an earlier trial"
REJECTED = "breaks a constraint"
NEVER_RUN = {DUPLICATE, REJECTED}  # values of `fail_reason` of trials that no run trained

RETRIED = "retried"  # user attribute of a trial that `hpo retry` let run again, even if the budget is spent
ENQUEUED = "hpo:enqueued"  # user attribute of a trial that another program has added

# User attributes of a trial that was started from its first epoch again, see `attempt_of`:
ATTEMPT = "attempt"
ATTEMPT_TOKEN = "attempt_token"
FIRST_ATTEMPT = "1"

# User attributes of trials that were taken over from an earlier study, {study, trial, id} both:
LEARNED_FROM = "learned_from"
REUSED_FROM = "reused_from"

# User attribute of a trial that had ended when its study was copied, {study, trial, id} of the study that trained it:
COPIED_FROM = "copied_from"

# User attribute of a trial that continues a shorter one of an earlier study, see `storage.parents.Parent`:
CONTINUED_FROM = "continued_from"

# Of a member of a population, see `storage.population`, {trial: number, epoch: after which} both. The trial whose place it
# took, and the one that took its place:
REPLACES = "replaces"
REPLACED_BY = "replaced_by"
REPLACED_POOL = "pbt/replaced"  # of `hpo_rungs`: one row for each trial that was replaced, to count them

Params = dict[str, Any]
Metrics = dict[int, dict[str, float]]  # {epoch: {name: value}}


# --- metrics and values -----------------------------------------------------------------------------------------------


def write_metrics(connection: sa.Connection, epochs: Iterable[tuple[int, int, Mapping[str, float]]]) -> None:
    """Write the metrics of any number of epochs. Existing values are replaced.

    Args:
        connection: in the caller's transaction.
        epochs: (trial_id, epoch, {name: value}).
    """
    rows = [
        {"trial": trial_id, "epoch": epoch, "name": name, "value": None if math.isnan(value) else value}
        for trial_id, epoch, values in epochs
        for name, value in values.items()
    ]
    optuna_tables.upsert(connection, metrics, ("trial", "epoch", "name"), rows)


def delete_epochs(connection: sa.Connection, trial_id: int, from_epoch: int) -> None:
    """Delete a trial's metrics from an epoch on, and what its pruner noted of these epochs."""
    connection.execute(metrics.delete().where(metrics.c.trial == trial_id, metrics.c.epoch >= from_epoch))
    connection.execute(rungs.delete().where(rungs.c.trial == trial_id, rungs.c.epoch >= from_epoch))


def read_metrics(database: Database, study_id: int, trial_ids: Collection[int] | None = None) -> dict[int, Metrics]:
    """Return {trial_id: {epoch: {name: value}}} of a study, epochs in order.

    Args:
        database: the database.
        study_id: the study.
        trial_ids: read only these; None reads all.
    """
    query = (
        sa.select(metrics.c.trial, metrics.c.epoch, metrics.c.name, metrics.c.value)
        .join(trials, trials.c.trial == metrics.c.trial)
        .where(trials.c.study == study_id)
        .order_by(metrics.c.trial, metrics.c.epoch)
    )
    if trial_ids is not None:
        query = query.where(metrics.c.trial.in_(trial_ids))
    found: dict[int, Metrics] = {}
    with database.engine.connect() as connection:
        for trial_id, epoch, name, value in connection.execute(query):
            found.setdefault(trial_id, {}).setdefault(epoch, {})[name] = math.nan if value is None else value
    return found


def count_epochs(database: Database, study_id: int) -> dict[int, int]:
    """Return {trial_id: number of epochs} of a study, without reading them."""
    query = (
        sa.select(metrics.c.trial, sa.func.count(metrics.c.epoch.distinct()))
        .join(trials, trials.c.trial == metrics.c.trial)
        .where(trials.c.study == study_id)
        .group_by(metrics.c.trial)
    )
    with database.engine.connect() as connection:
        return {row[0]: row[1] for row in connection.execute(query)}


# --- studies and trials -----------------------------------------------------------------------------------------------


def attempt_of(attrs: Mapping[str, Any]) -> str:
    """Return which attempt of its configuration a trial is: `1`, or `2-` and a token, ...

    The number is how often it was started from its first epoch. The token is random: a database that was restored from a
    copy gives the number out again, for another attempt. Earlier versions stored none: then the attempt is `2`.

    Args:
        attrs: its user attributes.
    """
    attempt, token = int(attrs.get(ATTEMPT, 1)), attrs.get(ATTEMPT_TOKEN)
    return str(attempt) if token is None else f"{attempt}-{token}"


def attempt_columns() -> list[sa.Label[Any]]:
    """Return columns of a query on Optuna's trials: what `read_attempt` needs."""
    trial, attr = optuna_tables.trials, optuna_tables.trial_user_attributes
    return [
        sa.select(attr.c.value_json)
        .where(attr.c.trial_id == trial.c.trial_id, attr.c.key == name)
        .scalar_subquery()
        .label(name)
        for name in (ATTEMPT, ATTEMPT_TOKEN)
    ]


def read_attempt(row: Any) -> dict[str, Any]:
    """Return the user attributes of an attempt, from a row with `attempt_columns`."""
    found = {name: getattr(row, name) for name in (ATTEMPT, ATTEMPT_TOKEN)}
    return {name: json.loads(value) for name, value in found.items() if value is not None}


def count_keys(connection: sa.Connection, study_id: int) -> int:
    """Return how many configurations a study has."""
    return int(connection.scalar(sa.select(sa.func.count()).where(trials.c.study == study_id)) or 0)


def count_budgeted(connection: sa.Connection, study_id: int) -> int:
    """Return how many configurations of a study its budget counts.

    Not counted are those whose results an earlier study had, and trials that others have replaced.
    """
    return int(connection.scalar(_count_budgeted(), {"asked": study_id}) or 0)


# What each claim executes while it holds the lock of the study is built once: that takes longer than to execute it.


@cache
def _count_budgeted() -> sa.Select[int]:
    asked = sa.bindparam("asked", type_=sa.Integer)
    keys = sa.select(sa.func.count()).select_from(trials).where(trials.c.study == asked)
    reused = sa.select(sa.func.count()).select_from(imports).where(imports.c.study == asked, imports.c.role == REUSED)
    is_replaced = sa.and_(rungs.c.study == asked, rungs.c.pool == REPLACED_POOL)
    replaced = sa.select(sa.func.count()).select_from(rungs).where(is_replaced)
    return sa.select(keys.scalar_subquery() - reused.scalar_subquery() - replaced.scalar_subquery())


def has_key(connection: sa.Connection, study_id: int, key: str) -> bool:
    """Return whether a study has a configuration."""
    return connection.scalar(_find_key(), {"asked": study_id, "asked_key": key}) is not None


@cache
def _find_key() -> sa.Select[int]:
    is_it = sa.and_(trials.c.study == sa.bindparam("asked"), trials.c.key == sa.bindparam("asked_key"))
    return sa.select(trials.c.trial).where(is_it)


def known_keys(connection: sa.Connection, study_id: int, keys: Collection[str]) -> set[str]:
    """Return which of these configurations a study has."""
    if not keys:
        return set()
    return set(connection.scalars(sa.select(trials.c.key).where(trials.c.study == study_id, trials.c.key.in_(keys))))


def read_keys(database: Database, study_id: int) -> set[str]:
    """Return the keys of a study's configurations."""
    with database.engine.connect() as connection:
        return set(connection.scalars(sa.select(trials.c.key).where(trials.c.study == study_id)))


def read_ended_keys(database: Database, study_id: int) -> set[str]:
    """Return the keys of a study's configurations that have ended."""
    if trials.name in database.missing_tables:
        return set()
    trial = optuna_tables.trials
    query = sa.select(trials.c.key).join(trial, trial.c.trial_id == trials.c.trial)
    with database.engine.connect() as connection:
        has_ended = trial.c.state.in_(optuna_tables.ENDED)
        return set(connection.scalars(query.where(trial.c.study_id == study_id, has_ended)))


def count_ended_keys(database: Database, study_id: int | None = None) -> dict[int, int]:
    """Return {study_id: number of configurations that have ended}, of those that the budget counts.

    Args:
        database: the database.
        study_id: count those of this study only; None counts those of all studies.
    """
    if trials.name in database.missing_tables:
        return {}
    trial = optuna_tables.trials
    query = sa.select(trial.c.study_id, sa.func.count().label("keys")).join(trials, trials.c.trial == trial.c.trial_id)
    query = query.where(trial.c.state.in_(optuna_tables.ENDED)).group_by(trial.c.study_id)
    if imports.name not in database.missing_tables:
        query = query.where(~is_imported(trial, REUSED))
    if rungs.name not in database.missing_tables:
        is_replaced = sa.exists().where(rungs.c.trial == trial.c.trial_id, rungs.c.pool == REPLACED_POOL)
        query = query.where(~is_replaced)
    if study_id is not None:
        query = query.where(trial.c.study_id == study_id)
    with database.engine.connect() as connection:
        return {row.study_id: row.keys for row in connection.execute(query)}


def read_best_value(database: Database, study_id: int, *, maximize: bool) -> float | None:
    """Return the best finite value of the completed trials whose results are the study's; None without one."""
    trial, value = optuna_tables.trials, optuna_tables.trial_values
    best = sa.func.max if maximize else sa.func.min
    query = (
        sa.select(best(value.c.value))
        .join(trial, trial.c.trial_id == value.c.trial_id)
        .where(trial.c.study_id == study_id, trial.c.state == TrialState.COMPLETE, value.c.objective == 0)
        .where(~is_imported(trial, LEARNED))
    )
    with database.engine.connect() as connection:
        found: float | None = connection.scalar(query)
    return found


def read_final_values(
    connection: sa.Connection, condition: Sequence[sa.ColumnElement[bool]], objectives: int
) -> dict[int, tuple[float, ...]]:
    """Return {number: value of each objective} of the trials of a study that have a finite one of each, by number.

    Args:
        connection: to the database.
        condition: which of Optuna's trials.
        objectives: how many there are.
    """
    trial, value = optuna_tables.trials, optuna_tables.trial_values
    query = (
        sa.select(trial.c.number, value.c.value, value.c.value_type)
        .join(value, value.c.trial_id == trial.c.trial_id)
        .where(*condition)
        .order_by(trial.c.number, value.c.objective)
    )
    found: dict[int, tuple[float, ...]] = {}
    for number, stored, kind in connection.execute(query):
        found[number] = (*found.get(number, ()), optuna_tables.decode_value(stored, kind))
    return {
        number: values
        for number, values in found.items()
        if len(values) == objectives and all(map(math.isfinite, values))
    }


def count_front(database: Database, study_id: int, directions: Sequence[Direction]) -> int:
    """Return how many completed trials whose results are the study's are on its Pareto front."""
    trial = optuna_tables.trials
    condition = [trial.c.study_id == study_id, trial.c.state == TrialState.COMPLETE]
    if imports.name not in database.missing_tables:
        condition.append(~is_imported(trial, LEARNED))
    with database.engine.connect() as connection:
        return len(find_front(list(read_final_values(connection, condition, len(directions)).values()), directions))


def read_provenance(database: Database, trial_id: int) -> dict[str, Any]:
    """Return what is needed to run a trial again: its own provenance and its run's; empty if it never started."""
    query = (
        sa.select(trials.c.provenance, runs.c.provenance)
        .join(runs, runs.c.run == trials.c.run, isouter=True)
        .where(trials.c.trial == trial_id)
    )
    with database.engine.connect() as connection:
        row = connection.execute(query).one_or_none()
    return {**(row[1] or {}), **(row[0] or {})} if row else {}


def read_whole_provenances(database: Database, study_id: int) -> dict[int, dict[str, Any]]:
    """Return {trial_id: what is needed to run it again} of a study's trials, as `read_provenance` does for one."""
    query = (
        sa.select(trials.c.trial, trials.c.provenance, runs.c.provenance)
        .join(runs, runs.c.run == trials.c.run, isouter=True)
        .where(trials.c.study == study_id)
    )
    with database.engine.connect() as connection:
        return {trial_id: {**(of_run or {}), **(own or {})} for trial_id, own, of_run in connection.execute(query)}


def read_provenances(database: Database, study_id: int) -> dict[int, dict[str, Any]]:
    """Return {trial_id: provenance} of a study's trials, without the provenance of their runs."""
    query = sa.select(trials.c.trial, trials.c.provenance).where(trials.c.study == study_id)
    with database.engine.connect() as connection:
        return {trial_id: provenance or {} for trial_id, provenance in connection.execute(query)}


def count_trials(database: Database, *, without: Collection[str], study_id: int | None = None) -> list[Any]:
    """Return rows (study, state, trials, last), where `last` is when one of these trials last started or ended.

    The database counts: reading the trials of a large study takes many seconds. Trials of earlier studies from which only
    the sampler learns are not counted.

    Args:
        database: the database.
        without: values of the user attribute `fail_reason`; trials that have one are not counted.
        study_id: count the trials of this study only; None counts those of all studies.
    """
    trial, attr = optuna_tables.trials, optuna_tables.trial_user_attributes
    reasons = [json.dumps(reason) for reason in without]
    is_left_out = sa.exists().where(
        attr.c.trial_id == trial.c.trial_id, attr.c.key == "fail_reason", attr.c.value_json.in_(reasons)
    )
    last = sa.func.max(sa.func.coalesce(trial.c.datetime_complete, trial.c.datetime_start))
    query = sa.select(
        trial.c.study_id.label("study"),
        sa.cast(trial.c.state, sa.String).label("state"),
        sa.func.count().label("trials"),
        sa.type_coerce(last, sa.DateTime).label("last"),
    ).where(sa.or_(sa.cast(trial.c.state, sa.String) != "FAIL", ~is_left_out))
    if imports.name not in database.missing_tables:
        query = query.where(~is_imported(trial, LEARNED))
    if study_id is not None:
        query = query.where(trial.c.study_id == study_id)
    with database.engine.connect() as connection:
        return list(connection.execute(query.group_by(trial.c.study_id, trial.c.state)))


def read_endings(database: Database, study_id: int) -> list[tuple[int, str, datetime]]:
    """Return (number, state, when it ended) of each trial that completed or was pruned, by number.

    A trial that has ended does not change. Only a database that was restored from a copy gives its number out again: then
    the time is another one. Trials of earlier studies from which only the sampler learns are left out.
    """
    trial = optuna_tables.trials
    query = sa.select(trial.c.number, trial.c.state, trial.c.datetime_complete).where(
        trial.c.study_id == study_id, trial.c.state.in_((TrialState.COMPLETE, TrialState.PRUNED))
    )
    if imports.name not in database.missing_tables:
        query = query.where(~is_imported(trial, LEARNED))
    with database.engine.connect() as connection:
        rows = connection.execute(query.order_by(trial.c.number))
        return [(row.number, row.state.name, row.datetime_complete) for row in rows]


def read_retried(connection: sa.Connection, study_id: int) -> set[int]:
    """Return the ids of the WAITING trials of a study that `hpo retry` lets run again, even if the budget is spent."""
    trial, attr = optuna_tables.trials, optuna_tables.trial_user_attributes
    query = sa.select(trial.c.trial_id).join(attr, sa.and_(attr.c.trial_id == trial.c.trial_id, attr.c.key == RETRIED))
    query = query.where(trial.c.study_id == study_id, trial.c.state == TrialState.WAITING)
    return set(connection.scalars(query))


def read_wanted(connection: sa.Connection, study_id: int) -> set[int]:
    """Return the ids of the WAITING trials of a study that a user enqueued or retried: they run, planned or not."""
    trial, attr, system = (
        optuna_tables.trials,
        optuna_tables.trial_user_attributes,
        optuna_tables.trial_system_attributes,
    )
    is_marked = sa.exists().where(attr.c.trial_id == trial.c.trial_id, attr.c.key.in_((RETRIED, ENQUEUED)))
    # Trials that an earlier version registered are not marked. This is what Optuna notes of `Study.enqueue_trial`.
    is_enqueued = sa.exists().where(system.c.trial_id == trial.c.trial_id, system.c.key == FIXED_PARAMS)
    query = sa.select(trial.c.trial_id).where(
        trial.c.study_id == study_id, trial.c.state == TrialState.WAITING, sa.or_(is_marked, is_enqueued)
    )
    return set(connection.scalars(query))


def count_retried(database: Database, study_id: int | None = None) -> dict[int, int]:
    """Return {study_id: number of trials} that `hpo retry` lets run again, and that have not ended yet.

    Args:
        database: the database.
        study_id: count the trials of this study only; None counts those of all studies.
    """
    trial, attr = optuna_tables.trials, optuna_tables.trial_user_attributes
    is_retried = sa.and_(attr.c.trial_id == trial.c.trial_id, attr.c.key == RETRIED)
    query = sa.select(trial.c.study_id, sa.func.count().label("trials")).join(attr, is_retried)
    query = query.where(trial.c.state.in_(optuna_tables.UNFINISHED))
    if study_id is not None:
        query = query.where(trial.c.study_id == study_id)
    with database.engine.connect() as connection:
        return {row.study_id: row.trials for row in connection.execute(query.group_by(trial.c.study_id))}


def read_runs(database: Database, study_id: int | None = None) -> list[Any]:
    """Return the rows of the runs of a study, or of all studies, oldest first.

    Each has `now`, too: the database's time in seconds since 1970.
    """
    if runs.name in database.missing_tables:
        return []
    columns = [column for column in runs.c if column is not runs.c.takeover_after]  # which old tables lack
    query = sa.select(*columns, database.now_seconds().label("now")).order_by(runs.c.started)
    if study_id is not None:
        query = query.where(runs.c.study == study_id)
    with database.engine.connect() as connection:
        return list(connection.execute(query))
