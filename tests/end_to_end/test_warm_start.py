"""A changed file, run as a user runs it: what the revision before finished is not trained again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpo import api
from storage.database import open_database
from tests.factories import HpoHere, RecordingListener, search_without_ray, toy_space


@pytest.mark.slow
@pytest.mark.ray(starts=2)
def test_a_changed_grid_trains_only_its_new_points(tmp_path: Path, hpo_here: HpoHere) -> None:
    storage = f"sqlite:///{tmp_path}/hpo.db"
    with open_database(storage) as database:
        search_without_ray(toy_space(tmp_path), database, tmp_path)
    listener = RecordingListener()
    space = toy_space(tmp_path, parameters={"x": [2, 3]})
    result = api.run_search(space, storage=storage, runs_dir=tmp_path / "runs", listener=listener)
    assert ("note", "warm start from toy@1: reuses 1 result, leaves out 1 trial: x 1 is not in this search (1)") in (
        listener.events
    )
    assert [event[1] for event in listener.events if event[0] == "started"] == [1]
    assert [(trial.params["x"], trial.reused_from) for trial in result.trials] == [(2, "toy #1"), (3, "")]
    assert result.report is not None
    page = result.report.read_text()
    assert "reused from" in page
    assert "x 1 is not in this search (1)" in page

    # Nothing is left to train: the file now has a part of what is known.
    again = toy_space(tmp_path, parameters={"x": [3]})
    result = api.run_search(again, storage=storage, runs_dir=tmp_path / "runs", listener=listener)
    assert (result.results.name, result.stopped, result.results.counts["COMPLETE"]) == ("toy@3", None, 1)
    assert len([event for event in listener.events if event[0] == "started"]) == 1
    listed = json.loads(hpo_here(tmp_path, "list", "--json", "--storage", storage).stdout)
    assert [(each["name"], each["state"]) for each in listed] == [
        ("toy@1", "finished"),
        ("toy@2", "finished"),
        ("toy@3", "finished"),
    ]
    replayed = hpo_here(tmp_path, "replay", "toy@3", "0", "--yes", "--storage", storage)
    assert replayed.returncode == 0, replayed.stderr
    assert "epoch 3: 1 metrics equal" in replayed.stdout
