"""Saves the checkpoints of a trial while it trains.

    epoch ends -> the state is copied -> the next epoch trains, while a thread writes the copy to the disk

Copying takes a tenth of the time of writing. At most one checkpoint is being written: memory holds one copy. If there is a
bucket, another thread uploads what is written, see `uploads`.
"""

from __future__ import annotations

import errno
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.search.checkpoints.files import (
    Checkpoint,
    belongs_to,
    checkpoint_file,
    claim_folder,
    save_checkpoint,
)
from hpo.search.checkpoints.states import check_plain, copy_state, count_bytes
from hpo.search.checkpoints.uploads import PATIENCE_SECONDS, PAUSE_PATIENCE_SECONDS, Uploader

if TYPE_CHECKING:
    from torch import Tensor

COST_SHARE = 0.03  # of the training time that automatic checkpoints may take
MAX_WORK_SECONDS = 300.0  # of training between two automatic checkpoints, unless one epoch takes longer
FIRST_SAVE_SECONDS = 0.005  # assumed for the first checkpoint, with this for its size:
FIRST_SAVE_BYTES_PER_SECOND = 100e6
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}  # of the disk, or of the user's quota


@dataclass(frozen=True)
class _Epoch:
    """A finished epoch, from whose state training can resume until the next one starts.

    Attributes:
        number: the epoch's number; 0 for the start of the training.
        history: {epoch: metrics} of all finished epochs.
        state: returns the state.
        part: of the next epoch, how many trainings the state has beyond this one, see `replicates.EpochPart`.
    """

    number: int
    history: Mapping[int, Mapping[str, float]]
    state: Callable[[], dict[str, Any]]
    part: int = 0

    @property
    def position(self) -> tuple[int, int]:
        return self.number, self.part

    def checkpoint(self, key: str) -> Checkpoint:
        history = {epoch: dict(metrics) for epoch, metrics in self.history.items()}
        return Checkpoint(self.number, history, self.state(), key)


@dataclass(frozen=True)
class _Save:
    """A checkpoint that the thread writes. The result is the time of the processor that it took, in seconds."""

    position: tuple[int, int]
    result: Future[float]
    copy_seconds: float
    work_seconds: float  # of training since the checkpoint before


class CheckpointWriter:
    """Saves the checkpoints of one trial.

    Automatic checkpoints are saved as often as their measured cost allows: at most COST_SHARE of the training time, but at
    least once in MAX_WORK_SECONDS of it. The cost is the time for which training waits, and the CPU time of the
    thread.

    Args:
        folder: the trial's folder.
        key: whose checkpoints they are, see `owner_key`.
        token: of the claim of the trial.
        every: epochs between two checkpoints; None for automatic ones.
        last_epoch: the trial's last epoch. Its checkpoint is complete when `epoch_ended` returns.
        interval: see `save_checkpoint`. Those after its multiples are complete when `epoch_ended` returns. 0 for none.
        claimed_milliseconds: when the trial was claimed.
        uploader: uploads them; None without a bucket. What is complete when a method returns is uploaded by then, too,
            or the method returns a warning.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        token: int,
        *,
        every: int | None,
        last_epoch: int,
        interval: int = 0,
        claimed_milliseconds: int = 0,
        uploader: Uploader | None = None,
    ) -> None:
        self._folder = folder
        self._key = key
        self._token = token
        self._is_claimed = False
        self._every = every
        self._last_epoch = last_epoch
        self._interval = interval
        self._claimed_milliseconds = claimed_milliseconds
        self._uploader = uploader
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hpo-checkpoint")
        self._save: _Save | None = None  # the one that is being written
        self._ended: _Epoch | None = None  # the last one
        self._saved = (0, 0)  # the position of the newest checkpoint
        self._cost_seconds: float | None = None  # of the last checkpoint
        self._work_seconds = 0.0  # of training since the last checkpoint
        self._copies: dict[tuple[Any, ...], Tensor] = {}  # kept, because new memory costs page faults

    def claim(self) -> str:
        """Claim the trial's folder. On a full disk it is claimed later, with the first checkpoint that can be written.

        Returns:
            A warning if files of another configuration were renamed; else empty.

        Raises:
            OSError: the folder of another configuration cannot be renamed.
        """
        try:
            warning = claim_folder(self._folder, self._key, self._token, self._claimed_milliseconds)
        except OSError:
            if not belongs_to(self._folder, self._key):
                raise
            return ""  # a checkpoint that cannot be written will say so
        self._is_claimed = True
        return warning

    def epoch_ended(
        self,
        epoch: int,
        history: Mapping[int, Mapping[str, float]],
        state: Callable[[], dict[str, Any]],
        seconds: float,
    ) -> str:
        """Save the state after an epoch, if it is time to.

        Args:
            epoch: the epoch's number.
            history: {epoch: metrics} of all finished epochs.
            state: returns the state. It is called only if it may be saved.
            seconds: the time for which this epoch trained.

        Returns:
            A warning if a checkpoint could not be written; else empty.

        Raises:
            TakenOverError: another worker trains the trial now.
            TypeError: the state holds something that could not be loaded again.
        """
        self._ended = _Epoch(epoch, history, state)
        self._work_seconds += seconds
        if epoch >= self._last_epoch:
            return self.save_now(PATIENCE_SECONDS)
        if self._interval and epoch % self._interval == 0:
            return self.save_now()
        warning = self._save_if_due(self._ended)
        return warning if self._uploader is None else _join(warning, self._uploader.take_note())

    def part_ended(
        self, history: Mapping[int, Mapping[str, float]], state: Callable[[], dict[str, Any]], seconds: float
    ) -> str:
        """Save the state within an epoch, if it is time to: of automatic checkpoints only.

        Args:
            history: {epoch: metrics} of all finished epochs.
            state: returns the state, from which the training of the unfinished epoch can resume.
            seconds: the time for which this part trained.

        Returns, Raises: see `epoch_ended`.
        """
        number, part = self._ended.position if self._ended is not None else (max(history, default=0), 0)
        self._ended = _Epoch(number, history, state, part + 1)
        self._work_seconds += seconds
        return "" if self._every is not None else self._save_if_due(self._ended)

    def _save_if_due(self, ended: _Epoch) -> str:
        warning = self._collect(wait=self._every is not None)
        if self._save is None and self._is_due(ended):
            try:
                self._start(ended)
            except (OSError, MemoryError) as error:
                warning = _join(warning, _describe(ended.number, self._folder, error))
        return warning

    def save_now(self, patience_seconds: float = PAUSE_PATIENCE_SECONDS) -> str:
        """Save the state after the last finished epoch, if it is not saved, and return when it is on the disk.

        If there is a bucket, it is there, too, or a warning says why not.

        Args:
            patience_seconds: how long it waits for a bucket that makes no progress.

        Returns, Raises: see `epoch_ended`.
        """
        warning = self._save_rest()
        return warning if self._uploader is None else _join(warning, self._uploader.wait(patience_seconds))

    def _save_rest(self) -> str:
        warning = self._collect(wait=True)
        if self._ended is None or self._saved == self._ended.position:
            return warning
        try:
            self._write(self._ended.checkpoint(self._key))
        except (OSError, MemoryError) as error:
            return _join(warning, _describe(self._ended.number, self._folder, error))
        self._saved = self._ended.position
        return warning

    def abandon_uploads(self) -> None:
        """Upload no more: the driver has ended the trial, and decides what becomes of its checkpoints."""
        if self._uploader is not None:
            self._uploader.close(is_waited_for=False)

    def close(self) -> None:
        """Wait for the checkpoint that is being written, or uploaded, and end the threads."""
        self._pool.shutdown()
        self._copies.clear()
        if self._uploader is not None:
            self._uploader.close(is_waited_for=True)

    def _is_due(self, ended: _Epoch) -> bool:
        if self._every is not None:
            return ended.number % self._every == 0
        if self._cost_seconds is None:
            started = time.perf_counter()
            size = count_bytes(ended.state())
            self._cost_seconds = FIRST_SAVE_SECONDS + size / FIRST_SAVE_BYTES_PER_SECOND
            self._cost_seconds += time.perf_counter() - started
        return self._work_seconds >= min(self._cost_seconds / COST_SHARE, MAX_WORK_SECONDS)

    def _start(self, ended: _Epoch) -> None:
        started = time.perf_counter()
        checkpoint = ended.checkpoint(self._key)
        check_plain(checkpoint.state)
        copied = replace(checkpoint, state=copy_state(checkpoint.state, self._copies))

        def write() -> float:
            before = time.thread_time()
            self._write(copied)
            return time.thread_time() - before

        work, self._work_seconds = self._work_seconds, 0.0
        self._save = _Save(ended.position, self._pool.submit(write), time.perf_counter() - started, work)

    def _write(self, checkpoint: Checkpoint) -> None:
        if not self._is_claimed:  # the worker that had it before is gone, or finds out now
            claim_folder(self._folder, self._key, self._token, self._claimed_milliseconds)
            self._is_claimed = True
        save_checkpoint(self._folder, checkpoint, self._token, interval=self._interval)
        if self._uploader is not None:
            self._uploader.offer(checkpoint_file(self._folder, checkpoint.epoch))

    def _collect(self, *, wait: bool) -> str:
        """Take the result of the thread, if there is one. Return a warning, see `epoch_ended`."""
        save = self._save
        if save is None or not (wait or save.result.done()):
            return ""
        self._save = None
        try:
            self._cost_seconds = save.copy_seconds + save.result.result()
        except (OSError, MemoryError) as error:
            self._work_seconds += save.work_seconds
            return _describe(save.position[0], self._folder, error)
        self._saved = save.position
        return ""


def _describe(epoch: int, folder: Path, error: Exception) -> str:
    reason = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        reason = f"no room for it in {folder} on {platform.node()}. Free some: `hpo clean` lists what no search needs"
    return f"no checkpoint after epoch {epoch}: {reason}"


def _join(*texts: str) -> str:
    return "; ".join(filter(None, texts))
