"""Stops a search if a machine, or the code on it, cannot train: else each of thousands of trials would fail."""

from __future__ import annotations

from collections import Counter

UNKNOWN_NODE = ""  # of a worker that died
# So many trials of one machine that failed in a row, without training an epoch, stop the search: the machine or the code is
# at fault then. There must also be two for each slot; twice as many where trials have worked before.
MIN_FAILURES_IN_A_ROW = 4


class CircuitBreaker:
    """Counts, for each machine, the trials in a row that failed before they trained an epoch."""

    def __init__(self) -> None:
        self._has_trained: set[str] = set()
        self._failures: Counter[str] = Counter()

    def note_epoch(self, node: str) -> None:
        """A machine has trained an epoch."""
        for each in (node, UNKNOWN_NODE):
            self._has_trained.add(each)
            self._failures[each] = 0

    def note_failure(self, node: str, slots: int) -> str:
        """A trial has failed on a machine before it trained an epoch.

        Args:
            node: the machine.
            slots: how many trials run at a time.

        Returns:
            Why the search must stop; empty if it need not.
        """
        self._failures[node] += 1
        limit = max(MIN_FAILURES_IN_A_ROW, 2 * slots)
        if self._failures[node] < (2 * limit if node in self._has_trained else limit):
            return ""
        where = "" if node == UNKNOWN_NODE else f" on {node}"
        return f"the last {self._failures[node]} trials{where} failed before they trained an epoch"
