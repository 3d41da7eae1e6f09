"""Reading a study, and the data frames of its results."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial

from hpo.paths import RunsDir
from hpo.report import optuna_plots
from hpo.report.page import write_report
from hpo.report.reading import read_epochs, read_results
from hpo.report.results import Results
from hpo.report.tables import trial_table
from hpo.report.terminal import Terminal
from storage import records, tables
from storage.database import Database, open_database
from storage.imports import ImportedTrial, Origin, import_trials
from storage.records import DUPLICATE
from storage.studies import open_study
from storage.study import Study
from tests.factories import after_statement, run_of
from tests.report.studies import add_trial, finish_grid, grid_space, optuna_study, read


def test_the_results_of_a_grid(grid_results: Results) -> None:
    results = grid_results
    assert results.objectives == [("val_accuracy", True)]
    assert results.param_names == ["batch_size", "lr"]
    assert results.varying_params == ["batch_size"]
    assert [trial.params["batch_size"] for trial in results.ranked] == [64, 256, 512]
    assert results.best is results.ranked[0]
    assert results.label(results.ranked[1]) == "#1 batch_size 256"
    assert results.curve_families == {
        "accuracy": ["val_accuracy", "train_accuracy"],
        "loss": ["val_loss", "train_loss"],
    }
    first = results.trials[0]
    assert first.curve("val_loss")[0] == [1, 2, 3, 4]
    assert first.last["test_accuracy"] == first.last["val_accuracy"] - 0.01
    assert first.seconds == 4 * 2.5
    assert first.images == 4 * 2.0 * 1000
    assert results.gpu_hours == pytest.approx(3 * 12 / 3600)
    assert results.devices == {"a GPU": 3}


def test_the_stored_settings_become_a_space_again(grid_results: Results) -> None:
    assert grid_results.space == grid_space()


@pytest.mark.parametrize(
    "settings", [{"metric": "cost"}, {"metric": "cost", "parameters": 1}, {"metric": "cost", "a": 0}]
)
def test_settings_of_another_version_leave_the_study_readable(database: Database, settings: dict[str, Any]) -> None:
    results = read_results(open_study(database, "s", direction="minimize", fingerprint="f", settings=settings))
    assert results.space is None
    assert results.objectives == [("cost", False)]


def test_a_study_of_another_program_has_no_space(database: Database) -> None:
    optuna_study(database)
    assert read(database).space is None
    assert read(database).objectives == [("value", False)]


def test_a_quarter_of_a_gpu_costs_a_quarter(database: Database) -> None:
    results = read_results(finish_grid(database, gpu=0.25))
    assert results.gpu_hours == pytest.approx(3 * 12 / 3600 / 4)
    assert results.device_seconds == pytest.approx(3 * 12 / 4)


def test_hours_on_the_cpu_are_device_hours_and_no_gpu_hours(database: Database) -> None:
    study = finish_grid(database)
    with database.engine.begin() as connection:
        connection.execute(tables.usage.update().where(tables.usage.c.trial == 1).values(device="cpu", devices=1.0))
    results = read_results(study)
    assert results.gpu_hours == pytest.approx(2 * 12 / 3600)
    assert results.device_seconds == pytest.approx(3 * 12)


def test_completed_trials_rank_before_pruned_ones_and_failed_ones_last(database: Database) -> None:
    study = optuna_study(database, directions=("maximize",))
    add_trial(study, "PRUNED", intermediate_values={1: 0.99})
    add_trial(study, "COMPLETE", [0.2])
    add_trial(study, "FAIL")
    add_trial(study, "COMPLETE", [0.7])
    assert [trial.number for trial in read(database).ranked] == [3, 1, 0, 2]


def test_several_objectives_have_a_pareto_front_that_ranks_first(database: Database) -> None:
    study = optuna_study(database, directions=("maximize", "minimize"))
    for accuracy, seconds in ((0.7, 7.0), (0.9, 10.0), (0.8, 5.0)):
        add_trial(study, "COMPLETE", [accuracy, seconds])
    results = read(database)
    assert results.pareto_front == {1, 2}
    assert [trial.number for trial in results.ranked] == [1, 2, 0]
    assert list(results.to_dataframe()["value_objective 1"]) == [7.0, 10.0, 5.0]


def test_trials_that_only_the_sampler_knows_dominate_nothing(database: Database) -> None:
    both = [{"metric": "val_accuracy", "direction": "maximize"}, {"metric": "val_loss", "direction": "minimize"}]
    space = grid_space(objectives=both)
    study = open_study(database, **space.study_options)
    points = [{"batch_size": size, "lr": 0.01} for size in (64, 256)]
    for number, (point, values) in enumerate(zip(points, [(0.9, 0.1), (0.5, 0.5)], strict=True)):
        key = space.config_key(point) if number else None
        origin = Origin("old", "abc", number)
        trial = ImportedTrial(
            origin, point, space.distributions(), TrialState.COMPLETE, values[0], key, other_values=values[1:]
        )
        import_trials(study, [trial])
    results = read_results(study)
    assert results.objectives == [("val_accuracy", True), ("val_loss", False)]
    assert results.pareto_front == {1}
    assert [trial.number for trial in results.best_trials] == [1]
    figure = optuna_plots.plot(results, "plot_pareto_front")
    (front,) = [trace for trace in figure.data if trace.x]
    assert list(front.x) == [0.5]
    assert '"number": 1,' in front.text[0], "its number in the study"


def test_with_one_objective_the_best_trials_are_the_best_one(grid_results: Results) -> None:
    assert grid_results.best_trials == [grid_results.best]
    assert not replace(grid_results, trials=[]).best_trials


def test_draws_that_were_never_run_are_left_out(database: Database) -> None:
    study = finish_grid(database)
    study.optuna_study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"fail_reason": DUPLICATE}))
    assert read_results(study).counts == {"COMPLETE": 3}


def test_a_search_that_ends_while_it_is_read_is_not_finished_without_its_last_trial(database: Database) -> None:
    space = grid_space()
    with open_database(database.url) as other:
        run = run_of(open_study(other, **space.study_options), space).__enter__()
        run.enqueue(list(space.grid_points())[:1], space.distributions())
        claim = run.claim()
        assert claim is not None

        def end() -> None:
            run.complete(claim, 0.5)
            run.__exit__(None, None, None)

        with after_statement(database, "hpo_metrics", end):
            assert read_results(open_study(database, **space.study_options)).state == "running"


def test_the_epochs_of_some_trials_can_be_read_alone(database: Database) -> None:
    results = read_results(finish_grid(database), epochs=False)
    assert [trial.epochs for trial in results.trials] == [{}, {}, {}]
    some = read_epochs(results, {1})
    assert [trial.last_epoch for trial in some.trials] == [0, 4, 0]
    assert some.trials[1] == read_results(results.study).trials[1]


@pytest.mark.usefixtures("undrawn_png")
def test_a_report_reads_each_table_once(database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    study = finish_grid(database)
    calls: list[str] = []

    def count(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    count(Study, "trials")
    count(records, "read_metrics")
    count(records, "read_provenances")
    count(records, "read_runs")
    results = read_results(study)
    trial_table(results, Terminal(width=80))
    write_report(results, RunsDir(tmp_path))
    assert sorted(calls) == ["read_metrics", "read_provenances", "read_runs", "trials"]


# --- data frames ------------------------------------------------------------------------------------------------------


def test_a_data_frame_has_a_row_per_trial(database: Database) -> None:
    study = finish_grid(database)
    add_trial(study.optuna_study, "FAIL", params={"x": 1.0}, user_attrs={"fail_reason": "out of memory"})
    frame = read_results(study).to_dataframe()
    assert list(frame.columns[:6]) == ["number", "state", "params_batch_size", "params_lr", "params_x", "value"]
    assert list(frame.columns[-3:]) == ["epochs", "seconds", "fail_reason"]
    assert list(frame["state"]) == ["COMPLETE", "COMPLETE", "COMPLETE", "FAIL"]
    assert list(frame["params_batch_size"])[:3] == [64, 256, 512]
    assert frame["value"][0] == frame["last_val_accuracy"][0] == pytest.approx(0.4 + (1 / 64 + 0.4) / 4)
    assert math.isnan(frame["value"][3])
    assert list(frame["epochs"]) == [4, 4, 4, 0]
    assert list(frame["seconds"])[:3] == [10.0, 10.0, 10.0]
    assert list(frame["fail_reason"]) == ["", "", "", "out of memory"]


def test_a_data_frame_has_a_row_per_epoch(grid_results: Results) -> None:
    frame = grid_results.epochs_to_dataframe()
    assert list(frame.columns[:2]) == ["number", "epoch"]
    assert list(zip(frame["number"], frame["epoch"], strict=True)) == [(n, e) for n in range(3) for e in range(1, 5)]
    assert list(frame["val_accuracy"])[:4] == grid_results.trials[0].curve("val_accuracy")[1]
    assert frame["test_accuracy"].notna().sum() == 3


def test_a_study_without_trials_has_empty_data_frames(database: Database) -> None:
    optuna_study(database)
    results = read(database)
    assert list(results.to_dataframe().columns) == ["number", "state", "value", "epochs", "seconds", "fail_reason"]
    assert list(results.epochs_to_dataframe().columns) == ["number", "epoch"]
    assert len(results.to_dataframe()) == len(results.epochs_to_dataframe()) == 0


def test_without_pandas_the_error_says_how_to_install_it(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    optuna_study(database)
    results = read(database)
    monkeypatch.setitem(sys.modules, "pandas", None)
    for convert in (results.to_dataframe, results.epochs_to_dataframe):
        with pytest.raises(ImportError, match="pip install pandas"):
            convert()
