"""Runs one search of the comparison, in a process of a pool."""

from __future__ import annotations

import functools
import json
import logging
import random
import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.worth.contestants import CONTESTANTS
from benchmarks.worth.figures import BUDGETS, Run
from benchmarks.worth.simulation import simulate
from benchmarks.worth.tables import TaskTables
from benchmarks.worth.task import Task, space_of
from hpo.space.parameters import sample_params

DIGITS = 5  # of each number in the log
FULL_TRAININGS = 200  # random configurations whose mean device time is that of a full training


@dataclass(frozen=True)
class Job:
    """A search to be run.

    Attributes:
        lcbench: the folder of LCBench's surrogate.
        task: the name of the task.
        contestant: the name of the contestant.
        workers: how many trials run at a time.
        seed: of the search.
    """

    lcbench: Path
    task: str
    contestant: str
    workers: int
    seed: int


def silence() -> None:
    """Silence the libraries in a process of the pool."""
    import optuna

    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("syne_tune").setLevel(logging.ERROR)


def run_job(job: Job) -> str:
    """Run a search; return its line of the log."""
    task = open_tables(job.lcbench).task(job.task)
    full_seconds = _full_seconds(job.lcbench, job.task)
    np.random.seed(job.seed)  # Ray Tune and Syne Tune choose brackets by it
    started = time.process_time()
    with CONTESTANTS[job.contestant].open(task, job.seed, job.workers) as search:
        trajectory = simulate(search, task, job.workers, BUDGETS[-1] * full_seconds)
    cpu_seconds = time.process_time() - started
    done = Run(job.task, job.contestant, job.workers, job.seed, full_seconds, trajectory, cpu_seconds)
    # With fewer digits: the log of many searches is large.
    return json.dumps(json.loads(json.dumps(asdict(done)), parse_float=lambda text: float(f"{float(text):.{DIGITS}g}")))


open_tables = functools.cache(TaskTables)


@functools.cache
def _full_seconds(lcbench: Path, name: str) -> float:
    """Return the device time of a full training of a task."""
    task = open_tables(lcbench).task(name)
    return statistics.fmean(float(task.curve(params).seconds.sum()) for params in random_params(task, FULL_TRAININGS))


def random_params(task: Task, count: int) -> list[dict[str, Any]]:
    """Return random configurations of a task, always the same ones."""
    parameters, rng = space_of(task.parameters).parameters, random.Random(0)
    return [dict(sample_params(parameters, rng)) for _ in range(count)]
