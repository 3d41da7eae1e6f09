"""A run: one driver that works on a study. Any number of runs, on any number of machines, share a study's trials.

storage/README.md describes the states of a trial and the protocol of runs that share a study.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from storage import optuna_tables, reporting
from storage.database import Database
from storage.errors import RETRY_SECONDS, StorageError, UnavailableError, retry_while_down
from storage.lease import LEASE_SECONDS, MAX_FAILURES, Lease, is_run_alive
from storage.ownership import ClaimedTrial
from storage.pareto import Direction
from storage.population import are_others_behind
from storage.promotion import PromotingHalving
from storage.pruners import Decision, Pruner
from storage.queue import ConfigKey, Draw, ListPoints, TrialQueue
from storage.ranking import count_created_since, count_since_best
from storage.records import REPLACED_BY, Params
from storage.reporting import TrialUpdate
from storage.study import Study, without_garbage_collection
from storage.summaries import elapsed_seconds
from storage.usage import CPU, Device, Meter, read_device_seconds
from storage.writer import Writer

EXIT_SECONDS = 20.0  # how long leaving a run waits for the database, all operations together
END_SECONDS = 2.0  # of them, for the end of the lease: what cannot be written must not keep it from being stored
OTHERS_SECONDS = 1.0  # between two looks at the device time of other runs


class Run:
    """One driver that works on a study. A context manager: it holds its lease inside the `with` block.

    All methods raise StorageError when the database cannot be used (after retries).

    Args:
        study: the study.
        config_key: returns the identity of a configuration. A study finishes each key at most once.
        provenance: versions and command of the run, for a replay.
        draw: draws the params of a new trial once no trial waits; None for a grid, whose points are all enqueued.
        list_points: returns all configurations that may be drawn; None if there are too many. If draws find known ones only,
            a trial gets one of those that the study lacks, if `enqueue` has set the distributions.
        max_trials: the budget of the study; None for no limit.
        learns: whether draws depend on results: then `claim` first writes all reports to the database.
        history_limit: how many finished trials the sampler sees at most, see `storage.history`; None for all.
        pruner: ends trials early; None for none.
        max_failures: how often a trial is resumed after its driver died without finishing an epoch of it.
        lease_seconds: how long other machines assume that the run is alive after its last renewal of the lease.
        takes_turns: whether all trials of the budget are created first, and then those with the fewest epochs are claimed,
            so that the members of a population advance together.
    """

    def __init__(
        self,
        study: Study,
        *,
        config_key: ConfigKey,
        provenance: Mapping[str, Any],
        draw: Draw | None = None,
        list_points: ListPoints = lambda: None,
        max_trials: int | None = None,
        learns: bool = True,
        history_limit: int | None = None,
        pruner: Pruner | None = None,
        max_failures: int = MAX_FAILURES,
        lease_seconds: float = LEASE_SECONDS,
        takes_turns: bool = False,
    ) -> None:
        self.study = study
        self._config_key = config_key
        self._draw = draw
        self._list_points = list_points
        self._max_trials = max_trials
        self._promotion = pruner if isinstance(pruner, PromotingHalving) else None
        self._learns = learns or self._promotion is not None  # which trial trains on depends on results, too
        self._history_limit = history_limit
        self._pruner = pruner
        self._takes_turns = takes_turns
        self._crashes: dict[int, int] = {}  # {token: crashes}
        # Of the best trial when trials were counted last; None if an earlier one ran then, which may become the best.
        self._best_number: int | None = None
        self._leaves_at: float | None = None  # by the monotonic clock
        self._lease = Lease(
            study.database,
            study.key,
            provenance=provenance,
            lease_seconds=lease_seconds,
            max_failures=max_failures,
        )
        self._meter = Meter()
        self._others_seconds, self._others_read_at = 0.0, -math.inf  # device-seconds; by the monotonic clock
        self._writer: Writer
        self._queue: TrialQueue

    def __enter__(self) -> Run:
        self._lease.start()
        self._writer = Writer(self.study, self._pruner, self._meter)
        self._queue = TrialQueue(
            self.study,
            self._lease,
            config_key=self._config_key,
            draw=self._draw,
            list_points=self._list_points,
            max_trials=self._max_trials,
            history_limit=self._history_limit,
            is_settled=self._writer.is_settled,
            takes_turns=self._takes_turns,
            promotion=self._promotion,
        )
        try:
            if self._pruner is not None:
                retry_while_down(self.database, self._prepare_pruner)
            self.database.close_idle()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _prepare_pruner(self) -> None:
        with self.database.transaction() as connection:
            if self._pruner is not None and optuna_tables.lock_study(connection, self.study.key):
                self._pruner.prepare(connection, self.study.study_id)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Best effort: a caller that must know uses `flush`, and the lease expires if the database stays down.
        self.leave()
        self._meter.stop_all()
        try:
            with contextlib.suppress(StorageError):
                self.flush()
        finally:
            self._lease.stop()
            with contextlib.suppress(StorageError):
                self._before_leaving(self._lease.end, reserve_seconds=0.0)
        self._writer.close(self._seconds_left())

    def leave(self) -> None:
        """Wait for the database no longer than `EXIT_SECONDS` from now on, all operations until the end of the run together.

        Callers that end a run early call it before their last operations; the end of the `with` block calls it, too.
        """
        if self._leaves_at is None:
            self._leaves_at = time.monotonic() + EXIT_SECONDS
            self._writer.stop()

    def _seconds_left(self) -> float:
        return RETRY_SECONDS if self._leaves_at is None else max(0.0, self._leaves_at - time.monotonic())

    def _before_leaving(self, operation: Callable[[float], None], reserve_seconds: float = END_SECONDS) -> None:
        """Run an operation, which takes the seconds for which it is retried. A run that leaves waits for it that long only.

        A single statement may wait for a minute, for a lock of SQLite or for a server behind a network that drops packets. A
        thread that is left behind does no harm: a token fences what it writes.

        Raises:
            UnavailableError: the run leaves, and the operation has not ended in time.
        """
        if self._leaves_at is None:
            operation(RETRY_SECONDS)
            return
        seconds = max(0.0, self._seconds_left() - reserve_seconds)
        errors: list[Exception] = []

        def run() -> None:
            try:
                operation(seconds)
            except Exception as error:  # noqa: BLE001 # raised below
                errors.append(error)

        thread = threading.Thread(target=run, name="hpo-exit", daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            raise UnavailableError(f"{self.database.url}: no answer within {EXIT_SECONDS:g} s")
        if errors:
            raise errors[0]

    @property
    def database(self) -> Database:
        """The study's database."""
        return self.study.database

    @property
    def run_id(self) -> int:
        """The run's key in hpo_runs; -1 before the `with` block."""
        return self._lease.key.run_id

    @property
    def finished(self) -> bool:
        """Whether the last `claim` found that no run will get a trial again."""
        return self._queue.finished

    @property
    def exhausted(self) -> str:
        """Why `claim` draws no more trials although the budget allows it; empty while it does."""
        return self._queue.exhausted

    @property
    def others_are_running(self) -> bool:
        """Whether other living runs worked on trials when the last `claim` found none."""
        return self._queue.others_are_running

    def has_others(self) -> bool:
        """Return whether other living runs work on the study, with or without a trial."""
        return any(run.run != self.run_id and is_run_alive(run) for run in self.study.runs())

    def take_stopped(self) -> dict[int, int]:
        """Return {number: epoch} of trials that waited at a rung, and that claims of this run have ended; each once.

        They are PRUNED: no other trial trains any more, and others are better.
        """
        return self._queue.take_stopped()

    def enqueue(
        self,
        points: Iterable[Params],
        distributions: Mapping[str, BaseDistribution],
        attrs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Set the points of a grid, or those that come before others are drawn.

        `claim` returns them in this order and skips those that the study already has. A point becomes a trial when it is
        claimed.

        Args:
            points: the configurations.
            distributions: {name: distribution} of all params.
            attrs: {key: user attributes} of the trials of some points, stored when they are created.
        """
        self._queue.enqueue(points, distributions, attrs)

    def claim(self, *, new: bool = True, device: Device = CPU) -> ClaimedTrial | None:
        """Return a trial to work on: an interrupted one, an enqueued one or a new one; None if there is none now.

        After None, `finished` says whether there will ever be one.

        Args:
            new: whether a trial may be created. Otherwise only those that wait are claimed, and `finished` stays as it is.
            device: what the trial holds while a worker runs it.
        """
        claim = self._claim(new=new, device=device)
        if claim is not None:
            self._meter.open(claim.account, device.count)
        return claim

    def _claim(self, *, new: bool, device: Device) -> ClaimedTrial | None:
        if self._learns:
            self._writer.flush()
        with self._writer.paused(), without_garbage_collection():
            claim = self._queue.claim(new=new, device=device)
        if claim is None and not self._learns:
            self._writer.flush()
            if self._queue.finished:
                # What was flushed just now may have lost its claim, as to a restored copy: then its trial waits.
                with self._writer.paused(), without_garbage_collection():
                    claim = self._queue.claim(new=new, device=device)
        return claim

    def flush(self) -> None:
        """Return when all updates so far are in the database, and the device time of trials that hold no device any more."""
        self._before_leaving(self._writer.flush)

    def report(self, claim: ClaimedTrial, epoch: int, metrics: Mapping[str, float], value: float) -> None:
        """Store one finished epoch. Idempotent.

        An epoch that storage holds already may have been trained again, because the checkpoint was lost. If its value
        differs, the stored epochs from it on are of the abandoned attempt, and are deleted.

        Raises:
            LostTrialError: the claim does not hold any more.
        """
        self._writer.put(self._update(claim, epoch, metrics, value))

    def decide(
        self,
        claim: ClaimedTrial,
        epoch: int,
        metrics: Mapping[str, float],
        value: float,
        *,
        first_epoch: int = 1,
        again: bool = False,
    ) -> Decision:
        """Store one finished epoch, and what the pruner decides: both, or neither.

        An epoch that storage holds with the same value was decided when it was stored.

        Args:
            claim: the trial.
            epoch: the epoch, from 1.
            metrics: {name: value} of the epoch.
            value: the objective, finite.
            first_epoch: the first epoch that is judged: those before were trained by a trial that this one continues.
            again: whether an epoch that was decided is decided once more, because others have reached it since.

        Returns:
            What becomes of the trial. One that is to wait must be given back with `release`.

        Raises:
            LostTrialError: the claim does not hold any more.
        """
        is_decided = claim.values.get(epoch) == value and not again
        update = self._update(claim, epoch, metrics, value)
        self._writer.put(replace(update, decides=not is_decided, first_epoch=first_epoch))
        if is_decided:  # its worker may have died before it had saved the epoch after which it waits
            return self._writer.decision(claim)
        self._writer.flush()
        self._writer.check(claim)
        decision = self._writer.decision(claim)
        if decision is Decision.END:
            self.free_device(claim)
        return decision

    def replacement(self, claim: ClaimedTrial) -> int | None:
        """Return the number of the trial that has taken the place of one that `decide` has ended; None without one."""

        def read() -> Any:
            with self.database.engine.connect() as connection:
                return optuna_tables.read_attrs(connection, claim.trial_id).get(REPLACED_BY)

        found = retry_while_down(self.database, read)
        number = found.get("trial") if isinstance(found, dict) else None
        return number if isinstance(number, int) else None

    def are_others_behind(self, epoch: int, population: int) -> bool:
        """Return whether members of a population wait that have fewer epochs than this, or have not been created."""

        def read() -> bool:
            with self.database.engine.connect() as connection:
                return are_others_behind(connection, self.study.study_id, epoch, population)

        return retry_while_down(self.database, read)

    def _update(self, claim: ClaimedTrial, epoch: int, metrics: Mapping[str, float], value: float) -> TrialUpdate:
        known = claim.values
        is_same = epoch in known and repr(known[epoch]) == repr(value)  # by text: NaN equals NaN here
        abandoned = [] if is_same else [each for each in known if each >= epoch]
        for each in abandoned:
            del known[each]
        before = [each for each in known if each < epoch]
        follows = {max(before): known[max(before)]} if before else {}
        known[epoch] = value
        return TrialUpdate(claim, epoch, dict(metrics), value, follows=follows, is_restart=bool(abandoned))

    def record(
        self, claim: ClaimedTrial, attrs: Mapping[str, Any], provenance: Mapping[str, Any] | None = None
    ) -> None:
        """Store user attributes of a trial, and its provenance: on which device, with what data it runs."""
        self._writer.put(TrialUpdate(claim, attrs=dict(attrs), provenance=provenance))

    def record_crash(self, claim: ClaimedTrial) -> int:
        """Count one more worker that died while it trained a trial; return how many did, drivers included."""
        self.free_device(claim)
        crashes = self._crashes[claim.token] = self._crashes.get(claim.token, claim.crashes) + 1
        retry_while_down(self.database, lambda: reporting.count_crashes(self.database, claim, crashes))
        return crashes

    def complete(
        self,
        claim: ClaimedTrial,
        value: float,
        attrs: Mapping[str, Any] | None = None,
        *,
        other_values: tuple[float, ...] = (),
    ) -> None:
        """Finish a trial that reached its last epoch.

        Args:
            claim: the trial.
            value: its objective, the first one of several.
            attrs: user attributes.
            other_values: its other objectives.
        """
        self.free_device(claim)
        self._writer.put(
            TrialUpdate(
                claim,
                value=value,
                other_values=other_values,
                follows=_last(claim),
                attrs=attrs or {},
                final_state=TrialState.COMPLETE,
            )
        )

    def fail(self, claim: ClaimedTrial, reason: str, traceback: str = "") -> None:
        """Finish a trial that failed. `reason` is one line."""
        self.free_device(claim)
        attrs = {"fail_reason": reason} | ({"traceback": traceback[-2000:]} if traceback else {})
        self._writer.put(TrialUpdate(claim, follows=_last(claim), attrs=attrs, final_state=TrialState.FAIL))

    def release(self, claim: ClaimedTrial) -> None:
        """Set an unfinished trial to WAITING: any run may resume it. Do nothing if the claim does not hold any more."""
        self.free_device(claim)
        self.flush()
        self._before_leaving(lambda seconds: self._queue.release(claim, seconds))

    def hold_device(self, claim: ClaimedTrial) -> None:
        """Count device time for a trial from now on: a worker runs it. Idempotent."""
        self._meter.start(claim.account)

    def free_device(self, claim: ClaimedTrial) -> None:
        """Count no device time for a trial from now on: no worker runs it. Ending or releasing a trial does so, too."""
        self._meter.stop(claim.account)

    def device_seconds(self) -> float:
        """Return the device-seconds that the study has used: of this run until now, of others as they have stored it.

        Others store theirs with each report, and every `usage.STORE_SECONDS`. It is read every `OTHERS_SECONDS` at most.
        """
        study_id, now = self.study.study_id, time.monotonic()
        if now - self._others_read_at >= OTHERS_SECONDS:
            found = retry_while_down(
                self.database, lambda: read_device_seconds(self.database, study_id, without_run=self.run_id)
            )
            self._others_seconds, self._others_read_at = found.get(study_id, 0.0), now
        return self._others_seconds + self._meter.device_seconds

    def is_patience_spent(self, patience: int, directions: Sequence[Direction]) -> bool:
        """Return whether this many trials have ended without a better value, see `ranking.count_since_best`."""
        self.flush()
        # Counting takes tens of milliseconds in a large study. There is no need before enough trials exist.
        if self._best_number is not None and count_created_since(self.study, self._best_number) < patience:
            return False
        found = count_since_best(self.study, directions)
        self._best_number = None if found.has_earlier else found.best
        return found.ended >= patience

    def elapsed_seconds(self) -> float:
        """Return for how long any run has worked on the study. Simultaneous runs count once."""
        return elapsed_seconds(self.study.runs())


def _last(claim: ClaimedTrial) -> dict[int, float]:
    """Return {epoch: value} of a trial's last reported epoch; empty if there is none."""
    return {claim.epoch: claim.values[claim.epoch]} if claim.values else {}
