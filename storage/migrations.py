"""Versions of our tables: how they are created, and how a database of an older version is brought forward.

    1   the tables
    2   triggers delete our rows of a study or a trial that any program deletes; SQLite never reuses a run's key; names of
        metrics have any length

Optuna's tables have other versions, which Optuna migrates.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa

from storage import optuna_internals
from storage.tables import metadata, metrics, runs, schema, trials

VERSION = 2


def complete(connection: sa.Connection) -> None:
    """Complete new tables. Their version is written last: without it, they are incomplete.

    Args:
        connection: in a transaction of the caller, who holds the schema's lock. Our tables and Optuna's exist.
    """
    _create_triggers(connection)
    connection.execute(schema.insert().values(version=VERSION))


def migrate(connection: sa.Connection, version: int) -> None:
    """Bring our tables from an older version to `VERSION`.

    Args:
        connection: see `complete`.
        version: the version that they have.
    """
    for step in range(version, VERSION):
        _STEPS[step](connection)
    connection.execute(schema.update().values(version=VERSION))


def back_up(connection: sa.Connection, version: int) -> Path | None:
    """Copy the file of a SQLite database, as it was before a migration; return the copy.

    Args:
        connection: to the database.
        version: of our tables, part of the copy's name.

    Returns:
        The copy, next to the file. None for PostgreSQL, whose backups are its administrator's.

    Raises:
        sqlite3.Error: the copy cannot be written.
        OSError: the copy cannot be written.
    """
    if connection.dialect.name != "sqlite":
        return None
    path = Path(connection.exec_driver_sql("PRAGMA database_list").first()[2])  # type: ignore[index]
    copy = path.with_name(f"{path.name}.version-{version}")
    draft = copy.with_name(f".{copy.name}.tmp")
    try:
        draft.touch()
        shutil.copymode(path, draft)  # a copy must not be readable for more users than the database
        with closing(sqlite3.connect(draft)) as target:
            connection.connection.driver_connection.backup(target)  # type: ignore[union-attr]
        draft.replace(copy)
    finally:
        draft.unlink(missing_ok=True)
    return copy


# --- steps ------------------------------------------------------------------------------------------------------------


def _from_1(connection: sa.Connection) -> None:
    # `hpo dashboard` could create a database without some of these tables.
    metadata.create_all(connection)
    # Rows that the deletion of a study left. SQLite gives their ids to new studies and trials.
    trial, study = optuna_internals.trials, optuna_internals.studies
    has_trial = sa.exists().where(trial.c.trial_id == trials.c.trial, trial.c.study_id == trials.c.study)
    connection.execute(trials.delete().where(~has_trial))
    connection.execute(metrics.delete().where(~sa.exists().where(trials.c.trial == metrics.c.trial)))
    connection.execute(runs.delete().where(~sa.exists().where(study.c.study_id == runs.c.study)))
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("ALTER TABLE hpo_metrics ALTER COLUMN name TYPE TEXT")
    if connection.dialect.name == "sqlite":  # which cannot add AUTOINCREMENT to a table
        connection.exec_driver_sql("ALTER TABLE hpo_runs RENAME TO hpo_runs_1")
        connection.exec_driver_sql("DROP INDEX ix_hpo_runs_study")
        runs.create(connection)
        connection.exec_driver_sql("INSERT INTO hpo_runs SELECT * FROM hpo_runs_1")
        connection.exec_driver_sql("DROP TABLE hpo_runs_1")
    _create_triggers(connection)


_STEPS: dict[int, Callable[[sa.Connection], None]] = {1: _from_1}

_TRIAL_DELETED = (
    "DELETE FROM hpo_metrics WHERE trial = OLD.trial_id; DELETE FROM hpo_trials WHERE trial = OLD.trial_id;"
)
_STUDY_DELETED = "DELETE FROM hpo_runs WHERE study = OLD.study_id;"
_TRIGGERS = {
    "sqlite": [
        "CREATE TRIGGER IF NOT EXISTS {name} AFTER DELETE ON {table} BEGIN {statements} END",
    ],
    "postgresql": [
        "CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN {statements} RETURN NULL; END $$",
        "DROP TRIGGER IF EXISTS {name} ON {table}",
        "CREATE TRIGGER {name} AFTER DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()",
    ],
}


def _create_triggers(connection: sa.Connection) -> None:
    # Triggers, not foreign keys: SQLite checks foreign keys only for programs that ask for it, and cannot add them later.
    # Deleting a study in Optuna deletes its trials one by one.
    for name, table, statements in (
        ("hpo_trial_deleted", "trials", _TRIAL_DELETED),
        ("hpo_study_deleted", "studies", _STUDY_DELETED),
    ):
        for template in _TRIGGERS[connection.dialect.name]:
            connection.exec_driver_sql(template.format(name=name, table=table, statements=statements))
