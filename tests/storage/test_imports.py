"""Trials of earlier studies are taken over: all or none, once, outside of the budget, and apart from the study's own."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from datetime import datetime
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from storage import imports, optuna_tables, records
from storage.database import Database, open_database, open_for_reading
from storage.history import MIN_LIMIT, History
from storage.imports import ImportedTrial, Origin, TakenOver, import_trials, set_points
from storage.pruners import Decision, Median, SuccessiveHalving
from storage.ranking import superfluous_trials
from storage.studies import find_study
from storage.study import Study
from storage.summaries import summarize
from storage.tables import LEARNED, POINT, REUSED
from tests.storage.builders import GRID, POINTS, claim_one, config_key, grid_run, open_s, sampled_run, sql
from tests.storage.studies import kill_at

BOTH = {"x": FloatDistribution(0, 1), "n": IntDistribution(1, 3)}  # as `draw_both`


def learned(number: int, value: float = 0.5, **changes: Any) -> ImportedTrial:
    params = {"x": number / 100, "n": 2}
    return ImportedTrial(Origin("old", "abc", number), params, BOTH, TrialState.COMPLETE, value, **changes)


def reused(number: int, value: float = 0.5, **changes: Any) -> ImportedTrial:
    point = POINTS[number]
    epochs = {1: value / 2, 2: value}
    values = {
        "key": config_key(point),
        "values": epochs,
        "metrics": {epoch: {"m": found} for epoch, found in epochs.items()},
        "provenance": {"device": "cpu"},
    }
    return ImportedTrial(Origin("old", "abc", number), point, GRID, TrialState.COMPLETE, value, **(values | changes))


def roles(database: Database) -> list[str]:
    return [row[0] for row in sql(database, "SELECT role FROM hpo_imports ORDER BY trial")]


@pytest.fixture
def sampled(database: Database) -> Study:
    """A study whose budget is three drawn trials."""
    return open_s(database, total_trials=3)


def finish(study: Study, **options: Any) -> list[int]:
    """Run a study to its end; return the numbers of the trials that were trained."""
    numbers = []
    with sampled_run(study, max_trials=3, **options) as run:
        while claim := run.claim():
            numbers.append(claim.number)
            run.report(claim, 1, {"m": 0.25}, 0.25)
            run.complete(claim, 0.25)
        assert run.finished
    return numbers


def test_the_sampler_learns_from_a_trial_that_is_no_result_of_the_study(sampled: Study, database: Database) -> None:
    assert import_trials(sampled, [learned(7, 0.9, attrs={"derived": {"d": 1}})]) == {LEARNED: 1, REUSED: 0}
    (trial,) = sampled.trials()
    assert (trial.number, trial.state.name, trial.value, trial.params) == (0, "COMPLETE", 0.9, {"x": 0.07, "n": 2})
    assert trial.distributions == BOTH
    assert trial.user_attrs == {"derived": {"d": 1}, "learned_from": {"study": "old", "trial": 7, "id": "abc"}}
    assert Origin.of(trial.user_attrs) == Origin("old", "abc", 7)
    assert sampled.trained_trials() == []
    assert sum(sampled.counts().values()) == 0
    history = History(sampled, MIN_LIMIT)
    history.refresh()
    assert [shown.value for shown in history.trials()] == [0.9]
    assert finish(sampled) == [1, 2, 3], "the budget does not count it"
    (summary,) = summarize(database)
    assert (summary.state, summary.counts, summary.best) == ("finished", {"COMPLETE": 3}, 0.25)


def test_its_configuration_may_be_trained_again(sampled: Study) -> None:
    import_trials(sampled, [learned(7)])

    def draw(trial: optuna.Trial) -> str:
        trial.suggest_float("x", 0.07, 0.07)
        trial.suggest_int("n", 2, 2)
        return ""

    with sampled_run(sampled, draw, max_trials=3) as run:
        assert claim_one(run).params == {"x": 0.07, "n": 2}


def test_a_result_that_stands_is_not_trained_again(study: Study, database: Database) -> None:
    points = {config_key(point) for point in POINTS}
    added = import_trials(study, [reused(1, 0.9, attrs={"test_accuracy": 0.8})], points=points)
    assert added == {LEARNED: 0, REUSED: 1}
    (trial,) = study.trained_trials()
    assert (trial.value, trial.intermediate_values) == (0.9, {1: 0.45, 2: 0.9})
    assert trial.user_attrs["test_accuracy"] == 0.8
    assert trial.user_attrs["reused_from"] == {"study": "old", "trial": 1, "id": "abc"}
    assert study.metrics() == {0: {1: {"m": 0.45}, 2: {"m": 0.9}}}
    assert study.provenance(0) == {"device": "cpu"}
    assert study.ended_keys() == {config_key(POINTS[1])}
    assert study.count_ended_keys() == 1, "it is a point of the grid"
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claims = [claim_one(run) for _ in range(3)]
        assert [claim.params for claim in claims] == [POINTS[0], *POINTS[2:]]
        for claim in claims:
            run.complete(claim, 0.25)
        assert run.claim() is None
        assert run.finished
    (summary,) = summarize(database)
    assert (summary.counts, summary.best) == ({"COMPLETE": 4}, 0.9)


def test_the_budget_counts_reused_points_of_the_grid_alone(study: Study, database: Database) -> None:
    import_trials(study, [reused(0), reused(1)], points={config_key(POINTS[0])})
    assert roles(database) == [POINT, REUSED]
    assert study.count_ended_keys() == 1
    import_trials(study, [], points={config_key(point) for point in POINTS[:2]})
    assert roles(database) == [POINT, POINT], "budget.trials was raised"
    assert study.count_ended_keys() == 2


def test_a_grid_whose_file_has_changed_counts_its_points(study: Study, database: Database) -> None:
    import_trials(study, [reused(0), reused(1)], points=())
    assert study.count_ended_keys() == 0
    set_points(study, {config_key(point) for point in POINTS[:1]})
    assert roles(database) == [POINT, REUSED]
    set_points(study, ())
    assert roles(database) == [REUSED, REUSED], "the search is no grid any more"


def test_a_drawn_configuration_whose_result_stands_is_a_duplicate(sampled: Study) -> None:
    origin = Origin("old", "abc", 0)
    params = {"x": 0.5, "n": 1}
    stands = ImportedTrial(origin, params, BOTH, TrialState.COMPLETE, 0.9, config_key(params), {1: 0.9})
    import_trials(sampled, [stands])

    def draw(trial: optuna.Trial) -> str:
        trial.suggest_float("x", 0.5, 0.5)
        trial.suggest_int("n", 1, 2)
        return ""

    with sampled_run(sampled, draw, max_trials=3) as run:
        claim = claim_one(run)
        assert claim.params == {"x": 0.5, "n": 2}
        run.complete(claim, 0.25)
        assert run.claim() is None
        assert run.exhausted, "the budget allows two more: it counts one"


def test_trials_are_taken_over_once(study: Study) -> None:
    first = [learned(0), reused(1), learned(2)]
    import_trials(study, first)
    assert import_trials(study, [*first, learned(3)]) == {LEARNED: 1, REUSED: 0}
    assert [trial.number for trial in study.trials()] == [0, 1, 2, 3]
    same = ImportedTrial(Origin("other", "def", 9), POINTS[1], GRID, TrialState.COMPLETE, 0.1, config_key(POINTS[1]))
    assert import_trials(study, [same]) == {LEARNED: 0, REUSED: 0}, "another study trained the same configuration"


def test_a_number_that_was_given_out_again_is_another_trial(study: Study, database: Database) -> None:
    """As after restoring the earlier study's database from a copy."""
    ends = [datetime(2026, 1, 1, 12, 0, 0, microsecond) for microsecond in (1, 2)]
    first, again = learned(0, completed=ends[0]), dataclasses.replace(learned(1, completed=ends[1]), origin=OLD)
    assert import_trials(study, [first, first]) == {LEARNED: 1, REUSED: 0}
    for expected in (1, 0):
        assert import_trials(study, [first, again, again]) == {LEARNED: expected, REUSED: 0}
    assert [trial.params["x"] for trial in study.trials()] == [0.0, 0.01]
    assert [trial.user_attrs["learned_from"]["id"] for trial in study.trials()] == ["abc"] * 2
    sources = [row[0] for row in sql(database, "SELECT source FROM hpo_imports ORDER BY trial")]
    assert sources == ["abc", "abc 2026-01-01 12:00:00.000002"]


OLD = Origin("old", "abc", 0)


def test_a_configuration_that_the_study_has_is_not_taken_over(study: Study) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claim_one(run)
        assert import_trials(study, [reused(0), reused(1)]) == {LEARNED: 0, REUSED: 1}
        assert [trial.state.name for trial in study.trials()] == ["RUNNING", "COMPLETE"]
        assert claim_one(run).params == POINTS[2]


def test_all_are_taken_over_or_none(study: Study, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = (optuna_tables.trials.name, "trial_params", "trial_values", "hpo_trials", "hpo_metrics", "hpo_imports")

    def fail(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(imports, "_set_roles", fail)
        with pytest.raises(RuntimeError, match="killed"):
            import_trials(study, [learned(0), reused(1)], points=())
    assert [sql(database, f"SELECT count(*) FROM {table}") for table in tables] == [[(0,)]] * len(tables)
    assert study.attrs.get("hpo:sources") is None
    import_trials(study, [learned(0), reused(1)], points=(), sources=[TakenOver("old")])
    assert len(study.trials()) == 2
    assert study.attrs["hpo:sources"] == [TakenOver("old").attribute]


@pytest.mark.slow
@pytest.mark.exhaustive(on="postgresql")
def test_a_kill_at_any_statement_leaves_none_or_all(url: str) -> None:
    """Of the trials, and of what the study says of their sources."""
    trials, sources = [learned(0), reused(1), reused(2)], [TakenOver("old", learned=1, reused=2)]
    with open_database(url) as database:
        study = open_s(database)

        def take_over(opened: Database) -> None:
            found = find_study(opened, study.name)
            assert found is not None
            import_trials(found, trials, sources=sources)

        def rows() -> list[int]:
            tables = ("trials", "trial_params", "trial_values", "trial_user_attributes", "hpo_trials", "hpo_metrics")
            counts = [sql(database, f"SELECT count(*) FROM {name}")[0][0] for name in (*tables, "hpo_imports")]
            return [*counts, len(study.attrs.get("hpo:sources", ()))]

        outcomes, before = [], rows()
        assert not any(before)
        for step in itertools.count(1):
            was_killed = kill_at(step, [url], take_over)
            outcomes.append(rows())
            if not was_killed:
                break
            assert outcomes[-1] == before or outcomes[-1][0] == len(trials)
    assert outcomes[-1][0] == outcomes[-1][-2] == len(trials)
    assert {tuple(each) for each in outcomes} == {tuple(before), tuple(outcomes[-1])}
    assert outcomes.count(before) >= 8, "it was killed before each statement that writes, and before the commit"


@pytest.mark.slow
def test_two_drivers_that_take_over_at_once_do_it_once(url: str) -> None:
    with open_database(url) as first, open_database(url) as second:
        trials = [learned(number) for number in range(30)]
        studies = [open_s(first), open_s(second)]
        threads = [threading.Thread(target=import_trials, args=(study, trials)) for study in studies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [trial.number for trial in studies[0].trials()] == list(range(30))


def test_deleting_the_study_deletes_what_it_took_over(study: Study, database: Database) -> None:
    import_trials(study, [learned(0), reused(1)])
    optuna.delete_study(study_name="s", storage=database.optuna_storage)
    assert roles(database) == []
    assert sql(database, "SELECT count(*) FROM hpo_metrics") == [(0,)]


@pytest.fixture
def stopped(sampled: Study) -> Study:
    """A study that learns from a trial that was pruned after epoch 2, with a value that no other reaches."""
    pruned = ImportedTrial(Origin("old", "abc", 5), {"x": 0.5, "n": 1}, BOTH, TrialState.PRUNED, 0.99, values={2: 0.99})
    import_trials(sampled, [pruned, *(learned(number, 0.99) for number in range(8))])
    return sampled


@pytest.mark.parametrize(
    "pruner", [SuccessiveHalving(True, "s", 1, 2), Median(True, 1, startup_trials=1)], ids=["asha", "median"]
)
def test_pruners_compare_a_trial_with_those_of_its_own_study(stopped: Study, database: Database, pruner: Any) -> None:
    with sampled_run(stopped, max_trials=3, pruner=pruner) as run:
        claim = claim_one(run)
        assert run.decide(claim, 1, {"m": 0.1}, 0.1) is Decision.CONTINUE
        assert run.decide(claim, 2, {"m": 0.1}, 0.1) is Decision.CONTINUE
    assert all(row[0] == claim.trial_id for row in sql(database, "SELECT trial FROM hpo_rungs"))
    with database.engine.connect() as connection:
        assert records.count_budgeted(connection, stopped.study_id) == 1


def test_files_of_reused_trials_are_those_of_the_earlier_study(study: Study) -> None:
    import_trials(study, [reused(0, 0.9), reused(1, 0.8)], points=())
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        for value in (0.1, 0.2):
            run.complete(claim_one(run), value)
        run.flush()
    assert [trial.number for trial in superfluous_trials(study, 1, ["maximize"])] == [2]


def test_a_database_without_the_table_is_still_listed(study: Study, database: Database, url: str) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS[:1], GRID)
        run.complete(claim_one(run), 0.5)
    with database.engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE hpo_imports"))
        connection.execute(sa.text("UPDATE hpo_schema SET version = 4"))
    with open_for_reading(url) or pytest.fail("it has tables") as reading:
        (summary,) = summarize(reading)
        assert summary.counts == {"COMPLETE": 1}
        found = find_study(reading, "s")
        assert found is not None
        assert found.count_ended_keys() == 1
        assert superfluous_trials(found, 1, ["maximize"]) == []


def test_the_parameters_keep_the_types_of_the_new_study(study: Study) -> None:
    choices = {"a": CategoricalDistribution([True, "b", None])}
    origin = Origin("old", "abc", 0)
    import_trials(study, [ImportedTrial(origin, {"a": None}, choices, TrialState.COMPLETE, 0.5)])
    assert study.trials()[0].params == {"a": None}
