"""Ray Tune driving trials, the bridge to the Optuna study. The only module that imports ray.

    Tune asks Asker for a trial -> the run claims one in storage -> a TrialWorker iterates the trainable, saves checkpoints
    and returns a Message an epoch -> Referee hands it to the Bridge -> the Bridge stores it and says stop or go on.

Ray's own files are scratch. What a search knows is in SQL and in the checkpoints, so a run that is killed at any moment is
resumed by starting another one. Workers get the trial and the place of its checkpoints, never the database's URL.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

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

from hpo.checkpoints import trim_checkpoints
from hpo.errors import SettingError, nearest
from hpo.space import Space, load_trainable
from hpo.worker import HANG_FILE, Assignment, Message, run_trial, watchdog

if TYPE_CHECKING:  # workers import this module too, and have no use for a database
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

    from storage.runs import Run
    from storage.studies import Study
    from storage.writer import Claim

OBJECT_STORE_BYTES = 100 * 2**20  # messages are small; data sets are read by the workers themselves
POLL_SECONDS = 1.0  # between looks for work while other runs hold the rest of it


class View(Protocol):
    """Who is told what happens, as it happens."""

    def trial_started(self, number: int, params: Mapping[str, Any], epoch: int, max_epochs: int) -> None:
        """A trial starts, or goes on after an epoch."""

    def epoch_ended(self, number: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """A trial has finished an epoch; its checkpoint is saved, and storage holds it or will in a moment."""

    def trial_ended(self, number: int, state: str, text: str) -> None:
        """A trial is COMPLETE, PRUNED, FAIL, or WAITING to be resumed; the text says why."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


@dataclass(frozen=True)
class Slots:
    """How trials share the machine: `count` at a time, each with so many cores and GPUs."""

    count: int
    cpu: float
    gpu: float

    @property
    def threads(self) -> int:
        """Torch's threads in one trial."""
        return max(1, int(self.cpu))

    @property
    def device(self) -> str:
        """The device of a trial."""
        return "cuda" if self.gpu > 0 else "cpu"


# --- in the worker --------------------------------------------------------------------------------------------------


class TrialWorker(tune.Trainable):
    """A Ray actor that runs one trial after another: torch is imported once per worker, not once per trial."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial. Nothing here may fail: Tune would not say of which trial."""
        self._assignment = Assignment(**config["assignment"])
        self._messages: Generator[Message, None, None] | None = None
        # Here, where no epoch is timed, what takes seconds to import. `step` meets the same error again, and reports it.
        with suppress(Exception):
            import torch  # noqa: F401

            if self._assignment.command is None:
                load_trainable(self._assignment.trainable)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        self.setup(new_config)
        return True

    def end(self) -> None:
        """Stop what the trial has running, such as a script."""
        if self._messages is not None:
            self._messages.close()

    def step(self) -> dict[str, Any]:
        """Run one epoch."""
        if self._messages is None:
            self._messages = run_trial(self._assignment)
        with watchdog(self._assignment):
            return {"message": next(self._messages)}


# --- in the driver --------------------------------------------------------------------------------------------------


class Bridge:
    """What every message means for the study. Tune calls it; it never lets an error pass into Tune's loop."""

    def __init__(self, space: Space, run: Run, slots: Slots, *, data_dir: Path, checkpoints: Path, view: View) -> None:
        self._space = space
        self._run = run
        self._slots = slots
        self._data_dir = data_dir
        self._checkpoints = checkpoints
        self._view = view
        self._claims: dict[str, Claim] = {}
        self._epochs: dict[str, int] = {}
        self._deadline = math.inf
        self._next_look = 0.0
        self._told_exhausted = False
        self.stopping = ""  # why no new work is taken; empty while there is no reason
        self.error: Exception | None = None

    def stop_at(self, deadline: float) -> None:
        """Stop cleanly at a time of the monotonic clock."""
        self._deadline = deadline

    def stop(self, why: str) -> None:
        """Let each trial finish its epoch, then give it back."""
        self.stopping = self.stopping or why

    def next_assignment(self, tune_id: str) -> Assignment | None:
        """Claim a trial; None for not now, or for never again (`stopping` or the run's `finished`)."""
        if self._is_over() or time.monotonic() < self._next_look:
            return None
        with self._guarded():
            claim = self._run.claim()
            if self._run.exhausted and not self._told_exhausted:
                self._told_exhausted = True
                self._view.note(f"no new trials: {self._run.exhausted}")
            if claim is None:
                self._next_look = time.monotonic() + POLL_SECONDS
                return None
            self._claims[tune_id] = claim
            self._epochs[tune_id] = claim.epoch
            self._view.trial_started(claim.number, claim.params, claim.epoch, self._space.max_epochs)
            derived = self._space.derive(claim.params)
            if derived:
                self._run.record(claim, {"derived": derived})
            return Assignment(
                trainable=self._space.trainable,
                command=self._space.command,
                params=claim.params | derived,
                data={**self._space.data.model_dump(), "data_dir": str(self._data_dir)},
                seed=self._space.seed,
                max_epochs=self._space.max_epochs,
                stored_epoch=claim.epoch,
                folder=str(self._folder(claim)),
                checkpoint_every=self._space.checkpoint_every,
                device=self._slots.device,
                threads=self._slots.threads,
                timeout=self._space.trial_timeout,
            )
        return None

    @property
    def nothing_left(self) -> bool:
        """Whether no trial will ever be given out again by this run."""
        return self._is_over() or self._run.finished

    def retries_left(self, tune_id: str) -> int:
        """Return how many more workers may die over a trial."""
        return max(0, self._space.max_failures - self._claims[tune_id].crashes)

    def on_message(self, tune_id: str, message: Message) -> bool:
        """Store what a worker said; return whether its trial ends here."""
        claim = self._claims.get(tune_id)
        if claim is None:
            return True
        with self._guarded(lost=tune_id):
            if message.provenance is not None:
                self._run.record(claim, {}, {**message.provenance, "gpu": self._slots.gpu})
            if message.warning:
                self._view.note(f"trial {claim.number}: {message.warning}")
            if message.failure:
                return self._fail(tune_id, message.failure, message.traceback)
            return self._on_epoch(tune_id, claim, message)
        return True

    def _on_epoch(self, tune_id: str, claim: Claim, message: Message) -> bool:
        epoch, metrics = message.epoch, message.metrics
        value = metrics.get(self._space.metric)
        if value is None:
            hint = nearest(self._space.metric, metrics)
            return self._fail(tune_id, f"the trainable reported no metric {self._space.metric!r}, {hint}")
        if epoch > self._epochs[tune_id] or not message.recalled:  # else the worker before this one has told it
            self._run.report(claim, epoch, metrics, value)
            self._epochs[tune_id] = epoch
            self._view.epoch_ended(claim.number, epoch, metrics)
        bad = [name for name, number in metrics.items() if not math.isfinite(number)]
        if bad:
            return self._fail(tune_id, f"{bad[0]} is {metrics[bad[0]]} after epoch {epoch}")
        if epoch >= self._space.max_epochs:
            attrs = {name: metrics[name] for name in ("test_accuracy", "test_loss") if name in metrics}
            self._run.complete(claim, value, attrs)
            return self._end(tune_id, "COMPLETE", "")
        if self._space.scheduler.name != "none" and self._run.should_prune(claim):
            self._run.prune(claim)
            return self._end(tune_id, "PRUNED", f"stopped by {self._space.scheduler.name} after epoch {epoch}")
        if self._is_over():
            return self._give_back(tune_id)
        return False

    def on_crash(self, tune_id: str, details: str, *, retried: bool) -> None:
        """Count a worker that died; end its trial if that was one too many."""
        claim = self._claims.get(tune_id)
        if claim is None:
            return
        with self._guarded(lost=tune_id):
            self._run.record_crash(claim)
            reason, details = self._crash_reason(claim, details)
            if retried:
                self._view.note(f"trial {claim.number}: {reason}; starting it again from its last checkpoint")
            else:
                self._fail(tune_id, f"{reason} (max_failures {self._space.max_failures})", details)

    def release_all(self) -> None:
        """Store what was told, and give every trial back that has not ended: the run stops here and now."""
        with self._guarded():
            self._run.flush()
        for tune_id in list(self._claims):
            self.release(tune_id)

    def release(self, tune_id: str) -> None:
        """Give one trial back, if it has not ended."""
        if tune_id in self._claims:
            with self._guarded(lost=tune_id):
                self._give_back(tune_id)

    def _give_back(self, tune_id: str) -> bool:
        self._run.release(self._claims[tune_id])
        return self._end(tune_id, "WAITING", f"interrupted after epoch {self._epochs[tune_id]}, resumable")

    def _fail(self, tune_id: str, reason: str, details: str = "") -> bool:
        self._run.fail(self._claims[tune_id], reason, details)
        return self._end(tune_id, "FAIL", reason)

    def _end(self, tune_id: str, state: str, text: str) -> bool:
        claim = self._claims.pop(tune_id)
        del self._epochs[tune_id]
        if state != "WAITING":
            trim_checkpoints(self._folder(claim))
        self._next_look = 0.0
        self._view.trial_ended(claim.number, state, text)
        return True

    def _folder(self, claim: Claim) -> Path:
        return self._checkpoints / str(claim.number)

    def _is_over(self) -> bool:
        if time.monotonic() >= self._deadline:
            self.stop("the time budget is spent")
        return bool(self.stopping)

    def _crash_reason(self, claim: Claim, details: str) -> tuple[str, str]:
        hang = self._folder(claim) / HANG_FILE
        with suppress(OSError):
            stacks = hang.read_text()
            if stacks:
                hang.unlink()
                return f"no epoch within trial_timeout {self._space.trial_timeout:g} s, worker killed", stacks
        if "OutOfMemory" in details or "running low on memory" in details:
            return "out of memory: Ray killed the worker", details
        return "the worker process died", details

    @contextmanager
    def _guarded(self, lost: str | None = None) -> Iterator[None]:
        """Keep errors of storage out of Tune's loop: the run ends in order, and `search` raises the error."""
        from storage.database import StorageError
        from storage.writer import LostTrialError

        try:
            yield
        except LostTrialError as error:
            if lost is not None:
                self._claims.pop(lost, None)
            self._view.note(str(error))
        except StorageError as error:
            self.error = self.error or error
            self.stop("storage failed")


class Asker(Searcher):
    """Tune's way of asking for trials."""

    def __init__(self, bridge: Bridge) -> None:
        super().__init__()
        self._bridge = bridge

    def suggest(self, trial_id: str) -> Any:
        """Return the configuration of a Tune trial, None for not now, or Searcher.FINISHED."""
        assignment = self._bridge.next_assignment(trial_id)
        if assignment is None:
            return Searcher.FINISHED if self._bridge.nothing_left else None
        return {"assignment": vars(assignment)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: Referee has heard of it, with more detail."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: SQL holds all that is to be resumed from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see save."""


class Referee(FIFOScheduler):
    """Tune's way of telling results, and of being told which trials go on."""

    def __init__(self, bridge: Bridge) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bridge = bridge

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Set how often a trial may be started again: crashes of earlier runs count too."""
        if trial.num_failures == 0:
            trial.max_failures = self._bridge.retries_left(trial.trial_id)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Store an epoch and decide."""
        ended = self._bridge.on_message(trial.trial_id, result["message"])
        if ended and trial.temporary_state.ray_actor is not None:
            # Its actor may get no other trial for a while, and what this one has running must not go on.
            trial.temporary_state.ray_actor.end.remote()
        return str(TrialScheduler.STOP if ended else TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Hear that a worker died. Tune has counted the failure already, and written Ray's account of it."""
        details = ""
        with suppress(OSError):
            details = Path(trial.error_file).read_text().rpartition("Failure # ")[2]
        self._bridge.on_crash(trial.trial_id, details, retried=trial.should_recover())

    def choose_trial_to_run(self, tune_controller: Any, **_: Any) -> Any:
        """Give back, when stopping, the trials that wait for their worker to start."""
        if self._bridge.stopping:
            for trial in list(tune_controller.get_trials()):
                if trial.status == trial.PENDING:
                    self._bridge.release(trial.trial_id)
                    tune_controller.stop_trial(trial)
        return super().choose_trial_to_run(tune_controller)


class Silence(TrialProgressCallback):
    """Takes the place of Tune's own printing, which verbose=0 does not wholly stop."""

    def log_result(self, *_: Any, **__: Any) -> None:
        """Print nothing."""

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        """Print nothing."""


@dataclass(frozen=True)
class Outcome:
    """How a search ended.

    Attributes:
        stopped: why it ended before its work was done; empty if it was done.
        interrupted: whether that was Ctrl-C or SIGTERM.
    """

    stopped: str
    interrupted: bool


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
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


def plan_slots(space: Space, trials: int | None) -> Slots:
    """Divide what the cluster has among trials.

    Args:
        space: its `resources` are honoured; `auto` is one GPU a trial where there are GPUs, else an equal share of the
            cores, at least one.
        trials: how many there are to run, None if not known.

    Raises:
        SettingError: a trial asks for more than the cluster has.
    """
    have = ray.cluster_resources()
    cores, gpus = have.get("CPU", 1.0), have.get("GPU", 0.0)
    gpu = (1.0 if gpus else 0.0) if space.resources.gpu == "auto" else space.resources.gpu
    if gpu > gpus:
        raise SettingError(
            f"resources.gpu is {gpu:g}, but there {'is' if gpus == 1 else 'are'} {gpus:g} here: lower it, or leave it auto"
        )
    # A fraction of a GPU never spans two: 0.15 on 8 GPUs is 8 x 6.
    by_gpu = math.inf if gpu == 0 else (gpus * (1 / gpu // 1) if gpu < 1 else gpus // gpu)
    if space.resources.cpu == "auto":
        count = int(min(by_gpu, cores, trials or math.inf))
        return Slots(max(1, count), float(max(1, cores // max(1, count))), gpu)
    if space.resources.cpu > cores:
        raise SettingError(f"resources.cpu is {space.resources.cpu:g}, but there are {cores:g} cores here")
    return Slots(int(min(by_gpu, cores // space.resources.cpu)), space.resources.cpu, gpu)


def search(
    space: Space,
    study: Study,
    slots: Slots,
    *,
    provenance: Mapping[str, Any],
    data_dir: Path,
    checkpoints: Path,
    view: View,
) -> Outcome:
    """Run the trials that a study still lacks. Needs an open `cluster`.

    Args:
        space: the search.
        study: where results go, and what earlier runs left.
        slots: how many trials run at a time, and on what.
        provenance: of this run: versions, command.
        data_dir: handed to the trainable.
        checkpoints: a folder that all workers can reach.
        view: is told what happens.

    Raises:
        StorageError: the database failed for good; the trials in flight are resumable.
    """
    from storage.runs import Run

    is_grid = space.sampler.name == "grid"
    study.optuna.pruner = build_pruner(space)
    run = Run(
        study,
        key_of=space.key,
        provenance=provenance,
        draw=None if is_grid else space.draw,
        max_trials=space.budget.trials,
        learns=space.sampler.name not in {"grid", "random", "qmc"},
    )
    with run:
        if is_grid:
            run.enqueue(itertools.islice(space.grid(), space.budget.trials), space.distributions())
        else:
            study.optuna.sampler = build_sampler(space, run.run)
        bridge = Bridge(space, run, slots, data_dir=data_dir, checkpoints=checkpoints / study.unique_name, view=view)
        if space.budget.time is not None:
            bridge.stop_at(time.monotonic() + space.budget.time - run.spent_seconds())
        try:
            with _signals(bridge, view):
                _drive(bridge, slots)
        except KeyboardInterrupt:
            bridge.stop("interrupted")
        finally:
            bridge.release_all()
        if bridge.error is not None:
            raise bridge.error
        return Outcome(bridge.stopping, bridge.stopping == "interrupted")


def _drive(bridge: Bridge, slots: Slots) -> None:
    with tempfile.TemporaryDirectory(prefix="hpo-ray-") as scratch:
        tune.run(
            TrialWorker,
            name="trials",
            storage_path=scratch,
            search_alg=Asker(bridge),
            scheduler=Referee(bridge),
            num_samples=-1,
            # Never more claimed than can run: a trial that waits in a driver is a trial that no other driver can take.
            max_concurrent_trials=slots.count,
            resources_per_trial={"cpu": slots.cpu, "gpu": slots.gpu},
            reuse_actors=True,
            raise_on_failed_trial=False,
            callbacks=[Silence()],
            verbose=0,
        )


@contextmanager
def _signals(bridge: Bridge, view: View) -> Iterator[None]:
    """Ctrl-C or SIGTERM once: stop after the epochs in flight. Twice: stop now."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: object) -> None:
        if bridge.stopping == "interrupted":
            raise KeyboardInterrupt
        bridge.stop("interrupted")
        view.note("stopping after the epochs in flight; Ctrl-C again stops at once. Both are resumable")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def build_sampler(space: Space, run: int) -> BaseSampler:
    """Return Optuna's sampler. Each run draws from a seed of its own: two drivers must not ask for the same points."""
    import optuna
    from optuna import samplers

    base = space.seed if space.sampler.seed is None else space.sampler.seed
    seed = (base * 1_000_003 + run) % 2**32
    options = space.sampler.options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match space.sampler.name:
            case "qmc":
                # All runs share one sequence, whose place storage keeps; but not what precedes it.
                first = samplers.RandomSampler(seed=seed)
                return samplers.QMCSampler(
                    seed=base, independent_sampler=first, warn_independent_sampling=False, **options
                )
            case "tpe":
                if options.get("multivariate") is not False and any(p.when for p in space.parameters.values()):
                    options = {"group": True} | options
                return samplers.TPESampler(seed=seed, **options)
            case "gp":
                return samplers.GPSampler(seed=seed, warn_independent_sampling=False, **options)
            case "cmaes":
                return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False, **options)
            case "nsga2":
                return samplers.NSGAIISampler(seed=seed, **options)
            case _:
                return samplers.RandomSampler(seed=seed)


def build_pruner(space: Space) -> BasePruner:
    """Return Optuna's pruner. It decides from what storage holds, so a resumed search decides as if never stopped."""
    from optuna import pruners

    scheduler = space.scheduler
    match scheduler.name:
        case "asha":
            return pruners.SuccessiveHalvingPruner(
                min_resource=scheduler.grace_period, reduction_factor=scheduler.reduction_factor
            )
        case "hyperband":
            return pruners.HyperbandPruner(
                min_resource=scheduler.grace_period,
                max_resource=space.max_epochs,
                reduction_factor=scheduler.reduction_factor,
            )
        case "median":
            return pruners.MedianPruner(n_warmup_steps=scheduler.grace_period)
        case _:
            return pruners.NopPruner()
