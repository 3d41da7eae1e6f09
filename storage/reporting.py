"""The operations on a trial that a run owns, as README.md defines them: each function is one transaction.

The token fences them, see `ownership`. One whose answer was lost can be repeated: it finds the state that it set.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from storage import optuna_tables, ownership, records, tables, usage
from storage.database import Database
from storage.optuna_tables import StudyKey
from storage.ownership import ClaimedTrial
from storage.pruners import Decision, Pruner, Question

# --- report, prune, end -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialUpdate:
    """An update of a trial: any of a finished epoch, attributes, provenance and a final state.

    Attributes:
        claim: the trial.
        epoch: the finished epoch, from 1; 0 for none.
        metrics: {name: value} of the epoch.
        value: the objective's value, of the epoch or of the completed trial; of several objectives, the first one's.
        other_values: of a completed trial, the values of the other objectives.
        follows: {epoch: value} of the last epoch before this update, which storage must hold; empty for none.
        is_restart: whether the stored epochs from this one on are of an abandoned attempt. They are deleted, with what a
            pruner noted of them.
        decides: whether the pruner decides if the trial ends after this epoch.
        first_epoch: the first epoch that it judges, see `Question`.
        attrs: user attributes of the trial.
        provenance: replaces the trial's provenance; None keeps it.
        final_state: of a trial that ends; None for an unfinished one.
    """

    claim: ClaimedTrial
    epoch: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    value: float | None = None
    other_values: tuple[float, ...] = ()
    follows: Mapping[int, float] = field(default_factory=dict)
    is_restart: bool = False
    decides: bool = False
    first_epoch: int = 1
    attrs: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] | None = None
    final_state: TrialState | None = None


@dataclass(frozen=True)
class Written:
    """What became of a batch of updates.

    Attributes:
        lost: tokens of claims that do not hold any more. Their updates were dropped.
        pruned: tokens of claims whose trials the pruner ended.
        waiting: tokens of claims whose trials wait from now on, see `pruners.Decision`.
    """

    lost: set[int]
    pruned: set[int]
    waiting: set[int] = field(default_factory=set)


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
    waiting: set[int] = set()
    batches: dict[int, list[TrialUpdate]] = {}
    with database.transaction() as connection:
        updates = list(updates)
        if any(update.decides for update in updates):
            optuna_tables.lock_study(connection, study)  # decisions happen one after another
        rows = ownership.owners(connection, {update.claim.trial_id for update in updates})
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
        kept_ids = {id(update) for batch in batches.values() for update in _drop_abandoned(connection, batch)}
        kept = [update for update in updates if id(update) in kept_ids]  # the trial that ended last is stored last
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
                question = Question(
                    study.study_id,
                    claim.trial_id,
                    claim.number,
                    update.epoch,
                    update.value or 0.0,
                    update.first_epoch,
                )
                match pruner.decide(connection, question):
                    case Decision.END:
                        optuna_tables.end(connection, claim.trial_id, TrialState.PRUNED, update.value)
                        pruned.add(claim.token)
                    case Decision.WAIT:
                        waiting.add(claim.token)
            if update.final_state is not None and claim.token not in pruned:
                optuna_tables.end(connection, claim.trial_id, update.final_state, update.value, update.other_values)
                if update.final_state == TrialState.COMPLETE and pruner is not None:
                    pruner.complete(connection, study.study_id, claim.trial_id)
        usage.store(connection, device_seconds)
    return Written(lost, pruned, waiting)


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
        row = ownership.owners(connection, [claim.trial_id]).get(claim.trial_id)
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
