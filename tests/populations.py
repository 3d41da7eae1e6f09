"""What must be true of a population of `benchmarks.toy:climb` that has reached its end."""

from __future__ import annotations

import math
from typing import Any

from storage.parents import Parent
from storage.records import CONTINUED_FROM, REPLACED_BY, REPLACES
from storage.study import Study


def parent_of(trial: Any) -> Parent | None:
    """Return the trial from whose checkpoint a trial started."""
    return Parent.read(trial.user_attrs.get(CONTINUED_FROM))


def successors(study: Study) -> list[Any]:
    """Return the trials that took the place of others."""
    return [trial for trial in study.trials() if REPLACES in trial.user_attrs]


def check_lines(study: Study, *, size: int, last_epoch: int) -> None:
    """Check that each value is the sum of the rates of the whole line, and that each line has reached its end.

    Args:
        study: the study.
        size: how many members there are.
        last_epoch: of each.
    """
    trials = {trial.number: trial for trial in study.trials()}
    rates: dict[int, list[float]] = {}
    for number, trial in sorted(trials.items()):
        parent = parent_of(trial)
        before = [] if parent is None else rates[parent.number][: parent.epoch]
        rates[number] = [*before, *[trial.params["rate"]] * (last_epoch - len(before))]
        expected = {epoch: math.fsum(rates[number][:epoch]) for epoch in range(1, max(trial.intermediate_values) + 1)}
        assert trial.intermediate_values == expected
    states = [trial.state.name for trial in trials.values()]
    assert states.count("COMPLETE") == size
    attrs = {number: trial.user_attrs for number, trial in trials.items()}
    replaced = {number: each[REPLACED_BY] for number, each in attrs.items() if REPLACED_BY in each}
    assert {number for number, trial in trials.items() if trial.state.name == "PRUNED"} == set(replaced)
    children = {trial.user_attrs[REPLACES]["trial"]: trial.number for trial in successors(study)}
    assert children == {number: each["trial"] for number, each in replaced.items()}, "each has one successor"
    assert len(trials) == size + len(replaced)
