"""The tables of our own, beside Optuna's: every metric of every epoch, who works on which trial, provenance.

    hpo_runs      a run of the service: who drives it, until when it may be trusted to be alive, with what versions
    hpo_trials    a row for each trial: the key of its configuration, the run that works on it, what is needed to repeat it
    hpo_metrics   a row for each value: trial, epoch, name, value

`trial` is Optuna's trial_id and `study` its study_id, both unique in the whole database.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
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


def write_metrics(connection: sa.Connection, trial: int, epoch: int, values: Mapping[str, float]) -> None:
    """Write the metrics of one epoch; written twice, the later values stand."""
    rows = [
        {"trial": trial, "epoch": epoch, "name": name, "value": None if math.isnan(value) else value}
        for name, value in values.items()
    ]
    insert = (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(metrics)
    connection.execute(
        insert.on_conflict_do_update(
            index_elements=[metrics.c.trial, metrics.c.epoch, metrics.c.name], set_={"value": insert.excluded.value}
        ),
        rows,
    )


def read_metrics(database: Database, study: int) -> dict[int, Metrics]:
    """Return {trial: {epoch: {name: value}}} of a study, epochs in order."""
    query = (
        sa.select(metrics.c.trial, metrics.c.epoch, metrics.c.name, metrics.c.value)
        .join(trials, trials.c.trial == metrics.c.trial)
        .where(trials.c.study == study)
        .order_by(metrics.c.trial, metrics.c.epoch)
    )
    found: dict[int, Metrics] = {}
    with database.engine.connect() as connection:
        for trial, epoch, name, value in connection.execute(query):
            found.setdefault(trial, {}).setdefault(epoch, {})[name] = math.nan if value is None else value
    return found


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
