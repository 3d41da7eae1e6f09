"""Configurations that the search space names are trained first, and once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpo.space.model import Space, load_space
from storage.database import Database
from storage.study import Study
from tests.factories import search_without_ray, trial_states

PARAMETERS = {
    "x": {"type": "int", "low": 0, "high": 1000},
    "rate": {"type": "float", "low": 0.0, "high": 1.0, "step": 0.1, "default": 0.2},
    "kind": ["a", "b"],
    "fixed": 7,
}
POINTS = [{"kind": "b", "x": 12.0, "rate": 0.5}, {"x": 0, "kind": "a"}]
COMPLETE = [{"x": 12, "rate": 0.5, "kind": "b", "fixed": 7}, {"x": 0, "rate": 0.2, "kind": "a", "fixed": 7}]


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


def test_a_reduced_grid_has_them(database: Database, tmp_path: Path) -> None:
    grid = {"x": [1, 2, 3], "kind": ["a", "b"]}
    points = [{"x": 3, "kind": "b"}]
    space = space_of(tmp_path, points, sampler="grid", parameters=grid, budget={"trials": 2})
    study, _ = search_without_ray(space, database, tmp_path)
    assert configurations(study) == [*points, {"x": 1, "kind": "a"}]


def test_they_do_not_change_the_identity_of_a_search(tmp_path: Path) -> None:
    with_points, without = space_of(tmp_path, POINTS), space_of(tmp_path, [])
    assert with_points.fingerprint == without.fingerprint
    stored = Space.from_settings(with_points.model_dump(mode="json"))
    assert stored.first_points() == COMPLETE
