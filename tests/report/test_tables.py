"""The tables in the terminal: trials, failures, and `hpo list`."""

from __future__ import annotations

import io
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hpo.report.reading import read_results
from hpo.report.results import Results
from hpo.report.tables import describe_ties, device_time, failures, trial_columns, trial_table
from hpo.report.terminal import Terminal
from hpo.run import cli
from storage.database import Database
from storage.ownership import ClaimedTrial
from tests.factories import finish_study
from tests.report.studies import add_trial, finish_grid, grid_space, optuna_study, read


def shown(results: Results, width: int = 140) -> str:
    text = io.StringIO()
    console = Terminal(file=text, width=width)
    console.print(trial_table(results, console))
    return text.getvalue()


def test_the_trials_of_a_study_are_shown_best_first(grid_results: Results) -> None:
    text = shown(grid_results)
    rows = re.findall(
        r"^ *(\d) +(\d+) +0\.01 +COMPLETE +4 +(0\.\d{4}) +(0\.\d{4}) +(0\.\d{4}) +10\.0 +1,000", text, re.M
    )
    assert [row[1] for row in rows] == ["64", "256", "512"]
    assert all(last == best for _, _, last, best, _ in rows)


@pytest.mark.parametrize("width", [112, 100, 80, 60, 40])
def test_a_narrow_console_loses_columns_and_no_digits(grid_results: Results, width: int) -> None:
    text = shown(grid_results, width)
    assert max(len(line) for line in text.splitlines()) <= width
    best = grid_results.ranked[0]
    assert re.search(rf"^ *{best.number} +64 .*COMPLETE.* {best.values[0]:.4f}", text, re.M)
    assert "…" not in text
    assert ("too narrow for: lr, images/s" in " ".join(text.split())) == (width <= 80)


@pytest.mark.parametrize("width", [140, 100, 80])
def test_many_parameters_share_a_column_where_they_have_no_room(database: Database, width: int) -> None:
    names = [f"parameter_{letter}" for letter in "abcdefghijkl"]
    space = grid_space(sampler="random", budget={"trials": 2}, parameters={name: [1, 22] for name in names})
    points = [dict.fromkeys(names, value) for value in (1, 22)]
    options: dict[str, Any] = {
        "provenance": {},
        "device": {},
        "epochs_of": lambda _: [{"val_accuracy": 0.5, "epoch_seconds": 1.0}],
    }
    results = read_results(finish_study(database, space, points, **options))
    text = shown(results, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert re.search(r"^ *0 +COMPLETE +1 +0\.5000 +0\.5000 .*parameter_a 1, ", text, re.M), "values are not cut"
    assert all(len(re.findall(rf"\b{name}\s+(?:1|22)\b", text)) == 2 for name in names)
    assert "too narrow" not in text
    wide = shown(results, 300)
    assert len(re.findall(r"parameter_", wide)) == len(names), "a column for each"
    assert [name for name, _ in trial_columns(results)] == [
        *("trial", "state", "epochs", "last val_accuracy", "best val_accuracy", "seconds"),
        *names,
    ], "results are seen without scrolling"


def test_with_several_seeds_values_have_their_errors_and_ties_are_named(database: Database) -> None:
    values = {64: (0.90, 0.01), 256: (0.89, 0.01), 512: (0.87, 0.01)}
    space = grid_space(max_epochs=1, replicates=3)

    def epochs_of(claim: ClaimedTrial) -> list[dict[str, float]]:
        value, error = values[claim.params["batch_size"]]
        return [{"val_accuracy": value, "val_accuracy_stderr": error, "epoch_seconds": 1.0}]

    study = finish_study(database, space, space.grid_points(), provenance={}, device={}, epochs_of=epochs_of)
    results = read_results(study)
    text = shown(results)
    assert re.findall(r"(0\.\d+) ± 0\.01", text) == ["0.9000", "0.8900", "0.8700"]
    assert [trial.params["batch_size"] for trial in results.ties] == [256]  # 0.01 apart, of 0.014; the other one 0.03
    assert describe_ties(results) == "not clearly better, within the standard error of the difference, than #1"
    assert results.curve_families == {"accuracy": ["val_accuracy"]}


def test_with_one_seed_there_are_no_errors_and_no_ties(grid_results: Results) -> None:
    assert "±" not in shown(grid_results)
    assert describe_ties(grid_results) == ""


def test_several_objectives_have_a_column_each(database: Database) -> None:
    study = optuna_study(database, directions=("maximize", "minimize"))
    add_trial(study, "COMPLETE", [0.7, 7.0])
    add_trial(study, "COMPLETE", [0.6, 8.0])
    text = shown(read(database))
    assert re.search(r"^ *0 .*COMPLETE +yes +0\.7000 +7\.0000", text, re.M)
    assert re.search(r"^ *1 .*COMPLETE +0\.6000 +8\.0000", text, re.M), "not on the Pareto front"


def test_failed_trials_are_listed_with_their_reason_up_to_a_limit(database: Database) -> None:
    study = optuna_study(database)
    add_trial(study, "FAIL", user_attrs={"fail_reason": "out of memory"})
    results = read(database)
    assert failures(results) == ["trial 0 failed: out of memory"]
    many = failures(replace(results, trials=results.trials * 60))
    assert len(many) == 51
    assert many[-1] == "and 10 more failed"


# --- hpo list ---------------------------------------------------------------------------------------------------------


def listed(folder: Path, *options: str) -> str:
    result = CliRunner().invoke(cli, ["list", "--storage", f"sqlite:///{folder}/hpo.db", *options])
    assert result.exception is None
    return result.output


def test_list_shows_each_study_in_a_line_and_as_json(database: Database, tmp_path: Path) -> None:
    finish_grid(database)
    add_trial(optuna_study(database, "theirs [/bold]"), "COMPLETE", [0.25])
    text = listed(tmp_path)
    assert re.search(r"grid +finished +3 .* val_accuracy +0\.01 +\d+s ago +0 B", text)
    assert "cost" not in text
    assert re.search(r"theirs \[/bold\] +another program's +1 +0\.2500 +value +\d+s ago *$", text, re.M)
    first, second = json.loads(listed(tmp_path, "--json"))
    assert (first["name"], first["state"], first["counts"]) == ("grid", "finished", {"COMPLETE": 3})
    assert first["best"] == pytest.approx(0.4 + (1 / 64 + 0.4) / 4)
    assert abs(first["last_activity"] - time.time()) < 60
    assert abs(second["last_activity"] - time.time()) < 60
    assert (first["device_seconds"], first["cost"]) == (36.0, None)
    assert (second["device_seconds"], second["cost"]) == (0.0, None)


def test_list_shows_the_size_of_the_front_of_several_objectives(database: Database, tmp_path: Path) -> None:
    study = optuna_study(database, directions=("maximize", "minimize"))
    for values in ([0.7, 7.0], [0.6, 6.0], [0.6, 8.0]):
        add_trial(study, "COMPLETE", values)
    assert re.search(r"plain +another program's +3 +front of 2", listed(tmp_path))
    (only,) = json.loads(listed(tmp_path, "--json"))
    assert (only["front"], only["best"]) == (2, None)


def test_list_shows_what_a_study_has_cost_if_it_has_a_price(database: Database, tmp_path: Path) -> None:
    study = finish_grid(database, budget={"cost": {"gpu_hour": 250}})
    add_trial(optuna_study(database, "theirs"), "COMPLETE", [0.25])
    text = listed(tmp_path)
    assert re.search(r"device-hours +cost +last activity", text)
    assert re.search(r"grid +finished .* val_accuracy +0\.01 +2\.50 +\d+s ago", text)
    assert json.loads(listed(tmp_path, "--json"))[0]["cost"] == pytest.approx(2.5)
    assert device_time(read_results(study)) == ["Used so far: 0.01 device-hours, cost 2.50."]
    assert device_time(read(database, "theirs")) == []
