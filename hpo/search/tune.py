"""Ray Tune runs the trials of a study. Only this module, `cluster` and `nodes` import ray.

    Tune asks StudySearcher for a trial -> TrialCoordinator claims it in storage -> a TrialWorker runs it, one epoch per call
    -> StudyScheduler gives each TrialReport to the coordinator, which stores it and decides whether the trial ends

Ray's own files are scratch. Everything that a resumed search needs is in SQL and in the checkpoints. Workers receive a
trial's parameters and folder, never the URL of the database.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hpo.search.cluster  # noqa: F401 # first: it sets the environment that ray reads when it is imported

# isort: split
import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from hpo.paths import LOST_FILE, RunsDir
from hpo.search.code_package import CODE_DIR
from hpo.search.coordinator import TrialCoordinator
from hpo.search.listener import ProgressListener
from hpo.search.nodes import Nodes, node_id
from hpo.search.runs import open_run
from hpo.search.slots import Slots
from hpo.search.stop import Stop, StopCause
from hpo.search.versions import Problem, describe_versions, find_problem
from hpo.search.worker import Ending, TrialReport, TrialSpec, end_trial, run_trial, watchdog
from hpo.trainable import load_trainable

if TYPE_CHECKING:  # workers import this module too, and need no database
    from hpo.search.continuation import ContinuationPlan
    from storage.studies import Study

SAVE_SECONDS = 120.0  # how long a search that stops waits for its last checkpoints


# --- in the worker ----------------------------------------------------------------------------------------------------


class TrialWorker(tune.Trainable):
    """A Ray actor that runs one trial after another. Torch is imported once per worker, not once per trial."""

    _home: Path | None = None  # where Ray started this process; a trainable may go elsewhere

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial. Errors are not raised here, because Tune would not report the trial."""
        self._spec = TrialSpec(**config["spec"])
        self._reports: Generator[TrialReport, None, str] | None = None
        self._needs_new_process = False
        self._problem: Problem | None = None  # why no trial of this search must run on this node
        if "versions" in config:  # of a driver that may be on another machine
            self._home = self._home or Path.cwd()
            self._spec = replace(self._spec, code_folder=_enter_code(self._home))
            self._problem = find_problem(config["versions"], self._spec.folder)
        if self._problem is not None:
            return
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
        if self._problem is not None:
            return {"problem": self._problem, "node": node_id()}
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


def _enter_code(home: Path) -> str:
    """Go to the code that was sent to this node, and return its folder: as on the driver's machine, a trial runs there.

    Args:
        home: where Ray started this process: the folder with the code, or that of `ray start` if nothing was sent.
    """
    sent = home / CODE_DIR
    if not sent.is_dir():
        return str(home)
    os.chdir(sent)
    sys.path[:] = [path for path in sys.path if path != str(home)]  # see `code_package`
    return str(sent)


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
        spec = self._coordinator.next_trial(trial_id)
        if spec is None:
            return Searcher.FINISHED if self._coordinator.is_done else None
        return {"spec": vars(spec)} | ({"versions": describe_versions()} if self._scheduler.nodes else {})

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: StudyScheduler has passed it on."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a search is resumed from SQL."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: see `save`."""


class StudyScheduler(FIFOScheduler):
    """Passes what workers report to the coordinator, and its decisions to Tune.

    Args:
        coordinator: decides what becomes of a trial.
        nodes: of a cluster that was joined; None if Ray was started here.
    """

    def __init__(self, coordinator: TrialCoordinator, nodes: Nodes | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes = nodes
        self._coordinator = coordinator
        self._saving: dict[str, Any] = {}  # {Tune's id: reference to the answer of `TrialWorker.end`}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Set how often Tune may restart a trial: crashes in earlier runs count too."""
        if trial.num_failures == 0:
            trial.max_failures = self._coordinator.retries_left(trial.trial_id)
        if self.nodes is not None and self.nodes.has_refused:
            trial.update_resources(self.nodes.without_refused(trial.placement_group_factory))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Store an epoch and decide whether the trial ends."""
        if self.nodes is not None and "problem" in result:
            self.nodes.refuse(result["node"], result["problem"])
            self._coordinator.release(trial.trial_id)
            return str(TrialScheduler.STOP)
        ending = self._coordinator.on_report(trial.trial_id, result["report"])
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
        details = ""
        with suppress(OSError):
            details = Path(trial.error_file).read_text().rpartition("Failure # ")[2]
        if self.nodes is not None and self.nodes.is_at_fault(details, trial.placement_group_factory):
            if trial.should_recover():
                trial.run_metadata.num_failures -= 1  # Tune starts it elsewhere, see `on_trial_add`
            else:
                self._coordinator.release(trial.trial_id)
            return
        self._coordinator.on_crash(trial.trial_id, details, is_retried=trial.should_recover())

    def choose_trial_to_run(self, tune_controller: Any, **_: Any) -> Any:
        """Release the trials whose workers have not started yet, if the search is stopping, and those that have stopped."""
        self.collect_saved()
        if self.nodes is not None:
            self.nodes.poll()
        if self._coordinator.stopped:
            for trial in list(tune_controller.get_trials()):
                if trial.status == trial.PENDING:
                    self._coordinator.release(trial.trial_id)
                    tune_controller.stop_trial(trial)
        return super().choose_trial_to_run(tune_controller)


class StartListener(tune.Callback):
    """Tells the coordinator when a worker starts to run a trial: until then, it may wait for the cluster."""

    def __init__(self, coordinator: TrialCoordinator) -> None:
        self._coordinator = coordinator

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Pass it on."""
        self._coordinator.on_started(trial.trial_id)


class SilentReporter(TrialProgressCallback):
    """Replaces Tune's own printing, which verbose=0 does not suppress completely."""

    def log_result(self, *_: Any, **__: Any) -> None:
        """Print nothing."""

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        """Print nothing."""


def run_trials(
    continuation: ContinuationPlan,
    study: Study,
    slots: Slots,
    *,
    provenance: Mapping[str, Any],
    data: Mapping[str, Any],
    runs_dir: RunsDir,
    listener: ProgressListener,
    exit_at: float = math.inf,
    nodes: Nodes | None = None,
) -> Stop | None:
    """Run the remaining trials of a study. Ray must be up.

    Args:
        continuation: the search, and which trials of earlier revisions it continues.
        study: where results are stored.
        slots: how many trials run at a time, and what each gets.
        provenance: versions and command of this run, for the record.
        data: what the trainable gets as `data`.
        runs_dir: where checkpoints are stored; every worker must reach it.
        listener: receives the events.
        exit_at: when the search stops at the latest, by the monotonic clock.
        nodes: of a cluster that was joined; None if Ray was started here.

    Returns:
        Why the search ended before its work was done; None if it was done.

    Raises:
        StorageError: the database cannot be used (after retries); the trials in flight are resumable.
        KeyboardInterrupt: Ctrl-C or SIGTERM stopped the search, and the database cannot be used.
    """
    from storage.usage import Device

    space = continuation.space
    with open_run(continuation, study, provenance, Device(slots.device, slots.devices)) as run:
        coordinator = TrialCoordinator(space, run, slots, data=data, runs_dir=runs_dir, listener=listener)
        coordinator.set_deadline(exit_at, StopCause.EXIT_TIME)
        if space.budget.time is not None:
            coordinator.set_deadline(time.monotonic() + space.budget.time - run.elapsed_seconds())
        try:
            with _signals_stop(coordinator, listener):
                _run_tune(coordinator, slots, nodes)
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


def _run_tune(coordinator: TrialCoordinator, slots: Slots, nodes: Nodes | None) -> None:
    scheduler = StudyScheduler(coordinator, nodes)
    with tempfile.TemporaryDirectory(prefix="hpo-ray-") as scratch:
        tune.run(
            TrialWorker,
            name="trials",
            storage_path=scratch,
            search_alg=StudySearcher(coordinator, scheduler),
            scheduler=scheduler,
            num_samples=-1,
            # Claim no more trials than can run: other drivers cannot take a claimed trial.
            max_concurrent_trials=slots.count,
            resources_per_trial={"cpu": slots.cpu, "gpu": slots.gpu},
            reuse_actors=True,
            raise_on_failed_trial=False,
            callbacks=[SilentReporter(), StartListener(coordinator)],
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
