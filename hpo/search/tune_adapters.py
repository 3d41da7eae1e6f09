"""What Ray Tune asks, and what it reports: passed on to the coordinator, and its decisions to Tune."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpo.search.cluster.membership import POLL_SECONDS, Membership  # first: see there

# isort: split
import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from hpo.search.cluster.versions import describe_versions
from hpo.search.coordinator import TrialCoordinator

IDLE_SECONDS = 5.0  # how long a worker without a trial keeps its cores: a new one takes seconds to start
NODE_DIED = "its node has died"  # in Ray's report of an actor, also of one that was starting


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
            self._scheduler.free_idle_workers()
            return Searcher.FINISHED if self._coordinator.is_done else None
        config = {"spec": vars(spec), "bundle": self._coordinator.bundle(trial_id)}
        return config if self._scheduler.checks is None else config | {"versions": describe_versions()}

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
        membership: of the nodes in the cluster.
    """

    def __init__(self, coordinator: TrialCoordinator, membership: Membership) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.checks = membership.checks
        self._coordinator = coordinator
        self._membership = membership
        self._saving: dict[str, Any] = {}  # {Tune's id: reference to the answer of `TrialWorker.end`}
        self._nodes: dict[str, str] = {}  # {Tune's id: the node on which it runs, or ran last}
        self._controller: Any = None  # Tune's, once it has a trial
        self._is_pending = False
        self._followed_at = -math.inf
        self._idle_since = math.inf  # by the monotonic clock: since then, Tune has a worker without a trial

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Set how often Tune may restart a trial: crashes in earlier runs count too."""
        self._controller = tune_controller
        self._idle_since = math.inf
        if trial.num_failures == 0:
            trial.max_failures = self._coordinator.retries_left(trial.trial_id)
        if self.checks is not None and self.checks.refused:
            trial.update_resources(self.checks.without_refused(trial.placement_group_factory))

    def on_trial_start(self, trial: Any) -> None:
        """Note where a trial runs. Its device time counts from now on."""
        self._nodes[trial.trial_id] = self._membership.node_of(trial.temporary_state.ray_actor)
        self._coordinator.on_started(trial.trial_id)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Store an epoch and decide whether the trial ends."""
        if self.checks is not None and "problem" in result:
            self.checks.refuse(result["node"], result["problem"])
            self._coordinator.release(trial.trial_id)
            return str(TrialScheduler.STOP)
        ending = self._coordinator.on_report(trial.trial_id, result["report"])
        if ending is None and self._nodes.get(trial.trial_id) in self._membership.drained():
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
            _unstage(tune_controller, trial)
            self._coordinator.release(trial.trial_id)
            return
        # Empty if its worker could not start, even if it ran elsewhere before.
        node = self._nodes.pop(trial.trial_id, "")
        details = ""
        with suppress(OSError):
            details = Path(trial.error_file).read_text().rpartition("Failure # ")[2]
        if self.checks is not None and self.checks.is_at_fault(details, trial.placement_group_factory):
            if trial.should_recover():
                trial.run_metadata.num_failures -= 1  # Tune starts it elsewhere, see `on_trial_add`
            else:
                self._coordinator.release(trial.trial_id)
            return
        if self._membership.has_left(node) or NODE_DIED in details:
            # No fault of the trial, so it is not counted. Tune counts it, unless the node was drained.
            is_retried = trial.should_recover()
            trial.max_failures += 1
            self._coordinator.on_node_lost(trial.trial_id, is_retried=is_retried)
            return
        self._coordinator.on_crash(trial.trial_id, details, is_retried=trial.should_recover())

    def choose_trial_to_run(self, tune_controller: Any, **_: Any) -> Any:
        """Return a trial that waits for a worker. Release those that have stopped, and those that cannot get one."""
        self.collect_saved()
        pending = [trial for trial in tune_controller.get_live_trials() if trial.status == trial.PENDING]
        for trial in pending:
            if self._coordinator.stopped or self._coordinator.is_surplus(trial.trial_id):
                self._coordinator.release(trial.trial_id)
                _unstage(tune_controller, trial)
                tune_controller.stop_trial(trial)
        if self._membership.drained():
            # Workers that wait for a trial hold their node. Tune has no public function that ends them.
            tune_controller._cleanup_cached_actors(force_all=True)  # noqa: SLF001
        pending = [trial for trial in pending if trial.status == trial.PENDING]
        self._is_pending = bool(pending)
        self.follow_cluster()
        # Not by the base class: it looks at all trials, also those that have ended, at each step.
        return next(iter(pending), None)

    def free_idle_workers(self) -> None:
        """End the workers that wait for a trial, if a node is drained, or if none has come for `IDLE_SECONDS`.

        Another driver may need their cores, and this one may wait until its trial has ended.
        """
        controller = self._controller
        if controller is None:
            return
        live = controller.get_live_trials()
        if any(trial.status == trial.PENDING for trial in live):  # Tune keeps a worker for it
            return
        kept = controller._actor_cache.num_cached_objects  # noqa: SLF001 # Tune has no public functions for it
        is_idle = kept and not self._saving  # else it may be the one that saves a trial
        self._idle_since = min(self._idle_since, time.monotonic()) if is_idle else math.inf
        if self._membership.drained() or time.monotonic() - self._idle_since >= IDLE_SECONDS:
            controller._cleanup_cached_actors(force_all=True)  # noqa: SLF001
        if not live:  # Tune only asks for a trial then, and would not free the cores of a worker that has ended
            controller._actor_manager.next(timeout=0)  # noqa: SLF001

    def follow_cluster(self) -> None:
        """Tell the user how many trials can run, and the cluster how many more could, from time to time."""
        if time.monotonic() - self._followed_at >= POLL_SECONDS:
            self._followed_at = time.monotonic()
            wanted = self._coordinator.follow_cluster(self._membership.unused_gpus())
            # A trial that waits for a node asks for one itself. It would wait behind what is asked for here.
            self._membership.ask_for(0 if self._is_pending else wanted)


def _unstage(tune_controller: Any, trial: Any) -> None:
    """Remove a trial that will not start from those for which Tune keeps idle workers.

    Tune does not do it for a trial that waits. Such a worker would hold its cores until the search ends, and a trial with
    another request for resources would wait for them.
    """
    if trial in tune_controller._staged_trials:  # noqa: SLF001 # no public function does it
        tune_controller._unstage_trial_with_resources(trial)  # noqa: SLF001


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
