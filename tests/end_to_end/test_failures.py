"""Trials that fail: each in its own way, next to trials that complete."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.end_to_end.processes import (
    ONE_AT_A_TIME,
    Driver,
    chains,
    check_chains,
    count_epochs,
    count_states,
    hpo,
    rows,
    write_space,
)

TIMEOUT_SECONDS = 3

REASONS = {
    "hang": f"no epoch within trial_timeout {TIMEOUT_SECONDS} s, worker killed (max_failures 1)",
    "die": "the worker process died (max_failures 1)",
    "ok": None,
    "nan": "value is nan after epoch 2",
    "inf": "value is inf after epoch 2",
    "raise": "ValueError: the trainable's own words",
    "memory": "out of memory: MemoryError: no room for the batch",
    "die_once": None,
    "end_early": "the trainable ended after epoch 1 of 3",
    "forget_metric": "the trainable reported no metric 'value', did you mean valeu?",
}


@pytest.mark.slow
@pytest.mark.ray
def test_each_failure_has_its_state_and_reason_and_the_other_trials_complete(tmp_path: Path) -> None:
    space = {
        "sampler": "grid",
        "trainable": "benchmarks.toy:failing",
        "metric": "value",
        "max_epochs": 3,
        "max_failures": 1,
        "trial_timeout": TIMEOUT_SECONDS,
        "parameters": {"how": list(REASONS), "folder": str(tmp_path)},
    }
    finished = hpo(tmp_path, "run", write_space(tmp_path, "failing", space))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stderr == ""
    database = tmp_path / "runs/hpo.db"
    trials = rows(
        database, "SELECT trial_id, state, crashes FROM trials JOIN hpo_trials ON trial = trial_id ORDER BY 1"
    )
    for number, ((trial, state, crashes), (how, reason)) in enumerate(zip(trials, REASONS.items(), strict=True)):
        attrs = dict(rows(database, f"SELECT key, value_json FROM trial_user_attributes WHERE trial_id = {trial}"))
        assert state == ("COMPLETE" if reason is None else "FAIL"), how
        assert json.loads(attrs.get("fail_reason", "null")) == reason
        if reason is not None:
            assert f"trial {number} failed: {reason}" in finished.stdout
        assert crashes == {"die": 2, "hang": 2, "die_once": 1}.get(how, 0), how
        if how in {"raise", "memory", "hang"}:
            assert "benchmarks/toy.py" in attrs["traceback"], how


FRAGILE = """
import inspect, os
from pathlib import Path
from benchmarks.toy import chain


def __getattr__(name):
    # Ray Tune gives an idle worker its next trial by `reset_config`.
    if name == "train" and any(frame.function == "reset_config" for frame in inspect.stack()):
        try:
            Path("died").touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os._exit(1)
    return {"train": chain}[name]
"""


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.ray
def test_a_worker_that_dies_when_it_is_reused_loses_no_trial(tmp_path: Path) -> None:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    for name in ("torch", "numpy", "pandas", "psutil", "gzip", "msvcrt"):  # of the trials' processes, too
        (tmp_path / f"{name}.py").write_text("from pathlib import Path\nPath('replaced').touch()")
    space = {
        "sampler": "grid",
        "trainable": "fragile:train",
        "metric": "value",
        "max_epochs": 1,
        "max_failures": 1,
        "resources": {"cpu": 2},
        "parameters": {"x": [1, 2, 3], "epoch_seconds": 0.01, "log": str(tmp_path / "epochs.log")},
    }
    finished = hpo(tmp_path, "run", write_space(tmp_path, "fragile", space))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert (tmp_path / "died").exists()
    assert not (tmp_path / "replaced").exists(), "a file in the working folder replaces no package"
    states = "SELECT state, crashes FROM trials JOIN hpo_trials ON trial = trial_id"
    assert sorted(rows(tmp_path / "runs/hpo.db", states)) == [("COMPLETE", 0), ("COMPLETE", 0), ("COMPLETE", 1)]
    assert finished.stdout.count("the worker process died") == 1


SPOILED = """
import os
from pathlib import Path
import hpo.train.gpu
from benchmarks.toy import chain
from hpo.trainable import EpochReport


def train(params, *, data, seed, max_epochs, device, checkpoint=None):
    Path(f"started-{params['x']}-{os.getpid()}").touch()
    given = dict(data=data, seed=seed, max_epochs=max_epochs, device=device, checkpoint=checkpoint)
    for report in chain(params, **given):
        if params["x"] == 1 and report.epoch == 2 and not Path("lost").exists():
            Path("lost").touch()
            hpo.train.gpu.is_device_lost = lambda: True  # in this process only
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield EpochReport(report.epoch, report.metrics, report.state, {"cuda_graph": False}, "no graph", True)
"""


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.ray
def test_a_process_that_lost_its_gpu_or_a_graph_runs_no_other_trial(tmp_path: Path) -> None:
    (tmp_path / "spoiled.py").write_text(SPOILED)
    parameters = {"x": [1, 2, 3]}
    space = {"trainable": "spoiled:train", "sampler": "grid", "metric": "value", "max_epochs": 3, "max_failures": 1}
    given = {**space, "parameters": parameters, "resources": {"cpu": 2}}
    finished = hpo(tmp_path, "run", write_space(tmp_path, "spoiled", given))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    database = tmp_path / "runs/hpo.db"
    trials = rows(
        database,
        "SELECT number, state, crashes, provenance FROM trials JOIN hpo_trials ON trial = trial_id ORDER BY number",
    )
    assert [row[:3] for row in trials] == [(0, "COMPLETE", 1), (1, "COMPLETE", 0), (2, "COMPLETE", 0)]
    assert [json.loads(row[3])["cuda_graph"] for row in trials] == [False] * 3
    started = [path.name.split("-")[1:] for path in tmp_path.glob("started-*")]
    assert sorted(x for x, _ in started) == ["1", "1", "2", "3"], "trial 0 was resumed once"
    assert len({pid for _, pid in started}) == 4, "each in a new process"
    reason = "the GPU could not be used any more, worker ended: RuntimeError: CUDA error: an illegal memory access"
    assert f"trial 0: {reason} was encountered; it restarts from its last checkpoint" in finished.stdout
    assert "trial 1: no graph" in finished.stdout


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.ray
def test_a_signal_to_all_processes_ends_a_search_in_seconds_and_nothing_is_lost(tmp_path: Path) -> None:
    """Ray dies of it. Its C++ code would end the process after a minute, with an exit code that queues do not retry."""
    path, database = chains(tmp_path, ONE_AT_A_TIME, epoch_seconds=0.5), tmp_path / "runs/hpo.db"
    driver = Driver(tmp_path, 0, path)
    driver.wait_until(lambda: count_epochs(database) >= 2)
    driver.terminate_all()
    started = time.monotonic()
    assert driver.wait() == 130, driver.output
    assert time.monotonic() - started < 30
    assert "Ray's processes have ended" in driver.output
    assert set(count_states(database)) <= {"WAITING", "COMPLETE"}
    assert hpo(tmp_path, "run", path).returncode == 0
    check_chains(database)
