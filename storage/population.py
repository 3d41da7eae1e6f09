"""Population-based training: a member that does badly is replaced by a trial that continues a better one.

Ray Tune's scheduler of this name keeps its population in the driver. This one decides in the transaction that stores an
epoch, as pruners do, and creates the new trial in the same transaction: a kill leaves all of it, or nothing.

The trials of a population form lines, one for each member: a trial, the one that replaced it, and so on. A line gets at
most one successor after each interval, and the budget counts lines (`records.count_budgeted`).

Source: Jaderberg et al., Population Based Training of Neural Networks, 2017, with truncation selection.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from storage import optuna_tables, ownership, records, tables
from storage.pruners import Decision, Question
from storage.records import REPLACED_BY, REPLACED_POOL, REPLACES, Params

POOL = "pbt"  # of `hpo_rungs`: how the members did after each interval


@dataclass(frozen=True)
class Member:
    """A trial from whose checkpoint another one starts.

    Attributes:
        number: its number in the study.
        params: its hyperparameters.
        key: see `hpo_trials.key`.
        attempt: see `records.attempt_of`.
    """

    number: int
    params: Params
    key: str
    attempt: str


@dataclass(frozen=True)
class Child:
    """A trial that replaces a member.

    Attributes:
        key: its identity: no other trial of the study has it.
        params: {name: value}.
        distributions: {name: distribution} of these params.
        attrs: user attributes, such as `records.CONTINUED_FROM`.
    """

    key: str
    params: Params
    distributions: Mapping[str, BaseDistribution]
    attrs: Mapping[str, Any]


# (attribute `replaces` of the successor, from whose checkpoint it starts, after which epoch, randomness) -> successor
Breed = Callable[[Mapping[str, Any], Member, int, random.Random], Child]


@dataclass(frozen=True)
class PopulationBased:
    """Replaces the worst members by copies of the best ones. A `storage.pruners.Pruner`.

    Values of the same epoch are compared: those of all lines that have reached it so far. If a trial is among the worst, it
    ends, and its successor starts from the checkpoint of one of the best that still trains. If there is none, it continues.

    Args:
        maximize: whether larger values are better.
        interval: epochs between two comparisons.
        quantile: the share that counts as the worst, and the share that counts as the best; in (0, 0.5].
        seed: of the choice of the better one, and of what `breed` draws. They depend on nothing else but the number of the
            trial, the epoch, and who is among the best.
        breed: returns the successor. It must not use the database.
    """

    maximize: bool
    interval: int
    quantile: float
    seed: int
    breed: Breed

    def decide(self, connection: sa.Connection, question: Question) -> Decision:
        """See `Pruner.decide`. A trial that ends has a successor, which is WAITING."""
        study_id, trial_id = question.study_id, question.trial_id
        number, epoch, value = question.number, question.epoch, question.value
        if epoch % self.interval or epoch < question.first_epoch or epoch <= _born(connection, trial_id):
            return Decision.CONTINUE
        rungs = tables.rungs
        rung = {"trial": trial_id, "epoch": epoch, "pool": POOL, "study": study_id, "value": value}
        optuna_tables.upsert(connection, rungs, ("trial", "epoch", "pool"), [rung])
        at_epoch = sa.and_(rungs.c.study == study_id, rungs.c.pool == POOL, rungs.c.epoch == epoch)
        rows = connection.execute(sa.select(rungs.c.trial, rungs.c.value).where(at_epoch)).all()
        best_first = sorted(rows, key=lambda row: (-row.value if self.maximize else row.value, row.trial))
        count = min(math.ceil(len(rows) * self.quantile), len(rows) // 2)
        if trial_id not in [row.trial for row in best_first[len(rows) - count :]]:
            return Decision.CONTINUE
        better = [row.trial for row in best_first[:count] if row.value != value]
        # A trial that has ended may lose its checkpoint any time. Locked, so that it does not end before the successor is
        # there, which protects the checkpoint.
        owners = ownership.owners(connection, better) if better else {}
        training = [each for each in better if each in owners and owners[each].state in optuna_tables.UNFINISHED]
        if not training:
            return Decision.CONTINUE
        rng = random.Random(f"{self.seed}/{number}/{epoch}")
        parent = _member(connection, rng.choice(training))
        replaces = {"trial": number, "epoch": epoch}
        child = self.breed(replaces, parent, epoch, rng)
        child_number = optuna_tables.next_number(connection, study_id)
        child_id = optuna_tables.insert_trial(connection, study_id, child_number, TrialState.WAITING)
        optuna_tables.write_params(connection, child_id, child.params, child.distributions)
        replaced_by = {"trial": child_number, "epoch": epoch}
        attrs = [(child_id, {**child.attrs, REPLACES: replaces}), (trial_id, {REPLACED_BY: replaced_by})]
        optuna_tables.write_attrs(connection, attrs)
        row = {"trial": child_id, "study": study_id, "key": child.key, "claimed_epoch": epoch}
        connection.execute(tables.trials.insert(), row)
        connection.execute(rungs.insert(), {**rung, "pool": REPLACED_POOL})
        return Decision.END

    def complete(self, connection: sa.Connection, study_id: int, trial_id: int) -> None:
        """Do nothing: after the last epoch, no member is replaced."""

    def prepare(self, connection: sa.Connection, study_id: int) -> None:
        """Do nothing: members are compared from now on."""


def _born(connection: sa.Connection, trial_id: int) -> int:
    """Return the epoch after which a trial replaced another one; 0 for a first member.

    Its line was decided there. It may train that epoch once more: from an older checkpoint, if that of the epoch is gone.
    """
    replaces = optuna_tables.read_attrs(connection, trial_id).get(REPLACES)
    epoch = replaces.get("epoch") if isinstance(replaces, dict) else None
    return epoch if isinstance(epoch, int) else 0  # any program may change it


def _member(connection: sa.Connection, trial_id: int) -> Member:
    key = connection.execute(sa.select(tables.trials.c.key).where(tables.trials.c.trial == trial_id)).scalar_one()
    return Member(
        optuna_tables.number_of(connection, trial_id),
        optuna_tables.read_params(connection, trial_id),
        key,
        records.attempt_of(optuna_tables.read_attrs(connection, trial_id)),
    )


def are_others_behind(connection: sa.Connection, study_id: int, epoch: int, population: int) -> bool:
    """Return whether members wait that have fewer epochs than this, or have not been created.

    Args:
        connection: a connection.
        study_id: the study.
        epoch: of the member that has trained most.
        population: how many members there are to be.
    """
    trial = optuna_tables.trials
    waiting = (
        sa.select(trial.c.trial_id)
        .join(tables.trials, tables.trials.c.trial == trial.c.trial_id)
        .where(trial.c.study_id == study_id, trial.c.state == TrialState.WAITING)
        .where(ownership.last_epoch().element < epoch, tables.trials.c.claimed_epoch < epoch)
        .limit(1)
    )
    if connection.scalar(waiting) is not None:
        return True
    return records.count_budgeted(connection, study_id) < population
