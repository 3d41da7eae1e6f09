"""Failed trials are tried again: they wait like interrupted ones, and any run may claim them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa
from optuna.trial import TrialState

from storage import optuna_tables, ownership, promotion, records, tables
from storage.errors import retry_while_down
from storage.study import Study

_OF_FAILURE = ("fail_reason", "traceback")  # user attributes of a failed trial
IDS_AT_ONCE = 10_000  # in one statement: PostgreSQL takes 65,535 parameters


def failed_trials(study: Study) -> list[int]:
    """Return the numbers of the trials that failed while they were trained, in ascending order.

    Raises:
        StorageError: the database cannot be used (after retries).
    """
    return [failure.number for failure in _find_failures(study)]


def retry_trials(study: Study, numbers: Collection[int], *, resume: bool = False) -> list[int]:
    """Set failed trials to WAITING, and forget their failures. Trials in another state are left as they are.

    One transaction: all of the trials, or none. A failure is identified by its token and attempt, so repeating it after a
    lost answer changes nothing, even if a run has claimed a trial meanwhile and failed it again.

    Args:
        study: the study.
        numbers: the numbers of the trials.
        resume: whether they resume after the last epoch in storage. Otherwise their epochs are deleted, and
            they get a new attempt.

    Returns:
        The numbers of the trials that wait now, ascending.

    Raises:
        StorageError: the study was deleted, or the database cannot be used (after retries).
    """
    chosen = {failure for failure in _find_failures(study) if failure.number in numbers}
    retried: set[int] = set()  # also by an attempt whose answer was lost

    def write() -> None:
        with study.database.transaction() as connection:
            ownership.lock_study(connection, study.database, study.key)
            failures = _still_failed(connection, study, chosen)
            ids = [failure.trial_id for failure in failures]
            retried.update(failure.number for failure in failures)
            for start in range(0, len(ids), IDS_AT_ONCE):
                some = ids[start : start + IDS_AT_ONCE]
                optuna_tables.wait(connection, some)
                optuna_tables.delete_attrs(connection, some, _OF_FAILURE)
                of_trials = tables.trials.c.trial.in_(some)
                connection.execute(tables.trials.update().where(of_trials).values(run=None, token=None, crashes=0))
                promotion.forget(connection, some)
            optuna_tables.write_attrs(connection, [(trial_id, {records.RETRIED: True}) for trial_id in ids])
            for failure in [] if resume else failures:
                optuna_tables.delete_values(connection, failure.trial_id, from_epoch=1)
                records.delete_epochs(connection, failure.trial_id, from_epoch=1)
                attempt = {records.ATTEMPT: failure.attempts + 1, records.ATTEMPT_TOKEN: f"{ownership.new_token():x}"}
                optuna_tables.write_attrs(connection, [(failure.trial_id, attempt)])

    retry_while_down(study.database, write)
    return sorted(retried)


@dataclass(frozen=True)
class Failure:
    """A trial that failed while it was trained.

    Attributes:
        trial_id: its primary key.
        number: its number in the study.
        token: random, of this failure; None if version 2 of our tables stored it.
        attempts: how often it was started from its first epoch.
        attempt: the last of these, see `records.attempt_of`.
    """

    trial_id: int
    number: int
    token: int | None
    attempts: int
    attempt: str


def _find_failures(study: Study) -> list[Failure]:
    def read() -> list[Failure]:
        with study.database.engine.connect() as connection:
            return _read_failures(connection, study)

    return retry_while_down(study.database, read)


def _read_failures(connection: sa.Connection, study: Study) -> list[Failure]:
    """Return the trials that failed while they were trained, by number."""
    trial, ours = optuna_tables.trials, tables.trials
    # Without a row of ours, no run trained it: a draw that was refused, or a trial of another program.
    query = (
        sa.select(trial.c.trial_id, trial.c.number, ours.c.token, *records.attempt_columns())
        .join(ours, ours.c.trial == trial.c.trial_id)
        .where(trial.c.study_id == study.study_id, trial.c.state == TrialState.FAIL)
        .order_by(trial.c.number)
    )
    failures = []
    for row in connection.execute(query):
        attrs = records.read_attempt(row)
        attempts = int(attrs.get(records.ATTEMPT, 1))
        failures.append(Failure(row.trial_id, row.number, row.token, attempts, records.attempt_of(attrs)))
    return failures


def _still_failed(connection: sa.Connection, study: Study, failures: Collection[Failure]) -> list[Failure]:
    """Return those failures that were not retried meanwhile. The study is locked, so none is until the transaction ends."""
    return [failure for failure in _read_failures(connection, study) if failure in failures]
