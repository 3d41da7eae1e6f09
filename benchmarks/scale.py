"""How time and memory grow with the size of a study: opening it, resuming it, and claiming a trial.

    uv run python -m benchmarks.scale --trials 100 1000 10000 --epochs 50

The studies are generated and written in bulk. Each measurement runs in a new process. An ask is one `Run.claim`: it
writes earlier results, draws a point and registers the trial. A resume is what a second `hpo run` does before its first
trial: open the database, the study and a run, and claim a trial. Prints a table and, as its last line, one JSON object.
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
SAMPLERS = ("random", "tpe")


def measure_here(url: str, sampler: str, seed: int) -> dict[str, float]:
    """Open, resume and ask in this process.

    Returns:
        Seconds for `open`, `resume` and `ask` (the median), and the peak of `memory` in bytes.
    """
    from hpo.search.samplers import build_sampler, history_limit
    from storage.database import open_database
    from storage.run import Run
    from storage.studies import find_study

    warnings.simplefilter("ignore")
    started = time.perf_counter()
    database = open_database(url)
    study = find_study(database, "s")
    assert study is not None
    opened = time.perf_counter()
    study.ended_keys()  # `hpo run` does this to find out how many trials are left
    space = Space.from_settings(study.settings | {"sampler": {"name": sampler, "seed": seed}})
    asks = []
    with Run(
        study,
        config_key=space.config_key,
        provenance={},
        draw=space.draw,
        learns=space.learns_from_results,
        history_limit=history_limit(space),
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
            run.report(claim, 1, {"val_accuracy": 0.5}, 0.5)
            run.complete(claim, 0.5)
    return {
        "open": opened - started,
        "resume": resumed - started,
        "ask": statistics.median(asks),
        "memory": _peak_bytes(),
    }


def _peak_bytes() -> int:
    # getrusage does not work here: a new process inherits the peak of its parent.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(url: str, sampler: str, seed: int) -> dict[str, float]:
    """Return `measure_here` from a new process."""
    command = [sys.executable, "-m", "benchmarks.scale", "--here", url, sampler, str(seed)]
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
    parser.add_argument("--here", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure_here(options.here[0], options.here[1], int(options.here[2]))))
        return
    print(f"{'sampler':8} {'trials':>7} {'open s':>8} {'resume s':>9} {'ask ms':>8} {'memory MiB':>11}")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        urls = {}
        for trials in options.trials:
            urls[trials] = f"sqlite:///{Path(folder)}/{trials}.db"
            with open_database(urls[trials]) as database:
                fill(database, "s", trials=trials, epochs=options.epochs)
        for sampler in SAMPLERS:
            for trials, url in urls.items():
                measurements = [measure(url, sampler, trials) for _ in range(options.runs)]
                median = {name: statistics.median(each[name] for each in measurements) for name in measurements[0]}
                results[f"{sampler}/{trials}"] = {name: round(value, 4) for name, value in median.items()}
                print(
                    f"{sampler:8} {trials:7,} {median['open']:8.2f} {median['resume']:9.2f} {1000 * median['ask']:8.1f} "
                    f"{median['memory'] / 2**20:11.0f}",
                    flush=True,
                )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
