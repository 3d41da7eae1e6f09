"""Population-based training, run as a user runs it, and killed with -9 in the middle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.toy import hold_epochs
from storage.database import open_database
from storage.studies import find_study
from tests.end_to_end.processes import Driver, hpo, rows, write_space
from tests.populations import check_lines, parent_of, successors

SIZE, INTERVAL, LAST = 4, 2, 8
REPLACED = "SELECT 1 FROM trial_user_attributes WHERE \"key\" = 'replaced_by'"


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.ray(starts=3)
def test_a_killed_population_goes_on_and_children_start_from_their_parents_states(
    tmp_path: Path, start_driver: Callable[..., Driver]
) -> None:
    database, hold, log = tmp_path / "runs/hpo.db", tmp_path / "hold", tmp_path / "epochs.log"
    space = {
        "trainable": "benchmarks.toy:climb",
        "metric": "value",
        "scheduler": {"name": "pbt", "population": SIZE, "interval": INTERVAL},
        "max_epochs": LAST,
        "checkpoint_every": 1,
        "parameters": {
            "rate": {"type": "float", "low": 0.0, "high": 10.0},
            "epoch_seconds": 0.02,
            "hold": str(hold),
            "log": str(log),
        },
    }
    path = write_space(tmp_path, "climb", space)
    hold_epochs(hold, INTERVAL + 2)  # after the first comparison, and before the last ones
    driver = start_driver(path)
    driver.wait_until(lambda: driver.is_held(hold) and bool(rows(database, REPLACED)))
    driver.kill()
    with open_database(f"sqlite:///{database}") as opened:
        study = find_study(opened, "climb")
        assert study is not None
        before = {trial.number: trial for trial in successors(study)}
        assert before, "the child survived the kill"
        assert {trial.state.name for trial in study.trials()} >= {"PRUNED"}
    hold.unlink()

    drivers = [start_driver(path), start_driver(path)]
    assert [each.wait() for each in drivers] == [0, 0], drivers[0].output + drivers[1].output
    with open_database(f"sqlite:///{database}") as opened:
        study = find_study(opened, "climb")
        assert study is not None
        check_lines(study, size=SIZE, last_epoch=LAST)
        children = {trial.number: trial for trial in successors(study)}
        for number, trial in before.items():
            now, then = parent_of(children[number]), parent_of(trial)
            assert now is not None
            assert then is not None
            # Its epochs take milliseconds: the parent may train on for two intervals before the successor has a worker.
            assert (children[number].params, now.number) == (trial.params, then.number)
            assert now.epoch >= then.epoch
        trained = defaultdict(set)
        for line in log.read_text().splitlines():
            rate, epoch = line.split()
            trained[float(rate)].add(int(epoch))
        starts: defaultdict[float, set[int]] = defaultdict(set)
        for trial in study.trials():
            parent = parent_of(trial)
            starts[trial.params["rate"]].add(1 if parent is None else parent.epoch + 1)
        assert {rate: min(epochs) for rate, epochs in trained.items()} == {
            rate: min(epochs) for rate, epochs in starts.items()
        }, "children train from their parents' epochs on"
    listed = hpo(tmp_path, "list")
    assert "finished" in listed.stdout, listed
    again = start_driver(path)
    assert again.wait() == 0
    assert "Nothing is left to do" in again.output
    page = (tmp_path / "runs/reports/climb/index.html").read_text()
    assert "continued from" in page
