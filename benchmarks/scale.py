"""How the service bears a large study: opening it, resuming it, asking for a trial, memory, at 100 and at 10,000 trials.

    python -m benchmarks.scale --trials 100 1000 10000 --epochs 50

Each study is made up and written in bulk; each measurement is a process of its own. An ask is the time from wanting a
trial to having one, `Run.claim`: the results told before are written, a point is drawn and is the run's. A resume is all
that a second `hpo run` does before its first trial: opening the database, the study, the run, and one ask. Prints a table
and, as its last line, one JSON object.
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

from benchmarks.report import DISTRIBUTIONS, fill

ASKS = 15
SAMPLERS = ("random", "tpe")


def measure_here(url: str, sampler: str, known: int) -> dict[str, float]:
    """Open, resume and ask in this process; return seconds, and bytes of memory."""
    import optuna

    from storage.database import open_database
    from storage.run import Run
    from storage.studies import find_study

    warnings.simplefilter("ignore")
    started = time.perf_counter()
    database = open_database(url)
    study = find_study(database, "s")
    assert study is not None
    opened = time.perf_counter()
    study.count_ended()  # as `hpo run` does, to tell what is left
    study.optuna_study.sampler = {
        "random": optuna.samplers.RandomSampler(seed=known), "tpe": optuna.samplers.TPESampler(seed=known),
    }[sampler]  # fmt: skip

    def draw(trial: optuna.Trial) -> str:
        for name, distribution in DISTRIBUTIONS.items():
            trial._suggest(name, distribution)
        return ""

    asks = []
    with Run(
        study,
        config_key=lambda params: json.dumps(params, sort_keys=True),
        provenance={},
        draw=draw,
        learns=sampler == "tpe",
    ) as run:
        for i in range(ASKS + 1):
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
    # Not getrusage: a new process begins with the peak of the one that started it.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(url: str, sampler: str, known: int) -> dict[str, float]:
    """Measure in a new process."""
    command = [sys.executable, "-m", "benchmarks.scale", "--here", url, sampler, str(known)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, or with --here be measured."""
    from storage.database import open_database

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", nargs="+", type=int, default=[100, 1000, 10_000])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--runs", type=int, default=3, help="processes, of which the median is taken")
    parser.add_argument("--here", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure_here(options.here[0], options.here[1], int(options.here[2]))))
        return
    print(f"{'sampler':8} {'trials':>7} {'open s':>8} {'resume s':>9} {'ask ms':>8} {'memory MiB':>11}")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        urls = {}
        for trials in options.trials:
            urls[trials] = f"sqlite:///{Path(folder)}/{trials}.db"
            with open_database(urls[trials]) as database:
                fill(database, "s", trials=trials, epochs=options.epochs)
        for sampler in SAMPLERS:
            for trials, url in urls.items():
                runs = [measure(url, sampler, trials) for _ in range(options.runs)]
                middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
                found[f"{sampler}/{trials}"] = {name: round(value, 4) for name, value in middle.items()}
                print(
                    f"{sampler:8} {trials:7,} {middle['open']:8.2f} {middle['resume']:9.2f} {1000 * middle['ask']:8.1f} "
                    f"{middle['memory'] / 2**20:11.0f}",
                    flush=True,
                )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
