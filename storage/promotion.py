"""Successive halving that promotes: a trial that is not among the best at a rung waits there, and may train on later.

The trials that wait are WAITING, as interrupted ones are. A row in `hpo_rungs` says at which rung each of them waits. It is
written in the transaction that stores the epoch, and deleted by the claim that lets the trial train on. So a trial waits
even if its driver dies before it gives the trial back.

Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa
from optuna.trial import TrialState

from storage import optuna_tables, ownership, tables
from storage.ownership import RunKey
from storage.pruners import Decision, Question, SuccessiveHalving
from storage.tables import rungs

WAITING_POOL = "/waiting"  # the end of the pools whose rows say who waits
TRIALS_AT_ONCE = 1000  # in one statement


class WaitingTrial(NamedTuple):
    """A trial that waits at a rung.

    Attributes:
        number: its number in the study.
        key: of its configuration.
        epoch: the rung.
        value: the objective there.
    """

    number: int
    key: str
    epoch: int
    value: float


@dataclass(frozen=True)
class PromotingHalving(SuccessiveHalving):
    """Successive halving that lets trials wait in place of ending them. A `storage.pruners.Pruner`.

    A trial trains on from a rung if it is among the best 1 of `reduction_factor` of all that have reached the rung, at the
    time when it reaches it, or later, when more have done so. Once no other trial can train, and the search gets no new
    ones, the best at each rung trains on in any case; when that is done, those that still wait end.
    """

    def decide(self, connection: sa.Connection, question: Question) -> Decision:
        """See `Pruner.decide`. A decision that is repeated may be another one, because others have reported meanwhile."""
        for _ in self.reach(connection, question):
            pass
        study_id, trial_id, rung = question.study_id, question.trial_id, question.epoch
        bracket = self.bracket(question.number)
        if rung < question.first_epoch or rung not in self.rungs_until(bracket, rung):
            return Decision.CONTINUE
        # It trained on from a later rung, or from this one, and its checkpoint was gone: it does not wait here again.
        claimed = sa.select(tables.trials.c.claimed_epoch).where(tables.trials.c.trial == trial_id)
        if rung <= (connection.scalar(claimed) or 0):
            return Decision.CONTINUE
        pool = self.pool(bracket)
        count = connection.scalar(sa.select(sa.func.count()).where(self.at_rung(study_id, pool, rung))) or 0
        if trial_id in connection.scalars(self._best(study_id, pool, rung, count // self.reduction_factor)).all():
            forget(connection, trial_id)
            return Decision.CONTINUE
        row = {
            "trial": trial_id,
            "epoch": rung,
            "pool": pool + WAITING_POOL,
            "study": study_id,
            "value": question.value,
        }
        optuna_tables.upsert(connection, rungs, ("trial", "epoch", "pool"), [row])
        return Decision.WAIT

    def prepare(self, connection: sa.Connection, study_id: int) -> None:
        """See `Pruner.prepare`. A trial that a run without this pruner has trained further does not wait any more."""
        super().prepare(connection, study_id)
        values = optuna_tables.intermediate_values
        has_later = sa.exists().where(values.c.trial_id == rungs.c.trial, values.c.step > rungs.c.epoch)
        connection.execute(rungs.delete().where(self._waits(study_id), has_later))

    def waits(self, study_id: int) -> sa.ColumnElement[bool]:
        """Return a condition of a query on Optuna's trials: that a trial waits at a rung."""
        trial = optuna_tables.trials
        at_rungs = sa.select(rungs.c.trial).where(self._waits(study_id))
        return sa.and_(trial.c.state == TrialState.WAITING, trial.c.trial_id.in_(at_rungs))

    def read_waiting(self, connection: sa.Connection, study_id: int) -> dict[int, WaitingTrial]:
        """Return {trial_id: trial} of the trials that wait at a rung, without those that their run has not given back."""
        trial, ours = optuna_tables.trials, tables.trials
        query = (
            sa.select(trial.c.trial_id, trial.c.number, ours.c.key, rungs.c.epoch, rungs.c.value)
            .join(rungs, rungs.c.trial == trial.c.trial_id)
            .join(ours, ours.c.trial == trial.c.trial_id)
            .where(self._waits(study_id), trial.c.state == TrialState.WAITING)
        )
        return {trial_id: WaitingTrial(*row) for trial_id, *row in connection.execute(query)}

    def find_promoted(self, connection: sa.Connection, study_id: int, *, is_last: bool) -> Iterator[int]:
        """Yield the ids of the trials that wait, and may train on; those at the highest rungs first, the best first.

        Args:
            connection: in the caller's transaction, which has locked the study.
            study_id: the study.
            is_last: whether no other trial trains or will: then the best one at each rung may train on.
        """
        query = sa.select(rungs.c.pool, rungs.c.epoch, sa.func.count()).where(rungs.c.study == study_id)
        query = query.where(rungs.c.pool.in_([*self._pools(), *self._waiting_pools()]))
        counts = {(pool, rung): count for pool, rung, count in connection.execute(query.group_by("pool", "epoch"))}
        for pool, rung in sorted(counts, key=lambda place: (-place[1], place[0])):
            if (pool + WAITING_POOL, rung) not in counts:
                continue
            places = max(counts[pool, rung] // self.reduction_factor, 1 if is_last else 0)
            waits = self.at_rung(study_id, pool + WAITING_POOL, rung)
            best = self._best(study_id, pool, rung, places)
            yield from connection.scalars(
                self._best_first(sa.select(rungs.c.trial).where(waits, rungs.c.trial.in_(best)))
            )

    def end_waiting(self, connection: sa.Connection, run: RunKey, trial_ids: Sequence[int]) -> dict[int, int]:
        """End trials that wait; return {number: the epoch after which it ended}.

        Args:
            connection: in the caller's transaction, which has locked the study.
            run: the run that ends them.
            trial_ids: the trials.
        """
        ended: dict[int, int] = {}
        for start in range(0, len(trial_ids), TRIALS_AT_ONCE):
            some = trial_ids[start : start + TRIALS_AT_ONCE]
            for trial_id, now in ownership.owners(connection, some).items():
                if now.state != TrialState.WAITING:  # a program that uses Optuna has taken it, or ended it
                    continue
                owner = {"run": run.run_id, "token": ownership.new_token()}
                connection.execute(tables.trials.update().where(tables.trials.c.trial == trial_id).values(owner))
                optuna_tables.end(connection, trial_id, TrialState.PRUNED, now.last_value)
                forget(connection, trial_id)
                ended[optuna_tables.number_of(connection, trial_id)] = now.epoch
        return ended

    def _best(self, study_id: int, pool: str, rung: int, places: int) -> sa.Select[Any]:
        """Return the query of the ids of the best trials at a rung; of equal values, the trial that was created first."""
        return self._best_first(sa.select(rungs.c.trial).where(self.at_rung(study_id, pool, rung))).limit(places)

    def _best_first(self, query: sa.Select[Any]) -> sa.Select[Any]:
        return query.order_by(rungs.c.value.desc() if self.maximize else rungs.c.value, rungs.c.trial)

    def _pools(self) -> list[str]:
        return [self.pool(bracket) for bracket in range(self.brackets)]

    def _waiting_pools(self) -> list[str]:
        return [pool + WAITING_POOL for pool in self._pools()]

    def _waits(self, study_id: int) -> sa.ColumnElement[bool]:
        return sa.and_(rungs.c.study == study_id, rungs.c.pool.in_(self._waiting_pools()))


def forget(connection: sa.Connection, trial_id: int) -> None:
    """Note that a trial does not wait at a rung any more."""
    connection.execute(rungs.delete().where(rungs.c.trial == trial_id, rungs.c.pool.endswith(WAITING_POOL)))
