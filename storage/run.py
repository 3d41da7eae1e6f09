"""A run: one driver that works on a study. Any number of runs, on any number of machines, share a study's trials.

storage/README.md describes the states of a trial and which run may do what at the same time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from storage import tables
from storage.database import RETRY_SECONDS, Database, StorageError, retry_while_down
from storage.lease import LEASE_SECONDS, Lease
from storage.queue import ConfigKey, Draw, TrialQueue
from storage.studies import Params, Study, elapsed_seconds, without_garbage_collection
from storage.writer import ClaimedTrial, TrialUpdate, Writer

EXIT_SECONDS = 5.0  # how long leaving a run waits for the database


class Run:
    """One driver that works on a study. A context manager: it holds its lease inside the `with` block.

    All methods raise StorageError when the database cannot be used (after retries).

    Args:
        study: the study.
        config_key: returns the identity of a configuration. A study finishes each key at most once.
        provenance: versions and command of the run, for a replay.
        draw: draws the params of a new trial once no trial waits; None for a grid, whose points are all enqueued.
        max_trials: the budget of the study, duplicate and rejected draws not counted; None for no limit.
        learns: whether draws depend on results: then `claim` first writes all reports to the database.
        lease_seconds: how long other machines assume that the run is alive after its last renewal of the lease.
    """

    def __init__(
        self,
        study: Study,
        *,
        config_key: ConfigKey,
        provenance: Mapping[str, Any],
        draw: Draw | None = None,
        max_trials: int | None = None,
        learns: bool = True,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self.study = study
        self._config_key = config_key
        self._draw = draw
        self._max_trials = max_trials
        self._learns = learns
        self._lease = Lease(study.database, study.study_id, provenance=provenance, lease_seconds=lease_seconds)
        self._writer: Writer
        self._queue: TrialQueue

    def __enter__(self) -> Run:
        self._lease.start()
        self._writer = Writer(self.study, self.run_id)
        self._queue = TrialQueue(
            self.study,
            self._lease,
            self._writer,
            config_key=self._config_key,
            draw=self._draw,
            max_trials=self._max_trials,
            learns=self._learns,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lease.stop()
        self._writer.close()
        # Best effort: a caller that must know uses `flush`, and the lease expires if the database stays down.
        with contextlib.suppress(StorageError):
            self._writer.flush(EXIT_SECONDS)
            self._lease.end(EXIT_SECONDS)

    @property
    def database(self) -> Database:
        """The study's database."""
        return self.study.database

    @property
    def run_id(self) -> int:
        """The run's key in hpo_runs; -1 before the `with` block."""
        return self._lease.run_id

    @property
    def finished(self) -> bool:
        """Whether the last `claim` found that neither this run nor another one will get a trial again."""
        return self._queue.finished

    @property
    def exhausted(self) -> str:
        """Why `claim` draws no more trials although the budget allows it; empty while it does."""
        return self._queue.exhausted

    def enqueue(self, points: Iterable[Params], distributions: Mapping[str, BaseDistribution]) -> None:
        """Set the points of a grid. `claim` returns them in this order and skips those that the study already has.

        A point becomes a trial when it is claimed.
        """
        self._queue.enqueue(points, distributions)

    def claim(self) -> ClaimedTrial | None:
        """Return a trial to work on: an interrupted one, an enqueued one or a new one; None if there is none now.

        After None, `finished` says whether there will ever be one.
        """
        if self._learns:
            self._writer.flush()
        with self._writer.paused(), without_garbage_collection():
            claim = retry_while_down(self.database, self._queue.claim)
        if claim is None and not self._learns:
            self._writer.flush()
        return claim

    def flush(self, timeout_seconds: float = RETRY_SECONDS) -> None:
        """Return when all updates so far are in the database.

        Args:
            timeout_seconds: how long to retry while the database is down.
        """
        self._writer.flush(timeout_seconds)

    def report(self, claim: ClaimedTrial, epoch: int, metrics: Mapping[str, float], value: float) -> None:
        """Store one finished epoch. Idempotent.

        Raises:
            LostTrialError: the trial now belongs to another run.
        """
        self._writer.put(TrialUpdate(claim, epoch, dict(metrics), value))

    def should_prune(self, claim: ClaimedTrial) -> bool:
        """Return whether the study's pruner stops a trial after its latest report.

        Raises:
            LostTrialError: the trial now belongs to another run.
        """
        self._writer.flush()
        self._writer.check(claim)
        study = self.study.optuna_study
        return retry_while_down(
            self.database, lambda: study.pruner.prune(study, self.database.optuna_storage.get_trial(claim.trial_id))
        )

    def record(
        self, claim: ClaimedTrial, attrs: Mapping[str, Any], provenance: Mapping[str, Any] | None = None
    ) -> None:
        """Store user attributes of a trial, and its provenance: on which device, with what data it runs."""
        self._writer.put(TrialUpdate(claim, attrs=dict(attrs), provenance=provenance))

    def record_crash(self, claim: ClaimedTrial) -> None:
        """Count one more worker that died while it trained a trial."""
        table = tables.trials

        def write() -> None:
            with self.database.engine.begin() as connection:
                is_ours = sa.and_(table.c.trial == claim.trial_id, table.c.run == self.run_id)
                connection.execute(table.update().where(is_ours).values(crashes=table.c.crashes + 1))

        retry_while_down(self.database, write)

    def complete(self, claim: ClaimedTrial, value: float, attrs: Mapping[str, Any] | None = None) -> None:
        """Finish a trial that reached its last epoch."""
        self._finish(TrialUpdate(claim, value=value, attrs=attrs or {}, final_state=TrialState.COMPLETE))

    def prune(self, claim: ClaimedTrial, attrs: Mapping[str, Any] | None = None) -> None:
        """Finish a trial that the pruner stopped. Its value is the last reported one."""
        self._finish(TrialUpdate(claim, attrs=attrs or {}, final_state=TrialState.PRUNED))

    def fail(self, claim: ClaimedTrial, reason: str, traceback: str = "") -> None:
        """Finish a trial that failed. `reason` is one line."""
        attrs = {"fail_reason": reason} | ({"traceback": traceback[-2000:]} if traceback else {})
        self._finish(TrialUpdate(claim, attrs=attrs, final_state=TrialState.FAIL))

    def _finish(self, update: TrialUpdate) -> None:
        self._queue.forget(update.claim)
        self._writer.put(update)

    def release(self, claim: ClaimedTrial) -> None:
        """Set an unfinished trial to WAITING. Any run may resume it. Do nothing if it belongs to another run."""
        self._writer.flush()
        self._queue.release(claim)

    def elapsed_seconds(self) -> float:
        """Return for how long any run has worked on the study. Simultaneous runs count once."""
        return elapsed_seconds(self.study.runs())
