"""Why a search ends before its work is done."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class StopCause(Enum):
    """What stopped a search. The value is how messages begin."""

    TIME_SPENT = "the time budget is spent"
    NO_IMPROVEMENT = "budget.patience is spent"
    INTERRUPTED = "interrupted"
    BROKEN = "nothing can be trained"
    STORAGE_FAILED = "storage failed"


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
