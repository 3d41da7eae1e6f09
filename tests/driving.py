"""A whole search in this process: the bridge, storage and the worker's side of each trial, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpo.plan import Slots
from hpo.run import _check_trainable
from hpo.search import Bridge, build_pruner, build_sampler
from hpo.space import Space
from hpo.worker import run_trial
from storage.database import Database
from storage.runs import Run
from storage.studies import Study, open_study


class Notes:
    """A view that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def trial_started(self, number: int, params: Any, epoch: int, max_epochs: int) -> None:
        self.told.append(("started", number, epoch))

    def epoch_ended(self, number: int, epoch: int, metrics: Any) -> None:
        self.told.append(("epoch", number, epoch))

    def trial_ended(self, number: int, state: str, text: str) -> None:
        self.told.append((state, number, text))

    def note(self, text: str) -> None:
        self.told.append(("note", text))


def drive(space: Space, database: Database, folder: Path, *, side_by_side: int = 1) -> tuple[Study, Notes]:
    """Run a search to its end, an epoch of each running trial in turn."""
    _check_trainable(space, folder)
    study = open_study(database, **space.study_options)
    view = Notes()
    is_grid = space.sampler.name == "grid"
    study.optuna.pruner = build_pruner(space)
    run = Run(
        study,
        key_of=space.key,
        provenance={},
        draw=None if is_grid else space.draw,
        max_trials=space.budget.trials,
        learns=space.sampler.name not in {"grid", "random", "qmc"},
    )
    with run:
        if is_grid:
            run.enqueue(space.grid(), space.distributions())
        else:
            study.optuna.sampler = build_sampler(space, run.run)
        bridge = Bridge(space, run, Slots(1, 1.0, 0.0), data_dir=folder, checkpoints=folder / "checkpoints", view=view)
        running: dict[str, Any] = {}
        while running or not bridge.nothing_left:
            while len(running) < side_by_side:
                tune_id = f"t{len(view.told)}"
                assignment = bridge.next_assignment(tune_id)
                if assignment is None:
                    break
                running[tune_id] = run_trial(assignment)
            for tune_id, messages in list(running.items()):
                if bridge.on_message(tune_id, next(messages)):
                    messages.close()
                    del running[tune_id]
        assert bridge.error is None
    return study, view
