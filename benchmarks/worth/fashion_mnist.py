"""A table of our own problem: learning curves of random configurations of the extended search, trained by the service.

    uv run hpo run benchmarks/worth/fashion_mnist.yaml --data-dir D
    uv run python -m benchmarks.worth.fashion_mnist > benchmarks/worth/fashion_mnist.csv
    uv run python -m benchmarks.worth.fashion_mnist --check

Between the configurations of the table, a Gaussian process predicts the curve. The last command says how well, for
configurations that it has not seen, and compares it with the curve of the most similar one.
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.spatial.distance import cdist
from scipy.special import expit, logit
from scipy.stats import spearmanr
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern, WhiteKernel
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold

from benchmarks.worth.task import Array, Curve
from hpo.api import read_results
from hpo.space.model import Space, load_space

FOLDER = Path(__file__).parent
STUDY = "fashion_mnist"


class CurveModel:
    """Predicts curves by two Gaussian processes: one of the accuracies of all epochs, one of their seconds.

    Args:
        points: (configurations, coordinates), each from 0 to 1.
        curves: of these configurations; values in percent.
    """

    def __init__(self, points: Array, curves: Sequence[Curve]) -> None:
        self._values = _fit_gaussian_process(points, _to_logits(np.array([curve.values for curve in curves])))
        self._seconds = _fit_gaussian_process(points, np.log([curve.seconds for curve in curves]))

    def predict(self, points: Array) -> list[Curve]:
        """Return the curves of other configurations."""
        values, seconds = _from_logits(self._values.predict(points)), np.exp(self._seconds.predict(points))
        return [Curve(*each) for each in zip(values, seconds, strict=True)]


def _fit_gaussian_process(points: Array, targets: Array) -> GaussianProcessRegressor:
    """Return a process with a length scale for each coordinate."""
    kernel = 1.0 * Matern(np.ones(points.shape[1]), (1e-2, 1e3), nu=2.5) + WhiteKernel(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # that of a coordinate without influence grows to its bound
        return GaussianProcessRegressor(kernel, normalize_y=True).fit(points, targets)


def _to_logits(percent: Array) -> Array:
    """Return accuracies on a scale without ends, so that no prediction is below 0 or over 100 %."""
    return np.asarray(logit(np.clip(percent, 1.0, 99.0) / 100))


def _from_logits(logits: Array) -> Array:
    return np.asarray(100 * expit(logits))


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
        return self._model.predict(np.array([self._encode(params)]))[0]

    @cached_property
    def _model(self) -> CurveModel:
        return CurveModel(*self.known())

    def known(self) -> tuple[Array, list[Curve]]:
        """Return the table: (configurations, coordinates), and a curve for each."""
        epochs = range(1, self.max_epochs + 1)
        curves = [
            Curve(*(np.array([float(row[f"{name} {epoch}"]) for epoch in epochs]) for name in ("value", "seconds")))
            for row in self._rows
        ]
        return np.array([self._encode(row) for row in self._rows]), curves

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
    """Print the table of a study, or how well curves are predicted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="sqlite:///runs/hpo.db", help="the database of the study")
    parser.add_argument("--check", action="store_true", help="say how well curves are predicted, by cross-validation")
    options = parser.parse_args()
    if options.check:
        _check()
    else:
        _write_table(options.storage)


def _write_table(storage: str) -> None:
    results = read_results(STUDY, storage=storage)
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


def _check() -> None:
    """Print by how much better than the mean a curve's last value is predicted, each tenth of the table by the others."""
    points, curves = FashionMnistTask().known()
    last = np.array([curve.values[-1] for curve in curves])
    predicted, nearest = np.empty_like(last), np.empty_like(last)
    for known, unknown in KFold(10, shuffle=True, random_state=0).split(points):
        model = CurveModel(points[known], [curves[index] for index in known])
        predicted[unknown] = [curve.values[-1] for curve in model.predict(points[unknown])]
        nearest[unknown] = last[known][cdist(points[unknown], points[known], "cityblock").argmin(axis=1)]
    print(f"{len(last)} configurations; accuracy after the last epoch (R2, rank correlation)")
    for name, found in {"Gaussian process": predicted, "nearest configuration": nearest}.items():
        print(f"{name:22} {r2_score(last, found):5.2f} {spearmanr(last, found).statistic:5.2f}")


if __name__ == "__main__":
    main()
