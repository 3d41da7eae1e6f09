"""Open and resume studies; share their trials between runs.

Who may do what at the same time:

- A `Run` is one driver at work. Any number of runs, on any number of machines, may work on one study.
- A trial belongs to at most one run. It is taken by a compare-and-set on hpo_trials.run, so two runs never both get it,
  even where the lock below was lost with the database server.
- Asking for a trial happens under a lock of the study: budgets are exact, and half-made trials are the traces of the dead.
- A run holds a lease and renews it from a thread. Trials of a run whose lease has run out, or whose process is known to be
  dead, go back to WAITING with all they have reported, and the next run goes on with them.
- A run that lost a trial (it slept through its lease) is told so by LostTrialError and must write nothing more about it.

States: WAITING is queued or interrupted and resumable; RUNNING belongs to a run; COMPLETE reached its last epoch;
PRUNED was stopped by the pruner; FAIL carries the user attribute `fail_reason`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import optuna
import psutil
import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import IntegrityError

from storage import records
from storage.database import Database, StorageError, patiently

LEASE_SECONDS = 60.0
DUPLICATE = "duplicate of an earlier trial"
REJECTED = "breaks a constraint"
NEVER_RUN = {DUPLICATE, REJECTED}  # what a sampler drew, and no one was given
MAX_DUPLICATES = 20  # draws in a row that were all tried before: the space is taken to be exhausted
MAX_REJECTED = 500  # draws in a row that were all refused

Params = dict[str, Any]
KeyOf = Callable[[Mapping[str, Any]], str]
# Draws a configuration for a trial, or the rest of one; returns why it must not be run, empty if it may.
Draw = Callable[[optuna.Trial], str]


class LostTrialError(Exception):
    """Another run has taken the trial over; whatever this one knows of it is no longer wanted."""


@dataclass(frozen=True)
class Claim:
    """A trial that belongs to this run.

    Attributes:
        trial: Optuna's trial_id, unique in the database.
        number: its number in the study.
        params: the configuration.
        values: {epoch: value} of the objective, as reported before an interruption.
        crashes: how many workers have died over it.
    """

    trial: int
    number: int
    params: Params
    values: dict[int, float]
    crashes: int

    @property
    def epoch(self) -> int:
        """The last epoch that storage holds; 0 for a fresh trial."""
        return max(self.values, default=0)


@dataclass(frozen=True)
class Study:
    """A study in a database, for reading and for starting runs on.

    Attributes:
        name: the study's name; a later revision of a changed space is `name@2`.
        study: its study_id.
        optuna: Optuna's view of it.
    """

    database: Database
    name: str
    study: int
    optuna: optuna.Study

    @property
    def attrs(self) -> dict[str, Any]:
        """The attributes that the study was made with."""
        return patiently(self.database, lambda: self.optuna.user_attrs)

    def trials(self) -> list[FrozenTrial]:
        """Return all trials by number."""
        return patiently(self.database, lambda: self.optuna.get_trials(deepcopy=False))

    def run_trials(self) -> list[FrozenTrial]:
        """Return the trials that were run or are to be: without draws that were duplicates or broke a constraint."""
        return [trial for trial in self.trials() if trial.user_attrs.get("fail_reason") not in NEVER_RUN]

    def count_ended(self) -> int:
        """Return how many trials have ended."""
        return sum(trial.state.is_finished() for trial in self.run_trials())

    def metrics(self) -> dict[int, records.Metrics]:
        """Return {trial number: {epoch: {name: value}}}."""
        by_trial = patiently(self.database, lambda: records.read_metrics(self.database, self.study))
        return {trial.number: by_trial.get(trial._trial_id, {}) for trial in self.trials()}

    def provenance(self, number: int) -> dict[str, Any]:
        """Return what is needed to run a trial again."""
        trial = self.trials()[number]._trial_id
        return patiently(self.database, lambda: records.read_provenance(self.database, trial))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the study was opened with."""
        settings: dict[str, Any] = self.attrs.get("hpo:settings", {})
        return settings

    @property
    def unique_name(self) -> str:
        """A name that no other study has, in this database or any other: what lies on disk is kept under it."""
        return f"{self.name}-{self.attrs['hpo:id']}"

    @property
    def metric(self) -> str:
        """The name of the metric that the study optimizes."""
        return str(self.settings.get("metric", "value"))


def study_names(database: Database) -> list[str]:
    """Return the names of all studies, oldest first."""
    summaries = patiently(database, lambda: database.optuna.get_all_studies())
    return [summary.study_name for summary in summaries]


def find_study(database: Database, name: str) -> Study | None:
    """Return a study by name, or None. A name without a revision means the latest one."""
    revisions = _revisions(database, name.partition("@")[0])
    if "@" in name:
        return _load(database, name) if name in revisions else None
    return _load(database, revisions[-1]) if revisions else None


def find_revision(database: Database, name: str, fingerprint: str) -> Study | None:
    """Return the revision of a study that has this fingerprint, or None.

    Raises:
        StorageError: the name is taken by a study of another program.
    """
    for known in _revisions(database, name):
        study = _load(database, known)
        found = study.attrs.get("hpo:fingerprint")
        if found is None and study.trials():
            raise StorageError(
                f"the study {known!r} in {database.url} was made by another program; rename the search space, or name "
                "another database by --storage"
            )
        if found in {None, fingerprint}:
            return study
    return None


def open_study(
    database: Database,
    name: str,
    *,
    direction: Literal["maximize", "minimize"],
    fingerprint: str,
    settings: Mapping[str, Any],
) -> Study:
    """Return the revision of a study that has this fingerprint; create it where there is none.

    Args:
        name: the first revision's name; later ones are `name@2`, `name@3`, ...
        direction: maximize or minimize.
        fingerprint: the identity of the search; results of different fingerprints never mix.
        settings: plain values to keep with the study.
    """

    def open_or_create() -> Study:
        with database.lock(f"study {name}"):
            study = find_revision(database, name, fingerprint)
            if study is None:
                revisions = _revisions(database, name)
                new = f"{name}@{_revision(revisions[-1]) + 1}" if revisions else name
                optuna.create_study(storage=database.optuna, study_name=new, direction=direction)
                study = _load(database, new)
            # New, or its creator died before it had said what it is.
            if "hpo:fingerprint" not in study.attrs:
                study.optuna.set_user_attr("hpo:settings", dict(settings))
                study.optuna.set_user_attr("hpo:id", uuid.uuid4().hex[:12])
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    # The axis of the dashboard's plots.
                    study.optuna.set_metric_names([str(settings.get("metric", "value"))])
                study.optuna.set_user_attr("hpo:fingerprint", fingerprint)  # last: with it, the study is complete
            return study

    return patiently(database, open_or_create)


def _load(database: Database, name: str) -> Study:
    study = patiently(database, lambda: optuna.load_study(study_name=name, storage=database.optuna))
    return Study(database, name, study._study_id, study)


def _revisions(database: Database, name: str) -> list[str]:
    return sorted((known for known in study_names(database) if known.partition("@")[0] == name), key=_revision)


def _revision(name: str) -> int:
    return int(name.partition("@")[2] or 1)


# --- a run: one driver at work --------------------------------------------------------------------------------------


@dataclass
class Run:
    """One driver at work on a study. A context manager: the lease lives inside the `with`.

    Attributes:
        study: the study.
        key_of: the identity of a configuration.
        draw: what fills a new trial when the queue is empty; None for a grid, which is all queue.
        max_trials: the study holds at most so many trials, those never run not counted.
        lease_seconds: how long the run is trusted to be alive after it was last heard of.
        finished: set by `claim`: nothing is left to do, here or in any other run.
        exhausted: set by `claim`: why no more trials are drawn, though there is budget; empty while they are.
    """

    study: Study
    key_of: KeyOf
    provenance: Mapping[str, Any]
    draw: Draw | None = None
    max_trials: int | None = None
    lease_seconds: float = LEASE_SECONDS
    finished: bool = False
    exhausted: str = ""
    run: int = field(default=-1, init=False)
    _held: set[int] = field(default_factory=set, init=False)
    _ended: threading.Event = field(default_factory=threading.Event, init=False)
    _no_takeover_before: float = field(default=0.0, init=False)

    def __enter__(self) -> Run:
        database = self.database

        def start() -> int:
            now = database.seconds()
            row = sa.insert(records.runs).values(
                study=self.study.study,
                host=_host(),
                pid=os.getpid(),
                process_started=psutil.Process().create_time(),
                started=now,
                last_heard=now,
                lease_until=now + self.lease_seconds,
                provenance=dict(self.provenance),
            )
            with database.engine.begin() as connection:
                return int(connection.execute(row.returning(records.runs.c.run)).scalar_one())

        self.run = patiently(database, start)
        threading.Thread(target=self._keep_lease, name="hpo-lease", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        # A short patience: the lease runs out by itself where the database is away.
        with contextlib.suppress(StorageError):
            patiently(self.database, self._end, patience=5.0)

    @property
    def database(self) -> Database:
        """The study's database."""
        return self.study.database

    def enqueue(self, points: Iterable[Params], distributions: Mapping[str, BaseDistribution]) -> None:
        """Queue the configurations that the study does not have yet."""

        def enqueue() -> None:
            with self._lock():
                known = self._known_keys()
                for point in points:
                    key = self.key_of(point)
                    if key in known:
                        continue
                    active = {name: distributions[name] for name in point}
                    template = create_trial(state=TrialState.WAITING, params=point, distributions=active, user_attrs={})
                    trial = self.database.optuna.create_new_trial(self.study.study, template)
                    self._register(trial, key, run=None)

        points = list(points)
        patiently(self.database, enqueue)

    def claim(self) -> Claim | None:
        """Return a trial to work on: an interrupted one, a queued one, or a new one; None if there is none now.

        With None, `finished` says whether there ever will be one.
        """
        return patiently(self.database, self._claim)

    def report(self, claim: Claim, epoch: int, metrics: Mapping[str, float], value: float) -> None:
        """Store one finished epoch. May be repeated.

        Raises:
            LostTrialError: the trial belongs to another run by now.
        """

        def write() -> None:
            with self.database.engine.begin() as connection:
                self._check_owner(connection, claim)
                records.write_metrics(connection, claim.trial, epoch, metrics)
            self.database.optuna.set_trial_intermediate_value(claim.trial, epoch, value)

        patiently(self.database, write)

    def should_prune(self, claim: Claim) -> bool:
        """Ask the study's pruner whether to stop a trial after its latest report."""
        study = self.study.optuna
        return patiently(self.database, lambda: study.pruner.prune(study, self.database.optuna.get_trial(claim.trial)))

    def record_provenance(self, claim: Claim, provenance: Mapping[str, Any]) -> None:
        """Store where and on what a trial runs."""
        table = records.trials

        def write() -> None:
            with self.database.engine.begin() as connection:
                self._check_owner(connection, claim)
                connection.execute(
                    table.update().where(table.c.trial == claim.trial).values(provenance=dict(provenance))
                )

        patiently(self.database, write)

    def record_attr(self, claim: Claim, name: str, value: Any) -> None:
        """Store an attribute of a trial, for people and for a replay."""

        def write() -> None:
            with self.database.engine.begin() as connection:
                self._check_owner(connection, claim)
            self.database.optuna.set_trial_user_attr(claim.trial, name, value)

        patiently(self.database, write)

    def record_crash(self, claim: Claim) -> None:
        """Count one more worker that died over a trial."""
        table = records.trials

        def write() -> None:
            with self.database.engine.begin() as connection:
                connection.execute(
                    table.update().where(table.c.trial == claim.trial).values(crashes=table.c.crashes + 1)
                )

        patiently(self.database, write)

    def complete(self, claim: Claim, value: float, attrs: Mapping[str, Any] | None = None) -> None:
        """Finish a trial that reached its last epoch."""
        self._finish(claim, TrialState.COMPLETE, value, attrs or {})

    def prune(self, claim: Claim, attrs: Mapping[str, Any] | None = None) -> None:
        """Finish a trial that the pruner stopped; its value is its last reported one."""
        self._finish(claim, TrialState.PRUNED, None, attrs or {})

    def fail(self, claim: Claim, reason: str, traceback: str = "") -> None:
        """Finish a trial that failed, with the reason in one line."""
        attrs = {"fail_reason": reason} | ({"traceback": traceback[-2000:]} if traceback else {})
        self._finish(claim, TrialState.FAIL, None, attrs)

    def release(self, claim: Claim) -> None:
        """Give an unfinished trial back; any run may go on with it."""

        def write() -> None:
            with contextlib.suppress(UpdateFinishedTrialError):
                with self.database.engine.begin() as connection:
                    self._check_owner(connection, claim)
                self._give_back(claim.trial, self.run)

        self._held.discard(claim.trial)
        with contextlib.suppress(LostTrialError):
            patiently(self.database, write)

    def spent_seconds(self) -> float:
        """Return for how much time any run has been at work on the study; runs side by side count once."""
        table = records.runs
        query = sa.select(table.c.started, table.c.last_heard).where(table.c.study == self.study.study)

        def read() -> list[Any]:
            with self.database.engine.connect() as connection:
                return list(connection.execute(query.order_by(table.c.started)))

        spent, covered = 0.0, 0.0
        for started, last_heard in patiently(self.database, read):
            spent += max(0.0, last_heard - max(started, covered))
            covered = max(covered, last_heard)
        return spent

    # --- below: called under the study's lock unless said otherwise

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        return self.database.lock(f"study {self.study.name.partition('@')[0]}")

    def _claim(self) -> Claim | None:
        with self._lock():
            elsewhere = self._take_over()
            claim = self._claim_waiting()
            if claim is None and self.draw is not None and not self.exhausted and not self._budget_is_spent():
                claim = self._claim_sampled(self.draw)
            self.finished = claim is None and not elsewhere
            return claim

    def _take_over(self) -> bool:
        """Give back the trials of dead runs; return whether living runs still work on others."""
        running = self._trials(TrialState.RUNNING)
        if not running:
            return False
        table, owners = records.trials, records.runs
        now = self.database.seconds()
        query = (
            sa.select(table.c.trial, owners, now.label("now"))
            .join(owners, owners.c.run == table.c.run)
            .where(table.c.trial.in_([trial._trial_id for trial in running]))
        )
        with self.database.engine.connect() as connection:
            rows = {row.trial: row for row in connection.execute(query)}
        elsewhere = False
        for trial in running:
            row = rows.get(trial._trial_id)
            if trial._trial_id in self._held:
                continue
            if row is not None and row.run != self.run and not self._is_dead(row):
                elsewhere = True
                continue
            # A dead run's; or nobody's: its maker died, or lost the database, before it had said whose it is.
            with contextlib.suppress(UpdateFinishedTrialError):
                self._give_back(trial._trial_id, row.run if row is not None else None)
        return elsewhere

    def _is_dead(self, row: Any) -> bool:
        if row.host == _host():
            # On this machine the process itself can be looked at; no need to wait for the lease.
            try:
                process = psutil.Process(row.pid)
                is_other = abs(process.create_time() - row.process_started) > 1.0  # the number was given out again
                return is_other or bool(process.status() == psutil.STATUS_ZOMBIE)
            except psutil.NoSuchProcess:
                return True
        return bool(row.lease_until < row.now) and time.monotonic() >= self._no_takeover_before

    def _give_back(self, trial: int, owner: int | None) -> None:
        self.database.optuna.set_trial_state_values(trial, TrialState.WAITING)
        table = records.trials
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
                self._register_or_fail(trial, self.key_of(trial.params), run=None)
                rows |= self._rows([trial._trial_id])
        return [(trial, rows[trial._trial_id]) for trial in waiting if trial._trial_id in rows]

    def _claim_waiting(self) -> Claim | None:
        table = records.trials
        # Interrupted trials first: they are nearest to a result.
        for trial, row in sorted(self._waiting(), key=lambda pair: (not pair[0].intermediate_values, pair[0].number)):
            with self.database.engine.begin() as connection:
                taken = connection.execute(
                    table.update()
                    .where(table.c.trial == trial._trial_id, table.c.run.is_not_distinct_from(row.run))
                    .values(run=self.run)
                ).rowcount
            if taken and self.database.optuna.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                self._held.add(trial._trial_id)
                return Claim(trial._trial_id, trial.number, trial.params, dict(trial.intermediate_values), row.crashes)
        return None

    def _claim_sampled(self, draw: Draw) -> Claim | None:
        duplicates = rejected = 0
        while duplicates < MAX_DUPLICATES and rejected < MAX_REJECTED:
            # Half-made trials of the dead, and trials queued by hand, are WAITING without a row: ask() takes them first.
            trial = self.study.optuna.ask()
            broken = draw(trial)
            if broken:
                self.database.optuna.set_trial_user_attr(trial._trial_id, "constraint", broken)
                self._fail_unrun(trial._trial_id, REJECTED)
                rejected += 1
                continue
            frozen = self.database.optuna.get_trial(trial._trial_id)
            if self._register_or_fail(frozen, self.key_of(trial.params), run=self.run):
                self._held.add(trial._trial_id)
                return Claim(trial._trial_id, trial.number, trial.params, {}, 0)
            duplicates += 1
        self.exhausted = (
            f"{duplicates} draws in a row were all tried before"
            if duplicates == MAX_DUPLICATES
            else f"{rejected} draws in a row broke a constraint"
        )
        return None

    def _register_or_fail(self, trial: FrozenTrial, key: str, run: int | None) -> bool:
        if self._register(trial._trial_id, key, run):
            return True
        self._fail_unrun(trial._trial_id, DUPLICATE)
        return False

    def _fail_unrun(self, trial: int, reason: str) -> None:
        self.database.optuna.set_trial_user_attr(trial, "fail_reason", reason)
        self.database.optuna.set_trial_state_values(trial, TrialState.FAIL)

    def _register(self, trial: int, key: str, run: int | None) -> bool:
        """Insert the trial's row; False if the study has that configuration already."""
        row = records.trials.insert().values(trial=trial, study=self.study.study, key=key, run=run)
        try:
            with self.database.engine.begin() as connection:
                connection.execute(row)
        except IntegrityError:
            return False
        return True

    def _budget_is_spent(self) -> bool:
        if self.max_trials is None:
            return False
        table = records.trials
        query = sa.select(sa.func.count()).where(table.c.study == self.study.study)
        with self.database.engine.connect() as connection:
            return int(connection.execute(query).scalar_one()) >= self.max_trials

    def _known_keys(self) -> set[str]:
        self._waiting()
        table = records.trials
        with self.database.engine.connect() as connection:
            return set(connection.scalars(sa.select(table.c.key).where(table.c.study == self.study.study)))

    def _trials(self, state: TrialState) -> list[FrozenTrial]:
        return self.database.optuna.get_all_trials(self.study.study, deepcopy=False, states=(state,))

    def _rows(self, trials: Iterable[int]) -> dict[int, Any]:
        table = records.trials
        query = sa.select(table).where(table.c.trial.in_(list(trials)))
        with self.database.engine.connect() as connection:
            return {row.trial: row for row in connection.execute(query)}

    # --- without the lock

    def _finish(self, claim: Claim, state: TrialState, value: float | None, attrs: Mapping[str, Any]) -> None:
        def write() -> None:
            with self.database.engine.begin() as connection:
                self._check_owner(connection, claim)
            with contextlib.suppress(UpdateFinishedTrialError):  # written before, but the answer was lost
                for name, attr in attrs.items():
                    self.database.optuna.set_trial_user_attr(claim.trial, name, attr)
                self.study.optuna.tell(claim.number, value, state=state, skip_if_finished=True)

        patiently(self.database, write)
        self._held.discard(claim.trial)

    def _check_owner(self, connection: sa.Connection, claim: Claim) -> None:
        table = records.trials
        owner = connection.scalar(sa.select(table.c.run).where(table.c.trial == claim.trial).with_for_update())
        if owner != self.run:
            self._held.discard(claim.trial)
            raise LostTrialError(f"trial {claim.number} was taken over by another run")

    def _keep_lease(self) -> None:
        table = records.runs
        while not self._ended.wait(self.lease_seconds / 6):
            # The database may be away; the next beat tries again, and trials wait on their own in `patiently`.
            with contextlib.suppress(Exception), self.database.engine.begin() as connection:
                now = self.database.seconds()
                mine = table.c.run == self.run
                lapsed = connection.scalar(sa.select(table.c.lease_until < now).where(mine))
                connection.execute(
                    table.update().where(mine).values(last_heard=now, lease_until=now + self.lease_seconds)
                )
                if lapsed:
                    # After an outage all leases have run out; let the other living runs renew theirs first.
                    self._no_takeover_before = time.monotonic() + self.lease_seconds

    def _end(self) -> None:
        table = records.runs
        now = self.database.seconds()
        with self.database.engine.begin() as connection:
            connection.execute(
                table.update().where(table.c.run == self.run).values(ended=now, last_heard=now, lease_until=now)
            )


def _host() -> str:
    """Return this machine's identity: host name, boot, and the space in which its process numbers hold."""
    parts = [platform.node()]
    for source in (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")):
        with contextlib.suppress(OSError):
            parts.append(source.readlink().name if source.is_symlink() else source.read_text().strip())
    return "/".join(parts)
