"""A trial that continues another one names it from its creation on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution

from storage.continuations import CONTINUATION, settle_continuation
from storage.database import Database
from storage.parents import Parent, continued_trials, unfinished_children
from storage.records import CONTINUED_FROM
from storage.study import TOTAL, Study
from tests.storage.builders import GRID, POINTS, claim_one, config_key, grid_run, kill, open_s, sampled_run

RANGES = {"x": FloatDistribution(0, 1), "n": IntDistribution(1, 3)}

PARENT = Parent("grid@1", 3, "0123456789ab", 4, "grid-0123456789ab", "key")


def test_a_parent_is_read_as_it_was_stored() -> None:
    assert Parent.read(PARENT.attribute) == PARENT
    assert str(PARENT) == "grid@1 #3"


@pytest.mark.parametrize(
    "stored",
    [None, "grid", [], {}, *({**PARENT.attribute, name: None} for name in PARENT.attribute), {"trial": True}],
)
def test_what_another_program_has_made_of_it_is_no_parent(stored: Any) -> None:
    assert Parent.read(stored) is None


def attrs_of(point: dict[str, Any], parent: Parent = PARENT) -> dict[str, dict[str, Any]]:
    return {config_key(point): {CONTINUED_FROM: parent.attribute}}


def test_the_parent_is_stored_with_the_trial_and_every_claim_knows_it(study: Study) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID, attrs_of(POINTS[1]))
        first, second = claim_one(run), claim_one(run)
        assert (first.continued_from, second.continued_from) == (None, PARENT.attribute)
        assert [trial.user_attrs for trial in study.trials()] == [{}, {CONTINUED_FROM: PARENT.attribute}]
        run.complete(first, 0.5)
        run.flush()
        kill(run)
        with grid_run(study) as other:
            claim = claim_one(other)
            assert (claim.number, claim.continued_from) == (second.number, PARENT.attribute)


def test_points_come_before_draws_and_count_in_the_budget(study: Study) -> None:
    points = [{"x": 0.5, "n": 2}, {"x": 0.25, "n": 1}]
    study.optuna_study.sampler = optuna.samplers.RandomSampler(seed=0)
    with sampled_run(study, max_trials=3) as run:
        run.enqueue(points, RANGES, attrs_of(points[0]))
        claims = [claim_one(run) for _ in range(3)]
        assert run.claim() is None
    assert [claim.params for claim in claims[:2]] == points
    assert claims[2].params not in points
    assert [claim.continued_from is not None for claim in claims] == [True, False, False]
    with sampled_run(study, max_trials=4) as run:
        run.enqueue(points, RANGES, attrs_of(points[0]))
        assert [claim_one(run).number for _ in range(4)] == [0, 1, 2, 3], "none is created again"


def test_more_points_than_the_budget_allows_are_left(study: Study) -> None:
    with sampled_run(study, max_trials=1) as run:
        run.enqueue([{"x": 0.5, "n": 2}, {"x": 0.25, "n": 1}], RANGES)
        run.complete(claim_one(run), 0.5)
        assert run.claim() is None
        assert run.finished


def test_a_parent_is_needed_until_the_trial_that_continues_it_has_ended(study: Study, database: Database) -> None:
    assert study.identity is not None
    own, foreign = replace(PARENT, identity=study.identity), replace(PARENT, number=4)
    child = open_s(database, "g")
    with grid_run(child) as run:
        run.enqueue(POINTS[:2], GRID, attrs_of(POINTS[0], own) | attrs_of(POINTS[1], foreign))
        claim = claim_one(run)
        claim_one(run)
        assert continued_trials(database) == {study.identity: {3: "s@2"}, PARENT.identity: {4: "s@2"}}
        assert unfinished_children(child) == {0: own, 1: foreign}
        assert unfinished_children(study) == {}
        run.release(claim)
        assert continued_trials(database)[study.identity] == {3: "s@2"}
        run.complete(claim_one(run), 0.5)
        run.flush()
        assert continued_trials(database) == {PARENT.identity: {4: "s@2"}}


def test_a_parent_that_a_search_has_chosen_is_needed_until_it_has_its_trials(study: Study, database: Database) -> None:
    chosen = [{"parent": replace(PARENT, number=number).attribute, "horizon": number == 5} for number in (3, 4, 5)]
    settle_continuation(study, None, {"options": {}, "chosen": [*chosen, {}, None], "left": chosen})
    assert continued_trials(database) == {PARENT.identity: {3: "s", 4: "s"}}
    with grid_run(study) as run:
        run.enqueue(POINTS[:1], GRID, attrs_of(POINTS[0]))
        run.complete(claim_one(run), 0.5)
    assert continued_trials(database) == {PARENT.identity: {4: "s"}}, "the other one has its trial"
    study.optuna_study.set_user_attr(TOTAL, 1)
    assert continued_trials(database) == {}, "it is finished"


@pytest.mark.parametrize("stored", [None, [], "all", {"chosen": None}, {"chosen": [1]}])
def test_a_decision_that_another_program_has_changed_needs_nothing(
    study: Study, database: Database, stored: Any
) -> None:
    study.optuna_study.set_user_attr(CONTINUATION, stored)
    assert continued_trials(database) == {}


def test_a_parent_is_needed_by_a_trial_that_failed(study: Study, database: Database) -> None:
    """`hpo retry` starts it from the parent again. One that was trained from the start does not."""
    with grid_run(study) as run:
        started = replace(PARENT, number=4, epoch=0)
        run.enqueue(POINTS[:2], GRID, attrs_of(POINTS[0]) | attrs_of(POINTS[1], started))
        for _ in range(2):
            run.fail(claim_one(run), "a bug")
        run.flush()
    assert continued_trials(database) == {PARENT.identity: {3: "s"}}
