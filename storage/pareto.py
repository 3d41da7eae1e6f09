"""Trials with several objectives: which of them are the best, and in which order.

The order is that of NSGA-II, with one rule for ties: the Pareto front comes first, then the front of the trials without it,
and so on. Within a front, the first objective decides, then the place of the trial. Optuna sorts the fronts, as for its
samplers. With one objective, this is the order of its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from optuna.study import StudyDirection

from storage.optuna_internals import non_domination_ranks

Direction = Literal["maximize", "minimize"]


def direction_of(direction: StudyDirection) -> Direction:
    """Return a direction of Optuna by its name."""
    return "maximize" if direction == StudyDirection.MAXIMIZE else "minimize"


def rank_best(
    values: Sequence[Sequence[float]], directions: Sequence[Direction], count: int | None = None
) -> list[int]:
    """Return the places of the best trials, best first.

    With a small count, this takes milliseconds for ten thousand trials. Sorting all of them takes up to a second.

    Args:
        values: of each trial, one value per objective; it may be infinite, but not NaN. Ties go to the trial that is first.
        directions: of each objective.
        count: how many are wanted; None for all.
    """
    count = len(values) if count is None else min(count, len(values))
    if count == 0:
        return []
    losses = _losses(values, directions)
    # Beyond `count`, all have one rank.
    order = np.lexsort((losses[:, 0], non_domination_ranks(losses, count)))  # stable
    return [int(place) for place in order[:count]]


def find_front(values: Sequence[Sequence[float]], directions: Sequence[Direction]) -> list[int]:
    """Return the places of the trials that no other one dominates, ascending. Equal ones do not dominate each other.

    Args:
        values: see `rank_best`.
        directions: of each objective.
    """
    if not values:
        return []
    return [int(place) for place in np.flatnonzero(non_domination_ranks(_losses(values, directions), 1) == 0)]


def fronts_of(values: Sequence[Sequence[float]], directions: Sequence[Direction], count: int) -> list[list[int]]:
    """Return the places of the trials of each front, the Pareto front first, until they are at least `count` trials.

    Args:
        values: see `rank_best`.
        directions: of each objective.
        count: how many trials are wanted.

    Returns:
        The places in each front, best first by the first objective.
    """
    if not values:
        return []
    losses = _losses(values, directions)
    ranks = non_domination_ranks(losses, count)
    order = np.lexsort((losses[:, 0], ranks))
    fronts: list[list[int]] = []
    for place in order:
        if ranks[place] == len(fronts):
            if sum(map(len, fronts)) >= count:
                break
            fronts.append([])
        fronts[-1].append(int(place))
    return fronts


def _losses(values: Sequence[Sequence[float]], directions: Sequence[Direction]) -> np.ndarray:
    """Return an array of shape (trials, objectives), in which lower is better."""
    return np.asarray(values, dtype=float) * [-1.0 if direction == "maximize" else 1.0 for direction in directions]
