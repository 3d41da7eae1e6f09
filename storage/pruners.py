"""Pruners: whether a trial ends after an epoch, because others did better.

They decide as Optuna's pruners of the same names do. Optuna's read every trial of the study for each decision, and write
what they decide from in another transaction than the trial's state: if the process ends in between, the decision is lost.
These run in the transaction that stores the epoch, and count in an index.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np
import sqlalchemy as sa
from optuna.trial import TrialState
from sqlalchemy.dialects import postgresql, sqlite

from storage import optuna_tables
from storage.tables import LEARNED, is_imported, rungs


@dataclass(frozen=True)
class Question:
    """Whether a trial ends after an epoch.

    Attributes:
        study_id: the study.
        trial_id: the trial.
        number: its number in the study.
        epoch: the epoch, from 1.
        value: the objective after it, finite.
        first_epoch: the first one that is judged. What came before was trained by a trial that this one continues.
    """

    study_id: int
    trial_id: int
    number: int
    epoch: int
    value: float
    first_epoch: int = 1


class Decision(Enum):
    """What becomes of a trial after an epoch."""

    CONTINUE = "it trains on"
    END = "it is PRUNED"
    WAIT = "its run is to give it back; it trains on when it is claimed again, see `storage.promotion`"


class Pruner(Protocol):
    """Decides in the transaction that stores an epoch. The caller has locked the study."""

    def decide(self, connection: sa.Connection, question: Question) -> Decision:
        """Return what becomes of a trial after an epoch, in the transaction that has stored it."""

    def complete(self, connection: sa.Connection, study_id: int, trial_id: int) -> None:
        """Note that a trial reached its last epoch."""

    def prepare(self, connection: sa.Connection, study_id: int) -> None:
        """Note the epochs that were stored under another pruner, or by an older version. Idempotent."""


@dataclass(frozen=True)
class SuccessiveHalving:
    """Asynchronous successive halving (ASHA), and Hyperband where there are several brackets.

    At each rung, a trial continues if its value is among the best of all trials that have reached the rung: the best one of
    `reduction_factor` trials, of all if there are fewer.

    Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020; brackets as in Optuna's
    HyperbandPruner.

    Args:
        maximize: whether larger values are better.
        study_name: part of what chooses a trial's bracket.
        min_epochs: the first rung of bracket 0.
        reduction_factor: the ratio of two rungs.
        brackets: how many brackets there are. The first rung of bracket b is `min_epochs * reduction_factor**b`.
    """

    maximize: bool
    study_name: str
    min_epochs: int
    reduction_factor: int
    brackets: int = 1

    @classmethod
    def hyperband(
        cls, *, maximize: bool, study_name: str, min_epochs: int, max_epochs: int, reduction_factor: int
    ) -> SuccessiveHalving:
        """Return the pruner with as many brackets as Hyperband has for these epochs."""
        brackets = math.floor(math.log(max_epochs / min_epochs, reduction_factor)) + 1
        return cls(maximize, study_name, min_epochs, reduction_factor, brackets)

    def bracket(self, number: int) -> int:
        """Return the bracket of the trial with this number."""
        budgets = [
            math.ceil(
                self.brackets * self.reduction_factor ** (self.brackets - 1 - bracket) / (self.brackets - bracket)
            )
            for bracket in range(self.brackets)
        ]
        place = binascii.crc32(f"{self.study_name}_{number}".encode()) % sum(budgets)
        return next(bracket for bracket in range(self.brackets) if place < sum(budgets[: bracket + 1]))

    def decide(self, connection: sa.Connection, question: Question) -> Decision:
        """See `Pruner.decide`."""
        for rung, value in self.reach(connection, question):
            of_rung = self.at_rung(question.study_id, self.pool(self.bracket(question.number)), rung)
            count = connection.scalar(sa.select(sa.func.count()).where(of_rung)) or 0
            # The worst value that stays. Skipping rows is faster than counting those with better values.
            staying = max(1, count // self.reduction_factor)
            query = sa.select(rungs.c.value).where(of_rung).order_by(self.best_first).offset(staying - 1).limit(1)
            cutoff = connection.execute(query).scalar_one()
            if cutoff > value if self.maximize else cutoff < value:
                return Decision.END
        return Decision.CONTINUE

    def reach(self, connection: sa.Connection, question: Question) -> Iterator[tuple[int, float]]:
        """Note the rungs that a trial has reached; yield each that was not noted and is judged, with its value."""
        study_id, trial_id, epoch = question.study_id, question.trial_id, question.epoch
        if epoch < self.min_epochs:
            return
        bracket = self.bracket(question.number)
        pool = self.pool(bracket)
        query = sa.select(rungs.c.epoch).where(rungs.c.trial == trial_id, rungs.c.pool == pool)
        done = set(connection.scalars(query))
        for rung in self.rungs_until(bracket, epoch):
            if rung in done:
                continue
            # An earlier epoch was stored without a decision, such as by a run without this pruner.
            value = question.value if rung == epoch else _value_at(connection, trial_id, rung)
            if value is None:
                continue
            row = {"trial": trial_id, "epoch": rung, "pool": pool, "study": study_id, "value": value}
            connection.execute(rungs.insert(), row)
            if rung >= question.first_epoch:
                yield rung, value

    def complete(self, connection: sa.Connection, study_id: int, trial_id: int) -> None:
        """Do nothing: the last epoch is no rung."""

    def prepare(self, connection: sa.Connection, study_id: int) -> None:
        """See `Pruner.prepare`."""
        values, trial = optuna_tables.intermediate_values, optuna_tables.trials
        of_study = sa.select(values.c.trial_id).join(trial, trial.c.trial_id == values.c.trial_id)
        of_study = of_study.where(trial.c.study_id == study_id, ~is_imported(trial, LEARNED))
        last = connection.scalar(of_study.with_only_columns(sa.func.max(values.c.step))) or 0
        is_known = sa.exists().where(
            rungs.c.trial == values.c.trial_id,
            rungs.c.epoch == values.c.step,
            rungs.c.pool.in_([self.pool(bracket) for bracket in range(self.brackets)]),
        )
        query = of_study.add_columns(values.c.step, values.c.intermediate_value, trial.c.number).where(
            values.c.step.in_({rung for bracket in range(self.brackets) for rung in self.rungs_until(bracket, last)}),
            values.c.intermediate_value.is_not(None),
            ~is_known,
        )
        rows = []
        for trial_id, epoch, value, number in connection.execute(query):
            bracket = self.bracket(number)
            if epoch in self.rungs_until(bracket, epoch):
                pool = self.pool(bracket)
                rows.append({"trial": trial_id, "epoch": epoch, "pool": pool, "study": study_id, "value": value})
        if rows:
            connection.execute(_insert_new(connection), rows)

    def pool(self, bracket: int) -> str:
        """Return the pool in which the values of a bracket's trials are."""
        if self.brackets == 1:
            return "asha"  # with any rungs: a value belongs to its epoch
        return f"hyperband/{self.min_epochs}/{self.reduction_factor}/{self.brackets}/{bracket}"

    @staticmethod
    def at_rung(study_id: int, pool: str, rung: int) -> sa.ColumnElement[bool]:
        """Return the condition for the rows of a rung."""
        return sa.and_(rungs.c.study == study_id, rungs.c.pool == pool, rungs.c.epoch == rung)

    @property
    def best_first(self) -> sa.ColumnElement[float]:
        """The order of the rows of a rung."""
        return rungs.c.value.desc() if self.maximize else rungs.c.value

    def rungs_until(self, bracket: int, epoch: int) -> list[int]:
        """Return the epochs of the rungs of a bracket, up to an epoch."""
        found = []
        rung = self.min_epochs * self.reduction_factor**bracket
        while rung <= epoch:
            found.append(rung)
            rung *= self.reduction_factor
        return found


@dataclass(frozen=True)
class Median:
    """Ends a trial whose best value is worse than the median of the completed trials at the same epoch.

    Source: Golovin et al., Google Vizier: A Service for Black-Box Optimization, KDD 2017, as in Optuna's MedianPruner.

    Args:
        maximize: whether larger values are better.
        min_epochs: no trial ends before.
        startup_trials: no trial ends before this many have completed.
    """

    maximize: bool
    min_epochs: int
    startup_trials: int = 5

    def decide(self, connection: sa.Connection, question: Question) -> Decision:
        """See `Pruner.decide`."""
        return Decision.END if self._is_worse(connection, question) else Decision.CONTINUE

    def _is_worse(self, connection: sa.Connection, question: Question) -> bool:
        study_id, trial_id, epoch = question.study_id, question.trial_id, question.epoch
        if epoch < self.min_epochs:
            return False
        trial, values = optuna_tables.trials, optuna_tables.intermediate_values
        is_complete = sa.and_(trial.c.study_id == study_id, trial.c.state == TrialState.COMPLETE)
        is_complete = sa.and_(is_complete, ~is_imported(trial, LEARNED))
        first = sa.select(trial.c.trial_id).where(is_complete).limit(max(1, self.startup_trials))
        if len(connection.scalars(first).all()) < max(1, self.startup_trials):
            return False
        at_epoch = sa.and_(rungs.c.study == study_id, rungs.c.pool == "median", rungs.c.epoch == epoch)
        count = connection.scalar(sa.select(sa.func.count()).where(at_epoch)) or 0
        if count == 0:
            return False
        middle = (
            sa.select(rungs.c.value)
            .where(at_epoch)
            .order_by(rungs.c.value)
            .offset((count - 1) // 2)
            .limit(2 - count % 2)
        )
        median = float(np.mean(list(connection.scalars(middle))))
        best = sa.func.max if self.maximize else sa.func.min
        query = sa.select(best(values.c.intermediate_value)).where(
            values.c.trial_id == trial_id, values.c.step <= epoch
        )
        own = connection.scalar(query)
        return own is not None and (own < median if self.maximize else own > median)

    def complete(self, connection: sa.Connection, study_id: int, trial_id: int) -> None:
        """See `Pruner.complete`."""
        self._add(connection, study_id, optuna_tables.trials.c.trial_id == trial_id)

    def prepare(self, connection: sa.Connection, study_id: int) -> None:
        """See `Pruner.prepare`."""
        trial = optuna_tables.trials
        # All epochs of a trial are added at once.
        is_known = sa.exists().where(rungs.c.trial == trial.c.trial_id, rungs.c.pool == "median")
        self._add(connection, study_id, sa.and_(trial.c.state == TrialState.COMPLETE, ~is_known))

    def _add(self, connection: sa.Connection, study_id: int, condition: sa.ColumnElement[bool]) -> None:
        values, trial = optuna_tables.intermediate_values, optuna_tables.trials
        query = (
            sa.select(
                values.c.trial_id,
                values.c.step,
                sa.literal("median"),
                sa.literal(study_id),
                values.c.intermediate_value,
            )
            .join(trial, trial.c.trial_id == values.c.trial_id)
            .where(trial.c.study_id == study_id, condition, values.c.intermediate_value.is_not(None))
            .where(~is_imported(trial, LEARNED))
        )
        columns = ["trial", "epoch", "pool", "study", "value"]
        connection.execute(_insert_new(connection).from_select(columns, query))


def _value_at(connection: sa.Connection, trial_id: int, epoch: int) -> float | None:
    """Return the objective of a stored epoch; None if it is not stored, or not finite."""
    values = optuna_tables.intermediate_values
    query = sa.select(values.c.intermediate_value).where(values.c.trial_id == trial_id, values.c.step == epoch)
    found: float | None = connection.scalar(query)
    return found


def _insert_new(connection: sa.Connection) -> Any:
    """Return an insertion into hpo_rungs that skips the rows that exist."""
    return (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(rungs).on_conflict_do_nothing()
