"""The service as a contestant: its own driver, storage, samplers and schedulers, without Ray and without training."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.worth.simulation import METRIC, Search, Trial, simulate
from benchmarks.worth.task import Task
from hpo.paths import RunsDir
from hpo.search.coordinator import TrialCoordinator
from hpo.search.earlier.continuation import ContinuationPlan
from hpo.search.earlier.warm_start import find_trials, take_over_trials
from hpo.search.listener import NullListener
from hpo.search.messages import TrialReport
from hpo.search.runs import open_run
from hpo.search.slots import Slots
from hpo.space.model import Space
from storage.database import Database, open_database
from storage.studies import open_study

SOURCE = "grid"  # the study of a warm start
MANY_TRIALS = 1_000_000  # device time ends a search


class ServiceSearch:
    """What a driver of the service claims, stores and decides. See `Search`."""

    def __init__(self, coordinator: TrialCoordinator) -> None:
        self._coordinator = coordinator
        self._keys = itertools.count()

    def next_trial(self) -> Trial | None:
        """See `Search.next_trial`."""
        key = str(next(self._keys))
        spec = self._coordinator.next_trial(key)
        self._raise_error()
        return None if spec is None else Trial(key, spec.params, spec.stored_epoch)

    def report(self, trial: Trial, epoch: int, value: float, seconds: float) -> bool:
        """See `Search.report`."""
        report = TrialReport(epoch, {METRIC: value, "train_seconds": seconds})
        ending = self._coordinator.on_report(trial.key, report)
        if ending is not None:
            self._coordinator.on_saved(trial.key, "")  # a trial that waits frees its place
        self._raise_error()
        return ending is None

    def _raise_error(self) -> None:
        if self._coordinator.error is not None:
            raise self._coordinator.error


@contextmanager
def open_service(task: Task, seed: int, workers: int, settings: Mapping[str, Any]) -> Iterator[Search]:
    """Open a search of the service, in a new database.

    Args:
        task: what is trained.
        seed: of the search.
        workers: how many trials run at a time.
        settings: keys of the search space, such as its sampler and scheduler. If it is warm-started from the study
            `grid`, that grid is run before, to its end. Its device time does not count.
    """
    with (
        tempfile.TemporaryDirectory(prefix="worth-") as folder,
        open_database(f"sqlite:///{folder}/hpo.db") as database,
    ):
        if settings.get("warm_start"):
            assert task.small_grid is not None
            with _search(task, SOURCE, 0, 1, database, {"sampler": "grid", "parameters": task.small_grid}) as grid:
                simulate(grid, task, 1, float("inf"))
        with _search(task, "worth", seed, workers, database, settings) as search:
            yield search


@contextmanager
def _search(
    task: Task, name: str, seed: int, workers: int, database: Database, settings: Mapping[str, Any]
) -> Iterator[Search]:
    space = Space.model_validate(
        {
            "name": name,
            "trainable": "benchmarks.worth:simulated",  # nothing calls it
            "metric": METRIC,
            "max_epochs": task.max_epochs,
            "parameters": task.parameters,
            "budget": {"trials": MANY_TRIALS},
            "seed": seed,
        }
        | dict(settings)
    )
    found = find_trials(space, None, database, None)
    study = open_study(database, **space.study_options)
    if found:
        take_over_trials(space, study, found)
    runs_dir = RunsDir(Path(str(database.file)).parent / "runs").make()
    with open_run(ContinuationPlan(space), study, {}) as run:
        slots = Slots(workers, cpu=1.0, gpu=0.0)
        yield ServiceSearch(TrialCoordinator(space, run, slots, data={}, runs_dir=runs_dir, listener=NullListener()))
