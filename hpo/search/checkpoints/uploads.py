"""Uploads the checkpoints of a trial while it trains.

    CheckpointWriter saves a file -> Uploader.offer -> a thread uploads it, one file at a time

A file that a newer one replaces before its upload begins is not uploaded. While the bucket is away, the trial trains on, and
the newest file is tried again.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hpo.bucket import describe
from hpo.search.checkpoints.bucket import FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS, BucketTrial
from hpo.search.checkpoints.files import TakenOverError, epoch_of

# How long a trial waits for a bucket that makes no progress: one that is paused, perhaps because its machine will be taken
# away, and one that has completed, which nothing resumes from the bucket later.
PAUSE_PATIENCE_SECONDS, PATIENCE_SECONDS = 20.0, 90.0

_away_since: dict[str, float] = {}  # {URL of a bucket: since when it fails}, of this process


class Uploader:
    """Uploads the checkpoints of one claim of a trial, on its own thread.

    Args:
        trial: where they go.
        token: of the claim of the trial.
        claimed_milliseconds: when that was made.
        interval: see `save_checkpoint`. Those after its multiples are uploaded, too.
        on_progress: is called while `wait` waits, after each part: the trial does not hang.
    """

    def __init__(
        self,
        trial: BucketTrial,
        token: int,
        claimed_milliseconds: int,
        *,
        interval: int = 0,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._trial = trial
        self._service = "/".join(trial.url.split("/")[:3])
        self._claim = token, claimed_milliseconds
        self._interval = interval
        self._on_progress = on_progress
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        # Guarded by `_changed`:
        self._pending: list[Path] = []  # by epoch; the first one may be in flight
        self._in_flight: Path | None = None
        self._error = ""  # of the last attempt
        self._told = ""  # the error that the user knows
        self._progress_at = 0.0
        self._attempts = 0
        self._is_urgent = False  # the pause before the next attempt ends
        self._is_lost = False
        self._is_closed = False

    def offer(self, file: Path) -> None:
        """Upload a checkpoint that has just been saved."""
        with self._changed:
            self._pending = [each for each in self._pending if each == self._in_flight or self._is_shared(each)]
            self._pending.append(file)
            if self._thread is None:
                # A daemon: a process that ends does not wait for a bucket that is away.
                self._thread = threading.Thread(target=self._run, name="hpo-upload", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def take_note(self) -> str:
        """Return what the user should know, once; else empty.

        Raises:
            TakenOverError: another worker trains the trial now.
        """
        with self._changed:
            self._raise_if_lost()
            before, self._told = self._told, self._error
            if self._error and not before:
                return f"uploads to {self._service} wait, and the trial continues: {self._error}"
            return f"uploads to {self._service} work again" if before and not self._error else ""

    def wait(self, patience_seconds: float = PAUSE_PATIENCE_SECONDS) -> str:
        """Return when all is uploaded, or the bucket has made no progress for so many seconds.

        Returns:
            A warning about what is not uploaded; else empty.

        Raises:
            TakenOverError: another worker trains the trial now.
        """
        started = time.monotonic()
        with self._changed:
            attempts, self._is_urgent = self._attempts, True
            self._changed.notify_all()
            while self._pending and not self._is_lost:
                since = max(started, self._progress_at)
                if self._error and self._attempts > attempts:  # who has waited before waits for one attempt
                    since = min(since, _away_since.get(self._service, since))
                left = since + patience_seconds - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
                self._on_progress()
            self._raise_if_lost()
            if not self._pending:
                return ""
            newest = self._pending[-1]
            reason = self._error or "the upload takes longer"
            self._told = self._error
            where = f"{newest.parent} on {platform.node()}"
            return f"its checkpoint after epoch {epoch_of(newest)} is only in {where} so far: {reason}"

    def close(self, *, is_waited_for: bool) -> None:
        """End the thread. Without waiting, what is not in flight is not uploaded."""
        if is_waited_for and not (self._is_closed or self._is_lost):
            self.wait()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _raise_if_lost(self) -> None:
        if self._is_lost:
            raise TakenOverError(f"another worker trains this trial, and uploads to {self._trial.url}")

    def _is_shared(self, file: Path) -> bool:
        return bool(self._interval) and epoch_of(file) % self._interval == 0

    def _run(self) -> None:
        delay = FIRST_DELAY_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._is_closed)
                if self._is_closed:
                    return
                file = self._in_flight = self._pending[0]
            error = self._upload(file)
            with self._changed:
                self._in_flight, self._is_urgent = None, False
                self._attempts += 1
                self._error = error
                if error:
                    _away_since.setdefault(self._service, time.monotonic())
                    if len(self._pending) > 1 and not self._is_shared(file):
                        self._pending.remove(file)  # a newer one follows
                else:
                    _away_since.pop(self._service, None)
                    self._pending.remove(file)
                    self._progress_at = time.monotonic()
                self._changed.notify_all()
                if self._is_lost:
                    return
                if error:
                    self._changed.wait_for(lambda: self._is_closed or self._is_urgent, delay)
            delay = min(2 * delay, MAX_DELAY_SECONDS) if error else FIRST_DELAY_SECONDS

    def _upload(self, file: Path) -> str:
        """Upload a file; return why that failed, or an empty text."""

        def note_progress() -> None:
            with self._changed:
                self._progress_at = time.monotonic()
                self._changed.notify_all()

        token, claimed = self._claim
        try:
            self._trial.upload(file, token, claimed, interval=self._interval, on_progress=note_progress)
        except TakenOverError:
            self._is_lost = True
        except Exception as error:  # noqa: BLE001 # any error of pyarrow: the trial continues
            # One that was deleted meanwhile has a successor.
            return describe(error) if file.exists() else ""
        return ""
