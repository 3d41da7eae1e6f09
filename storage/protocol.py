"""The operations on trials, as README.md defines them: each function is one transaction.

A run owns a trial while `hpo_trials.token` is the token that it claimed the trial with. Each write names the token, and
the database compares it in the transaction of the write: a run that lost a trial changes nothing of it. An operation whose
answer was lost can be repeated: it finds its own token, or the state that it set, and returns the same answer.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from storage import optuna_tables, records, tables, usage
from storage.database import Database
from storage.errors import StorageError
from storage.optuna_tables import StudyKey
from storage.pruners import Pruner
from storage.records import CONTINUED_FROM, DUPLICATE, FIRST_ATTEMPT, REJECTED, Params
from storage.usage import Device


class StudyDeletedError(StorageError):
    """Another program has deleted the study."""


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
        device: what each of its trials holds.
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
        continued_from: its user attribute with this name, whatever a program has made of it; None without one.
    """

    trial_id: int
    number: int
    params: Params
    values: dict[int, float]
    crashes: int
    attempt: str
    token: int
    continued_from: Any = None

    @property
    def epoch(self) -> int:
        """The last epoch in storage; 0 for a new trial."""
        return max(self.values, default=0)

    @property
    def account(self) -> usage.Account:
        """The key of its device time."""
        return self.trial_id, self.token


@dataclass(frozen=True)
class TrialUpdate:
    """An update of a trial: any of a finished epoch, attributes, provenance and a final state.

    Attributes:
        claim: the trial.
        epoch: the finished epoch, from 1; 0 for none.
        metrics: {name: value} of the epoch.
        value: the objective's value, of the epoch or of the completed trial.
        follows: {epoch: value} of the last epoch before this update, which storage must hold; empty for none.
        is_restart: whether the stored epochs from this one on are of an abandoned attempt. They are deleted, with what a
            pruner noted of them.
        decides: whether the pruner decides if the trial ends after this epoch.
        attrs: user attributes of the trial.
        provenance: replaces the trial's provenance; None keeps it.
        final_state: of a trial that ends; None for an unfinished one.
    """

    claim: ClaimedTrial
    epoch: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    value: float | None = None
    follows: Mapping[int, float] = field(default_factory=dict)
    is_restart: bool = False
    decides: bool = False
    attrs: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] | None = None
    final_state: TrialState | None = None


def new_token() -> int:
    """Return a token for a claim. Random: a database that was restored from a copy would give a counter's values again."""
    return secrets.randbits(62)


# --- claim ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    """The unfinished trials of a study.

    Attributes:
        claim: the trial that was claimed; None if no trial waits.
        partial_ids: ids of WAITING trials that may lack params and have no key: enqueued through Optuna.
        others_are_running: whether other living runs work on trials.
        failed: {number: reason} of trials that were taken from dead runs and not resumed, because they failed too often.
        keys: how many configurations the study has; 0 if a trial was claimed.
    """

    claim: ClaimedTrial | None
    partial_ids: list[int] = field(default_factory=list)
    others_are_running: bool = False
    failed: dict[int, str] = field(default_factory=dict)
    keys: int = 0


def claim_existing(
    database: Database,
    run: RunKey,
    token: int,
    *,
    own_tokens: Collection[int],
    is_run_dead: Callable[[Any], bool | None],
    max_trials: int | None = None,
) -> Scan:
    """Take over the trials of dead runs, and claim the WAITING trial that is nearest to a result.

    Args:
        database: the database.
        run: the run that claims.
        token: of the claim, see `new_token`.
        own_tokens: of the claims that this run works on. A trial of the run with another token was claimed by a call that
            failed, or a restored copy of the database shows it as it was before it ended.
        is_run_dead: returns whether the run of a row of hpo_runs is dead; None if its lease decides.
        max_trials: the budget of the study; None for no limit. It may be smaller than when the trials were created: then
            those that have ended or are RUNNING count first. What `hpo retry` lets run again is claimed in any case.

    Raises:
        StorageError: the study was deleted.
    """
    with database.transaction() as connection:
        clock = _enter(connection, database, run)
        if claim := _claimed_with(connection, token):
            return Scan(claim)
        rows = _unfinished(connection, run.study_id)
        freed, failed = _take_over(connection, run, rows, clock, own_tokens, is_run_dead)
        waiting = [row for row in rows if row.trial_id in freed or row.state == TrialState.WAITING]
        ended_or_own = {row.trial_id for row in rows if row.number in failed or row.token in own_tokens}
        others = {row.trial_id for row in rows} - {row.trial_id for row in waiting} - ended_or_own
        partial_ids = [row.trial_id for row in waiting if row.key is None]
        # First those that killed no worker or driver, then those with results.
        resumable = sorted(
            (row for row in waiting if row.key is not None),
            key=lambda row: (freed.get(row.trial_id, row.crashes), row.epoch == 0, row.number),
        )
        if resumable and max_trials is not None:
            started = records.count_budgeted(connection, run.study_id) - len(resumable)
            if started >= max_trials:
                retried = records.read_retried(connection, run.study_id)
                resumable = [row for row in resumable if row.trial_id in retried]
        for row in resumable:
            if row.trial_id in freed or _still_waits(connection, row):
                _own(connection, run, row.trial_id, token)
                return Scan(_claimed_with(connection, token), partial_ids, bool(others), failed)
        return Scan(None, partial_ids, bool(others), failed, records.count_keys(connection, run.study_id))


def _enter(connection: sa.Connection, database: Database, run: RunKey) -> Any:
    """Lock the study and renew the run's lease; return a row with `now` and `takeover_after`."""
    lock_study(connection, database, run.study)
    clock = renew_lease(connection, database, run)
    if clock is None:
        raise StorageError(
            f"{database.url}: the database does not know this run of {run.study.name!r} any more: it was restored from an "
            "older copy. The same command goes on from there"
        )
    return clock


def lock_study(connection: sa.Connection, database: Database, study: StudyKey) -> None:
    """Lock a study, see `optuna_tables.lock_study`.

    Raises:
        StudyDeletedError: it was deleted. Another one may have its id.
    """
    if not optuna_tables.lock_study(connection, study):
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


def _unfinished(connection: sa.Connection, study_id: int) -> list[Any]:
    """Return the RUNNING and WAITING trials of a study, each with its row in hpo_trials and its owner's in hpo_runs."""
    trial, ours, owner = optuna_tables.trials, tables.trials, tables.runs
    query = (
        sa.select(
            trial.c.trial_id,
            trial.c.number,
            trial.c.state,
            ours.c.key,
            ours.c.token,
            ours.c.run,
            ours.c.crashes,
            ours.c.claimed_epoch,
            owner.c.run.label("owner"),
            owner.c.started,
            owner.c.host,
            owner.c.pid,
            owner.c.process_started,
            owner.c.last_heard,
            owner.c.lease_until,
            owner.c.ended,
            _last_epoch(),
        )
        .join(ours, ours.c.trial == trial.c.trial_id, isouter=True)
        .join(owner, owner.c.run == ours.c.run, isouter=True)
        .where(trial.c.study_id == study_id, trial.c.state.in_([TrialState.RUNNING, TrialState.WAITING]))
        .order_by(trial.c.number)
    )
    return list(connection.execute(query))


def _last_epoch() -> sa.Label[int]:
    """Return a column of a query on Optuna's trials: the last stored epoch, 0 if there is none."""
    values, trial = optuna_tables.intermediate_values, optuna_tables.trials
    last = sa.select(sa.func.coalesce(sa.func.max(values.c.step), 0)).where(values.c.trial_id == trial.c.trial_id)
    return last.scalar_subquery().label("epoch")


def _last_value() -> sa.Label[float]:
    values, trial = optuna_tables.intermediate_values, optuna_tables.trials
    last = sa.select(values.c.intermediate_value).where(values.c.trial_id == trial.c.trial_id)
    return last.order_by(values.c.step.desc()).limit(1).scalar_subquery().label("last_value")


def _take_over(
    connection: sa.Connection,
    run: RunKey,
    rows: Iterable[Any],
    clock: Any,
    own_tokens: Collection[int],
    is_run_dead: Callable[[Any], bool | None],
) -> tuple[dict[int, int], dict[int, str]]:
    """Set the RUNNING trials of dead runs to WAITING, or to FAIL if they failed too often.

    Returns:
        {trial_id: crashes} of the WAITING ones, {number: reason} of the failed ones.
    """
    freed: dict[int, int] = {}
    failed: dict[int, str] = {}
    left: dict[int, tuple[Any, bool]] = {}  # {trial_id: (row, whether its run died)}
    for row in rows:
        if row.state != TrialState.RUNNING or row.token in own_tokens:
            continue
        has_died = False
        if row.owner is not None and row.owner != run.run_id and row.ended is None:
            dead = is_run_dead(row)
            is_expired = not clock.now <= row.lease_until <= clock.now + run.lease_seconds
            has_died = is_expired and clock.takeover_after <= clock.now if dead is None else dead
            if not has_died:
                continue
        # Or nobody owns it: a program that uses Optuna created it, or this run has it and does not work on it.
        left[row.trial_id] = row, has_died
    # A run that counts as dead may end its trial between that query and this one, which waits for it.
    locked = _owners(connection, left) if left else {}
    for trial_id, (row, has_died) in left.items():
        now = locked.get(trial_id)
        if now is not None and (now.token != row.token or now.state != TrialState.RUNNING):
            continue
        epoch = row.epoch if now is None else now.epoch
        crashes = (row.crashes or 0) + (has_died and epoch <= row.claimed_epoch)
        if has_died and crashes > run.max_failures:
            failed[row.number] = f"the driver died {crashes} times while it trained this trial"
            attrs = {"fail_reason": f"{failed[row.number]} (max_failures {run.max_failures})"}
            optuna_tables.write_attrs(connection, [(trial_id, attrs)])
            optuna_tables.end(connection, trial_id, TrialState.FAIL, None)
        else:
            freed[trial_id] = crashes
            optuna_tables.wait(connection, [trial_id])
        is_trial = tables.trials.c.trial == trial_id
        # A token tells this failure from a later one, see `retry`.
        owner = {"token": new_token()} if row.number in failed else {"token": None, "run": None}
        connection.execute(tables.trials.update().where(is_trial).values(crashes=crashes, **owner))
    return freed, failed


def _still_waits(connection: sa.Connection, row: Any) -> bool:
    """Return whether a trial waits as it did when the scan read it: Optuna's users may end it. It is locked from now on."""
    now = _owners(connection, [row.trial_id]).get(row.trial_id)
    return now is not None and now.state == TrialState.WAITING and now.token == row.token


def _own(connection: sa.Connection, run: RunKey, trial_id: int, token: int) -> None:
    values, is_trial = optuna_tables.intermediate_values, tables.trials.c.trial == trial_id
    last = sa.select(sa.func.coalesce(sa.func.max(values.c.step), 0)).where(values.c.trial_id == trial_id)
    owner = {"run": run.run_id, "token": token, "claimed_epoch": last.scalar_subquery()}
    connection.execute(tables.trials.update().where(is_trial).values(owner))
    optuna_tables.start(connection, trial_id)
    _open_account(connection, run, trial_id, token)


def _open_account(connection: sa.Connection, run: RunKey, trial_id: int, token: int) -> None:
    usage.insert(connection, (trial_id, token), study_id=run.study_id, run_id=run.run_id, device=run.device)


def _claimed_with(connection: sa.Connection, token: int) -> ClaimedTrial | None:
    trial, ours = optuna_tables.trials, tables.trials
    query = (
        sa.select(trial.c.trial_id, trial.c.number, ours.c.crashes)
        .join(ours, ours.c.trial == trial.c.trial_id)
        .where(ours.c.token == token)
    )
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    attrs = optuna_tables.read_attrs(connection, row.trial_id)
    return ClaimedTrial(
        row.trial_id,
        row.number,
        optuna_tables.read_params(connection, row.trial_id),
        optuna_tables.read_values(connection, row.trial_id),
        row.crashes,
        records.attempt_of(attrs),
        token,
        attrs.get(CONTINUED_FROM),
    )


# --- new trials -------------------------------------------------------------------------------------------------------


class Refusal(Enum):
    """Why a configuration was not registered."""

    SPENT = "the study has as many trials as its budget allows"
    DUPLICATE = "the study has a trial with this configuration"
    TAKEN = "the trial does not wait any more"


@dataclass(frozen=True)
class Configuration:
    """A configuration that becomes a trial.

    Attributes:
        key: its identity.
        params: {name: value}.
        distributions: {name: distribution} of these params.
        system_attrs: what the sampler notes about it.
        trial_id: a WAITING trial that becomes it, such as one enqueued through Optuna; None for a new one.
        attrs: user attributes of the trial.
    """

    key: str
    params: Params
    distributions: Mapping[str, BaseDistribution]
    system_attrs: Mapping[str, Any] = field(default_factory=dict)
    trial_id: int | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)


def register(
    database: Database, run: RunKey, token: int, configuration: Configuration, max_trials: int | None
) -> ClaimedTrial | Refusal:
    """Create a RUNNING trial that the run owns.

    Args:
        database: the database.
        run: the run that claims.
        token: of the claim, see `new_token`.
        configuration: of the trial.
        max_trials: the budget of the study; None for no limit.

    Raises:
        StorageError: the study was deleted.
    """
    with database.transaction() as connection:
        _enter(connection, database, run)
        if claim := _claimed_with(connection, token):
            return claim
        trial_id = configuration.trial_id
        if trial_id is not None and not _is_partial(connection, trial_id):
            return Refusal.TAKEN
        if max_trials is not None and records.count_budgeted(connection, run.study_id) >= max_trials:
            return Refusal.SPENT
        if records.has_key(connection, run.study_id, configuration.key):
            if trial_id is not None:
                _refuse(connection, trial_id, {"fail_reason": DUPLICATE})
            return Refusal.DUPLICATE
        if trial_id is None:
            number = optuna_tables.next_number(connection, run.study_id)
            trial_id = optuna_tables.insert_trial(connection, run.study_id, number, TrialState.RUNNING)
        else:
            number = optuna_tables.number_of(connection, trial_id)
            optuna_tables.start(connection, trial_id)
        optuna_tables.write_params(connection, trial_id, configuration.params, configuration.distributions)
        optuna_tables.write_system_attrs(connection, [(trial_id, configuration.system_attrs)])
        optuna_tables.write_attrs(connection, [(trial_id, configuration.attrs)])
        row = {"trial": trial_id, "study": run.study_id, "key": configuration.key, "run": run.run_id, "token": token}
        connection.execute(tables.trials.insert(), row)
        _open_account(connection, run, trial_id, token)
        parent = configuration.attrs.get(CONTINUED_FROM)
        return ClaimedTrial(trial_id, number, configuration.params, {}, 0, FIRST_ATTEMPT, token, parent)


def refuse(database: Database, run: RunKey, trial_id: int, constraint: str) -> None:
    """Set a partial trial to FAIL, because it breaks a constraint. A trial that does not wait any more is left as it is."""
    with database.transaction() as connection:
        _enter(connection, database, run)
        if _is_partial(connection, trial_id):
            _refuse(connection, trial_id, {"fail_reason": REJECTED, "constraint": constraint})


def _is_partial(connection: sa.Connection, trial_id: int) -> bool:
    trial, ours = optuna_tables.trials, tables.trials
    query = sa.select(trial.c.trial_id).where(
        trial.c.trial_id == trial_id,
        trial.c.state == TrialState.WAITING,
        ~sa.exists().where(ours.c.trial == trial.c.trial_id),
    )
    return connection.scalar(query) is not None


def _refuse(connection: sa.Connection, trial_id: int, attrs: Mapping[str, Any]) -> None:
    optuna_tables.write_attrs(connection, [(trial_id, attrs)])
    optuna_tables.end(connection, trial_id, TrialState.FAIL, None)


# --- report, prune, end -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What became of a batch of updates.

    Attributes:
        lost: tokens of claims that do not hold any more. Their updates were dropped.
        pruned: tokens of claims whose trials the pruner ended.
    """

    lost: set[int]
    pruned: set[int]


def write(
    database: Database,
    study: StudyKey,
    updates: Iterable[TrialUpdate],
    *,
    pruner: Pruner | None,
    ending: Collection[tuple[int, TrialState]],
    device_seconds: Mapping[usage.Account, float],
) -> Written:
    """Write a batch of updates of trials that one run owns, and its device time.

    Args:
        database: the database.
        study: the study of the trials.
        updates: in the order in which they happened.
        pruner: decides on the updates with `decides`.
        ending: tokens of the claims that this run has tried to end, each with the state. A trial that ended so was ended by
            an earlier attempt, whose answer was lost; one in another state by another program.
        device_seconds: {account: for how long its claim has held the device}, of any claims of the run. No token fences
            them: the time was used, even if the trial was lost.
    """
    lost: set[int] = set()
    pruned: set[int] = set()
    batches: dict[int, list[TrialUpdate]] = {}
    with database.transaction() as connection:
        updates = list(updates)
        if any(update.decides for update in updates):
            optuna_tables.lock_study(connection, study)  # decisions happen one after another
        rows = _owners(connection, {update.claim.trial_id for update in updates})
        for update in updates:
            row, token = rows.get(update.claim.trial_id), update.claim.token
            if row is not None and row.token == token and row.state == TrialState.RUNNING:
                batches.setdefault(token, []).append(update)
            elif row is None or row.token != token or (token, row.state) not in ending:
                lost.add(token)
            elif row.state == TrialState.PRUNED:
                pruned.add(token)
        for token, batch in list(batches.items()):
            row = rows[batch[0].claim.trial_id]
            if not _is_continued(batch, row.epoch, row.last_value):
                # The database was restored from an older copy. Resumed, the trial reports the missing epochs again.
                _give_back(connection, batch[0].claim.trial_id)
                lost.add(token)
                del batches[token]
        kept = [update for batch in batches.values() for update in _drop_abandoned(connection, batch)]
        epochs = [update for update in kept if update.epoch and update.value is not None]
        records.write_metrics(connection, [(each.claim.trial_id, each.epoch, each.metrics) for each in epochs])
        optuna_tables.write_values(
            connection, [(each.claim.trial_id, each.epoch, each.value or 0.0) for each in epochs]
        )
        optuna_tables.write_attrs(connection, [(update.claim.trial_id, update.attrs) for update in kept])
        for update in kept:
            claim = update.claim
            if update.provenance is not None:
                is_trial = tables.trials.c.trial == claim.trial_id
                connection.execute(tables.trials.update().where(is_trial).values(provenance=dict(update.provenance)))
            if update.decides and pruner is not None and claim.token not in pruned:
                value = update.value or 0.0
                if pruner.decide(connection, study.study_id, claim.trial_id, claim.number, update.epoch, value):
                    optuna_tables.end(connection, claim.trial_id, TrialState.PRUNED, update.value)
                    pruned.add(claim.token)
            if update.final_state is not None and claim.token not in pruned:
                optuna_tables.end(connection, claim.trial_id, update.final_state, update.value)
                if update.final_state == TrialState.COMPLETE and pruner is not None:
                    pruner.complete(connection, study.study_id, claim.trial_id)
        usage.store(connection, device_seconds)
    return Written(lost, pruned)


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


def _owners(connection: sa.Connection, trial_ids: Collection[int]) -> dict[int, Owner]:
    """Return {trial_id: its owner}. No other transaction changes them until this one ends."""
    trial, ours = optuna_tables.trials, tables.trials
    query = (
        sa.select(ours.c.trial, ours.c.token, trial.c.state)
        .select_from(trial)  # first: who deletes a trial in Optuna locks its row before the trigger locks ours
        .join(ours, ours.c.trial == trial.c.trial_id)
        .where(trial.c.trial_id.in_(trial_ids))
        .order_by(trial.c.trial_id)
        .with_for_update()
    )
    locked = {row.trial: row for row in connection.execute(query)}
    # In a second statement: on PostgreSQL, a statement that waits for a lock sees the epochs as they were before it waited.
    stored = sa.select(trial.c.trial_id, _last_epoch(), _last_value()).where(trial.c.trial_id.in_(list(locked)))
    epochs = {row.trial_id: row for row in connection.execute(stored)} if locked else {}
    return {
        each: Owner(row.token, row.state, epochs[each].epoch, epochs[each].last_value) for each, row in locked.items()
    }


def _is_continued(batch: list[TrialUpdate], stored_epoch: int, stored_value: float | None) -> bool:
    """Return whether storage holds the epochs that come before the updates of one trial.

    Args:
        batch: updates of the trial.
        stored_epoch: the last epoch in storage; 0 for none.
        stored_value: its value; None if it is not finite.
    """
    for update in batch:
        for epoch, value in update.follows.items():
            if epoch > stored_epoch or (epoch == stored_epoch and math.isfinite(value) and value != stored_value):
                return False
        if update.epoch >= stored_epoch:
            stored_epoch, stored_value = update.epoch, update.value
    return True


def _drop_abandoned(connection: sa.Connection, batch: list[TrialUpdate]) -> list[TrialUpdate]:
    """Delete the epochs of an abandoned attempt, and return the updates of one trial without theirs.

    Args:
        connection: in the caller's transaction.
        batch: updates of one trial. Each epoch may occur several times.
    """
    kept: dict[int, TrialUpdate] = {}  # {epoch, or a negative number for an update without one: update}
    for number, update in enumerate(batch, start=1):
        if update.is_restart:
            trial_id = update.claim.trial_id
            optuna_tables.delete_values(connection, trial_id, from_epoch=update.epoch)
            records.delete_epochs(connection, trial_id, from_epoch=update.epoch)
            kept = {epoch: each for epoch, each in kept.items() if epoch < update.epoch}
        kept.pop(update.epoch, None)
        kept[update.epoch or -number] = update
    return list(kept.values())


# --- give back --------------------------------------------------------------------------------------------------------


def release(database: Database, claim: ClaimedTrial) -> None:
    """Set an unfinished trial to WAITING. A trial that the claim does not own any more is left as it is."""
    with database.transaction() as connection:
        row = _owners(connection, [claim.trial_id]).get(claim.trial_id)
        if row is not None and row.token == claim.token and row.state == TrialState.RUNNING:
            _give_back(connection, claim.trial_id)


def _give_back(connection: sa.Connection, trial_id: int) -> None:
    is_trial = tables.trials.c.trial == trial_id
    connection.execute(tables.trials.update().where(is_trial).values(run=None, token=None))
    optuna_tables.wait(connection, [trial_id])


def count_crashes(database: Database, claim: ClaimedTrial, crashes: int) -> None:
    """Store how many workers and drivers have died while they trained a trial. The number never falls."""
    table = tables.trials
    is_lower = sa.and_(table.c.trial == claim.trial_id, table.c.token == claim.token, table.c.crashes < crashes)
    with database.transaction() as connection:
        connection.execute(table.update().where(is_lower).values(crashes=crashes))
