"""Which ended trials keep nothing: the database ranks the others."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime, timedelta

import pytest
from optuna.trial import TrialState, create_trial

from storage import optuna_tables, ranking, tables
from storage.database import Database, open_database
from storage.imports import ImportedTrial, Origin, import_trials
from storage.pareto import Direction
from storage.ranking import EndedTrial, SinceBest, count_since_best, superfluous_trials
from storage.records import CONTINUED_FROM, attempt_of
from storage.retry import retry_trials
from storage.studies import deleted_studies
from storage.study import Study, study_names
from storage.summaries import summarize
from tests.factories import after_statement
from tests.storage.builders import GRID, POINTS, claim_one, config_key, grid_run, open_s, prune, sampled_run, sql

MAXIMIZE: list[Direction] = ["maximize"]
MINIMIZE: list[Direction] = ["minimize"]
BOTH: list[Direction] = ["maximize", "minimize"]
VALUES = [0.2, 0.9, 0.5, 0.9, 0.1]


def end_trials(study: Study, values: Collection[float], *, states: str = "") -> None:
    """Run a trial with each value; `states` has C, P, F, W or R for each, C where it is shorter."""
    with sampled_run(study) as run:
        for i, value in enumerate(values):
            claim = claim_one(run)
            run.report(claim, 1, {"m": value}, value)
            match states[i : i + 1]:
                case "P":
                    prune(run, claim)
                case "F":
                    run.fail(claim, "its reason")
                case "W":
                    run.release(claim)
                    return  # it would be claimed again
                case "R":
                    pass
                case _:
                    run.complete(claim, value)
                    run.flush()  # one after the other, for the time at which they ended
        run.flush()


def numbers(
    study: Study, count: int, direction: Direction | None = "maximize", among: Collection[int] | None = None
) -> list[int]:
    directions = None if direction is None else [direction]
    return [trial.number for trial in superfluous_trials(study, count, directions, among=among)]


@pytest.mark.parametrize(
    ("count", "direction", "superfluous"),
    [
        (1, "maximize", [0, 2, 3, 4]),
        (2, "maximize", [0, 2, 4]),
        (3, "maximize", [0, 4]),
        (1, "minimize", [0, 1, 2, 3]),
        (4, "minimize", [3]),
        (2, None, [0, 1, 2]),
        (0, "maximize", [0, 1, 2, 3, 4]),
        (9, "maximize", []),
    ],
)
def test_all_but_the_best_or_the_last_trials_are_superfluous_and_the_lower_number_wins_a_tie(
    study: Study, count: int, direction: Direction | None, superfluous: list[int]
) -> None:
    end_trials(study, VALUES)
    assert numbers(study, count, direction) == superfluous


def test_pruned_trials_are_superfluous_and_unfinished_and_failed_ones_are_not(study: Study) -> None:
    end_trials(study, [0.1, 0.9, 0.2, 0.3, 0.4], states="CPFRW")
    states = [trial.state.name for trial in study.trials()]
    assert states == ["COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING"]
    assert numbers(study, 1) == [1]
    assert numbers(study, 0) == [0, 1]
    assert numbers(study, 1, None) == [1]


def test_only_the_trials_that_are_asked_for_are_returned_and_all_count(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_trials(study, VALUES)
    assert numbers(study, 2, among=[1, 2]) == [2]
    assert numbers(study, 2, among=[]) == []
    monkeypatch.setattr(ranking, "MAX_NUMBERS", 1)
    assert numbers(study, 2, among=[1, 2, 4]) == [2, 4]


def test_a_trial_of_another_study_or_another_program_does_not_count(database: Database, study: Study) -> None:
    end_trials(study, [0.5, 0.4])
    end_trials(open_s(database, "other"), [0.9, 0.8])
    study.optuna_study.add_trial(create_trial(value=0.99))
    assert numbers(study, 1) == [1]


def test_infinite_values_rank_last(study: Study) -> None:
    end_trials(study, [float("inf"), 0.1, float("-inf")])
    assert numbers(study, 1) == [0, 2]
    assert numbers(study, 1, "minimize") == [0, 2]


def test_a_trial_is_returned_with_its_key_and_its_attempt(study: Study) -> None:
    with sampled_run(study) as run:
        run.fail(claim_one(run), "its reason")
        run.flush()
    retry_trials(study, [0])
    with sampled_run(study) as run:
        run.complete(claim_one(run), 0.5)
        run.flush()
    (trial,) = study.trials()
    assert trial.state == TrialState.COMPLETE
    attempt = attempt_of(trial.user_attrs)
    assert attempt.startswith("2-")
    assert superfluous_trials(study, 0, None) == [EndedTrial(0, config_key(trial.params), attempt)]


def test_a_deleted_study_is_recorded_under_the_id_in_its_unique_name(database: Database, study: Study) -> None:
    with grid_run(study):
        pass
    (summary,) = summarize(database)
    assert summary.unique_name == study.unique_name
    assert deleted_studies(database) == set()
    database.optuna_storage.delete_study(study.study_id)
    assert study_names(database) == []
    assert deleted_studies(database) == {summary.unique_name.removeprefix("s-")}
    with database.engine.begin() as connection:
        rows = [{"id": each} for each in ("../other", "0123abcd", "0123456789ab\n")]
        connection.execute(tables.deleted_studies.insert(), rows)
    assert len(deleted_studies(database)) == 1, "what no study can have would name files of others"
    assert sql(database, "SELECT count(*) FROM hpo_runs") == [(0,)]


NOW = datetime.now(UTC).replace(tzinfo=None)


@pytest.mark.parametrize("maximize", [True, False])
def test_trials_since_the_best_value_are_counted(database: Database, study: Study, *, maximize: bool) -> None:
    sign, directions = 1 if maximize else -1, MAXIMIZE if maximize else MINIMIZE
    learned = [ImportedTrial(Origin("o", "i", 0), POINTS[0], GRID, TrialState.COMPLETE, sign * 9.0)]
    reused = [
        ImportedTrial(Origin("o", "i", n), POINTS[0], GRID, TrialState.COMPLETE, sign * value, f"k{n}", completed=NOW)
        for n, value in ((1, 0.75), (2, 0.5), (3, 0.25))
    ]
    import_trials(study, learned + reused)
    found = [count_since_best(study, directions).ended]
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        for value in (1.0, 2.0, 2.0, None):
            claim = claim_one(run)
            if value is None:
                run.fail(claim, "no")
            else:
                run.complete(claim, sign * value)
            run.flush()
            found.append(count_since_best(study, directions).ended)
        assert run.is_patience_spent(1, directions)
        assert not run.is_patience_spent(2, directions)
    assert found == [0, 0, 0, 1, 1], "the first of equal values is the best; failures and earlier studies do not count"


def test_trials_that_continue_others_do_not_use_up_patience(study: Study) -> None:
    """They come best first."""
    attrs = {config_key(point): {CONTINUED_FROM: {"study": "o"}} for point in POINTS[:3]}
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID, attrs)
        for value in (0.75, 0.5, 0.25):
            run.complete(claim_one(run), value)
        assert not run.is_patience_spent(1, MAXIMIZE)
        run.complete(claim_one(run), 0.5)
        assert run.is_patience_spent(1, MAXIMIZE), "the best value is that of the first one"


def test_patience_notices_that_a_slow_trial_has_become_the_best(study: Study) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        slow = claim_one(run)
        for value in (0.1, 0.2, 0.5):
            run.complete(claim_one(run), value)
        assert not run.is_patience_spent(3, MAXIMIZE)
        run.complete(slow, 0.75)
        assert run.is_patience_spent(3, MAXIMIZE), "three trials after it had no better value"


def test_patience_notices_that_an_older_copy_was_restored(study: Study, database: Database) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        for value in (0.5, 0.25, 0.75):
            run.complete(claim_one(run), value)
        assert not run.is_patience_spent(1, MAXIMIZE)
        run.flush()
        with database.engine.begin() as connection:  # what a copy from before the third trial lacks
            connection.exec_driver_sql("DELETE FROM trial_values WHERE trial_id = 3")
            connection.exec_driver_sql("DELETE FROM trials WHERE trial_id = 3")
        assert run.is_patience_spent(1, MAXIMIZE)


def test_patience_does_not_believe_the_clocks_of_drivers(database: Database, study: Study) -> None:
    """The best trial is from a machine whose clock is an hour ahead."""
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        run.complete(claim_one(run), 0.9)
        run.flush()
        ahead = {"datetime_complete": datetime.now() + timedelta(hours=1)}
        with database.engine.begin() as connection:
            connection.execute(optuna_tables.trials.update().values(ahead))
        for value in (0.5, 0.6):
            run.complete(claim_one(run), value)
        assert run.is_patience_spent(2, MAXIMIZE)
        assert not run.is_patience_spent(3, MAXIMIZE)
        run.complete(claim_one(run), 1.0)
        assert not run.is_patience_spent(2, MAXIMIZE), "a better value"


# --- trials of other drivers that end between two statements


@contextlib.contextmanager
def completed_meanwhile(url: str, database: Database, number: int, values: Sequence[float]) -> Iterator[None]:
    """Let another driver complete a RUNNING trial after the first SELECT of the block."""
    with open_database(url) as other, grid_run(open_s(other)) as run:
        run.enqueue(POINTS, GRID)
        claim = claim_one(run)
        assert claim.number == number

        def complete() -> None:
            run.complete(claim, values[0], other_values=tuple(values[1:]))
            run.flush()

        with after_statement(database, "SELECT", complete):
            yield


@pytest.mark.parametrize("directions", [MAXIMIZE, BOTH])
def test_the_best_trial_is_not_superfluous_when_it_completes_meanwhile(
    url: str, database: Database, study: Study, directions: list[Direction]
) -> None:
    best = [1.0, 0.0][: len(directions)]
    with completed_meanwhile(url, database, 0, best):
        assert superfluous_trials(study, 1, directions) == []
    assert superfluous_trials(study, 1, directions) == []


@pytest.mark.parametrize("directions", [MAXIMIZE, BOTH])
def test_patience_is_not_used_up_by_a_better_trial_that_completes_meanwhile(
    url: str, database: Database, study: Study, directions: list[Direction]
) -> None:
    first, better = ([value, -value][: len(directions)] for value in (0.5, 1.0))
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        run.complete(claim_one(run), first[0], other_values=tuple(first[1:]))
        run.flush()
        with completed_meanwhile(url, database, 1, better):
            assert count_since_best(study, directions).ended == 0
        assert count_since_best(study, directions) == SinceBest(1, 0)
