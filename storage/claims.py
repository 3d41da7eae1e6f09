"""The operations that give a trial to a run, as README.md defines them: each function is one transaction.

An operation whose answer was lost can be repeated: it finds its own token, and returns the same trial.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from storage import optuna_tables, ownership, records, tables, usage
from storage.database import Database
from storage.errors import StorageError
from storage.ownership import ClaimedTrial, RunKey
from storage.promotion import PromotingHalving, forget
from storage.records import (
    CONTINUED_FROM,
    DUPLICATE,
    ENQUEUED,
    FIRST_ATTEMPT,
    REJECTED,
    REPLACES,
    Params,
)

# --- trials that exist ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    """The unfinished trials of a study.

    Attributes:
        claim: the trial that was claimed; None if no trial waits.
        partial_ids: ids of WAITING trials that may lack params and have no key: enqueued through Optuna.
        others_are_running: whether other living runs work on trials.
        failed: {number: reason} of trials that were taken from dead runs and not resumed, because they failed too often.
        keys: how many configurations the study has; 0 if a trial was claimed.
        some_wait: whether trials wait at a rung, and may train on once others have trained.
        stopped: {number: epoch} of trials that waited at a rung, and end now.
    """

    claim: ClaimedTrial | None
    partial_ids: list[int] = field(default_factory=list)
    others_are_running: bool = False
    failed: dict[int, str] = field(default_factory=dict)
    keys: int = 0
    some_wait: bool = False
    stopped: dict[int, int] = field(default_factory=dict)


def claim_existing(
    database: Database,
    run: RunKey,
    token: int,
    *,
    own_tokens: Collection[int],
    is_run_dead: Callable[[Any], bool | None],
    max_trials: int | None = None,
    planned: Collection[str] | None = None,
    fewest_epochs_first: bool = False,
    promotion: PromotingHalving | None = None,
    is_last: bool = False,
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
        planned: keys of the points of a grid; None for a search that draws. Another trial of it is claimed only if a user
            wants it: it was enqueued through Optuna, or retried.
        fewest_epochs_first: whether the trial with the fewest epochs is claimed: the members of a population advance
            together. Otherwise one that has epochs.
        promotion: decides which of the trials that wait at a rung train on; None claims those, too, at any time.
        is_last: whether the run creates no trial now. If no run has another trial then, those that still wait end.

    Raises:
        StorageError: the study was deleted.
    """
    with database.transaction() as connection:
        clock = _enter(connection, database, run)
        if claim := _claimed_with(connection, token, clock):
            return Scan(claim)
        rows = _unfinished(connection, run.study_id, promotion)
        freed, failed = _take_over(connection, run, rows, clock, own_tokens, is_run_dead)
        waiting = [row for row in rows if row.trial_id in freed or row.state == TrialState.WAITING]
        ended_or_own = {row.trial_id for row in rows if row.number in failed or row.token in own_tokens}
        others = {row.trial_id for row in rows} - {row.trial_id for row in waiting} - ended_or_own
        partial_ids = [row.trial_id for row in waiting if row.key is None]
        at_rungs = {} if promotion is None else promotion.read_waiting(connection, run.study_id)
        # First those that killed no worker or driver, then those with results.
        resumable = sorted(
            (row for row in waiting if row.key is not None and row.trial_id not in at_rungs),
            key=lambda row: (
                freed.get(row.trial_id, row.crashes),
                # `claimed_epoch` of a successor that was not claimed yet is the epoch after which it starts.
                max(row.epoch, row.claimed_epoch) if fewest_epochs_first else row.epoch == 0,
                row.number,
            ),
        )
        keys = {row.trial_id: row.key for row in resumable} | {each: at_rungs[each].key for each in at_rungs}
        allowed = _allowed(connection, run.study_id, keys, max_trials, planned)
        for row in resumable:
            if row.trial_id in allowed and (row.trial_id in freed or _still_waits(connection, row)):
                _own(connection, run, row.trial_id, token)
                return Scan(_claimed_with(connection, token, clock), partial_ids, bool(others), failed)
        some_wait, stopped = False, {}
        if promotion is not None and (held := at_rungs.keys() & allowed):
            idle = {row.trial_id for row in waiting} | {row.trial_id for row in rows if row.number in failed}
            running = {row.number for row in rows if row.trial_id not in idle}
            promoted = promotion.find_promoted(
                connection, run.study_id, barred=at_rungs.keys() - held, running=running if is_last else None
            )
            for trial_id in promoted:
                if trial_id in held and ownership.owners(connection, [trial_id])[trial_id].state == TrialState.WAITING:
                    _own(connection, run, trial_id, token)
                    forget(connection, [trial_id])
                    return Scan(_claimed_with(connection, token, clock), partial_ids, bool(others), failed)
            some_wait = not is_last or bool(running)
            stopped = {} if some_wait else promotion.end_waiting(connection, run, sorted(held))
        count = records.count_keys(connection, run.study_id)
        return Scan(None, partial_ids, bool(others), failed, count, some_wait=some_wait, stopped=stopped)


def _allowed(
    connection: sa.Connection,
    study_id: int,
    keys: Mapping[int, str],
    max_trials: int | None,
    planned: Collection[str] | None,
) -> set[int]:
    """Return which of the trials that wait may be claimed, see `claim_existing`.

    Args:
        connection: in the caller's transaction, which has locked the study.
        study_id: the study.
        keys: {trial_id: key} of all that wait.
        max_trials: the budget of the study; None for no limit.
        planned: keys of the points of a grid; None for a search that draws.
    """
    allowed = set(keys)
    if keys and max_trials is not None and records.count_budgeted(connection, study_id) - len(keys) >= max_trials:
        allowed = records.read_retried(connection, study_id)
    if planned is not None and any(key not in planned for key in keys.values()):
        wanted = records.read_wanted(connection, study_id)
        allowed = {each for each in allowed if each in keys and (keys[each] in planned or each in wanted)}
    return allowed


def _enter(connection: sa.Connection, database: Database, run: RunKey) -> Any:
    """Lock the study and renew the run's lease; return a row with `now` and `takeover_after`."""
    ownership.lock_study(connection, database, run.study)
    clock = ownership.renew_lease(connection, database, run)
    if clock is None:
        raise StorageError(
            f"{database.url}: the database does not know this run of {run.study.name!r} any more: it was restored from an "
            "older copy. The same command continues from there"
        )
    return clock


def _unfinished(connection: sa.Connection, study_id: int, promotion: PromotingHalving | None) -> list[Any]:
    """Return the RUNNING and WAITING trials of a study, each with its row in hpo_trials and its owner's in hpo_runs.

    Those that wait at a rung are left out.
    """
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
            ownership.last_epoch(),
        )
        .join(ours, ours.c.trial == trial.c.trial_id, isouter=True)
        .join(owner, owner.c.run == ours.c.run, isouter=True)
        .where(trial.c.study_id == study_id, trial.c.state.in_(optuna_tables.UNFINISHED))
        .order_by(trial.c.number)
    )
    if promotion is not None:
        query = query.where(~promotion.waits(study_id))
    return list(connection.execute(query))


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
    locked = ownership.owners(connection, left) if left else {}
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
        elif optuna_tables.wait(connection, [trial_id], running=True):
            freed[trial_id] = crashes
        else:  # one that has no row of ours was ended by its program meanwhile
            continue
        is_trial = tables.trials.c.trial == trial_id
        # A token tells this failure from a later one, see `retry`.
        owner = {"token": ownership.new_token()} if row.number in failed else {"token": None, "run": None}
        connection.execute(tables.trials.update().where(is_trial).values(crashes=crashes, **owner))
    return freed, failed


def _still_waits(connection: sa.Connection, row: Any) -> bool:
    """Return whether a trial waits as it did when the scan read it: Optuna's users may end it. It is locked from now on."""
    now = ownership.owners(connection, [row.trial_id]).get(row.trial_id)
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


def _claimed_with(connection: sa.Connection, token: int, clock: Any) -> ClaimedTrial | None:
    row = connection.execute(_find_claim(), {"asked": token}).one_or_none()
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
        attrs.get(REPLACES),
        _milliseconds(clock),
    )


@cache
def _find_claim() -> sa.Select[Any]:
    trial, ours = optuna_tables.trials, tables.trials
    query = sa.select(trial.c.trial_id, trial.c.number, ours.c.crashes).join(ours, ours.c.trial == trial.c.trial_id)
    return query.where(ours.c.token == sa.bindparam("asked"))


def _milliseconds(clock: Any) -> int:
    """Return the database's time, from the answer of `_enter`."""
    return int(clock.now * 1000)


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
    database: Database,
    run: RunKey,
    token: int,
    configuration: Configuration,
    max_trials: int | None,
    *,
    instead: Iterable[Configuration] = (),
) -> ClaimedTrial | Refusal:
    """Create a RUNNING trial that the run owns.

    Args:
        database: the database.
        run: the run that claims.
        token: of the claim, see `new_token`.
        configuration: of the trial.
        max_trials: the budget of the study; None for no limit.
        instead: new configurations. If the study has `configuration`, the first of these that it lacks becomes the trial:
            while this run waited for the lock, others may have created any number of trials.

    Raises:
        StorageError: the study was deleted.
    """
    with database.transaction() as connection:
        clock = _enter(connection, database, run)
        if claim := _claimed_with(connection, token, clock):
            return claim
        trial_id = configuration.trial_id
        if trial_id is not None and not _is_partial(connection, trial_id):
            return Refusal.TAKEN
        if max_trials is not None and records.count_budgeted(connection, run.study_id) >= max_trials:
            return Refusal.SPENT
        if records.has_key(connection, run.study_id, configuration.key):
            if trial_id is not None:
                _refuse(connection, trial_id, {"fail_reason": DUPLICATE})
            others = list(instead)
            known = records.known_keys(connection, run.study_id, [each.key for each in others])
            free = next((each for each in others if each.key not in known), None)
            if free is None:
                return Refusal.DUPLICATE
            configuration = free
        if trial_id is None:
            number = optuna_tables.next_number(connection, run.study_id)
            trial_id = optuna_tables.insert_trial(connection, run.study_id, number, TrialState.RUNNING)
        else:
            number = optuna_tables.number_of(connection, trial_id)
            optuna_tables.start(connection, trial_id)
        optuna_tables.write_params(connection, trial_id, configuration.params, configuration.distributions)
        optuna_tables.write_system_attrs(connection, [(trial_id, configuration.system_attrs)])
        mark = {} if configuration.trial_id is None else {ENQUEUED: True}
        optuna_tables.write_attrs(connection, [(trial_id, {**configuration.attrs, **mark})])
        row = {"trial": trial_id, "study": run.study_id, "key": configuration.key, "run": run.run_id, "token": token}
        connection.execute(tables.trials.insert(), row)
        _open_account(connection, run, trial_id, token)
        parent = configuration.attrs.get(CONTINUED_FROM)
        claimed = _milliseconds(clock)
        return ClaimedTrial(
            trial_id, number, configuration.params, {}, 0, FIRST_ATTEMPT, token, parent, claimed_milliseconds=claimed
        )


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
    # Locked: a program that uses Optuna may take it at the same time, with other values.
    return connection.scalar(query.with_for_update()) is not None


def _refuse(connection: sa.Connection, trial_id: int, attrs: Mapping[str, Any]) -> None:
    optuna_tables.write_attrs(connection, [(trial_id, attrs)])
    optuna_tables.end(connection, trial_id, TrialState.FAIL, None)
