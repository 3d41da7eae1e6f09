"""What a report says of a population: who replaced whom, and how the hyperparameters of the best trial changed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hpo.dashboard.notes import describe_trial
from hpo.paths import RunsDir
from hpo.report.formatting import format_value
from hpo.report.page import write_report
from hpo.report.progress import TerminalProgress
from hpo.report.reading import read_results
from hpo.report.results import Results
from hpo.report.tables import describe_schedule, trial_columns
from storage.database import Database
from storage.records import REPLACED_BY
from storage.studies import open_study
from tests.factories import search_without_ray, toy_space
from tests.populations import parent_of, successors

SIZE, LAST = 4, 8


def population_space(folder: Path, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "sampler": "random",
        "trainable": "benchmarks.toy:climb",
        "max_epochs": LAST,
        "parameters": {"rate": {"type": "float", "low": 0.0, "high": 10.0}},
        "scheduler": {"name": "pbt", "population": SIZE, "interval": 2},
    }
    return toy_space(folder, **(values | changes))


@pytest.fixture
def results(database: Database, tmp_path: Path) -> Results:
    study, _ = search_without_ray(population_space(tmp_path), database, tmp_path, at_a_time=2)
    return read_results(study)


def test_the_schedule_of_a_line_adds_up_to_its_value(results: Results) -> None:
    children = successors(results.study)
    assert children
    for child in children:
        line = results.line(results.trials[child.number])
        assert [each.number for each, _ in line[-2:]] == [
            parent.number if (parent := parent_of(child)) else -1,
            child.number,
        ]
        ends = [0, *(last for _, last in line)]
        assert ends == sorted(ends)
        total = sum(each.params["rate"] * (last - before) for (each, last), before in zip(line, ends, strict=False))
        assert results.trials[child.number].last["value"] == pytest.approx(total)
    first = next(trial for trial in results.trials if trial.parent is None)
    assert results.line(first) == [(first, first.last_epoch)]
    assert describe_schedule(results, first) == ""


def test_the_schedule_is_said_where_trials_are_described(results: Results, tmp_path: Path) -> None:
    child = results.trials[successors(results.study)[0].number]
    (parent, epoch), *_ = results.line(child)[-2:]
    schedule = describe_schedule(results, child)
    parts = [
        f"rate {format_value(parent.params['rate'])} in epochs {parent.continued_epochs + 1} to {epoch} (#{parent.number})",
        f"rate {format_value(child.params['rate'])} in epochs {epoch + 1} to {child.last_epoch} (#{child.number})",
    ]
    assert schedule.endswith("; ".join(parts))
    note = describe_trial(results, child, results.space)
    assert f"**Schedule**: `{schedule}`" in note
    assert "**Replay**" not in note
    assert "**Replay**" in describe_trial(results, parent, results.space) or parent.parent is not None
    replaced = next(trial for trial in results.trials if REPLACED_BY in trial.attrs)
    number = replaced.attrs[REPLACED_BY]["trial"]
    assert f"**Replaced by**: trial `{number}`" in describe_trial(results, replaced, results.space)
    column = dict(trial_columns(results))["continued from"]
    assert column(child) == f"toy #{parent.number}"
    best = results.best
    assert best is not None
    page = write_report(results, RunsDir(tmp_path)).read_text()
    assert (describe_schedule(results, best) or "rate") in re.sub(r"&#\d+;", "", page)


def test_a_part_of_one_epoch_is_an_epoch(database: Database, tmp_path: Path) -> None:
    space = population_space(tmp_path, scheduler={"name": "pbt", "population": SIZE, "interval": 1})
    study, _ = search_without_ray(space, database, tmp_path, at_a_time=2)
    results = read_results(study)
    schedules = " ".join(describe_schedule(results, trial) for trial in results.trials)
    assert re.search(r" in epoch 1 \(#", schedules)
    assert not re.search(r"in epochs (\d+) to \1 ", schedules)


def test_the_live_table_counts_members(results: Results, tmp_path: Path) -> None:
    from hpo.report.terminal import Terminal

    counts = results.study.counts()
    assert counts["PRUNED"] > 0
    space = population_space(tmp_path)
    console = Terminal(width=140, record=True)
    with TerminalProgress(console) as progress:
        progress.study_opened(space, "toy", "sqlite:///hpo.db", counts, 0)
        assert f"{counts['PRUNED']} replaced, 0 failed, 0 left" in progress._study_line()
        progress.study_opened(space, "toy", "sqlite:///hpo.db", {"PRUNED": 5, "RUNNING": 4}, 4)
        assert "0 done, 5 replaced, 0 failed, 4 left" in progress._study_line()
    text = console.export_text()
    assert "Nothing is left to do: storage holds 4 COMPLETE" in text
    assert "Resuming: storage holds 5 PRUNED, 4 RUNNING" in text


def test_a_study_of_a_population_says_when_it_is_finished(results: Results, database: Database, tmp_path: Path) -> None:
    assert results.state == "finished"
    larger = population_space(tmp_path, scheduler={"name": "pbt", "population": SIZE + 1, "interval": 2})
    study = open_study(database, **larger.study_options)
    assert study.name == results.study.name, "the scheduler can change within a study"
    assert read_results(study).state == "resumable"
    study, _ = search_without_ray(larger, database, tmp_path)
    assert study.counts()["COMPLETE"] == SIZE + 1
    assert read_results(study).state == "finished"
