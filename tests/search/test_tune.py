"""The parts of Ray Tune's driver and workers that can be checked without starting Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock, call, create_autospec

import pytest

from hpo.search.coordinator import TrialCoordinator
from hpo.search.stop import Stop, StopCause
from hpo.search.versions import Problem, describe_versions
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

    def get_trials(self) -> tuple[FakeTrial, ...]:
        return self._trials

    def stop_trial(self, trial: FakeTrial) -> None:
        trial.status = "TERMINATED"
        self.stopped.append(trial.trial_id)


@pytest.mark.slow
def test_the_configuration_of_a_trial_is_its_whole_spec(tune: ModuleType, coordinator: Mock, tmp_path: Path) -> None:
    spec = coordinator.next_trial.return_value = trial_spec(tmp_path)
    suggested = tune.StudySearcher(coordinator, Mock(nodes=None)).suggest("a")
    coordinator.next_trial.assert_called_once_with("a")
    assert list(suggested) == ["spec"]
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
def test_a_trial_may_be_restarted_as_often_as_the_coordinator_says(tune: ModuleType, coordinator: Mock) -> None:
    coordinator.retries_left.return_value = 2
    scheduler = tune.StudyScheduler(coordinator)
    new, restarted = FakeTrial(), FakeTrial(num_failures=1, max_failures=3)
    for trial in (new, restarted):
        scheduler.on_trial_add(None, trial)
    assert (new.max_failures, restarted.max_failures) == (2, 3), "Tune adds a restarted trial again"


@pytest.mark.slow
@pytest.mark.parametrize("ending", [None, *Ending])
@pytest.mark.parametrize("has_actor", [True, False])
def test_a_report_goes_to_the_coordinator_and_what_an_ended_trial_runs_is_stopped(
    tune: ModuleType, coordinator: Mock, ending: Ending | None, has_actor: bool
) -> None:
    coordinator.on_report.return_value = ending
    actor = Mock() if has_actor else None
    report = TrialReport(epoch=1, metrics={"value": 0.5})
    trial = FakeTrial(temporary_state=SimpleNamespace(ray_actor=actor))
    decision = tune.StudyScheduler(coordinator).on_trial_result(None, trial, {"report": report})
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
    tune: ModuleType, coordinator: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay()
    monkeypatch.setattr(tune, "ray", ray)
    scheduler, controller = tune.StudyScheduler(coordinator), FakeController()
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
    tune: ModuleType, coordinator: Mock, tmp_path: Path, content: str | None, details: str, is_retried: bool
) -> None:
    file = tmp_path / "error.txt"
    if content is not None:
        file.write_text(content)
    trial = FakeTrial(error_file=str(file), should_recover=lambda: is_retried)
    tune.StudyScheduler(coordinator).on_trial_error(None, trial)
    coordinator.on_crash.assert_called_once_with("a", details, is_retried=is_retried)


@pytest.mark.slow
def test_a_trial_whose_worker_died_before_it_started_is_released(tune: ModuleType, coordinator: Mock) -> None:
    tune.StudyScheduler(coordinator).on_trial_error(None, FakeTrial(status="PENDING"))
    coordinator.release.assert_called_once_with("a")
    coordinator.on_crash.assert_not_called()


@pytest.mark.slow
def test_a_trial_holds_its_device_from_when_its_worker_has_started(tune: ModuleType, coordinator: Mock) -> None:
    tune.StartListener(coordinator).on_trial_start(iteration=1, trials=[], trial=FakeTrial(trial_id="a"))
    coordinator.on_started.assert_called_once_with("a")


@pytest.mark.slow
def test_a_search_that_stops_releases_the_trials_that_have_not_started(tune: ModuleType, coordinator: Mock) -> None:
    running, waiting = FakeTrial(trial_id="a"), FakeTrial(trial_id="b", status="PENDING")
    controller, scheduler = FakeController(running, waiting), tune.StudyScheduler(coordinator)
    assert scheduler.choose_trial_to_run(controller) is waiting
    assert controller.stopped == []
    coordinator.stopped = Stop(StopCause.INTERRUPTED)
    assert scheduler.choose_trial_to_run(controller) is None
    assert controller.stopped == ["b"]
    coordinator.release.assert_called_once_with("b")


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


# --- a cluster of other machines --------------------------------------------------------------------------------------


@pytest.fixture
def nodes() -> Mock:
    """Nodes of which none is refused."""
    from hpo.search.nodes import Nodes

    fake: Mock = create_autospec(Nodes, instance=True, has_refused=False)
    fake.is_at_fault.return_value = False
    return fake


@pytest.mark.slow
def test_a_trial_on_another_machine_gets_the_versions_of_this_one(
    tune: ModuleType, coordinator: Mock, nodes: Mock, tmp_path: Path
) -> None:
    coordinator.next_trial.return_value = trial_spec(tmp_path)
    suggested = tune.StudySearcher(coordinator, Mock(nodes=nodes)).suggest("a")
    assert suggested["versions"] == describe_versions()


@pytest.fixture
def worker(tune: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker of a cluster, which Ray has started in `tmp_path`."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.chdir(tmp_path)
    return tune.TrialWorker.__new__(tune.TrialWorker)


@pytest.mark.slow
def test_a_trial_runs_in_the_code_that_was_sent_which_is_last_on_the_path(
    tune: ModuleType, worker: Any, tmp_path: Path
) -> None:
    sent = tmp_path / tune.CODE_DIR
    sent.mkdir()
    (sent / "sent_in_a_test.py").write_text("def train(params, *, data, seed, max_epochs, device, checkpoint): yield\n")
    (sent / "pandas.py").write_text("raise RuntimeError('a file must not replace a package')")
    spec = trial_spec(tmp_path, trainable="sent_in_a_test:train", code_folder="/of/the/driver")
    config = {"spec": vars(spec), "versions": describe_versions()}
    for _ in range(2):
        worker.setup(config)
        assert worker._spec.code_folder == os.getcwd() == str(sent)  # noqa: PTH109
        assert sys.path[-1] == str(sent)
        assert str(tmp_path) not in sys.path
        assert "sent_in_a_test" in sys.modules
        os.chdir("/")  # as a trainable may do
    del sys.modules["sent_in_a_test"]


@pytest.mark.slow
def test_without_code_a_trial_runs_where_the_worker_was_started(worker: Any, tmp_path: Path) -> None:
    spec = trial_spec(tmp_path, code_folder="/of/the/driver")
    worker.setup({"spec": vars(spec), "versions": describe_versions()})
    assert worker._spec.code_folder == str(tmp_path)


@pytest.mark.slow
def test_a_worker_on_a_machine_with_other_versions_trains_nothing(
    tune: ModuleType, worker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "node_id", lambda: "node-b")
    monkeypatch.setattr(tune, "run_trial", Mock(side_effect=AssertionError("it must not train")))
    worker.setup({"spec": vars(trial_spec(tmp_path)), "versions": describe_versions() | {"torch": "0.1"}})
    answer = worker.step()
    assert answer["problem"].reason.startswith("torch is ")
    assert answer["node"] == "node-b"
    assert worker.end(Ending.SAVE) == ""


@pytest.mark.slow
def test_a_trial_that_a_worker_hands_back_is_released_and_its_node_gets_no_more(
    tune: ModuleType, coordinator: Mock, nodes: Mock
) -> None:
    scheduler, problem = tune.StudyScheduler(coordinator, nodes), Problem("torch is 0.1 and 2.0 here")
    decision = scheduler.on_trial_result(None, FakeTrial(), {"problem": problem, "node": "node-b"})
    assert decision == "STOP"
    nodes.refuse.assert_called_once_with("node-b", problem)
    coordinator.release.assert_called_once_with("a")
    coordinator.on_report.assert_not_called()


@pytest.mark.slow
def test_a_trial_asks_for_nodes_that_are_not_refused(tune: ModuleType, coordinator: Mock, nodes: Mock) -> None:
    coordinator.retries_left.return_value = 0
    scheduler, update = tune.StudyScheduler(coordinator, nodes), Mock()
    trial = FakeTrial(placement_group_factory="request", update_resources=update)
    scheduler.on_trial_add(None, trial)
    update.assert_not_called()
    nodes.has_refused = True
    nodes.without_refused.return_value = "elsewhere"
    scheduler.on_trial_add(None, trial)
    nodes.without_refused.assert_called_once_with("request")
    update.assert_called_once_with("elsewhere")


@pytest.mark.slow
@pytest.mark.parametrize("is_retried", [True, False])
def test_a_node_that_could_not_start_a_worker_counts_no_failure(
    tune: ModuleType, coordinator: Mock, nodes: Mock, tmp_path: Path, is_retried: bool
) -> None:
    (tmp_path / "error").write_text("Failure # 1 at noon\nsomething\nFailure # 2 at one\nno module named hpo")
    nodes.is_at_fault.return_value = True
    metadata = SimpleNamespace(num_failures=1)
    trial = FakeTrial(
        error_file=str(tmp_path / "error"),
        placement_group_factory="request",
        run_metadata=metadata,
        should_recover=lambda: is_retried,
    )
    tune.StudyScheduler(coordinator, nodes).on_trial_error(None, trial)
    nodes.is_at_fault.assert_called_once_with("2 at one\nno module named hpo", "request")
    coordinator.on_crash.assert_not_called()
    assert metadata.num_failures == (0 if is_retried else 1)
    assert coordinator.release.call_args_list == ([] if is_retried else [call("a")])


@pytest.mark.slow
def test_the_scheduler_looks_for_nodes_that_join(tune: ModuleType, coordinator: Mock, nodes: Mock) -> None:
    controller = Mock()
    controller.get_trials.return_value = []
    tune.StudyScheduler(coordinator, nodes).choose_trial_to_run(controller)
    nodes.poll.assert_called_once_with()
