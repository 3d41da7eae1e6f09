"""Why a search ends before its work is done."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hpo.space.sections import Budget


class StopCause(Enum):
    """What stopped a search. The value is how messages begin."""

    TIME_SPENT = "the time budget is spent"
    NO_IMPROVEMENT = "budget.patience is spent"
    GPU_HOURS_SPENT = "budget.gpu_hours is spent"
    COST_SPENT = "budget.cost.limit is spent"
    INTERRUPTED = "interrupted"
    EXIT_TIME = "--exit-after is over"
    BROKEN = "nothing can be trained"
    STORAGE_FAILED = "storage failed"


# Of the command line. After another stop, the exit code is that of a search that has finished.
EXIT_CODES = {StopCause.INTERRUPTED: 130, StopCause.EXIT_TIME: 130, StopCause.BROKEN: 2}


@dataclass(frozen=True)
class Stop:
    """The end of a search whose work is not done. The same search again resumes it.

    Attributes:
        cause: what stopped it.
        details: more about the cause; may be empty.
    """

    cause: StopCause
    details: str = ""

    @property
    def is_interruption(self) -> bool:
        """Whether Ctrl-C or SIGTERM stopped it."""
        return self.cause is StopCause.INTERRUPTED

    def __str__(self) -> str:
        return f"{self.cause.value}: {self.details}" if self.details else self.cause.value


def find_spent(budget: Budget, device_seconds: float) -> Stop | None:
    """Return why a search stops that has used so much device time; None while its budget lasts."""
    hours, cost = device_seconds / 3600, budget.cost
    if budget.gpu_hours is not None and hours >= budget.gpu_hours:
        return Stop(StopCause.GPU_HOURS_SPENT, f"the trials have used {hours:.6g} of {budget.gpu_hours:g} device-hours")
    if cost is not None and cost.limit is not None and cost.of(device_seconds) >= cost.limit:
        return Stop(StopCause.COST_SPENT, f"the trials have cost {cost.of(device_seconds):.6g} of {cost.limit:g}")
    return None
