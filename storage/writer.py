"""Write-behind buffer: batches trial updates and writes them on a background thread.

`put` returns at once. A driver that is killed loses its last updates; the next run reports these epochs again from the
trial's checkpoint. `flush` returns when every earlier update is in the database.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from storage import records, tables
from storage.database import RETRY_SECONDS, StorageError, retry_while_down
from storage.studies import Params, Study

BATCH_SECONDS = 0.2  # between two batches: how long an update stays in memory


class LostTrialError(Exception):
    """Another run now owns the trial. This run must not write to it any more."""


@dataclass(frozen=True)
class ClaimedTrial:
    """A trial that belongs to this run.

    Attributes:
        trial_id: its primary key, unique in the database.
        number: its number in the study.
        params: its configuration.
        values: {epoch: value} of the objective, as reported before an interruption.
        crashes: how many workers have died while they trained it.
        attempt: how often it was started from its first epoch.
    """

    trial_id: int
    number: int
    params: Params
    values: dict[int, float]
    crashes: int
    attempt: int = 1

    @property
    def epoch(self) -> int:
        """The last epoch in storage; 0 for a new trial."""
        return max(self.values, default=0)


@dataclass(frozen=True)
class TrialUpdate:
    """An update of a trial: any of a finished epoch, attributes, provenance and a final state.

    Attributes:
        claim: the trial.
        epoch: the finished epoch, from 1; 0 for none.
        metrics: {name: value} of the epoch.
        value: the objective's value, of the epoch or of the completed trial.
        attrs: user attributes of the trial.
        provenance: replaces the trial's provenance; None keeps it.
        final_state: COMPLETE, PRUNED or FAIL; None for an unfinished trial.
    """

    claim: ClaimedTrial
    epoch: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    value: float | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] | None = None
    final_state: TrialState | None = None


class Writer:
    """Writes the updates of one run in the order of `put`. Thread-safe.

    Args:
        study: the study of the trials.
        run_id: the run. Updates of trials that now belong to another run are dropped.
    """

    def __init__(self, study: Study, run_id: int) -> None:
        self._study = study
        self._run_id = run_id
        self._updates: list[TrialUpdate] = []
        self._updates_lock = threading.Lock()  # held for a moment
        self._lost: set[int] = set()  # ids of trials that now belong to another run
        self._write_lock = threading.Lock()  # held while the database is written to
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_flushing, name="hpo-writer", daemon=True)
        self._thread.start()

    def put(self, update: TrialUpdate) -> None:
        """Add an update to the next batch.

        Raises:
            LostTrialError: the trial is known to belong to another run.
        """
        self.check(update.claim)
        with self._updates_lock:
            self._updates.append(update)

    def check(self, claim: ClaimedTrial) -> None:
        """Raise LostTrialError if a trial is known to belong to another run."""
        if claim.trial_id in self._lost:
            raise LostTrialError(f"trial {claim.number} was taken over by another run")

    def flush(self, timeout_seconds: float = RETRY_SECONDS) -> None:
        """Write all updates.

        Raises:
            StorageError: the database cannot be used (after retries), or refuses an update. The updates are kept for the
                next flush.
        """
        with self._write_lock:
            with self._updates_lock:
                updates, self._updates = self._updates, []
            try:
                if updates:
                    retry_while_down(self._study.database, lambda: self._write(updates), timeout_seconds)
            except BaseException as error:
                with self._updates_lock:
                    self._updates[:0] = updates
                if isinstance(error, StorageError) or not isinstance(error, Exception):
                    raise
                raise StorageError(f"{self._study.database.url}: cannot store updates of trials: {error!r}") from error

    def unwritten(self) -> set[int]:
        """Return the ids of the trials that have updates which are not written yet."""
        with self._updates_lock:
            return {update.claim.trial_id for update in self._updates}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the background thread: two writers of one process delay each other on SQLite."""
        with self._write_lock:
            yield

    def close(self) -> None:
        """End the thread. Updates that were not flushed stay unwritten."""
        self._closed.set()
        self._thread.join()

    def _keep_flushing(self) -> None:
        while not self._closed.wait(BATCH_SECONDS):
            # The run's next call raises the same error where it can be handled.
            with contextlib.suppress(StorageError):
                self.flush()

    def _write(self, updates: list[TrialUpdate]) -> None:
        """Write a batch. Idempotent: an earlier attempt may have been committed although its answer was lost."""
        storage, trials = self._study.database.optuna_storage, tables.trials
        trial_ids = {update.claim.trial_id for update in updates}
        with self._study.database.engine.begin() as connection:
            query = (
                sa.select(trials.c.trial, trials.c.run).where(trials.c.trial.in_(trial_ids)).order_by(trials.c.trial)
            )
            owners = {row.trial: row.run for row in connection.execute(query.with_for_update())}
            self._lost |= {trial_id for trial_id in trial_ids if owners.get(trial_id) != self._run_id}
            updates = [update for update in updates if update.claim.trial_id not in self._lost]
            epochs = [update for update in updates if update.value is not None and update.epoch]
            records.write_metrics(connection, [(each.claim.trial_id, each.epoch, each.metrics) for each in epochs])
            records.write_values(connection, [(each.claim.trial_id, each.epoch, each.value or 0.0) for each in epochs])
            for update in updates:
                if update.provenance is not None:
                    is_trial = trials.c.trial == update.claim.trial_id
                    connection.execute(trials.update().where(is_trial).values(provenance=dict(update.provenance)))
        for update in updates:
            with contextlib.suppress(UpdateFinishedTrialError):  # an earlier attempt finished the trial
                for name, attr in update.attrs.items():
                    storage.set_trial_user_attr(update.claim.trial_id, name, attr)
                if update.final_state is not None:
                    value = update.value if update.final_state == TrialState.COMPLETE else None
                    self._study.optuna_study.tell(
                        update.claim.number, value, state=update.final_state, skip_if_finished=True
                    )
