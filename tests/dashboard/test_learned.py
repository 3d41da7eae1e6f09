"""Trials from which a sampler alone learns are no results of a study in the dashboard either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from playwright.sync_api import Browser, expect

from hpo.dashboard.server import build_app
from hpo.paths import RunsDir
from storage.database import Database
from storage.imports import ImportedTrial, Origin, import_trials
from storage.optuna_internals import study_id
from storage.pareto import Direction
from storage.run import Run
from storage.studies import open_study
from storage.study import Study
from tests.dashboard.builders import request, serving

LEARNED = "grid #3: no result of this study, its sampler alone learns from it"


def study_that_learned(database: Database, *directions: Direction) -> Study:
    """A study with trials 0 and 1, from which it learns alone, and its own trials 2 and 3; 0 is better than all others."""
    distributions = {"lr": FloatDistribution(0.0, 1.0)}
    settings: dict[str, Any] = {"name": "search"}
    study = open_study(database, "search", direction=directions, fingerprint="f", settings=settings, total_trials=None)
    others = (0.1,) * (len(directions) - 1)
    states = {3: TrialState.COMPLETE, 4: TrialState.PRUNED if len(directions) == 1 else TrialState.COMPLETE}
    import_trials(
        study,
        [
            ImportedTrial(
                Origin("grid", "abc", number),
                {"lr": number / 10},
                distributions,
                state,
                0.9,
                values={1: 0.9} if state == TrialState.PRUNED else {},
                other_values=others,
            )
            for number, state in states.items()
        ],
    )
    with Run(study, config_key=str, provenance={}) as run:
        run.enqueue([{"lr": 0.5}, {"lr": 0.6}], distributions)
        for value in (0.5, 0.6):
            claim = run.claim()
            assert claim is not None
            run.report(claim, 1, {"value": value}, value)
            run.complete(claim, value, other_values=tuple(0.5 for _ in others))
    return study


def details(database: Database, runs_dir: RunsDir, study: Study) -> dict[str, Any]:
    with serving(build_app(database, runs_dir=runs_dir)) as port:
        _, _, content = request(port, "GET", f"/api/studies/{study_id(study.optuna_study)}?after=0")
    found: dict[str, Any] = json.loads(content)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("directions", [("maximize",), ("maximize", "minimize")])
def test_trials_to_learn_from_are_never_the_best(
    database: Database, tmp_path: Path, directions: tuple[Direction, ...]
) -> None:
    study = study_that_learned(database, *directions)
    found = details(database, RunsDir(tmp_path), study)
    assert [trial["number"] for trial in found["best_trials"]] == [3]
    assert [trial["state"] for trial in found["trials"]] == ["Pruned", "Pruned", "Complete", "Complete"]
    assert [trial["constraints"] for trial in found["trials"]] == [[1.0], [1.0], [], []]
    assert [each["value"] for each in found["trials"][0]["user_attrs"]] == [LEARNED]
    assert study.trials()[0].state.name == "COMPLETE", "the database stays as it is"


@pytest.mark.slow
@pytest.mark.browser
def test_the_pages_show_them_apart(database: Database, tmp_path: Path, browser: Browser) -> None:
    study = study_that_learned(database, "maximize")
    with serving(build_app(database, runs_dir=RunsDir(tmp_path))) as port, browser.new_page() as page:
        site = f"http://127.0.0.1:{port}/dashboard/studies/{study_id(study.optuna_study)}"
        page.goto(f"{site}/trials?numbers=0")
        expect(page.get_by_text(LEARNED)).to_be_visible()
        expect(page.get_by_text("Best Trial")).to_have_count(1)
        page.goto(f"{site}/trials?numbers=3")
        expect(page.get_by_text("Best Trial")).to_have_count(2)  # in the list, and of the trial
