"""Failed trials are tried again: they wait like interrupted ones, and any run may claim them."""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa
from optuna.trial import TrialState

from storage import optuna_internals, tables
from storage.database import retry_while_down
from storage.studies import Study, attempt_of

_OF_FAILURE = ("fail_reason", "traceback")  # user attributes of a failed trial


def failed_trials(study: Study) -> list[int]:
    """Return the numbers of the trials that failed while they were trained, in ascending order."""
    return [trial.number for trial in study.trained_trials() if trial.state == TrialState.FAIL]


def retry_trials(study: Study, numbers: Collection[int], *, resume: bool = False) -> None:
    """Set failed trials to WAITING, and forget their failures. Trials in another state are left as they are.

    One transaction: all of the trials, or none. Repeating it after a lost answer changes nothing.

    Args:
        study: the study.
        numbers: the numbers of the trials.
        resume: whether they resume after the last epoch in storage. Otherwise their epochs are deleted, and the number of
            the attempt grows.

    Raises:
        StorageError: the database cannot be used (after retries).
    """
    chosen = {
        optuna_internals.trial_id(trial): attempt_of(trial.user_attrs) + (not resume)
        for trial in study.trials()
        if trial.number in numbers
    }
    trials, attrs = optuna_internals.trials, optuna_internals.trial_user_attributes

    def write() -> None:
        with study.lock(), study.database.engine.begin() as connection:
            # The first statement writes, so that no other program changes a trial between the statements.
            is_failed = sa.and_(trials.c.trial_id.in_(chosen), trials.c.state == TrialState.FAIL)
            waiting = {"state": TrialState.WAITING, "datetime_complete": None}
            updated = trials.update().where(is_failed).values(waiting).returning(trials.c.trial_id)
            ids = list(connection.scalars(updated))
            connection.execute(attrs.delete().where(attrs.c.trial_id.in_(ids), attrs.c.key.in_(_OF_FAILURE)))
            connection.execute(tables.trials.update().where(tables.trials.c.trial.in_(ids)).values(run=None, crashes=0))
            if resume:
                return
            values = optuna_internals.intermediate_values
            connection.execute(values.delete().where(values.c.trial_id.in_(ids)))
            connection.execute(tables.metrics.delete().where(tables.metrics.c.trial.in_(ids)))
            connection.execute(attrs.delete().where(attrs.c.trial_id.in_(ids), attrs.c.key == "attempt"))
            rows = [{"trial_id": trial_id, "key": "attempt", "value_json": str(chosen[trial_id])} for trial_id in ids]
            if rows:
                connection.execute(attrs.insert(), rows)

    retry_while_down(study.database, write)
