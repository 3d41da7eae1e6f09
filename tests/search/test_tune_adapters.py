"""What passes between Ray Tune and the coordinator, without starting Ray."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock, call, create_autospec

import pytest

from hpo.search.cluster.versions import Problem, describe_versions
from hpo.search.coordinator import TrialCoordinator
from hpo.search.messages import Ending, TrialReport, TrialSpec
from hpo.search.stop import Stop, StopCause
from tests.factories import Clock, trial_spec

if TYPE_CHECKING:
    from ray.tune.utils.object_cache import _ObjectCache

pytestmark = pytest.mark.slow  # importing ray takes seconds


@pytest.fixture(scope="module")
def tune() -> ModuleType:
    """The module under test. It imports ray."""
    from hpo.search import tune_adapters

    return tune_adapters


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
    from hpo.search.cluster.membership import Membership

    fake: Mock = create_autospec(Membership, instance=True)
    fake.drained.return_value = set()
    fake.unused_gpus.return_value = []
    fake.checks = None
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
        self._staged_trials: list[FakeTrial] = []  # they wait for a worker
        self._actor_manager = Mock()
        self._actor_cache: Any = Mock(num_cached_objects=1)

    def get_live_trials(self) -> tuple[FakeTrial, ...]:
        return self._trials

    def _cleanup_cached_actors(self, *, force_all: bool) -> None:
        self.evictions += force_all

    def stage(self, *trials: FakeTrial) -> _ObjectCache:
        """Let trials wait for a worker; return the idle workers, as many of which are kept as trials are staged."""
        from ray.tune.utils.object_cache import _ObjectCache

        self._staged_trials += trials
        cache: _ObjectCache = _ObjectCache()
        self._actor_cache = cache
        for trial in trials:
            cache.increase_max(trial.placement_group_factory)
        return cache

    def _unstage_trial_with_resources(self, trial: FakeTrial) -> None:
        from ray.tune.execution.tune_controller import TuneController

        TuneController._unstage_trial_with_resources(self, trial)  # type: ignore[arg-type]

    def stop_trial(self, trial: FakeTrial) -> None:
        trial.status = "TERMINATED"
        self.stopped.append(trial.trial_id)


def test_the_configuration_of_a_trial_is_its_whole_spec(tune: ModuleType, coordinator: Mock, tmp_path: Path) -> None:
    spec = coordinator.next_trial.return_value = trial_spec(tmp_path)
    suggested = tune.StudySearcher(coordinator, Mock(checks=None)).suggest("a")
    coordinator.next_trial.assert_called_once_with("a")
    assert list(suggested) == ["spec", "bundle"]
    assert suggested["bundle"] is coordinator.bundle.return_value
    assert TrialSpec(**suggested["spec"]) == spec


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


def test_a_trial_may_be_restarted_as_often_as_the_coordinator_says(
    tune: ModuleType, coordinator: Mock, membership: Mock
) -> None:
    coordinator.retries_left.return_value = 2
    scheduler = tune.StudyScheduler(coordinator, membership)
    new, restarted = FakeTrial(), FakeTrial(num_failures=1, max_failures=3)
    for trial in (new, restarted):
        scheduler.on_trial_add(None, trial)
    assert (new.max_failures, restarted.max_failures) == (2, 3), "Tune adds a restarted trial again"


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


def test_a_trial_whose_worker_died_before_it_started_is_released(
    tune: ModuleType, coordinator: Mock, membership: Mock
) -> None:
    trial = FakeTrial(status="PENDING", placement_group_factory="one core")
    controller = FakeController(trial)
    workers = controller.stage(trial)
    tune.StudyScheduler(coordinator, membership).on_trial_error(controller, trial)
    coordinator.release.assert_called_once_with("a")
    coordinator.on_crash.assert_not_called()
    assert workers.total_max_objects == 0, "an idle worker is kept for it, on cores for which others wait"


def test_a_trial_holds_its_device_from_when_its_worker_has_started(
    tune: ModuleType, coordinator: Mock, membership: Mock
) -> None:
    scheduler = tune.StudyScheduler(coordinator, membership)
    tune.StartListener(scheduler).on_trial_start(iteration=1, trials=[], trial=FakeTrial(trial_id="a"))
    coordinator.on_started.assert_called_once_with("a")


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


def test_a_trial_on_a_drained_node_ends_after_its_epoch_and_idle_workers_leave(
    tune: ModuleType, coordinator: Mock, membership: Mock
) -> None:
    membership.node_of.side_effect = lambda actor: actor.node
    membership.drained.return_value = {"leaves"}
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
    membership.drained.return_value = set()
    scheduler.collect_saved = Mock()
    scheduler.choose_trial_to_run(controller)
    assert controller.evictions == 0
    membership.drained.return_value = {"leaves"}
    scheduler.choose_trial_to_run(controller)
    assert controller.evictions == 1


def test_idle_workers_leave_a_drained_node_while_tune_has_no_trial(
    tune: ModuleType, coordinator: Mock, membership: Mock
) -> None:
    """Tune does not ask the scheduler then."""
    scheduler, controller = tune.StudyScheduler(coordinator, membership), FakeController()
    searcher = tune.StudySearcher(coordinator, scheduler)
    coordinator.next_trial.return_value, coordinator.is_done = None, False
    membership.drained.return_value = {"leaves"}
    searcher.suggest("a")
    scheduler.on_trial_add(controller, FakeTrial())
    searcher.suggest("b")
    assert (controller.evictions, controller._actor_manager.next.call_count) == (1, 1)
    membership.drained.return_value = set()
    searcher.suggest("c")
    controller._trials = (FakeTrial(status="PENDING"),)
    membership.drained.return_value = {"leaves"}
    searcher.suggest("d")
    assert controller.evictions == 1, "choose_trial_to_run does it while there is one"


def test_a_worker_that_gets_no_trial_ends_after_some_seconds(
    tune: ModuleType, coordinator: Mock, membership: Mock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = Clock()
    monkeypatch.setattr(tune, "time", clock)
    scheduler, controller = tune.StudyScheduler(coordinator, membership), FakeController()
    searcher = tune.StudySearcher(coordinator, scheduler)
    coordinator.next_trial.return_value, coordinator.is_done = None, False
    scheduler.on_trial_add(controller, FakeTrial())

    def evictions_after(seconds: float) -> int:
        clock.now += seconds
        searcher.suggest("b")
        return controller.evictions

    scheduler._saving["b"], scheduler.collect_saved = Mock(), Mock()
    assert evictions_after(100.0) == 0, "it saves a trial"
    scheduler._saving.clear()
    assert [evictions_after(seconds) for seconds in (100.0, 4.0, 2.0)] == [0, 0, 1]
    controller._actor_cache.num_cached_objects = 0
    assert [evictions_after(seconds) for seconds in (0.0, 100.0)] == [1, 1]
    controller._actor_cache.num_cached_objects = 1
    assert [evictions_after(seconds) for seconds in (0.0, 4.0)] == [1, 1], "it has just become idle"
    scheduler.on_trial_add(controller, FakeTrial())
    assert [evictions_after(seconds) for seconds in (0.0, 4.0)] == [1, 1], "a trial has come"
    controller._trials = (FakeTrial(status="PENDING"),)
    assert evictions_after(100.0) == 1, "it will run that trial"
    controller._trials = (FakeTrial(),)
    calls = controller._actor_manager.next.call_count
    assert evictions_after(100.0) == 2, "another one still runs"
    assert controller._actor_manager.next.call_count == calls, "Tune does it itself then"


def test_a_node_that_dies_while_a_worker_starts_is_no_failure_either(
    tune: ModuleType, coordinator: Mock, membership: Mock, tmp_path: Path
) -> None:
    file = tmp_path / "error.txt"
    file.write_text("Failure # 1 (at noon)\nThe actor died because its node has died. Node Id: ab\n")
    trial = FakeTrial(error_file=str(file), should_recover=lambda: True)
    tune.StudyScheduler(coordinator, membership).on_trial_error(None, trial)
    coordinator.on_node_lost.assert_called_once_with("a", is_retried=True)
    coordinator.on_crash.assert_not_called()


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


def test_a_worker_that_cannot_start_after_a_node_has_left_counts_as_a_failure(
    tune: ModuleType, coordinator: Mock, membership: Mock
) -> None:
    membership.node_of.return_value = "n"
    membership.has_left.side_effect = lambda node: node == "n"
    trial = FakeTrial(max_failures=2, should_recover=lambda: True)
    scheduler = tune.StudyScheduler(coordinator, membership)
    scheduler.on_trial_start(trial)
    for _ in range(2):
        scheduler.on_trial_error(None, trial)
    coordinator.on_node_lost.assert_called_once_with("a", is_retried=True)
    coordinator.on_crash.assert_called_once_with("a", "", is_retried=True)


def test_a_trial_for_which_there_is_no_room_any_more_is_released(
    tune: ModuleType, coordinator: Mock, membership: Mock
) -> None:
    trials = [FakeTrial(trial_id=name, status="PENDING", placement_group_factory=name) for name in "abc"]
    coordinator.is_surplus.side_effect = lambda name: name in "ab"
    controller, scheduler = FakeController(*trials), tune.StudyScheduler(coordinator, membership)
    workers = controller.stage(trials[0], trials[2])  # Tune has not seen the other one yet
    assert scheduler.choose_trial_to_run(controller) is trials[2]
    assert coordinator.release.call_args_list == [call("a"), call("b")]
    assert controller.stopped == ["a", "b"]
    assert workers.total_max_objects == 1, (
        "an idle worker is kept for one that has ended, on cores for which others wait"
    )


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


@pytest.fixture
def checks(membership: Mock) -> Mock:
    """Checks of nodes of which none is refused."""
    from hpo.search.cluster.node_checks import NodeChecks

    fake: Mock = create_autospec(NodeChecks, instance=True, refused=set())
    fake.is_at_fault.return_value = False
    membership.checks = fake
    return fake


def test_a_trial_on_another_machine_gets_the_versions_of_this_one(
    tune: ModuleType, coordinator: Mock, checks: Mock, tmp_path: Path
) -> None:
    coordinator.next_trial.return_value = trial_spec(tmp_path)
    suggested = tune.StudySearcher(coordinator, Mock(checks=checks)).suggest("a")
    assert suggested["versions"] == describe_versions()


def test_a_trial_that_a_worker_hands_back_is_released_and_its_node_gets_no_more(
    tune: ModuleType, coordinator: Mock, membership: Mock, checks: Mock
) -> None:
    scheduler, problem = tune.StudyScheduler(coordinator, membership), Problem("torch is 0.1 and 2.0 here")
    decision = scheduler.on_trial_result(None, FakeTrial(), {"problem": problem, "node": "node-b"})
    assert decision == "STOP"
    checks.refuse.assert_called_once_with("node-b", problem)
    coordinator.release.assert_called_once_with("a")
    coordinator.on_report.assert_not_called()


def test_a_trial_asks_for_nodes_that_are_not_refused(
    tune: ModuleType, coordinator: Mock, membership: Mock, checks: Mock
) -> None:
    coordinator.retries_left.return_value = 0
    scheduler, update = tune.StudyScheduler(coordinator, membership), Mock()
    trial = FakeTrial(placement_group_factory="request", update_resources=update)
    scheduler.on_trial_add(None, trial)
    update.assert_not_called()
    checks.refused = {"node-b"}
    checks.without_refused.return_value = "elsewhere"
    scheduler.on_trial_add(None, trial)
    checks.without_refused.assert_called_once_with("request")
    update.assert_called_once_with("elsewhere")


@pytest.mark.parametrize("is_retried", [True, False])
def test_a_node_that_could_not_start_a_worker_counts_no_failure(
    tune: ModuleType, coordinator: Mock, membership: Mock, checks: Mock, tmp_path: Path, is_retried: bool
) -> None:
    (tmp_path / "error").write_text("Failure # 1 at noon\nsomething\nFailure # 2 at one\nno module named hpo")
    checks.is_at_fault.return_value = True
    metadata = SimpleNamespace(num_failures=1)
    trial = FakeTrial(
        error_file=str(tmp_path / "error"),
        placement_group_factory="request",
        run_metadata=metadata,
        should_recover=lambda: is_retried,
    )
    tune.StudyScheduler(coordinator, membership).on_trial_error(None, trial)
    checks.is_at_fault.assert_called_once_with("2 at one\nno module named hpo", "request")
    coordinator.on_crash.assert_not_called()
    assert metadata.num_failures == (0 if is_retried else 1)
    assert coordinator.release.call_args_list == ([] if is_retried else [call("a")])
