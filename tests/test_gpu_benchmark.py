"""The parts of `python -m benchmarks.gpu` that run without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks import gpu
from tests.factories import ROOT

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


def test_comparisons_run_and_find_a_difference() -> None:
    rows = [*gpu.check_graph("cpu", PARAMS, SMALL), *gpu.check_resume("cpu", PARAMS, SMALL)]
    assert [(is_right, text) for _, is_right, text in rows] == [(True, "equal; eager twice: equal")] * 2 + [
        (True, "equal")
    ]
    losses = [{"loss": 1.0, "accuracy": 0.5}, {"loss": 0.5, "accuracy": 0.5}]
    changed = [losses[0], {"loss": 0.5, "accuracy": 0.25}]
    assert gpu.describe_difference(losses, changed) == "5.0e-01 at most, first in accuracy of report 2"


def test_a_process_that_fails_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (row,) = gpu.run_check("lost_device")
    assert row == ["lost_device", False, "there is no GPU: torch.cuda.is_available() is false. Nothing was checked"]
    assert gpu.format_table([row]).splitlines()[-1].startswith("| lost_device | **FAILED** | there is no GPU")
