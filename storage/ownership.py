"""Who owns a trial: runs, their leases, the tokens of claims, and the locks that all operations on trials take.

A run owns a trial while `hpo_trials.token` is the token that it claimed the trial with. Each write names the token, and
the database compares it in the transaction of the write: a run that lost a trial changes nothing of it.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from storage import optuna_tables, tables, usage
from storage.database import Database
from storage.errors import StorageError
from storage.optuna_tables import StudyKey
from storage.records import Params
from storage.usage import Device


class StudyDeletedError(StorageError):
    """Another program has deleted or renamed the study."""


class LostTrialError(Exception):
    """Another run now owns the trial, or another program ended it. This run must not write to it any more."""


@dataclass(frozen=True)
class RunKey:
    """Which run does something.

    Attributes:
        study: its study.
        run_id: its key in hpo_runs.
        started: when it started, by the database's clock: it tells the run from another one that got its key.
        lease_seconds: how long the run counts as alive after its last renewal.
        max_failures: how often a trial is resumed after its driver died without finishing an epoch of it.
        device: what a trial that it claims now holds while a worker runs it.
    """

    study: StudyKey
    run_id: int
    started: float
    lease_seconds: float
    max_failures: int
    device: Device

    @property
    def study_id(self) -> int:
        """The primary key of the study."""
        return self.study.study_id


@dataclass(frozen=True)
class ClaimedTrial:
    """A trial that a run owns.

    Attributes:
        trial_id: its primary key, unique in the database.
        number: its number in the study.
        params: its configuration.
        values: {epoch: value} of the objective, as in storage. `Run` adds to it what it reports.
        crashes: how many workers and drivers have died while they trained it.
        attempt: which attempt of its configuration it is, see `records.attempt_of`.
        token: of this claim.
        continued_from: its user attribute with this name, not checked: any program may change it; None without one.
        replaces: the same.
        claimed_milliseconds: when it was claimed, by the database's clock: of two claims of a trial, the later one holds. A
            claim that is repeated, because its answer was lost, gets a later time, and is equal.
    """

    trial_id: int
    number: int
    params: Params
    values: dict[int, float]
    crashes: int
    attempt: str
    token: int
    continued_from: Any = None
    replaces: Any = None
    claimed_milliseconds: int = field(default=0, compare=False)

    @property
    def epoch(self) -> int:
        """The last epoch in storage; 0 for a new trial."""
        return max(self.values, default=0)

    @property
    def account(self) -> usage.Account:
        """The key of its device time."""
        return self.trial_id, self.token


def new_token() -> int:
    """Return a token for a claim. Random: a database that was restored from a copy would give a counter's values again."""
    return secrets.randbits(62)


def lock_study(connection: sa.Connection, database: Database, study: StudyKey) -> None:
    """Lock a study, see `optuna_tables.lock_study`.

    Raises:
        StudyDeletedError: it was deleted or renamed. Another one may have its id.
    """
    if optuna_tables.lock_study(connection, study):
        return
    names = optuna_tables.read_study_attr(connection, "hpo:id") if study.identity is not None else {}
    for name, identity in names.items():
        if identity == study.identity:
            raise StudyDeletedError(
                f"{database.url}: the study {study.name!r} was renamed to {name!r} while this search worked on it. To "
                "resume it, give the search space this name, too: the same command would start a new study"
            )
    raise study_deleted(database, study.name)


def study_deleted(database: Database, name: str) -> StudyDeletedError:
    """Return the error of an operation on a study that another program has deleted."""
    return StudyDeletedError(
        f"{database.url}: the study {name!r} was deleted while this search worked on it; the same command creates it again"
    )


def is_row_of(run: RunKey) -> sa.ColumnElement[bool]:
    """Return the condition for a run's row in hpo_runs.

    A database that was restored from a copy gives a run's id out again: another run has the row then.
    """
    table = tables.runs
    return sa.and_(table.c.run == run.run_id, table.c.started == run.started, table.c.study == run.study_id)


def renew_lease(connection: sa.Connection, database: Database, run: RunKey) -> Any:
    """Extend a run's lease; return a row with `now` and `takeover_after`; None if the run is not in the database.

    A lease that had expired means that the run, or the database, was away; one that ends too late, that the database's
    clock was set back. The leases of other living runs may be as wrong, so this run takes over nothing for one lease
    period. This happens in the statement that renews the lease: no transaction of the run can see a valid lease without it.
    """
    table, now = tables.runs, database.now_seconds()
    later = now + run.lease_seconds
    was_away = sa.or_(table.c.lease_until < now, table.c.lease_until > later)
    takeover_after = sa.case((was_away, later), else_=table.c.takeover_after)
    update = (
        table.update().where(is_row_of(run)).values(last_heard=now, lease_until=later, takeover_after=takeover_after)
    )
    return connection.execute(update.returning(table.c.takeover_after, now.label("now"))).one_or_none()


@dataclass(frozen=True)
class Owner:
    """Who owns a trial, and what is stored of it.

    Attributes:
        token: of the claim.
        state: of the trial.
        epoch: the last epoch in storage; 0 for none.
        last_value: its value; None if it is not finite.
    """

    token: int | None
    state: TrialState
    epoch: int
    last_value: float | None


def owners(connection: sa.Connection, trial_ids: Collection[int]) -> dict[int, Owner]:
    """Return {trial_id: its owner}. No other transaction changes them until this one ends."""
    lock, read = _owners()
    locked = {row.trial: row for row in connection.execute(lock, {"asked": list(trial_ids)})}
    # In a second statement: on PostgreSQL, a statement that waits for a lock sees the epochs as they were before it waited.
    epochs = {row.trial_id: row for row in connection.execute(read, {"asked": list(locked)})} if locked else {}
    return {
        each: Owner(row.token, row.state, epochs[each].epoch, epochs[each].last_value) for each, row in locked.items()
    }


@cache
def _owners() -> tuple[sa.Select[Any], sa.Select[Any]]:
    """Return the statements that lock trials and read their last epochs, built once: every epoch executes them."""
    trial, ours = optuna_tables.trials, tables.trials
    is_asked = trial.c.trial_id.in_(sa.bindparam("asked", expanding=True))
    lock = (
        sa.select(ours.c.trial, ours.c.token, trial.c.state)
        .select_from(trial)  # first: who deletes a trial in Optuna locks its row before the trigger locks ours
        .join(ours, ours.c.trial == trial.c.trial_id)
        .where(is_asked)
        .order_by(trial.c.trial_id)
        .with_for_update()
    )
    return lock, sa.select(trial.c.trial_id, last_epoch(), _last_value()).where(is_asked)


def last_epoch() -> sa.Label[int]:
    """Return a column of a query on Optuna's trials: the last stored epoch, 0 if there is none."""
    values, trial = optuna_tables.intermediate_values, optuna_tables.trials
    last = sa.select(sa.func.coalesce(sa.func.max(values.c.step), 0)).where(values.c.trial_id == trial.c.trial_id)
    return last.scalar_subquery().label("epoch")


def _last_value() -> sa.Label[float]:
    values, trial = optuna_tables.intermediate_values, optuna_tables.trials
    last = sa.select(values.c.intermediate_value).where(values.c.trial_id == trial.c.trial_id)
    return last.order_by(values.c.step.desc()).limit(1).scalar_subquery().label("last_value")
