"""A search takes over what earlier studies learned. The earlier ones are documented grids of four epochs, not trained."""

from __future__ import annotations

import dataclasses
import math
import shutil
import sqlite3
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import optuna
import pytest

from hpo.errors import SettingError
from hpo.search.earlier.continuation import ContinuationPlan
from hpo.search.earlier.warm_start import Found, find_trials, take_over_trials
from hpo.search.runs import open_run
from hpo.search.samplers import OWN_STARTUP_TRIALS
from hpo.space.model import Space, load_space
from storage.copying import copy_study
from storage.database import Database, open_database
from storage.errors import StorageError
from storage.imports import read_sources
from storage.management import rename_study
from storage.optuna_tables import write_attrs, write_values
from storage.ownership import ClaimedTrial
from storage.run import Run
from storage.studies import find_study, open_study
from storage.study import Study
from tests.factories import finish_study, run_of, toy_space
from tests.report.studies import epoch_metrics, finish_grid, grid_space, optuna_study

RANGE = {"type": "int", "low": 16, "high": 1024, "log": True}
LARGER: dict[str, Any] = {
    "name": "larger",
    "sampler": {"name": "tpe"},
    "budget": {"trials": 5},
    "warm_start": ["grid"],
    "parameters": {"batch_size": RANGE, "lr": 0.01},
}


def larger(**changes: Any) -> Space:
    """A search over a range of batch sizes that learns from the grid."""
    return grid_space(**(LARGER | changes))


def epochs_of(claim: ClaimedTrial) -> list[dict[str, float]]:
    return [epoch_metrics(claim.params, epoch) for epoch in range(1, 5)]


def take_over(space: Space, study: Study) -> list[Found]:
    found = find_trials(space, study, study.database)
    take_over_trials(space, study, found)
    return found


def source(**options: Any) -> dict[str, Any]:
    return {"warm_start": [{"study": "grid", **options}]}


def found_in(database: Database, space: Space) -> Found:
    (found,) = find_trials(space, None, database)
    return found


def find(database: Database, name: str) -> Study:
    study = find_study(database, name)
    assert study is not None
    return study


def params_of(found: Found) -> list[Any]:
    return [trial.params["batch_size"] for trial in found.trials]


# --- what is taken over -----------------------------------------------------------------------------------------------


def test_results_of_the_same_training_stand(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = finish_grid(database)
    with database.transaction() as connection:
        write_attrs(connection, [(1, {"test_accuracy": 0.75, "other": 1})])
    space = larger()
    with monkeypatch.context() as patch:
        patch.setattr(Study, "provenance", lambda *_: pytest.fail("one query for each trial"))
        found = found_in(database, space)
    assert str(found) == "warm start from grid: reuses 3 results"
    assert params_of(found) == [64, 256, 512]
    assert [trial.key for trial in found.trials] == [space.config_key(trial.params) for trial in found.trials]
    study = open_study(database, **space.study_options)
    assert take_over(space, study) == [found]
    assert study.metrics() == earlier.metrics(), "of every epoch"
    assert study.provenance(1)["device_name"] == "a GPU"
    assert study.provenance(1)["packages"] == {"torch": "2"}, "what the earlier run recorded"
    first, old = study.trials()[0], earlier.trials()[0]
    assert first.distributions["batch_size"] == optuna.distributions.IntDistribution(16, 1024, log=True)
    assert (first.value, first.intermediate_values) == (old.value, old.intermediate_values)
    assert (first.datetime_start, first.datetime_complete) == (old.datetime_start, old.datetime_complete)
    assert first.user_attrs.keys() == {"test_accuracy", "reused_from"}
    assert first.user_attrs["test_accuracy"] == 0.75
    again = take_over(space, study)
    assert again == [dataclasses.replace(found, trials=())], "nothing is read that has not changed"
    assert len(study.trials()) == 3


def test_the_sampler_learns_from_a_training_that_would_differ(database: Database) -> None:
    finish_grid(database)
    found = found_in(database, larger(seed=1))
    assert str(found) == "warm start from grid: learns from 3 trials"
    assert [trial.values for trial in found.trials] == [{}, {}, {}]
    for sampler in ("random", "cmaes", "nsga2"):
        other = larger(seed=1, sampler={"name": sampler})
        assert found_in(database, other).refused == {f"sampler {sampler} uses only results that stand": 3}


def test_the_trainings_own_default_counts_whatever_the_file_says(database: Database) -> None:
    finish_grid(database)
    flip = {"choices": [True, False], "default": True}
    found = found_in(database, larger(parameters={"batch_size": RANGE, "lr": 0.01, "flip": flip}))
    assert [(trial.params["flip"], trial.key is None) for trial in found.trials] == [(False, False)] * 3
    flip["choices"] = [True]  # the grid's value is no value of this search: the declared one is the nearest
    found = found_in(database, larger(parameters={"batch_size": RANGE, "lr": 0.01, "flip": flip}))
    assert [(trial.params["flip"], trial.key is None) for trial in found.trials] == [(True, True)] * 3


def test_parameters_that_the_grid_lacked_have_the_trainings_own_defaults(database: Database) -> None:
    finish_grid(database)
    parameters = {"batch_size": RANGE, "lr": 0.01, "optimizer": ["sgd", "adam"], "ema": {**_FLOAT}}
    found = found_in(database, larger(parameters=parameters))
    assert found.trials[0].params == {"batch_size": 64, "lr": 0.01, "optimizer": "adam", "ema": 0.0}
    assert found.reused == 3


_FLOAT = {"type": "float", "low": 0.0, "high": 0.99}


def test_what_does_not_fit_is_left_out_with_its_reason(database: Database) -> None:
    finish_grid(database)
    found = found_in(database, larger(parameters={"batch_size": [32, 64], "lr": 0.01}))
    assert params_of(found) == [64]
    assert found.refused == {"batch_size 256 is not in this search": 1, "batch_size 512 is not in this search": 1}
    assert str(found) == (
        "warm start from grid: reuses 1 result, leaves out 2 trials: batch_size 256 is not in this search (1); "
        "batch_size 512 is not in this search (1)"
    )


def test_many_reasons_are_summarized_in_the_note() -> None:
    refused = {f"reason {i}": i for i in range(1, 6)}
    assert str(Found("grid", refused=refused)).endswith("reason 5 (5); reason 4 (4); reason 3 (3); and 2 other reasons")


def test_only_the_best_trials_are_taken_if_the_file_says_so(database: Database) -> None:
    finish_grid(database)  # the smallest batch size is the best
    assert params_of(found_in(database, larger(**source(trials="best 2")))) == [64, 256]
    minimize: dict[str, Any] = {"metric": "val_loss", "direction": "minimize"}
    finish_grid(database, name="losses", **minimize)
    losses = larger(**minimize, warm_start=[{"study": "losses", "trials": "best 1"}])
    assert params_of(found_in(database, losses)) == [64]


def test_failed_and_unfinished_trials_are_no_results(database: Database) -> None:
    space = grid_space()
    study = open_study(database, **space.study_options)
    with Run(study, config_key=space.config_key, provenance={}) as run:
        run.enqueue(space.grid_points(), space.distributions())
        for end in (run.fail, run.release):
            claim = run.claim()
            assert claim is not None
            run.report(claim, 1, {"val_accuracy": 0.5}, 0.5)
            end(*([claim, "no"] if end == run.fail else [claim]))
    assert str(found_in(database, larger())) == "warm start from grid: it has no results yet"


# --- what can be compared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "despite", "reason"),
    [
        ({"data": {"val_samples": 1000}}, "data", "it had other data"),
        ({"max_epochs": 5}, "max_epochs", "it was trained for 4 epochs, not 5"),
        ({"trainable": "benchmarks.toy:chain"}, "trainable", "it ran other code"),
        ({"metric": "f1"}, "metric", "it has no f1"),
    ],
)
def test_values_that_cannot_be_compared_are_taken_only_if_the_file_says_so(
    database: Database, changes: dict[str, Any], despite: str, reason: str
) -> None:
    finish_grid(database)
    found = found_in(database, larger(**changes))
    assert not found.trials
    assert found.refused == {f"{reason} (despite: [{despite}] takes it)": 3}
    taken = found_in(database, larger(**changes, **source(despite=[despite])))
    assert [trial.key for trial in taken.trials] == [None] * 3, "they never stand"
    assert [trial.value for trial in taken.trials] == [
        epoch_metrics(trial.params, 4)["val_accuracy"] for trial in taken.trials
    ]


@pytest.mark.parametrize(
    "changes",
    [{"data": {"val_samples": 1000}}, {"max_epochs": 5}, {"trainable": "benchmarks.toy:climb"}, {"metric": "f1"}],
)
@pytest.mark.parametrize("sampler", ["random", "pbt"])
def test_despite_is_no_advice_where_it_would_not_help(
    database: Database, changes: dict[str, Any], sampler: str
) -> None:
    finish_grid(database)
    space = {"sampler": {"name": "random"}, "parameters": {"batch_size": RANGE, "lr": 0.01}} | changes
    if sampler == "pbt":
        space |= {"name": "grid", "scheduler": {"name": "pbt", "interval": 1}, "warm_start": []}
    (reason,) = found_in(database, larger(**space)).refused
    assert "despite" not in reason
    if sampler == "random":
        despite = source(despite=["data", "max_epochs", "trainable", "metric"])
        assert not found_in(database, larger(**space, **despite)).trials, "it would not help"


def test_no_metric_stands_in_for_one_of_the_other_direction(database: Database) -> None:
    finish_grid(database)
    found = found_in(database, larger(metric="f1_loss", direction="minimize", **source(despite=["metric"])))
    reason = "it has no f1_loss, and val_accuracy, to maximize, cannot stand in for a metric to minimize"
    assert not found.trials, "the sampler would take the worst one for the best"
    assert found.refused == {reason: 3}


def test_another_metric_is_read_from_what_was_reported(database: Database) -> None:
    finish_grid(database)
    found = found_in(database, larger(metric="val_loss", direction="minimize"))
    assert found.reused == 3
    first = found.trials[0]
    assert first.values == {epoch: epoch_metrics(first.params, epoch)["val_loss"] for epoch in range(1, 5)}
    assert first.value == first.values[4]


def test_a_longer_training_stands_with_its_value_after_the_epochs_of_this_search(database: Database) -> None:
    finish_grid(database)
    space = larger(max_epochs=2)
    found = found_in(database, space)
    study = open_study(database, **space.study_options)
    take_over(space, study)
    assert found.reused == 3
    assert [trial.value for trial in study.trials()] == [
        epoch_metrics(trial.params, 2)["val_accuracy"] for trial in study.trials()
    ]
    assert all(list(epochs) == [1, 2] for epochs in study.metrics().values())
    assert "test_accuracy" not in study.trials()[0].user_attrs, "it was scored after the last epoch only"


def test_a_longer_training_whose_schedule_depends_on_its_length_does_not(database: Database) -> None:
    cosine = {"batch_size": [64, 256], "lr": 0.01, "schedule": "cosine"}
    finish_grid(database, parameters=cosine)
    found = found_in(database, larger(max_epochs=2, parameters={**cosine, "batch_size": RANGE}))
    assert list(found.refused) == ["it was trained for 4 epochs, not 2 (despite: [max_epochs] takes it)"]


def test_a_trial_whose_last_epoch_lacks_the_metric_is_no_result(database: Database) -> None:
    finish_grid(database)
    with database.transaction() as connection:
        connection.exec_driver_sql("DELETE FROM hpo_metrics WHERE trial = 1 AND epoch = 4 AND name = 'val_loss'")
    found = found_in(database, larger(metric="val_loss", direction="minimize"))
    assert params_of(found) == [256, 512]
    assert found.refused == {"it has no value after epoch 4": 1}


def test_a_trial_without_a_finite_value_is_left_out(database: Database) -> None:
    finish_grid(database)
    with database.transaction() as connection:
        write_values(connection, [(1, 4, math.nan)])
    found = found_in(database, larger())
    assert params_of(found) == [256, 512]
    assert found.refused == {"it has no finite value": 1}


def test_a_pruned_trial_keeps_its_last_value(database: Database, tmp_path: Path) -> None:
    space = toy_space(tmp_path, scheduler={"name": "asha", "grace_period": 1, "reduction_factor": 2})
    study = open_study(database, **space.study_options)
    with Run(study, config_key=space.config_key, provenance={}) as run:
        run.enqueue(space.grid_points(), space.distributions())
        while claim := run.claim():
            run.report(claim, 1, {"value": 0.25}, 0.25)
            run._writer.put(dataclasses.replace(run._update(claim, 2, {"value": 0.5}, 0.5), final_state=_PRUNED))
    after = toy_space(tmp_path, name="later", warm_start=["toy"], sampler="tpe", budget={"trials": 5})
    found = found_in(database, after)
    assert [(trial.state.name, trial.value, trial.values, trial.key) for trial in found.trials] == [
        ("PRUNED", 0.5, {2: 0.5}, None)
    ] * 2


_PRUNED = optuna.trial.TrialState.PRUNED


# --- revisions ----------------------------------------------------------------------------------------------------------


def revise(database: Database, **changes: Any) -> tuple[Study, list[Found]]:
    space = grid_space(**changes)
    study = open_study(database, **space.study_options)
    return study, take_over(space, study)


def test_a_new_revision_takes_over_the_one_before(database: Database) -> None:
    finish_grid(database)
    study, (found,) = revise(database, parameters={"batch_size": [64, 128, 512], "lr": 0.01})
    assert study.name == "grid@2"
    assert str(found) == (
        "warm start from grid@1: reuses 2 results, leaves out 1 trial: batch_size 256 is not in this search (1)"
    )
    assert study.count_ended_keys() == 2, "two of its three points"
    assert study.attrs["hpo:sources"] == [
        {
            "study": "grid@1",
            "storage": "",
            "learned": 0,
            "reused": 2,
            "refused": {"batch_size 256 is not in this search": 1},
            "seen": found.seen,
        }
    ]
    third, found_again = revise(database, parameters={"batch_size": [64, 256], "lr": 0.01})
    assert third.name == "grid@3"
    assert [each.study for each in found_again] == ["grid@2", "grid@1"]
    assert [trial.params["batch_size"] for trial in third.trials()] == [64, 256], "the second revision never had 256"
    assert third.trials()[0].user_attrs["reused_from"]["study"] == "grid", "who trained it"
    first, _ = revise(database)
    assert first.name == "grid"
    assert len(first.trials()) == 3, "what others took from it is not taken back"


@pytest.mark.parametrize("exists", [True, False])
def test_what_another_driver_has_found_later_stays(database: Database, exists: bool) -> None:
    earlier = grid_space()
    finish_study(database, earlier, [{"batch_size": 64, "lr": 0.01}], provenance={}, device={}, epochs_of=epochs_of)
    space = larger()
    known = open_study(database, **space.study_options) if exists else None
    found = find_trials(space, known, database)
    study = open_study(database, **space.study_options)
    finish_grid(database)
    take_over(space, study)
    assert [each.reused for each in take_over_trials(space, study, found)] == [3]
    assert [each["reused"] for each in read_sources(study.attrs)] == [3]
    assert len(study.trials()) == 3


def test_what_has_changed_in_an_earlier_study_is_taken_over(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = grid_space()
    finish_study(database, earlier, [{"batch_size": 64, "lr": 0.01}], provenance={}, device={}, epochs_of=epochs_of)
    space = larger()
    study = open_study(database, **space.study_options)
    assert params_of(take_over(space, study)[0]) == [64]
    finish_grid(database)
    assert params_of(take_over(space, study)[0]) == [64, 256, 512]
    assert len(study.trials()) == 3
    monkeypatch.setattr(Study, "trained_trials", lambda _: pytest.fail("the earlier study is read again"))
    (found,) = take_over(space, study)
    assert str(found) == "warm start from grid: reuses 3 results"
    with pytest.raises(pytest.fail.Exception, match="read again"):
        take_over(larger(**source(trials="best 1")), study)


def test_its_options_may_be_in_the_file(database: Database) -> None:
    tpe: dict[str, Any] = {"sampler": {"name": "tpe"}, "budget": {"trials": 9}}
    finish_grid(database)
    _, (found,) = revise(database, max_epochs=9, **tpe)
    assert not found.trials
    study, _ = revise(database, max_epochs=8, **source(despite=["max_epochs"]), **tpe)
    assert len(study.trials()) == 3
    named = {"warm_start": [{"study": "grid@1", "despite": ["max_epochs"]}]}
    study, found_twice = revise(database, max_epochs=7, **named, **tpe)
    assert [each.study for each in found_twice] == ["grid@1", "grid@3", "grid@2"], "each once"
    assert len(study.trials()) == 3
    itself = {"warm_start": [study.name]}
    assert study.name not in [each.study for each in take_over(grid_space(max_epochs=7, **itself, **tpe), study)]


@pytest.mark.parametrize(
    "change", [{"refused": 5}, {"refused": {"x": "y"}}, {"trials": [1]}, {"study": 7}, {"learned": True}]
)
def test_what_another_program_made_of_the_stored_sources_is_read_again(
    database: Database, change: dict[str, Any]
) -> None:
    finish_grid(database)
    space = larger()
    study = open_study(database, **space.study_options)
    (found,) = take_over(space, study)
    study.optuna_study.set_user_attr("hpo:sources", [found.attribute | change])
    assert take_over(space, study) == [found]


def test_a_source_that_was_deleted_does_not_stop_a_search(database: Database) -> None:
    earlier = finish_grid(database)
    space = larger()
    study = open_study(database, **space.study_options)
    take_over(space, study)
    database.optuna_storage.delete_study(earlier.study_id)
    (found,) = take_over(space, study)
    assert str(found) == "warm start from grid: reuses 3 results"
    assert len(study.trials()) == 3
    with pytest.raises(SettingError, match="no study 'other'"):
        take_over(larger(warm_start=["other"]), study)


@pytest.mark.parametrize("named", ["grid", "grid@1"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_source_that_was_renamed_is_named(database: Database, tmp_path: Path, named: str, elsewhere: bool) -> None:
    url = f"sqlite:///{tmp_path}/earlier.db"
    space = larger(warm_start=[{"study": named, **({"storage": url} if elsewhere else {})}])
    study = open_study(database, **space.study_options)
    with open_database(url) if elsewhere else nullcontext(database) as earlier:
        finish_grid(earlier)
        take_over(space, study)
        rename_study(find(earlier, "grid"), "first")
        rename_study(find(earlier, "first"), "second")
    (found,) = take_over(space, study)
    renamed = "it was renamed to second: name that in warm_start"
    assert str(found).endswith(f": reuses 3 results. Nothing new is taken over, because {renamed}")
    with pytest.raises(SettingError) as new:
        find_trials(space, None, database)
    where = url if elsewhere else database.url
    assert str(new.value) == f"warm_start: there is no study '{named}' in {where}: {renamed}"
    (found,) = take_over(
        larger(warm_start=[{**space.warm_start[0].model_dump(), "study": "second", "despite": []}]), study
    )
    assert (found.study, found.problem, len(study.trials())) == ("second", "", 3)


def test_a_study_that_is_deleted_while_the_search_starts_takes_everything_over_again(database: Database) -> None:
    finish_grid(database)
    space = larger()
    study = open_study(database, **space.study_options)
    take_over(space, study)
    found = find_trials(space, study, database)
    optuna.delete_study(study_name="larger", storage=database.optuna_storage)
    new = open_study(database, **space.study_options)
    (anew,) = take_over_trials(space, new, found)
    assert params_of(anew) == [64, 256, 512]
    assert len(new.trials()) == 3
    assert len(take_over(space, new)[0].trials) == 0, "now it has them"


def test_a_study_that_was_restored_from_a_copy_is_read_again(database: Database, tmp_path: Path) -> None:
    """It reaches the same counts again, and gives the numbers of its trials to other configurations."""
    url, lr = f"sqlite:///{tmp_path}/earlier.db", {"type": "float", "low": 0.0, "high": 1.0}
    earlier = grid_space(parameters={"lr": lr}, sampler="random", budget={"trials": 3})
    space = larger(parameters={"lr": lr}, budget={"trials": 9}, **source(storage=url))
    study = open_study(database, **space.study_options)
    with open_database(url) as other:
        open_study(other, **earlier.study_options)
        copy = tmp_path / "copy.db"
        with closing(sqlite3.connect(tmp_path / "earlier.db")) as now, closing(sqlite3.connect(copy)) as target:
            now.backup(target)

    def search(lrs: list[float]) -> list[float]:
        points = [{"lr": value} for value in lrs]
        with open_database(url) as other:
            finish_study(other, earlier, points, provenance={"run": str(lrs)}, device={}, epochs_of=lr_epochs)
        (found,) = take_over(space, study)
        assert found.reused + sum(found.refused.values()) == len(lrs)
        return [trial.params["lr"] for trial in study.trials()]

    def lr_epochs(claim: ClaimedTrial) -> list[dict[str, float]]:
        return [{"val_accuracy": claim.params["lr"] * epoch} for epoch in range(1, 5)]

    assert search([0.1, 0.2, 0.3]) == [0.1, 0.2, 0.3]
    shutil.copy(copy, tmp_path / "earlier.db")
    assert search([0.1, 0.5, 0.6]) == [0.1, 0.2, 0.3, 0.5, 0.6], "the study has the result of 0.1"

    # Two of its trials have the same origin now. Those who take them over do not mix them up.
    last = larger(name="last", parameters={"lr": lr}, warm_start=["larger"])
    passed_on = open_study(database, **last.study_options)
    take_over(last, passed_on)
    assert [trial.params for trial in passed_on.trials()] == [trial.params for trial in study.trials()]
    assert passed_on.metrics() == study.metrics()
    assert passed_on.provenance(1)["run"] == "[0.1, 0.2, 0.3]"
    assert passed_on.provenance(3)["run"] == "[0.1, 0.5, 0.6]"


def test_results_that_a_search_has_already_are_not_counted_as_reused(database: Database) -> None:
    finish_grid(database)
    finish_grid(database, name="same")
    space = larger(warm_start=["grid", "same"])
    trained = [{"batch_size": 64, "lr": 0.01}]
    study = finish_study(database, space, trained, provenance={}, device={}, epochs_of=epochs_of)
    found = take_over(space, study)
    assert [(each.reused, sum(each.refused.values())) for each in found] == [(2, 1), (0, 3)]
    assert str(found[1]) == "warm start from same: leaves out 3 trials: this search has the configuration already (3)"
    assert [trial.params["batch_size"] for trial in study.trials()] == [64, 256, 512]
    study.optuna_study.set_user_attr("hpo:sources", [])
    assert take_over(space, study) == found, "read again, what was reused stays counted"


def test_a_study_without_earlier_ones_takes_over_nothing(database: Database) -> None:
    finish_grid(database)
    study, found = revise(database)
    assert (study.name, found) == ("grid", [])
    assert "hpo:sources" not in study.attrs


def test_a_cycle_of_warm_starts_takes_nothing_back(database: Database) -> None:
    earlier = finish_grid(database)
    space = larger()
    study = open_study(database, **space.study_options)
    take_over(space, study)
    back = grid_space(warm_start=["larger"])
    (found,) = take_over(back, earlier)
    assert found.trials == []
    assert len(earlier.trials()) == 3


def test_a_result_is_passed_on_with_the_study_that_trained_it(database: Database) -> None:
    earlier = finish_grid(database)
    space = larger()
    take_over(space, open_study(database, **space.study_options))
    last = larger(name="last", warm_start=["larger", "grid"])
    study = open_study(database, **last.study_options)
    take_over(last, study)
    assert [trial.user_attrs["reused_from"]["id"] for trial in study.trials()] == [earlier.identity] * 3, "once"


# --- other databases, wrong input ---------------------------------------------------------------------------------------


def test_a_study_and_copies_of_it_are_learned_from_once(database: Database, tmp_path: Path) -> None:
    earlier = finish_grid(database)
    copy_study(earlier, database, "copy", "0123456789ab")
    with open_database(f"sqlite:///{tmp_path}/other.db") as other:
        copy_study(find(database, "copy"), other, "second", "ba9876543210")  # a copy of a copy
    second = {"study": "second", "storage": f"sqlite:///{tmp_path}/other.db"}
    same = "another source has the same trial"
    for changes in ({}, {"seed": 1}):  # results that stand, and trials to learn from
        space = larger(name=f"larger{len(changes)}", warm_start=["copy", second, "grid"], **changes)
        study = open_study(database, **space.study_options)
        assert [found.refused for found in take_over(space, study)] == [{}, {same: 3}, {same: 3}]
        assert len(study.trials()) == 3
        name = "learned_from" if changes else "reused_from"
        origins = [trial.user_attrs[name] for trial in study.trials()]
        assert origins == [{"study": "grid", "trial": number, "id": earlier.identity} for number in range(3)]
        reversed_space = larger(name=space.name, warm_start=["grid", second, "copy"], **changes)
        take_over(reversed_space, study)
        assert len(study.trials()) == 3
    (found,) = find_trials(grid_space(warm_start=["copy"]), earlier, database)
    assert (found.trials, found.refused) == ([], {}), "they are its own"


def test_what_a_copy_trained_itself_is_another_trial(database: Database) -> None:
    space = grid_space()
    study = open_study(database, **space.study_options)
    for name in ("grid", "copy"):
        with run_of(study, space) as run:
            run.enqueue(space.grid_points(), space.distributions())
            claim = run.claim()
            assert claim is not None
            for epoch, metrics in enumerate(epochs_of(claim), start=1):
                run.report(claim, epoch, metrics, metrics["val_accuracy"])
            run.complete(claim, 0.5)
        if name == "grid":
            copy_study(study, database, "copy", "0123456789ab")
            study = find(database, "copy")
    found = find_trials(larger(seed=1, warm_start=["grid", "copy"]), None, database)
    assert [[(each.origin.study, each.origin.number) for each in one.trials] for one in found] == [
        [("grid", 0)],
        [("copy", 1)],
    ]


def test_an_earlier_study_may_be_in_another_database(database: Database, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/earlier.db"
    with open_database(url) as other:
        finish_grid(other)
    before = (tmp_path / "earlier.db").read_bytes()
    space = larger(**source(storage=url))
    found = found_in(database, space)
    assert (found.study, found.storage, found.reused) == ("grid", url, 3)
    study = open_study(database, **space.study_options)
    take_over(space, study)
    assert len(study.trials()) == 3
    assert (tmp_path / "earlier.db").read_bytes() == before


@pytest.mark.parametrize("version", [1, 4])
def test_a_database_of_an_older_version_is_read_as_it_is(database: Database, tmp_path: Path, version: int) -> None:
    file = tmp_path / "older/earlier.db"
    with open_database(f"sqlite:///{file}") as other:
        finish_grid(other)
        with other.transaction() as connection:
            triggers = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'trigger'").scalars()
            statements = [f"DROP TRIGGER {name}" for name in triggers.all()] + LATER[4]
            for statement in statements + (LATER[1] if version == 1 else []):
                connection.exec_driver_sql(statement)
            connection.exec_driver_sql(f"UPDATE hpo_schema SET version = {version}")
    for path in set(file.parent.iterdir()) - {file}:
        path.unlink()
    before = file.read_bytes()
    space = larger(**source(storage=f"sqlite:///{file}"))
    study = open_study(database, **space.study_options)
    (found,) = take_over(space, study)
    assert (found.reused, study.provenance(1)["device_name"]) == (3, "a GPU")
    assert list(file.parent.iterdir()) == [file]
    assert file.read_bytes() == before


# {version: statements that delete what it did not have}
LATER = {
    4: ["DROP TABLE hpo_imports"],
    1: [
        "DROP TABLE hpo_rungs",
        "DROP TABLE hpo_deleted_studies",
        "DROP INDEX hpo_trials_by_token",
        "ALTER TABLE hpo_trials DROP COLUMN token",
        "ALTER TABLE hpo_trials DROP COLUMN claimed_epoch",
        "ALTER TABLE hpo_runs DROP COLUMN takeover_after",
    ],
}


def test_a_source_that_cannot_be_read_does_not_stop_a_search_that_has_its_trials(
    database: Database, tmp_path: Path
) -> None:
    file = tmp_path / "earlier.db"
    with open_database(f"sqlite:///{file}") as other:
        finish_grid(other)
    space = larger(**source(storage=f"sqlite:///{file}"))
    study = open_study(database, **space.study_options)
    (found,) = take_over(space, study)
    file.rename(tmp_path / "elsewhere.db")
    (without,) = take_over(space, study)
    assert str(without).startswith(
        f"warm start from grid in sqlite:///{file}: reuses 3 results. Nothing new is taken over, because it cannot be "
        f"read: there is no database sqlite:///{file}: correct its storage"
    )
    assert without.attribute == found.attribute == study.attrs["hpo:sources"][0]
    with pytest.raises(
        StorageError, match=r"warm_start: grid cannot be read: there is no database \S+: correct its storage$"
    ):
        find_trials(space, None, database)
    (tmp_path / "elsewhere.db").rename(file)
    assert take_over(space, study)[0].problem == ""


def test_studies_of_the_same_name_in_several_databases_are_not_mixed_up(database: Database, tmp_path: Path) -> None:
    urls = [f"sqlite:///{tmp_path}/{name}.db" for name in ("one", "two")]
    for url, sizes in zip(urls, ([64, 256], [512]), strict=True):
        with open_database(url) as other:
            finish_grid(other, parameters={"batch_size": sizes, "lr": 0.01})
    space = larger(warm_start=[{"study": "grid", "storage": url} for url in urls])
    study = open_study(database, **space.study_options)
    assert [each.reused for each in take_over(space, study)] == [2, 1]
    with open_database(urls[1]) as other:
        optuna.delete_study(study_name="grid", storage=other.optuna_storage)
    assert [(each.storage, each.reused) for each in take_over(space, study)] == [(urls[0], 2), (urls[1], 1)]
    with pytest.raises(SettingError, match="there is no study 'grid'"):
        take_over(larger(), study)  # that of the copy's database was never taken over


@pytest.mark.parametrize(("named", "taken"), [("grid", "grid@2"), ("grid@1", "grid@1"), ("grid@2", "grid@2")])
def test_a_deleted_source_is_found_among_revisions(database: Database, tmp_path: Path, named: str, taken: str) -> None:
    url = f"sqlite:///{tmp_path}/earlier.db"
    space = larger(warm_start=[{"study": name, "storage": url} for name in ("grid@1", "grid@2", "grid")])
    study = open_study(database, **space.study_options)
    with open_database(url) as other:
        finish_grid(other)
        finish_grid(other, parameters={"batch_size": [64, 128], "lr": 0.01})
        take_over(space, study)
        for revision in ("grid", "grid@2"):
            optuna.delete_study(study_name=revision, storage=other.optuna_storage)
    (found,) = find_trials(larger(warm_start=[{"study": named, "storage": url}]), study, database)
    assert found.study == taken
    with pytest.raises(SettingError, match="there is no study 'grid@3'"):
        find_trials(larger(warm_start=[{"study": "grid@3", "storage": url}]), study, database)


def test_wrong_sources_are_refused_in_one_message(database: Database) -> None:
    with pytest.raises(SettingError, match=r"there is no study 'grid' in .*: it has none"):
        find_trials(larger(), None, database)
    finish_grid(database)
    optuna_study(database, "foreign")
    with pytest.raises(SettingError, match=r"there is no study 'gird' in .*: did you mean grid"):
        find_trials(larger(warm_start=["gird"]), None, database)
    with pytest.raises(SettingError, match="another program created the study 'foreign'"):
        find_trials(larger(warm_start=["foreign"]), None, database)
    with pytest.raises(SettingError, match="warm_start: leave the password out of the file"):
        find_trials(larger(**source(storage="postgresql://u:secret@host/hpo")), None, database)
    finish_grid(database, name="small", parameters={"batch_size": [16, 32], "lr": 0.01})
    with pytest.raises(SettingError, match="warm_start: small has no parameter in common with this search"):
        find_trials(larger(parameters={"momentum": _FLOAT}, warm_start=["small"]), None, database)


def test_an_earlier_study_that_was_never_started_comes_with_the_command_that_trains_it(
    database: Database, tmp_path: Path
) -> None:
    space = toy_space(tmp_path, "later", warm_start=["earlier"])
    with pytest.raises(SettingError) as without_file:
        find_trials(space, None, database)
    assert str(without_file.value).endswith("there is no study 'earlier' in " + f"{database.url}: it has none")
    toy_space(tmp_path, "earlier", warm_start=[{"study": "later", "storage": "sqlite:///other.db"}])
    with pytest.raises(SettingError) as with_file:
        find_trials(space, None, database)
    remedy = f". `hpo run {tmp_path}/earlier.yaml` trains it; --set 'warm_start=[]' searches without it"
    assert str(with_file.value) == str(without_file.value) + remedy


def test_a_cycle_of_studies_of_which_none_exists_is_named(database: Database, tmp_path: Path) -> None:
    spaces = [toy_space(tmp_path, name, warm_start=[other]) for name, other in ("ab", "bc", "ca", "dd", "ed")]
    for space, names in zip(spaces[:3], ("a -> b -> c -> a", "b -> c -> a -> b", "c -> a -> b -> c"), strict=True):
        with pytest.raises(SettingError, match=rf"Neither can start: .* \({names}\)\. Start one with --set"):
            find_trials(space, None, database)
    with pytest.raises(SettingError, match=r"`hpo run .*/d\.yaml` trains it"):  # its own other revisions are none
        find_trials(spaces[4], None, database)
    assert find_trials(spaces[3], None, database) == []


def test_a_source_that_another_database_lacks_comes_with_the_studies_that_it_has(
    database: Database, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/other.db"
    with open_database(url) as other:
        finish_grid(other)
    with pytest.raises(SettingError, match=f"there is no study 'small' in {url}: allowed: grid$"):
        find_trials(larger(warm_start=[{"study": "small", "storage": url}]), None, database)
    (tmp_path / "empty.db").touch()
    with pytest.raises(SettingError, match="there is no study 'small' in its storage, which is empty"):
        find_trials(
            larger(warm_start=[{"study": "small", "storage": f"sqlite:///{tmp_path}/empty.db"}]), None, database
        )
    with pytest.raises(StorageError, match="warm_start: small cannot be read: mysql is not supported"):
        find_trials(larger(warm_start=[{"study": "small", "storage": "mysql://host/hpo"}]), None, database)


def test_studies_of_the_same_name_in_two_databases_are_told_apart(database: Database, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/other.db"
    finish_grid(database)
    with open_database(url) as other:
        finish_grid(other)
    found = find_trials(larger(warm_start=[{"study": "grid", "storage": url}, "grid"]), None, database)
    assert [str(each).partition(": ")[0] for each in found] == [
        f"warm start from grid in {url}",
        "warm start from grid",
    ]


def test_settings_of_another_version_are_left_out(database: Database) -> None:
    study = finish_grid(database)
    for settings in ({"parameters": {"batch_size": {"type": "quantum"}}}, {"parameters": ["batch_size"]}):
        study.optuna_study.set_user_attr("hpo:settings", settings)
        (found,) = find_trials(grid_space(seed=1), None, database)  # another revision of it
        assert found.refused == {"another version of hpo wrote its settings": 3}


# --- what a search makes of it ------------------------------------------------------------------------------------------


def test_tpe_draws_from_what_earlier_trials_showed_after_some_at_random(database: Database) -> None:
    """Two studies of the same seed: the one that knows where the best values are soon draws near them."""

    def search(space: Space) -> list[float]:
        study = open_study(database, **space.study_options)
        take_over(space, study)
        drawn = []
        with open_run(ContinuationPlan(space), study, {}) as run:
            while claim := run.claim():
                drawn.append(claim.params["lr"])
                value = -abs(claim.params["lr"] - 70.0)
                run.report(claim, 4, {"val_accuracy": value}, value)
                run.complete(claim, value)
        return drawn

    parameters = {"lr": {"type": "float", "low": 0.0, "high": 100.0}}
    search(grid_space(parameters=parameters, sampler={"name": "random"}, budget={"trials": 40}))
    options = {"parameters": parameters, "budget": {"trials": 9}, "seed": 3}
    cold, warm = (
        [abs(lr - 70.0) for lr in search(larger(name=name, warm_start=sources, **options))]
        for name, sources in (("cold", []), ("warm", ["grid"]))
    )
    assert len(cold) == len(warm) == 9
    assert sum(warm[OWN_STARTUP_TRIALS:]) < sum(cold[OWN_STARTUP_TRIALS:]) / 2
    assert sum(warm[:OWN_STARTUP_TRIALS]) > sum(cold[:OWN_STARTUP_TRIALS]) / 2


def test_a_mistake_in_a_source_is_located(database: Database, tmp_path: Path) -> None:
    finish_grid(database)
    path = tmp_path / "larger.yaml"
    text = "sampler: tpe\nmax_epochs: 2\nbudget: {trials: 4}\n"
    text += "parameters: {batch_size: [64, 128], lr: 0.01}\nwarm_start:\n  - grid\n"
    path.write_text(text + "  - gird\n")
    with pytest.raises(
        SettingError, match=rf"^{path}:7:5: warm_start: there is no study 'gird' in .*: did you mean grid"
    ):
        find_trials(load_space(str(path)), None, database)
    path.write_text(text + f"  - {{study: a, storage: 'sqlite:///{tmp_path}/none.db'}}\n")
    with pytest.raises(StorageError, match=rf"^{path}:7:5: warm_start: a cannot be read: there is no database"):
        find_trials(load_space(str(path)), None, database)
