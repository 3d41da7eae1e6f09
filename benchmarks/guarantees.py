"""What storage guarantees about a study of toy trials (`benchmarks.toy:chain`), checked with plain SQL."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from benchmarks.toy import expected_value

DUPLICATE = "duplicate of an earlier trial"  # `fail_reason` of a draw that was never trained


@dataclass(frozen=True)
class Expected:
    """What a finished study must contain.

    Attributes:
        points: the values of x that it may try.
        max_epochs: the epochs of a trial that is not pruned.
        trials: (least, most) number of trained trials; None means one for each point.
        prunes_after: the epochs after which the scheduler may end a trial.
    """

    points: Sequence[int]
    max_epochs: int
    trials: tuple[int, int] | None = None
    prunes_after: Collection[int] = ()

    @property
    def trial_range(self) -> tuple[int, int]:
        """(least, most) number of trained trials."""
        return self.trials or (len(self.points), len(self.points))


@dataclass(frozen=True)
class _Trial:
    """A trial as stored.

    Attributes:
        x: its configuration; None if it has none.
        fail_reason: why it failed; None if it does not say.
        key: of its row in hpo_trials; None if it has no row.
        epochs: [(epoch, value)] in hpo_metrics.
        steps: [(epoch, value)] in Optuna's table.
        values: of Optuna's table of final values.
    """

    number: int
    state: str
    x: int | None
    fail_reason: str | None
    key: str | None
    epochs: list[tuple[int, float]]
    steps: list[tuple[int, float]]
    values: list[float]

    @property
    def is_trained(self) -> bool:
        return self.state != "FAIL" or self.fail_reason != DUPLICATE


def violations(url: str, expected: Expected) -> list[str]:
    """Return which guarantees of storage a finished study violates.

    Args:
        url: a database that contains this study only.
        expected: what the study must contain.
    """
    trials = _read_trials(url)
    trained = [trial for trial in trials if trial.is_trained]
    least, most = expected.trial_range
    found = []
    if not least <= len(trained) <= most:
        found.append(f"{len(trained)} trials were trained, not {least} to {most}")
    for name, values in (("x", [trial.x for trial in trained]), ("key", [trial.key for trial in trained])):
        twice = {value: count for value, count in Counter(values).items() if count > 1 and value is not None}
        found += [f"{count} trained trials have the {name} {value}" for value, count in twice.items()]
    for trial in trials:
        found += [f"trial {trial.number} ({trial.state}, x = {trial.x}) {text}" for text in _mistakes(trial, expected)]
    return found


def unfinished(url: str, least: int) -> str:
    """Return what a study has so far if it is not finished; empty if it is.

    Args:
        url: a database that contains this study only.
        least: the least number of trained trials of a finished study.
    """
    trained = [trial for trial in _read_trials(url) if trial.is_trained]
    states = Counter(trial.state for trial in trained)
    if len(trained) < least or states.keys() & {"RUNNING", "WAITING"}:
        return f"unfinished, with {dict(states)} of {least} trials"
    return ""


def _mistakes(trial: _Trial, expected: Expected) -> list[str]:
    if not trial.is_trained:
        has_row = trial.key is not None
        return ["was drawn twice, and yet has a row or epochs"] if has_row or trial.epochs or trial.steps else []
    if trial.state not in {"COMPLETE", "PRUNED"}:
        return [f"did not end well: {trial.fail_reason}"]
    found = []
    if trial.x not in expected.points:
        return ["is not a configuration of the study"]
    if trial.key is None:
        found.append("has no row in hpo_trials")
    last = expected.max_epochs if trial.state == "COMPLETE" else max((epoch for epoch, _ in trial.epochs), default=0)
    if trial.state == "PRUNED" and last not in expected.prunes_after:
        found.append(f"was pruned after epoch {last}")
    chain = [(epoch, expected_value({"x": trial.x}, 0, epoch)) for epoch in range(1, last + 1)]
    for name, epochs in (("hpo_metrics", trial.epochs), ("trial_intermediate_values", trial.steps)):
        if epochs != chain:
            found.append(f"has other epochs in {name}: {epochs}, not {chain}")
    if trial.values != [value for _, value in chain[-1:]]:
        found.append(f"has the values {trial.values}, not {chain[-1:]}")
    return found


def read_rows(url: str, query: str) -> list[tuple[Any, ...]]:
    """Return what a query finds; nothing while the database or the table does not exist."""
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(query))]
    except (sa.exc.OperationalError, sa.exc.ProgrammingError):
        return []
    finally:
        engine.dispose()


def _read_trials(url: str) -> list[_Trial]:
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))

    def rows(query: str) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in connection.execute(sa.text(query))]

    with engine.connect() as connection:
        params = rows("SELECT trial_id, param_value, distribution_json FROM trial_params WHERE param_name = 'x'")
        reasons = rows("SELECT trial_id, value_json FROM trial_user_attributes WHERE key = 'fail_reason'")
        keys = rows('SELECT trial, "key" FROM hpo_trials')
        epochs = rows("SELECT trial, epoch, value FROM hpo_metrics WHERE name = 'value' ORDER BY epoch")
        steps = rows("SELECT trial_id, step, intermediate_value FROM trial_intermediate_values ORDER BY step")
        values = rows("SELECT trial_id, value FROM trial_values ORDER BY trial_value_id")
        trials = rows("SELECT trial_id, number, CAST(state AS TEXT) FROM trials ORDER BY number")
    engine.dispose()
    x_of = {trial: _decode(value, json.loads(distribution)) for trial, value, distribution in params}
    reason_of = {trial: json.loads(text) for trial, text in reasons}
    key_of = dict(keys)
    return [
        _Trial(
            number,
            state,
            x_of.get(trial_id),
            reason_of.get(trial_id),
            key_of.get(trial_id),
            [(epoch, value) for trial, epoch, value in epochs if trial == trial_id],
            [(step, value) for trial, step, value in steps if trial == trial_id],
            [value for trial, value in values if trial == trial_id],
        )
        for trial_id, number, state in trials
    ]


def _decode(value: float, distribution: dict[str, Any]) -> int:
    """Return the value of x, which Optuna stores as a position if x has choices."""
    choices = distribution["attributes"].get("choices")
    return int(value if choices is None else choices[int(value)])
