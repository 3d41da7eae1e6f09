"""Ray Tune runs the trials of a study.

    Tune asks StudySearcher for a trial -> TrialCoordinator claims it in storage -> a TrialWorker runs it, one epoch per call
    -> StudyScheduler gives each TrialReport to the coordinator, which stores it and decides whether the trial ends

Ray's own files are scratch. Everything that a resumed search needs is in SQL and in the checkpoints.
"""

from __future__ import annotations

import math
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

# First: it sets the environment that ray reads when it is imported.
from hpo.search.cluster.connection import RayCluster

# isort: split
from ray import tune

from hpo.paths import RunsDir
from hpo.search.cluster.membership import Membership
from hpo.search.coordinator import TrialCoordinator
from hpo.search.listener import ProgressListener
from hpo.search.ray_worker import TrialWorker
from hpo.search.runs import open_run
from hpo.search.slots import Slots
from hpo.search.stop import EXIT_CODES, Stop, StopCause
from hpo.search.tune_adapters import SilentReporter, StartListener, StudyScheduler, StudySearcher

if TYPE_CHECKING:
    from hpo.search.earlier.continuation import ContinuationPlan
    from storage.study import Study

SAVE_SECONDS = 120.0  # how long a search that stops waits for its last checkpoints


def run_trials(
    continuation: ContinuationPlan,
    cluster: RayCluster,
    study: Study,
    slots: Slots,
    *,
    provenance: Mapping[str, Any],
    data: Mapping[str, Any],
    runs_dir: RunsDir,
    listener: ProgressListener,
    exit_at: float = math.inf,
) -> Stop | None:
    """Run the remaining trials of a study.

    Args:
        continuation: the search, and which trials of earlier revisions it continues.
        cluster: Ray, which is up.
        study: where results are stored.
        slots: how many trials run at a time, and what each gets. In a cluster, as many run as its nodes have room for.
        provenance: versions and command of this run, for the record.
        data: what the trainable gets as `data`.
        runs_dir: where checkpoints are stored; every worker must reach it.
        listener: receives the events.
        exit_at: when the search stops at the latest, by the monotonic clock.

    Returns:
        Why the search ended before its work was done; None if it was done.

    Raises:
        StorageError: the database cannot be used (after retries); the trials in flight are resumable.
        KeyboardInterrupt: Ctrl-C or SIGTERM stopped the search, and the database cannot be used.
    """
    space = continuation.space
    slots = replace(slots, may_have_fewer_cores=cluster.is_shared and space.resources.cpu == "auto")
    with open_run(continuation, study, provenance) as run:
        membership = Membership(slots, cluster.checks, lambda: cluster.answers)
        coordinator = TrialCoordinator(
            space, run, slots, data=data, runs_dir=runs_dir, listener=listener, room=membership.room
        )
        coordinator.set_deadline(exit_at, StopCause.EXIT_TIME)
        if space.budget.time is not None:
            coordinator.set_deadline(time.monotonic() + space.budget.time - run.elapsed_seconds())
        try:
            with _signals_stop(coordinator, listener), cluster.watched(partial(_give_up, coordinator, listener)):
                _run_tune(coordinator, membership)
        except KeyboardInterrupt:
            coordinator.stop(StopCause.INTERRUPTED)
        finally:
            coordinator.release_all()
        if coordinator.error is not None:
            if not coordinator.is_interrupted:
                raise coordinator.error
            # Its results cannot be read either. Who stopped the search does not wait for that.
            listener.note(f"{coordinator.error}. Epochs that are not stored are reported again by the same command")
            raise KeyboardInterrupt
        return coordinator.stopped


def _give_up(coordinator: TrialCoordinator, listener: ProgressListener, died: str) -> int:
    """Release the trials because Ray, or its head, has died; return the exit code."""
    was_stopping = coordinator.is_interrupted
    coordinator.stop(StopCause.INTERRUPTED)
    coordinator.release_all()
    code = EXIT_CODES[StopCause.INTERRUPTED] if was_stopping else 1
    listener.search_lost(f"{died}: the search ends. It is resumable: the same command continues it", code)
    return code


def _run_tune(coordinator: TrialCoordinator, membership: Membership) -> None:
    scheduler = StudyScheduler(coordinator, membership)
    with tempfile.TemporaryDirectory(prefix="hpo-ray-") as scratch:
        tune.run(
            TrialWorker,
            name="trials",
            storage_path=scratch,
            search_alg=StudySearcher(coordinator, scheduler),
            scheduler=scheduler,
            num_samples=-1,
            reuse_actors=True,
            raise_on_failed_trial=False,
            callbacks=[SilentReporter(), StartListener(scheduler)],
            verbose=0,
        )
    scheduler.collect_saved(SAVE_SECONDS)


@contextmanager
def _signals_stop(coordinator: TrialCoordinator, listener: ProgressListener) -> Iterator[None]:
    """Stop after the epochs in flight at the first Ctrl-C or SIGTERM, and at once at the second."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: object) -> None:
        if coordinator.is_interrupted:
            raise KeyboardInterrupt
        coordinator.stop(StopCause.INTERRUPTED)
        listener.note("stopping after the epochs in flight; Ctrl-C again stops at once. Both are resumable")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
