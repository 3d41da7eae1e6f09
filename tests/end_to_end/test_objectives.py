"""A search with several objectives, run as a user runs it, and what the other verbs say about its study."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hpo import api
from hpo.space.model import load_space
from storage.database import open_database
from storage.studies import find_study
from tests.end_to_end.processes import write_space
from tests.factories import HpoHere, RecordingListener

SPACE = {
    "trainable": "benchmarks.toy:trade_off",
    "objectives": [{"metric": "gain", "direction": "maximize"}, {"metric": "cost", "direction": "minimize"}],
    "sampler": "grid",
    "max_epochs": 2,
    "checkpoint_every": 1,
    "checkpoints": {"keep": "best 2"},
    "parameters": {"pair": ["1 1", "3 3", "2 4", "2 2"]},  # (gain, cost): the third one is dominated
}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.ray(starts=2)
def test_a_search_with_two_objectives_from_the_file_to_the_export(tmp_path: Path, hpo_here: HpoHere) -> None:
    storage, runs = f"sqlite:///{tmp_path}/hpo.db", tmp_path / "runs"
    space = load_space(str(write_space(tmp_path, "two", SPACE)))
    result = api.run_search(space, storage=storage, runs_dir=runs)
    assert [trial.values for trial in result.trials] == [(1.0, 1.0), (3.0, 3.0), (2.0, 4.0), (2.0, 2.0)]
    assert [trial.number for trial in result.best_trials] == [1, 3, 0]
    assert (result.best, result.stopped) == (result.best_trials[0], None)
    assert result.report is not None
    page = result.report.read_text()
    assert 'id="pareto_front"' in page
    assert result.report.with_name("pareto_front.png").is_file()
    assert "Optuna cannot draw it" not in result.report.with_name("report.md").read_text()

    with open_database(storage) as database:  # what the dashboard shows
        study = find_study(database, "two")
        assert study is not None
        assert study.optuna_study.metric_names == ["gain", "cost"]
        assert {trial.number for trial in study.optuna_study.best_trials} == {0, 1, 3}
        notes = [str(value) for key, value in study.system_attrs().items() if ":note_str:" in key]
        assert any("gain 3.0000, cost 3.0000" in note for note in notes)

    options = ("--storage", storage)
    shown = hpo_here(tmp_path, "report", "two", *options).stdout
    assert re.search(r"^ *1 +3 3 +COMPLETE +2 +yes +3\.0000 +3\.0000", shown, re.M)
    assert re.search(r"^ *2 +2 4 +COMPLETE +2 +2\.0000 +4\.0000", shown, re.M)
    exported = hpo_here(tmp_path, "export", "two", *options)
    assert exported.returncode == 2
    assert [line.strip() for line in exported.stderr.splitlines()[1:]] == [
        "--trial 1: gain 3, cost 3",
        "--trial 3: gain 2, cost 2",
        "--trial 0: gain 1, cost 1",
    ]
    (listed,) = json.loads(hpo_here(tmp_path, "list", "--json", *options).stdout)
    assert (listed["metric"], listed["front"], listed["best"]) == ("gain, cost", 3, None)
    assert hpo_here(tmp_path, "copy", "two", "three", *options).returncode == 0
    compared = hpo_here(tmp_path, "compare", "two", "three", "--json", *options)
    studies = json.loads(compared.stdout)["studies"]
    assert [[found["best"] for found in each["objectives"]] for each in studies] == [[3.0, 1.0]] * 2
    assert [len(each["front"]) for each in studies] == [3, 3]
    assert "4 trials, drawn by tpe" not in hpo_here(tmp_path, "plan", str(tmp_path / "two.yaml"), *options).stdout

    # The same command resumes; other objectives are another revision, which has the same results.
    listener = RecordingListener()
    api.run_search(space, storage=storage, runs_dir=runs, listener=listener)
    turned = load_space(str(write_space(tmp_path, "two", SPACE | {"objectives": SPACE["objectives"][::-1]})))  # type: ignore[index]
    again = api.run_search(turned, storage=storage, runs_dir=runs, listener=listener)
    assert [event for event in listener.events if event[0] == "started"] == []
    assert again.results.name == "two@2"
    assert [trial.values for trial in again.trials] == [(1.0, 1.0), (3.0, 3.0), (4.0, 2.0), (2.0, 2.0)]
    assert [trial.number for trial in again.best_trials] == [0, 3, 1]
