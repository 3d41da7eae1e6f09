"""Studies for the tests of the report: a finished grid as a run leaves it, and studies of other programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from hpo.report.reading import read_results
from hpo.report.results import Results
from hpo.space.model import Space
from storage import tables
from storage.database import Database, open_database
from storage.ownership import ClaimedTrial
from storage.studies import find_study
from storage.study import Study
from tests.factories import finish_study

Direction = Literal["minimize", "maximize"]

GRID = {
    "name": "grid",
    "sampler": {"name": "grid"},
    "max_epochs": 4,
    "parameters": {"batch_size": [64, 256, 512], "lr": 0.01},
}
HOSTILE = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>|*a*"


def grid_space(**changes: Any) -> Space:
    """The documented grid with four epochs, with changes."""
    return Space.model_validate(GRID | changes)


def epoch_metrics(params: Mapping[str, Any], epoch: int) -> dict[str, float]:
    worth = 1.0 / params["batch_size"] + epoch / 10
    return {
        "train_loss": 1 / worth,
        "train_accuracy": 0.5 + worth / 4,
        "val_loss": 1.1 / worth,
        "val_accuracy": 0.4 + worth / 4,
        "train_seconds": 2.0,
        "epoch_seconds": 2.5,
        "images_per_second": 1000.0,
    }


def finish_grid(database: Database, *, gpu: float = 1.0, **changes: Any) -> Study:
    """Create a finished grid, as a run leaves it. Batch size 64 is the best."""
    space = grid_space(**changes)

    def epochs_of(claim: ClaimedTrial) -> list[dict[str, float]]:
        epochs = [epoch_metrics(claim.params, epoch) for epoch in range(1, space.max_epochs + 1)]
        epochs[-1] |= {"test_accuracy": epochs[-1]["val_accuracy"] - 0.01, "test_loss": 1.0}
        return epochs

    study = finish_study(
        database,
        space,
        space.grid_points(),
        provenance={"command": "hpo run grid", "packages": {"torch": "2"}},
        device={"device": "cuda", "device_name": "a GPU", "gpu": gpu},
        epochs_of=epochs_of,
    )
    with database.engine.begin() as connection:  # each epoch, and 2 s around them
        connection.execute(tables.usage.update().values(device="cuda", devices=gpu, seconds=2.5 * space.max_epochs + 2))
    return study


def finish_grid_in(folder: Path, **changes: Any) -> Results:
    """Return the results of a finished grid in a database of `folder`, which is closed again."""
    with open_database(f"sqlite:///{folder}/hpo.db") as database:
        return read_results(finish_grid(database, **changes))


def optuna_study(
    database: Database, name: str = "plain", directions: tuple[Direction, ...] = ("minimize",)
) -> optuna.Study:
    """Create a study with Optuna only, as another program does."""
    return optuna.create_study(study_name=name, storage=database.optuna_storage, directions=list(directions))


def add_trial(study: optuna.Study, state: str, values: list[float] | None = None, **options: Any) -> None:
    """Add a trial with Optuna only."""
    params = options.pop("params", {"x": len(study.trials) / 10, "kind": "ab"[len(study.trials) % 2]})
    distributions: dict[str, BaseDistribution] = {
        name: FloatDistribution(0, 100) if isinstance(value, float) else CategoricalDistribution(["a", "b", HOSTILE])
        for name, value in params.items()
    }
    study.add_trial(
        create_trial(state=TrialState[state], values=values, params=params, distributions=distributions, **options)
    )


def read(database: Database, name: str = "plain") -> Results:
    """Return the results of a study by name."""
    study = find_study(database, name)
    assert study is not None
    return read_results(study)
