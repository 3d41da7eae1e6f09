"""Our SQL for Optuna's tables.

Optuna's own methods write one value, or one state, in one transaction each. A claim, a report or an ending changes several
of its rows and of ours, which must happen together, so it cannot be made of such methods. `open_database` refuses tables
of another version than `SCHEMA`. Every function runs in a transaction of the caller.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy.dialects import postgresql, sqlite

SCHEMA = "v3.2.0.a"  # the version of Optuna's tables that this module writes


def _table(model: Any) -> sa.Table:
    table: sa.Table = sa.inspect(model).local_table
    return table


metadata: sa.MetaData = models.BaseModel.metadata  # all of Optuna's tables, but `alembic_version`
studies = _table(models.StudyModel)
study_directions = _table(models.StudyDirectionModel)
study_user_attributes = _table(models.StudyUserAttributeModel)
study_system_attributes = _table(models.StudySystemAttributeModel)
trials = _table(models.TrialModel)
trial_params = _table(models.TrialParamModel)
trial_values = _table(models.TrialValueModel)
trial_user_attributes = _table(models.TrialUserAttributeModel)
trial_system_attributes = _table(models.TrialSystemAttributeModel)
intermediate_values = _table(models.TrialIntermediateValueModel)

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)


@dataclass(frozen=True)
class StudyKey:
    """Which study. Its id is not enough: SQLite gives the id of a deleted study to a new one.

    Attributes:
        study_id: its primary key.
        name: its name.
        identity: its attribute `hpo:id`; None for a study that another program created.
    """

    study_id: int
    name: str
    identity: str | None


def upsert(connection: sa.Connection, table: sa.Table, key: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Insert rows, or replace the values of those that exist.

    Args:
        connection: in the caller's transaction.
        table: where to.
        key: the columns of a unique constraint.
        rows: all with the same columns, each key at most once.
    """
    if not rows:
        return
    connection.execute(_upsert(connection.dialect.name, table, key, tuple(rows[0])), rows)


# Statements of every epoch are built once: that takes SQLAlchemy longer than to execute them.


@cache
def _upsert(dialect: str, table: sa.Table, key: tuple[str, ...], columns: tuple[str, ...]) -> sa.Insert:
    insert = (sqlite if dialect == "sqlite" else postgresql).insert(table)
    updated = {name: insert.excluded[name] for name in columns if name not in key}
    statement: sa.Insert = insert.on_conflict_do_update(index_elements=list(key), set_=updated)
    return statement


# --- studies ----------------------------------------------------------------------------------------------------------


def insert_study(connection: sa.Connection, name: str, directions: Sequence[str]) -> int:
    """Insert a study and return its study_id.

    Args:
        connection: in the caller's transaction.
        name: must be new.
        directions: maximize or minimize, of each objective.
    """
    inserted = connection.execute(studies.insert().values(study_name=name).returning(studies.c.study_id))
    study_id = int(inserted.scalar_one())
    rows = [
        {"study_id": study_id, "objective": i, "direction": StudyDirection[direction.upper()]}
        for i, direction in enumerate(directions)
    ]
    connection.execute(study_directions.insert(), rows)
    return study_id


def read_study_attr(connection: sa.Connection, key: str) -> dict[str, Any]:
    """Return {name of a study: user attribute} of all studies; None where a study does not have it."""
    attr = study_user_attributes
    has_key = sa.and_(attr.c.study_id == studies.c.study_id, attr.c.key == key)
    rows = connection.execute(sa.select(studies.c.study_name, attr.c.value_json).join(attr, has_key, isouter=True))
    return {name: None if value is None else json.loads(value) for name, value in rows}


def lock_study(connection: sa.Connection, study: StudyKey) -> bool:
    """Let no other transaction add a trial to a study or claim one. Return False if the study was deleted.

    SQLite has one writer at a time in any case: the transaction must be one of `Database.transaction`.
    """
    identity = None if study.identity is None else json.dumps(study.identity)
    asked = {"asked_id": study.study_id, "asked_name": study.name, "asked_identity": identity}
    return connection.scalar(_lock_study(), asked) is not None


@cache
def _lock_study() -> sa.Select[int]:
    attr = study_user_attributes
    identity = sa.select(attr.c.value_json).where(attr.c.study_id == studies.c.study_id, attr.c.key == "hpo:id")
    is_it = sa.and_(
        studies.c.study_id == sa.bindparam("asked_id"),
        studies.c.study_name == sa.bindparam("asked_name"),
        identity.scalar_subquery().is_not_distinct_from(sa.bindparam("asked_identity", type_=sa.Text)),
    )
    return sa.select(studies.c.study_id).where(is_it).with_for_update(key_share=True)


def write_study_attrs(connection: sa.Connection, study_id: int, attrs: Mapping[str, Any]) -> None:
    """Set user attributes of a study."""
    upsert(connection, study_user_attributes, ("study_id", "key"), _attr_rows(study_id, attrs))


def insert_study_attrs(connection: sa.Connection, study_id: int, attrs: Mapping[str, Any]) -> None:
    """Insert user attributes of a study. Those that exist raise IntegrityError."""
    connection.execute(study_user_attributes.insert(), _attr_rows(study_id, attrs))


def read_study_user_attr(connection: sa.Connection, study_id: int, key: str) -> Any:
    """Return a user attribute of a study; None if it has none."""
    return _read_study_attr(connection, study_user_attributes, study_id, key)


def read_study_system_attr(connection: sa.Connection, study_id: int, key: str) -> Any:
    """Return a system attribute of a study; None if it has none."""
    return _read_study_attr(connection, study_system_attributes, study_id, key)


def _read_study_attr(connection: sa.Connection, attr: sa.Table, study_id: int, key: str) -> Any:
    value = connection.scalar(sa.select(attr.c.value_json).where(attr.c.study_id == study_id, attr.c.key == key))
    return None if value is None else json.loads(value)


def lock_study_system_attrs(connection: sa.Connection, study_id: int) -> dict[str, Any]:
    """Return all system attributes of a study. No other transaction changes these, but one may add another."""
    attr = study_system_attributes
    query = sa.select(attr.c.key, attr.c.value_json).where(attr.c.study_id == study_id).with_for_update()
    return {key: json.loads(value) for key, value in connection.execute(query)}


def write_study_system_attrs(connection: sa.Connection, study_id: int, attrs: Mapping[str, Any]) -> None:
    """Set system attributes of a study."""
    upsert(connection, study_system_attributes, ("study_id", "key"), _attr_rows(study_id, attrs))


def insert_study_system_attrs(connection: sa.Connection, study_id: int, attrs: Mapping[str, Any]) -> None:
    """Insert system attributes of a study. Those that exist raise IntegrityError."""
    if attrs:
        connection.execute(study_system_attributes.insert(), _attr_rows(study_id, attrs))


def _attr_rows(study_id: int, attrs: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"study_id": study_id, "key": key, "value_json": json.dumps(value)} for key, value in attrs.items()]


# --- trials -----------------------------------------------------------------------------------------------------------


def next_number(connection: sa.Connection, study_id: int) -> int:
    """Return the number that the next trial of a study gets. It stays so while the study is locked."""
    number: int | None = connection.scalar(_last_number(), {"asked_id": study_id})
    return 0 if number is None else number + 1


@cache
def _last_number() -> sa.Select[int]:
    is_of_study = trials.c.study_id == sa.bindparam("asked_id")
    return sa.select(trials.c.number).where(is_of_study).order_by(trials.c.trial_id.desc()).limit(1)


def number_of(connection: sa.Connection, trial_id: int) -> int:
    """Return the number of a trial."""
    return int(connection.scalars(sa.select(trials.c.number).where(trials.c.trial_id == trial_id)).one())


def insert_trial(connection: sa.Connection, study_id: int, number: int, state: TrialState) -> int:
    """Insert a trial without params and return its trial_id.

    Args:
        connection: in the caller's transaction, which has locked the study.
        study_id: the study.
        number: see `next_number`.
        state: of the trial.
    """
    started = _now() if state == TrialState.RUNNING else None
    row = {"study_id": study_id, "number": number, "state": state, "datetime_start": started}
    return int(connection.execute(_insert_trial(), row).scalar_one())


@cache
def _insert_trial() -> Any:
    return trials.insert().returning(trials.c.trial_id)


def write_params(
    connection: sa.Connection, trial_id: int, params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]
) -> None:
    """Write params of a trial. Those that it has are kept.

    Args:
        connection: in the caller's transaction.
        trial_id: the trial.
        params: {name: value}.
        distributions: {name: distribution} of at least these params.
    """
    rows = [
        {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": distributions[name].to_internal_repr(value),
            "distribution_json": distribution_to_json(distributions[name]),
        }
        for name, value in params.items()
    ]
    if rows:
        insert = (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(trial_params)
        connection.execute(insert.on_conflict_do_nothing(index_elements=["trial_id", "param_name"]), rows)


def read_params(connection: sa.Connection, trial_id: int) -> dict[str, Any]:
    """Return the params of a trial, in the order in which they were written."""
    query = sa.select(trial_params).where(trial_params.c.trial_id == trial_id).order_by(trial_params.c.param_id)
    return {
        row.param_name: json_to_distribution(row.distribution_json).to_external_repr(row.param_value)
        for row in connection.execute(query)
    }


def write_attrs(connection: sa.Connection, attrs: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
    """Set user attributes of trials, given as (trial_id, {key: value})."""
    _write_attrs(connection, trial_user_attributes, attrs)


def write_system_attrs(connection: sa.Connection, attrs: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
    """Set system attributes of trials, given as (trial_id, {key: value})."""
    _write_attrs(connection, trial_system_attributes, attrs)


def _write_attrs(connection: sa.Connection, table: sa.Table, attrs: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
    rows = {
        (trial_id, key): {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
        for trial_id, values in attrs
        for key, value in values.items()
    }
    upsert(connection, table, ("trial_id", "key"), list(rows.values()))


def read_attrs(connection: sa.Connection, trial_id: int) -> dict[str, Any]:
    """Return the user attributes of a trial."""
    table = trial_user_attributes
    query = sa.select(table.c.key, table.c.value_json).where(table.c.trial_id == trial_id)
    return {key: json.loads(value) for key, value in connection.execute(query)}


def delete_attrs(connection: sa.Connection, trial_ids: Collection[int], keys: Collection[str]) -> None:
    """Delete user attributes of trials."""
    table = trial_user_attributes
    connection.execute(table.delete().where(table.c.trial_id.in_(trial_ids), table.c.key.in_(keys)))


# --- values -----------------------------------------------------------------------------------------------------------


def write_values(connection: sa.Connection, values: Iterable[tuple[int, int, float]]) -> None:
    """Write intermediate values, given as (trial_id, epoch, value). Existing ones are replaced."""
    rows = []
    for trial_id, epoch, value in values:
        stored, kind = encode_intermediate_value(value)
        rows.append(
            {"trial_id": trial_id, "step": epoch, "intermediate_value": stored, "intermediate_value_type": kind}
        )
    upsert(connection, intermediate_values, ("trial_id", "step"), rows)


def encode_intermediate_value(value: float) -> tuple[float | None, str]:
    """Return the columns (intermediate_value, intermediate_value_type) for a value, which may be NaN or infinite."""
    stored, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)
    return stored, kind.name


def decode_intermediate_value(stored: float | None, kind: Any) -> float:
    """Return the value of the columns (intermediate_value, intermediate_value_type)."""
    return models.TrialIntermediateValueModel.stored_repr_to_intermediate_value(stored, kind)


def decode_value(stored: float | None, kind: Any) -> float:
    """Return the value of the columns (value, value_type)."""
    return models.TrialValueModel.stored_repr_to_value(stored, kind)


def read_values(connection: sa.Connection, trial_id: int) -> dict[int, float]:
    """Return {epoch: value} of a trial."""
    table = intermediate_values
    query = sa.select(table.c.step, table.c.intermediate_value, table.c.intermediate_value_type)
    rows = connection.execute(query.where(table.c.trial_id == trial_id).order_by(table.c.step))
    return {epoch: decode_intermediate_value(value, kind) for epoch, value, kind in rows}


def delete_values(connection: sa.Connection, trial_id: int, from_epoch: int) -> None:
    """Delete the intermediate values of a trial from an epoch on."""
    table = intermediate_values
    connection.execute(table.delete().where(table.c.trial_id == trial_id, table.c.step >= from_epoch))


# --- states -----------------------------------------------------------------------------------------------------------


def start(connection: sa.Connection, trial_id: int) -> None:
    """Set a trial to RUNNING. Its first start is kept."""
    started = sa.func.coalesce(trials.c.datetime_start, _now())
    update = trials.update().where(trials.c.trial_id == trial_id)
    connection.execute(update.values(state=TrialState.RUNNING, datetime_start=started, datetime_complete=None))


def wait(connection: sa.Connection, trial_ids: Collection[int], *, running: bool = False) -> int:
    """Set trials to WAITING; return how many.

    Args:
        connection: in the caller's transaction.
        trial_ids: the trials.
        running: leave those as they are that are not RUNNING.
    """
    update = trials.update().where(trials.c.trial_id.in_(trial_ids))
    if running:
        update = update.where(trials.c.state == TrialState.RUNNING)
    return connection.execute(update.values(state=TrialState.WAITING, datetime_complete=None)).rowcount


def end(
    connection: sa.Connection, trial_id: int, state: TrialState, value: float | None, others: Sequence[float] = ()
) -> None:
    """End a trial.

    Args:
        connection: in the caller's transaction.
        trial_id: the trial.
        state: COMPLETE, PRUNED or FAIL.
        value: its objective, the first one of several; None if it has none.
        others: its other objectives.
    """
    update = trials.update().where(trials.c.trial_id == trial_id)
    connection.execute(update.values(state=state, datetime_complete=_now()))
    if value is not None:
        rows = []
        for i, each in enumerate((value, *others)):
            stored, kind = models.TrialValueModel.value_to_stored_repr(each)
            rows.append({"trial_id": trial_id, "objective": i, "value": stored, "value_type": kind})
        upsert(connection, trial_values, ("trial_id", "objective"), rows)


def set_times(connection: sa.Connection, trial_id: int, started: datetime | None, completed: datetime | None) -> None:
    """Set when a trial started and ended, in UTC without a time zone. None leaves what is stored."""
    times = {"datetime_start": started, "datetime_complete": completed}
    known = {name: time for name, time in times.items() if time is not None}
    if known:
        connection.execute(trials.update().where(trials.c.trial_id == trial_id).values(known))


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)  # Optuna stores UTC without a time zone
