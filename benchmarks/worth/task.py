"""What a simulated search trains: a task, and the learning curves of its configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hpo.space.model import Space

Array = np.ndarray[Any, Any]


def space_of(parameters: Mapping[str, Any]) -> Space:
    """Return a search space with these parameters, for its distributions."""
    options = {"name": "parameters", "sampler": "random", "max_epochs": 1, "budget": {"trials": 1}}
    return Space.model_validate({**options, "parameters": parameters})


@dataclass(frozen=True)
class Curve:
    """How a configuration trains.

    Attributes:
        values: (epochs,) the objective after each epoch; larger is better.
        seconds: (epochs,) how long each epoch takes.
    """

    values: Array
    seconds: Array


class Task(Protocol):
    """A data set on which configurations are compared."""

    @property
    def name(self) -> str:
        """The table and the data set."""

    @property
    def max_epochs(self) -> int:
        """Epochs of a full training; 1 where only final results are known."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The parameters, as in the file of a search space."""

    @property
    def small_grid(self) -> Mapping[str, Any] | None:
        """A grid over the same parameters, for warm starts; None if there is none."""

    @property
    def large_grid(self) -> Mapping[str, Any] | None:
        """A grid that compares with other searches; None if there is none."""

    def curve(self, params: Mapping[str, Any]) -> Curve:
        """Return how a configuration trains."""
