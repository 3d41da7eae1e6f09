"""A population: who is replaced, by what, in one transaction."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from storage import reporting
from storage.database import Database, open_database
from storage.ownership import ClaimedTrial
from storage.parents import Parent, continued_trials
from storage.population import Child, Member, PopulationBased
from storage.pruners import Decision
from storage.ranking import superfluous_trials
from storage.records import CONTINUED_FROM, REPLACED_BY, REPLACES
from storage.reporting import TrialUpdate
from storage.run import Run
from storage.study import Study
from storage.summaries import summarize
from tests.storage.builders import claim_one, kill, open_s, sampled_run, sql

DISTRIBUTIONS = {"x": FloatDistribution(0, 100), "n": FloatDistribution(0, 100)}
SIZE, INTERVAL, LAST = 4, 2, 6


@pytest.fixture
def study(url: str) -> Iterator[Study]:
    with open_database(url) as opened:
        yield open_s(opened, total_trials=SIZE)


def draw(trial: Any) -> str:
    trial.suggest_float("x", 0, 100)
    trial.suggest_float("n", 0, 100)
    return ""


def population_of(study: Study, *, maximize: bool = True, quantile: float = 0.25, seed: int = 0) -> PopulationBased:
    def breed(replaces: Mapping[str, Any], better: Member, epoch: int, rng: random.Random) -> Child:
        params = {"x": rng.uniform(0, 100), "n": better.params["n"]}
        parent = Parent(study.name, better.number, study.identity or "", epoch, "files", better.key)
        return Child(f"{better.key}/{replaces}", params, DISTRIBUTIONS, {CONTINUED_FROM: parent.attribute})

    return PopulationBased(maximize, INTERVAL, quantile, seed, breed)


def run_of(study: Study, size: int = SIZE, **options: Any) -> Run:
    return sampled_run(
        study,
        draw,
        max_trials=size,
        pruner=options.pop("pruner", None) or population_of(study, **options),
        takes_turns=True,
    )


def train(run: Run, claim: ClaimedTrial, level: float, to: int = INTERVAL) -> bool:
    """Train a trial to an epoch; return whether it was replaced."""
    epochs = range(claim.epoch + 1, to + 1)
    return any(run.decide(claim, epoch, {"m": level + epoch}, level + epoch) is Decision.END for epoch in epochs)


def trials_of(study: Study) -> dict[int, Any]:
    return {trial.number: trial for trial in study.trials()}


def needed(study: Study) -> set[int]:
    """Return the numbers of the trials whose checkpoints are protected."""
    return set(continued_trials(study.database).get(str(study.identity), {}))


def states(study: Study) -> list[str]:
    return [trial.state.name for trial in study.trials()]


def test_the_worst_member_is_replaced_by_a_trial_that_continues_the_best(study: Study) -> None:
    with run_of(study) as run:
        claims = [claim_one(run) for _ in range(SIZE)]
        assert [train(run, claim, level) for claim, level in zip(claims, [3.0, 9.0, 5.0], strict=False)] == [False] * 3
        assert states(study) == ["RUNNING"] * SIZE
        assert train(run, claims[3], 1.0)
        assert run.replacement(claims[3]) == SIZE
        assert run.replacement(claims[0]) is None
        assert states(study) == ["RUNNING"] * 3 + ["PRUNED", "WAITING"]
        worst, child = trials_of(study)[3], trials_of(study)[4]
        assert worst.value == 1.0 + INTERVAL
        assert worst.user_attrs == {REPLACED_BY: {"trial": 4, "epoch": INTERVAL}}
        parent = Parent.read(child.user_attrs[CONTINUED_FROM])
        assert parent is not None
        assert (parent.number, parent.epoch, parent.identity) == (1, INTERVAL, study.identity)
        assert child.user_attrs[REPLACES] == {"trial": 3, "epoch": INTERVAL}
        assert child.params["n"] == trials_of(study)[1].params["n"]
        assert child.distributions == DISTRIBUTIONS
        rows = sql(study.database, "SELECT run, token, claimed_epoch FROM hpo_trials ORDER BY trial DESC LIMIT 1")
        assert rows == [(None, None, INTERVAL)]
        assert needed(study) == {1}, "its checkpoint is protected"
        claim = claim_one(run)
        assert (claim.number, claim.params, claim.replaces) == (4, child.params, child.user_attrs[REPLACES])
        assert claim.continued_from == parent.attribute


def test_the_member_with_the_lowest_value_is_the_best_where_it_is_minimized(study: Study) -> None:
    with run_of(study, maximize=False) as run:
        claims = [claim_one(run) for _ in range(SIZE)]
        levels = [3.0, 1.0, 5.0, 9.0]
        replaced = [train(run, claim, level) for claim, level in zip(claims, levels, strict=True)]
        assert replaced == [False, False, True, True]
        parents = [Parent.read(trials_of(study)[number].user_attrs[CONTINUED_FROM]) for number in (4, 5)]
        assert [parent.number for parent in parents if parent] == [1, 1]


def test_only_multiples_of_the_interval_are_compared(study: Study) -> None:
    with run_of(study) as run:
        good, bad = claim_one(run), claim_one(run)
        assert not train(run, good, 9.0, to=INTERVAL + 1)
        assert not train(run, bad, 1.0, to=INTERVAL - 1)
        assert train(run, bad, 1.0, to=INTERVAL)


def test_equal_values_replace_nobody(study: Study) -> None:
    with run_of(study) as run:
        assert [train(run, claim_one(run), 5.0) for _ in range(SIZE)] == [False] * SIZE


def test_without_a_better_member_that_trains_nobody_is_replaced(study: Study) -> None:
    """Checkpoints of trials that have ended may be deleted at any time."""
    with run_of(study) as run:
        best, failed, worst = claim_one(run), claim_one(run), claim_one(run)
        assert not train(run, best, 9.0, to=LAST)
        run.complete(best, 9.0 + LAST)
        assert not train(run, failed, 10.0)
        run.fail(failed, "a bug")
        run.flush()
        assert not train(run, worst, 1.0, to=2 * INTERVAL)
        assert states(study) == ["COMPLETE", "FAIL", "RUNNING"]


def test_a_member_that_waits_can_be_copied(study: Study) -> None:
    with run_of(study) as run:
        best, worst = claim_one(run), claim_one(run)
        train(run, best, 9.0)
        run.release(best)
        assert train(run, worst, 1.0)


def test_a_line_is_decided_once_after_each_interval(study: Study) -> None:
    """A child may start from an older checkpoint, and train the epoch again after which its line was decided."""
    with run_of(study, size=2) as run:
        best, worst = claim_one(run), claim_one(run)
        train(run, best, 9.0)
        assert train(run, worst, 1.0)
        child = claim_one(run)
        assert child.replaces == {"trial": worst.number, "epoch": INTERVAL}
        assert not train(run, child, 0.0, to=2 * INTERVAL - 1)
        train(run, best, 9.0, to=2 * INTERVAL)
        assert train(run, child, 0.0, to=2 * INTERVAL)


def test_the_budget_counts_members_not_trials(study: Study) -> None:
    with run_of(study) as run:
        claims = [claim_one(run) for _ in range(SIZE)]
        for claim, level in zip(claims, [9.0, 5.0, 4.0, 1.0], strict=True):
            train(run, claim, level)
        assert states(study).count("PRUNED") == 3, "each found a better one"
        assert study.count_ended_keys() == 0
        lines = [claims[0], *(claim_one(run) for _ in range(3))]
        assert run.claim() is None, "no more members are drawn"
        for line in lines:
            for epoch in range(line.epoch + 1, LAST + 1):
                run.report(line, epoch, {"m": 1.0}, 1.0)
            assert summarize(study.database)[0].state == "running"
            run.complete(line, 1.0)
        run.flush()
        assert study.count_ended_keys() == SIZE
        assert run.claim() is None
        assert run.finished
    assert summarize(study.database)[0].state == "finished"
    assert study.counts() == {"COMPLETE": SIZE, "PRUNED": 3}


def test_new_members_come_first_then_those_with_the_fewest_epochs(study: Study) -> None:
    with run_of(study) as run:
        first = claim_one(run)
        assert run.are_others_behind(INTERVAL, SIZE), "they have not been created"
        train(run, first, 5.0, to=1)
        run.release(first)
        others = [claim_one(run) for _ in range(SIZE - 1)]
        assert [each.number for each in others] == [1, 2, 3], "not the one that waits"
        assert run.are_others_behind(INTERVAL, SIZE)
        assert not run.are_others_behind(1, SIZE), "it has as many epochs"
        for each, epochs in zip(others, [2, 0, 1], strict=True):
            train(run, each, 5.0, to=epochs)
            run.release(each)
        assert [claim_one(run).number for _ in range(SIZE)] == [2, 0, 3, 1]
        assert not run.are_others_behind(LAST, SIZE), "nobody waits"


def test_the_same_member_at_the_same_epoch_gets_the_same_child(database: Database) -> None:
    children = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        study = open_s(database, name)
        with run_of(study, seed=seed) as run:
            claims = [claim_one(run) for _ in range(SIZE)]
            for claim, level in zip(claims, [9.0, 8.0, 7.0, 1.0], strict=True):
                train(run, claim, level)
        children.append([trial.params["x"] for trial in study.trials()[SIZE:]])
    assert children[0] == children[1]
    assert set(children[0]).isdisjoint(children[2])


def test_a_lost_answer_creates_no_second_child(study: Study) -> None:
    with run_of(study) as run:
        best, worst = claim_one(run), claim_one(run)
        train(run, best, 9.0)
        train(run, worst, 1.0, to=INTERVAL - 1)
        run.flush()
        update = TrialUpdate(worst, INTERVAL, {"m": 1.0}, 1.0, decides=True)
        pruned = []
        for _ in range(2):
            written = reporting.write(
                study.database,
                study.key,
                [update],
                pruner=population_of(study),
                ending={(worst.token, TrialState.PRUNED)},
                device_seconds={},
            )
            pruned.append(written.pruned)
        assert pruned == [{worst.token}, {worst.token}]
        assert len(study.trials()) == 3


class ThisError(Exception):
    pass


@pytest.mark.parametrize("step", ["breed", "last"])
def test_a_failure_in_the_middle_leaves_nothing(study: Study, step: str) -> None:
    population = population_of(study)

    def fail(*arguments: Any) -> Child:
        child = population.breed(*arguments)
        if step == "breed":
            raise ThisError
        # The last statement but one: the key of another trial.
        return replace(child, key=sql(study.database, "SELECT key FROM hpo_trials")[0][0])

    with run_of(study) as run:
        best, worst = claim_one(run), claim_one(run)
        train(run, best, 9.0)
        train(run, worst, 1.0, to=INTERVAL - 1)
        run.flush()
        before = sql(study.database, "SELECT trial, epoch, pool FROM hpo_rungs ORDER BY 1, 2, 3")
        update = TrialUpdate(worst, INTERVAL, {"m": 1.0}, 1.0, decides=True)
        with pytest.raises(Exception, match=r"(?i)unique|^$"):
            reporting.write(
                study.database,
                study.key,
                [update],
                pruner=replace(population, breed=fail),
                ending=set(),
                device_seconds={},
            )
        assert states(study) == ["RUNNING", "RUNNING"]
        assert trials_of(study)[1].user_attrs == {}
        assert max(trials_of(study)[1].intermediate_values) == INTERVAL - 1
        assert sql(study.database, "SELECT trial, epoch, pool FROM hpo_rungs ORDER BY 1, 2, 3") == before
        assert train(run, worst, 1.0), "the next attempt succeeds"


def test_a_killed_driver_leaves_the_child_to_another_one(study: Study) -> None:
    run = run_of(study, size=2)
    run.__enter__()
    best, worst = claim_one(run), claim_one(run)
    train(run, best, 9.0)
    assert train(run, worst, 1.0)
    kill(run)
    with run_of(study, size=2) as other:
        claims = [claim_one(other), claim_one(other)]
        assert {claim.number for claim in claims} == {best.number, 2}
        assert other.claim() is None


def test_a_parent_is_superfluous_once_no_unfinished_trial_continues_it(study: Study) -> None:
    with run_of(study, size=2) as run:
        best, worst = claim_one(run), claim_one(run)
        train(run, best, 9.0)
        train(run, worst, 1.0)
        child = claim_one(run)
        run.complete(best, 9.0)
        run.flush()
        assert [trial.number for trial in superfluous_trials(study, 0, ["maximize"])] == [0, 1]
        assert needed(study) == {best.number}
        run.complete(child, 9.0)
        run.flush()
        assert needed(study) == set()


def test_a_member_can_be_compared_again_when_others_have_arrived(study: Study) -> None:
    with run_of(study, size=2) as run:
        worst, best = claim_one(run), claim_one(run)
        assert not train(run, worst, 1.0), "it is the first"
        run.release(worst)
        train(run, best, 9.0)
        claim = claim_one(run)
        assert claim.number == worst.number
        value = 1.0 + INTERVAL
        assert run.decide(claim, INTERVAL, {"m": value}, value) is Decision.CONTINUE, (
            "an epoch that is stored was decided"
        )
        assert run.decide(claim, INTERVAL, {"m": value}, value, again=True) is Decision.END
        assert run.replacement(claim) == 2
        assert run.decide(best, INTERVAL, {"m": 11.0}, 11.0, again=True) is Decision.CONTINUE
    assert states(study) == ["PRUNED", "RUNNING", "WAITING"]
