"""Ray Tune driving trials, the coordinator to the Optuna study. The only module that imports ray.

    Tune asks StudySearcher for a trial -> the run claims one in storage -> a TrialWorker iterates the trainable, saves checkpoints
    and returns a TrialReport an epoch -> StudyScheduler hands it to the TrialCoordinator -> the TrialCoordinator stores it and says stop or go on.

Ray's own files are scratch. What a search knows is in SQL and in the checkpoints, so a run that is killed at any moment is
resumed by starting another one. Workers get the trial and the place of its checkpoints, never the database's URL.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before ray is imported. Its uv hook would start every worker through `uv run`, its usage report wants a network, its
# loggers write files that nobody reads, and this process handles Ctrl-C itself.
os.environ.update(
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_AIR_NEW_OUTPUT="0",
    RAY_CHDIR_TO_TRIAL_DIR="0",
    RAY_DEDUP_LOGS_SKIP_REGEX=".",  # log_to_driver=False still lets "(raylet) A worker died" through
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    TUNE_DISABLE_SIGINT_HANDLER="1",
    TUNE_DISABLE_STRICT_METRIC_CHECKING="1",
    TUNE_PRINT_ALL_TRIAL_ERRORS="0",
    TUNE_GLOBAL_CHECKPOINT_S="86400",
)

import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from hpo.errors import SettingError
from hpo.paths import RunsDir
from hpo.search.coordinator import TrialCoordinator
from hpo.search.listener import ProgressListener
from hpo.search.samplers import build_pruner, build_sampler
from hpo.search.slots import Slots
from hpo.search.worker import TrialReport, TrialSpec, run_trial, watchdog
from hpo.space.model import Space
from hpo.trainable import load_trainable

if TYPE_CHECKING:  # workers import this module too, and have no use for a database
    from storage.studies import Study

OBJECT_STORE_BYTES = 100 * 2**20  # reports are small; data sets are read by the workers themselves
POLL_SECONDS = 1.0  # between looks for work while other runs hold the rest of it


# --- in the worker --------------------------------------------------------------------------------------------------


class TrialWorker(tune.Trainable):
    """A Ray actor that runs one trial after another: torch is imported once per worker, not once per trial."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial. Nothing here may fail: Tune would not say of which trial."""
        self._spec = TrialSpec(**config["spec"])
        self._reports: Generator[TrialReport, None, None] | None = None
        # Here, where no epoch is timed, what takes seconds to import. `step` meets the same error again, and reports it.
        with suppress(Exception):
            import torch  # noqa: F401

            if self._spec.command is None:
                load_trainable(self._spec.trainable)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        self.setup(new_config)
        return True

    def end(self) -> None:
        """Stop what the trial has running, such as a script."""
        if self._reports is not None:
            self._reports.close()

    def step(self) -> dict[str, Any]:
        """Run one epoch."""
        if self._reports is None:
            self._reports = run_trial(self._spec)
        with watchdog(self._spec):
            return {"report": next(self._reports)}


# --- in the driver --------------------------------------------------------------------------------------------------


class StudySearcher(Searcher):
    """Tune's way of asking for trials."""

    def __init__(self, coordinator: TrialCoordinator) -> None:
        super().__init__()
        self._coordinator = coordinator

    def suggest(self, trial_id: str) -> Any:
        """Return the configuration of a Tune trial, None for not now, or Searcher.FINISHED."""
        spec = self._coordinator.next_trial(trial_id)
        if spec is None:
            return Searcher.FINISHED if self._coordinator.is_done else None
        return {"spec": vars(spec)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: StudyScheduler has heard of it, with more detail."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: SQL holds all that is to be resumed from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see save."""


class StudyScheduler(FIFOScheduler):
    """Tune's way of telling results, and of being told which trials go on."""

    def __init__(self, coordinator: TrialCoordinator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._coordinator = coordinator

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Set how often a trial may be started again: crashes of earlier runs count too."""
        if trial.num_failures == 0:
            trial.max_failures = self._coordinator.retries_left(trial.trial_id)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Store an epoch and decide."""
        ended = self._coordinator.on_report(trial.trial_id, result["report"])
        if ended and trial.temporary_state.ray_actor is not None:
            # Its actor may get no other trial for a while, and what this one has running must not go on.
            trial.temporary_state.ray_actor.end.remote()
        return str(TrialScheduler.STOP if ended else TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Hear that a worker died. Tune has counted the failure already, and written Ray's account of it."""
        details = ""
        with suppress(OSError):
            details = Path(trial.error_file).read_text().rpartition("Failure # ")[2]
        self._coordinator.on_crash(trial.trial_id, details, retried=trial.should_recover())

    def choose_trial_to_run(self, tune_controller: Any, **_: Any) -> Any:
        """Give back, when stopping, the trials that wait for their worker to start."""
        if self._coordinator.stopping:
            for trial in list(tune_controller.get_trials()):
                if trial.status == trial.PENDING:
                    self._coordinator.release(trial.trial_id)
                    tune_controller.stop_trial(trial)
        return super().choose_trial_to_run(tune_controller)


class SilentReporter(TrialProgressCallback):
    """Takes the place of Tune's own printing, which verbose=0 does not wholly stop."""

    def log_result(self, *_: Any, **__: Any) -> None:
        """Print nothing."""

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        """Print nothing."""


@dataclass(frozen=True)
class SearchOutcome:
    """How a search ended.

    Attributes:
        stopped: why it ended before its work was done; empty if it was done.
        interrupted: whether that was Ctrl-C or SIGTERM.
    """

    stopped: str
    interrupted: bool


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Join the Ray cluster at an address, or start Ray inside this machine.

    Raises:
        SettingError: no cluster answers at the address.
    """
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="hpo-ray-", ignore_cleanup_errors=True) as scratch:
        options: dict[str, Any] = {"address": address}
        if address is None:
            options = {"address": "local", "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
            options["_temp_dir"] = scratch
        try:
            ray.init(logging_level=logging.CRITICAL, log_to_driver=False, **options)
        except ConnectionError as error:
            raise SettingError(f"no Ray cluster answers at RAY_ADDRESS {address}: {error}") from None
        try:
            yield
        finally:
            ray.shutdown()


def cluster_size() -> tuple[float, float]:
    """Return the cores and the GPUs of the cluster that is open."""
    have = ray.cluster_resources()
    return have.get("CPU", 1.0), have.get("GPU", 0.0)


def run_trials(
    space: Space,
    study: Study,
    slots: Slots,
    *,
    provenance: Mapping[str, Any],
    data_dir: Path,
    runs_dir: RunsDir,
    listener: ProgressListener,
) -> SearchOutcome:
    """Run the trials that a study still lacks. Needs an open `cluster`.

    Args:
        space: the search.
        study: where results go, and what earlier runs left.
        slots: how many trials run at a time, and on what.
        provenance: of this run: versions, command.
        data_dir: handed to the trainable.
        runs_dir: where checkpoints are written; every worker must reach it.
        listener: is told what happens.

    Raises:
        StorageError: the database failed for good; the trials in flight are resumable.
    """
    from storage.run import Run

    study.optuna_study.pruner = build_pruner(space)
    run = Run(
        study,
        config_key=space.config_key,
        provenance=provenance,
        draw=None if space.is_grid else space.draw,
        max_trials=space.budget.trials,
        learns=space.learns_from_results,
    )
    with run:
        if space.is_grid:
            run.enqueue(space.planned_points(), space.distributions())
        else:
            study.optuna_study.sampler = build_sampler(space, run.run_id)
        coordinator = TrialCoordinator(space, run, slots, data_dir=data_dir, runs_dir=runs_dir, listener=listener)
        if space.budget.time is not None:
            coordinator.set_deadline(time.monotonic() + space.budget.time - run.elapsed_seconds())
        try:
            with _signals(coordinator, listener):
                _drive(coordinator, slots)
        except KeyboardInterrupt:
            coordinator.stop("interrupted")
        finally:
            coordinator.release_all()
        if coordinator.error is not None:
            raise coordinator.error
        return SearchOutcome(coordinator.stopping, coordinator.stopping == "interrupted")


def _drive(coordinator: TrialCoordinator, slots: Slots) -> None:
    with tempfile.TemporaryDirectory(prefix="hpo-ray-") as scratch:
        tune.run(
            TrialWorker,
            name="trials",
            storage_path=scratch,
            search_alg=StudySearcher(coordinator),
            scheduler=StudyScheduler(coordinator),
            num_samples=-1,
            # Never more claimed than can run: a trial that waits in a driver is a trial that no other driver can take.
            max_concurrent_trials=slots.count,
            resources_per_trial={"cpu": slots.cpu, "gpu": slots.gpu},
            reuse_actors=True,
            raise_on_failed_trial=False,
            callbacks=[SilentReporter()],
            verbose=0,
        )


@contextmanager
def _signals(coordinator: TrialCoordinator, listener: ProgressListener) -> Iterator[None]:
    """Ctrl-C or SIGTERM once: stop after the epochs in flight. Twice: stop now."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: object) -> None:
        if coordinator.stopping == "interrupted":
            raise KeyboardInterrupt
        coordinator.stop("interrupted")
        listener.note("stopping after the epochs in flight; Ctrl-C again stops at once. Both are resumable")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
