"""The section `continue` of a search space: which completed trials are trained for more epochs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from hpo.space.parameters import StrictModel
from hpo.space.shares import BestN, check_share, count_share

DEFAULT_COUNT = 3  # of a search that is no grid: as many trials keep their checkpoints by default


def _check_trials(raw: object) -> object:
    if raw is None:
        return raw
    return check_share(raw, ["all", "none"], "best 5", "all, none or best N (such as best 5)")


_Trials = Literal["all", "none"] | BestN


class Continuation(StrictModel):
    """What becomes of the completed trials of earlier revisions that had fewer epochs."""

    trials: Annotated[str | None, BeforeValidator(_check_trials, json_schema_input_type=_Trials | None)] = None
    """all, best N, or none, which trains every configuration from the start. null means all for a grid, else best 3."""
    horizon: Literal["restart", "leave"] = "restart"
    """What becomes of a trial whose schedule depends on max_epochs, so that it cannot be continued: it is trained from the
    start, or left as it is."""

    @property
    def is_wanted(self) -> bool:
        """Whether any trial is continued."""
        return self.trials != "none"

    def count(self, *, is_grid: bool) -> int | None:
        """Return how many trials are continued at most, the best ones; None for all.

        Args:
            is_grid: whether the search tries a finite list of configurations.
        """
        if self.trials is None:
            return None if is_grid else DEFAULT_COUNT
        return count_share(self.trials)


def _expand_trials(raw: object) -> object:
    """Accept `best 5` for `{trials: best 5}`."""
    return raw if raw is None or isinstance(raw, dict | Continuation) else {"trials": raw}


NamedContinuation = Annotated[
    Continuation, BeforeValidator(_expand_trials, json_schema_input_type=_Trials | Continuation)
]
