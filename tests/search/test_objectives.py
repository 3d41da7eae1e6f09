"""Searches with several objectives, without Ray: toy trials that report a gain and a cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpo.paths import RunsDir
from hpo.report.reading import read_results
from hpo.search.checkpoints.retention import trials_with_checkpoints
from hpo.search.coordinator import TrialCoordinator
from hpo.search.earlier.continuation import plan_continuation
from hpo.search.earlier.warm_start import Found, find_trials, take_over_trials
from hpo.search.slots import Slots
from hpo.space.model import Space, load_space
from storage.database import Database
from storage.management import rename_study
from storage.studies import find_study, open_study
from storage.study import Study
from tests.factories import TOY, RecordingListener, finish_study, run_of, search_without_ray, toy_space, trial_states
from tests.report.studies import epoch_metrics, grid_space

GAIN = {"metric": "gain", "direction": "maximize"}
COST = {"metric": "cost", "direction": "minimize"}
PAIRS = ["1 1", "3 3", "2 4", "2 2", "1 4"]  # (gain, cost): the front is 1, 3, 0; then come 2 and 4
X: dict[str, Any] = {"type": "float", "low": 0.0, "high": 1.0}


def two_space(folder: Path, **changes: Any) -> Space:
    """A toy grid with several objectives, instead of a metric."""
    path = folder / "toy.yaml"
    toy = {name: value for name, value in TOY.items() if name != "metric"}
    path.write_text(json.dumps(toy | changes))  # JSON is YAML
    return load_space(str(path))


def pairs_space(folder: Path, pairs: list[str], **changes: Any) -> Space:
    """A grid of trials with these gains and costs, in this order."""
    values: dict[str, Any] = {
        "trainable": "benchmarks.toy:trade_off",
        "parameters": {"pair": pairs},
        "objectives": [GAIN, COST],
    }
    return two_space(folder, **(values | changes))


def ends(listener: RecordingListener) -> dict[int, str]:
    return {event[1]: event[2] for event in listener.events if event[0] == "FAIL"}


def test_each_trial_has_the_values_of_its_last_epoch(database: Database, tmp_path: Path) -> None:
    study, _ = search_without_ray(pairs_space(tmp_path, PAIRS), database, tmp_path)
    assert [trial.values for trial in study.trials()] == [list(map(float, pair.split())) for pair in PAIRS]
    assert {trial.number for trial in study.optuna_study.best_trials} == {0, 1, 3}
    assert study.metrics()[1][2] == {"gain": 3.0, "cost": 3.0} | {
        "epoch_seconds": study.metrics()[1][2]["epoch_seconds"]
    }
    results = read_results(study)
    assert results.objectives == [("gain", True), ("cost", False)]
    assert [trial.number for trial in results.ranked] == [1, 3, 0, 2, 4]
    assert [trial.number for trial in results.best_trials] == [1, 3, 0]


def test_a_trial_without_a_finite_value_of_each_objective_fails_and_says_which(
    database: Database, tmp_path: Path
) -> None:
    space = pairs_space(tmp_path, ["1", "1 nan", "1 inf", "1 2"])
    study, listener = search_without_ray(space, database, tmp_path)
    assert trial_states(study) == ["FAIL", "FAIL", "FAIL", "COMPLETE"]
    reasons = ends(listener)
    assert reasons.pop(0).startswith("the trainable reported no metric 'cost', ")
    assert reasons == {1: "cost is nan after epoch 1", 2: "cost is inf after epoch 1"}


@pytest.mark.parametrize(
    ("keep", "expected"), [("best 1", [1]), ("best 2", [1, 3]), ("best 4", [0, 1, 2, 3]), (2, [3, 4])]
)
def test_the_checkpoints_of_the_first_fronts_are_kept(
    database: Database, tmp_path: Path, keep: Any, expected: list[int]
) -> None:
    space = pairs_space(tmp_path, PAIRS, checkpoints={"keep": keep})
    study, _ = search_without_ray(space, database, tmp_path)
    assert trials_with_checkpoints(RunsDir(tmp_path).checkpoints(study.unique_name)) == expected


@pytest.mark.parametrize(
    ("pairs", "trained"),
    [
        (["1 1", "1 1.0", "1 2", "9 9"], 3),  # an equal trial and a dominated one
        (["1 1", "1 2", "2 2", "1 3", "1 4", "9 9"], 5),  # the third one joins the front
        (["1 1", "1 2", "2 2", "1 3", "3 3", "1 9"], 6),
    ],
)
def test_patience_counts_the_trials_since_one_joined_the_front(
    database: Database, tmp_path: Path, pairs: list[str], trained: int
) -> None:
    space = pairs_space(tmp_path, pairs, budget={"patience": 2}, max_epochs=1)
    study, _ = search_without_ray(space, database, tmp_path)
    assert trial_states(study) == ["COMPLETE"] * trained


def test_the_end_of_patience_names_the_front(database: Database, tmp_path: Path) -> None:
    space = pairs_space(tmp_path, PAIRS, budget={"patience": 1})
    study = open_study(database, **space.study_options)
    with run_of(study, space) as run:
        run.enqueue(space.grid_points(), space.distributions())
        for pair in ((1.0, 1.0), (0.5, 1.0)):
            claim = run.claim()
            assert claim is not None
            run.complete(claim, pair[0], other_values=pair[1:])
        coordinator = TrialCoordinator(
            space, run, Slots(1, 1.0, 0.0), data={}, runs_dir=RunsDir(tmp_path), listener=RecordingListener()
        )
        assert coordinator.next_trial("t") is None
    reason = "budget.patience is spent: 1 trial has not found a trial for the Pareto front"
    assert str(coordinator.stopped) == reason


@pytest.mark.parametrize("name", ["tpe", "nsga2", "gp", "random", "qmc"])
def test_samplers_search_for_several_objectives(database: Database, tmp_path: Path, name: str) -> None:
    options = {"tpe": {"n_startup_trials": 3}, "gp": {"n_startup_trials": 3}, "nsga2": {"population_size": 3}}
    space = pairs_space(
        tmp_path,
        [],
        sampler={"name": name} | options.get(name, {}),
        parameters={"x": X, "y": X},
        budget={"trials": 7},
        max_epochs=1,
    )
    study, _ = search_without_ray(space, database, tmp_path)
    assert trial_states(study) == ["COMPLETE"] * 7
    assert len({trial.params["x"] for trial in study.trials()}) == 7
    for trial in study.trials():
        assert trial.values == [trial.params["x"], pytest.approx(trial.params["x"] ** 2 + trial.params["y"])]


# --- earlier revisions and studies


def test_changed_objectives_are_a_new_revision_that_takes_over_what_was_reported(
    database: Database, tmp_path: Path
) -> None:
    search_without_ray(pairs_space(tmp_path, PAIRS), database, tmp_path)
    space = pairs_space(tmp_path, PAIRS, objectives=[COST, GAIN])
    found = find_trials(space, None, database)
    study = open_study(database, **space.study_options)
    take_over_trials(space, study, found)
    assert study.name == "toy@2"
    assert [str(each) for each in found] == ["warm start from toy@1: reuses 5 results"]
    assert [trial.values for trial in study.trials()] == [list(map(float, pair.split()))[::-1] for pair in PAIRS]


@pytest.mark.parametrize(("wanted", "expected"), [("best 1", ["3 3"]), ("best 2", ["3 3", "2 2"])])
def test_the_best_by_fronts_are_continued(database: Database, tmp_path: Path, wanted: str, expected: list[str]) -> None:
    search_without_ray(pairs_space(tmp_path, PAIRS), database, tmp_path)
    space = pairs_space(tmp_path, PAIRS, max_epochs=5, **{"continue": wanted})
    plan = plan_continuation(space, None, database, RunsDir(tmp_path))
    assert [each.params["pair"] for each in plan.chosen] == expected
    study, _ = search_without_ray(space, database, tmp_path)
    assert [trial.params["pair"] for trial in study.trials()] == expected
    assert study.trials()[0].values == [3.0, 3.0]
    earlier = find_study(database, "toy@1")
    assert earlier is not None
    rename_study(earlier, "first")
    again = plan_continuation(space, study, database, RunsDir(tmp_path))
    stored = [(each.key, each.values) for each in (*again.chosen, *again.left)]
    assert stored == [(each.key, each.values) for each in (*plan.chosen, *plan.left)]


def test_trials_of_a_study_with_other_objectives_are_not_continued(database: Database, tmp_path: Path) -> None:
    search_without_ray(pairs_space(tmp_path, PAIRS), database, tmp_path)
    for objectives in ([COST, GAIN], [GAIN], [GAIN, COST | {"direction": "maximize"}]):
        space = pairs_space(tmp_path, PAIRS, max_epochs=5, objectives=objectives)
        assert not plan_continuation(space, None, database, RunsDir(tmp_path)).chosen


ACCURACY = {"metric": "val_accuracy", "direction": "maximize"}
LOSS = {"metric": "val_loss", "direction": "minimize"}
LEAST_FITTED = {"metric": "train_accuracy", "direction": "minimize"}


def finish_earlier(database: Database, **changes: Any) -> Study:
    """Create a finished grid of four epochs, batch sizes 64, 256 and 512."""
    space = grid_space(**changes)
    return finish_study(
        database,
        space,
        space.grid_points(),
        provenance={},
        device={},
        epochs_of=lambda claim: [epoch_metrics(claim.params, epoch) for epoch in range(1, 5)],
    )


def later(**changes: Any) -> Space:
    """A search over a range of batch sizes that learns from the grid."""
    sizes = {"type": "int", "low": 16, "high": 1024, "log": True}
    values: dict[str, Any] = {
        "name": "later",
        "sampler": {"name": "tpe"},
        "budget": {"trials": 5},
        "warm_start": ["grid"],
        "parameters": {"batch_size": sizes, "lr": 0.01},
        "objectives": [ACCURACY, LOSS],
    }
    return grid_space(**(values | changes))


def found_in(database: Database, space: Space) -> Found:
    (found,) = find_trials(space, None, database)
    return found


def test_a_study_with_one_objective_is_taken_over_if_it_reported_the_others(database: Database) -> None:
    finish_earlier(database)
    space = later()
    found = found_in(database, space)
    assert (found.reused, found.refused) == (3, {})
    study = open_study(database, **space.study_options)
    take_over_trials(space, study, [found])
    for trial in study.trials():
        last = epoch_metrics(trial.params, 4)
        assert trial.values == [last["val_accuracy"], last["val_loss"]]
    assert study.metrics()[0][4]["val_loss"] == study.trials()[0].values[1]


def test_after_fewer_epochs_both_values_are_those_of_that_epoch(database: Database) -> None:
    finish_earlier(database)
    found = found_in(database, later(max_epochs=2))
    assert [(each.value, *each.other_values) for each in found.trials] == [
        (last["val_accuracy"], last["val_loss"]) for last in (epoch_metrics(trial.params, 2) for trial in found.trials)
    ]


@pytest.mark.parametrize("options", [{}, {"despite": ["metric"]}])
def test_without_a_value_of_an_objective_a_trial_is_left_out(database: Database, options: dict[str, Any]) -> None:
    finish_earlier(database)
    missing = {"metric": "f1", "direction": "maximize"}
    space = later(objectives=[ACCURACY, missing], warm_start=[{"study": "grid", **options}])
    assert found_in(database, space).refused == {"it has no f1": 3}


def test_a_study_with_several_objectives_is_taken_over_by_one_with_one(database: Database) -> None:
    finish_earlier(database, objectives=[ACCURACY, LOSS])
    space = later(objectives=None, metric="val_loss", direction="minimize")
    found = found_in(database, space)
    assert [each.value for each in found.trials] == [epoch_metrics(each.params, 4)["val_loss"] for each in found.trials]
    assert all(each.other_values == () for each in found.trials)


def test_the_best_of_an_earlier_study_are_those_of_its_first_fronts(database: Database) -> None:
    """The highest accuracy has batch size 64; with the other direction, all trials are on the front."""
    finish_earlier(database, objectives=[LEAST_FITTED, ACCURACY])
    found = found_in(database, later(warm_start=[{"study": "grid", "trials": "best 2"}]))
    assert [each.params["batch_size"] for each in found.trials] == [256, 512]


def test_trials_that_were_stopped_early_are_of_no_use(database: Database, tmp_path: Path) -> None:
    parameters = {"x": [1, 2, 3, 4, 5, 6, 7]}
    earlier, _ = search_without_ray(
        toy_space(tmp_path, "early", parameters=parameters, scheduler="median"), database, tmp_path, at_a_time=2
    )
    pruned = trial_states(earlier).count("PRUNED")
    assert pruned
    objectives = [{"metric": "value", "direction": "maximize"}, {"metric": "epoch_seconds", "direction": "minimize"}]
    space = two_space(
        tmp_path,
        parameters=parameters,
        objectives=objectives,
        warm_start=["early"],
        sampler="tpe",
        budget={"trials": 9},
    )
    found = found_in(database, space)
    assert found.refused == {"it was stopped early, and a search with several objectives has no use for it": pruned}
    assert found.reused == 7 - pruned
