"""Ray Tune runs the trials of a study. Only this module, `membership` and `cluster` import ray.

    Tune asks StudySearcher for a trial -> TrialCoordinator claims it in storage -> a TrialWorker runs it, one epoch per call
    -> StudyScheduler gives each TrialReport to the coordinator, which stores it and decides whether the trial ends

Ray's own files are scratch. Everything that a resumed search needs is in SQL and in the checkpoints. Workers receive a
trial's parameters and folder, never the URL of the database.
"""

from __future__ import annotations

import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.search.cluster import RayCluster  # first: it sets the environment that ray reads when it is imported

# isort: split
import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from hpo.paths import LOST_FILE, RunsDir
from hpo.search.coordinator import TrialCoordinator
from hpo.search.listener import ProgressListener
from hpo.search.membership import POLL_SECONDS, Membership
from hpo.search.runs import open_run
from hpo.search.slots import Slots
from hpo.search.stop import EXIT_CODES, Stop, StopCause
from hpo.search.worker import Ending, TrialReport, TrialSpec, end_trial, run_trial, watchdog
from hpo.trainable import load_trainable

if TYPE_CHECKING:  # workers import this module too, and need no database
    from hpo.search.continuation import ContinuationPlan
    from storage.studies import Study

SAVE_SECONDS = 120.0  # how long a search that stops waits for its last checkpoints


# --- in the worker ----------------------------------------------------------------------------------------------------


class TrialWorker(tune.Trainable):
    """A Ray actor that runs one trial after another. Torch is imported once per worker, not once per trial."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """Return what the trial gets of a node."""
        return tune.PlacementGroupFactory([config["bundle"]])

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial. Errors are not raised here, because Tune would not report the trial."""
        self._spec = TrialSpec(**config["spec"])
        self._reports: Generator[TrialReport, None, str] | None = None
        self._needs_new_process = False
        # Import slow modules here, outside the timed epochs. If an import fails, `step` raises the error and reports it.
        with suppress(Exception):
            import torch  # noqa: F401

            if self._spec.command is None:
                load_trainable(self._spec.trainable, self._spec.code_folder)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial, unless this process must not run another one.

        Tune reports the error for a trial that is PENDING and removes this worker: StudyScheduler releases the trial, which
        then starts in a new worker. If the process ended here, Tune would count a failure of the trial.

        Raises:
            RuntimeError: this process must not run another trial.
        """
        if self._needs_new_process:
            raise RuntimeError("this process must not run another trial")
        self.setup(new_config)
        return True

    def end(self, ending: Ending) -> str:
        """Free what the trial uses, and stop what it runs, such as a script; see `end_trial`."""
        return "" if self._reports is None else end_trial(self._reports, ending, self._spec)

    def step(self) -> dict[str, Any]:
        """Run one epoch. A process that can no longer use its GPU ends: the trial is retried in another."""
        if self._reports is None:
            self._reports = run_trial(self._spec)
        with watchdog(self._spec):
            report = next(self._reports)
        if report.is_device_lost:
            # Not by an exception: a process that has lost its GPU may hang while Python shuts down.
            with suppress(OSError):
                (Path(self._spec.folder) / LOST_FILE).write_text(f"{report.failure}\n{report.traceback}")
            os._exit(1)
        self._needs_new_process = self._needs_new_process or report.needs_new_process
        return {"report": report}


# --- in the driver ----------------------------------------------------------------------------------------------------


class StudySearcher(Searcher):
    """Gives trials of the study to Tune."""

    def __init__(self, coordinator: TrialCoordinator, scheduler: StudyScheduler) -> None:
        super().__init__()
        self._coordinator = coordinator
        self._scheduler = scheduler

    def suggest(self, trial_id: str) -> Any:
        """Return the configuration of a Tune trial, None if there is none now, or Searcher.FINISHED."""
        # The last trial may be the one that is being saved. Tune does not ask the scheduler while it has no trial.
        self._scheduler.collect_saved()
        self._scheduler.follow_cluster()
        spec = self._coordinator.next_trial(trial_id)
        if spec is None:
            return Searcher.FINISHED if self._coordinator.is_done else None
        return {"spec": vars(spec), "bundle": self._coordinator.bundle(trial_id)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: StudyScheduler has passed it on."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a search is resumed from SQL."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: see `save`."""


class StudyScheduler(FIFOScheduler):
    """Passes what workers report to the coordinator, and its decisions to Tune."""

    def __init__(self, coordinator: TrialCoordinator, membership: Membership) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._coordinator = coordinator
        self._membership = membership
        self._saving: dict[str, Any] = {}  # {Tune's id: reference to the answer of `TrialWorker.end`}
        self._nodes: dict[str, str] = {}  # {Tune's id: the node on which it runs, or ran last}
        self._is_pending = False
        self._followed_at = -math.inf

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Set how often Tune may restart a trial: crashes in earlier runs count too."""
        if trial.num_failures == 0:
            trial.max_failures = self._coordinator.retries_left(trial.trial_id)

    def on_trial_start(self, trial: Any) -> None:
        """Note where a trial runs. Its device time counts from now on."""
        self._nodes[trial.trial_id] = self._membership.node_of(trial.temporary_state.ray_actor)
        self._coordinator.on_started(trial.trial_id)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Store an epoch and decide whether the trial ends."""
        ending = self._coordinator.on_report(trial.trial_id, result["report"])
        if ending is None and self._nodes.get(trial.trial_id) in self._membership.draining():
            ending = self._coordinator.leave_node(trial.trial_id)
        if ending is None:
            return str(TrialScheduler.CONTINUE)
        worker = trial.temporary_state.ray_actor
        if worker is not None:
            # The actor may stay idle, so stop the trial's script now.
            answer = worker.end.remote(ending)
            if ending.saves:
                self._saving[trial.trial_id] = answer
        return str(TrialScheduler.STOP)

    def collect_saved(self, timeout_seconds: float = 0.0) -> None:
        """Tell the coordinator which stopped trials are saved.

        Args:
            timeout_seconds: how long to wait for those that are being saved.
        """
        if not self._saving:
            return
        ids = {answer: trial_id for trial_id, answer in self._saving.items()}
        for answer in ray.wait(list(ids), num_returns=len(ids), timeout=timeout_seconds)[0]:
            trial_id = ids[answer]
            del self._saving[trial_id]
            try:
                warning = ray.get(answer)
            except ray.exceptions.RayError as error:  # the worker died: the trial resumes from an earlier checkpoint
                warning = f"its last epoch was not saved: {str(error).splitlines()[0]}"
            self._coordinator.on_saved(trial_id, warning)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Handle the death of a worker. Tune has counted the failure and written Ray's report to `trial.error_file`."""
        if trial.status == trial.PENDING:
            # An idle worker died while it was given this trial, or did not take it. Tune drops such a trial, even one
            # that it has just set to restart. Nothing of it has run, so this is no failure: it is claimed again.
            self._coordinator.release(trial.trial_id)
            return
        if self._membership.has_left(self._nodes.get(trial.trial_id, "")):
            # No fault of the trial, so it is not counted. Tune counts it, unless the node was drained.
            is_retried = trial.should_recover()
            trial.max_failures += 1
            self._coordinator.on_node_lost(trial.trial_id, is_retried=is_retried)
            return
        details = ""
        with suppress(OSError):
            details = Path(trial.error_file).read_text().rpartition("Failure # ")[2]
        self._coordinator.on_crash(trial.trial_id, details, is_retried=trial.should_recover())

    def choose_trial_to_run(self, tune_controller: Any, **_: Any) -> Any:
        """Release trials that have stopped, and those that wait for a worker which they should not, or cannot, get."""
        self.collect_saved()
        pending = [trial for trial in tune_controller.get_trials() if trial.status == trial.PENDING]
        for trial in pending:
            if self._coordinator.stopped or self._coordinator.is_surplus(trial.trial_id):
                self._coordinator.release(trial.trial_id)
                tune_controller.stop_trial(trial)
        if self._membership.draining():
            # Workers that wait for a trial hold their node. Tune has no public function that ends them.
            tune_controller._cleanup_cached_actors(force_all=True)  # noqa: SLF001
        self._is_pending = bool(pending)
        self.follow_cluster()
        return super().choose_trial_to_run(tune_controller)

    def follow_cluster(self) -> None:
        """Tell the user how many trials can run, and the cluster how many more could, from time to time."""
        if time.monotonic() - self._followed_at >= POLL_SECONDS:
            self._followed_at = time.monotonic()
            wanted = self._coordinator.follow_cluster()
            # A trial that waits for a node asks for one itself. It would wait behind what is asked for here.
            self._membership.ask_for(0 if self._is_pending else wanted)


class StartListener(tune.Callback):
    """Notes when a worker starts to run a trial: until then, it may wait for the cluster."""

    def __init__(self, scheduler: StudyScheduler) -> None:
        self._scheduler = scheduler

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Pass it on."""
        self._scheduler.on_trial_start(trial)


class SilentReporter(TrialProgressCallback):
    """Replaces Tune's own printing, which verbose=0 does not suppress completely."""

    def log_result(self, *_: Any, **__: Any) -> None:
        """Print nothing."""

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        """Print nothing."""


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
    with open_run(continuation, study, provenance) as run:
        membership = Membership(slots, is_fixed=not cluster.is_shared)
        coordinator = TrialCoordinator(
            space, run, slots, data=data, runs_dir=runs_dir, listener=listener, room=membership.room
        )
        coordinator.set_deadline(exit_at, StopCause.EXIT_TIME)
        if space.budget.time is not None:
            coordinator.set_deadline(time.monotonic() + space.budget.time - run.elapsed_seconds())
        try:
            with _signals_stop(coordinator, listener), cluster.watched(lambda: _give_up(coordinator, listener)):
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


def _give_up(coordinator: TrialCoordinator, listener: ProgressListener) -> int:
    """Release the trials because Ray has died; return the exit code."""
    was_stopping = coordinator.is_interrupted
    coordinator.stop(StopCause.INTERRUPTED)
    coordinator.release_all()
    listener.note("Ray's processes have ended, and so has the search. It is resumable: the same command continues it")
    return EXIT_CODES[StopCause.INTERRUPTED] if was_stopping else 1


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
