"""The processes that load data and measure training steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from hpo.errors import DataError, SettingError, TrainableError
from hpo.search.probes import Probes
from hpo.search.slots import Slots
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
