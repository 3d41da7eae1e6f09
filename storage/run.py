"""A run: one driver at work on a study. Runs share its trials.

Who may do what at the same time:

- A `Run` is one driver at work. Any number of runs, on any number of machines, may work on one study.
- A trial belongs to at most one run. It is taken by a compare-and-set on hpo_trials.run, so two runs never both get it,
  even where the lock below was lost with the database server.
- Asking for a trial happens under a lock of the study: budgets are exact, and half-made trials are the traces of the dead.
- A run holds a lease and renews it from a thread. Trials of a run whose lease has run out, or whose process is known to be
  dead, go back to WAITING with all they have reported, and the next run goes on with them.
- A run that lost a trial (it slept through its lease) is told so by LostTrialError and must write nothing more about it.
- What a run tells of its trials is written a moment later (storage.writer), and before it claims another one.

States: WAITING is interrupted and resumable, or queued by hand; RUNNING belongs to a run; COMPLETE reached its last epoch;
PRUNED was stopped by the pruner; FAIL carries the user attribute `fail_reason`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import optuna
import psutil
import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import IntegrityError

from storage import tables
from storage.database import Database, StorageError, retry_while_down
from storage.studies import (
    DUPLICATE,
    REJECTED,
    Params,
    Study,
    elapsed_seconds,
    host,
    is_process_dead,
    without_garbage_collection,
)
from storage.writer import ClaimedTrial, TrialUpdate, Writer

LEASE_SECONDS = 60.0
LOOK_SECONDS = 1.0  # between looks for trials that others left
MAX_DUPLICATES = 20  # draws in a row that were all tried before: the space is taken to be exhausted
MAX_REJECTED = 500  # draws in a row that were all refused
MAX_STUBBORN = 10  # draws in a row, never run, after which a trial is drawn at random

KeyOf = Callable[[Mapping[str, Any]], str]
# Draws a configuration for a trial, or the rest of one; returns why it must not be run, empty if it may.
Draw = Callable[[optuna.Trial], str]


@dataclass
class Run:
    """One driver at work on a study. A context manager: the lease lives inside the `with`.

    Attributes:
        study: the study.
        config_key: the identity of a configuration.
        draw: what fills a new trial when the queue is empty; None for a grid, which is all queue.
        max_trials: the study holds at most so many trials, those never run not counted.
        learns: whether draws depend on results: claims then wait until all that was told is in the database.
        lease_seconds: how long the run is trusted to be alive after it was last heard of.
        finished: set by `claim`: nothing is left to do, here or in any other run.
        exhausted: set by `claim`: why no more trials are drawn, though there is budget; empty while they are.
    """

    study: Study
    config_key: KeyOf
    provenance: Mapping[str, Any]
    draw: Draw | None = None
    max_trials: int | None = None
    learns: bool = True
    lease_seconds: float = LEASE_SECONDS
    finished: bool = False
    exhausted: str = ""
    run_id: int = field(default=-1, init=False)
    _points: list[Params] = field(default_factory=list, init=False)
    _distributions: Mapping[str, BaseDistribution] = field(default_factory=dict, init=False)
    _known_keys: set[str] = field(default_factory=set, init=False)
    _held: set[int] = field(default_factory=set, init=False)
    _is_queued: bool = field(default=False, init=False)
    _is_elsewhere: bool = field(default=False, init=False)
    _next_look: float = field(default=0.0, init=False)
    _ended: threading.Event = field(default_factory=threading.Event, init=False)
    _no_takeover_before: float = field(default=0.0, init=False)

    def __enter__(self) -> Run:
        database = self.database

        def start() -> int:
            now = database.seconds()
            row = sa.insert(tables.runs).values(
                study=self.study.study_id,
                host=host(),
                pid=os.getpid(),
                process_started=psutil.Process().create_time(),
                started=now,
                last_heard=now,
                lease_until=now + self.lease_seconds,
                provenance=dict(self.provenance),
            )
            with database.engine.begin() as connection:
                return int(connection.execute(row.returning(tables.runs.c.run)).scalar_one())

        self.run_id = retry_while_down(database, start)
        self._writer = Writer(self.study, self.run_id)
        threading.Thread(target=self._keep_lease, name="hpo-lease", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._writer.close()
        # A short patience: whoever must know calls `flush`, and the lease runs out by itself where the database is away.
        with contextlib.suppress(StorageError):
            self._writer.flush(patience=5.0)
            retry_while_down(self.database, self._end, patience=5.0)

    @property
    def database(self) -> Database:
        """The study's database."""
        return self.study.database

    def enqueue(self, points: Iterable[Params], distributions: Mapping[str, BaseDistribution]) -> None:
        """Give out these configurations, in this order, those left out that the study has already.

        Nothing is written: a point becomes a trial when it is claimed, so a grid of thousands costs no more than a small
        one. For readers the study keeps how many points there are.
        """

        def look() -> set[str]:
            if self.study.attrs.get("hpo:points") != len(self._points):
                self.study.optuna_study.set_user_attr("hpo:points", len(self._points))
            table = tables.trials
            with self.database.engine.connect() as connection:
                return set(connection.scalars(sa.select(table.c.key).where(table.c.study == self.study.study_id)))

        self._points = list(points)
        self._distributions = distributions
        self._known_keys = retry_while_down(self.database, look)
        self._points.reverse()  # the next one is at the end

    def claim(self) -> ClaimedTrial | None:
        """Return a trial to work on: an interrupted one, a queued one, or a new one; None if there is none now.

        With None, `finished` says whether there ever will be one.
        """
        if self.learns:
            self._writer.flush()
        with self._writer.paused(), without_garbage_collection():
            claim = retry_while_down(self.database, self._claim)
        if claim is None and not self.learns:
            self._writer.flush()
        return claim

    def flush(self) -> None:
        """Wait until all that was told is in the database."""
        self._writer.flush()

    def report(self, claim: ClaimedTrial, epoch: int, metrics: Mapping[str, float], value: float) -> None:
        """Store one finished epoch. May be repeated.

        Raises:
            LostTrialError: the trial belongs to another run by now.
        """
        self._writer.put(TrialUpdate(claim, epoch, dict(metrics), value))

    def should_prune(self, claim: ClaimedTrial) -> bool:
        """Ask the study's pruner whether to stop a trial after its latest report; raises as `report` does."""
        self._writer.flush()
        self._writer.check(claim)
        study = self.study.optuna_study
        return retry_while_down(
            self.database, lambda: study.pruner.prune(study, self.database.optuna_storage.get_trial(claim.trial_id))
        )

    def record(
        self, claim: ClaimedTrial, attrs: Mapping[str, Any], provenance: Mapping[str, Any] | None = None
    ) -> None:
        """Store attributes of a trial, for people and for a replay, and where and on what it runs."""
        self._writer.put(TrialUpdate(claim, attrs=dict(attrs), provenance=provenance))

    def record_crash(self, claim: ClaimedTrial) -> None:
        """Count one more worker that died over a trial."""
        table = tables.trials

        def write() -> None:
            with self.database.engine.begin() as connection:
                connection.execute(
                    table.update().where(table.c.trial == claim.trial_id).values(crashes=table.c.crashes + 1)
                )

        retry_while_down(self.database, write)

    def complete(self, claim: ClaimedTrial, value: float, attrs: Mapping[str, Any] | None = None) -> None:
        """Finish a trial that reached its last epoch."""
        self._end_trial(TrialUpdate(claim, value=value, attrs=attrs or {}, ending=TrialState.COMPLETE))

    def prune(self, claim: ClaimedTrial, attrs: Mapping[str, Any] | None = None) -> None:
        """Finish a trial that the pruner stopped; its value is its last reported one."""
        self._end_trial(TrialUpdate(claim, attrs=attrs or {}, ending=TrialState.PRUNED))

    def fail(self, claim: ClaimedTrial, reason: str, traceback: str = "") -> None:
        """Finish a trial that failed, with the reason in one line."""
        attrs = {"fail_reason": reason} | ({"traceback": traceback[-2000:]} if traceback else {})
        self._end_trial(TrialUpdate(claim, attrs=attrs, ending=TrialState.FAIL))

    def _end_trial(self, told: TrialUpdate) -> None:
        self._held.discard(told.claim.trial_id)
        self._writer.put(told)

    def release(self, claim: ClaimedTrial) -> None:
        """Give an unfinished trial back; any run may go on with it."""
        table = tables.trials

        def write() -> None:
            with contextlib.suppress(UpdateFinishedTrialError):
                with self.database.engine.connect() as connection:
                    owner = connection.scalar(sa.select(table.c.run).where(table.c.trial == claim.trial_id))
                if owner == self.run_id:
                    self._give_back(claim.trial_id, self.run_id)

        self._writer.flush()
        self._held.discard(claim.trial_id)
        self._next_look = 0.0
        retry_while_down(self.database, write)

    def elapsed_seconds(self) -> float:
        """Return for how much time any run has been at work on the study; runs side by side count once."""
        return elapsed_seconds(self.study.runs())

    # --- below: called under the study's lock unless said otherwise

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        return self.database.lock(f"study {self.study.name.partition('@')[0]}")

    def _claim(self) -> ClaimedTrial | None:
        with self._lock():
            if time.monotonic() >= self._next_look and (claim := self._claim_left()):
                return claim
            claim = self._claim_new() or self._claim_left()
            self.finished = claim is None and not self._is_elsewhere
            return claim

    def _claim_left(self) -> ClaimedTrial | None:
        """Look for what other runs left, or this one gave back. Not at each claim: it reads every unfinished trial."""
        self._is_elsewhere = self._take_over()
        claim = self._claim_waiting()
        if claim is None:
            self._next_look = time.monotonic() + LOOK_SECONDS
        return claim

    def _claim_new(self) -> ClaimedTrial | None:
        if self.draw is None:
            return self._claim_point()
        if self.exhausted or self._budget_is_spent():
            return None
        return self._claim_drawn(self.draw)

    def _take_over(self) -> bool:
        """Give back the trials of dead runs; return whether living runs still work on others."""
        running = self._trials(TrialState.RUNNING)
        if not running:
            return False
        table, owners = tables.trials, tables.runs
        now = self.database.seconds()
        query = (
            sa.select(table.c.trial, owners, now.label("now"))
            .join(owners, owners.c.run == table.c.run)
            .where(table.c.trial.in_([trial._trial_id for trial in running]))
        )
        with self.database.engine.connect() as connection:
            rows = {row.trial: row for row in connection.execute(query)}
        elsewhere = False
        mine = self._held | self._writer.unwritten()
        for trial in running:
            row = rows.get(trial._trial_id)
            if trial._trial_id in mine:
                continue
            if row is not None and row.run != self.run_id and not self._is_dead(row):
                elsewhere = True
                continue
            # A dead run's; or nobody's: its maker died, or lost the database, before it had said whose it is.
            with contextlib.suppress(UpdateFinishedTrialError):
                self._give_back(trial._trial_id, row.run if row is not None else None)
        return elsewhere

    def _is_dead(self, row: Any) -> bool:
        if row.host == host():
            # On this machine the process itself can be looked at; no need to wait for the lease.
            return is_process_dead(row)
        return bool(row.lease_until < row.now) and time.monotonic() >= self._no_takeover_before

    def _give_back(self, trial: int, owner: int | None) -> None:
        self.database.optuna_storage.set_trial_state_values(trial, TrialState.WAITING)
        table = tables.trials
        with self.database.engine.begin() as connection:
            connection.execute(
                table.update().where(table.c.trial == trial, table.c.run.is_not_distinct_from(owner)).values(run=None)
            )

    def _waiting(self) -> list[tuple[FrozenTrial, Any]]:
        """Return the queued trials, each with its row.

        A trial of a grid without one gets it here: its maker died in between. One that was being drawn when its maker died,
        or that was queued by hand through Optuna, may lack parameters, and is left to `ask`.
        """
        waiting = self._trials(TrialState.WAITING)
        rows = self._rows(trial._trial_id for trial in waiting)
        for trial in waiting:
            if trial._trial_id not in rows and self.draw is None and trial.params:
                self._register_or_fail(trial._trial_id, self.config_key(trial.params), run=None)
                rows |= self._rows([trial._trial_id])
        self._is_queued = any(trial._trial_id not in rows for trial in waiting)
        return [(trial, rows[trial._trial_id]) for trial in waiting if trial._trial_id in rows]

    def _claim_waiting(self) -> ClaimedTrial | None:
        # Interrupted trials first: they are nearest to a result.
        for trial, row in sorted(self._waiting(), key=lambda pair: (not pair[0].intermediate_values, pair[0].number)):
            claim = self._take(trial, row)
            if claim is not None and self.database.optuna_storage.set_trial_state_values(
                trial._trial_id, TrialState.RUNNING
            ):
                return claim
        return None

    def _take(self, trial: FrozenTrial, row: Any) -> ClaimedTrial | None:
        """Make a trial this run's, unless another one was faster."""
        table = tables.trials
        with self.database.engine.begin() as connection:
            taken = connection.execute(
                table.update()
                .where(table.c.trial == trial._trial_id, table.c.run.is_not_distinct_from(row.run))
                .values(run=self.run_id)
            ).rowcount
        if not taken:
            return None
        self._held.add(trial._trial_id)
        return ClaimedTrial(trial._trial_id, trial.number, trial.params, dict(trial.intermediate_values), row.crashes)

    def _claim_point(self) -> ClaimedTrial | None:
        """Make a trial of the next point that no run has taken."""
        while self._points:
            point = self._points[-1]
            key = self.config_key(point)
            if key not in self._known_keys and not self._is_known(key):
                active = {name: self._distributions[name] for name in point}
                template = create_trial(state=TrialState.RUNNING, params=point, distributions=active)
                trial = self.database.optuna_storage.create_new_trial(self.study.study_id, template)
                if self._register_or_fail(trial, key, run=self.run_id):
                    self._points.pop()
                    self._held.add(trial)
                    number = self.database.optuna_storage.get_trial_number_from_id(trial)
                    return ClaimedTrial(trial, number, point, {}, 0)
            self._points.pop()  # not before: what fails half-way is tried again from the same point
        return None

    def _claim_drawn(self, draw: Draw) -> ClaimedTrial | None:
        sampler = self.study.optuna_study.sampler
        try:
            return self._draw_until_new(draw)
        finally:
            self.study.optuna_study.sampler = sampler

    def _draw_until_new(self, draw: Draw) -> ClaimedTrial | None:
        duplicates = rejected = 0
        while duplicates < MAX_DUPLICATES and rejected < MAX_REJECTED:
            trial = self._new_trial()
            row = self._rows([trial._trial_id]).get(trial._trial_id)
            if row is not None:  # WAITING with a row: interrupted since this run last looked
                claim = self._take(self.database.optuna_storage.get_trial(trial._trial_id), row)
                if claim is not None:
                    return claim
                continue
            if duplicates + rejected == MAX_STUBBORN:
                # Samplers do not learn from what was never run: one that is sure of its point draws it for ever.
                self.study.optuna_study.sampler = optuna.samplers.RandomSampler(seed=trial.number)
            broken = draw(trial)
            if broken:
                self.database.optuna_storage.set_trial_user_attr(trial._trial_id, "constraint", broken)
                self._fail_unrun(trial._trial_id, REJECTED)
                rejected += 1
                continue
            if self._register_or_fail(trial._trial_id, self.config_key(trial.params), run=self.run_id):
                self._held.add(trial._trial_id)
                return ClaimedTrial(trial._trial_id, trial.number, trial.params, {}, 0)
            duplicates += 1
        self.exhausted = (
            f"{duplicates} draws in a row were all tried before"
            if duplicates == MAX_DUPLICATES
            else f"{rejected} draws in a row broke a constraint"
        )
        return None

    def _new_trial(self) -> optuna.Trial:
        """Return a trial to draw, one that is queued by hand or left half-made by the dead before a new one.

        `ask` takes what is queued first. It reads the whole study for that: for a sampler that does so anyway, no loss.
        """
        study = self.study.optuna_study
        if self.learns or self._is_queued:
            return study.ask()
        return optuna.Trial(study, study._storage.create_new_trial(self.study.study_id))

    def _register_or_fail(self, trial: int, key: str, run: int | None) -> bool:
        if self._register(trial, key, run):
            return True
        self._fail_unrun(trial, DUPLICATE)
        return False

    def _fail_unrun(self, trial: int, reason: str) -> None:
        self.database.optuna_storage.set_trial_user_attr(trial, "fail_reason", reason)
        self.database.optuna_storage.set_trial_state_values(trial, TrialState.FAIL)

    def _register(self, trial: int, key: str, run: int | None) -> bool:
        """Insert the trial's row; False if the study has that configuration already."""
        row = tables.trials.insert().values(trial=trial, study=self.study.study_id, key=key, run=run)
        try:
            with self.database.engine.begin() as connection:
                connection.execute(row)
        except IntegrityError:
            return False
        return True

    def _budget_is_spent(self) -> bool:
        if self.max_trials is None:
            return False
        table = tables.trials
        query = sa.select(sa.func.count()).where(table.c.study == self.study.study_id)
        with self.database.engine.connect() as connection:
            return int(connection.execute(query).scalar_one()) >= self.max_trials

    def _is_known(self, key: str) -> bool:
        table = tables.trials
        query = sa.select(table.c.trial).where(table.c.study == self.study.study_id, table.c.key == key)
        with self.database.engine.connect() as connection:
            return connection.scalar(query) is not None

    def _trials(self, state: TrialState) -> list[FrozenTrial]:
        return self.database.optuna_storage.get_all_trials(self.study.study_id, deepcopy=False, states=(state,))

    def _rows(self, trials: Iterable[int]) -> dict[int, Any]:
        table = tables.trials
        query = sa.select(table).where(table.c.trial.in_(list(trials)))
        with self.database.engine.connect() as connection:
            return {row.trial: row for row in connection.execute(query)}

    # --- without the lock

    def _keep_lease(self) -> None:
        table = tables.runs
        while not self._ended.wait(self.lease_seconds / 6):
            # The database may be away; the next beat tries again, and trials wait on their own in `retry_while_down`.
            with contextlib.suppress(Exception), self.database.engine.begin() as connection:
                now = self.database.seconds()
                mine = table.c.run == self.run_id
                lapsed = connection.scalar(sa.select(table.c.lease_until < now).where(mine))
                connection.execute(
                    table.update().where(mine).values(last_heard=now, lease_until=now + self.lease_seconds)
                )
                if lapsed:
                    # After an outage all leases have run out; let the other living runs renew theirs first.
                    self._no_takeover_before = time.monotonic() + self.lease_seconds

    def _end(self) -> None:
        table = tables.runs
        now = self.database.seconds()
        with self.database.engine.begin() as connection:
            connection.execute(
                table.update().where(table.c.run == self.run_id).values(ended=now, last_heard=now, lease_until=now)
            )
