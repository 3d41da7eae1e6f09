"""The processes that load data and measure training steps."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch

from hpo.errors import DataError, SettingError, TrainableError
from hpo.search import probes as probes_module
from hpo.search.probes import Probes, Speed
from hpo.search.slots import Slots
from hpo.search.subprocesses import PythonProcess
from tests.factories import ROOT, wait_until

pytestmark = pytest.mark.slow

SAMPLE = {"dataset": "fashion_mnist_sample", "train_samples": 64, "val_samples": 20, "data_dir": "data"}

SCRIPT = """
from pathlib import Path
from hpo.search.probes import Probes

print("started")
data = {"dataset": "fashion_mnist_sample", "train_samples": 64, "val_samples": 20, "data_dir": "data"}
with Probes(data, Path()) as probes:
    print(probes.describe_data()[1][:2])
"""


def test_probes_describe_the_data_and_measure_shapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with Probes(SAMPLE, tmp_path / "runs") as probes:
        sha256, images = probes.describe_data()
        assert len(sha256) == 64
        assert images[:2] == (64, 20)
        assert probes.start_seconds > 0
        slots = Slots(2, 1.0, 0.0)
        speed = probes.measure({"batch_size": 32}, slots)
        assert speed is not None
        assert speed.images_per_second > 0
        assert speed.memory_bytes > 10**8
        with pytest.raises(TrainableError, match="has no parameter 'depth'"):
            probes.measure({"depth": 3}, slots)
        os.kill(probes._processes[0][0].pid, signal.SIGKILL)
        with pytest.raises(SettingError, match="a process that measures training speed died"):
            probes.measure({"batch_size": 32}, slots)
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]


def test_missing_data_are_reported_by_the_process_that_asked(tmp_path: Path) -> None:
    with (
        Probes({**SAMPLE, "dataset": "mnist"}, tmp_path) as probes,
        pytest.raises(DataError, match="no data set 'mnist'"),
    ):
        probes.describe_data()


def test_a_script_without_a_main_guard_is_run_once(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    ended = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "started\n(64, 20)\n"), ended.stderr


def test_probes_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    show_pid = "print(probes._processes[0][0].pid, flush=True); input()"
    program = SCRIPT.replace("print(probes.describe_data()[1][:2])", show_pid)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "started\n"
        pid = int(owner.stdout.readline())
        owner.kill()
    wait_until(lambda: not psutil.pid_exists(pid), timeout_seconds=60)


# --- the protocol, with threads instead of processes -------------------------------------------------------------------

TOGETHER = Slots(3, 1.0, 0.0)


class FakeProbe:
    """A probe that finds no room or fails, as the shape says: {what: numbers of the processes}."""

    open: ClassVar[list[FakeProbe]] = []  # a list: unlike a counter, threads cannot lose a change of it
    made: ClassVar[list[int]] = []  # the numbers of the processes

    def __init__(self, shape: dict[str, list[int]], *, data: dict[str, int], device: str) -> None:
        self._shape, self._number = shape, data["number"]
        FakeProbe.made.append(self._number)
        self._do("at_start")
        FakeProbe.open.append(self)

    def _do(self, when: str) -> None:
        for what, error in ERRORS.items():
            if self._number in self._shape.get(f"{what} {when}", ()):
                raise error

    def measure(self, seconds: float) -> tuple[float, int]:
        self._do("at_work")
        return 10.0 * (1 + self._number), 100 * (1 + self._number)

    def state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        FakeProbe.open.remove(self)


ERRORS = {
    "no room": torch.OutOfMemoryError("CUDA out of memory"),
    "no handle": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "broken": RuntimeError("CUDA error: an illegal memory access was encountered"),
}


@pytest.fixture
def fake_probes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Probes]:
    monkeypatch.setattr("hpo.train.probe.Probe", FakeProbe)
    monkeypatch.setattr(probes_module, "_checkpoint_seconds", lambda *_: 0.0)
    monkeypatch.setattr(probes_module, "ANSWER_SECONDS", {"cpu": 20.0})
    FakeProbe.made.clear()
    FakeProbe.open.clear()

    def serve(pipe: Any, number: int) -> None:
        with suppress(EOFError, OSError):
            while True:
                probes_module._train_steps(pipe, {"number": number}, tmp_path, *pipe.recv())

    probes = Probes.__new__(Probes)
    probes._processes = []
    for number in range(TOGETHER.count):
        ours, theirs = multiprocessing.Pipe()
        threading.Thread(target=serve, args=(theirs, number), daemon=True).start()
        probes._processes.append(PythonProcess(None, ours))  # type: ignore[arg-type]
    yield probes
    for _, pipe in probes._processes:
        pipe.close()


@pytest.mark.parametrize("when", ["at_start", "at_work"])
@pytest.mark.parametrize("what", ["no room", "no handle"])
@pytest.mark.parametrize("numbers", [[0], [2], [0, 1, 2]])
def test_without_room_for_one_the_others_are_free_for_the_next_shape(
    fake_probes: Probes, what: str, when: str, numbers: list[int]
) -> None:
    shape: Any = {f"{what} {when}": numbers}
    for _ in range(2):
        assert fake_probes.measure(shape, TOGETHER) is None
    assert fake_probes.measure({}, TOGETHER) == Speed(20.0, 300, 0.0, 0)
    wait_until(lambda: not FakeProbe.open)  # a process answers before it closes its probe
    assert len(FakeProbe.made) == 9


@pytest.mark.parametrize("when", ["at_start", "at_work"])
def test_an_error_of_one_process_is_raised_and_the_others_are_free(fake_probes: Probes, when: str) -> None:
    shape: Any = {f"broken {when}": [1], f"no room {when}": [0]}
    with pytest.raises(TrainableError, match="an illegal memory access"):
        fake_probes.measure(shape, TOGETHER)
    assert fake_probes.measure({}, TOGETHER) == Speed(20.0, 300, 0.0, 0)


def test_a_process_that_does_not_answer_is_an_error_that_says_what_to_do(
    fake_probes: Probes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes_module, "ANSWER_SECONDS", {"cpu": 0.1})
    ours, silent = multiprocessing.Pipe()
    fake_probes._processes[1] = PythonProcess(None, ours)  # type: ignore[arg-type]
    with silent, pytest.raises(SettingError, match=r"has not answered for 0.1 s. See what uses the CPU or the GPU"):
        fake_probes.measure({}, TOGETHER)
