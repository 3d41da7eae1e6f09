"""Trials that continue others: they start from the checkpoint of a trial of an earlier study that had fewer epochs.

The user attribute `continued_from` names the parent. It is stored in the transaction that creates the trial, and has all
that is needed to find the parent's files, also when its study was renamed. Before that, the study's decision has it, see
`storage.continuations`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from storage import optuna_tables
from storage.continuations import CONTINUATION
from storage.database import Database, look_at
from storage.errors import RETRY_SECONDS, retry_while_down
from storage.records import CONTINUED_FROM, count_budgeted
from storage.study import TOTAL, Study

_MAY_START = (*optuna_tables.UNFINISHED, TrialState.FAIL)


@dataclass(frozen=True)
class Parent:
    """The trial that another one continues.

    Attributes:
        study: the name of its study, for people.
        number: its number there.
        identity: the attribute `hpo:id` of its study.
        epoch: after which epoch the other one starts; 0 if it was trained from the start, because the checkpoint was gone.
        files: the name of the folder of its study, see `Study.unique_name`.
        key: whose its folder is: its configuration, and the attempt.
    """

    study: str
    number: int
    identity: str
    epoch: int
    files: str
    key: str

    def __str__(self) -> str:
        return f"{self.study} #{self.number}"

    @classmethod
    def read(cls, stored: object) -> Parent | None:
        """Return the parent that a user attribute names; None if there is none, or if another program has changed it."""
        if not isinstance(stored, Mapping):
            return None
        study, identity, files, key = (stored.get(name) for name in ("study", "id", "files", "key"))
        number, epoch = stored.get("trial"), stored.get("epoch")
        if type(number) is not int or type(epoch) is not int:
            return None
        if not (
            isinstance(study, str) and isinstance(identity, str) and isinstance(files, str) and isinstance(key, str)
        ):
            return None
        return cls(study, number, identity, epoch, files, key)

    @property
    def attribute(self) -> dict[str, Any]:
        """What the other trial stores of it."""
        return {
            "study": self.study,
            "trial": self.number,
            "id": self.identity,
            "epoch": self.epoch,
            "files": self.files,
            "key": self.key,
        }


def continued_trials(database: Database, timeout_seconds: float = RETRY_SECONDS) -> dict[str, dict[int, str]]:
    """Return {`hpo:id` of a study: {number of a trial: name of a study}}: which trials are needed, and by whom.

    They are continued by a trial that is unfinished, or that failed: `hpo retry` starts from the parent again. Or an
    unfinished search has chosen them, and has not created the trial yet. Their own study may be in another database, or
    deleted.

    Args:
        database: of the trials that continue others.
        timeout_seconds: how long to retry while the database is down.

    Raises:
        StorageError: the database cannot be used.
    """

    def read() -> dict[str, dict[int, str]]:
        found: dict[str, dict[int, str]] = {}
        with database.engine.connect() as connection:
            for name, parent in _needed(connection):
                found.setdefault(parent.identity, {})[parent.number] = name
        return found

    return retry_while_down(database, read, timeout_seconds)


def unfinished_children(study: Study) -> dict[int, Parent]:
    """Return {number: its parent} of a study's trials that may still start from another one, see `continued_trials`.

    Raises:
        StorageError: the database cannot be used.
    """

    def read() -> dict[int, Parent]:
        with study.database.engine.connect() as connection:
            return {number: parent for name, number, parent in _children(connection) if name == study.name}

    return retry_while_down(study.database, read)


def needed_ids(path: Path) -> set[str]:
    """Return the `hpo:id` of each study whose files a SQLite file needs: its own studies, and those of parents.

    Args:
        path: the file, which may be of any program. It is only read.

    Raises:
        StorageError: the file cannot be read, or a view has the name of a table.
    """

    def read(connection: sa.Connection) -> set[str]:
        if not sa.inspect(connection).has_table(optuna_tables.study_user_attributes.name):
            return set()
        own = {value for value in optuna_tables.read_study_attr(connection, "hpo:id").values() if value is not None}
        return own | {parent.identity for _, parent in _needed(connection)}

    return look_at(path, read)


def _needed(connection: sa.Connection) -> Iterator[tuple[str, Parent]]:
    """Yield each parent from which a trial may still start, with the name of that trial's study."""
    yield from _chosen(connection)  # first: the trial may be created meanwhile
    for name, _, parent in _children(connection):
        yield name, parent


def _chosen(connection: sa.Connection) -> Iterator[tuple[str, Parent]]:
    """Yield the name of the study and the parent of each trial that an unfinished search has not created yet."""
    attr, study = optuna_tables.study_user_attributes, optuna_tables.studies
    query = (
        sa.select(study.c.study_id, study.c.study_name, attr.c.value_json)
        .join(study, study.c.study_id == attr.c.study_id)
        .where(attr.c.key == CONTINUATION)
    )
    for study_id, name, value in connection.execute(query).all():
        total = optuna_tables.read_study_user_attr(connection, study_id, TOTAL)
        if isinstance(total, int) and count_budgeted(connection, study_id) >= total:
            continue  # those that it has chosen beyond its budget are not begun
        decision = json.loads(value)
        parts = (decision.get("chosen"), decision.get("former")) if isinstance(decision, Mapping) else ()
        begun = _begun(connection, study_id)
        for each in (each for part in parts if isinstance(part, list) for each in part):
            parent = Parent.read(each.get("parent")) if isinstance(each, Mapping) else None
            if parent is not None and each.get("horizon") is not True and (parent.identity, parent.number) not in begun:
                yield name, parent


def _begun(connection: sa.Connection, study_id: int) -> set[tuple[str, int]]:
    """Return (`hpo:id` of its study, number) of each trial that a trial of this study continues, or has continued."""
    trial, attr = optuna_tables.trials, optuna_tables.trial_user_attributes
    query = sa.select(attr.c.value_json).join(trial, trial.c.trial_id == attr.c.trial_id)
    stored = connection.scalars(query.where(attr.c.key == CONTINUED_FROM, trial.c.study_id == study_id))
    parents = map(Parent.read, map(json.loads, stored))
    return {(parent.identity, parent.number) for parent in parents if parent is not None}


def _children(connection: sa.Connection) -> Iterator[tuple[str, int, Parent]]:
    """Yield the name of the study, the number and the parent of each trial that may still start from another one."""
    trial, attr, study = optuna_tables.trials, optuna_tables.trial_user_attributes, optuna_tables.studies
    query = (
        sa.select(study.c.study_name, trial.c.number, attr.c.value_json)
        .join(trial, trial.c.trial_id == attr.c.trial_id)
        .join(study, study.c.study_id == trial.c.study_id)
        .where(attr.c.key == CONTINUED_FROM, trial.c.state.in_(_MAY_START))
    )
    for name, number, value in connection.execute(query):
        parent = Parent.read(json.loads(value))
        if parent is not None and parent.epoch > 0:  # else it was trained from the start
            yield name, number, parent
