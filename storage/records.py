"""Reading and writing the rows of our tables, and of those of Optuna's that are written in bulk."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from storage import optuna_internals
from storage.database import Database
from storage.tables import metrics, runs, trials

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
    _upsert(connection, metrics, ("trial", "epoch", "name"), rows)


def write_values(connection: sa.Connection, values: Iterable[tuple[int, int, float]]) -> None:
    """Write Optuna's intermediate values of any number of epochs. Existing values are replaced.

    Args:
        connection: in the caller's transaction.
        values: (trial_id, epoch, value).
    """
    rows = []
    for trial_id, epoch, value in values:
        stored, kind = optuna_internals.encode_intermediate_value(value)
        rows.append(
            {"trial_id": trial_id, "step": epoch, "intermediate_value": stored, "intermediate_value_type": kind}
        )
    _upsert(connection, optuna_internals.intermediate_values, ("trial_id", "step"), rows)


def _upsert(connection: sa.Connection, table: sa.TableClause, key: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    insert = (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(table)
    updated = {name: insert.excluded[name] for name in rows[0] if name not in key}
    connection.execute(insert.on_conflict_do_update(index_elements=list(key), set_=updated), rows)


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


# --- studies and trials -----------------------------------------------------------------------------------------------


def write_study_attrs(database: Database, study_id: int, attrs: Mapping[str, Any]) -> None:
    """Write system attributes of an Optuna study in one transaction."""
    rows = [{"study_id": study_id, "key": key, "value_json": json.dumps(value)} for key, value in attrs.items()]
    with database.engine.begin() as connection:
        _upsert(connection, optuna_internals.study_system_attributes, ("study_id", "key"), rows)


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


def read_provenances(database: Database, study_id: int) -> dict[int, dict[str, Any]]:
    """Return {trial_id: provenance} of a study's trials, without the provenance of their runs."""
    query = sa.select(trials.c.trial, trials.c.provenance).where(trials.c.study == study_id)
    with database.engine.connect() as connection:
        return {trial_id: provenance or {} for trial_id, provenance in connection.execute(query)}


def count_trials(database: Database, *, without: Collection[str], study_id: int | None = None) -> list[Any]:
    """Return rows (study, state, trials, last), where `last` is when one of these trials last started or ended.

    The database counts: reading the trials of a large study takes many seconds.

    Args:
        database: the database.
        without: values of the user attribute `fail_reason`; trials that have one are not counted.
        study_id: count the trials of this study only; None counts those of all studies.
    """
    trial, attr = optuna_internals.trials, optuna_internals.trial_user_attributes
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
    if study_id is not None:
        query = query.where(trial.c.study_id == study_id)
    with database.engine.connect() as connection:
        return list(connection.execute(query.group_by(trial.c.study_id, trial.c.state)))


def read_runs(database: Database, study_id: int) -> list[Any]:
    """Return the rows of a study's runs, oldest first, each with `now`, the database's time in seconds since 1970."""
    query = (
        sa.select(runs, database.now_seconds().label("now")).where(runs.c.study == study_id).order_by(runs.c.started)
    )
    with database.engine.connect() as connection:
        return list(connection.execute(query))
