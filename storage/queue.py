"""Finding and claiming trials: interrupted ones, those of dead runs, grid points, and points that a sampler draws.

A claim is a compare-and-set on hpo_trials.run: two runs never both get a trial. The study's lock makes budgets exact. Under
it, a RUNNING trial without a row in hpo_trials is one whose creator died. If a crash of the database server releases the
lock, the compare-and-set still holds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import IntegrityError

from storage import optuna_internals, tables
from storage.database import StorageError, retry_while_down
from storage.lease import Lease
from storage.studies import DUPLICATE, REJECTED, Params, Study, attempt_of
from storage.writer import ClaimedTrial, Writer

SCAN_SECONDS = 1.0  # between scans for trials that other runs left
MAX_DUPLICATE_DRAWS = 20  # in one claim; then the space counts as exhausted
MAX_REJECTED_DRAWS = 500  # in one claim; then the space counts as exhausted
RANDOM_AFTER_DRAWS = 10  # duplicate or rejected draws in one claim, after which points are drawn at random

ConfigKey = Callable[[Mapping[str, Any]], str]
# Draws the params that a trial lacks. Returns the constraint that they break; empty if they break none.
Draw = Callable[[optuna.Trial], str]


class TrialQueue:
    """The trials that one run may claim. Not thread-safe.

    Args:
        study: the study.
        lease: the run's lease, started.
        writer: the run's writer. A trial with unwritten updates is not reclaimed.
        config_key: returns the identity of a configuration.
        draw: see `storage.run.Run`.
        max_trials: see `storage.run.Run`.
        learns: see `storage.run.Run`.

    Attributes:
        finished: set by `claim`: no run has or will get another trial.
        exhausted: set by `claim`: why no more trials are drawn although the budget allows it; empty while they are.
    """

    def __init__(
        self,
        study: Study,
        lease: Lease,
        writer: Writer,
        *,
        config_key: ConfigKey,
        draw: Draw | None,
        max_trials: int | None,
        learns: bool,
    ) -> None:
        self.finished = False
        self.exhausted = ""
        self._study = study
        self._database = study.database
        self._lease = lease
        self._writer = writer
        self._config_key = config_key
        self._draw = draw
        self._max_trials = max_trials
        self._learns = learns
        self._points: list[Params] = []  # the next one is last
        self._distributions: Mapping[str, BaseDistribution] = {}
        self._known_keys: set[str] = set()
        self._held: set[int] = set()  # ids of the trials that this run works on
        self._has_partial_trials = False  # WAITING ones without a row in hpo_trials
        self._others_are_running = False
        self._next_scan = 0.0  # by the monotonic clock

    def enqueue(self, points: Iterable[Params], distributions: Mapping[str, BaseDistribution]) -> None:
        """Set the points that `claim` returns, in this order; see `storage.run.Run.enqueue`."""

        def read_keys() -> set[str]:
            table = tables.trials
            with self._database.engine.connect() as connection:
                return set(connection.scalars(sa.select(table.c.key).where(table.c.study == self._study.study_id)))

        self._points = list(points)
        self._distributions = distributions
        self._known_keys = retry_while_down(self._database, read_keys)
        self._points.reverse()

    def claim(self) -> ClaimedTrial | None:
        """Claim a trial; return None if there is none now. Idempotent: use it with `retry_while_down`.

        Raises:
            StorageError: the study was deleted.
        """
        with self._study.lock():
            if not self._lease.exists():
                raise StorageError(
                    f"{self._database.url}: the study {self._study.name!r} was deleted while this search worked on it; the "
                    "same command creates it again"
                )
            if time.monotonic() >= self._next_scan and (claim := self._claim_existing()):
                return claim
            claim = self._claim_new() or self._claim_existing()
            self.finished = claim is None and not self._others_are_running
            return claim

    def release(self, claim: ClaimedTrial) -> None:
        """Set an unfinished trial to WAITING, if it still belongs to this run."""
        table = tables.trials

        def write() -> None:
            with contextlib.suppress(UpdateFinishedTrialError):
                with self._database.engine.connect() as connection:
                    owner = connection.scalar(sa.select(table.c.run).where(table.c.trial == claim.trial_id))
                if owner == self._lease.run_id:
                    self._set_waiting(claim.trial_id, owner)

        self.forget(claim)
        self._next_scan = 0.0
        retry_while_down(self._database, write)

    def forget(self, claim: ClaimedTrial) -> None:
        """Note that this run no longer works on a trial."""
        self._held.discard(claim.trial_id)

    # --- below: called with the lock of the study

    def _claim_existing(self) -> ClaimedTrial | None:
        """Claim a trial that a run released or a dead run left.

        This reads every unfinished trial, so `claim` does not do it each time.
        """
        self._others_are_running = self._reclaim_from_dead_runs()
        claim = self._claim_waiting()
        if claim is None:
            self._next_scan = time.monotonic() + SCAN_SECONDS
        return claim

    def _claim_new(self) -> ClaimedTrial | None:
        if self._draw is None:
            return self._claim_point()
        if self.exhausted or self._is_budget_spent():
            return None
        return self._claim_drawn(self._draw)

    def _reclaim_from_dead_runs(self) -> bool:
        """Set the trials of dead runs to WAITING; return whether other living runs work on trials."""
        running = self._trials(TrialState.RUNNING)
        if not running:
            return False
        table, owners = tables.trials, tables.runs
        query = (
            sa.select(table.c.trial, owners, self._database.now_seconds().label("now"))
            .join(owners, owners.c.run == table.c.run)
            .where(table.c.trial.in_([optuna_internals.trial_id(trial) for trial in running]))
        )
        with self._database.engine.connect() as connection:
            rows = {row.trial: row for row in connection.execute(query)}
        others_are_running = False
        own = self._held | self._writer.unwritten()
        for trial_id in map(optuna_internals.trial_id, running):
            row = rows.get(trial_id)
            if trial_id in own:
                continue
            if row is not None and row.run != self._lease.run_id and not self._lease.is_dead(row):
                others_are_running = True
                continue
            # Its run is dead; or it has no owner: its creator died, or lost the database, before it registered the trial.
            with contextlib.suppress(UpdateFinishedTrialError):
                self._set_waiting(trial_id, row.run if row is not None else None)
        return others_are_running

    def _set_waiting(self, trial_id: int, owner: int | None) -> None:
        self._database.optuna_storage.set_trial_state_values(trial_id, TrialState.WAITING)
        table = tables.trials
        with self._database.engine.begin() as connection:
            connection.execute(
                table.update()
                .where(table.c.trial == trial_id, table.c.run.is_not_distinct_from(owner))
                .values(run=None)
            )

    def _claim_waiting(self) -> ClaimedTrial | None:
        # Interrupted trials first: they are nearest to a result.
        for trial, row in sorted(self._waiting(), key=lambda pair: (not pair[0].intermediate_values, pair[0].number)):
            claim = self._acquire(trial, row)
            if claim is not None and self._database.optuna_storage.set_trial_state_values(
                claim.trial_id, TrialState.RUNNING
            ):
                return claim
        return None

    def _waiting(self) -> list[tuple[FrozenTrial, Any]]:
        """Return the WAITING trials, each with its row in hpo_trials.

        A grid's trial without a row, whose creator died before it registered the trial, is registered here. In other
        searches, such a trial may lack params: its creator died while drawing, or it was enqueued through Optuna.
        `_claim_drawn` completes those.
        """
        waiting = self._trials(TrialState.WAITING)
        rows = self._rows(map(optuna_internals.trial_id, waiting))
        for trial in waiting:
            if optuna_internals.trial_id(trial) not in rows and self._draw is None and trial.params:
                self._register_or_fail(optuna_internals.trial_id(trial), self._config_key(trial.params), run_id=None)
                rows |= self._rows([optuna_internals.trial_id(trial)])
        self._has_partial_trials = any(optuna_internals.trial_id(trial) not in rows for trial in waiting)
        return [
            (trial, rows[optuna_internals.trial_id(trial)])
            for trial in waiting
            if optuna_internals.trial_id(trial) in rows
        ]

    def _acquire(self, trial: FrozenTrial, row: Any) -> ClaimedTrial | None:
        """Make this run the owner of a trial; return None if another run was faster."""
        table, trial_id = tables.trials, optuna_internals.trial_id(trial)
        with self._database.engine.begin() as connection:
            updated = connection.execute(
                table.update()
                .where(table.c.trial == trial_id, table.c.run.is_not_distinct_from(row.run))
                .values(run=self._lease.run_id)
            ).rowcount
        if not updated:
            return None
        optuna_internals.forget_finished(self._study.optuna_study, trial_id)
        self._held.add(trial_id)
        values = dict(trial.intermediate_values)
        return ClaimedTrial(trial_id, trial.number, trial.params, values, row.crashes, attempt_of(trial.user_attrs))

    def _claim_point(self) -> ClaimedTrial | None:
        """Create a trial for the next point that no run has claimed."""
        while self._points:
            point = self._points[-1]
            key = self._config_key(point)
            if key not in self._known_keys and not self._is_known(key):
                active = {name: self._distributions[name] for name in point}
                template = create_trial(state=TrialState.RUNNING, params=point, distributions=active)
                trial_id = self._database.optuna_storage.create_new_trial(self._study.study_id, template)
                if self._register_or_fail(trial_id, key, run_id=self._lease.run_id):
                    self._points.pop()
                    self._held.add(trial_id)
                    number = self._database.optuna_storage.get_trial_number_from_id(trial_id)
                    return ClaimedTrial(trial_id, number, point, {}, 0)
            self._points.pop()  # only now: after an error, the retry starts with the same point
        return None

    def _claim_drawn(self, draw: Draw) -> ClaimedTrial | None:
        sampler = self._study.optuna_study.sampler
        try:
            return self._draw_until_new(draw)
        finally:
            self._study.optuna_study.sampler = sampler

    def _draw_until_new(self, draw: Draw) -> ClaimedTrial | None:
        duplicates = rejected = 0
        while duplicates < MAX_DUPLICATE_DRAWS and rejected < MAX_REJECTED_DRAWS:
            trial = self._new_trial()
            trial_id = optuna_internals.trial_id(trial)
            row = self._rows([trial_id]).get(trial_id)
            if row is not None:  # `ask` returned a trial that was interrupted after the last scan
                claim = self._acquire(self._database.optuna_storage.get_trial(trial_id), row)
                if claim is not None:
                    return claim
                continue
            if duplicates + rejected == RANDOM_AFTER_DRAWS:
                # A sampler does not learn from trials that never ran: it may draw the same point forever.
                self._study.optuna_study.sampler = optuna.samplers.RandomSampler(seed=trial.number)
            constraint = draw(trial)
            if constraint:
                self._database.optuna_storage.set_trial_user_attr(trial_id, "constraint", constraint)
                self._fail_never_run(trial_id, REJECTED)
                rejected += 1
                continue
            if self._register_or_fail(trial_id, self._config_key(trial.params), run_id=self._lease.run_id):
                self._held.add(trial_id)
                return ClaimedTrial(trial_id, trial.number, trial.params, {}, 0)
            duplicates += 1
        self.exhausted = (
            f"{duplicates} draws in a row were duplicates of earlier trials"
            if duplicates == MAX_DUPLICATE_DRAWS
            else f"{rejected} draws in a row broke a constraint"
        )
        return None

    def _new_trial(self) -> optuna.Trial:
        """Return a trial to draw.

        `ask` prefers a WAITING trial to a new one, and reads the whole study to find it. A sampler that learns reads the
        study anyway.
        """
        study = self._study.optuna_study
        return study.ask() if self._learns or self._has_partial_trials else optuna_internals.new_trial(study)

    def _register_or_fail(self, trial_id: int, key: str, run_id: int | None) -> bool:
        if self._register(trial_id, key, run_id):
            return True
        self._fail_never_run(trial_id, DUPLICATE)
        return False

    def _register(self, trial_id: int, key: str, run_id: int | None) -> bool:
        """Insert the trial's row; return False if the study already has that configuration."""
        row = tables.trials.insert().values(trial=trial_id, study=self._study.study_id, key=key, run=run_id)
        try:
            with self._database.engine.begin() as connection:
                connection.execute(row)
        except IntegrityError:
            return False
        return True

    def _fail_never_run(self, trial_id: int, reason: str) -> None:
        self._database.optuna_storage.set_trial_user_attr(trial_id, "fail_reason", reason)
        self._database.optuna_storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _is_budget_spent(self) -> bool:
        if self._max_trials is None:
            return False
        table = tables.trials
        query = sa.select(sa.func.count()).where(table.c.study == self._study.study_id)
        with self._database.engine.connect() as connection:
            return int(connection.execute(query).scalar_one()) >= self._max_trials

    def _is_known(self, key: str) -> bool:
        table = tables.trials
        query = sa.select(table.c.trial).where(table.c.study == self._study.study_id, table.c.key == key)
        with self._database.engine.connect() as connection:
            return connection.scalar(query) is not None

    def _trials(self, state: TrialState) -> list[FrozenTrial]:
        return self._database.optuna_storage.get_all_trials(self._study.study_id, deepcopy=False, states=(state,))

    def _rows(self, ids: Iterable[int]) -> dict[int, Any]:
        table = tables.trials
        query = sa.select(table).where(table.c.trial.in_(list(ids)))
        with self._database.engine.connect() as connection:
            return {row.trial: row for row in connection.execute(query)}
