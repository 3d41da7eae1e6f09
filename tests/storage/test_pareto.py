"""The order of trials with several objectives."""

from __future__ import annotations

import random
import time

import optuna
import pytest
from optuna.trial import create_trial

from storage.pareto import Direction, find_front, fronts_of, rank_best

BOTH: list[Direction] = ["maximize", "minimize"]
# (gain, cost): the front is 1, 3 and 0; then 2, then 4.
PAIRS = [(1.0, 1.0), (3.0, 3.0), (2.0, 4.0), (2.0, 2.0), (1.0, 4.0)]


def test_the_front_comes_first_and_the_first_objective_decides_within_a_front() -> None:
    assert rank_best(PAIRS, BOTH) == [1, 3, 0, 2, 4]
    assert find_front(PAIRS, BOTH) == [0, 1, 3]
    assert fronts_of(PAIRS, BOTH, 5) == [[1, 3, 0], [2], [4]]
    assert fronts_of(PAIRS, BOTH, 3) == [[1, 3, 0]]
    assert fronts_of(PAIRS, BOTH, 4) == [[1, 3, 0], [2]]


@pytest.mark.parametrize("count", range(6))
def test_a_count_does_not_change_the_order(count: int) -> None:
    assert rank_best(PAIRS, BOTH, count) == [1, 3, 0, 2, 4][:count]


def test_equal_trials_do_not_dominate_each_other_and_keep_their_order() -> None:
    assert find_front([(1.0, 1.0), (2.0, 1.0), (2.0, 1.0)], BOTH) == [1, 2]
    assert rank_best([(1.0, 1.0), (2.0, 1.0), (2.0, 1.0)], BOTH) == [1, 2, 0]


@pytest.mark.parametrize(
    ("direction", "expected"), [("maximize", [1, 0, 2, 3]), ("minimize", [3, 0, 2, 1])], ids=["maximize", "minimize"]
)
def test_one_objective_has_the_order_of_its_values(direction: Direction, expected: list[int]) -> None:
    values = [(0.5,), (float("inf"),), (0.5,), (-1.0,)]
    assert rank_best(values, [direction]) == expected
    assert find_front(values, [direction]) == expected[:1]


def test_without_trials_there_is_no_front() -> None:
    assert (rank_best([], BOTH), find_front([], BOTH), fronts_of([], BOTH, 3)) == ([], [], [])


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_the_front_is_that_of_optuna(objectives: int) -> None:
    rng = random.Random(objectives)
    directions = [*BOTH, *BOTH][:objectives]
    values = [tuple(float(rng.randrange(6)) for _ in range(objectives)) for _ in range(80)]
    study = optuna.create_study(directions=directions)
    study.add_trials([create_trial(values=each) for each in values])
    front = find_front(values, directions)
    assert front == sorted(trial.number for trial in study.best_trials)
    assert set(rank_best(values, directions, len(front))) == set(front)


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [2, 4])
def test_ten_thousand_trials_are_ranked_in_seconds(objectives: int) -> None:
    rng = random.Random(0)
    values = [tuple(rng.random() for _ in range(objectives)) for _ in range(10_000)]
    started = time.process_time()
    rank_best(values, [*BOTH, *BOTH][:objectives], 3)
    assert time.process_time() - started < 5  # a machine may be slow and busy
