"""The contract between the service and training code. Imports neither torch nor ray.

A trainable is a generator function that trains one configuration and yields an `EpochReport` after each epoch.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hpo.errors import TrainableError, nearest

DEFAULT_TRAINABLE = "hpo.train:train"


@dataclass(frozen=True)
class EpochReport:
    """What a trainable yields after each epoch.

    Attributes:
        epoch: counted from 1.
        metrics: name to value; the space's metric must be among them.
        state: called only when a checkpoint is saved; returns a dict of tensors and plain values from which the same
            trainable goes on as if never stopped.
    """

    epoch: int
    metrics: dict[str, float]
    state: Callable[[], dict[str, Any]]


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
        """Yield a report for each epoch after the checkpoint's, the last one for epoch `max_epochs`."""
        ...


def load_trainable(name: str) -> Callable[..., Generator[Any, None, None]]:
    """Import a trainable, see `hpo.train.Trainable`.

    Args:
        name: `module:function`.

    Raises:
        TrainableError: no such module or function, or it is not a generator function of the right signature.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists; something that it imports does not
        raise TrainableError(
            f"trainable: no module {module_name!r}; it is looked for in the folder that the command runs in and among "
            "the installed packages"
        ) from None
    function = getattr(module, function_name, None)
    if function is None:
        names = [n for n in dir(module) if inspect.isgeneratorfunction(getattr(module, n, None))]
        raise TrainableError(
            f"trainable: {module_name} has no function {function_name!r}, {nearest(function_name, names)}"
        )
    wanted = {"data", "seed", "max_epochs", "device", "checkpoint"}
    if not inspect.isgeneratorfunction(function) or not wanted <= set(inspect.signature(function).parameters):
        raise TrainableError(
            f"trainable: {name} must be a generator function "
            "(params, *, data, seed, max_epochs, device, checkpoint=None) that yields EpochReports"
        )
    checked: Callable[..., Generator[Any, None, None]] = function
    return checked


def is_timing(metric: str) -> bool:
    """Return whether a metric measures speed, such as `train_seconds`: it differs in each run of the same trial."""
    return metric.endswith(("_seconds", "_per_second"))
