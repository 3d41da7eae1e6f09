"""Our tables, next to Optuna's: metrics of every epoch, runs, and the owner, provenance and device time of each trial.

    hpo_schema            one row: the version of these tables
    hpo_runs              one row for each run: which process drives it, until when its lease holds, its versions
    hpo_trials            one row for each trial: the key of its configuration, its owner, what a replay needs
    hpo_metrics           one row for each value: trial, epoch, name, value
    hpo_rungs             one row for each value that a pruner compares with others
    hpo_usage             one row for each claim: for how long it held its device
    hpo_imports           one row for each trial that was taken over from an earlier study
    hpo_deleted_studies   one row for each deleted study, whose files can be deleted, too

`trial` is Optuna's trial_id and `study` its study_id. Both are unique in the database. storage/README.md lists the columns.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

# What a trial is that was taken over from an earlier study, values of `hpo_imports.role`:
LEARNED = "learned"  # the sampler learns from it; it is no result of the study
REUSED = "reused"  # a result, of a configuration that would be trained in the same way; the budget does not count it
POINT = "point"  # the same, of a point of the study's grid, which the budget counts


class JsonObject(sa.TypeDecorator[dict[str, Any]]):
    """JSON that is an object. Reading anything else is a ValueError."""

    impl = sa.JSON
    cache_ok = True

    def process_result_value(self, value: Any, _dialect: sa.Dialect) -> dict[str, Any] | None:
        """Return a value that was read."""
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{value!r:.60} in a column of JSON objects")
        return value


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
    sa.Column("provenance", JsonObject, nullable=False),
    # After an outage all leases have expired. Until then, the run leaves the others time to renew theirs.
    sa.Column("takeover_after", sa.Float, nullable=False, server_default="0"),
    # A run may outlive its row, if its study is deleted: no other run may get its key.
    sqlite_autoincrement=True,
)

trials = sa.Table(
    "hpo_trials",
    metadata,
    sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("study", sa.Integer, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    # The run that works on the trial, or finished it; NULL while no run does.
    sa.Column("run", sa.Integer, index=True),
    sa.Column("crashes", sa.Integer, nullable=False, server_default="0"),
    # What a replay needs in addition to the study's settings: device, threads, data hash.
    sa.Column("provenance", JsonObject),
    # Random, new with each claim: a write must name it. NULL while no run works on the trial.
    sa.Column("token", sa.BigInteger),
    # The last epoch in storage when the trial was claimed.
    sa.Column("claimed_epoch", sa.Integer, nullable=False, server_default="0"),
    sa.UniqueConstraint("study", "key"),
    sa.Index("hpo_trials_by_token", "token", unique=True),
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

rungs = sa.Table(
    "hpo_rungs",
    metadata,
    sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
    # Values are compared within a pool: those of one pruner, and of one of its brackets.
    sa.Column("pool", sa.String(100), primary_key=True),
    sa.Column("study", sa.Integer, nullable=False),
    sa.Column("value", sa.Double, nullable=False),
    # Counts the better values without reading the rows.
    sa.Index("hpo_rungs_by_value", "study", "pool", "epoch", "value"),
)

usage = sa.Table(
    "hpo_usage",
    metadata,
    sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
    # Of the claim. The row is of this claim alone: it stays when another one takes the trial.
    sa.Column("token", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("study", sa.Integer, nullable=False, index=True),
    # NULL for a trial that waited when version 5 was migrated.
    sa.Column("run", sa.Integer),
    sa.Column("device", sa.String(20), nullable=False),
    # How many; a fraction is a share of one.
    sa.Column("devices", sa.Double, nullable=False),
    # Since the claim, by the monotonic clock of the run. They never fall.
    sa.Column("seconds", sa.Double, nullable=False),
)

imports = sa.Table(
    "hpo_imports",
    metadata,
    sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("study", sa.Integer, nullable=False),
    # The attribute `hpo:id` of the study that trained it, and its number there.
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    # LEARNED, REUSED or POINT.
    sa.Column("role", sa.String(20), nullable=False),
    sa.UniqueConstraint("study", "source", "number"),
    sa.Index("hpo_imports_by_role", "study", "role"),  # each claim counts those that the budget leaves out
)

deleted_studies = sa.Table(
    "hpo_deleted_studies",
    metadata,
    # The study's attribute `hpo:id`, part of the names of its files.
    sa.Column("id", sa.Text, primary_key=True),
)


def is_imported(trial: sa.Table, role: str) -> sa.Exists:
    """Return whether a trial in a query on Optuna's trials was taken over from an earlier study, in a role."""
    return sa.exists().where(imports.c.trial == trial.c.trial_id, imports.c.role == role)
