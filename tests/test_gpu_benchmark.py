"""`python -m benchmarks.gpu` without a GPU: each of its checks runs on the CPU, with small sizes and a recorded graph."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_speed
from benchmarks.train_speed import CHECKPOINT_POLICIES
from hpo.search import mps
from hpo.train import learner as learner_module
from hpo.train import optimizer as optimizer_module
from hpo.train.learner import Learner
from tests.factories import ROOT, is_running, wait_until
from tests.train.recorded_graph import FailingGraph, RecordedGraph

SMALL = {"dataset": "fashion_mnist_sample", "train_samples": 12, "val_samples": 10}
PARAMS = [{"batch_size": 4, "optimizer": "adam", "lr": 1e-3, "precision": "fp32"}]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "few_test_images")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("there is no GPU")


def test_it_needs_torch_only() -> None:
    absent = ["pytest", "ray", "optuna", "sqlalchemy", "pydantic", "torchvision"]
    code = f"import benchmarks.gpu, sys; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


# --- correctness ------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_comparisons_run_and_find_a_difference() -> None:
    rows = [*gpu.check_graph("cpu", PARAMS, SMALL), *gpu.check_resume("cpu", PARAMS, SMALL)]
    assert [(is_right, text) for _, is_right, text in rows] == [(True, "equal; eager twice: equal")] * 2 + [
        (True, "equal")
    ]
    losses = [{"loss": 1.0, "accuracy": 0.5}, {"loss": 0.5, "accuracy": 0.5}]
    changed = [losses[0], {"loss": 0.5, "accuracy": 0.25}]
    assert gpu.describe_difference(losses, changed) == "5.0e-01 at most, first in accuracy of report 2"


def test_what_torch_calls_not_deterministic_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    take_step = Learner.take_step

    def with_an_alert(learner: Learner, indices: torch.Tensor) -> None:
        take_step(learner, indices)
        torch.ones(2).put_(torch.tensor([0]), torch.ones(1))  # torch has no deterministic implementation of it

    assert list(gpu.check_operations("cpu", PARAMS, SMALL)) == [("not deterministic to torch, adam fp32", True, "none")]
    monkeypatch.setattr(Learner, "take_step", with_an_alert)
    ((_, _, text),) = gpu.check_operations("cpu", PARAMS, SMALL)
    assert text.startswith("put_ does not have a deterministic implementation")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def graph_kind(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[RecordedGraph]], None]:
    """Let learners on the CPU use a graph, and let torch.cuda answer as on a GPU."""

    class Event(SimpleNamespace):
        device_type, device_time = "DeviceType.CUDA", 5.0

    @contextmanager
    def profile(**_: Any) -> Iterator[Any]:
        yield SimpleNamespace(events=lambda: [Event()] * gpu.REPLAYS * 2)

    reserved = itertools.count(2**20, 0)
    for name, answer in {
        "memory_reserved": lambda: next(reserved),
        "mem_get_info": lambda: (2**28 + 100, 2**30),
        "synchronize": lambda: None,
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr("torch.profiler.profile", profile)

    def use(kind: type[RecordedGraph]) -> None:
        monkeypatch.setattr(learner_module, "new_graph", lambda _: kind())

    return use


def test_the_other_checks_run_on_a_device_that_works(
    graph_kind: Callable[[type[RecordedGraph]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph_kind(RecordedGraph)
    monkeypatch.setattr(gpu, "REPLAYS", 2)
    rows = [*gpu.check_memory("cpu", trials=5, data=SMALL)]
    rows += gpu.check_profile("cpu", stems=["imagenet"], batch_sizes=[4], data=SMALL)
    assert [is_right for _, is_right, _ in rows] == [True, True]
    assert rows[0][2] == "MiB reserved after each trial: 1 1 1 1 1"
    assert "ms, 2 kernels and copies, busy 0.01 ms" in rows[1][2]


def test_a_failed_capture_is_checked(graph_kind: Callable[[type[RecordedGraph]], None]) -> None:
    graph_kind(FailingGraph)
    rows = list(gpu.check_capture_failure("cpu", PARAMS[0], SMALL))
    assert [is_right for _, is_right, _ in rows] == [True] * 3
    assert "operation not permitted when stream is capturing" in rows[0][2]


def test_errors_are_checked(graph_kind: Callable[[type[RecordedGraph]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    graph_kind(RecordedGraph)
    train_batch = Learner._train_batch

    def short_of_memory(learner: Learner, indices: torch.Tensor) -> None:
        if learner._params.stem == "cifar":
            raise torch.OutOfMemoryError("CUDA out of memory")
        train_batch(learner, indices)

    monkeypatch.setattr(Learner, "_train_batch", short_of_memory)
    rows = [*gpu.check_out_of_memory("cpu", data={**SMALL, "train_samples": 256 + 10})]
    assert [is_right for _, is_right, _ in rows] == [True] * 3
    ((_, is_right, text),) = gpu.check_lost_device("cpu")
    assert not is_right, "a CPU is not lost"
    assert text.startswith("IndexError")


# --- speed ------------------------------------------------------------------------------------------------------------


def test_each_technique_is_measured_and_only_while_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_speed, "MIN_STEPS", 1)
    monkeypatch.setattr(gpu_speed, "MIN_SECONDS", 0.0)
    before = torch.channels_last, optimizer_module.__dict__["adam"], torch.backends.cudnn.allow_tf32
    rows = list(gpu_speed.check_techniques("cpu", "imagenet", [4], SMALL, precision="fp32"))
    assert len(rows) == len(gpu_speed.VARIANTS) == 8
    assert all(is_right for _, is_right, _ in rows)
    assert rows[0][0] == "a step, imagenet stem, batch 4: as shipped"
    assert rows[0][2].endswith(" ms, 1.00 of the time as shipped")
    assert before == (torch.channels_last, optimizer_module.__dict__["adam"], torch.backends.cudnn.allow_tf32)


def step_with(context: Any, **params: Any) -> tuple[list[str], Learner]:
    """Take a step inside a context; return the operations, and the learner."""
    from hpo.train.data import load
    from hpo.train.params import TrainParams
    from tests.train.test_cuda_graph import Operations

    with context():
        learner = Learner(TrainParams(batch_size=4, **params), "fp32", load(**SMALL).train)
        with Operations() as operations:
            learner.take_step(torch.arange(4))
    return operations.names, learner


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_optimizer_is_not_fused(optimizer: str) -> None:
    params = {"optimizer": optimizer, "momentum": 0.9}
    fused, _ = step_with(gpu_speed.VARIANTS["as shipped"][1], **params)
    foreach, _ = step_with(gpu_speed.foreach_optimizer, **params)
    assert any("_fused_" in name for name in fused)
    assert not any("_fused_" in name for name in foreach)
    assert any("_foreach_" in name for name in foreach)


def test_the_memory_format_is_torchs_usual_one() -> None:
    for context, is_channels_last in ((gpu_speed.contiguous_maps, False), (gpu_speed.VARIANTS["as shipped"][1], True)):
        _, learner = step_with(context)
        weight = learner.model.get_parameter("layer1.0.conv1.weight")
        assert weight.is_contiguous() != is_channels_last
        assert weight.is_contiguous(memory_format=torch.channels_last) == is_channels_last


def test_settings_of_cudnn_hold_inside_the_block() -> None:
    cudnn = torch.backends.cudnn
    with gpu_speed.fp32_convolutions():
        assert not cudnn.allow_tf32
    with gpu_speed.fastest_convolutions():
        assert cudnn.benchmark
    assert (cudnn.allow_tf32, cudnn.benchmark) == (True, False)


def packing(folder: Path) -> list[tuple[str, bool, str]]:
    data = {"dataset": "fashion_mnist_sample", "train_samples": 8, "val_samples": 0}
    return list(gpu_speed.check_packing("cpu", [4], data, together=2, epochs=1, turns=1))


@pytest.mark.exhaustive
def test_packing_is_measured_in_turn_together_and_under_mps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def running(*, is_wanted: bool) -> Iterator[Any]:
        assert is_wanted
        yield SimpleNamespace(is_active=True, failure="")

    monkeypatch.setattr(gpu_speed, "start_mps", running)
    rows = packing(tmp_path)
    assert [name for name, _, _ in rows] == [
        "2 trials in turn, batch 4",
        "2 processes, batch 4",
        "2 processes under MPS, batch 4",
    ]
    assert all(is_right and "images/s" in text for _, is_right, text in rows)


@pytest.mark.parametrize(
    ("failure", "row"),
    [
        ("", ("CUDA MPS", True, "not measured: nvidia-cuda-mps-control is not installed")),
        ("cuInit failed", ("CUDA MPS", False, "it did not start: cuInit failed")),
    ],
)
def test_without_mps_a_row_says_why(
    failure: str, row: tuple[str, bool, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def absent(*, is_wanted: bool) -> Iterator[mps.Mps]:
        found = mps.Mps()
        found.failure = failure
        yield found

    monkeypatch.setattr(gpu_speed, "start_mps", absent)
    monkeypatch.setattr(gpu_speed, "take_turns", lambda trials, turns: 10.0 * len(trials))
    monkeypatch.setattr(gpu_speed, "Contestant", lambda *_: SimpleNamespace(stop=lambda: None))
    rows = packing(tmp_path)
    assert rows[1][2] == "20 images/s in all, 2.00 times one after another"
    assert rows[-1] == row


class InProcess:
    """A `Contestant` without its own process."""

    def __init__(self, loop: Callable[..., Iterator[float]], *arguments: Any) -> None:
        self._speeds = loop(*arguments)

    def start_turn(self) -> None:
        pass

    def end_turn(self) -> float:
        return next(self._speeds)

    def stop(self) -> None:
        pass


@pytest.mark.exhaustive
def test_trials_are_timed_with_each_way_to_save_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_speed, "Contestant", InProcess)
    rows = list(gpu_speed.check_checkpoints("cpu", [4], SMALL, epochs=2, turns=1))
    assert [name.rpartition(": ")[2] for name, _, _ in rows] == list(CHECKPOINT_POLICIES)
    assert all(is_right and text.endswith("%") for _, is_right, text in rows)


def test_the_grid_is_timed_as_a_whole_where_there_are_official_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = gpu_speed.check_grid("cpu", "imagenet", None)
    assert row[2].startswith("not measured: it needs --data-dir")
    monkeypatch.setattr(gpu_speed, "Contestant", InProcess)
    (row,) = gpu_speed.check_grid("cpu", "imagenet", str(tmp_path), epochs=1, **SMALL)
    assert row[1]
    assert row[2].count(" s") == 4


# --- the table --------------------------------------------------------------------------------------------------------


def test_a_process_that_fails_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (row,) = gpu.run_check("lost_device")
    assert row == ["lost_device", False, "there is no GPU: torch.cuda.is_available() is false. Nothing was checked"]
    assert gpu.format_table([row]).splitlines()[-1].startswith("| lost_device | **FAILED** | there is no GPU")


def test_a_check_that_takes_too_long_keeps_its_rows_and_ends_with_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho \'["first", true, "found"]\'\nsleep 1000 &\necho $! > {tmp_path}/pid\nwait\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    rows = gpu.run_check("packing", seconds=1)
    assert rows == [["first", True, "found"], ["packing", False, "not finished after 1 s"]]
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not is_running(pid))


def test_all_checks_together_have_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    times = iter([0.0, 0.0, 550.0, 601.0])
    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: next(times)))

    def run(name: str, seconds: float, _data_dir: str | None) -> list[list[Any]]:
        given.append(seconds)
        return [[name, True, ""]]

    monkeypatch.setattr(gpu, "run_check", run)
    rows = gpu.run_checks(["graph", "resume", "memory"])
    assert given == [gpu.CHECK_SECONDS, 50.0]
    assert rows[-1] == ["memory", False, "not run: no time was left"]


def test_each_check_can_be_named() -> None:
    assert {"graph", "operations", "techniques_imagenet", "techniques_cifar", "packing"} <= gpu.CHECKS.keys()
