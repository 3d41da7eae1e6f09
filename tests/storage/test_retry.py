"""Failed trials are tried again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial

from storage import optuna_tables, retry
from storage.database import Database
from storage.ownership import ClaimedTrial
from storage.records import DUPLICATE
from storage.retry import Failure, failed_trials, retry_trials
from storage.run import Run
from storage.study import Study
from tests.storage.builders import GRID, POINTS, claim_one, claim_point, grid_run, kill, sql


def fail_two_of_three(run: Run) -> None:
    """Complete trial 0; fail trials 1 and 2 after their first epoch."""
    run.enqueue(POINTS, GRID)
    for number in range(3):
        claim = claim_one(run)
        run.report(claim, 1, {"m": 0.5, "loss": 1.0}, 0.5)
        run.record_crash(claim)
        if number:
            run.fail(claim, "ValueError: no", "Traceback ...")
        else:
            run.complete(claim, 0.5)
    run.flush()


def attrs_of(trial: FrozenTrial) -> dict[str, Any]:
    """Return the user attributes of a trial, without the random one."""
    return {name: value for name, value in trial.user_attrs.items() if name != "attempt_token"}


def attempts_of(claim: ClaimedTrial) -> int:
    return int(claim.attempt.partition("-")[0])


def states(study: Study) -> list[str]:
    return [trial.state.name for trial in study.trials()]


@pytest.mark.parametrize("resume", [False, True])
def test_a_failed_trial_waits_again_without_its_failure(study: Study, database: Database, *, resume: bool) -> None:
    with grid_run(study) as run:
        fail_two_of_three(run)
    retry_trials(study, [1], resume=resume)
    assert states(study) == ["COMPLETE", "WAITING", "FAIL"]
    retried = study.trials()[1]
    assert attrs_of(retried) == {"retried": True} | ({} if resume else {"attempt": 2})
    assert retried.datetime_complete is None
    assert study.metrics()[1] == ({1: {"m": 0.5, "loss": 1.0}} if resume else {})
    assert sql(database, "SELECT run, crashes FROM hpo_trials WHERE trial = 2") == [(None, 0)]
    assert study.metrics()[0] == study.metrics()[2] == {1: {"m": 0.5, "loss": 1.0}}
    with grid_run(study) as run:
        claim = claim_one(run)
        assert (claim.number, claim.epoch, attempts_of(claim)) == (1, 1 if resume else 0, 1 if resume else 2)
        run.complete(claim, 0.75)
    assert states(study) == ["COMPLETE", "COMPLETE", "FAIL"]


def test_more_trials_are_retried_than_one_statement_takes(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "IDS_AT_ONCE", 2)
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        for _ in range(3):
            run.fail(claim_one(run), "an error")
    retry_trials(study, [0, 1, 2])
    assert states(study) == ["WAITING"] * 3
    assert failed_trials(study) == []


def test_the_run_that_failed_it_may_claim_it_again(study: Study) -> None:
    with grid_run(study) as run:
        fail_two_of_three(run)
        assert len(study.optuna_study.trials) == 3, "Optuna now keeps them in memory as finished"
        retry_trials(study, failed_trials(study))
        run._queue._next_scan = 0.0
        claims = [claim_one(run) for _ in range(3)]
        assert [claim.number for claim in claims] == [1, 2, 3]
        for claim in claims:
            run.complete(claim, 0.75)
    assert states(study) == ["COMPLETE"] * 4


def test_a_trial_that_another_program_retries_meanwhile_is_not_named(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    with grid_run(study) as run:
        fail_two_of_three(run)
    find_failures = retry._find_failures

    def find_then_retry(study: Study) -> list[Failure]:
        found = find_failures(study)
        monkeypatch.undo()
        assert retry_trials(study, [1]) == [1]
        return found

    monkeypatch.setattr(retry, "_find_failures", find_then_retry)
    assert retry_trials(study, [1, 2]) == [2]
    assert retry_trials(study, [1, 2]) == []


def test_each_retry_is_a_new_attempt(study: Study) -> None:
    with grid_run(study) as run:
        fail_two_of_three(run)
    for attempt in (2, 3):
        retry_trials(study, [2])
        retry_trials(study, [2])  # the answer was lost, and the operation repeated
        with grid_run(study) as run:
            claim = claim_one(run)
            assert (claim.number, attempts_of(claim)) == (2, attempt)
            run.fail(claim, "again")


def test_an_attempt_is_told_from_one_that_an_older_copy_of_the_database_does_not_know(
    study: Study, database: Database
) -> None:
    def retry_and_claim() -> ClaimedTrial:
        retry_trials(study, [0])
        with grid_run(study) as run:
            claim = claim_one(run)
            run.fail(claim, "again")
        return claim

    with grid_run(study) as run:
        first = claim_point(run)
        run.fail(first, "no")
    second = retry_and_claim()
    with database.transaction() as connection:  # as the copy has it that was made before the retry
        attrs = ("attempt", "attempt_token")
        optuna_tables.delete_attrs(connection, [first.trial_id], attrs)
    other_second = retry_and_claim()
    assert first.attempt == "1"
    assert attempts_of(second) == attempts_of(other_second) == 2
    assert second.attempt != other_second.attempt


def test_an_attempt_that_an_earlier_version_stored_has_a_number_only(study: Study, database: Database) -> None:
    """Its checkpoints are found by it."""
    with grid_run(study) as run:
        claim = claim_point(run)
        run.release(claim)
    with database.transaction() as connection:
        optuna_tables.write_attrs(connection, [(claim.trial_id, {"attempt": 2})])
    with grid_run(study) as run:
        again = claim_one(run)
        assert again.attempt == "2"
        run.fail(again, "no")
    retry_trials(study, [0])
    with grid_run(study) as run:
        assert claim_one(run).attempt.startswith("3-")


def fail_again(study: Study, run: Run) -> None:
    """Claim the retried trial 1, and fail it."""
    run._queue._next_scan = 0.0
    claim = claim_one(run)
    assert claim.number == 1
    run.fail(claim, "again")
    run.flush()
    assert states(study)[1] == "FAIL"


@pytest.mark.parametrize("resume", [False, True])
def test_a_failure_after_a_lost_answer_is_not_retried(
    study: Study, monkeypatch: pytest.MonkeyPatch, *, resume: bool
) -> None:
    with grid_run(study) as run:
        fail_two_of_three(run)

        def repeat(_: Database, write: Callable[[], None]) -> None:
            write()
            fail_again(study, run)
            write()

        failures = retry._find_failures(study)
        monkeypatch.setattr(retry, "_find_failures", lambda _: failures)
        monkeypatch.setattr(retry, "retry_while_down", repeat)
        retry_trials(study, [1], resume=resume)
    assert states(study) == ["COMPLETE", "FAIL", "FAIL"]
    assert attrs_of(study.trials()[1]) == {"fail_reason": "again", "retried": True} | ({} if resume else {"attempt": 2})


def test_of_two_retries_at_the_same_time_one_retries(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    with grid_run(study) as run:
        fail_two_of_three(run)
        failures = retry._find_failures(study)
        retry_trials(study, [1])
        fail_again(study, run)
        monkeypatch.setattr(retry, "_find_failures", lambda _: failures)
        retry_trials(study, [1])
    assert states(study) == ["COMPLETE", "FAIL", "FAIL"]
    assert attrs_of(study.trials()[1]) == {"fail_reason": "again", "attempt": 2, "retried": True}


def test_a_failure_by_deaths_of_drivers_is_told_from_an_earlier_one(study: Study) -> None:
    def let_die() -> Failure:
        dead = grid_run(study, max_failures=0).__enter__()
        dead.enqueue(POINTS[:1], GRID)
        claim_one(dead)
        kill(dead)
        with grid_run(study, max_failures=0) as run:
            assert run.claim() is None
        return retry._find_failures(study)[0]

    first = let_die()
    retry_trials(study, [0], resume=True)
    second = let_die()
    assert (first.number, first.attempt) == (second.number, second.attempt)
    assert first != second


def test_trials_that_did_not_fail_in_training_are_left_as_they_are(study: Study) -> None:
    with grid_run(study) as run:
        fail_two_of_three(run)
    duplicate = optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL, user_attrs={"fail_reason": DUPLICATE})
    study.optuna_study.add_trial(duplicate)
    study.optuna_study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))  # by another program
    assert failed_trials(study) == [1, 2]
    retry_trials(study, [0])
    assert states(study) == ["COMPLETE", "FAIL", "FAIL", "FAIL", "FAIL"]
    assert study.metrics()[0] == {1: {"m": 0.5, "loss": 1.0}}
