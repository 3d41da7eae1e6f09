"""Our tables, next to Optuna's: metrics of every epoch, runs, and the owner and provenance of each trial.

    hpo_schema    one row: the version of these tables
    hpo_runs      one row for each run: which process drives it, until when its lease holds, its versions
    hpo_trials    one row for each trial: the key of its configuration, the run that works on it, what a replay needs
    hpo_metrics   one row for each value: trial, epoch, name, value

`trial` is Optuna's trial_id and `study` its study_id. Both are unique in the database. storage/README.md lists the columns.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

schema = sa.Table("hpo_schema", metadata, sa.Column("version", sa.Integer, primary_key=True))

runs = sa.Table(
    "hpo_runs",
    metadata,
    sa.Column("run", sa.Integer, primary_key=True),
    sa.Column("study", sa.Integer, nullable=False, index=True),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("process_started", sa.Float, nullable=False),
    # Times below are by the database's clock.
    sa.Column("started", sa.Float, nullable=False),
    sa.Column("last_heard", sa.Float, nullable=False),
    # The run owns its trials until then. It renews the lease while its driver is alive.
    sa.Column("lease_until", sa.Float, nullable=False),
    sa.Column("ended", sa.Float),
    sa.Column("provenance", sa.JSON, nullable=False),
    # A run may outlive its row, if its study is deleted: no other run may get its key.
    sqlite_autoincrement=True,
)

trials = sa.Table(
    "hpo_trials",
    metadata,
    sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("study", sa.Integer, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    # The run that works on the trial, or did last; NULL after it was released.
    sa.Column("run", sa.Integer, index=True),
    sa.Column("crashes", sa.Integer, nullable=False, server_default="0"),
    # What a replay needs in addition to the study's settings: device, threads, data hash.
    sa.Column("provenance", sa.JSON),
    sa.UniqueConstraint("study", "key"),
)

metrics = sa.Table(
    "hpo_metrics",
    metadata,
    sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
    # SQLite does not enforce the length. In PostgreSQL, a longer name would block every later write.
    sa.Column("name", sa.String(100).with_variant(sa.Text(), "postgresql"), primary_key=True),
    # NULL means NaN, which SQLite cannot store.
    sa.Column("value", sa.Double),
)
