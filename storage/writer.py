"""Write-behind buffer: batches trial updates and writes them, with the device time, on a background thread.

`put` returns at once. A driver that is killed loses its last updates; the next run reports these epochs again from the
trial's checkpoint. `flush` returns when every earlier update is in the database.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from optuna.trial import TrialState
from sqlalchemy.exc import DataError, IntegrityError, StatementError

from storage import reporting, usage
from storage.errors import RETRY_SECONDS, StorageError, UnavailableError, retry_while_down
from storage.ownership import ClaimedTrial, LostTrialError
from storage.pruners import Decision, Pruner
from storage.reporting import TrialUpdate
from storage.study import Study
from storage.usage import Meter

BATCH_SECONDS = 0.2  # between two batches: how long an update stays in memory


class Writer:
    """Writes the updates of one run in the order of `put`. Thread-safe.

    Args:
        study: the study of the trials.
        pruner: ends trials early; None for none.
        meter: of the run. What it reads is written with the updates, or alone where there are none for some time.
    """

    def __init__(self, study: Study, pruner: Pruner | None, meter: Meter) -> None:
        self._study = study
        self._pruner = pruner
        self._meter = meter
        self._updates: list[TrialUpdate] = []
        self._updates_lock = threading.Lock()  # held for a moment
        # Tokens of claims: those that do not hold any more, those of pruned trials and of trials that wait, those of trials
        # that this run has ended, those that it has tried to end and with which state.
        self._lost: set[int] = set()
        self._pruned: set[int] = set()
        self._waiting: set[int] = set()
        self._ended: set[int] = set()
        self._ending: set[tuple[int, TrialState]] = set()
        self._write_lock = threading.Lock()  # held while the database is written to
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_flushing, name="hpo-writer", daemon=True)
        self._thread.start()

    def put(self, update: TrialUpdate) -> None:
        """Add an update to the next batch.

        Raises:
            LostTrialError: the claim is known not to hold any more.
        """
        self.check(update.claim)
        with self._updates_lock:
            self._updates.append(update)

    def check(self, claim: ClaimedTrial) -> None:
        """Raise LostTrialError if a claim is known not to hold any more."""
        if claim.token in self._lost:
            raise LostTrialError(f"trial {claim.number} was taken over by another run, or ended by another program")

    def decision(self, claim: ClaimedTrial) -> Decision:
        """Return what the pruner has decided about a trial."""
        if claim.token in self._pruned:
            return Decision.END
        return Decision.WAIT if claim.token in self._waiting else Decision.CONTINUE

    def is_settled(self, token: int) -> bool:
        """Return whether the database has confirmed that a claim is over: its trial has ended, or another run has it."""
        return token in self._lost or token in self._pruned or token in self._ended

    def flush(self, timeout_seconds: float = RETRY_SECONDS, *, stopped: threading.Event | None = None) -> None:
        """Write all updates, and device time that is due.

        Args:
            timeout_seconds: how long to retry while the database is down.
            stopped: once it is set, the updates are kept for the next flush if the database is down.

        Raises:
            StorageError: the database cannot be used (after retries), or refuses an update. The updates that were not
                written are kept for the next flush.
        """
        with self._write_lock:
            with self._updates_lock:
                updates, self._updates = self._updates, []
            left, error = updates, None
            try:
                left, error = self._write(updates, timeout_seconds, stopped)
            finally:
                with self._updates_lock:
                    self._updates[:0] = left
            if error is not None:
                raise error

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the background thread: two writers of one process delay each other on SQLite."""
        with self._write_lock:
            yield

    def stop(self) -> None:
        """Let the thread end soon: it does not wait any more for a database that is away. `flush` still writes updates."""
        self._closed.set()

    def close(self, timeout_seconds: float | None = None) -> None:
        """End the thread, and wait for it. Updates that were not flushed stay unwritten.

        Args:
            timeout_seconds: how long to wait: it may be in a statement that has no answer yet. None waits for that.
        """
        self.stop()
        self._thread.join(timeout_seconds)

    def _keep_flushing(self) -> None:
        while not self._closed.wait(BATCH_SECONDS):
            # The run's next call raises the same error where it can be handled.
            with contextlib.suppress(StorageError):
                self.flush(stopped=self._closed)

    def _write(
        self, updates: list[TrialUpdate], timeout_seconds: float, stopped: threading.Event | None
    ) -> tuple[list[TrialUpdate], StorageError | None]:
        """Write updates; return those that were not written, and the first error."""
        try:
            if updates or self._meter.is_due:
                database = self._study.database
                retry_while_down(
                    database,
                    lambda: self._write_once(updates),
                    timeout_seconds,
                    stopped=stopped,
                    runs_other_code=True,  # what a trainable reported may be the cause, see `_name_trial`
                )
        except UnavailableError as error:
            return updates, error
        except Exception as error:  # noqa: BLE001 # raised again by `flush`
            batches: dict[int, list[TrialUpdate]] = {}
            for update in updates:
                batches.setdefault(update.claim.token, []).append(update)
            if not batches:
                return [], StorageError(f"{self._study.database.url}: cannot store the device time: {error}")
            if len(batches) == 1:
                return updates, self._name_trial(updates[0].claim, error)
            # What the database refuses of one trial must not keep the others from being stored.
            left: list[TrialUpdate] = []
            first: StorageError | None = None
            for batch in batches.values():
                if isinstance(first, UnavailableError):
                    left += batch
                    continue
                not_written, error_of_batch = self._write(batch, timeout_seconds, stopped)
                left += not_written
                first = first or error_of_batch
            return left, first
        return [], None

    def _name_trial(self, claim: ClaimedTrial, error: Exception) -> StorageError:
        """Return the error of one trial's updates. It names the trial, if what it reported is the cause."""
        # `retry_while_down` has made a StorageError of what the database refused.
        of_driver = error.__context__ if isinstance(error, StorageError) else error
        if isinstance(error, StorageError) and not isinstance(of_driver, DataError | IntegrityError):
            return error
        url = self._study.database.url
        cause = of_driver.orig if isinstance(of_driver, StatementError) and of_driver.orig is not None else of_driver
        text = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
        if isinstance(error, StorageError):  # it may name a remedy
            text = str(error).removeprefix(f"{url}: ")
        named = StorageError(f"{url}: cannot store what trial {claim.number} reported: {text}")
        named.__cause__ = error
        return named

    def _write_once(self, updates: list[TrialUpdate]) -> None:
        self._ending |= {(each.claim.token, TrialState.PRUNED) for each in updates if each.decides}
        self._ending |= {(each.claim.token, each.final_state) for each in updates if each.final_state is not None}
        study, readings = self._study, self._meter.read()
        if not updates:
            with study.database.transaction() as connection:
                usage.store(connection, readings)
            self._meter.note_stored(readings)
            return
        written = reporting.write(
            study.database, study.key, updates, pruner=self._pruner, ending=self._ending, device_seconds=readings
        )
        self._meter.note_stored(readings)
        self._lost |= written.lost
        self._pruned |= written.pruned
        self._waiting |= written.waiting
        self._ended |= {each.claim.token for each in updates if each.final_state is not None}
