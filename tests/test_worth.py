"""benchmarks.worth: what simulated time, the service in it, and the figures mean."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from benchmarks.worth.contestants import CONTESTANTS, contestants_of
from benchmarks.worth.fashion_mnist import FOLDER, CurveModel, FashionMnistTask
from benchmarks.worth.figures import Run, _mark, regrets
from benchmarks.worth.service import SOURCE, open_service
from benchmarks.worth.simulation import Trajectory, Trial, simulate
from benchmarks.worth.task import Curve, space_of


class Slopes:
    """A task: after each of four epochs, the value is x times the epoch. An epoch takes 10 s."""

    name = "made/slopes"
    max_epochs = 4
    parameters: Mapping[str, Any] = {"x": {"type": "float", "low": 0.0, "high": 1.0}}
    small_grid: Mapping[str, Any] | None = {"x": [0.25, 0.5]}
    large_grid: Mapping[str, Any] | None = {"x": [0.1, 0.2, 0.3]}

    def curve(self, params: Mapping[str, Any]) -> Curve:
        return Curve(params["x"] * np.arange(1, 5), np.full(4, 10.0))


class InTurn:
    """A search that tries fixed values, and stops those below a limit after an epoch."""

    def __init__(self, values: list[float], least: float = 0.0) -> None:
        self.values, self.least, self.ended = list(enumerate(values)), least, list[tuple[str, int]]()

    def next_trial(self) -> Trial | None:
        if not self.values:
            return None
        number, x = self.values.pop(0)
        return Trial(str(number), {"x": x})

    def report(self, trial: Trial, epoch: int, value: float, seconds: float) -> bool:
        goes_on = trial.params["x"] >= self.least and epoch < 4
        if not goes_on:
            self.ended.append((trial.key, epoch))
        return goes_on


def test_device_time_is_wall_clock_time_times_workers() -> None:
    search = InTurn([0.25, 0.5, 0.125])
    found = simulate(search, Slopes(), workers=2, device_seconds=1e9)
    # Two at a time: 0 and 1 until 40 s, then 2 until 80 s. The second worker is idle then, and is paid for.
    assert found.seconds == [20.0, 20.0, 40.0, 60.0, 80.0]
    assert found.values == [0.25, 0.5, 1.0, 1.5, 2.0]
    assert (found.trials, found.epochs) == (3, 12)
    assert search.ended == [("0", 4), ("1", 4), ("2", 4)]


def test_a_search_ends_when_its_device_time_is_spent() -> None:
    found = simulate(InTurn([1.0, 1.0, 1.0]), Slopes(), workers=1, device_seconds=75.0)
    assert (found.trials, found.epochs) == (2, 7)


def test_a_trial_that_is_stopped_makes_room() -> None:
    search = InTurn([0.1, 0.1, 0.9], least=0.5)
    found = simulate(search, Slopes(), workers=1, device_seconds=1e9)
    assert search.ended == [("0", 1), ("1", 1), ("2", 4)]
    assert found.seconds[-1] == 60.0


def test_a_resumed_trial_starts_after_its_last_epoch() -> None:
    search = InTurn([])
    waiting = [Trial("0", {"x": 1.0}, epoch=3)]
    search.next_trial = lambda: waiting.pop() if waiting else None  # type: ignore[method-assign]
    found = simulate(search, Slopes(), workers=1, device_seconds=1e9)
    assert (found.seconds, found.values, found.trials) == ([10.0], [4.0], 0)


def test_the_best_value_at_a_time() -> None:
    found = Trajectory([10.0, 30.0], [0.5, 0.75])
    assert [found.best_at(seconds) for seconds in (9.0, 10.0, 29.0, 99.0)] == [None, 0.5, 0.5, 0.75]


def test_the_service_decides_as_its_settings_say() -> None:
    scheduler = {"name": "asha", "grace_period": 1, "reduction_factor": 2}
    with open_service(Slopes(), 0, 2, {"sampler": "random", "scheduler": scheduler}) as search:
        halved = simulate(search, Slopes(), workers=2, device_seconds=800.0)
    with open_service(Slopes(), 0, 2, {"sampler": "random"}) as search:
        whole = simulate(search, Slopes(), workers=2, device_seconds=800.0)
    assert (whole.trials, whole.epochs) == (20 + 2, 80)
    assert halved.trials > whole.trials
    assert halved.values[-1] > whole.values[-1]


def test_trials_that_wait_to_be_promoted_free_their_workers() -> None:
    scheduler = {"name": "asha", "mode": "promote", "grace_period": 1, "reduction_factor": 2}
    with open_service(Slopes(), 0, 2, {"sampler": "random", "scheduler": scheduler}) as search:
        found = simulate(search, Slopes(), workers=2, device_seconds=800.0)
    assert found.trials > 22, "more than as many whole trainings"
    assert 2 * found.trials < found.epochs + 2 <= 80 + 2, "some were resumed, and no worker was idle"


def test_a_warm_start_learns_from_a_grid_that_was_run_before() -> None:
    settings = {"sampler": {"name": "tpe", "n_startup_trials": 2}, "warm_start": [SOURCE]}
    with open_service(Slopes(), 0, 1, settings) as search:
        trial = search.next_trial()
        assert trial is not None
    with open_service(Slopes(), 0, 1, {"sampler": {"name": "random"}}) as search:
        other = search.next_trial()
        assert other is not None
    assert trial.params != other.params, "the grid's two trials end the start at random"


def test_what_the_service_recommends_stops_trials_early_where_there_are_epochs() -> None:
    with CONTESTANTS["auto"].open(Slopes(), 0, 2) as search:
        found = simulate(search, Slopes(), workers=2, device_seconds=800.0)
    assert found.epochs < 3 * found.trials
    task = Slopes()
    task.max_epochs = 1
    with CONTESTANTS["auto"].open(task, 0, 1) as search:
        assert search.next_trial() is not None


def test_a_contestant_without_epochs_or_grid_is_left_out() -> None:
    task = Slopes()
    assert contestants_of(task, list(CONTESTANTS)) == list(CONTESTANTS)
    task.max_epochs, task.small_grid = 1, None
    assert contestants_of(task, ["grid", "random", "random+asha/1", "tpe, warm"]) == ["random"]


@pytest.mark.parametrize(("trainings", "expected"), [(1.0, [0.5, 0.5]), (2.0, [0.0, 0.25])])
def test_regret_is_the_distance_to_the_best_known_value(trainings: float, expected: list[float]) -> None:
    runs = [
        Run("t", "a", 1, seed, 10.0, Trajectory(seconds, values), 0.0)
        for seed, seconds, values in ((1, [15.0], [0.75]), (0, [10.0, 20.0], [0.5, 1.0]))
    ]
    found = regrets(runs, {"t": 1.0}, trainings)
    assert found == {("t", "a"): expected}, "by seed; without a value, that of the worst one"


@pytest.mark.parametrize(("worse", "better", "expected"), [(7, 0, "*"), (0, 7, "!"), (3, 3, " "), (2, 0, " ")])
def test_a_mark_says_who_is_worse_on_the_tasks_that_differ(worse: int, better: int, expected: str) -> None:
    """Also if most tasks do not differ: the median of the differences is 0 then."""
    differences = [0.1 * (i + 1) for i in range(worse)] + [-0.1 * (i + 1) for i in range(better)] + [0.0] * 12
    found = {(f"t/{i}", "reference"): [1.0] for i in range(len(differences))}
    found |= {(f"t/{i}", "other"): [1.0 + difference] for i, difference in enumerate(differences)}
    tasks = [f"t/{i}" for i in range(len(differences))]
    assert _mark(found, "other", "reference", tasks) == expected


def test_of_one_task_the_mark_is_about_its_seeds() -> None:
    found = {("t", "reference"): [1.0, 2.0] * 5, ("t", "other"): [1.1, 2.2, 1.3, 2.4, 1.5, 2.6, 1.7, 2.8, 1.9, 3.0]}
    assert _mark(found, "other", "reference", ["t"]) == "*"
    assert _mark({key: seeds[:5] for key, seeds in found.items()}, "other", "reference", ["t"]) == " ", "too few"


# --- the table of our own problem ---------------------------------------------------------------------------------------


def test_the_table_has_whole_curves_of_the_configurations_of_its_search() -> None:
    task = FashionMnistTask()
    points, curves = task.known()
    assert len(points) == len(curves) == 256
    assert {(len(curve.values), len(curve.seconds)) for curve in curves} == {(task.max_epochs, task.max_epochs)}
    assert min(curve.seconds.min() for curve in curves) > 0
    with (FOLDER / "fashion_mnist.csv").open(newline="") as file:
        columns = set(next(csv.reader(file)))
    assert {name for name, _ in space_of(task.parameters).examples()} == columns - {
        f"{name} {epoch}" for name in ("value", "seconds") for epoch in range(1, 7)
    }


def test_curves_that_the_model_has_not_seen_are_predicted_better_than_by_the_nearest_configuration() -> None:
    points, curves = FashionMnistTask().known()
    known, unknown = slice(0, 192), slice(192, 256)
    predicted = CurveModel(points[known], curves[known]).predict(points[unknown])
    distances = np.abs(points[unknown, None] - points[known]).sum(axis=2)
    nearest = [curves[index] for index in distances.argmin(axis=1)]

    def error(found: Sequence[Curve], name: str) -> float:
        pairs = zip(found, curves[unknown], strict=True)
        return float(np.mean([np.abs(getattr(a, name) - getattr(b, name)) for a, b in pairs]))

    assert error(predicted, "values") < 0.6 * error(nearest, "values")
    assert error(predicted, "seconds") < error(nearest, "seconds")


def test_the_grids_of_the_table_have_curves() -> None:
    task = FashionMnistTask()
    for grid in (task.small_grid, task.large_grid):
        point = {name: each[0] if isinstance(each, list) else each for name, each in grid.items()}
        curve = task.curve(point)
        assert len(curve.values) == task.max_epochs
        assert 0 < curve.values.min() <= curve.values.max() < 100
        assert curve.seconds.min() > 0
