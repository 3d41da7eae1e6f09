"""How time and memory grow with the size of a study: opening it, resuming it, claiming a trial, and pruning it.

    uv run python -m benchmarks.scale --trials 100 1000 10000 --epochs 50

The studies are generated and written in bulk. Each measurement runs in a new process. An ask is one `Run.claim`: it
writes earlier results, draws a point and registers the trial. A decision is one `Run.decide` after the first epoch, where
a trial competes with all others: it returns when the epoch and the decision are on the disk. A resume is what a second
`hpo run` does before its first trial: open the database, the study and a run, and claim a trial. Prints a table and, as
its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.report import fill
from hpo.space.model import Space

CLAIMS = 15  # timed in each process
SEARCHES = (("random", "none"), ("tpe", "none"), ("random", "asha"), ("random", "median"))  # sampler, scheduler


def measure_here(url: str, sampler: str, scheduler: str, seed: int) -> dict[str, float]:
    """Open, resume, ask and decide in this process.

    Returns:
        Seconds for `open`, `resume`, `ask` and `decide` (medians; 0 without a scheduler), and the peak of `memory` in bytes.
    """
    from hpo.search.samplers import build_pruner, build_sampler, history_limit
    from storage.database import open_database
    from storage.pruners import Decision
    from storage.run import Run
    from storage.studies import find_study

    warnings.simplefilter("ignore")
    started = time.perf_counter()
    database = open_database(url)
    study = find_study(database, "s")
    assert study is not None
    opened = time.perf_counter()
    study.ended_keys()  # `hpo run` does this to find out how many trials are left
    changes: dict[str, Any] = {"sampler": {"name": sampler, "seed": seed}, "scheduler": scheduler}
    space = Space.from_settings(study.settings | changes)
    asks, decisions = [], []
    with Run(
        study,
        config_key=space.config_key,
        provenance={},
        draw=space.draw,
        learns=space.learns_from_results,
        history_limit=history_limit(space),
        pruner=build_pruner(space, study),
    ) as run:
        study.optuna_study.sampler = build_sampler(space, run.run_id)
        for i in range(CLAIMS + 1):
            before = time.perf_counter()
            claim = run.claim()
            assert claim is not None
            if i == 0:
                resumed = time.perf_counter()
            else:
                asks.append(time.perf_counter() - before)
            if scheduler == "none":
                run.report(claim, 1, {"val_accuracy": 0.5}, 0.5)
                run.complete(claim, 0.5)
                continue
            before = time.perf_counter()
            if run.decide(claim, 1, {"val_accuracy": 0.5}, 0.5) is Decision.CONTINUE:
                run.complete(claim, 0.5)
            decisions.append(time.perf_counter() - before)
    return {
        "open": opened - started,
        "resume": resumed - started,
        "ask": statistics.median(asks),
        "decide": statistics.median(decisions) if decisions else 0.0,
        "memory": _peak_bytes(),
    }


def _peak_bytes() -> int:
    # getrusage does not work here: a new process inherits the peak of its parent.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(url: str, sampler: str, scheduler: str, seed: int) -> dict[str, float]:
    """Return `measure_here` from a new process."""
    command = [sys.executable, "-m", "benchmarks.scale", "--here", url, sampler, scheduler, str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    """Measure each sampler with each number of trials."""
    from storage.database import open_database

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", nargs="+", type=int, default=[100, 1000, 10_000])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--runs", type=int, default=3, help="processes per row; the row shows their medians")
    parser.add_argument("--here", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        url, sampler, scheduler, seed = options.here
        print(json.dumps(measure_here(url, sampler, scheduler, int(seed))))
        return
    columns = ("open s", "resume s", "ask ms", "decide ms", "memory MiB")
    print(f"{'search':14} {'trials':>7} " + " ".join(f"{column:>10}" for column in columns))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        urls = {}
        for trials in options.trials:
            urls[trials] = f"sqlite:///{Path(folder)}/{trials}.db"
            with open_database(urls[trials]) as database:
                fill(database, "s", trials=trials, epochs=options.epochs)
        for sampler, scheduler in SEARCHES:
            search = sampler if scheduler == "none" else f"{sampler}, {scheduler}"
            for trials, url in urls.items():
                measurements = [measure(url, sampler, scheduler, trials) for _ in range(options.runs)]
                median = {name: statistics.median(each[name] for each in measurements) for name in measurements[0]}
                results[f"{search}/{trials}"] = {name: round(value, 5) for name, value in median.items()}
                print(
                    f"{search:14} {trials:7,} {median['open']:10.2f} {median['resume']:10.2f} {1000 * median['ask']:10.1f} "
                    f"{1000 * median['decide']:10.1f} {median['memory'] / 2**20:10.0f}",
                    flush=True,
                )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
