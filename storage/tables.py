"""The tables of our own, beside Optuna's: every metric of every epoch, who works on which trial, provenance.

    hpo_runs      a run of the service: who drives it, until when it may be trusted to be alive, with what versions
    hpo_trials    a row for each trial: the key of its configuration, the run that works on it, what is needed to repeat it
    hpo_metrics   a row for each value: trial, epoch, name, value

`trial` is Optuna's trial_id and `study` its study_id, both unique in the whole database.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from optuna.storages._rdb.models import TrialIntermediateValueModel
from sqlalchemy.dialects import postgresql, sqlite

from storage.database import Database, metadata

Metrics = dict[int, dict[str, float]]

runs = sa.Table(
    "hpo_runs",
    metadata,
    sa.Column("run", sa.Integer, primary_key=True),
    sa.Column("study", sa.Integer, nullable=False, index=True),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("process_started", sa.Float, nullable=False),
    sa.Column("started", sa.Float, nullable=False),
    sa.Column("last_heard", sa.Float, nullable=False),
    # The run holds its trials until then, by the database's clock, and renews it while it lives.
    sa.Column("lease_until", sa.Float, nullable=False),
    sa.Column("ended", sa.Float),
    sa.Column("provenance", sa.JSON, nullable=False),
)

trials = sa.Table(
    "hpo_trials",
    metadata,
    sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("study", sa.Integer, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    # The run that works on the trial; NULL while nobody does.
    sa.Column("run", sa.Integer, index=True),
    sa.Column("crashes", sa.Integer, nullable=False, server_default="0"),
    # What a replay needs beyond the study's own settings: device, threads, data hash.
    sa.Column("provenance", sa.JSON),
    sa.UniqueConstraint("study", "key"),
)

metrics = sa.Table(
    "hpo_metrics",
    metadata,
    sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(100), primary_key=True),
    # NULL stands for NaN, which SQLite cannot hold.
    sa.Column("value", sa.Double),
)


def write_metrics(connection: sa.Connection, epochs: Iterable[tuple[int, int, Mapping[str, float]]]) -> None:
    """Write (trial, epoch, {name: value}) of any number of epochs; written twice, the later values stand."""
    rows = [
        {"trial": trial, "epoch": epoch, "name": name, "value": None if math.isnan(value) else value}
        for trial, epoch, values in epochs
        for name, value in values.items()
    ]
    if not rows:
        return
    insert = (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(metrics)
    connection.execute(
        insert.on_conflict_do_update(
            index_elements=[metrics.c.trial, metrics.c.epoch, metrics.c.name], set_={"value": insert.excluded.value}
        ),
        rows,
    )


def write_values(connection: sa.Connection, values: Iterable[tuple[int, int, float]]) -> None:
    """Write Optuna's intermediate values, (trial, epoch, value) of any number of epochs; written twice, the later stand.

    In Optuna's own table and its own notation, which it would write one transaction an epoch.
    """
    rows = []
    for trial, epoch, value in values:
        stored, kind = TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)
        rows.append({"trial_id": trial, "step": epoch, "intermediate_value": stored, "intermediate_value_type": kind})
    if not rows:
        return
    insert = (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(TrialIntermediateValueModel)
    set_ = {name: insert.excluded[name] for name in ("intermediate_value", "intermediate_value_type")}
    connection.execute(insert.on_conflict_do_update(index_elements=["trial_id", "step"], set_=set_), rows)


def read_metrics(database: Database, study: int, only: Collection[int] | None = None) -> dict[int, Metrics]:
    """Return {trial: {epoch: {name: value}}} of a study, epochs in order; of all its trials, or only of some."""
    query = (
        sa.select(metrics.c.trial, metrics.c.epoch, metrics.c.name, metrics.c.value)
        .join(trials, trials.c.trial == metrics.c.trial)
        .where(trials.c.study == study)
        .order_by(metrics.c.trial, metrics.c.epoch)
    )
    if only is not None:
        query = query.where(metrics.c.trial.in_(only))
    found: dict[int, Metrics] = {}
    with database.engine.connect() as connection:
        for trial, epoch, name, value in connection.execute(query):
            found.setdefault(trial, {}).setdefault(epoch, {})[name] = math.nan if value is None else value
    return found


def write_study_attrs(database: Database, study: int, attrs: Mapping[str, Any]) -> None:
    """Write system attributes of an Optuna study, all of them or none.

    Optuna writes each in a transaction of its own: a plot of a hundred parts could be read half-written.
    """
    table = sa.table("study_system_attributes", sa.column("study_id"), sa.column("key"), sa.column("value_json"))
    rows = [{"study_id": study, "key": key, "value_json": json.dumps(value)} for key, value in attrs.items()]
    with database.engine.begin() as connection:
        insert = (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(table)
        statement = insert.on_conflict_do_update(
            index_elements=["study_id", "key"], set_={"value_json": insert.excluded.value_json}
        )
        if rows:
            connection.execute(statement, rows)


def read_provenance(database: Database, trial: int) -> dict[str, Any]:
    """Return what is needed to run a trial again; empty for a trial that never started."""
    query = (
        sa.select(trials.c.provenance, runs.c.provenance)
        .join(runs, runs.c.run == trials.c.run, isouter=True)
        .where(trials.c.trial == trial)
    )
    with database.engine.connect() as connection:
        row = connection.execute(query).one_or_none()
    return {**(row[1] or {}), **(row[0] or {})} if row else {}


def read_provenances(database: Database, study: int) -> dict[int, dict[str, Any]]:
    """Return {trial: what is needed to run it again, but for what its run says} of a study."""
    query = sa.select(trials.c.trial, trials.c.provenance).where(trials.c.study == study)
    with database.engine.connect() as connection:
        return {trial: provenance or {} for trial, provenance in connection.execute(query)}


def count_trials(database: Database, *, without: Collection[str], study: int | None = None) -> list[Any]:
    """Return rows (study, state, trials, last), last being when one of them last started or ended.

    Counted by the database: reading the trials of a large study takes many seconds.

    Args:
        without: values of the user attribute `fail_reason` whose trials are not counted.
        study: count only this one's.
    """
    trial = sa.table(
        "trials",  # Optuna's own, as is the next
        sa.column("trial_id"),
        sa.column("study_id"),
        sa.column("state", sa.String),
        sa.column("datetime_start", sa.DateTime),
        sa.column("datetime_complete", sa.DateTime),
    )
    attr = sa.table("trial_user_attributes", sa.column("trial_id"), sa.column("key"), sa.column("value_json"))
    reasons = [json.dumps(reason) for reason in without]
    left_out = sa.exists().where(
        attr.c.trial_id == trial.c.trial_id, attr.c.key == "fail_reason", attr.c.value_json.in_(reasons)
    )
    last = sa.func.max(sa.func.coalesce(trial.c.datetime_complete, trial.c.datetime_start))
    query = sa.select(
        trial.c.study_id.label("study"),
        sa.cast(trial.c.state, sa.String).label("state"),
        sa.func.count().label("trials"),
        sa.type_coerce(last, sa.DateTime).label("last"),
    ).where(sa.or_(sa.cast(trial.c.state, sa.String) != "FAIL", ~left_out))
    if study is not None:
        query = query.where(trial.c.study_id == study)
    with database.engine.connect() as connection:
        return list(connection.execute(query.group_by(trial.c.study_id, trial.c.state)))


def read_runs(database: Database, study: int) -> list[Any]:
    """Return the rows of a study's runs, oldest first, each with `now`, the database's time."""
    query = sa.select(runs, database.seconds().label("now")).where(runs.c.study == study).order_by(runs.c.started)
    with database.engine.connect() as connection:
        return list(connection.execute(query))
