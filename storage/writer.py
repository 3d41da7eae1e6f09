"""What a run tells of its trials, gathered and written together, off the thread that tells it.

Nothing is promised by `put`: a driver that is killed loses what it told in the last moments, and the next one hears it
again from the trial's checkpoint. `flush` returns when everything told before it is in the database.
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

from storage import tables
from storage.database import RETRY_SECONDS, StorageError, retry_while_down
from storage.studies import Params, Study

GATHER_SECONDS = 0.2  # how far the database may lag behind what was told


class LostTrialError(Exception):
    """Another run has taken the trial over; whatever this one knows of it is no longer wanted."""


@dataclass(frozen=True)
class ClaimedTrial:
    """A trial that belongs to this run.

    Attributes:
        trial_id: Optuna's, unique in the database.
        number: its number in the study.
        params: the configuration.
        values: {epoch: value} of the objective, as reported before an interruption.
        crashes: how many workers have died over it.
    """

    trial_id: int
    number: int
    params: Params
    values: dict[int, float]
    crashes: int

    @property
    def epoch(self) -> int:
        """The last epoch that storage holds; 0 for a fresh trial."""
        return max(self.values, default=0)


@dataclass(frozen=True)
class TrialUpdate:
    """Something to write about a trial: attributes, an epoch, and its ending, whichever there are."""

    claim: ClaimedTrial
    epoch: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    value: float | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] | None = None
    ending: TrialState | None = None


class Writer:
    """Writes what one run tells, in the order it was told. Any thread may call any method.

    Args:
        owner: the run; what is told of a trial that belongs to another one by now is not written.
    """

    def __init__(self, study: Study, owner: int) -> None:
        self._study = study
        self._owner = owner
        self._told: list[TrialUpdate] = []
        self._telling = threading.Lock()  # of the list, held for a moment
        self._lost: set[int] = set()
        self._writing = threading.Lock()  # held while the database is written to
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._write_now_and_then, name="hpo-writer", daemon=True)
        self._thread.start()

    def put(self, told: TrialUpdate) -> None:
        """Write something soon.

        Raises:
            LostTrialError: its trial is known to belong to another run.
        """
        self.check(told.claim)
        with self._telling:
            self._told.append(told)

    def check(self, claim: ClaimedTrial) -> None:
        """Raise LostTrialError if a trial is known to belong to another run."""
        if claim.trial_id in self._lost:
            raise LostTrialError(f"trial {claim.number} was taken over by another run")

    def flush(self, patience: float = RETRY_SECONDS) -> None:
        """Write all that was told.

        Raises:
            StorageError: the database failed for good; what was told is kept for another try.
        """
        with self._writing:
            with self._telling:
                told, self._told = self._told, []
            try:
                if told:
                    retry_while_down(self._study.database, lambda: self._write(told), patience)
            except StorageError:
                with self._telling:
                    self._told[:0] = told
                raise

    def unwritten(self) -> set[int]:
        """Return the trials of which something was told that is not in the database yet."""
        with self._telling:
            return {told.claim.trial_id for told in self._told}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Write nothing meanwhile: SQLite lets a second writer of the same process wait for longer than need be."""
        with self._writing:
            yield

    def close(self) -> None:
        """End the thread; what was not flushed stays unwritten."""
        self._closed.set()
        self._thread.join()

    def _write_now_and_then(self) -> None:
        while not self._closed.wait(GATHER_SECONDS):
            # The next call of the run's own thread meets the same error, and can do something about it.
            with contextlib.suppress(StorageError):
                self.flush()

    def _write(self, told: list[TrialUpdate]) -> None:
        """Write it all. Repeatable: it may have been written before, though the answer was lost."""
        storage, trials = self._study.database.optuna_storage, tables.trials
        about = {each.claim.trial_id for each in told}
        with self._study.database.engine.begin() as connection:
            query = sa.select(trials.c.trial, trials.c.run).where(trials.c.trial.in_(about)).order_by(trials.c.trial)
            owners = {row.trial: row.run for row in connection.execute(query.with_for_update())}
            self._lost |= {trial for trial in about if owners.get(trial) != self._owner}
            told = [each for each in told if each.claim.trial_id not in self._lost]
            epochs = [each for each in told if each.value is not None and each.epoch]
            tables.write_metrics(connection, [(each.claim.trial_id, each.epoch, each.metrics) for each in epochs])
            tables.write_values(connection, [(each.claim.trial_id, each.epoch, each.value or 0.0) for each in epochs])
            for each in told:
                if each.provenance is not None:
                    mine = trials.c.trial == each.claim.trial_id
                    connection.execute(trials.update().where(mine).values(provenance=dict(each.provenance)))
        for each in told:
            with contextlib.suppress(UpdateFinishedTrialError):  # written before, but the answer was lost
                for name, attr in each.attrs.items():
                    storage.set_trial_user_attr(each.claim.trial_id, name, attr)
                if each.ending is not None:
                    value = each.value if each.ending == TrialState.COMPLETE else None
                    self._study.optuna_study.tell(each.claim.number, value, state=each.ending, skip_if_finished=True)
