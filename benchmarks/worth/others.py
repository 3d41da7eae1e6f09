"""Other libraries as contestants. Their own searchers and schedulers decide; only time is simulated."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from benchmarks.worth.simulation import METRIC, Search, Trial
from benchmarks.worth.task import Task, space_of

EPOCH = "training_iteration"


class RayTuneSearch:
    """Ray Tune's OptunaSearch with its ASHAScheduler, both with their defaults. See `Search`.

    Args:
        task: what is trained. Without epochs, no scheduler is used.
        seed: of the searcher.
    """

    def __init__(self, task: Task, seed: int) -> None:
        from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
        from ray.tune.search.optuna import OptunaSearch

        space = space_of(task.parameters)
        self._searcher = OptunaSearch(space=space.distributions(), metric=METRIC, mode="max", seed=seed)
        self._max_epochs = task.max_epochs
        self._scheduler: Any = (
            ASHAScheduler(metric=METRIC, mode="max", max_t=task.max_epochs) if task.max_epochs > 1 else FIFOScheduler()
        )
        self._keys = itertools.count()

    def next_trial(self) -> Trial | None:
        """See `Search.next_trial`."""
        key = str(next(self._keys))
        params: Any = self._searcher.suggest(key)
        self._scheduler.on_trial_add(None, SimpleNamespace(trial_id=key))
        return Trial(key, params)

    def report(self, trial: Trial, epoch: int, value: float, seconds: float) -> bool:
        """See `Search.report`. In the order of Tune's controller: the searcher learns first, then the scheduler decides."""
        from ray.tune.schedulers import TrialScheduler

        stub, result = SimpleNamespace(trial_id=trial.key), {METRIC: value, EPOCH: epoch}
        if epoch >= self._max_epochs:  # the trainable returns
            self._scheduler.on_trial_complete(None, stub, result)
            self._searcher.on_trial_complete(trial.key, result)
            return False
        self._searcher.on_trial_result(trial.key, result)
        if self._scheduler.on_trial_result(None, stub, result) == TrialScheduler.STOP:
            self._searcher.on_trial_complete(trial.key, result)
            return False
        return True


class SyneTuneSearch:
    """One of Syne Tune's schedulers. See `Search`.

    Args:
        task: what is trained.
        seed: of the scheduler.
        name: the class in `syne_tune.optimizer.baselines`: ASHACQR where there are epochs, CQR where there are none.
    """

    def __init__(self, task: Task, seed: int, name: str) -> None:
        from syne_tune.backend.trial_status import Trial as SyneTrial
        from syne_tune.optimizer import baselines

        options = {"time_attr": EPOCH, "max_t": task.max_epochs} if task.max_epochs > 1 else {}
        self._scheduler = getattr(baselines, name)(
            _syne_tune_space(task.parameters), metric=METRIC, do_minimize=False, random_seed=seed, **options
        )
        self._max_epochs = task.max_epochs
        self._make_trial = SyneTrial
        self._trials: dict[str, Any] = {}

    def next_trial(self) -> Trial | None:
        """See `Search.next_trial`."""
        suggestion = self._scheduler.suggest()
        if suggestion is None:
            return None
        number = len(self._trials)
        trial = self._make_trial(number, suggestion.config, datetime.datetime.now())
        self._trials[str(number)] = trial
        self._scheduler.on_trial_add(trial)
        return Trial(str(number), suggestion.config)

    def report(self, trial: Trial, epoch: int, value: float, seconds: float) -> bool:
        """See `Search.report`."""
        from syne_tune.optimizer.scheduler import SchedulerDecision

        of_scheduler, result = self._trials[trial.key], {METRIC: value, EPOCH: epoch}
        if epoch >= self._max_epochs:
            self._scheduler.on_trial_complete(of_scheduler, result)
            return False
        if self._scheduler.on_trial_result(of_scheduler, result) == SchedulerDecision.STOP:
            self._scheduler.on_trial_remove(of_scheduler)
            return False
        return True


def _syne_tune_space(parameters: Mapping[str, Any]) -> dict[str, Any]:
    from syne_tune import config_space

    space: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if "choices" in parameter:
            choices = parameter["choices"]
            has_floats = any(isinstance(choice, float) for choice in choices)  # it takes choices of one type only
            space[name] = config_space.choice([float(choice) for choice in choices] if has_floats else choices)
        else:
            domain = ("log" if parameter.get("log") else "") + ("randint" if parameter["type"] == "int" else "uniform")
            space[name] = getattr(config_space, domain)(parameter["low"], parameter["high"])
    return space


@contextmanager
def open_ray_tune(task: Task, seed: int) -> Iterator[Search]:
    """Open Ray Tune's search."""
    yield RayTuneSearch(task, seed)


@contextmanager
def open_syne_tune(task: Task, seed: int, with_epochs: str, without: str) -> Iterator[Search]:
    """Open a search of Syne Tune by the class for tasks with and without epochs."""
    yield SyneTuneSearch(task, seed, with_epochs if task.max_epochs > 1 else without)
