"""Trials that continue others: they start from the checkpoint of a trial of an earlier study that had fewer epochs.

The user attribute `continued_from` names the parent. It is stored in the transaction that creates the trial, and has all
that is needed to find the parent's files, also when its study was renamed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from storage import optuna_tables
from storage.errors import RETRY_SECONDS, retry_while_down
from storage.records import CONTINUED_FROM
from storage.studies import Study


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


def continued_trials(study: Study, timeout_seconds: float = RETRY_SECONDS) -> set[int]:
    """Return the numbers of a study's trials that unfinished ones continue, in any study of its database.

    Args:
        study: the study of the parents.
        timeout_seconds: how long to retry while the database is down.

    Raises:
        StorageError: the database cannot be used.
    """
    trial, attr = optuna_tables.trials, optuna_tables.trial_user_attributes
    query = (
        sa.select(attr.c.value_json)
        .join(trial, trial.c.trial_id == attr.c.trial_id)
        .where(attr.c.key == CONTINUED_FROM, trial.c.state.in_((TrialState.RUNNING, TrialState.WAITING)))
    )

    def read() -> set[int]:
        with study.database.engine.connect() as connection:
            parents = [Parent.read(json.loads(value)) for value in connection.scalars(query)]
        return {parent.number for parent in parents if parent is not None and parent.identity == study.identity}

    return retry_while_down(study.database, read, timeout_seconds)
