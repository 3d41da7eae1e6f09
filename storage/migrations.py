"""Versions of our tables: how they are created, and how a database of an older version is brought forward.

    1   the tables
    2   triggers delete our rows of a study or a trial that any program deletes; SQLite never reuses a run's key; names of
        metrics have any length
    3   a token for each claim; the values that pruners compare; deleted studies are recorded; an index on trials' states
    4   on PostgreSQL, deleting a study deletes what runs add to it meanwhile, from a session with any search_path. SQLite
        files stay as they are
    5   trials that were taken over from earlier studies are recorded
    6   device time, for each claim; imported trials are counted by an index

Optuna's tables have other versions, which Optuna migrates.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from itertools import chain, count
from pathlib import Path

import sqlalchemy as sa

from storage import optuna_tables
from storage.tables import imports, metadata, metrics, runs, schema, trials, usage

VERSION = 6


def complete(connection: sa.Connection) -> None:
    """Complete new tables. Their version is written last: without it, they are incomplete.

    Args:
        connection: in a transaction of the caller, who holds the schema's lock. Our tables and Optuna's exist.
    """
    _extend_optuna(connection)
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
        connection: to the database, in a transaction that has not written yet: nobody else writes.
        version: of our tables, part of the copy's name.

    Returns:
        The copy, next to the file. An older copy is kept: the new one has a number in its name. None for PostgreSQL, whose
        backups are its administrator's.

    Raises:
        sqlite3.Error: the copy cannot be written.
        OSError: the copy cannot be written.
    """
    if connection.dialect.name != "sqlite":
        return None
    path = Path(connection.exec_driver_sql("PRAGMA database_list").first()[2])  # type: ignore[index]
    # `hpo clean` and older versions of hpo know the copies by the end of their names.
    names = (f"{path.name}{number}.version-{version}" for number in chain([""], map(".{}".format, count(2))))
    copy = next(free for name in names if not os.path.lexists(free := path.with_name(name)))
    draft = copy.with_name(f".{copy.name}.tmp")
    try:
        draft.touch()
        shutil.copymode(path, draft)  # a copy must not be readable for more users than the database
        # Another connection: SQLite makes no copy for one that is in a transaction that writes.
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(draft)) as target:
            source.backup(target)
        draft.replace(copy)
    finally:
        draft.unlink(missing_ok=True)
    return copy


# --- steps ------------------------------------------------------------------------------------------------------------


def _from_1(connection: sa.Connection) -> None:
    # `hpo dashboard` could create a database without some of these tables.
    for table in metadata.sorted_tables:
        if not sa.inspect(connection).has_table(table.name):
            table.create(connection)
    # Rows that the deletion of a study left. SQLite gives their ids to new studies and trials.
    trial, study = optuna_tables.trials, optuna_tables.studies
    has_trial = sa.exists().where(trial.c.trial_id == trials.c.trial, trial.c.study_id == trials.c.study)
    connection.execute(trials.delete().where(~has_trial))
    connection.execute(metrics.delete().where(~sa.exists().where(trials.c.trial == metrics.c.trial)))
    connection.execute(runs.delete().where(~sa.exists().where(study.c.study_id == runs.c.study)))
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("ALTER TABLE hpo_metrics ALTER COLUMN name TYPE TEXT")


def _from_2(connection: sa.Connection) -> None:
    for table in (runs, trials):
        if connection.dialect.name == "sqlite":
            for name in _TRIGGERS:  # a trigger follows the table that it names when that is renamed
                connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {name}")
            _rebuild(connection, table)
        else:
            _add_columns(connection, table)
    metadata.create_all(connection)
    _extend_optuna(connection)


def _from_3(connection: sa.Connection) -> None:
    _extend_optuna(connection)


def _from_4(connection: sa.Connection) -> None:
    metadata.create_all(connection)
    _extend_optuna(connection)


def _from_5(connection: sa.Connection) -> None:
    metadata.create_all(connection)
    for index in imports.indexes:
        index.create(connection, checkfirst=True)
    _extend_optuna(connection)
    # What is known of the device time so far: the epochs that are stored, and the device that the trial was last on.
    is_metric = sa.and_(metrics.c.trial == trials.c.trial, metrics.c.name == "epoch_seconds")
    seconds = sa.select(sa.func.sum(metrics.c.value)).where(is_metric).scalar_subquery().label("seconds")
    provenance = sa.cast(trials.c.provenance, sa.Text).label("provenance")
    query = sa.select(trials.c.trial, trials.c.study, trials.c.run, provenance, seconds)
    is_imported = sa.exists().where(imports.c.trial == trials.c.trial)  # an earlier study has used its device time
    accounts = []
    for row in connection.execute(query.where(~is_imported)):
        if isinstance(row.seconds, float) and 0 < row.seconds < math.inf:
            device, devices = _device_of(row.provenance)
            values = {"trial": row.trial, "study": row.study, "run": row.run, "seconds": row.seconds}
            accounts.append(values | {"token": secrets.randbits(62), "device": device, "devices": devices})
    if accounts:
        connection.execute(usage.insert(), accounts)


def _device_of(provenance: str | None) -> tuple[str, float]:
    """Return the device of a trial of version 5, and how many it held. Other programs may have changed its provenance."""
    try:
        facts = json.loads(provenance or "{}")
        if facts.get("device") == "cuda":
            gpus = float(facts.get("gpu", 1.0))
            return "cuda", gpus if 0 < gpus < math.inf else 1.0
    except (ValueError, TypeError, AttributeError):
        pass
    return "cpu", 1.0


_STEPS: dict[int, Callable[[sa.Connection], None]] = {
    1: _from_1,
    2: _from_2,
    3: _from_3,
    4: _from_4,
    5: _from_5,
}


def _rebuild(connection: sa.Connection, table: sa.Table) -> None:
    """Replace a table by one with the present columns. SQLite cannot add AUTOINCREMENT or constraints to a table."""
    inspector = sa.inspect(connection)
    names = [column["name"] for column in inspector.get_columns(table.name)]
    for index in inspector.get_indexes(table.name):
        connection.exec_driver_sql(f"DROP INDEX {index['name']}")
    connection.exec_driver_sql(f"ALTER TABLE {table.name} RENAME TO {table.name}_old")
    table.create(connection)
    columns = ", ".join(f'"{name}"' for name in names)
    connection.exec_driver_sql(f"INSERT INTO {table.name} ({columns}) SELECT {columns} FROM {table.name}_old")
    connection.exec_driver_sql(f"DROP TABLE {table.name}_old")


def _add_columns(connection: sa.Connection, table: sa.Table) -> None:
    existing = {column["name"] for column in sa.inspect(connection).get_columns(table.name)}
    for column in table.columns:
        if column.name not in existing:
            definition = sa.schema.CreateColumn(column).compile(dialect=connection.dialect)
            connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {definition}")
    for index in table.indexes:
        index.create(connection, checkfirst=True)


# --- triggers and indexes on Optuna's tables --------------------------------------------------------------------------

# Triggers, not foreign keys: SQLite checks foreign keys only for programs that ask for it, and cannot add them later.
# Deleting a study in Optuna deletes its trials one by one.
_TRIGGERS = {
    "hpo_trial_deleted": (
        "trials",
        "DELETE FROM hpo_metrics WHERE trial = OLD.trial_id; DELETE FROM hpo_rungs WHERE trial = OLD.trial_id; "
        "DELETE FROM hpo_usage WHERE trial = OLD.trial_id; DELETE FROM hpo_imports WHERE trial = OLD.trial_id; "
        "DELETE FROM hpo_trials WHERE trial = OLD.trial_id;",
    ),
    "hpo_study_deleted": ("studies", "DELETE FROM hpo_runs WHERE study = OLD.study_id;"),
    # Attributes of a study are deleted with it only.
    "hpo_id_deleted": (
        "study_user_attributes",
        "INSERT INTO hpo_deleted_studies (id) SELECT replace(OLD.value_json, '\"', '') WHERE OLD.key = 'hpo:id' "
        "ON CONFLICT DO NOTHING;",
    ),
}
_TRIGGER_TEMPLATES = {
    "sqlite": [
        "DROP TRIGGER IF EXISTS {name}",
        "CREATE TRIGGER {name} AFTER DELETE ON {table} BEGIN {statements} END",
    ],
    "postgresql": [
        "CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql SET search_path = {schema}, pg_temp AS "
        "$$ BEGIN {statements} RETURN NULL; END $$",
        "DROP TRIGGER IF EXISTS {name} ON {table}",
        "CREATE TRIGGER {name} AFTER DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()",
    ],
}


# On PostgreSQL, Optuna reads the rows of a study, deletes them one by one, and then the study. A row that a run has added
# meanwhile refers to the study: the server refuses to delete it, and Optuna ignores that error. So these triggers lock the
# study, and then delete what is left. SQLite has one writer at a time.
_BEFORE_DELETE = {
    "hpo_study_deleting": (
        "studies",
        "DELETE FROM trials WHERE study_id = OLD.study_id; "
        + " ".join(
            f"DELETE FROM {table} WHERE study_id = OLD.study_id;"
            for table in ("study_directions", "study_user_attributes", "study_system_attributes")
        ),
    ),
    "hpo_trial_deleting": (
        "trials",
        "PERFORM 1 FROM studies WHERE study_id = OLD.study_id FOR UPDATE; "
        + " ".join(
            f"DELETE FROM {table} WHERE trial_id = OLD.trial_id;"
            for table in (
                "trial_heartbeats",
                "trial_intermediate_values",
                "trial_params",
                "trial_system_attributes",
                "trial_user_attributes",
                "trial_values",
            )
        ),
    ),
}
_BEFORE_DELETE_TEMPLATES = [
    "CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql SET search_path = {schema}, pg_temp AS "
    "$$ BEGIN {statements} RETURN OLD; END $$",
    "DROP TRIGGER IF EXISTS {name} ON {table}",
    "CREATE TRIGGER {name} BEFORE DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()",
]


def _extend_optuna(connection: sa.Connection) -> None:
    # A study has few unfinished trials among many: without the index, each claim would read all of them.
    connection.exec_driver_sql("CREATE INDEX IF NOT EXISTS hpo_trials_by_state ON trials (study_id, state)")
    is_postgresql = connection.dialect.name == "postgresql"
    schema_name = str(connection.scalar(sa.select(sa.func.current_schema()))) if is_postgresql else ""
    quoted = connection.dialect.identifier_preparer.quote(schema_name)
    for name, (table, statements) in _TRIGGERS.items():
        for template in _TRIGGER_TEMPLATES[connection.dialect.name]:
            connection.exec_driver_sql(template.format(name=name, table=table, statements=statements, schema=quoted))
    for name, (table, statements) in _BEFORE_DELETE.items() if is_postgresql else ():
        for template in _BEFORE_DELETE_TEMPLATES:
            connection.exec_driver_sql(template.format(name=name, table=table, statements=statements, schema=quoted))
