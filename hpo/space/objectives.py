"""The section `objectives` of a search space: several metrics instead of one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from hpo.space.parameters import StrictModel

MAX_OBJECTIVES = 4  # with more, few trials dominate others, and the hypervolumes that TPE computes take long

MetricName = Annotated[str, Field(min_length=1)]


class Objective(StrictModel):
    """One objective: a metric, and whether a higher or a lower value is better."""

    metric: MetricName
    """The name of the metric. The trainable must report it after each epoch."""
    # Without a default: a forgotten `minimize` would search for the slowest training.
    direction: Literal["maximize", "minimize"]
    """Whether a higher or a lower value is better."""

    @property
    def is_maximized(self) -> bool:
        """Whether a higher value is better."""
        return self.direction == "maximize"

    def __str__(self) -> str:
        return f"{self.metric} ({self.direction})"


def _check_objective(raw: object) -> object:
    if isinstance(raw, str):
        raise ValueError(f"write a mapping with both keys, such as {{metric: {raw[:40]}, direction: minimize}}")  # noqa: TRY004 # pydantic reports it
    return raw


ListedObjective = Annotated[Objective, BeforeValidator(_check_objective, json_schema_input_type=Objective)]
