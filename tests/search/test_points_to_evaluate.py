"""Configurations that the search space names are trained first, and once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpo.notes import note_points
from hpo.search.earlier.warm_start import find_trials, take_over_trials
from hpo.space.model import Space, load_space
from hpo.space.parameters import Params
from storage.database import Database
from storage.imports import Origin
from storage.studies import open_study
from storage.study import Study
from tests.factories import RecordingListener, search_without_ray, trial_states

PARAMETERS = {
    "x": {"type": "int", "low": 0, "high": 1000},
    "rate": {"type": "float", "low": 0.0, "high": 1.0, "step": 0.1, "default": 0.2},
    "kind": ["a", "b"],
    "fixed": 7,
}
POINTS = [{"kind": "b", "x": 12.0, "rate": 0.5}, {"x": 0, "kind": "a"}]
COMPLETE: list[Params] = [
    {"x": 12, "rate": 0.5, "kind": "b", "fixed": 7},
    {"x": 0, "rate": 0.2, "kind": "a", "fixed": 7},
]


def space_of(folder: Path, points: list[Any], **keys: Any) -> Space:
    space = {
        "sampler": "random",
        "trainable": "benchmarks.toy:chain",
        "metric": "value",
        "max_epochs": 2,
        "budget": {"trials": 4},
        "parameters": PARAMETERS,
        "points_to_evaluate": points,
    }
    path = folder / "toy.yaml"
    path.write_text(json.dumps({name: value for name, value in (space | keys).items() if value is not None}))
    return load_space(str(path))


def configurations(study: Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.trials()]


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "nsga2", "qmc", "cmaes"])
def test_they_are_trained_first_with_every_sampler(sampler: str, database: Database, tmp_path: Path) -> None:
    study, _ = search_without_ray(space_of(tmp_path, POINTS, sampler=sampler), database, tmp_path)
    assert configurations(study)[:2] == COMPLETE
    assert [type(trial.params["x"]) for trial in study.trials()] == [int] * 4
    assert trial_states(study) == ["COMPLETE"] * 4
    assert len({json.dumps(each) for each in configurations(study)}) == 4


def test_a_search_that_is_resumed_trains_those_that_are_new(database: Database, tmp_path: Path) -> None:
    first, _ = search_without_ray(space_of(tmp_path, POINTS[:1], budget={"trials": 3}), database, tmp_path)
    study, _ = search_without_ray(space_of(tmp_path, POINTS, budget={"trials": 5}), database, tmp_path)
    assert study.name == first.name, "no other search"
    found = configurations(study)
    assert (found[0], found[3], len(found)) == (COMPLETE[0], COMPLETE[1], 5)


def test_the_budget_counts_them(database: Database, tmp_path: Path) -> None:
    study, _ = search_without_ray(space_of(tmp_path, POINTS, budget={"trials": 1}), database, tmp_path)
    assert configurations(study) == COMPLETE[:1]


def test_in_a_grid_they_come_first(database: Database, tmp_path: Path) -> None:
    grid = {"x": [1, 2, 3], "kind": ["a", "b"]}
    points = [{"x": 3, "kind": "b"}, {"x": 1, "kind": "b"}]
    space = space_of(tmp_path, points, sampler="grid", parameters=grid, budget=None)
    assert space.total_trials == 6
    study, _ = search_without_ray(space, database, tmp_path)
    rest = [{"x": x, "kind": kind} for x in (1, 2, 3) for kind in "ab" if {"x": x, "kind": kind} not in points]
    assert configurations(study) == [*points, *rest]


def test_they_do_not_change_the_identity_of_a_search(tmp_path: Path) -> None:
    with_points, without = space_of(tmp_path, POINTS), space_of(tmp_path, [])
    assert with_points.fingerprint == without.fingerprint
    stored = Space.from_settings(with_points.model_dump(mode="json"))
    assert stored.points_to_evaluate == COMPLETE


def test_a_stored_search_has_whole_configurations(tmp_path: Path) -> None:
    """The settings of a study do not say whether a default is null or missing."""
    parameters = {"x": [1, 2], "decay": {"choices": [None, 0.1], "default": None}}
    space = space_of(tmp_path, [{"x": 2}], parameters=parameters, sampler="grid", budget=None)
    assert space.points_to_evaluate == [{"x": 2, "decay": None}]
    stored = Space.from_settings(space.model_dump(mode="json"))
    assert next(stored.planned_points()) == {"x": 2, "decay": None}
    assert stored.total_trials == 4


def test_minus_zero_is_zero(tmp_path: Path) -> None:
    space = space_of(
        tmp_path, [{"rate": -0.0, "x": 1}], parameters={"x": [1], "rate": {"type": "float", "low": -1, "high": 1}}
    )
    assert str(space.points_to_evaluate[0]["rate"]) == "0.0"


@pytest.mark.parametrize("trials", ["best 1", "none", None])
def test_with_more_epochs_they_come_first_and_continue(database: Database, tmp_path: Path, trials: str | None) -> None:
    """A point that has a checkpoint starts from it, although `continue` would leave it out."""
    short = space_of(tmp_path, [], budget={"trials": 4}, checkpoints={"keep": "all"})
    earlier, _ = search_without_ray(short, database, tmp_path)
    worst = min(earlier.trials(), key=lambda trial: trial.values[0]).params
    keys = {"max_epochs": 3, "budget": {"trials": 3}, "checkpoints": {"keep": "all"}, "continue": trials}
    points = [COMPLETE[1], worst]
    study, listener = search_without_ray(space_of(tmp_path, points, **keys), database, tmp_path)
    assert configurations(study)[:2] == points
    started = {event[1]: event[2] for event in listener.events if event[0] == "started"}
    assert (started[0], started[1]) == (0, 0 if trials == "none" else 2)


def test_a_point_of_a_grid_is_continued_although_it_is_not_the_best(database: Database, tmp_path: Path) -> None:
    grid = {"sampler": "grid", "parameters": {"x": [1, 2, 3]}, "budget": None, "checkpoints": {"keep": "all"}}
    earlier, _ = search_without_ray(space_of(tmp_path, [], **grid), database, tmp_path)
    ranked = sorted(earlier.trials(), key=lambda trial: trial.values[0])
    worst, best = ranked[0].params, ranked[-1].params
    longer = space_of(tmp_path, [worst], **grid, max_epochs=3, **{"continue": "best 1"})
    study, _ = search_without_ray(longer, database, tmp_path)
    assert configurations(study) == [worst, best]


def test_a_result_that_stands_is_not_trained_again(database: Database, tmp_path: Path) -> None:
    search_without_ray(space_of(tmp_path, POINTS[:1], budget={"trials": 1}), database, tmp_path)
    wider = PARAMETERS | {"kind": ["a", "b", "c"]}
    space = space_of(tmp_path, POINTS, parameters=wider, budget={"trials": 2})
    study = open_study(database, **space.study_options)
    found = find_trials(space, study, database)
    take_over_trials(space, study, found)
    study, _ = search_without_ray(space, database, tmp_path)
    assert configurations(study)[:2] == COMPLETE
    assert [Origin.of(trial.user_attrs) is None for trial in study.trials()] == [False, True, True]


def test_notes_say_how_many_are_trained_and_that_the_budget_is_spent(tmp_path: Path) -> None:
    space, listener = space_of(tmp_path, POINTS), RecordingListener()
    known = {space.config_key(COMPLETE[0])}
    note_points(space, set(), 4, listener)
    note_points(space, set(), 1, listener)
    note_points(space, known, None, listener)
    note_points(space, known, 0, listener)
    note_points(space, {space.config_key(point) for point in COMPLETE}, 4, listener)
    assert [text for _, text in listener.events] == [
        "points_to_evaluate: 2 configurations are next",
        "points_to_evaluate: 2 configurations are next, and the budget has room for 1",
        "points_to_evaluate: 1 configuration is next",
        "points_to_evaluate: 1 configuration is left out, because the budget is spent",
    ]


def test_a_point_that_is_added_after_the_choice_of_what_continues_is_continued(
    database: Database, tmp_path: Path
) -> None:
    grid = {"sampler": "grid", "parameters": {"x": [1, 2, 3]}, "budget": None, "checkpoints": {"keep": "all"}}
    earlier, _ = search_without_ray(space_of(tmp_path, [], **grid), database, tmp_path)
    ranked = [trial.params for trial in sorted(earlier.trials(), key=lambda trial: trial.values[0])]
    longer = grid | {"max_epochs": 3, "continue": "best 1"}
    search_without_ray(space_of(tmp_path, [], **longer), database, tmp_path)
    study, listener = search_without_ray(space_of(tmp_path, ranked[:1], **longer), database, tmp_path)
    assert configurations(study) == [ranked[2], ranked[0]]
    assert ("started", 1, 2) in listener.events, "from its checkpoint"


def test_points_take_their_part_of_the_budget_from_what_continues(database: Database, tmp_path: Path) -> None:
    search_without_ray(space_of(tmp_path, [], budget={"trials": 2}), database, tmp_path)
    space = space_of(tmp_path, POINTS, max_epochs=3, budget={"trials": 3})
    study, listener = search_without_ray(space, database, tmp_path)
    assert configurations(study)[:2] == COMPLETE
    (note,) = [event[1] for event in listener.events if event[0] == "note" and "continues" in event[1]]
    assert note.startswith("continues 1 trial to epoch 3")
