"""The process that runs trials, without starting Ray."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest

from hpo.search.cluster.versions import describe_versions
from hpo.search.messages import Ending, TrialReport
from tests.factories import trial_spec

pytestmark = pytest.mark.slow  # importing ray takes seconds


@pytest.fixture(scope="module")
def module() -> ModuleType:
    """The module under test. It imports ray."""
    from hpo.search import ray_worker

    return ray_worker


class Exited(BaseException):
    """The process would have ended."""


@pytest.fixture
def worker_of(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Build a worker whose trial has given reports. It raises `Exited` where it would end its process."""

    def leave(code: int) -> None:
        raise Exited(code)

    def build(*reports: TrialReport) -> Any:
        monkeypatch.setattr(module, "run_trial", lambda _: (report for report in reports))
        monkeypatch.setattr(module.os, "_exit", leave)
        worker = module.TrialWorker.__new__(module.TrialWorker)
        worker.setup({"spec": vars(trial_spec(tmp_path))})
        return worker

    return build


def test_a_worker_gets_its_bundle_of_a_node(module: ModuleType) -> None:
    requested = module.TrialWorker.default_resource_request(
        {"spec": {}, "bundle": {"CPU": 2.0, "accelerator_type:T4": 0.001}}
    )
    assert requested.bundles == [{"CPU": 2.0, "accelerator_type:T4": 0.001}]


def test_a_worker_that_lost_its_gpu_writes_the_reason_and_ends(worker_of: Any, tmp_path: Path) -> None:
    (tmp_path / "trial").mkdir()
    worker = worker_of(TrialReport(failure="CUDA error: illegal", traceback="Traceback", is_device_lost=True))
    with pytest.raises(Exited, match="1"):
        worker.step()
    assert (tmp_path / "trial/device_lost.txt").read_text() == "CUDA error: illegal\nTraceback"


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


@pytest.fixture
def worker(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker of a cluster, which Ray has started in `tmp_path`."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.chdir(tmp_path)
    return module.TrialWorker.__new__(module.TrialWorker)


def test_a_trial_runs_in_the_code_that_was_sent_which_is_last_on_the_path(
    module: ModuleType, worker: Any, tmp_path: Path
) -> None:
    sent = tmp_path / module.CODE_DIR
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


def test_without_code_a_trial_runs_where_the_worker_was_started(worker: Any, tmp_path: Path) -> None:
    spec = trial_spec(tmp_path, code_folder="/of/the/driver")
    worker.setup({"spec": vars(spec), "versions": describe_versions()})
    assert worker._spec.code_folder == str(tmp_path)


def test_a_worker_on_a_machine_with_other_versions_trains_nothing(
    module: ModuleType, worker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "node_id", lambda: "node-b")
    monkeypatch.setattr(module, "run_trial", Mock(side_effect=AssertionError("it must not train")))
    worker.setup({"spec": vars(trial_spec(tmp_path)), "versions": describe_versions() | {"torch": "0.1"}})
    answer = worker.step()
    assert answer["problem"].reason.startswith("torch is ")
    assert answer["node"] == "node-b"
    assert worker.end(Ending.SAVE) == ""
