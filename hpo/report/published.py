"""The published results of the documented grid, shown beside those of a study that repeats it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.report.results import Results
from hpo.trainable import DEFAULT_TRAINABLE

if TYPE_CHECKING:
    from storage.tables import Metrics

PUBLISHED_DIR = Path(__file__).parent / "published"


@dataclass(frozen=True)
class Published:
    """A trial as it was published. Accuracies in [0, 1].

    Attributes:
        epochs: {epoch: {train_loss, train_accuracy}}, as the weights moved.
        test_accuracy: after the last epoch.
        seconds: of the whole trial.
    """

    epochs: Metrics
    test_accuracy: float
    seconds: float


def match_published(results: Results) -> dict[int, Published]:
    """Return {trial number: its published twin}; empty unless the study is the documented search on all of its data."""
    data = results.settings.get("data", {})
    if (
        results.settings.get("trainable") != DEFAULT_TRAINABLE
        or data.get("dataset") != "fashion_mnist"
        or data.get("train_samples") is not None
        or any(set(trial.params) != {"batch_size", "lr"} for trial in results.trials)
    ):
        return {}
    published = read_published()
    keys = {trial.number: (trial.params["batch_size"], trial.params["lr"]) for trial in results.trials}
    return {number: published[key] for number, key in keys.items() if key in published}


def read_published() -> dict[tuple[int, float], Published]:
    """Return {(batch_size, lr): the published trial}."""
    tests = {_key(row): float(row["Test Accuracy"]) for row in _rows("documented_grid_test.csv")}
    epochs: dict[tuple[int, float], Metrics] = {}
    seconds: dict[tuple[int, float], float] = {}
    for row in _rows("documented_grid_train.csv"):
        accuracy = float(row["Train Accuracy"]) / 100  # published in percent
        metrics = {"train_loss": float(row["Train Loss"]), "train_accuracy": accuracy}
        epochs.setdefault(_key(row), {})[int(row["Epoch"])] = metrics
        seconds[_key(row)] = float(row["Run Duration"])  # since the run's start: the last one stands
    return {key: Published(epochs[key], tests[key], seconds[key]) for key in tests}


def _rows(name: str) -> Iterable[dict[str, str]]:
    with (PUBLISHED_DIR / name).open(newline="") as file:
        yield from csv.DictReader(file)


def _key(row: Mapping[str, str]) -> tuple[int, float]:
    return int(row["batch_size"]), float(row["lr"])
