"""What a search has left to do: trials, and budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpo.space.model import Space

if TYPE_CHECKING:
    from hpo.search.stop import Stop
    from storage.study import Study


def trials_left(space: Space, study: Study) -> int | None:
    """Return how many trials have not ended; None where only time ends the search.

    What `hpo retry` lets run again is left, even if the budget was reduced meanwhile.
    """
    total = space.total_trials
    if total is None:
        return None
    ended, retried = study.count_ended_keys(), study.count_retried()
    if space.is_grid and ended >= total:  # trials that were enqueued by hand may be no points of the grid
        return max(retried, len(space.point_keys() - study.ended_keys()))
    return max(retried, total - ended)


def find_spent_budget(space: Space, study: Study) -> Stop | None:
    """Return which budget was spent by earlier runs, so that nothing can run; None if some is left."""
    from hpo.search.stop import Stop, StopCause, find_spent
    from storage.summaries import elapsed_seconds

    if space.budget.time is not None and elapsed_seconds(study.runs()) >= space.budget.time:
        return Stop(StopCause.TIME_SPENT)
    return find_spent(space.budget, study.device_seconds()) if space.budget.limits_device_time else None
