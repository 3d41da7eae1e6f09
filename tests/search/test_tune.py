"""The parts of Ray Tune's driver and workers that can be checked without starting Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock, call, create_autospec

import pytest

from hpo.search.coordinator import TrialCoordinator
from hpo.search.stop import Stop, StopCause
from hpo.search.worker import Ending, TrialReport, TrialSpec
from tests.factories import trial_spec


@pytest.mark.slow
def test_workers_import_no_database() -> None:
    code = "import sys, hpo.search.tune; print(*[m for m in ('optuna', 'sqlalchemy', 'storage') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.slow
def test_drivers_import_no_torch() -> None:
    code = (
        "import sys, hpo.run, hpo.api, hpo.search.tune, hpo.search.estimate, hpo.train.params, hpo.dashboard.publishing\n"
        "import storage.run; from hpo.report.page import preload; preload(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- the search ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tune() -> ModuleType:
    """The module under test. It imports ray."""
    from hpo.search import tune

    return tune


@pytest.fixture
def coordinator() -> Mock:
    """A coordinator that has the methods of the real one, and does nothing."""
    fake: Mock = create_autospec(TrialCoordinator, instance=True)
    fake.stopped = None
    fake.is_surplus.return_value = False
    fake.follow_cluster.return_value = 0
    return fake


@pytest.fixture
def membership() -> Mock:
    """A cluster whose nodes stay."""
    from hpo.search.membership import Membership

    fake: Mock = create_autospec(Membership, instance=True)
    fake.draining.return_value = {}
    fake.has_left.return_value = False
    return fake


class FakeTrial(SimpleNamespace):
    """A trial of Tune's, with the parts that StudyScheduler uses."""

    PENDING = "PENDING"

    def __init__(self, **changes: Any) -> None:
        given = {"trial_id": "a", "status": "RUNNING", "num_failures": 0, "max_failures": 0, "error_file": "none"}
        super().__init__(**(given | {"temporary_state": SimpleNamespace(ray_actor=None)} | changes))


class FakeController:
    """Tune's controller, which keeps the trials that it stops."""

    def __init__(self, *trials: FakeTrial) -> None:
        self._trials = trials
        self.stopped: list[str] = []
        self.evictions = 0

    def get_trials(self) -> tuple[FakeTrial, ...]:
        return self._trials

    def _cleanup_cached_actors(self, *, force_all: bool) -> None:
        self.evictions += force_all

    def stop_trial(self, trial: FakeTrial) -> None:
        trial.status = "TERMINATED"
        self.stopped.append(trial.trial_id)


@pytest.mark.slow
def test_the_configuration_of_a_trial_is_its_whole_spec(tune: ModuleType, coordinator: Mock, tmp_path: Path) -> None:
    spec = coordinator.next_trial.return_value = trial_spec(tmp_path)
    suggested = tune.StudySearcher(coordinator, Mock()).suggest("a")
    coordinator.next_trial.assert_called_once_with("a")
    assert list(suggested) == ["spec", "bundle"]
    assert suggested["bundle"] is coordinator.bundle.return_value
    assert TrialSpec(**suggested["spec"]) == spec


@pytest.mark.slow
@pytest.mark.parametrize(("is_done", "answer"), [(False, None), (True, "FINISHED")])
def test_without_a_trial_tune_asks_again_until_the_coordinator_is_done(
    tune: ModuleType, coordinator: Mock, is_done: bool, answer: str | None
) -> None:
    coordinator.next_trial.return_value = None
    coordinator.is_done = is_done
    scheduler = Mock()
    assert tune.StudySearcher(coordinator, scheduler).suggest("a") == answer
    # Without a trial, Tune does not ask the scheduler: nobody else would release the last one, once it is saved.
    scheduler.collect_saved.assert_called_once_with()


@pytest.mark.slow
def test_a_trial_may_be_restarted_as_often_as_the_coordinator_says(
    tune: ModuleType, coordinator: Mock, membership: Mock
) -> None:
    coordinator.retries_left.return_value = 2
    scheduler = tune.StudyScheduler(coordinator, membership)
    new, restarted = FakeTrial(), FakeTrial(num_failures=1, max_failures=3)
    for trial in (new, restarted):
        scheduler.on_trial_add(None, trial)
    assert (new.max_failures, restarted.max_failures) == (2, 3), "Tune adds a restarted trial again"


@pytest.mark.slow
@pytest.mark.parametrize("ending", [None, *Ending])
@pytest.mark.parametrize("has_actor", [True, False])
def test_a_report_goes_to_the_coordinator_and_what_an_ended_trial_runs_is_stopped(
    tune: ModuleType, coordinator: Mock, membership: Mock, ending: Ending | None, has_actor: bool
) -> None:
    coordinator.on_report.return_value = ending
    actor = Mock() if has_actor else None
    report = TrialReport(epoch=1, metrics={"value": 0.5})
    trial = FakeTrial(temporary_state=SimpleNamespace(ray_actor=actor))
    decision = tune.StudyScheduler(coordinator, membership).on_trial_result(None, trial, {"report": report})
    assert decision == ("CONTINUE" if ending is None else "STOP")
    coordinator.on_report.assert_called_once_with("a", report)
    if actor is not None:
        assert actor.end.remote.call_args_list == ([] if ending is None else [call(ending)])


class FakeRay:
    """Answers of workers that arrive when a test says so."""

    exceptions = SimpleNamespace(RayError=RuntimeError)

    def __init__(self) -> None:
        self.answers: dict[str, str | Exception] = {}

    def wait(self, references: list[str], *, num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        assert num_returns == len(references)
        return [each for each in references if each in self.answers], []

    def get(self, reference: str) -> str:
        answer = self.answers[reference]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.slow
def test_a_stopped_trial_is_released_when_its_last_epoch_is_saved(
    tune: ModuleType, coordinator: Mock, membership: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay()
    monkeypatch.setattr(tune, "ray", ray)
    scheduler, controller = tune.StudyScheduler(coordinator, membership), FakeController()
    coordinator.on_report.return_value = Ending.SAVE
    for name in "abc":
        actor = Mock()
        actor.end.remote.return_value = f"answer {name}"
        trial = FakeTrial(trial_id=name, temporary_state=SimpleNamespace(ray_actor=actor))
        scheduler.on_trial_result(None, trial, {"report": TrialReport(epoch=1)})
    scheduler.choose_trial_to_run(controller)
    coordinator.on_saved.assert_not_called()
    ray.answers["answer b"] = "no checkpoint after epoch 1: disk full"
    ray.answers["answer c"] = RuntimeError("The actor died.\nIts stack")
    scheduler.choose_trial_to_run(controller)
    ray.answers["answer a"] = ""
    scheduler.collect_saved(10.0)
    scheduler.collect_saved(10.0)
    assert coordinator.on_saved.call_args_list == [
        call("b", "no checkpoint after epoch 1: disk full"),
        call("c", "its last epoch was not saved: The actor died."),
        call("a", ""),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("is_retried", [True, False])
@pytest.mark.parametrize(
    ("content", "details"),
    [(None, ""), ("Failure # 1 (at 10:00)\nfirst\nFailure # 2 (at 11:00)\nlast\n", "2 (at 11:00)\nlast\n")],
)
def test_the_death_of_a_worker_is_reported_with_rays_last_account(
    tune: ModuleType,
    coordinator: Mock,
    membership: Mock,
    tmp_path: Path,
    content: str | None,
    details: str,
    is_retried: bool,
) -> None:
    file = tmp_path / "error.txt"
    if content is not None:
        file.write_text(content)
    trial = FakeTrial(error_file=str(file), should_recover=lambda: is_retried)
    tune.StudyScheduler(coordinator, membership).on_trial_error(None, trial)
    coordinator.on_crash.assert_called_once_with("a", details, is_retried=is_retried)


@pytest.mark.slow
def test_a_trial_whose_worker_died_before_it_started_is_released(
    tune: ModuleType, coordinator: Mock, membership: Mock
) -> None:
    tune.StudyScheduler(coordinator, membership).on_trial_error(None, FakeTrial(status="PENDING"))
    coordinator.release.assert_called_once_with("a")
    coordinator.on_crash.assert_not_called()


@pytest.mark.slow
def test_a_trial_holds_its_device_from_when_its_worker_has_started(
    tune: ModuleType, coordinator: Mock, membership: Mock
) -> None:
    scheduler = tune.StudyScheduler(coordinator, membership)
    tune.StartListener(scheduler).on_trial_start(iteration=1, trials=[], trial=FakeTrial(trial_id="a"))
    coordinator.on_started.assert_called_once_with("a")


@pytest.mark.slow
def test_a_search_that_stops_releases_the_trials_that_have_not_started(
    tune: ModuleType, coordinator: Mock, membership: Mock
) -> None:
    running, waiting = FakeTrial(trial_id="a"), FakeTrial(trial_id="b", status="PENDING")
    controller, scheduler = FakeController(running, waiting), tune.StudyScheduler(coordinator, membership)
    assert scheduler.choose_trial_to_run(controller) is waiting
    assert controller.stopped == []
    coordinator.stopped = Stop(StopCause.INTERRUPTED)
    assert scheduler.choose_trial_to_run(controller) is None
    assert controller.stopped == ["b"]
    coordinator.release.assert_called_once_with("b")


# --- a cluster that changes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trial_on_a_drained_node_ends_after_its_epoch_and_idle_workers_leave(
    tune: ModuleType, coordinator: Mock, membership: Mock
) -> None:
    membership.node_of.side_effect = lambda actor: actor.node
    membership.draining.return_value = {"leaves": 20.0}
    coordinator.on_report.return_value = None
    coordinator.leave_node.return_value = Ending.SAVE
    scheduler, controller = tune.StudyScheduler(coordinator, membership), FakeController()
    decisions = {}
    for name in ("stays", "leaves"):
        trial = FakeTrial(trial_id=name, temporary_state=SimpleNamespace(ray_actor=Mock(node=name)))
        scheduler.on_trial_start(trial)
        decisions[name] = scheduler.on_trial_result(None, trial, {"report": TrialReport(epoch=1)})
    assert decisions == {"stays": "CONTINUE", "leaves": "STOP"}
    coordinator.leave_node.assert_called_once_with("leaves")
    membership.draining.return_value = {}
    scheduler.collect_saved = Mock()
    scheduler.choose_trial_to_run(controller)
    assert controller.evictions == 0
    membership.draining.return_value = {"leaves": 20.0}
    scheduler.choose_trial_to_run(controller)
    assert controller.evictions == 1


@pytest.mark.slow
@pytest.mark.parametrize("is_retried", [True, False])
def test_a_node_that_has_left_is_no_failure_of_its_trial(
    tune: ModuleType, coordinator: Mock, membership: Mock, is_retried: bool
) -> None:
    membership.node_of.return_value = "n"
    membership.has_left.side_effect = lambda node: node == "n"
    trial = FakeTrial(max_failures=2, should_recover=lambda: is_retried)
    scheduler = tune.StudyScheduler(coordinator, membership)
    scheduler.on_trial_start(trial)
    scheduler.on_trial_error(None, trial)
    coordinator.on_node_lost.assert_called_once_with("a", is_retried=is_retried)
    coordinator.on_crash.assert_not_called()
    assert trial.max_failures == 3, "Tune has counted a failure"


@pytest.mark.slow
def test_a_trial_for_which_there_is_no_room_any_more_is_released(
    tune: ModuleType, coordinator: Mock, membership: Mock
) -> None:
    trials = [FakeTrial(trial_id=name, status="PENDING") for name in "ab"]
    coordinator.is_surplus.side_effect = lambda name: name == "a"
    controller, scheduler = FakeController(*trials), tune.StudyScheduler(coordinator, membership)
    assert scheduler.choose_trial_to_run(controller) is trials[1]
    coordinator.release.assert_called_once_with("a")
    assert controller.stopped == ["a"]


@pytest.mark.slow
def test_places_are_asked_for_unless_a_trial_waits_for_one(
    tune: ModuleType, coordinator: Mock, membership: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: now))
    coordinator.follow_cluster.return_value = 5
    trial, scheduler = FakeTrial(status="RUNNING"), tune.StudyScheduler(coordinator, membership)
    controller = FakeController(trial)
    scheduler.choose_trial_to_run(controller)
    membership.ask_for.assert_called_once_with(5)
    trial.status = "PENDING"
    scheduler.choose_trial_to_run(controller)
    assert membership.ask_for.call_count == 1, "not more often than the nodes are read"
    now += 10
    scheduler.choose_trial_to_run(controller)
    assert membership.ask_for.call_args_list[1:] == [call(0)]


@pytest.mark.slow
@pytest.mark.parametrize(("was_stopping", "code"), [(True, 130), (False, 1)])
def test_when_ray_has_died_trials_are_released_and_the_user_is_notified(
    tune: ModuleType, coordinator: Mock, was_stopping: bool, code: int
) -> None:
    coordinator.is_interrupted = was_stopping
    listener = Mock()
    assert tune._give_up(coordinator, listener) == code
    coordinator.stop.assert_called_once_with(StopCause.INTERRUPTED)
    coordinator.release_all.assert_called_once_with()
    assert "resumable" in listener.note.call_args.args[0]


# --- the worker ---------------------------------------------------------------------------------------------------------


class Exited(BaseException):
    """The process would have ended."""


@pytest.fixture
def worker_of(tune: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Build a worker whose trial has given reports. It raises `Exited` where it would end its process."""

    def leave(code: int) -> None:
        raise Exited(code)

    def build(*reports: TrialReport) -> Any:
        monkeypatch.setattr(tune, "run_trial", lambda _: (report for report in reports))
        monkeypatch.setattr(tune.os, "_exit", leave)
        worker = tune.TrialWorker.__new__(tune.TrialWorker)
        worker.setup({"spec": vars(trial_spec(tmp_path))})
        return worker

    return build


@pytest.mark.slow
def test_a_worker_gets_its_bundle_of_a_node(tune: ModuleType) -> None:
    requested = tune.TrialWorker.default_resource_request(
        {"spec": {}, "bundle": {"CPU": 2.0, "accelerator_type:T4": 0.001}}
    )
    assert requested.bundles == [{"CPU": 2.0, "accelerator_type:T4": 0.001}]


@pytest.mark.slow
def test_a_worker_that_lost_its_gpu_writes_the_reason_and_ends(worker_of: Any, tmp_path: Path) -> None:
    (tmp_path / "trial").mkdir()
    worker = worker_of(TrialReport(failure="CUDA error: illegal", traceback="Traceback", is_device_lost=True))
    with pytest.raises(Exited, match="1"):
        worker.step()
    assert (tmp_path / "trial/device_lost.txt").read_text() == "CUDA error: illegal\nTraceback"


@pytest.mark.slow
@pytest.mark.parametrize("needs_new_process", [True, False])
def test_a_worker_whose_process_must_not_run_another_trial_takes_none(
    worker_of: Any, needs_new_process: bool, tmp_path: Path
) -> None:
    worker = worker_of(TrialReport(1, needs_new_process=needs_new_process), TrialReport(2))
    assert [worker.step()["report"].epoch for _ in range(2)] == [1, 2], "the trial itself continues"
    assert worker.end(Ending.KEEP) == ""
    config = {"spec": vars(trial_spec(tmp_path))}
    if needs_new_process:
        with pytest.raises(RuntimeError, match="must not run another trial"):
            worker.reset_config(config)
    else:
        assert worker.reset_config(config)
        assert worker.step()["report"].epoch == 1
