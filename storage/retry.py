"""Failed trials are tried again: they wait like interrupted ones, and any run may claim them."""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa
from optuna.trial import TrialState

from storage import optuna_internals, optuna_tables, protocol, records, tables
from storage.database import retry_while_down
from storage.records import attempt_of
from storage.studies import Study

_OF_FAILURE = ("fail_reason", "traceback")  # user attributes of a failed trial


def failed_trials(study: Study) -> list[int]:
    """Return the numbers of the trials that failed while they were trained, in ascending order.

    Raises:
        StorageError: the database cannot be used (after retries).
    """
    trial = optuna_tables.trials
    # Without a row of ours, no run trained it: a draw that was refused, or a trial of another program.
    query = sa.select(trial.c.number).join(tables.trials, tables.trials.c.trial == trial.c.trial_id)
    query = query.where(trial.c.study_id == study.study_id, trial.c.state == TrialState.FAIL).order_by(trial.c.number)

    def read() -> list[int]:
        with study.database.engine.connect() as connection:
            return list(connection.scalars(query))

    return retry_while_down(study.database, read)


def retry_trials(study: Study, numbers: Collection[int], *, resume: bool = False) -> None:
    """Set failed trials to WAITING, and forget their failures. Trials in another state are left as they are.

    One transaction: all of the trials, or none. Repeating it after a lost answer changes nothing.

    Args:
        study: the study.
        numbers: the numbers of the trials.
        resume: whether they resume after the last epoch in storage. Otherwise their epochs are deleted, and the number of
            the attempt grows.

    Raises:
        StorageError: the study was deleted, or the database cannot be used (after retries).
    """
    chosen = {
        optuna_internals.trial_id(trial): attempt_of(trial.user_attrs) + (not resume)
        for trial in study.trials()
        if trial.number in numbers
    }
    trials = optuna_tables.trials

    def write() -> None:
        with study.database.transaction() as connection:
            protocol.lock_study(connection, study.database, study.key)
            is_failed = sa.and_(trials.c.trial_id.in_(chosen), trials.c.state == TrialState.FAIL)
            ids = list(connection.scalars(sa.select(trials.c.trial_id).where(is_failed)))
            optuna_tables.wait(connection, ids)
            optuna_tables.delete_attrs(connection, ids, _OF_FAILURE)
            of_trials = tables.trials.c.trial.in_(ids)
            connection.execute(tables.trials.update().where(of_trials).values(run=None, token=None, crashes=0))
            optuna_tables.write_attrs(connection, [(trial_id, {records.RETRIED: True}) for trial_id in ids])
            for trial_id in [] if resume else ids:
                optuna_tables.delete_values(connection, trial_id, after_epoch=0)
                records.delete_epochs(connection, trial_id, after_epoch=0)
                optuna_tables.write_attrs(connection, [(trial_id, {"attempt": chosen[trial_id]})])

    retry_while_down(study.database, write)
