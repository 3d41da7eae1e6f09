"""The published results of the documented grid, to compare with a study that repeats it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.report.results import Results

if TYPE_CHECKING:
    from hpo.space.model import Space
    from storage.records import Metrics

PUBLISHED_DIR = Path(__file__).parent / "published"
PUBLISHED_PARAMS = {"batch_size", "lr"}
PUBLISHED_IMAGES = 60_000  # for training; none were held out: the accuracies are multiples of 1 / 60,000


@dataclass(frozen=True)
class Published:
    """The published results of one trial. Accuracies are in [0, 1].

    Attributes:
        epochs: {epoch: {train_loss, train_accuracy}}, averaged over the epoch's training steps.
        test_accuracy: after the last epoch.
        seconds: duration of the whole trial.
    """

    epochs: Metrics
    test_accuracy: float
    seconds: float


def match_published(results: Results) -> dict[int, Published]:
    """Return {trial number: published results of the same configuration}.

    Empty unless the study is the documented search: our trainable on all of Fashion-MNIST, with no other parameters than
    batch size and learning rate.
    """
    if results.space is None or not _is_documented_search(results.space):
        return {}
    if any(trial.params.keys() != PUBLISHED_PARAMS for trial in results.trials):
        return {}
    published = read_published()
    keys = {trial.number: (trial.params["batch_size"], trial.params["lr"]) for trial in results.trials}
    return {number: published[key] for number, key in keys.items() if key in published}


def _is_documented_search(space: Space) -> bool:
    return (
        space.is_default_trainable
        and space.data.dataset == "fashion_mnist"
        and space.data.train_samples is None
        and space.parameters.keys() == PUBLISHED_PARAMS
        and not space.derived
    )


def describe_images(space: Space) -> str:
    """Return a sentence about the images that a repetition of the documented search holds out; empty if there are none."""
    held_out = space.data.val_samples
    if held_out == 0:
        return ""
    return (
        f"This study trains on {PUBLISHED_IMAGES - held_out:,} of these images and holds out {held_out:,} for validation; "
        "with data.val_samples 0 it would train on all."
    )


def read_published() -> dict[tuple[int, float], Published]:
    """Return {(batch_size, lr): published results}."""
    tests = {_key(row): float(row["Test Accuracy"]) for row in _rows("documented_grid_test.csv")}
    epochs: dict[tuple[int, float], Metrics] = {}
    seconds: dict[tuple[int, float], float] = {}
    for row in _rows("documented_grid_train.csv"):
        accuracy = float(row["Train Accuracy"]) / 100  # published in percent
        metrics = {"train_loss": float(row["Train Loss"]), "train_accuracy": accuracy}
        epochs.setdefault(_key(row), {})[int(row["Epoch"])] = metrics
        seconds[_key(row)] = float(row["Run Duration"])  # since the start of the trial: the last row counts
    return {key: Published(epochs[key], tests[key], seconds[key]) for key in tests}


def _rows(name: str) -> Iterable[dict[str, str]]:
    with (PUBLISHED_DIR / name).open(newline="") as file:
        yield from csv.DictReader(file)


def _key(row: Mapping[str, str]) -> tuple[int, float]:
    return int(row["batch_size"]), float(row["lr"])
