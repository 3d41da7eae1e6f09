"""A table of our own problem: learning curves of random configurations of the extended search, trained by the service.

    uv run hpo run benchmarks/worth/fashion_mnist.yaml --data-dir D
    uv run python -m benchmarks.worth.fashion_mnist > benchmarks/worth/fashion_mnist.csv

A configuration that the table does not have gets the curve of the one that is most like it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from benchmarks.worth.task import Array, Curve
from hpo.api import read_results
from hpo.space.model import Space, load_space

FOLDER = Path(__file__).parent
STUDY = "fashion_mnist"


class FashionMnistTask:
    """The extended search with the published stem, 6 epochs on 2,000 images. See `benchmarks.worth.tables.Task`."""

    name = "fashion_mnist/extended"
    # The documented grid, and what `hpo.train:train` does by default.
    _published: Mapping[str, Any] = {
        "optimizer": "adam", "momentum": 0.8, "nesterov": False, "weight_decay": 0, "schedule": "constant",
        "label_smoothing": 0.0, "flip": False, "translate": 0, "erase": 0.0, "ema": 0,
    }  # fmt: skip
    small_grid: Mapping[str, Any] = {"batch_size": [64, 256, 512], "lr": 0.01, **_published}
    large_grid: Mapping[str, Any] = {"batch_size": [64, 128, 256, 512], "lr": [0.0001, 0.001, 0.01, 0.1], **_published}

    def __init__(self) -> None:
        with (FOLDER / "fashion_mnist.csv").open(newline="") as file:
            self._rows = list(csv.DictReader(file))

    @cached_property
    def _space(self) -> Space:
        return load_space(str(FOLDER / "fashion_mnist.yaml"))

    @property
    def max_epochs(self) -> int:
        """See `Task.max_epochs`."""
        return self._space.max_epochs

    @property
    def parameters(self) -> Mapping[str, Any]:
        """See `Task.parameters`."""
        settings: Mapping[str, Any] = self._space.model_dump(mode="json")["parameters"]
        return {name: {k: v for k, v in each.items() if v is not None} for name, each in settings.items()}

    def curve(self, params: Mapping[str, Any]) -> Curve:
        """See `Task.curve`."""
        distances = np.abs(self._known - self._encode(params)).sum(axis=1)
        return self._curves[int(distances.argmin())]

    @cached_property
    def _known(self) -> Array:
        """(configurations, coordinates)."""
        return np.array([self._encode(row) for row in self._rows])

    @cached_property
    def _curves(self) -> list[Curve]:
        epochs = range(1, self.max_epochs + 1)
        return [
            Curve(*(np.array([float(row[f"{name} {epoch}"]) for epoch in epochs]) for name in ("value", "seconds")))
            for row in self._rows
        ]

    def _encode(self, params: Mapping[str, Any]) -> list[float]:
        """Return coordinates: a range from 0 to 1, logarithmic if it is; two different choices are 1 apart."""
        coordinates = []
        for name, distribution in self._space.distributions().items():
            given = params[name]
            if isinstance(distribution, CategoricalDistribution):
                coordinates += [0.5 * _are_equal(choice, given) for choice in distribution.choices]
            elif isinstance(distribution, FloatDistribution | IntDistribution):
                low, high, value = distribution.low, distribution.high, float(given)
                if distribution.log:
                    low, high, value = np.log(low), np.log(high), np.log(value)
                coordinates.append((value - low) / (high - low))
        return coordinates


def _are_equal(choice: Any, given: Any) -> bool:
    """Return whether a choice is a value that may be written differently: 0 as `0.0`, False as `False`."""
    try:
        return float(choice) == float(given)
    except ValueError:
        return str(choice) == str(given)


def main() -> None:
    """Print the table of a study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="sqlite:///runs/hpo.db", help="the database of the study")
    options = parser.parse_args()
    results = read_results(STUDY, storage=options.storage)
    space = load_space(str(FOLDER / "fashion_mnist.yaml"))
    epochs = range(1, space.max_epochs + 1)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*space.parameters, *(f"{name} {epoch}" for name in ("value", "seconds") for epoch in epochs)])
    for trial in results.trials:
        if trial.state == "COMPLETE":
            values = [f"{100 * trial.epochs[epoch]['val_accuracy']:.1f}" for epoch in epochs]
            seconds = [f"{trial.epochs[epoch]['train_seconds']:.2f}" for epoch in epochs]
            params = [f"{value:.4g}" if isinstance(value, float) else value for value in trial.params.values()]
            writer.writerow([*params, *values, *seconds])


if __name__ == "__main__":
    main()
