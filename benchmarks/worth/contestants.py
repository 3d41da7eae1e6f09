"""The searches that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from benchmarks.worth.others import open_ray_tune, open_syne_tune
from benchmarks.worth.service import SOURCE, open_service
from benchmarks.worth.simulation import Search
from benchmarks.worth.task import Task

ENDLESS = {"gpu_hours": 1e6}
Opener = Callable[[Task, int, int], AbstractContextManager[Search]]  # of a task, a seed and the number of workers


@dataclass(frozen=True)
class Contestant:
    """A search that is compared with others.

    Attributes:
        open: opens it for a task, a seed and a number of workers.
        needs_epochs: whether it differs from another contestant only where there are learning curves.
        needs_grid: whether the task must have a grid.
    """

    open: Opener
    needs_epochs: bool = False
    needs_grid: bool = False


def _service(sampler: str, scheduler: Mapping[str, Any] | None = None, **settings: Any) -> Contestant:
    changes = {"sampler": sampler, **settings} | ({} if scheduler is None else {"scheduler": scheduler})
    return Contestant(
        lambda task, seed, workers: open_service(task, seed, workers, changes),
        needs_epochs=scheduler is not None,
        needs_grid="warm_start" in settings,
    )


def _auto(**settings: Any) -> Contestant:
    """Return what the service recommends: it chooses the sampler, and asha stops trials where there are learning curves."""

    def open_auto(task: Task, seed: int, workers: int) -> AbstractContextManager[Search]:
        scheduler = {"scheduler": "asha"} if task.max_epochs > 1 else {}
        # Device time ends a search here. A number of trials would be taken into account by the choice of the sampler.
        return open_service(task, seed, workers, {"sampler": "auto", "budget": ENDLESS, **scheduler, **settings})

    return Contestant(open_auto, needs_grid="warm_start" in settings)


def _grid(task: Task, seed: int, workers: int) -> AbstractContextManager[Search]:
    return open_service(task, seed, workers, {"sampler": "grid", "parameters": task.large_grid})


def _asha(grace_period: int, mode: str = "stop") -> dict[str, Any]:
    return {"name": "asha", "grace_period": grace_period, "mode": mode}


def _syne_tune(with_epochs: str, without: str) -> Contestant:
    return Contestant(lambda task, seed, workers: open_syne_tune(task, seed, with_epochs, without))


CONTESTANTS: dict[str, Contestant] = {
    "auto": _auto(),
    "auto, warm": _auto(warm_start=[SOURCE]),
    "auto, warm/3": _auto(warm_start=[{"study": SOURCE, "trials": "best 3"}]),
    "grid": Contestant(_grid, needs_grid=True),
    "random": _service("random"),
    "tpe": _service("tpe"),
    "gp": _service("gp"),
    **{f"random+asha/{grace}": _service("random", _asha(grace)) for grace in (1, 3, 6, 13)},
    **{f"tpe+asha/{grace}": _service("tpe", _asha(grace)) for grace in (1, 3, 6, 13)},
    **{f"gp+asha/{grace}": _service("gp", _asha(grace)) for grace in (3, 6, 13)},
    **{f"random+asha/{grace}, promote": _service("random", _asha(grace, "promote")) for grace in (1, 3, 6)},
    **{f"tpe+asha/{grace}, promote": _service("tpe", _asha(grace, "promote")) for grace in (1, 3, 6)},
    "random+hyperband": _service("random", {"name": "hyperband"}),
    "tpe+hyperband": _service("tpe", {"name": "hyperband"}),  # like BOHB
    "tpe+hyperband/1": _service("tpe", {"name": "hyperband", "grace_period": 1}),
    "tpe+median": _service("tpe", {"name": "median", "grace_period": 6}),
    "tpe, warm": _service("tpe", warm_start=[SOURCE]),
    "gp, warm": _service("gp", warm_start=[SOURCE]),
    "ray: optuna+asha": Contestant(lambda task, seed, workers: open_ray_tune(task, seed)),
    "syne: cqr": _syne_tune("ASHACQR", "CQR"),
    "syne: bore": _syne_tune("ASHABORE", "BORE"),
}


def contestants_of(task: Task, names: list[str]) -> list[str]:
    """Return those of some contestants that make sense for a task."""
    return [
        name
        for name in names
        if (task.max_epochs > 1 or not CONTESTANTS[name].needs_epochs)
        and (task.small_grid is not None or not CONTESTANTS[name].needs_grid)
    ]
