"""Which trial a claim returns: released ones, those of dead runs, grid points and drawn points."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from storage import lease, optuna_tables, ownership, queue, records
from storage.database import Database
from storage.ownership import LostTrialError
from storage.retry import retry_trials
from storage.study import Study
from tests.factories import trial_states
from tests.storage.builders import (
    GRID,
    POINTS,
    allow_takeovers,
    claim_one,
    claim_point,
    config_key,
    expire_leases,
    grid_run,
    kill,
    sampled_run,
    sql,
)

# --- grids


def test_a_grid_enqueued_again_or_extended_adds_only_missing_points(study: Study) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS[:3], GRID)
        first = [run.claim(), run.claim()]
        run.enqueue(POINTS, GRID)
        rest = [run.claim(), run.claim(), run.claim()]
    assert [claim and claim.params for claim in [*first, *rest]] == [*POINTS, None]
    assert [trial.params for trial in study.trials()] == POINTS


def test_a_point_whose_creator_died_before_registering_it_is_run_once(study: Study, database: Database) -> None:
    """As version 2 could leave it."""
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        run.claim()
    with database.engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM hpo_trials"))
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claims = [run.claim() for _ in range(5)]
    assert [claim and claim.params for claim in claims] == [*POINTS, None]
    assert len(study.trials()) == len(sql(database, "SELECT * FROM hpo_trials")) == 4


def test_enqueue_creates_no_trials(study: Study) -> None:
    values = list(range(20_000))
    with grid_run(study) as run:
        run.enqueue([{"a": a} for a in values], {"a": CategoricalDistribution(values)})
        assert study.trials() == []
        assert claim_one(run).params == {"a": 0}


@pytest.mark.parametrize(("at_a_time", "locks"), [(128, 1), (5, 2), (1, 7)])
def test_a_claim_skips_all_points_that_others_have_taken_in_one_transaction(
    study: Study, monkeypatch: pytest.MonkeyPatch, at_a_time: int, locks: int
) -> None:
    """Otherwise each of n runs asks for each point, and the one that is last starves."""
    monkeypatch.setattr(queue, "POINTS_AT_A_TIME", at_a_time)
    values = list(range(12))
    lock, locked = ownership.lock_study, []

    def count(*arguments: Any) -> None:
        locked.append(arguments)
        lock(*arguments)

    with grid_run(study) as one, grid_run(study) as other:
        for run in (one, other):
            run.enqueue([{"a": a} for a in values], {"a": CategoricalDistribution(values)})
        assert claim_one(other).params == {"a": 0}
        taken = [claim_one(one).params["a"] for _ in range(6)]
        monkeypatch.setattr(ownership, "lock_study", count)
        assert claim_one(other).params == {"a": 7}
        assert len(locked) == locks
        monkeypatch.setattr(ownership, "lock_study", lock)
        rest = [claim_one(other).params["a"], claim_one(one).params["a"]]
        rest += [run.params["a"] for run in iter(one.claim, None)]
        assert other.claim() is None
    assert taken + rest == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]


def forget_trials(database: Database, first: int) -> None:
    """Leave the trials as a copy has them that was made before the trial `first` was created."""
    trial = optuna_tables.trials
    lost = sa.select(trial.c.trial_id).where(trial.c.number >= first)
    with database.engine.begin() as connection:
        for table in (
            optuna_tables.intermediate_values,
            optuna_tables.trial_values,
            optuna_tables.trial_params,
            optuna_tables.trial_user_attributes,
            optuna_tables.trial_system_attributes,
        ):
            connection.execute(table.delete().where(table.c.trial_id.in_(lost)))
        connection.execute(trial.delete().where(trial.c.number >= first))


def test_a_grid_is_not_finished_before_points_that_an_older_copy_lacks_have_run(
    study: Study, database: Database
) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        for claim in [claim_one(run) for _ in range(3)]:
            run.complete(claim, 0.5)
        run.flush()
        forget_trials(database, 1)
        for claim in [claim_one(run) for _ in range(3)]:
            run.complete(claim, 0.5)
        run.flush()
        assert run.claim() is None
        assert run.finished
    assert [trial.params for trial in study.trials()] == [POINTS[0], POINTS[3], POINTS[1], POINTS[2]]
    assert trial_states(study) == ["COMPLETE"] * 4


# --- trials of other runs


def test_a_trial_of_a_dead_run_resumes_after_its_last_epoch(study: Study) -> None:
    dead = grid_run(study).__enter__()
    dead.enqueue(POINTS[:2], GRID)
    done, unfinished = claim_one(dead), claim_one(dead)
    dead.report(done, 1, {"m": 0.9}, 0.9)
    dead.complete(done, 0.9)
    dead.report(unfinished, 1, {"m": 0.1}, 0.1)
    dead.flush()
    kill(dead)
    assert trial_states(study) == ["COMPLETE", "RUNNING"]
    with grid_run(study) as run:
        claim = claim_one(run)
        assert (claim.number, claim.params, claim.epoch, claim.values) == (1, POINTS[1], 1, {1: 0.1})
        run.complete(claim, 0.1)
        assert run.claim() is None
        assert run.finished
    assert trial_states(study) == ["COMPLETE", "COMPLETE"]


def test_a_trial_of_a_living_run_is_not_taken(study: Study) -> None:
    with grid_run(study) as one, grid_run(study) as two:
        claim = claim_point(one)
        assert two.claim() is None
        assert not two.finished
        one.complete(claim, 0.5)
        one.flush()
        assert two.claim() is None
        assert two.finished


def test_a_run_whose_lease_expired_loses_its_trial(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with grid_run(study) as run:
        monkeypatch.setattr(lease, "host_id", lambda: "another machine")
        with grid_run(study) as far:
            monkeypatch.undo()
            claim = claim_point(far)
            assert run.claim() is None, "its lease holds"
            allow_takeovers(database)
            expire_leases(database, far.run_id)
            assert run.claim() is None, "it has been seen a moment ago"
            monkeypatch.setattr(queue, "SILENT_SHARE", 0.0)
            taken = claim_one(run)
            assert taken.number == claim.number
            far.report(claim, 1, {"m": 0.1}, 0.1)  # it has not yet noticed
            far.flush()
            with pytest.raises(LostTrialError, match="trial 0 was taken over by another run"):
                far.report(claim, 2, {"m": 0.1}, 0.1)
            with pytest.raises(LostTrialError):
                far.decide(claim, 2, {"m": 0.1}, 0.1)
            with pytest.raises(LostTrialError):
                far.complete(claim, 0.1)
            far.release(claim)
            assert trial_states(study) == ["RUNNING"]
            run.report(taken, 1, {"m": 0.2}, 0.2)
            run.complete(taken, 0.2)
    trial = study.trials()[0]
    assert (trial.state.name, trial.value, trial.intermediate_values) == ("COMPLETE", 0.2, {1: 0.2})


def test_while_a_run_does_not_look_others_do_not_become_silent(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    row = SimpleNamespace(host="elsewhere", owner=7, last_heard=1.0)
    with grid_run(study, lease_seconds=60.0) as run:
        times = iter([0.0, 1000.0, 1005.0, 1010.0, 1011.0, 1012.0])  # the database was away before the second look
        monkeypatch.setattr(queue, "time", SimpleNamespace(monotonic=lambda: next(times)))
        assert [run._queue._is_dead(row) for _ in range(5)] == [False, False, False, None, None]
        row.last_heard = 2.0
        assert run._queue._is_dead(row) is False


def test_interrupted_trials_are_claimed_before_those_without_a_report(study: Study) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claims = [claim_one(run), claim_one(run)]
        run.report(claims[1], 1, {"m": 0.1}, 0.1)
        for claim in claims:
            run.release(claim)
        assert claim_one(run).number == 1


def test_a_trial_taken_over_can_be_claimed_again_by_its_first_owner(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with grid_run(study) as run:
        with monkeypatch.context() as patch:
            patch.setattr(lease, "host_id", lambda: "another machine")
            far = grid_run(study).__enter__()
        stale = claim_point(far)
        allow_takeovers(database)
        assert run.claim() is None
        expire_leases(database, far.run_id)
        monkeypatch.setattr(queue, "SILENT_SHARE", 0.0)
        run.release(claim_one(run))
        claim = claim_one(far)
        assert claim.number == stale.number
        assert 0 < stale.claimed_milliseconds < claim.claimed_milliseconds, "names of objects in a bucket have it"
        far.report(stale, 1, {"m": 0.5}, 0.5)
        far.flush()
        with pytest.raises(LostTrialError):
            far.complete(stale, 0.5)
        far.complete(claim, 0.25)
        far.__exit__(None, None, None)
    assert [trial.value for trial in study.trials()] == [0.25]


# --- drawn trials


@pytest.mark.parametrize("learns", [True, False])
def test_an_empty_trial_of_a_run_that_died_in_a_claim_is_drawn(study: Study, learns: bool) -> None:
    with sampled_run(study, max_trials=2, learns=learns) as run:
        study.optuna_study.ask()  # an empty RUNNING trial without an owner
        claims = [claim_one(run), claim_one(run)]
        assert run.claim() is None
    assert [claim.number for claim in claims] == [0, 1]
    assert all(set(claim.params) == {"x", "n"} for claim in claims)


def test_a_trial_whose_creator_died_while_drawing_gets_its_missing_params(study: Study) -> None:
    partial = study.optuna_study.ask()
    partial.suggest_float("x", 0, 1)  # and kill -9 before "n"
    with sampled_run(study, max_trials=1) as run:
        claim = claim_one(run)
    assert claim.number == partial.number
    assert claim.params["x"] == partial.params["x"]
    assert claim.params["n"] in {1, 2, 3}


@pytest.mark.parametrize("learns", [True, False])
def test_runs_share_the_budget_of_trials(study: Study, learns: bool) -> None:
    def budgeted_run() -> Any:
        return sampled_run(study, max_trials=5, learns=learns)

    with budgeted_run() as one, budgeted_run() as two:
        claims = [run.claim() for _ in range(4) for run in (one, two)]
    keys = [config_key(claim.params) for claim in claims if claim is not None]
    assert len(keys) == len(set(keys)) == 5


def test_a_reduced_budget_counts_for_trials_that_wait(study: Study) -> None:
    with sampled_run(study, max_trials=6) as run:
        claims = [claim_one(run) for _ in range(6)]
        run.complete(claims[0], 0.5)
        for claim in claims[2:]:
            run.release(claim)
        run.fail(claims[1], "an error")
        run.flush()
    assert trial_states(study) == ["COMPLETE", "FAIL", "WAITING", "WAITING", "WAITING", "WAITING"]
    with sampled_run(study, max_trials=3) as run:
        assert claim_one(run).number == 2
        assert run.claim() is None
        assert run.finished
    retry_trials(study, [1], resume=False)
    with sampled_run(study, max_trials=1) as run:
        claim = claim_one(run)
        assert claim.number == 1, "what was let run again runs in any case"
        assert run.claim() is None
        run.complete(claim, 0.5)
        assert run.claim() is None
        assert run.finished
    with sampled_run(study, max_trials=6) as run:
        assert len({claim_one(run).number for _ in range(4)}) == 4, "a larger budget resumes the others"


def test_a_reduced_grid_counts_for_trials_that_wait(study: Study) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        for claim in [claim_one(run) for _ in range(4)]:
            run.release(claim)
    with grid_run(study) as run:
        run.enqueue(POINTS[1:2], GRID)
        claim = claim_one(run)
        assert claim.params == POINTS[1]
        run.complete(claim, 0.5)
        assert run.claim() is None
        assert run.finished
    assert trial_states(study) == ["WAITING", "COMPLETE", "WAITING", "WAITING"]
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        assert len({claim_one(run).number for _ in range(3)}) == 3, "a larger grid resumes the others"


def test_a_trial_outside_of_the_grid_runs_if_a_user_wants_it(study: Study) -> None:
    """It was enqueued through Optuna, with or without its own params, or retried."""
    study.optuna_study.enqueue_trial(POINTS[0])
    study.optuna_study.add_trial(
        optuna.create_trial(state=TrialState.WAITING, params=POINTS[1], distributions=dict(GRID))
    )
    for resumes in (False, True):
        with grid_run(study) as run:
            run.enqueue(POINTS[2:], GRID)
            wanted = [claim_one(run) for _ in range(2)]
            assert sorted(each.params["b"] for each in wanted if each.params["a"] == 1) == ["x", "y"]
            if resumes:
                run.fail(wanted[0], "an error")
                run.complete(wanted[1], 0.5)
            else:
                for each in wanted:
                    run.release(each)
    retry_trials(study, [wanted[0].number])
    with grid_run(study) as run:
        run.enqueue(POINTS[2:3], GRID)
        assert {claim_one(run).number for _ in range(2)} >= {wanted[0].number}


def test_a_configuration_is_claimed_once_and_an_exhausted_space_ends(study: Study) -> None:
    study.optuna_study.sampler = optuna.samplers.RandomSampler(seed=0)

    def draw(trial: optuna.Trial) -> str:
        trial.suggest_int("n", 1, 3)
        return ""

    with sampled_run(study, draw, max_trials=50) as run:
        claimed = []
        while (claim := run.claim()) is not None:
            claimed.append(claim.params["n"])
            run.complete(claim, 0.5)
        assert run.finished
        assert run.exhausted == "20 draws in a row were duplicates of earlier trials"
    assert sorted(claimed) == [1, 2, 3]
    assert trial_states(study) == ["COMPLETE"] * 3, "duplicates never become trials"


class SameSampler(optuna.samplers.RandomSampler):
    def sample_independent(self, *_: Any) -> int:
        return 3


def draw_to_three(trial: optuna.Trial) -> str:
    trial.suggest_int("n", 1, 3)
    return ""


def points_to_three() -> list[dict[str, Any]]:
    return [{"n": 1}, {"n": 2}, {"n": 3}]


def test_without_distributions_an_unknown_configuration_is_drawn_at_random(study: Study) -> None:
    study.optuna_study.sampler = SameSampler()
    with sampled_run(study, draw_to_three, list_points=points_to_three) as run:
        assert claim_one(run).params == {"n": 3}
        assert claim_one(run).params["n"] in {1, 2}


@pytest.mark.parametrize(("max_trials", "found"), [(50, 3), (2, 2)])
def test_where_a_sampler_draws_known_configurations_only_others_get_trials(
    study: Study, max_trials: int, found: int
) -> None:
    distributions: dict[str, BaseDistribution] = {"n": IntDistribution(1, 3)}
    study.optuna_study.sampler = same = SameSampler()
    with sampled_run(study, draw_to_three, max_trials=max_trials, list_points=points_to_three) as run:
        run.enqueue([], distributions)
        claimed = []
        while (claim := run.claim()) is not None:
            claimed.append(claim.params["n"])
            run.complete(claim, 0.5)
        assert run.finished
        assert run.exhausted == ("all 3 configurations of the space have a trial" if max_trials == 50 else "")
    assert claimed[0] == 3
    assert len(set(claimed)) == len(claimed) == found
    assert study.optuna_study.sampler is same
    assert all(trial.distributions == distributions for trial in study.trials())


def draw_conditionally(trial: optuna.Trial) -> str:
    """`m` is active if `kind` is "a". Values below one half are rejected."""
    if trial.suggest_categorical("kind", ["a", "b"]) == "a":
        return "" if trial.suggest_float("m", 0, 1) >= 0.5 else "m >= 0.5"
    return ""


def test_a_draw_that_breaks_a_constraint_is_never_claimed_and_not_counted(study: Study) -> None:
    study.optuna_study.sampler = optuna.samplers.RandomSampler(seed=1)
    with sampled_run(study, draw_conditionally, max_trials=8) as run:
        claimed = []
        while (claim := run.claim()) is not None:
            claimed.append(claim.params)
            run.complete(claim, 0.5)
    assert all(params["kind"] == "b" or params["m"] >= 0.5 for params in claimed)
    assert {"kind": "b"} in claimed, "inactive params are absent"
    assert trial_states(study) == ["COMPLETE"] * len(claimed), "rejected draws never become trials"
    assert len(claimed) == 8


def test_partial_trials_are_completed_and_checked_against_the_constraints(study: Study) -> None:
    kind, m = CategoricalDistribution(["a", "b"]), FloatDistribution(0, 1)
    study.optuna_study.enqueue_trial({"kind": "a", "m": 0.25})
    study.optuna_study.ask({"kind": kind, "m": m})  # complete, but breaks the constraint
    study.optuna_study.enqueue_trial({"kind": "a", "m": 0.75})
    study.optuna_study.ask({"kind": kind, "m": m})  # complete
    study.optuna_study.enqueue_trial({"kind": "b"})
    study.optuna_study.ask({"kind": kind})  # complete: `m` is inactive
    study.optuna_study.enqueue_trial({"kind": "a", "m": 0.5})
    study.optuna_study.ask({"kind": kind})  # and kill -9 before `m`
    with sampled_run(study, draw_conditionally, max_trials=3) as run:
        claims = [run.claim() for _ in range(4)]
    assert [claim and (claim.number, claim.params) for claim in claims] == [
        (1, {"kind": "a", "m": 0.75}),
        (2, {"kind": "b"}),
        (3, {"kind": "a", "m": 0.5}),
        None,
    ]
    assert study.trials()[0].user_attrs["fail_reason"] == "breaks a constraint"


def test_a_sampler_that_repeats_a_rejected_point_does_not_end_the_search(study: Study) -> None:
    asked = 0

    class Stubborn(optuna.samplers.RandomSampler):
        def sample_independent(self, *_: Any) -> float:
            nonlocal asked
            asked += 1
            return 0.25

    study.optuna_study.sampler = Stubborn()

    def draw(trial: optuna.Trial) -> str:
        return "" if trial.suggest_float("m", 0, 1) > 0.5 else "m > 0.5"

    with sampled_run(study, draw, max_trials=3) as run:
        drawn = [claim_one(run).params["m"] for _ in range(3)]
    assert all(m > 0.5 for m in drawn)
    assert len(set(drawn)) == 3
    assert isinstance(study.optuna_study.sampler, Stubborn)
    assert asked == 3 * queue.RANDOM_AFTER_DRAWS


def test_a_space_that_rejects_every_draw_ends_the_search(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "MAX_REJECTED_DRAWS", 7)
    drawn = 0

    def reject(_: optuna.Trial) -> str:
        nonlocal drawn
        drawn += 1
        return "never"

    with sampled_run(study, reject) as run:
        assert run.claim() is None
        assert run.finished
        assert run.exhausted == "7 draws in a row broke a constraint, most often never"
        assert run.claim() is None
        assert drawn == 7, "an exhausted space is not drawn from again"
    assert study.trials() == []


@pytest.mark.parametrize("sampler", [optuna.samplers.RandomSampler(seed=0), optuna.samplers.TPESampler(seed=0)])
def test_a_constraint_that_few_draws_meet_does_not_end_the_search(
    study: Study, sampler: optuna.samplers.BaseSampler
) -> None:
    study.optuna_study.sampler = sampler

    def draw(trial: optuna.Trial) -> str:
        return "" if trial.suggest_float("m", 0, 1) < 0.002 else "m < 0.002"

    with sampled_run(study, draw, max_trials=6) as run:
        for _ in range(6):
            run.complete(claim_one(run), 1.0)
        assert not run.exhausted


def test_a_run_that_draws_for_long_sees_that_others_have_used_the_budget(study: Study) -> None:
    drawn = 0

    def reject(_: optuna.Trial) -> str:
        nonlocal drawn
        drawn += 1
        if drawn == 50:
            claim_one(first)
        return "never"

    with (
        sampled_run(study, lambda _: "", max_trials=1) as first,
        sampled_run(study, reject, max_trials=1) as run,
    ):
        assert run.claim() is None
        assert not run.exhausted
    assert drawn == queue.DRAWS_PER_LOOK


def test_a_trial_enqueued_through_optuna_is_claimed(study: Study) -> None:
    study.optuna_study.enqueue_trial({"x": 0.25, "n": 2})
    with sampled_run(study, max_trials=1) as run:
        assert claim_one(run).params == {"x": 0.25, "n": 2}


@pytest.mark.filterwarnings("ignore:Fixed parameter")
@pytest.mark.parametrize("params", [{"x": "one half"}, {"x": None}, {"n": math.inf}])
def test_an_enqueued_trial_with_a_value_outside_the_space_fails_alone(
    study: Study, database: Database, params: dict[str, Any]
) -> None:
    if params == {"n": math.inf} and database.engine.dialect.name == "postgresql":
        pytest.skip("PostgreSQL's JSON has no infinity")
    study.optuna_study.enqueue_trial(params)
    with sampled_run(study, max_trials=2) as run:
        claims = [claim_one(run) for _ in range(2)]
        for claim in claims:
            run.complete(claim, 0.5)
        assert run.claim() is None
        assert run.finished
    refused = study.trials()[0]
    assert refused.state.name == "FAIL"
    assert refused.user_attrs["constraint"].startswith("not in the search space: ")


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"n": 2.7}, "n cannot be 2.7"),
        ({"n": 99}, "n cannot be 99"),
        ({"x": 50.0}, "x cannot be 50.0"),
        ({"n": "2"}, "n cannot be '2'"),
    ],
)
def test_an_enqueued_number_outside_the_space_is_refused_like_a_wrong_choice(
    study: Study, params: dict[str, Any], reason: str
) -> None:
    with pytest.warns(match="out of range") if "'" not in reason else contextlib.nullcontext():
        study.optuna_study.enqueue_trial(params)
        with sampled_run(study, max_trials=1) as run:
            claim = claim_one(run)
            assert claim.number == 1
            run.complete(claim, 0.5)
    refused = study.trials()[0]
    assert refused.user_attrs == {
        "fail_reason": "breaks a constraint",
        "constraint": f"not in the search space: {reason}",
    }


@pytest.mark.parametrize("sampled", [False, True])
def test_an_enqueued_trial_is_trained_with_what_the_database_stores(study: Study, *, sampled: bool) -> None:
    study.optuna_study.enqueue_trial({"n": 2.0, "x": 1})
    ranges: dict[str, BaseDistribution] = {"n": IntDistribution(1, 3), "x": FloatDistribution(0, 1)}
    with sampled_run(study) if sampled else grid_run(study) as run:
        if not sampled:
            run.enqueue([{"n": 1, "x": 0.0}], ranges)
        claim = claim_one(run)
        assert repr(sorted(claim.params.items())) == "[('n', 2), ('x', 1.0)]"
        assert study.trials()[0].params == claim.params


def test_a_point_that_is_enqueued_through_optuna_has_the_attributes_of_its_point(study: Study) -> None:
    study.optuna_study.enqueue_trial(POINTS[0])
    with grid_run(study) as run:
        run.enqueue(POINTS[:1], GRID, {config_key(POINTS[0]): {"continued_from": {"number": 3}}})
        claim_one(run)
    assert study.trials()[0].user_attrs["continued_from"] == {"number": 3}


@pytest.fixture
def other(study: Study, database: Database) -> Iterator[optuna.Study]:
    """The same study in another program, which uses Optuna alone."""
    if database.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    url = database.engine.url.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    storage = optuna.storages.RDBStorage(url, engine_kwargs={"poolclass": sa.NullPool})
    yield optuna.load_study(study_name=study.name, storage=storage, sampler=optuna.samplers.RandomSampler(seed=7))
    storage.remove_session()
    storage.engine.dispose()


def test_two_programs_do_not_take_the_same_enqueued_trial(
    study: Study, other: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_key = records.has_key
    for _ in range(2):
        other.enqueue_trial({})
    asked: list[int] = []
    thread = threading.Thread(target=lambda: asked.append(other.ask().number))

    def ask_meanwhile(*arguments: Any) -> bool:
        if not thread.ident:
            thread.start()
            thread.join(1.0)
            assert thread.is_alive(), "it waits for the trial that is claimed"
        return has_key(*arguments)

    monkeypatch.setattr(records, "has_key", ask_meanwhile)
    with sampled_run(study, max_trials=3) as run:
        claim = claim_one(run)
    thread.join(60)
    assert asked == [1 - claim.number]


def test_a_trial_that_another_program_ends_meanwhile_stays_ended(
    study: Study, other: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners = ownership.owners
    trial = other.ask({"x": FloatDistribution(0, 1), "n": IntDistribution(1, 3)})
    told: list[bool] = []

    def tell_meanwhile(*arguments: Any) -> Any:
        if not told:
            told.append(True)
            other.tell(trial, 0.75)
        return owners(*arguments)

    monkeypatch.setattr(ownership, "owners", tell_meanwhile)
    with sampled_run(study, max_trials=3) as run:
        assert claim_one(run).number == 1
    assert told
    assert (study.trials()[0].state.name, study.trials()[0].value) == ("COMPLETE", 0.75)


def test_a_point_of_a_grid_that_is_enqueued_through_optuna_is_run_once(study: Study) -> None:
    study.optuna_study.enqueue_trial({"a": 2, "b": "y"})
    study.optuna_study.enqueue_trial({"a": 3, "b": "y"})
    study.optuna_study.enqueue_trial({"a": 2})
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claimed = []
        while (claim := run.claim()) is not None:
            claimed.append((claim.number, claim.params))
            run.complete(claim, 0.5)
        assert run.finished
    assert (0, {"a": 2, "b": "y"}) in claimed
    assert sorted(repr(params) for _, params in claimed) == sorted(map(repr, POINTS))
    assert [trial.user_attrs.get("constraint") for trial in study.trials()[1:3]] == [
        "not in the search space: '3' not in (1, 2).",
        "not in the search space: its parameters are a instead of a, b",
    ]
