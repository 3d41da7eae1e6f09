"""Overhead of the service per trial: wall time, and CPU time of the driver.

    uv run python -m benchmarks.overhead

Trials do no work and report five epochs. The contestants run in turns, each in a new process:

    hpo                     the service: Tune, workers, leases, checkpoints, and every metric in SQLite
    tune                    Ray Tune only, actors reused: random search, no database, a function that calls `tune.report`
    tune-bare               the same with a class, and without the loggers that Tune starts by default: Tune's minimum
    tune+optuna             Ray Tune with OptunaSearch on SQLite, actors reused
    tune+optuna+checkpoint  the same with a checkpoint reported each epoch: the epoch's number and metric, as hpo stores
    tune+optuna-new         without checkpoints and reuse: each trial starts a worker, which imports torch as ours do
    optuna                  Optuna on SQLite in one process, without workers

The cost per trial is the slope from the end of the 20th trial (of the second without reuse) to the end of the last one,
which leaves out the start of Ray and of the workers. Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPORTS = 5
SLOTS = 2  # trials at a time
SLOW = "tune+optuna-new"  # runs 8 trials, the others 200
Mark = Callable[[], None]  # called as each trial ends


# --- the contestants ----------------------------------------------------------------------------------------------


def run_hpo(trials: int, folder: Path, mark: Mark) -> None:
    """Run the trials as `hpo run` does, without its preparations and its report."""
    from hpo.paths import RunsDir
    from hpo.search.cluster.connection import RayCluster
    from hpo.search.earlier.continuation import ContinuationPlan
    from hpo.search.listener import NullListener
    from hpo.search.slots import plan_slots
    from hpo.search.tune import run_trials
    from hpo.space.model import load_space
    from storage.database import open_database
    from storage.studies import open_study

    class TrialEnds(NullListener):
        def trial_ended(self, number: int, state: str, text: str) -> None:
            mark()

        def note(self, text: str) -> None:
            print(text, file=sys.stderr)

    path = folder / "noop.yaml"
    path.write_text(
        "trainable: benchmarks.torch_noop:noop\nmetric: value\nsampler: random\n"
        f"max_epochs: {REPORTS}\nbudget: {{trials: {trials}}}\nresources: {{cpu: 1}}\n"
        "parameters: {x: {type: float, low: 0.0, high: 1.0}}\n"
    )
    space = load_space(str(path))
    with open_database(f"sqlite:///{folder}/hpo.db") as database, RayCluster(None) as cluster:
        cluster.start()
        study = open_study(database, **space.study_options)
        run_trials(
            ContinuationPlan(space),
            cluster,
            study,
            plan_slots(space, None, cluster.nodes()),
            provenance={},
            data=space.trainable_data(folder),
            runs_dir=RunsDir(folder),
            listener=TrialEnds(),
        )


def run_tune(
    trials: int,
    folder: Path,
    mark: Mark,
    *,
    optuna: bool = False,
    checkpoint: bool = False,
    reuse: bool = True,
    bare: bool = False,
) -> None:
    """Run the trials with Ray Tune, with or without its OptunaSearch and its checkpoints."""
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    if bare:
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    import ray
    from ray import tune

    class Noop(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            import torch  # noqa: F401 # as the workers of hpo do

            self.x, self.epoch = config["x"], 0

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.x, self.epoch = new_config["x"], 0
            return True

        def step(self) -> dict[str, Any]:
            self.epoch += 1
            return {"value": self.x * self.epoch}

    def noop(config: dict[str, Any]) -> None:
        import torch  # noqa: F401

        for epoch in range(1, REPORTS + 1):
            tune.report({"value": config["x"] * epoch})

    # A function: with a class, Tune asks the worker for each checkpoint in a further call, which takes longer. All
    # checkpoints are kept: Tune takes longer to delete them.
    def noop_with_checkpoints(config: dict[str, Any]) -> None:
        import torch  # noqa: F401

        for epoch in range(1, REPORTS + 1):
            metrics = {"value": config["x"] * epoch}
            with tempfile.TemporaryDirectory() as state:
                Path(state, "state.json").write_text(json.dumps({"epoch": epoch, **metrics}))
                tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(state))

    class Clock(tune.Callback):
        def on_trial_complete(self, *_: Any, **__: Any) -> None:
            mark()

    search = None
    if optuna:
        from optuna.samplers import RandomSampler
        from optuna.storages import RDBStorage
        from ray.tune.search.optuna import OptunaSearch

        search = OptunaSearch(
            metric="value", mode="max", sampler=RandomSampler(), storage=RDBStorage(f"sqlite:///{folder}/optuna.db"),
            study_name="noop",
        )  # fmt: skip
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.CRITICAL}
    ray.init(address="local", object_store_memory=100 * 2**20, **options)
    tune.run(
        Noop if bare else noop_with_checkpoints if checkpoint else noop,
        config={"x": tune.uniform(0.0, 1.0)}, search_alg=search, num_samples=trials,
        stop={"training_iteration": REPORTS}, max_concurrent_trials=SLOTS, resources_per_trial={"cpu": 1},
        reuse_actors=reuse, storage_path=str(folder),
        callbacks=[Clock()], verbose=0,
    )  # fmt: skip
    ray.shutdown()
    if checkpoint and (written := len(list(folder.rglob("state.json")))) != trials * REPORTS:
        raise SystemExit(f"{written} checkpoints were written instead of {trials * REPORTS}")


def run_optuna(trials: int, folder: Path, mark: Mark) -> None:
    """Run the trials with `optuna.Study.optimize`."""
    import optuna

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0.0, 1.0)
        for epoch in range(1, REPORTS + 1):
            trial.report(x * epoch, epoch)
            trial.should_prune()
        return x * REPORTS

    optuna.logging.disable_default_handler()
    study = optuna.create_study(
        storage=f"sqlite:///{folder}/optuna.db", direction="maximize", sampler=optuna.samplers.RandomSampler()
    )
    study.optimize(objective, n_trials=trials, callbacks=[lambda *_: mark()])


CONTESTANTS: dict[str, Callable[[int, Path, Mark], None]] = {
    "hpo": run_hpo,
    "tune": run_tune,
    "tune-bare": lambda trials, folder, mark: run_tune(trials, folder, mark, bare=True),
    "tune+optuna": lambda trials, folder, mark: run_tune(trials, folder, mark, optuna=True),
    "tune+optuna+checkpoint": lambda trials, folder, mark: run_tune(trials, folder, mark, optuna=True, checkpoint=True),
    "tune+optuna-new": lambda trials, folder, mark: run_tune(trials, folder, mark, optuna=True, reuse=False),
    "optuna": run_optuna,
}


# --- measuring ----------------------------------------------------------------------------------------------------


def measure_here(name: str) -> dict[str, float]:
    """Run a contestant in this process; return the seconds per trial: `wall`, and `cpu` of this process."""
    ends: list[tuple[float, float]] = []
    skip, trials = (2, 8) if name == SLOW else (20, 200)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        CONTESTANTS[name](trials, Path(folder), lambda: ends.append((time.perf_counter(), time.process_time())))
    (wall, cpu), (wall_end, cpu_end) = ends[skip - 1], ends[-1]
    measured = len(ends) - skip
    return {"wall": (wall_end - wall) / measured, "cpu": (cpu_end - cpu) / measured}


def measure(name: str) -> dict[str, float]:
    """Run a contestant in a new process; see `measure_here`."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--here", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of each contestant; the medians are printed")
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--here", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure_here(options.here)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    for _ in range(options.runs):
        for name in options.only:
            runs[name].append(measure(name))
    print(f"{'':24} {'wall ms per trial':>18} {'driver CPU ms per trial':>24}")
    milliseconds: dict[str, dict[str, float]] = {}
    for name, measured in runs.items():
        medians = {kind: 1000 * statistics.median(run[kind] for run in measured) for kind in ("wall", "cpu")}
        print(f"{name:24} {medians['wall']:18.1f} {medians['cpu']:24.1f}")
        milliseconds[name] = {kind: round(value, 1) for kind, value in medians.items()}
    ratios = {}
    if "hpo" in milliseconds:
        wall = milliseconds["hpo"]["wall"]
        ratios = {f"hpo/{name}": round(wall / each["wall"], 3) for name, each in milliseconds.items()}
    print(json.dumps({"ms": milliseconds, "wall_ratio": ratios}))


if __name__ == "__main__":
    main()
