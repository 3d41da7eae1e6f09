"""Successive halving in which trials wait at a rung, and may train on later.

`PromotingHalving` lets every trial wait that is not among the best. `StoppingHalving` ends it, but where one trial trains at
a time, the first ones at the lowest rung wait until there are enough of them to compare.

The trials that wait are WAITING, as interrupted ones are. A row in `hpo_rungs` says at which rung each of them waits. It is
written in the transaction that stores the epoch, and deleted by the claim that lets the trial train on. So a trial waits
even if its driver dies before it gives the trial back.

Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
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
    """Successive halving that lets trials wait instead of ending them. A `storage.pruners.Pruner`.

    A trial trains on from a rung if it is among the best 1 of `reduction_factor` of all that have reached the rung, at the
    time when it reaches it, or later, when more have done so. Once the search gets no new trials, and none of a bracket
    trains, the best one at each of its rungs trains on in any case. When no trial trains at all, those that wait end.
    """

    def decide(self, connection: sa.Connection, question: Question) -> Decision:
        """See `Pruner.decide`. A decision that is repeated may be another one, because others have reported meanwhile."""
        for _ in self.reach(connection, question):
            pass
        if not self._may_wait(connection, question):
            return Decision.CONTINUE
        study_id, trial_id, rung = question.study_id, question.trial_id, question.epoch
        pool = self.pool(self.bracket(question.number))
        places = self._count(connection, study_id, pool, rung) // self.reduction_factor
        if trial_id in connection.scalars(self._best(study_id, pool, rung).limit(places)).all():
            forget(connection, [trial_id])
            return Decision.CONTINUE
        return self._hold(connection, question)

    def prepare(self, connection: sa.Connection, study_id: int) -> None:
        """See `Pruner.prepare`. What waits at a rung of other options, such as another grace period, waits where it is.

        A trial that a run without this pruner has trained further does not wait any more.
        """
        super().prepare(connection, study_id)
        trial, values = optuna_tables.trials, optuna_tables.intermediate_values
        waits = sa.and_(rungs.c.study == study_id, rungs.c.pool.endswith(WAITING_POOL))
        has_later = sa.exists().where(values.c.trial_id == rungs.c.trial, values.c.step > rungs.c.epoch)
        connection.execute(rungs.delete().where(waits, has_later))
        query = (
            sa.select(rungs.c.trial, rungs.c.epoch, rungs.c.value, trial.c.number)
            .join(trial, trial.c.trial_id == rungs.c.trial)
            .where(waits, rungs.c.pool.not_in(self._waiting_pools()))
        )
        rows = {}
        for row in connection.execute(query).all():
            pool = self.pool(self.bracket(row.number))
            for each in (pool, pool + WAITING_POOL):
                key = {"trial": row.trial, "epoch": row.epoch, "pool": each}
                rows[tuple(key.values())] = key | {"study": study_id, "value": row.value}
        optuna_tables.upsert(connection, rungs, ("trial", "epoch", "pool"), list(rows.values()))
        connection.execute(rungs.delete().where(waits, rungs.c.pool.not_in(self._waiting_pools())))

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

    def find_promoted(
        self,
        connection: sa.Connection,
        study_id: int,
        *,
        barred: Collection[int] = (),
        running: Collection[int] | None = None,
    ) -> Iterator[int]:
        """Yield the ids of the trials that wait, and may train on; those at the highest rungs first, the best first.

        Args:
            connection: in the caller's transaction, which has locked the study.
            study_id: the study.
            barred: ids of trials that wait, and that the caller may not claim: they take no place.
            running: numbers of the trials that train, if there will be no others. Then the best one at each rung of a
                bracket in which none trains may train on.
        """
        training = None if running is None else {self.bracket(number) for number in running}
        query = sa.select(rungs.c.pool, rungs.c.epoch).where(self._waits(study_id)).distinct()
        places = [(rung, bracket) for pool, rung in connection.execute(query) for bracket in self._brackets_of(pool)]
        for rung, bracket in sorted(places, key=lambda place: (-place[0], place[1])):
            pool = self.pool(bracket)
            least = 0 if training is None or bracket in training else 1
            count = self._count(connection, study_id, pool, rung, barred)
            best = self._best(study_id, pool, rung, barred).limit(max(count // self.reduction_factor, least))
            waits = self.at_rung(study_id, pool + WAITING_POOL, rung)
            query = sa.select(rungs.c.trial).where(waits, rungs.c.trial.in_(best))
            yield from connection.scalars(self._best_first(query)).all()

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
                # The run that trained it last, with whose versions it can be replayed.
                account = tables.usage
                trained_by = sa.select(account.c.run).where(account.c.trial == trial_id, account.c.run.is_not(None))
                last = connection.scalar(trained_by.order_by(account.c.run.desc()).limit(1))
                owner = {"run": run.run_id if last is None else last, "token": ownership.new_token()}
                connection.execute(tables.trials.update().where(tables.trials.c.trial == trial_id).values(owner))
                optuna_tables.end(connection, trial_id, TrialState.PRUNED, now.last_value)
                ended[optuna_tables.number_of(connection, trial_id)] = now.epoch
            forget(connection, some)
        return ended

    def _may_wait(self, connection: sa.Connection, question: Question) -> bool:
        """Return whether a trial is at a rung at which it has not waited before."""
        trial_id, rung = question.trial_id, question.epoch
        if rung < question.first_epoch or rung not in self.rungs_until(self.bracket(question.number), rung):
            return False
        # It may have trained on from a later rung, or from this one, and its checkpoint was gone.
        claimed = sa.select(tables.trials.c.claimed_epoch).where(tables.trials.c.trial == trial_id)
        return rung > (connection.scalar(claimed) or 0)

    def _hold(self, connection: sa.Connection, question: Question) -> Decision:
        """Note that a trial waits."""
        row = {
            "trial": question.trial_id,
            "epoch": question.epoch,
            "pool": self.pool(self.bracket(question.number)) + WAITING_POOL,
            "study": question.study_id,
            "value": question.value,
        }
        optuna_tables.upsert(connection, rungs, ("trial", "epoch", "pool"), [row])
        return Decision.WAIT

    def _competes(self, study_id: int, pool: str, rung: int, barred: Collection[int]) -> sa.ColumnElement[bool]:
        """Return the condition for the rows of a rung. A trial that failed takes no place: it will not train on."""
        trial = optuna_tables.trials
        has_failed = sa.exists().where(trial.c.trial_id == rungs.c.trial, trial.c.state == TrialState.FAIL)
        return sa.and_(self.at_rung(study_id, pool, rung), ~has_failed, rungs.c.trial.not_in(barred))

    def _count(
        self, connection: sa.Connection, study_id: int, pool: str, rung: int, barred: Collection[int] = ()
    ) -> int:
        competes = self._competes(study_id, pool, rung, barred)
        return connection.scalar(sa.select(sa.func.count()).where(competes)) or 0

    def _best(self, study_id: int, pool: str, rung: int, barred: Collection[int] = ()) -> sa.Select[Any]:
        """Return the query of the ids at a rung, the best first; of equal values, the trial that was created first."""
        return self._best_first(sa.select(rungs.c.trial).where(self._competes(study_id, pool, rung, barred)))

    def _best_first(self, query: sa.Select[Any]) -> sa.Select[Any]:
        return query.order_by(self.best_first, rungs.c.trial)

    def _waiting_pools(self) -> list[str]:
        return [self.pool(bracket) + WAITING_POOL for bracket in range(self.brackets)]

    def _brackets_of(self, waiting_pool: str) -> list[int]:
        return [bracket for bracket, pool in enumerate(self._waiting_pools()) if pool == waiting_pool]

    def _waits(self, study_id: int) -> sa.ColumnElement[bool]:
        return sa.and_(rungs.c.study == study_id, rungs.c.pool.in_(self._waiting_pools()))


@dataclass(frozen=True)
class StoppingHalving(PromotingHalving):
    """Successive halving that ends trials, once there are enough to compare. A `storage.pruners.Pruner`.

    It decides as `SuccessiveHalving`, with one exception. While fewer than `reduction_factor` trials have reached the lowest
    rung of a bracket, the best of them would train to its end: it has nothing to compare with. If no other trial of the
    study trains meanwhile, that is a whole training before the search has seen a third configuration. So it waits, and
    trains on, as in `PromotingHalving`, when it is among the best of enough trials, or when no others come.
    """

    def decide(self, connection: sa.Connection, question: Question) -> Decision:
        """See `Pruner.decide`. A decision that is repeated may be another one, because others have reported meanwhile."""
        decision = SuccessiveHalving.decide(self, connection, question)
        bracket = self.bracket(question.number)
        if question.epoch != self.min_epochs * self.reduction_factor**bracket:
            return decision
        if decision is Decision.CONTINUE and self._may_wait(connection, question):
            count = self._count(connection, question.study_id, self.pool(bracket), question.epoch)
            if count < self.reduction_factor and _trains_alone(connection, question):
                return self._hold(connection, question)
        forget(connection, [question.trial_id])
        return decision


def _trains_alone(connection: sa.Connection, question: Question) -> bool:
    """Return whether no other trial of the study is RUNNING."""
    trial = optuna_tables.trials
    is_other = sa.and_(trial.c.study_id == question.study_id, trial.c.trial_id != question.trial_id)
    others = sa.select(trial.c.trial_id).where(is_other, trial.c.state == TrialState.RUNNING)
    return connection.scalar(others.limit(1)) is None


def forget(connection: sa.Connection, trial_ids: Sequence[int]) -> None:
    """Note that trials do not wait at a rung any more."""
    connection.execute(rungs.delete().where(rungs.c.trial.in_(trial_ids), rungs.c.pool.endswith(WAITING_POOL)))
