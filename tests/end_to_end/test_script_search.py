"""A search over the user's script, started from a Python program: run, pruned, logged, replayed, read back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.processes import python, rows, write_space
from tests.factories import HpoHere

TRAIN_PY = """
import argparse, json, os, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
for name in ("lr", "momentum", "half"):
    parser.add_argument(f"--{name}", type=float)
parser.add_argument("--epochs", type=int)
given = parser.parse_args()
assert given.half == given.lr / 2

def stop(*_):
    pathlib.Path(f"stopped-{given.lr}").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
print("starting with", given, file=sys.stderr)
for epoch in range(given.epochs):
    accuracy = given.lr - (given.momentum or 0) / 10 - 1 / (epoch + 2)
    print(f"epoch {epoch} is done")
    print(json.dumps({"accuracy": accuracy}))
    # The worker reads, and logs, no further line before the driver has decided that the trial continues.
    line = f"process {os.getpid()} continues after epoch {epoch}"
    print(line)
    deadline = time.monotonic() + 120
    while "IS_REPLAY" not in os.environ:
        if any(line in log.read_text() for log in pathlib.Path("runs/checkpoints").glob("*/*/log.txt")):
            break
        assert time.monotonic() < deadline, "neither continued nor stopped"
        time.sleep(0.05)
    if accuracy > 0.6:
        raise ValueError("too good to be true")
"""

SPACE = {
    "metric": "accuracy",
    "max_epochs": 3,
    "sampler": {"name": "random", "seed": 3},
    "scheduler": {"name": "asha", "reduction_factor": 2},
    "budget": {"trials": 10},
    "parameters": {
        "lr": {"type": "float", "low": 0.01, "high": 1.0},
        "nesterov": [True, False],
        "momentum": {"type": "float", "low": 0.0, "high": 0.99, "when": {"nesterov": True}},
    },
    "derived": {"half": "lr / 2"},
    "constraints": ["lr < 0.95"],
}

# As a user writes it. Ray's workers do not import this file, so it needs no `if __name__ == "__main__"`.
SEARCH_PY = """
import json, sys
from hpo import load_space, run_search

result = run_search(load_space("script", ["budget.trials=9"]), storage="sqlite:///script.db")
print(json.dumps({
    "best": result.best.number,
    "best_value": result.best.values[0],
    "states": {trial.number: trial.state for trial in result.trials},
    "params": {trial.number: trial.params for trial in result.trials},
    "interrupted": result.interrupted,
    "stopped": result.stop_reason,
}))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_script_is_searched_pruned_killed_logged_and_replayed(tmp_path: Path, hpo_here: HpoHere) -> None:
    (tmp_path / "train.py").write_text(TRAIN_PY)
    (tmp_path / "search.py").write_text(SEARCH_PY)
    (tmp_path / "search_spaces").mkdir()
    command = f"{sys.executable} train.py --lr {{lr}} --momentum {{momentum}} --epochs {{max_epochs}} --half {{half}}"
    write_space(tmp_path / "search_spaces", "script", SPACE | {"command": command})
    finished = python(tmp_path, "search.py")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stderr == ""
    result = json.loads(finished.stdout)  # nothing else is printed
    database = tmp_path / "script.db"
    trials = rows(database, "SELECT trial_id, number, state FROM trials JOIN hpo_trials ON trial = trial_id ORDER BY 1")
    assert {str(number): state for _, number, state in trials} == result["states"]
    assert len(trials) == 9
    states = {state for _, _, state in trials}
    assert states >= {"COMPLETE", "PRUNED"}
    conditional, stopped = set(), []
    for trial, number, state in trials:
        params = dict(rows(database, f"SELECT param_name, param_value FROM trial_params WHERE trial_id = {trial}"))
        attrs = dict(rows(database, f"SELECT key, value_json FROM trial_user_attributes WHERE trial_id = {trial}"))
        conditional.add("momentum" in params)
        assert ("momentum" in params) == (params["nesterov"] == 0), "the first choice, true"
        assert result["params"][str(number)]["lr"] == params["lr"]
        assert json.loads(attrs["derived"]) == {"half": params["lr"] / 2}
        query = f"SELECT epoch, value FROM hpo_metrics WHERE trial = {trial} AND name = 'accuracy' ORDER BY 1"
        values = rows(database, query)
        assert values == [
            (epoch, params["lr"] - params.get("momentum", 0) / 10 - 1 / (epoch + 1))
            for epoch in range(1, len(values) + 1)
        ]
        steps = f"SELECT step, intermediate_value FROM trial_intermediate_values WHERE trial_id = {trial} ORDER BY 1"
        assert rows(database, steps) == values, "a pruned trial keeps all of its values"
        assert len(values) == 3 if state == "COMPLETE" else 1 <= len(values) <= 3
        (log,) = tmp_path.glob(f"runs/checkpoints/script-*/{number}/log.txt")
        assert "starting with Namespace" in log.read_text()
        assert log.read_text().count(" is done") >= len(values)
        if (tmp_path / f"stopped-{params['lr']}").exists():
            stopped.append(number)
        if state == "FAIL":
            assert "too good to be true" in json.loads(attrs["fail_reason"])
    assert conditional == {True, False}
    pruned = [number for _, number, state in trials if state == "PRUNED"]
    assert stopped == pruned, "a script gets SIGTERM if its trial is pruned, and only then"
    values = rows(database, "SELECT value FROM trial_values JOIN trials USING (trial_id) WHERE state = 'COMPLETE'")
    assert (result["best_value"],) == max(values)
    assert (result["stopped"], result["interrupted"]) == ("", False)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    arguments = ["replay", "script", str(result["best"]), "--storage", "sqlite:///script.db"]
    # The file in search_spaces/ names the same command as the database.
    replay = hpo_here(tmp_path, *arguments, IS_REPLAY="1")
    assert replay.returncode == 0, replay.stdout + replay.stderr
    assert replay.stdout.endswith("epoch 1: 1 metrics equal\nepoch 2: 1 metrics equal\nepoch 3: 1 metrics equal\n")
