"""What the searches of a log show: regret by device time, device time to the grid's best, and who is significantly worse."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from benchmarks.worth.simulation import Trajectory

BUDGETS = (3, 6, 12, 24)  # full trainings
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Run:
    """One search of the log.

    Attributes:
        task: its name.
        contestant: its name.
        workers: how many trials ran at a time.
        seed: of the search.
        full_seconds: device time of a full training of this task.
        trajectory: what was found when.
        cpu_seconds: what the search itself cost.
    """

    task: str
    contestant: str
    workers: int
    seed: int
    full_seconds: float
    trajectory: Trajectory
    cpu_seconds: float


def regrets(runs: Sequence[Run], known: Mapping[str, float], trainings: float) -> dict[tuple[str, str], list[float]]:
    """Return {(task, contestant): regret of each seed} after the device time of so many full trainings.

    Regret is the best value known of a task minus the best that the search has found, of any epoch. A search that has found
    nothing yet has the regret of the worst one that has.

    Args:
        runs: with one number of workers.
        known: {task: best value known}.
        trainings: the device time.
    """
    found: dict[tuple[str, str], list[float | None]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.seed):
        best = run.trajectory.best_at(trainings * run.full_seconds)
        found[run.task, run.contestant].append(None if best is None else known[run.task] - best)
    worst = {
        task: max((r for (of, _), rs in found.items() if of == task for r in rs if r is not None), default=0.0)
        for task in known
    }
    return {key: [worst[key[0]] if r is None else r for r in of_seeds] for key, of_seeds in found.items()}


def print_figures(runs: Sequence[Run], known: Mapping[str, float], reference: str) -> None:
    """Print the tables of a log.

    Args:
        runs: all searches.
        known: {task: best value known}.
        reference: the contestant that the others are compared with.
    """
    tables = sorted({run.task.partition("/")[0] for run in runs})
    for table in tables:
        for workers in sorted({run.workers for run in runs}):
            chosen = [run for run in runs if run.workers == workers and run.task.startswith(f"{table}/")]
            if chosen:
                _print_table(chosen, known, reference, f"{table}, {workers} workers")


def _print_table(runs: Sequence[Run], known: Mapping[str, float], reference: str, title: str) -> None:
    names = sorted({run.contestant for run in runs})
    tasks = sorted({run.task for run in runs})
    seeds = {len({run.seed for run in runs if run.contestant == name}) for name in names}
    units = "tasks" if len(tasks) > 1 else "seeds"
    print(
        f"\n{title}: {len(tasks)} tasks, {min(seeds)} seeds. Mean regret +- standard error over {units}, mean rank in (),"
    )
    print(f"after the device time of so many full trainings; * is significantly worse than {reference}, ! better")
    by_budget = {budget: regrets(runs, known, budget) for budget in BUDGETS}
    ranks = {budget: _mean_ranks(found, names, tasks) for budget, found in by_budget.items()}
    print(f"{'':>22} " + " ".join(f"{budget:>21}" for budget in BUDGETS) + f" {'trials':>7} {'CPU s':>6}")
    for name in sorted(names, key=lambda name: ranks[BUDGETS[-1]].get(name, np.inf)):
        cells = []
        for budget, found in by_budget.items():
            values = list(_independent(found, name, tasks).values())
            error = stats.sem(values) if len(values) > 1 else float("nan")
            mark = _mark(found, name, reference, tasks)
            cells.append(
                f"{statistics.fmean(values):8.3f} +-{error:6.3f}{mark}({ranks[budget].get(name, np.nan):4.1f})"
            )
        of_name = [run for run in runs if run.contestant == name]
        trials = statistics.fmean(run.trajectory.trials for run in of_name)
        cpu = statistics.fmean(run.cpu_seconds for run in of_name)
        print(f"{name:>22} " + " ".join(f"{cell:>21}" for cell in cells) + f" {trials:7.1f} {cpu:6.2f}")
    if "grid" in names:
        _print_speedups(runs, names, tasks)


def _mean_ranks(
    found: Mapping[tuple[str, str], Sequence[float]], names: Sequence[str], tasks: Sequence[str]
) -> dict[str, float]:
    """Return the mean rank of each contestant, over the tasks that all have run; 1 is the best."""
    common = [task for task in tasks if all((task, name) in found for name in names)]
    if not common:
        return {}
    ranks = [stats.rankdata([statistics.fmean(found[task, name]) for name in names]) for task in common]
    return dict(zip(names, np.mean(ranks, axis=0).tolist(), strict=True))


def _mark(found: Mapping[tuple[str, str], Sequence[float]], name: str, reference: str, tasks: Sequence[str]) -> str:
    """Return whether a contestant is significantly worse (*) or better (!) than the reference.

    The test is Wilcoxon's signed-rank test, two-sided.
    """
    values, others = _independent(found, name, tasks), _independent(found, reference, tasks)
    differences = [value - others[key] for key, value in values.items() if key in others]
    if name == reference or len(differences) < 6 or not any(differences):  # with 5, nothing can be significant
        return " "
    if stats.wilcoxon(differences).pvalue >= SIGNIFICANCE:
        return " "
    # Not the median: if a search differs on few tasks only, that is 0.
    return "*" if stats.wilcoxon(differences, alternative="greater").pvalue < 0.5 else "!"


def _independent(
    found: Mapping[tuple[str, str], Sequence[float]], name: str, tasks: Sequence[str]
) -> dict[str | int, float]:
    """Return the regrets of a contestant that are independent of each other: {task: mean of its seeds}.

    The seeds of a task say nothing about other tasks. Of one task alone, it is {number of the seed: regret}.
    """
    if len(tasks) == 1:
        return dict(enumerate(found.get((tasks[0], name), [])))
    return {task: statistics.fmean(found[task, name]) for task in tasks if (task, name) in found}


def _print_speedups(runs: Sequence[Run], names: Sequence[str], tasks: Sequence[str]) -> None:
    """Print how much device time each contestant needs for the grid's best value, as a share of the grid's own."""
    print("device time to the best value of the grid, as a share of the grid's; median over tasks and seeds, (reached)")
    of_grid: dict[str, tuple[float, float]] = {}  # {task: (best, when)}
    for run in runs:
        if run.contestant == "grid" and run.trajectory.values:
            end = BUDGETS[-1] * run.full_seconds
            best = run.trajectory.best_at(end)
            assert best is not None
            of_grid.setdefault(run.task, (best, end))
    for name in names:
        shares = []
        for run in runs:
            if run.contestant == name and run.task in of_grid:
                best, seconds = of_grid[run.task]
                reached = [
                    at for at, value in zip(run.trajectory.seconds, run.trajectory.values, strict=True) if value >= best
                ]
                shares.append(reached[0] / seconds if reached and reached[0] <= seconds else float("inf"))
        if shares:
            part = sum(np.isfinite(shares)) / len(shares)
            print(f"{name:>22} {statistics.median(shares):7.3f} ({part:4.0%})")
