"""The contract between the service and the user's training code. It does not import torch or ray.

A trainable is a generator function that trains one configuration and yields an `EpochReport` after each epoch.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from hpo.errors import TrainableError, nearest

DEFAULT_TRAINABLE = "hpo.train:train"
STDERR_SUFFIX = "_stderr"  # of the standard error of a metric's mean over several seeds
FINAL_METRICS = ("test_loss", "test_accuracy")  # that the default trainable reports after its last epoch only


@dataclass(frozen=True)
class EpochReport:
    """The result of one epoch. A trainable may yield any object with `epoch`, `metrics` and `state`.

    Attributes:
        epoch: the epoch's number, from 1.
        metrics: {name: value}. It includes the metric that the search optimizes.
        state: returns the checkpoint, a dict of tensors and plain values: numbers, texts, bytes, None, and lists, tuples,
            sets and dicts of them. It is called only when a checkpoint is saved. Given the checkpoint, the same trainable
            continues as if it had never stopped.
        provenance: facts about how the trial runs, recorded with it, such as {"cuda_graph": True}: a mapping that JSON can
            hold, with finite numbers and with texts as keys.
        warning: something that went wrong and does not stop the training. The user is shown it.
        needs_new_process: whether this process must not run another trial after this one.
    """

    epoch: int
    metrics: dict[str, float]
    state: Callable[[], dict[str, Any]]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    warning: str = ""
    needs_new_process: bool = False


class Trainable(Protocol):
    """A generator function that trains one configuration."""

    def __call__(
        self,
        params: Mapping[str, Any],
        *,
        data: Mapping[str, Any],
        seed: int,
        max_epochs: int,
        device: str,
        checkpoint: Mapping[str, Any] | None = None,
    ) -> Iterator[EpochReport]:
        """Train, and yield a report after each epoch.

        Args:
            params: parameters and derived values. Inactive parameters are absent.
            data: the space's `data` section, and `data_dir`, the folder of the data sets.
            seed: the seed of the training.
            max_epochs: the last epoch.
            device: `cpu` or `cuda`.
            checkpoint: the state of an earlier report; training continues with the epoch after it.
        """
        ...


def load_trainable(name: str, folder: Path | str | None = None) -> Callable[..., Generator[Any, None, None]]:
    """Import a `Trainable`, from a folder or the packages that Python finds.

    The folder stays at the end of Python's path: the trainable may import other files of it while it runs.

    Args:
        name: `module:function`.
        folder: the folder; by default, the current one.

    Raises:
        TrainableError: the module or the function does not exist, or the function does not have the right signature.
    """
    here = str(Path.cwd() if folder is None else folder)
    if here not in sys.path and name != DEFAULT_TRAINABLE:
        sys.path.append(here)
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but one that it imports does not
        raise _no_module(module_name) from None
    function = getattr(module, function_name, None)
    if function is None:
        names = [n for n in dir(module) if inspect.isgeneratorfunction(getattr(module, n, None))]
        hint = nearest(function_name, names) if names else "and no other generator function"
        raise TrainableError(f"trainable: {module_name} has no function {function_name!r}, {hint}")
    required = {"data", "seed", "max_epochs", "device", "checkpoint"}
    if not inspect.isgeneratorfunction(function) or not required <= set(inspect.signature(function).parameters):
        raise TrainableError(
            f"trainable: {name} must be a generator function "
            "(params, *, data, seed, max_epochs, device, checkpoint=None) that yields EpochReports"
        )
    trainable: Callable[..., Generator[Any, None, None]] = function
    return trainable


def require_module(name: str) -> None:
    """Check that the module of a trainable, or the package that has it, exists. Nothing is imported.

    Args:
        name: `module:function`.

    Raises:
        TrainableError: it is neither in the current folder nor among the packages that Python finds.
    """
    module = name.partition(":")[0]
    package = module.partition(".")[0]
    if package not in sys.modules and not (find_spec(package) or PathFinder.find_spec(package, [str(Path.cwd())])):
        raise _no_module(module)


def _no_module(name: str) -> TrainableError:
    return TrainableError(f"trainable: no module {name!r} in the current folder or among the installed packages")


def is_error(metric: str) -> bool:
    """Return whether a metric is the standard error of another one."""
    return metric.endswith(STDERR_SUFFIX)


def is_timing(metric: str) -> bool:
    """Return whether a metric measures speed, such as `train_seconds`. Such metrics differ between identical trainings."""
    return metric.endswith(("_seconds", "_per_second"))
