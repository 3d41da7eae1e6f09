"""What a bounded history costs and does to TPE: see storage/history.py.

    uv run python -m benchmarks.tpe_history
    uv run python -m benchmarks.tpe_history --data DIR

Without --data, prints how long a draw takes in generated studies of SQLite: reading what changed, and TPE's own part. Each
study is measured in a new process. `first` is the first decision of a resume: open the database, read the history, draw.

With --data, a folder with LCBench's surrogate (YAHPO Gym's `model.onnx` and `encoding.json`), runs whole searches on it:
each of several tasks and seeds with the whole history and with each limit. A trial is the accuracy after 52 epochs.
Regret is the best accuracy known of the task, minus the best of the search so far, in percentage points. The best known is
that of all searches, and of 100,000 random configurations. Prints means over the searches, and the mean difference from the
whole history with its 95 % confidence interval: pairs have the same task and seed. `draws` is the mean accuracy of the last
fifth of the trials: it shows whether TPE's choices get worse even where the best trial is the same. Of some tasks, few
searches find a corner of the space that is far better than everything else, and decide the means: see the table of tasks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution, distribution_to_json
from optuna.samplers import TPESampler
from scipy import stats

from benchmarks.report import fill
from benchmarks.worth.tables import LCBENCH_EPOCHS, LCBENCH_PARAMETERS, LCBenchSurrogate
from benchmarks.worth.task import Array, space_of
from hpo.search.samplers import TPE_HISTORY, build_sampler
from hpo.space.model import Space
from storage import optuna_internals, optuna_tables
from storage.database import open_database
from storage.history import History
from storage.studies import find_study, open_study
from storage.study import Study

DRAWS = 25  # timed in each process
RANDOM_CONFIGURATIONS = 100_000  # for the best known accuracy
PARAMETERS: dict[str, BaseDistribution] = space_of(LCBENCH_PARAMETERS).distributions()
TASKS = ["3945", "7593", "34539", "126026", "146212", "167149", "167181", "168331", "189354", "189908"]


# --- cost ---------------------------------------------------------------------------------------------------------


def measure_here(url: str, limit: int) -> dict[str, float]:
    """Return the seconds of the `first` decision, and the medians of later ones: `refresh` and `draw`."""
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    with open_database(url) as database:
        stored = find_study(database, "s")
        assert stored is not None
        space = Space.from_settings(stored.settings | {"sampler": {"name": "tpe", "seed": 0}})
        history = History(stored, limit)
        study = _study_in_memory(build_sampler(space, 1), history)
        refreshes, draws = [], []
        for i in range(DRAWS + 1):
            begin = time.perf_counter()
            history.refresh()
            refreshed = time.perf_counter()
            trial = study.ask()
            space.draw(trial)
            drawn = time.perf_counter()
            if i == 0:
                first = drawn - started
            else:
                refreshes.append(refreshed - begin)
                draws.append(drawn - refreshed)
            _store(stored, 1_000_000 + i, trial.params, trial.distributions, 0.5)  # the history has to read it
    return {"first": first, "refresh": statistics.median(refreshes), "draw": statistics.median(draws)}


def measure_cost(sizes: list[int], limit: int, runs: int) -> None:
    """Print the cost of a draw in studies of several sizes."""
    print(f"{'trials':>7} {'first s':>8} {'refresh ms':>11} {'draw ms':>8} {'sum ms':>7}")
    with tempfile.TemporaryDirectory(prefix="tpe-history-") as folder:
        for trials in sizes:
            path, copy = Path(folder, f"{trials}.db"), Path(folder, "copy.db")
            with open_database(f"sqlite:///{path}") as database:
                fill(database, "s", trials=trials, epochs=50)
            measured = []
            for _ in range(runs):
                shutil.copy(path, copy)  # the draws are stored
                command = [sys.executable, "-m", "benchmarks.tpe_history", "--here", f"sqlite:///{copy}", str(limit)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr[-2000:])
                measured.append(json.loads(done.stdout.splitlines()[-1]))
            first, refresh, draw = (statistics.median(each[name] for each in measured) for name in measured[0])
            print(
                f"{trials:7,} {first:8.2f} {1000 * refresh:11.2f} {1000 * draw:8.2f} {1000 * (refresh + draw):7.2f}",
                flush=True,
            )


# --- regret -------------------------------------------------------------------------------------------------------


def best_random(folder: Path, task: str) -> float:
    """Return the best accuracy among random configurations."""
    rng = np.random.default_rng(0)
    columns = []
    for distribution in PARAMETERS.values():
        assert isinstance(distribution, IntDistribution | FloatDistribution)
        low, high = distribution.low, distribution.high
        uniform = rng.random(RANDOM_CONFIGURATIONS)
        values = (
            np.exp(np.log(low) + uniform * np.log(high / low)) if distribution.log else low + uniform * (high - low)
        )
        columns.append(np.round(values) if isinstance(distribution, IntDistribution) else values)
    rows = np.stack(columns, axis=1).tolist()
    surrogate = LCBenchSurrogate(folder)
    return float(max(_accuracy(surrogate, task, rows[i : i + 5000]).max() for i in range(0, len(rows), 5000)))


def _accuracy(surrogate: LCBenchSurrogate, task: str, rows: list[list[float]]) -> Array:
    """Return the accuracy after the last epoch of configurations, each a list of values in the order of PARAMETERS."""
    accuracies, _ = surrogate.predict(task, np.array([[LCBENCH_EPOCHS, *row] for row in rows]))
    return accuracies


def search(job: tuple[Path, str, int, int, int]) -> Array:
    """Run one search; return the accuracy of each trial.

    Args:
        job: the surrogate's folder, the task, the seed, the limit of the history (0 for the whole one), the trials.
    """
    folder, task, seed, limit, trials = job
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    surrogate = LCBenchSurrogate(folder)
    found = np.empty(trials)
    with (
        tempfile.TemporaryDirectory(prefix="tpe-history-") as temporary,
        open_database(f"sqlite:///{temporary}/hpo.db") as database,
    ):
        stored = open_study(database, "s", direction="maximize", fingerprint="f", settings={"metric": "accuracy"})
        history = History(stored, limit) if limit else None
        study = _study_in_memory(TPESampler(seed=seed), history)
        for number in range(trials):
            if history is not None:
                history.refresh()
            trial = study.ask(PARAMETERS)
            found[number] = _accuracy(surrogate, task, [[trial.params[name] for name in PARAMETERS]])[0]
            study.tell(trial, found[number])
            if history is not None:
                _store(stored, number, trial.params, PARAMETERS, found[number])
    return found


def compare(
    folder: Path, limits: list[int], tasks: list[str], seeds: int, trials: int, processes: int, save: Path | None
) -> None:
    """Run the searches of each limit and print their regret; save the accuracy of each trial if there is a path."""
    pairs = [(task, seed) for task in tasks for seed in range(seeds)]
    jobs = [(folder, task, seed, limit, trials) for task, seed in pairs for limit in (0, *limits)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        known = dict(zip(tasks, pool.starmap(best_random, [(folder, task) for task in tasks]), strict=True))
        results = {job[1:4]: values for job, values in zip(jobs, pool.map(search, jobs, chunksize=1), strict=True)}
    for (task, _, _), values in results.items():
        known[task] = max(known[task], float(values.max()))
    if save is not None:
        named = {
            f"{task}/{seed}/{limit or 'whole'}": values.tolist() for (task, seed, limit), values in results.items()
        }
        save.write_text(json.dumps(named))
    print(f"{len(pairs)} pairs of task and seed")
    print(
        f"{'history':>8} {'measure':>8} {'mean':>9} {'difference from whole':>22} {'better':>7} {'equal':>6} {'worse':>6}"
    )
    for budget in [*(trials * i // 8 for i in (1, 2, 4, 6, 8)), 0]:
        measured = {
            limit: np.array([_measure(results[task, seed, limit], known[task], budget) for task, seed in pairs])
            for limit in (0, *limits)
        }
        for limit, values in measured.items():
            line = f"{limit or 'whole':>8} {budget or 'draws':>8} {values.mean():9.4f}"
            if limit and len(pairs) > 1:
                differences = values - measured[0]
                half_width = stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(differences)
                gains = -differences if budget else differences
                counts = f"{(gains > 0).sum():7} {(gains == 0).sum():6} {(gains < 0).sum():6}"
                line += f" {differences.mean():+11.4f} +- {half_width:.4f} {counts}"
            print(line, flush=True)
    print(f"{'task':>8} {'known':>8}  regret of each seed after {trials} trials")
    for task in tasks:
        for limit in (0, *limits):
            regrets = [_measure(results[task, seed, limit], known[task], trials) for seed in range(seeds)]
            print(f"{task:>8} {known[task]:8.2f} {limit or 'whole':>8} " + " ".join(f"{each:8.3f}" for each in regrets))


def _measure(values: Array, known: float, budget: int) -> float:
    """Return the regret after so many trials; for 0, the mean of the last fifth of the trials."""
    return known - float(values[:budget].max()) if budget else float(values[-len(values) // 5 :].mean())


def _study_in_memory(sampler: optuna.samplers.BaseSampler, history: History | None) -> optuna.Study:
    """Return a study whose new trials are in memory, so that only the draw itself is measured."""
    study = optuna.create_study(direction="maximize", sampler=sampler)
    if history is not None:
        optuna_internals.show_trials(study, history.trials)
    return study


def _store(
    study: Study, number: int, params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution], value: float
) -> None:
    """Store a completed trial, in much less time than Optuna takes."""
    trial_id = number + 1  # the study is the only one
    rows = [
        {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": distributions[name].to_internal_repr(param),
            "distribution_json": distribution_to_json(distributions[name]),
        }
        for name, param in params.items()
    ]
    trial = {"trial_id": trial_id, "number": number, "study_id": study.study_id, "state": "COMPLETE"}
    final = {"trial_id": trial_id, "objective": 0, "value": float(value), "value_type": "FINITE"}
    with study.database.engine.begin() as connection:
        connection.execute(optuna_tables.trials.insert(), trial)
        connection.execute(optuna_tables.trial_values.insert(), final)
        connection.execute(optuna_tables.trial_params.insert(), rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of LCBench's surrogate; compares results")
    parser.add_argument("--limits", nargs="+", type=int, default=[TPE_HISTORY], help="of finished trials that TPE sees")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="OpenML tasks of LCBench")
    parser.add_argument("--seeds", type=int, default=2, help="searches of each task and limit")
    parser.add_argument("--trials", type=int, default=2000, help="of each search")
    parser.add_argument("--processes", type=int, default=2, help="searches at a time")
    parser.add_argument("--sizes", nargs="+", type=int, default=[100, 1000, 10_000], help="trials, without --data")
    parser.add_argument("--runs", type=int, default=3, help="processes per size, without --data; medians are printed")
    parser.add_argument("--save", type=Path, metavar="FILE.json", help="the accuracy of each trial, with --data")
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure_here(options.here[0], int(options.here[1]))))
    elif options.data is None:
        for limit in options.limits:
            print(f"history of at most {limit} finished trials")
            measure_cost(options.sizes, limit, options.runs)
    else:
        compare(
            options.data, options.limits, options.tasks, options.seeds, options.trials, options.processes, options.save
        )


if __name__ == "__main__":
    main()
