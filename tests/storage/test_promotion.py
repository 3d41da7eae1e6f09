"""Successive halving that promotes: who trains on, who waits, and who ends, decided in the database."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState
from sqlalchemy.exc import DBAPIError

from storage import history as history_module
from storage import reporting
from storage.database import Database
from storage.history import MIN_LIMIT, History
from storage.ownership import ClaimedTrial
from storage.promotion import PromotingHalving, StoppingHalving
from storage.pruners import Decision, SuccessiveHalving
from storage.retry import retry_trials
from storage.run import Run
from storage.studies import open_study
from storage.study import Study
from tests.storage.builders import claim_one, grid_run, kill, open_s, sql

ASHA = PromotingHalving(maximize=True, study_name="s", min_epochs=1, reduction_factor=3)
STOPPING = StoppingHalving(maximize=True, study_name="s", min_epochs=1, reduction_factor=3)
MANY = 30
DISTRIBUTIONS = {"x": CategoricalDistribution(list(range(MANY)))}


@pytest.fixture
def study(database: Database) -> Study:
    return open_s(database)


@pytest.fixture
def run(study: Study) -> Iterator[Run]:
    with grid_run(study, pruner=ASHA) as opened:
        yield opened


def plan(run: Run, count: int) -> None:
    run.enqueue([{"x": x} for x in range(count)], DISTRIBUTIONS)


def train(run: Run, claim: ClaimedTrial, value: float, *, epochs: int = 9) -> Decision:
    """Train until a rung holds the trial; complete it after its last epoch."""
    for epoch in range(claim.epoch + 1, epochs):
        decision = run.decide(claim, epoch, {"m": value}, value)
        if decision is Decision.WAIT:
            run.release(claim)
        if decision is not Decision.CONTINUE:
            return decision
    run.report(claim, epochs, {"m": value}, value)
    run.complete(claim, value)
    return Decision.CONTINUE


def states(study: Study) -> dict[int, tuple[str, int]]:
    """Return {number: (state, last epoch)}."""
    return {trial.number: (trial.state.name, max(trial.intermediate_values, default=0)) for trial in study.trials()}


def search(run: Run, study: Study, count: int, values: dict[int, float]) -> list[tuple[int, int]]:
    """Run a search with one trial at a time; return (number, epoch after which it was claimed) in this order."""
    plan(run, count)
    order = []
    while (claim := run.claim()) is not None:
        order.append((claim.number, claim.epoch))
        train(run, claim, values[claim.number])
    assert run.finished
    return order


@pytest.mark.parametrize("maximize", [True, False])
def test_the_best_third_trains_on_and_the_others_end(database: Database, maximize: bool) -> None:
    study = open_s(database)
    sign = 1 if maximize else -1
    values = {number: sign * (number * 7 % 9) / 10 for number in range(9)}
    with grid_run(study, pruner=PromotingHalving(maximize, "s", 1, 3)) as run:
        order = search(run, study, 9, values)
        stopped = run.take_stopped()
        assert run.take_stopped() == {}
    best = sorted(range(9), key=lambda number: -sign * values[number])
    ended = states(study)
    assert ended[best[0]] == ("COMPLETE", 9)
    reached = [epoch for _, (_, epoch) in sorted(ended.items(), key=lambda each: -each[1][1])]
    assert sum(epoch >= 3 for epoch in reached) >= 3
    assert {number: epoch for number, (state, epoch) in ended.items() if state == "PRUNED"} == stopped
    assert len(order) > 9, "trials were resumed"
    for trial in study.trials():
        assert trial.value == values[trial.number]
    assert sql(database, "SELECT trial FROM hpo_rungs WHERE pool LIKE '%waiting'") == []


def test_a_trial_that_was_overtaken_is_promoted_later(run: Run, study: Study) -> None:
    """Instead of ending it, as `SuccessiveHalving` does."""
    plan(run, 6)
    first, second, third = (claim_one(run) for _ in range(3))
    assert train(run, first, 0.9) is Decision.WAIT, "one of one: nobody is among the best third yet"
    assert train(run, second, 0.8) is Decision.WAIT
    assert states(study)[0] == ("WAITING", 1)
    assert train(run, third, 0.1) is Decision.WAIT
    again = claim_one(run)
    assert (again.number, again.epoch) == (0, 1), "one of three trains on"
    fourth = claim_one(run)
    assert fourth.number == 3, "nobody else may train on yet, so a new trial starts"
    assert train(run, fourth, 0.2) is Decision.WAIT
    for _ in range(2):
        assert train(run, claim_one(run), 0.3) is Decision.WAIT
    assert claim_one(run).number == 1, "two of six"


@pytest.mark.exhaustive(on="postgresql")
def test_trials_at_the_highest_rung_are_promoted_first(run: Run, study: Study) -> None:
    values = {number: number / 100 for number in range(MANY)}
    order = search(run, study, MANY, values)
    ended = states(study)
    assert ended[MANY - 1] == ("COMPLETE", 9)
    from_rungs = [epoch for _, epoch in order if epoch]
    assert set(from_rungs) <= {1, 3}
    at = {rung: sum(epoch >= rung for _, epoch in ended.values()) for rung in (1, 3, 9)}
    assert at[1] == MANY
    assert at[3] >= MANY // 3
    assert at[9] >= 1
    assert list(run.take_stopped()) == sorted(number for number, (state, _) in ended.items() if state == "PRUNED")


def test_too_few_trials_for_a_rung_let_the_best_train_to_the_end(run: Run, study: Study) -> None:
    order = search(run, study, 2, {0: 0.5, 1: 0.7})
    assert order == [(0, 0), (1, 0), (1, 1), (1, 3)]
    assert states(study) == {0: ("PRUNED", 1), 1: ("COMPLETE", 9)}


def test_nobody_ends_while_another_run_trains(database: Database, study: Study, run: Run) -> None:
    with grid_run(study, pruner=ASHA) as other:
        plan(run, 2)
        plan(other, 2)
        far = claim_one(other)
        assert train(run, claim_one(run), 0.5) is Decision.WAIT
        assert run.claim() is None
        assert not run.finished
        assert states(study)[1] == ("WAITING", 1)
        assert train(other, far, 0.7) is Decision.WAIT
        assert train(other, claim_one(other), 0.7, epochs=3) is Decision.CONTINUE
    assert run.claim() is None
    assert run.finished
    assert states(study) == {0: ("COMPLETE", 3), 1: ("PRUNED", 1)}


def test_a_decision_to_wait_survives_the_driver(study: Study) -> None:
    """It dies before it gives the trial back."""
    lost = grid_run(study, pruner=ASHA)
    lost.__enter__()
    plan(lost, 2)
    claim = claim_one(lost)
    assert lost.decide(claim, 1, {"m": 0.5}, 0.5) is Decision.WAIT
    kill(lost)
    with grid_run(study, pruner=ASHA) as run:
        plan(run, 2)
        assert claim_one(run).number == 1, "trial 0 is taken over, and waits"
        assert states(study)[0] == ("WAITING", 1)


def test_an_interrupted_trial_is_resumed_at_once(run: Run) -> None:
    """It has trained on from its rung."""
    plan(run, 6)
    claims = [claim_one(run) for _ in range(3)]
    for claim, value in zip(claims, (0.9, 0.8, 0.7), strict=True):
        train(run, claim, value)
    best = claim_one(run)
    assert best.number == 0
    run.decide(best, 2, {"m": 0.1}, 0.1)
    run.release(best)
    again = claim_one(run)
    assert (again.number, again.epoch) == (0, 2)


def test_a_trial_that_trains_on_without_its_checkpoint_is_not_held_again(run: Run) -> None:
    """It trains the epochs before once more, with other values."""
    plan(run, 1)
    assert train(run, claim_one(run), 0.5) is Decision.WAIT
    claim = claim_one(run)
    assert run.decide(claim, 1, {"m": 0.4}, 0.4) is Decision.CONTINUE
    assert run.decide(claim, 2, {"m": 0.4}, 0.4) is Decision.CONTINUE
    assert run.decide(claim, 3, {"m": 0.4}, 0.4) is Decision.WAIT, "a rung that it had not reached"


def test_without_promotion_all_that_wait_are_resumed(study: Study, run: Run, database: Database) -> None:
    """And with it again, those that have trained further do not wait any more."""
    plan(run, 2)
    assert train(run, claim_one(run), 0.5) is Decision.WAIT
    run.__exit__(None, None, None)
    with grid_run(study, pruner=SuccessiveHalving(True, "s", 1, 3)) as stopping:
        plan(stopping, 2)
        claim = claim_one(stopping)
        assert (claim.number, claim.epoch) == (0, 1)
        assert stopping.decide(claim, 2, {"m": 0.5}, 0.5) is Decision.CONTINUE
        stopping.release(claim)
    with grid_run(study, pruner=ASHA) as again:
        plan(again, 2)
        claim = claim_one(again)
        assert (claim.number, claim.epoch) == (0, 2)


def test_a_reduced_budget_lets_those_wait_that_have_not_trained_on(database: Database) -> None:
    study = open_s(database)

    def draw(trial: object) -> str:
        trial.suggest_int("x", 0, 10**6)  # type: ignore[attr-defined]
        return ""

    with grid_run(study, draw=draw, max_trials=4, pruner=ASHA) as run:
        for value in (0.1, 0.2, 0.3):
            assert train(run, claim_one(run), value) in {Decision.WAIT, Decision.CONTINUE}
    with grid_run(study, draw=draw, max_trials=1, pruner=ASHA) as run:
        while (claim := run.claim()) is not None:
            train(run, claim, 0.3)
        assert run.finished
    ended = sorted(state for state, _ in states(study).values())
    assert ended.count("COMPLETE") == 1


@pytest.mark.exhaustive(on="postgresql")
def test_brackets_of_hyperband_promote_apart(study: Study) -> None:
    pruner = PromotingHalving.hyperband(maximize=True, study_name="s", min_epochs=1, max_epochs=9, reduction_factor=3)
    assert isinstance(pruner, PromotingHalving)
    values = {number: number / 100 for number in range(MANY)}
    with grid_run(study, pruner=pruner) as run:
        search(run, study, MANY, values)
    ended = states(study)
    for bracket in range(pruner.brackets):
        members = [number for number in ended if pruner.bracket(number) == bracket]
        assert max(ended[number][1] for number in members) == 9, "the best of each bracket trains to the end"


def test_tpe_sees_trials_that_wait_as_pruned(study: Study, run: Run) -> None:
    plan(run, 4)
    train(run, claim_one(run), 0.5)
    train(run, claim_one(run), 0.7)
    running = claim_one(run)
    history = History(study, MIN_LIMIT, ASHA)
    history.refresh()
    seen = {trial.number: (trial.state, trial.intermediate_values) for trial in history.trials()}
    assert seen == {
        0: (TrialState.PRUNED, {1: 0.5}),
        1: (TrialState.PRUNED, {1: 0.7}),
        2: (TrialState.RUNNING, {}),
    }
    assert history.trials()[0].params == {"x": 0}
    assert train(run, running, 0.1) is Decision.WAIT
    best = claim_one(run)
    assert run.decide(best, 2, {"m": 0.8}, 0.8) is Decision.CONTINUE
    history.refresh()
    assert {trial.number: trial.state.name for trial in history.trials()} == {0: "PRUNED", 1: "RUNNING", 2: "PRUNED"}
    assert run.decide(best, 3, {"m": 0.8}, 0.8) is Decision.WAIT
    run.release(best)
    history.refresh()
    assert history.trials()[1].intermediate_values == {3: 0.8}, "at its new rung"


def test_a_history_shows_no_more_trials_that_wait_than_its_limit(
    study: Study, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 30
    monkeypatch.setattr(history_module, "MIN_LIMIT", limit)  # with the real one, 270 trials would have to train
    monkeypatch.setattr(history_module, "BEST_TRIALS", limit // 10)
    count = limit + 20
    points = [{"x": x} for x in range(count)]
    run.enqueue(points, {"x": CategoricalDistribution(list(range(count)))})
    for number in range(count):
        claim = claim_one(run)
        while claim.epoch:  # promoted
            train(run, claim, claim.values[claim.epoch])
            claim = claim_one(run)
        train(run, claim, number / count)
    history = History(study, limit, ASHA)
    history.refresh()
    shown = history.trials()
    assert len([trial for trial in shown if trial.state in {TrialState.PRUNED, TrialState.COMPLETE}]) == limit
    best = max(trial.number for trial in study.trials())
    assert best in {trial.number for trial in shown}


def test_a_trial_that_failed_takes_no_place(run: Run, study: Study) -> None:
    """Large learning rates do best at first, and fail later."""
    plan(run, 9)
    values = {number: 0.9 - number / 100 for number in range(9)}
    while (claim := run.claim()) is not None:
        if claim.number < 3 and claim.epoch == 1:
            run.fail(claim, "loss is nan after epoch 2")
        else:
            train(run, claim, values[claim.number])
    assert run.finished
    ended = states(study)
    assert [ended[number] for number in range(4)] == [*[("FAIL", 1)] * 3, ("COMPLETE", 9)]


def test_a_point_that_is_planned_no_more_takes_no_place(study: Study) -> None:
    with grid_run(study, pruner=ASHA) as run:
        plan(run, 3)
        for value in (0.1, 0.2, 0.9):
            train(run, claim_one(run), value)
    with grid_run(study, pruner=ASHA) as run:
        plan(run, 2)
        while (claim := run.claim()) is not None:
            train(run, claim, 0.2)
        assert run.finished
    assert states(study) == {0: ("PRUNED", 1), 1: ("COMPLETE", 9), 2: ("WAITING", 3)}


def test_at_the_end_the_brackets_train_side_by_side(study: Study) -> None:
    pruner = PromotingHalving.hyperband(maximize=True, study_name="s", min_epochs=1, max_epochs=9, reduction_factor=3)
    count = 6
    with grid_run(study, pruner=pruner) as run:
        plan(run, count)
        started, at_a_time = 0, []
        while (claim := run.claim()) is not None:
            started += claim.epoch == 0
            if started < count or claim.epoch == 0:
                train(run, claim, -claim.number / 100)
            else:
                at_a_time.append(claim)
        brackets = [pruner.bracket(claim.number) for claim in at_a_time]
        assert len(brackets) == len(set(brackets)) > 1
        assert not run.finished
        for claim in at_a_time:
            train(run, claim, -claim.number / 100)
        while (claim := run.claim()) is not None:
            train(run, claim, -claim.number / 100)
        assert run.finished


@pytest.mark.parametrize("later", [{"min_epochs": 2}, {"reduction_factor": 2}, {"brackets": 2}])
def test_trials_that_wait_do_so_under_other_options(study: Study, later: dict[str, Any]) -> None:
    with grid_run(study, pruner=ASHA) as run:
        plan(run, 6)
        for value in (0.1, 0.2):
            assert train(run, claim_one(run), value) is Decision.WAIT
    with grid_run(study, pruner=replace(ASHA, **later)) as run:
        plan(run, 6)
        claim = claim_one(run)
        assert claim.number in ({2} if later != {"reduction_factor": 2} else {1}), "a new one, or the best of two"


def test_a_trial_that_ends_at_its_rung_is_of_the_run_that_trained_it(database: Database) -> None:
    study = open_s(database)
    with grid_run(study, pruner=ASHA) as first:
        plan(first, 2)
        for value in (0.1, 0.2):
            train(first, claim_one(first), value)
    with grid_run(study, pruner=ASHA) as second:
        plan(second, 2)
        while (claim := second.claim()) is not None:
            train(second, claim, 0.2)
        assert states(study)[0] == ("PRUNED", 1)
        assert sql(database, "SELECT run FROM hpo_trials ORDER BY trial") == [(first.run_id,), (second.run_id,)]


def test_a_retried_trial_does_not_wait_where_it_waited_before(study: Study) -> None:
    with grid_run(study, pruner=ASHA) as run:
        plan(run, 1)
        assert train(run, claim_one(run), 0.5) is Decision.WAIT
    with grid_run(study) as run:  # without promotion
        plan(run, 1)
        run.fail(claim_one(run), "no room")
    retry_trials(study, [0], resume=True)
    with grid_run(study, pruner=ASHA) as run:
        plan(run, 3)
        assert (claim_one(run).number, study.trials()[0].state.name) == (0, "RUNNING")


def test_an_enqueued_trial_starts_before_the_best_one_is_forced_on(study: Study, run: Run) -> None:
    plan(run, 1)
    assert train(run, claim_one(run), 0.5) is Decision.WAIT
    study.optuna_study.enqueue_trial({"x": 7})
    claim = claim_one(run)
    assert (claim.params, claim.epoch) == ({"x": 7}, 0)


# --- successive halving that stops


@pytest.fixture
def stopping(study: Study) -> Iterator[Run]:
    with grid_run(study, pruner=STOPPING) as opened:
        yield opened


def test_one_at_a_time_the_best_of_the_first_trials_trains_on(stopping: Run, study: Study) -> None:
    """Not the very first one, which has nothing to compare with, for a whole training."""
    order = search(stopping, study, 5, {0: 0.3, 1: 0.8, 2: 0.5, 3: 0.9, 4: 0.6})
    assert order == [(0, 0), (1, 0), (2, 0), (1, 1), (3, 0), (4, 0)]
    assert states(study) == {
        0: ("PRUNED", 1),  # it waited until no other trial came
        1: ("COMPLETE", 9),
        2: ("PRUNED", 1),
        3: ("COMPLETE", 9),
        4: ("PRUNED", 1),
    }
    assert stopping.take_stopped() == {0: 1}


def test_one_at_a_time_the_third_trial_trains_on_if_it_is_the_best(stopping: Run, study: Study) -> None:
    assert search(stopping, study, 4, {0: 0.3, 1: 0.2, 2: 0.5, 3: 0.1}) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert states(study) == {0: ("PRUNED", 1), 1: ("PRUNED", 1), 2: ("COMPLETE", 9), 3: ("PRUNED", 1)}


def test_next_to_another_trial_the_first_one_does_not_wait(stopping: Run) -> None:
    plan(stopping, 3)
    first, second = claim_one(stopping), claim_one(stopping)
    assert stopping.decide(first, 1, {"m": 0.1}, 0.1) is Decision.CONTINUE
    stopping.release(second)
    assert stopping.decide(first, 2, {"m": 0.1}, 0.1) is Decision.CONTINUE
    assert stopping.decide(first, 3, {"m": 0.1}, 0.1) is Decision.CONTINUE, "only at the lowest rung"


def test_a_trial_of_another_study_is_no_other_trial(database: Database, stopping: Run) -> None:
    plan(stopping, 3)
    with grid_run(
        open_study(database, "other", direction="maximize", fingerprint="f", settings={"metric": "m"})
    ) as elsewhere:
        plan(elsewhere, 1)
        claim_one(elsewhere)
        assert train(stopping, claim_one(stopping), 0.1) is Decision.WAIT


def test_a_single_trial_trains_to_its_end(stopping: Run, study: Study) -> None:
    assert search(stopping, study, 1, {0: 0.3}) == [(0, 0), (0, 1)]
    assert states(study) == {0: ("COMPLETE", 9)}


def test_a_trial_without_its_checkpoint_does_not_wait_again(stopping: Run) -> None:
    """It trains the epochs before once more, with other values."""
    plan(stopping, 1)
    train(stopping, claim_one(stopping), 0.5)
    claim = claim_one(stopping)
    assert (claim.number, claim.epoch) == (0, 1)
    assert stopping.decide(claim, 1, {"m": 0.4}, 0.4) is Decision.CONTINUE
    assert stopping.decide(claim, 2, {"m": 0.4}, 0.4) is Decision.CONTINUE


def test_a_trial_that_failed_is_nothing_to_compare_with(stopping: Run) -> None:
    plan(stopping, 1)
    train(stopping, claim_one(stopping), 0.1)
    stopping.fail(claim_one(stopping), "no")
    plan(stopping, 9)
    assert train(stopping, claim_one(stopping), 0.2) is Decision.WAIT
    assert train(stopping, claim_one(stopping), 0.3) is Decision.WAIT, "the second of two, and the failed one"


@pytest.mark.parametrize("pruner", [ASHA, STOPPING])
def test_a_worker_that_dies_before_it_has_saved_does_not_lose_the_decision(study: Study, pruner: Any) -> None:
    with grid_run(study, pruner=pruner) as run:
        plan(run, 2)
        claim = claim_one(run)
        assert run.decide(claim, 1, {"m": 0.5}, 0.5) is Decision.WAIT
        run.record_crash(claim)
        assert run.decide(claim, 1, {"m": 0.5}, 0.5) is Decision.WAIT, "trained again by another worker"


def test_a_repeated_decision_that_a_trial_trains_on_replaces_the_first_one(
    study: Study, stopping: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer of the transaction that lets it wait is lost. Before it is repeated, another run claims a trial."""
    plan(stopping, 3)
    claim, write = claim_one(stopping), reporting.write
    with grid_run(study, pruner=STOPPING) as other:
        plan(other, 3)

        def lose_the_answer(*args: Any, **options: Any) -> Any:
            write(*args, **options)
            monkeypatch.setattr(reporting, "write", write)
            assert claim_one(other).number == 1
            # Transient on both storages.
            raise DBAPIError("COMMIT", {}, sqlite3.OperationalError("database is locked"))

        monkeypatch.setattr(reporting, "write", lose_the_answer)
        assert stopping.decide(claim, 1, {"m": 0.5}, 0.5) is Decision.CONTINUE
    assert sql(study.database, "SELECT trial FROM hpo_rungs WHERE pool LIKE '%waiting'") == []


def test_without_new_trials_the_best_that_waits_trains_on(stopping: Run, study: Study) -> None:
    plan(stopping, 9)
    for value in (0.1, 0.2):
        assert train(stopping, claim_one(stopping), value) is Decision.WAIT
    claim = stopping.claim(new=False)
    assert claim is not None
    assert (claim.number, claim.epoch) == (1, 1)
    train(stopping, claim, 0.2)
    assert stopping.claim(new=False) is None
    assert states(study) == {0: ("PRUNED", 1), 1: ("COMPLETE", 9)}


@pytest.mark.exhaustive(on="postgresql")
def test_the_first_of_each_bracket_wait(study: Study) -> None:
    pruner = StoppingHalving.hyperband(maximize=True, study_name="s", min_epochs=1, max_epochs=9, reduction_factor=3)
    with grid_run(study, pruner=pruner) as run:
        search(run, study, MANY, {number: number / 100 for number in range(MANY)})
    ended = states(study)
    first = [next(number for number in ended if pruner.bracket(number) == bracket) for bracket in range(3)]
    # The lowest rung of the last bracket is the last epoch.
    assert [ended[number] for number in first] == [("PRUNED", 1), ("PRUNED", 3), ("COMPLETE", 9)]
    assert ended[MANY - 1] == ("COMPLETE", 9)
