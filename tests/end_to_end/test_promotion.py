"""Successive halving that promotes, run as a user runs it, and killed with -9 in the middle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.toy import expected_value, hold_epochs
from storage.database import open_database
from storage.studies import find_study
from tests.end_to_end.processes import Driver, hpo, rows, write_space

TRIALS, LAST = 9, 9
WAITING = "SELECT trial FROM hpo_rungs WHERE pool = 'asha/waiting'"


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.ray(starts=2)
def test_promoted_trials_have_the_values_of_trials_that_were_never_interrupted(
    tmp_path: Path, start_driver: Callable[..., Driver]
) -> None:
    database, hold, log = tmp_path / "runs/hpo.db", tmp_path / "hold", tmp_path / "epochs.log"
    space = {
        "trainable": "benchmarks.toy:chain",
        "metric": "value",
        "sampler": "grid",
        "scheduler": {"name": "asha", "mode": "promote", "grace_period": 1},
        "checkpoints": {"keep": "all"},
        "max_epochs": LAST,
        "parameters": {"x": list(range(1, TRIALS + 1)), "log": str(log), "hold": str(hold)},
    }
    path = write_space(tmp_path, "promote", space)
    hold_epochs(hold, 2)  # only a promoted trial gets there
    driver = start_driver(path)
    driver.wait_until(lambda: driver.is_held(hold) and len(rows(database, WAITING)) >= 2)
    driver.kill()
    hold.unlink()

    again = start_driver(path)
    assert again.wait() == 0, again.output
    assert "waits after epoch 1: others are better so far" in again.output
    assert "that waited end: others were better at the same epoch" in again.output
    with open_database(f"sqlite:///{database}") as opened:
        study = find_study(opened, "promote")
        assert study is not None
        trials = study.trials()
    at_rungs = {epoch: Counter[str]() for epoch in (1, 3, LAST)}
    for trial in trials:
        last = max(trial.intermediate_values)
        expected = {epoch: expected_value(trial.params, 0, epoch) for epoch in range(1, last + 1)}
        assert trial.intermediate_values == expected
        assert trial.value == expected[last]
        at_rungs[last][trial.state.name] += 1
    assert sum(at_rungs[1].values()) + sum(at_rungs[3].values()) + sum(at_rungs[LAST].values()) == TRIALS
    assert set(at_rungs[1]) | set(at_rungs[3]) <= {"PRUNED"}
    assert set(at_rungs[LAST]) == {"COMPLETE"}
    best_at_first = max(trials, key=lambda trial: trial.intermediate_values[1])
    assert max(best_at_first.intermediate_values) >= 3, (
        "the best of all is among the best third of any that came before"
    )
    trained = Counter(log.read_text().splitlines())
    promoted = [trial for trial in trials if trial.state.name == "COMPLETE"]
    assert all(trained[f"{trial.params['x']} 1"] <= 2 for trial in promoted), "at most the kill repeats an epoch"
    listed = hpo(tmp_path, "list")
    assert "finished" in listed.stdout, listed
