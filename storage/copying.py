"""Copying a study, within a database or to another one: all of it, or nothing.

The copy is the study as it was at one moment, in one transaction of the target, with new primary keys and tokens. No
run works on it: trials that were RUNNING are WAITING in the copy, and its runs have ended.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa
from optuna.trial import TrialState
from sqlalchemy.exc import IntegrityError

from storage import optuna_tables, tables
from storage.database import Database
from storage.errors import StorageError, name_strange_content, retry_while_down
from storage.optuna_internals import renumber_parents
from storage.ownership import new_token
from storage.records import CONTINUED_FROM, COPIED_FROM, LEARNED_FROM, REUSED_FROM
from storage.revisions import revisions_of
from storage.studies import deleted_studies
from storage.study import BRACKETS, FILES, Study, settings_of

TRIALS_AT_ONCE = 200  # bounds the rows in memory: a trial may have hundreds of epochs and metrics

_OF_STUDY = (
    optuna_tables.study_directions,
    optuna_tables.study_user_attributes,
    optuna_tables.study_system_attributes,
)
# Optuna's heartbeats are left out: a copy has no RUNNING trials.
_OF_TRIAL = (
    optuna_tables.trial_params,
    optuna_tables.trial_values,
    optuna_tables.intermediate_values,
    optuna_tables.trial_user_attributes,
    optuna_tables.trial_system_attributes,
    tables.trials,
    tables.metrics,
    tables.rungs,
    tables.imports,
    tables.usage,
)
_ENDED = {TrialState.COMPLETE, TrialState.PRUNED}  # permanently

Rows = list[dict[str, Any]]


class NameTakenError(StorageError):
    """The database has a study with this name."""


class SystemAttr(NamedTuple):
    """A system attribute of a study, or of one of its trials.

    Attributes:
        key: its name.
        value: as JSON.
    """

    key: str
    value: str


# Returns the system attribute of a copy, given that of the study, and {trial_id: trial_id in the copy}; None for none.
Translate = Callable[[SystemAttr, Mapping[int, int]], SystemAttr | None]


def copy_study(
    source: Study,
    target: Database,
    name: str,
    identity: str,
    *,
    on_snapshot: Callable[[], None] = lambda: None,
    translate: Translate = lambda attr, _: attr,
) -> None:
    """Copy a study with all of its trials: all rows, or none. Idempotent: a copy that exists is left as it is.

    Args:
        source: the study. Runs may work on it.
        target: where to; the database of the source, or another one.
        name: of the copy. It becomes a first revision.
        identity: `hpo:id` of the copy, new and random. It tells a copy whose answer was lost from another study.
        on_snapshot: called as soon as the rows to copy are fixed, before anything is written. It may be called again.
        translate: returns a system attribute of the copy. Its side effects must be idempotent.

    Raises:
        NameTakenError: the target has a study, or a revision of one, with this name.
        StorageError: the study was deleted or renamed, or a database cannot be used (after retries).
    """
    where = _Where(source.database.url)

    def copy() -> None:
        where.url = source.database.url
        with source.database.snapshot() as reading:
            copying = _Copying(source, reading, where, target.url)
            copying.check_source()
            on_snapshot()
            where.url = target.url
            with target.transaction() as connection:
                if not has_study(connection, target, name, identity):
                    copying.write(connection, name, identity, translate)

    retry_while_down(where, copy, runs_other_code=True)


def has_study(connection: sa.Connection, target: Database, name: str, identity: str | None) -> bool:
    """Return whether the study with this `hpo:id` has this name already.

    Raises:
        NameTakenError: another study has the name, or is a revision of one that had it.
    """
    known = optuna_tables.read_study_attr(connection, "hpo:id")
    if known.get(name) == identity:
        return True
    if revisions_of(known, name):
        raise name_taken(target.url, name)
    return False


def may_have(database: Database, name: str, identity: str) -> bool:
    """Return whether the study with this `hpo:id` has this name, or there is none and never was.

    Raises:
        StorageError: the database cannot be used (after retries).
    """

    def read() -> dict[str, Any]:
        with database.engine.connect() as connection:
            return optuna_tables.read_study_attr(connection, "hpo:id")

    known = retry_while_down(database, read)
    return known.get(name) == identity or identity not in {*known.values(), *deleted_studies(database)}


def name_taken(url: str, name: str) -> NameTakenError:
    """Return the error of an operation that would give a study the name of another one in a database."""
    return NameTakenError(f"{url} has a study {name!r} already: choose another name, or delete that one first")


@dataclass
class _Where:
    """The database that is used now: a message about an error names it."""

    url: str


class _Copying:
    """Copies the rows of a study.

    Args:
        source: the study.
        reading: its rows at one moment.
        where: set to the database that is used.
        target: the URL of the other one, without a password.
    """

    def __init__(self, source: Study, reading: sa.Connection, where: _Where, target: str) -> None:
        self._source = source
        self._reading = reading
        self._where = where
        self._target = target
        self._ended: dict[int, int] = {}  # {trial_id: number} of trials that will not run again

    def check_source(self) -> None:
        """Raise StorageError if the study was deleted or renamed."""
        names = optuna_tables.read_study_attr(self._reading, "hpo:id")
        if names.get(self._source.name, "") != self._source.identity:
            raise gone(self._source)

    def write(self, connection: sa.Connection, name: str, identity: str, translate: Translate) -> None:
        """Insert the rows of the copy."""
        new = optuna_tables.studies.insert().values(study_name=name).returning(optuna_tables.studies.c.study_id)
        try:
            study_id = connection.execute(new).scalar_one()
        except IntegrityError:  # another process has created it just now
            raise name_taken(self._target, name) from None
        runs = self._write_runs(connection, study_id)
        trial_ids, unfinished = self._write_trials(connection, study_id)
        for table in _OF_STUDY:
            rows = self._read(table, table.c.study_id == self._source.study_id)
            with name_strange_content(self._source.database.url):
                if table is optuna_tables.study_user_attributes:
                    rows = _as_new(rows, self._source.name, name, identity)
                if table is optuna_tables.study_system_attributes:
                    rows = _renumbered(rows, trial_ids)
            if table is optuna_tables.study_system_attributes:
                rows = _translated(rows, translate, trial_ids)
            _insert(connection, table, [{**row, "study_id": study_id} for row in rows])
        known = sorted(trial_ids)
        for start in range(0, len(known), TRIALS_AT_ONCE):
            for table in _OF_TRIAL:
                column = "trial_id" if "trial_id" in table.c else "trial"
                some = known[start : start + TRIALS_AT_ONCE]
                rows = self._read(table, table.c[column].in_(some))
                if table is optuna_tables.trial_user_attributes:
                    rows += self._origins(some, rows)
                if table is tables.trials:
                    rows = [_without_owner(row, runs, is_unfinished=row["trial"] in unfinished) for row in rows]
                if table is optuna_tables.trial_user_attributes:
                    rows = [self._with_parent(row, name, identity) for row in rows]
                if table is tables.usage:
                    rows = [{**row, "run": runs.get(row["run"])} for row in rows]
                if table is optuna_tables.trial_system_attributes:
                    rows = _translated(rows, translate, trial_ids)
                fixed = {"study": study_id} if "study" in table.c else {}
                for row in rows:  # in place: they are many
                    row.update(fixed)
                    row[column] = trial_ids[row[column]]
                _insert(connection, table, rows)

    def _with_parent(self, row: dict[str, Any], name: str, identity: str) -> dict[str, Any]:
        """Return a user attribute of a trial. Of a parent in the same study, it names the copy, which has the files, too."""
        if row["key"] != CONTINUED_FROM:
            return row
        with name_strange_content(self._source.database.url):
            parent = json.loads(row["value_json"])
        if not isinstance(parent, dict) or parent.get("id") != self._source.identity:
            return row
        own = parent | {"study": name, "id": identity, "files": f"{name}-{identity}"}
        return {**row, "value_json": json.dumps(own)}

    def _origins(self, trial_ids: Sequence[int], attrs: Rows) -> Rows:
        """Return which trials those of the copy are, as user attributes: a search that reads both learns from one.

        Trials that were taken over, or copied before, say so already. A trial that has not ended is another one in the copy.
        """
        known = {row["trial_id"] for row in attrs if row["key"] in {LEARNED_FROM, REUSED_FROM, COPIED_FROM}}
        source = {"study": self._source.name, "id": self._source.identity}
        return [
            {"trial_id": each, "key": COPIED_FROM, "value_json": json.dumps(source | {"trial": self._ended[each]})}
            for each in trial_ids
            if each in self._ended and each not in known
        ]

    def _write_runs(self, connection: sa.Connection, study_id: int) -> dict[int, int]:
        """Insert the runs, all of which have ended; return {run: run of the copy}."""
        table, keys = tables.runs, {}
        for row in self._read(table, table.c.study == self._source.study_id):
            key = row.pop("run")
            ended = row["last_heard"] if row["ended"] is None else row["ended"]
            row |= {"study": study_id, "ended": ended, "lease_until": min(row["lease_until"], ended)}
            keys[key] = connection.execute(table.insert().values(row).returning(table.c.run)).scalar_one()
        return keys

    def _write_trials(self, connection: sa.Connection, study_id: int) -> tuple[dict[int, int], set[int]]:
        """Insert the trials; return {trial_id: trial_id in the copy}, and those of the study that have not ended."""
        table = optuna_tables.trials
        rows = self._read(table, table.c.study_id == self._source.study_id, keys=True)
        known = [row.pop("trial_id") for row in rows]
        unfinished = {each for each, row in zip(known, rows, strict=True) if row["state"] in optuna_tables.UNFINISHED}
        self._ended = {each: row["number"] for each, row in zip(known, rows, strict=True) if row["state"] in _ENDED}
        for row in rows:
            row["study_id"] = study_id
            if row["state"] == TrialState.RUNNING:
                row |= {"state": TrialState.WAITING, "datetime_complete": None}
        insert = table.insert().returning(table.c.trial_id, sort_by_parameter_order=True)
        new = list(connection.scalars(insert, rows)) if rows else []
        return dict(zip(known, new, strict=True)), unfinished

    def _read(self, table: sa.Table, where: sa.ColumnElement[bool], *, keys: bool = False) -> Rows:
        """Return rows of a table in the order in which they were inserted, without the keys that Optuna numbers them by."""
        is_numbered = table.metadata is optuna_tables.metadata
        columns = [column for column in table.c if keys or not (is_numbered and column.primary_key)]
        self._where.url = self._source.database.url
        with name_strange_content(self._where.url):
            query = sa.select(*columns).where(where).order_by(*table.primary_key)
            rows = [dict(row) for row in self._reading.execute(query).mappings()]
        self._where.url = self._target
        return rows


def gone(study: Study) -> StorageError:
    """Return the error of an operation on a study that somebody has deleted or renamed meanwhile."""
    return StorageError(f"{study.database.url}: the study {study.name!r} was deleted or renamed meanwhile")


def _insert(connection: sa.Connection, table: sa.Table, rows: Rows) -> None:
    if rows:
        connection.execute(table.insert(), rows)


def _as_new(rows: Rows, former: str, name: str, identity: str) -> Rows:
    """Return the user attributes of a study as those of a new one with another name."""
    attrs = {row["key"]: json.loads(row["value_json"]) for row in rows}
    first_name = attrs.pop(FILES, None) or former
    new = {BRACKETS: first_name} | attrs | renamed(attrs, name) | {"hpo:id": identity}
    return [{"key": key, "value_json": json.dumps(value)} for key, value in new.items()]


def renamed(attrs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return those of a study's user attributes that differ under another name: its settings contain the name."""
    settings = settings_of(attrs)
    return {"hpo:settings": settings | {"name": name}} if "name" in settings else {}


def _renumbered(rows: Rows, trial_ids: Mapping[int, int]) -> Rows:
    return [{**row, "value_json": renumber_parents(row["key"], row["value_json"], trial_ids)} for row in rows]


def _translated(rows: Rows, translate: Translate, trial_ids: Mapping[int, int]) -> Rows:
    new = [(row, translate(SystemAttr(row["key"], row["value_json"]), trial_ids)) for row in rows]
    return [{**row, "key": attr.key, "value_json": attr.value} for row, attr in new if attr is not None]


def _without_owner(row: dict[str, Any], runs: Mapping[int, int], *, is_unfinished: bool) -> dict[str, Any]:
    """Return a row of hpo_trials for the copy, whose tokens are its own: they are unique in a database."""
    if is_unfinished:
        return {**row, "run": None, "token": None}
    return {**row, "run": runs.get(row["run"]), "token": None if row["token"] is None else new_token()}
