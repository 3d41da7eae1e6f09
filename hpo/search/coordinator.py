"""Claims trials, stores what workers report, and decides when a trial ends. Does not import ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hpo.errors import nearest
from hpo.paths import RunsDir
from hpo.search.checkpoints.files import trim_checkpoints
from hpo.search.checkpoints.retention import Retention
from hpo.search.circuit_breaker import UNKNOWN_NODE, CircuitBreaker
from hpo.search.crashes import find_reason
from hpo.search.listener import ProgressListener
from hpo.search.messages import Ending, TrialReport, TrialSpec
from hpo.search.places import Places
from hpo.search.slots import MAX_WANTED, Node, Room, Slots
from hpo.search.stop import Stop, StopCause, find_spent
from hpo.search.trial_specs import SpecBuilder
from hpo.space.model import Space

if TYPE_CHECKING:  # workers import this module too, and need no database
    from storage.ownership import ClaimedTrial
    from storage.parents import Parent
    from storage.pruners import Decision
    from storage.run import Run

POLL_SECONDS = 1.0  # between attempts to claim a trial while other runs hold the rest


@dataclass
class _Running:
    """A trial that this run has claimed.

    Attributes:
        claim: the trial.
        parent: which it continues; None for a trial that starts from its first epoch.
        epoch: the last one that storage holds.
        together: the most trials that this run had when one of them was claimed.
        has_trained: whether it has trained an epoch since it was claimed.
        wait_reason: why it waits when it is released; empty if it is interrupted.
    """

    claim: ClaimedTrial
    parent: Parent | None
    epoch: int
    together: int = 0
    has_trained: bool = False
    wait_reason: str = ""

    @property
    def continued_epoch(self) -> int:
        """The last epoch that it has from its parent; 0 for none."""
        return 0 if self.parent is None else self.parent.epoch

    def __str__(self) -> str:
        return f"trial {self.claim.number}"


class TrialCoordinator:
    """Claims trials for Tune and stores what their workers report.

    Tune identifies a trial by its own `tune_id`. No error of storage is raised into Tune's loop: it is kept in `error`, the
    search stops, and `run_trials` raises it.

    Args:
        space: the search.
        run: the driver's run on the study.
        slots: what each trial gets.
        data: what the trainable gets as `data`.
        runs_dir: where checkpoints are stored.
        listener: receives the events.
        room: returns {kind of GPU: the room for trials} now, see `Slots.room`; None for `slots.count` always.

    Attributes:
        stopped: why no new trial is claimed; None while trials are claimed.
        error: the first error of storage.
    """

    def __init__(
        self,
        space: Space,
        run: Run,
        slots: Slots,
        *,
        data: Mapping[str, Any],
        runs_dir: RunsDir,
        listener: ProgressListener,
        room: Callable[[], Mapping[str, Room]] | None = None,
    ) -> None:
        self._space = space
        self._run = run
        self._places = Places(slots, room)
        self._shown_count = self._places.count  # as the listener knows it
        self._specs = SpecBuilder(space, run.study.unique_name, data, runs_dir)
        self._retention = Retention(space, run.study, runs_dir)
        self._listener = listener
        self._running: dict[str, _Running] = {}  # by Tune's name of the trial
        self._breaker = CircuitBreaker()
        self._ended = run.study.count_ended_keys()  # trials that need not run any more
        self._at_a_time = math.inf  # fewer than there are slots after a trial has found no room next to others
        self._deadlines: dict[StopCause, float] = {}
        self._next_attempt = 0.0
        self._is_exhaustion_noted = False
        self._is_wait_noted = False
        self._is_second_look = False  # at a patience that is spent, although no trial runs
        self._are_gpus_noted = False
        self.stopped: Stop | None = None
        self.error: Exception | None = None

    def set_deadline(self, deadline: float, cause: StopCause = StopCause.TIME_SPENT) -> None:
        """Stop claiming at this time of the monotonic clock; running trials are released after their epoch."""
        self._deadlines[cause] = deadline

    def stop(self, cause: StopCause, details: str = "") -> None:
        """Claim no more trials, and release each running trial after its epoch. The first call says why."""
        self.stopped = self.stopped or Stop(cause, details)

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C or SIGTERM stopped the search."""
        return self.stopped is not None and self.stopped.is_interruption

    def next_trial(self, tune_id: str) -> TrialSpec | None:
        """Claim a trial. Return None if no trial is available now. `is_done` says whether one may come later.

        No more trials are claimed than can run: other drivers cannot take a claimed trial.
        """
        if self._is_over() or time.monotonic() < self._next_attempt or len(self._running) >= self._at_a_time:
            return None
        slots = self._places.take(tune_id)
        if slots is None:
            return None
        spec = self._claim_spec(tune_id, slots)
        if spec is None:
            self._places.leave(tune_id)
        return spec

    def _claim_spec(self, tune_id: str, slots: Slots) -> TrialSpec | None:
        with self._storage_errors_kept():
            is_spent = self._is_patience_spent()
            claim = self._claim(slots, new=not is_spent)
            if self._run.exhausted and not self._is_exhaustion_noted:
                self._is_exhaustion_noted = True
                self._listener.note(f"no new trials: {self._run.exhausted}")
            if claim is None:
                self._next_attempt = time.monotonic() + POLL_SECONDS
                if is_spent and not self._running:  # a trial that still runs may end with a better value
                    self._stop_without_improvement()
                return None
            self._is_second_look = False
            trial = self._running[tune_id] = _Running(claim, self._specs.parent_of(claim), claim.epoch)
            for each in self._running.values():
                each.together = max(each.together, len(self._running))
            first_epoch = claim.epoch or trial.continued_epoch
            self._listener.trial_started(claim.number, claim.params, first_epoch, self._space.max_epochs)
            derived = self._space.derive(claim.params)
            if derived:
                self._run.record(claim, {"derived": derived})
            return self._specs.build(claim, trial.parent, derived, slots)
        return None

    def _stop_without_improvement(self) -> None:
        """Stop the search, unless a trial of another run may end with a better value, or has done so since."""
        patience = self._space.budget.patience
        found = "a better value" if self._space.objectives is None else "a trial for the Pareto front"
        if self._run.others_are_running:
            if not self._is_wait_noted:
                self._is_wait_noted = True
                self._listener.note(
                    f"budget.patience is spent: trials of other drivers still run, and may find {found}"
                )
        elif not self._is_patience_spent():
            return
        elif not self._is_second_look and self._run.has_others():
            self._is_second_look = True  # one may be drawing a trial since before the patience was spent
        else:
            trials = "1 trial has" if patience == 1 else f"{patience} trials in a row have"
            self.stop(StopCause.NO_IMPROVEMENT, f"{trials} not found {found}")

    def bundle(self, tune_id: str) -> dict[str, float]:
        """Return what a trial gets, see `Places.bundle`."""
        return self._places.bundle(tune_id)

    def is_surplus(self, tune_id: str) -> bool:
        """Return whether there is no room for a trial any more, because nodes have left."""
        return self._places.is_surplus(tune_id)

    def follow_cluster(self, unused_gpus: Sequence[Node] = ()) -> int:
        """Notify the listener if the number of trials at a time has changed; return how many more would run at once.

        Args:
            unused_gpus: the nodes that have GPUs, while the trials run on CPUs.
        """
        if unused_gpus and self._space.resources.gpu == "auto" and not self._are_gpus_noted:
            self._are_gpus_noted = True
            self._listener.note(
                f"node {unused_gpus[0].name} has a GPU. There was none when this search started, so its trials run on CPUs. "
                "To use GPUs, press Ctrl-C and run the same command again: all results are kept"
            )
        count = self._places.count
        if count != self._shown_count:
            self._listener.slots_changed(count, self._shown_count)
            self._shown_count = count
        if self.stopped is not None or self._run.finished or self._places.taken < count:
            return 0
        total = self._space.total_trials
        return MAX_WANTED if total is None else max(0, total - self._ended - self._places.taken)

    def _claim(self, slots: Slots, *, new: bool) -> ClaimedTrial | None:
        """Claim a trial whose configuration the search has; one that waits, unless a new one is allowed.

        A program may have changed a trial that waits, or added one. What the database says must not reach a script or a
        trainable unless the search space allows it.
        """
        while (claim := self._claim_once(slots, new=new)) is not None:
            misfit = self._space.find_misfit(claim.params)
            if not misfit:
                break
            reason = f"not in the search space: {misfit}"
            self._run.fail(claim, reason)
            self._listener.trial_started(claim.number, claim.params, claim.epoch, self._space.max_epochs)
            self._listener.trial_ended(claim.number, "FAIL", reason)
        return claim

    def _claim_once(self, slots: Slots, *, new: bool) -> ClaimedTrial | None:
        from storage.usage import Device

        claim = self._run.claim(new=new, device=Device(slots.device, slots.devices))
        stopped = self._run.take_stopped()
        for number, epoch in stopped.items():
            self._retention.trial_ended(number)
            self._listener.trial_ended(number, "PRUNED", f"stopped by {self._space.scheduler.name} after epoch {epoch}")
        if stopped:
            trials = f"{len(stopped)} trials that waited end" if len(stopped) > 1 else "1 trial that waited ends"
            self._listener.note(f"{trials}: others were better at the same epoch")
        return claim

    @property
    def is_done(self) -> bool:
        """Whether this run will claim no more trials."""
        # A trial that still runs may be released, and `hpo retry` may let one run again meanwhile. Tune does not ask again
        # after the answer that the search is done.
        return self._is_over() or (self._run.finished and not self._running)

    def on_started(self, tune_id: str) -> None:
        """A worker runs the trial: its device time counts until the trial ends, or the worker dies."""
        if (trial := self._running.get(tune_id)) is not None:
            self._run.hold_device(trial.claim)

    def retries_left(self, tune_id: str) -> int:
        """Return how many more workers may die while they run a trial."""
        return max(0, self._space.max_failures - self._running[tune_id].claim.crashes)

    def on_report(self, tune_id: str, report: TrialReport) -> Ending | None:
        """Store a report. Return None if the trial continues, else what becomes of its checkpoints.

        A trial that ends because the search stops is released when its last epoch is saved: the caller calls `on_saved`.
        """
        trial = self._running.get(tune_id)
        if trial is None:
            return Ending.KEEP
        from storage.ownership import LostTrialError

        slots = self._places.slots_of(tune_id)

        with self._storage_errors_kept(tune_id):
            if report.provenance is not None:
                self._run.record(trial.claim, {}, {**report.provenance, "gpu": slots.gpu})
            if report.warning:
                self._listener.note(f"{trial}: {report.warning}")
            if report.is_taken_over:
                # By a run that claimed the trial. If this claim is the later one, the trial must be claimed again.
                self._run.release(trial.claim)
                raise LostTrialError(f"{trial} was taken over by another run")
            if report.is_out_of_memory and slots.trials_share_gpu and trial.together > 1:
                return self._release_for_room(tune_id, report.failure)
            if report.failure:
                return self._fail(tune_id, report.failure, report.traceback, report.node)
            self._note_parent(trial, report.continued_epoch)
            for earlier, metrics in sorted(report.history.items()):
                self._restore(trial.claim, earlier, metrics)
            return self._on_epoch(tune_id, trial, report)
        return Ending.KEEP

    def _on_epoch(self, tune_id: str, trial: _Running, report: TrialReport) -> Ending | None:
        claim, epoch, metrics = trial.claim, report.epoch, report.metrics
        for each in self._space.all_objectives:
            if each.metric not in metrics:
                hint = nearest(each.metric, metrics)
                return self._fail(tune_id, f"the trainable reported no metric {each.metric!r}, {hint}", "", report.node)
        if not report.is_recalled:
            self._note_training(trial, report)
        infinite = [name for name, number in metrics.items() if not math.isfinite(number)]
        decision = self._store_epoch(trial, report, is_judged=not infinite)
        # The checkpoint may hold an epoch that storage has, too: the driver died before it acted on it.
        if epoch > trial.epoch or not report.is_recalled:
            trial.epoch = epoch
            self._listener.epoch_ended(claim.number, epoch, metrics)
        if infinite:
            return self._fail(tune_id, f"{infinite[0]} is {metrics[infinite[0]]} after epoch {epoch}")
        if epoch >= self._space.max_epochs:
            return self._complete(tune_id, claim, metrics)
        return self._apply(decision, tune_id, trial, report)

    def _note_training(self, trial: _Running, report: TrialReport) -> None:
        """Note that a trial has trained an epoch, and if it had been trained before."""
        epoch = report.epoch
        if not trial.has_trained and epoch <= trial.epoch:
            self._listener.note(
                f"{trial}: its last checkpoint is of epoch {epoch - 1}, so the epochs from {epoch} to {trial.epoch} "
                "are trained again"
                if epoch > 1
                else f"{trial}: it has no checkpoint, and is trained from its first epoch"
            )
        trial.has_trained = True
        self._breaker.note_epoch(report.node)

    def _store_epoch(self, trial: _Running, report: TrialReport, *, is_judged: bool) -> Decision:
        """Store an epoch, and return what becomes of its trial, if the scheduler judges it."""
        from storage.pruners import Decision

        epoch, metrics = report.epoch, report.metrics
        value = metrics[self._space.metric]
        # What the parent trained is not judged: whoever continues a trial wants more of it.
        is_new = epoch > trial.continued_epoch
        if not (is_judged and is_new and self._space.stops_trials_early and epoch < self._space.max_epochs):
            self._run.report(trial.claim, epoch, metrics, value)
            return Decision.CONTINUE
        # A member of a population that has waited is compared with those that have caught up.
        again = report.is_recalled and self._space.population is not None
        first = trial.continued_epoch + 1
        return self._run.decide(trial.claim, epoch, metrics, value, first_epoch=first, again=again)

    def _complete(self, tune_id: str, claim: ClaimedTrial, metrics: Mapping[str, float]) -> Ending:
        value, *others = (metrics[each.metric] for each in self._space.all_objectives)
        attrs = {name: metrics[name] for name in ("test_accuracy", "test_loss") if name in metrics}
        self._run.complete(claim, value, attrs, other_values=tuple(others))
        return self._end(tune_id, "COMPLETE", "")

    def _apply(self, decision: Decision, tune_id: str, trial: _Running, report: TrialReport) -> Ending | None:
        """Let a trial continue, wait or end after an epoch that is not its last."""
        from storage.pruners import Decision

        epoch = report.epoch
        if decision is Decision.END and self._space.population is not None:
            replacement = self._run.replacement(trial.claim)
            # Its checkpoints stay for now: trials may wait that start from them.
            return self._end(tune_id, "PRUNED", f"replaced by trial {replacement} after epoch {epoch}")
        if decision is Decision.END:
            self._end(tune_id, "PRUNED", f"stopped by {self._space.scheduler.name} after epoch {epoch}")
            return Ending.SAVE_ONLY if self._space.checkpoints.count is None else Ending.DISCARD
        if self._is_over():
            return Ending.SAVE
        if decision is Decision.WAIT:
            why = (
                "others are better so far"
                if self._space.scheduler.promotes_trials
                else "there is little to compare with"
            )
            trial.wait_reason = f"waits after epoch {epoch}: {why}"
            return Ending.SAVE_ONLY
        if not report.is_recalled and self._must_wait(epoch):
            trial.wait_reason = f"waits after epoch {epoch} until others have caught up"
            return Ending.SAVE
        return None

    def _must_wait(self, epoch: int) -> bool:
        """Return whether a member of a population waits after an epoch, so that others that have no slot catch up."""
        population = self._space.population
        if population is None or epoch % self._space.scheduler.interval:
            return False
        is_full = len(self._running) >= min(self._places.count, self._at_a_time)
        return is_full and self._run.are_others_behind(epoch, population)

    def _note_parent(self, trial: _Running, epoch: int | None) -> None:
        """Record from which epoch of its parent a trial starts, if it is not the one that was expected.

        Args:
            trial: the trial.
            epoch: of the parent's checkpoint, 0 if it has none; None if the trial has not read it.
        """
        from storage.records import CONTINUED_FROM

        parent = trial.parent
        if parent is None or epoch is None or epoch == parent.epoch:
            return
        trial.parent = replace(parent, epoch=epoch)
        self._run.record(trial.claim, {CONTINUED_FROM: trial.parent.attribute})
        if epoch == 0:
            self._listener.note(f"{trial}: the checkpoint of {parent} is gone, so it is trained from its first epoch")

    def _restore(self, claim: ClaimedTrial, epoch: int, metrics: Mapping[str, float]) -> None:
        """Store an epoch of the checkpoint that storage lacks, or has from an abandoned attempt."""
        value = metrics.get(self._space.metric)
        if value is not None and repr(claim.values.get(epoch)) != repr(value):  # by text: NaN equals NaN here
            self._run.report(claim, epoch, metrics, value)

    def on_crash(self, tune_id: str, details: str, *, is_retried: bool) -> None:
        """Count the death of a worker; fail its trial if no retry is left."""
        trial = self._running.get(tune_id)
        if trial is None:
            return
        with self._storage_errors_kept(tune_id):
            self._run.record_crash(trial.claim)
            reason, details = find_reason(self._specs.folder(trial.claim), details, self._space.trial_timeout)
            if is_retried:
                self._listener.note(f"{trial}: {reason}; it restarts from its last checkpoint")
            else:
                self._fail(tune_id, f"{reason} (max_failures {self._space.max_failures})", details)

    def on_node_lost(self, tune_id: str, *, is_retried: bool) -> None:
        """A worker has died with its node, or its node is about to leave.

        Args:
            tune_id: Tune's name of the trial.
            is_retried: whether Tune starts the trial again. Otherwise it is released.
        """
        trial = self._running.get(tune_id)
        if trial is None:
            return
        with self._storage_errors_kept(tune_id):
            self._run.free_device(trial.claim)
            text = "its machine has left the cluster"
            if is_retried:
                self._listener.note(f"{trial}: {text}; it restarts from its last checkpoint")
            else:
                trial.wait_reason = f"{text}, resumable"
                self.release(tune_id)

    def leave_node(self, tune_id: str) -> Ending | None:
        """End a trial after its epoch, because its node is drained: it is saved, and resumed on another one."""
        trial = self._running.get(tune_id)
        if trial is None:
            return None
        trial.wait_reason = f"its machine will leave the cluster, saved after epoch {trial.epoch}, resumable"
        return Ending.SAVE

    def release_all(self) -> None:
        """Store everything reported so far, release the trials that have not ended, and delete superfluous checkpoints.

        If the database cannot be used, no trial is released, because each attempt would wait as long as the first. Other
        runs take the trials when the lease of this run has expired. After Ctrl-C or an error, all of this waits for the
        database for `storage.run.EXIT_SECONDS` at most.
        """
        if self.error is not None or self.is_interrupted:
            self._run.leave()
        is_stored = False
        with self._storage_errors_kept():
            self._run.flush()
            is_stored = True
        if is_stored:
            for tune_id in list(self._running):
                self.release(tune_id)
            self._retention.run_ended()

    def on_saved(self, tune_id: str, warning: str) -> None:
        """Release a trial that was stopped, now that its last epoch is saved.

        After Ctrl-C, `release_all` does so: it does not wait long for a database that is away.

        Args:
            tune_id: Tune's name of the trial.
            warning: why its last epoch is not saved; empty if it is.
        """
        trial = self._running.get(tune_id)
        if warning:
            self._listener.note(f"{trial}: {warning}" if trial else warning)
        if not self.is_interrupted and self.error is None:
            self.release(tune_id)

    def release(self, tune_id: str) -> None:
        """Release one trial if it has not ended: it is WAITING, and any run may resume it."""
        trial = self._running.get(tune_id)
        if trial is not None:
            with self._storage_errors_kept(tune_id):
                self._run.release(trial.claim)
                interrupted = f"interrupted after epoch {trial.epoch}, resumable"
                self._end(tune_id, "WAITING", trial.wait_reason or interrupted)

    def _release_for_room(self, tune_id: str, reason: str) -> Ending:
        """Release a trial that found no room on the GPU next to others, and run fewer trials at a time from now on.

        Each such failure of a trial follows a claim with fewer others, so it cannot repeat forever: alone, the trial fails.
        """
        trial = self._running[tune_id]
        self._at_a_time = min(self._at_a_time, trial.together - 1)
        self._run.release(trial.claim)
        self._listener.note(
            f"{trial}: {reason.splitlines()[0]}. {trial.together} trials ran at a time; "
            f"from now on, this run has at most {self._at_a_time:g}"
        )
        return self._end(tune_id, "WAITING", "out of memory next to other trials, it is resumed with fewer")

    def _fail(self, tune_id: str, reason: str, details: str = "", node: str = UNKNOWN_NODE) -> Ending:
        trial = self._running[tune_id]
        self._run.fail(trial.claim, reason, details)
        broken = "" if trial.has_trained else self._breaker.note_failure(node, self._places.count)
        if broken:
            self.stop(StopCause.BROKEN, broken)
        return self._end(tune_id, "FAIL", reason)

    def _end(self, tune_id: str, state: str, text: str) -> Ending:
        claim = self._running.pop(tune_id).claim
        self._places.leave(tune_id)
        if state != "WAITING" and self._space.population is None:
            trim_checkpoints(self._specs.folder(claim), claim.token)
        self._ended += state != "WAITING"
        if state in {"COMPLETE", "PRUNED"}:
            self._retention.trial_ended(claim.number)
        self._next_attempt = 0.0
        self._listener.trial_ended(claim.number, state, text)
        return Ending.KEEP

    def _is_over(self) -> bool:
        for cause, deadline in sorted(self._deadlines.items(), key=lambda each: each[1]):
            if time.monotonic() >= deadline:
                self.stop(cause)
        if self.stopped is None and self._space.budget.shows_device_time:
            with self._storage_errors_kept():
                used = self._run.device_seconds()
                self._listener.device_time_used(used)
                self.stopped = find_spent(self._space.budget, used)
        return self.stopped is not None

    def _is_patience_spent(self) -> bool:
        """Whether too many trials in a row ended without a better value. Those that wait are still run."""
        patience = self._space.budget.patience
        return patience is not None and self._run.is_patience_spent(patience, self._space.directions)

    @contextmanager
    def _storage_errors_kept(self, tune_id: str | None = None) -> Iterator[None]:
        """Catch storage errors, so that none reaches Tune's loop. The search stops, and `run_trials` raises the first one.

        Args:
            tune_id: the trial that is dropped if another run has taken it over.
        """
        from storage.errors import StorageError
        from storage.ownership import LostTrialError

        try:
            yield
        except LostTrialError as error:
            if tune_id is not None:
                if (trial := self._running.pop(tune_id, None)) is not None:
                    self._run.free_device(trial.claim)
                self._places.leave(tune_id)
                self._next_attempt = 0.0
            self._listener.note(str(error))
        except StorageError as error:
            self.error = self.error or error
            self.stop(StopCause.STORAGE_FAILED)
