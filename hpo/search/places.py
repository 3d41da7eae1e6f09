"""The places in which trials run: how many there are now, which trial has which. Does not import ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from hpo.search.slots import KIND_PREFIX, Slots

KIND_SHARE = 0.001  # Ray's nodes have 1 of the resource that names their kind of GPU


class Places:
    """The places of a search, as trials take them and as nodes join and leave.

    Args:
        slots: what a trial gets.
        room: returns {kind of GPU: how many trials run at a time} now, see `Slots.room`; None for `slots.count` always.
    """

    def __init__(self, slots: Slots, room: Callable[[], Mapping[str, int]] | None = None) -> None:
        self._slots = slots
        self._room = room or (lambda: {"": slots.count})
        self._kinds: dict[str, str] = {}  # {Tune's name of a trial: the kind of GPU that it has}

    @property
    def count(self) -> int:
        """How many trials run at a time now."""
        return sum(self._room().values())

    @property
    def taken(self) -> int:
        """How many trials have a place."""
        return len(self._kinds)

    def find_free(self) -> str | None:
        """Return a kind of GPU of which a place is free; None if there is none."""
        used = Counter(self._kinds.values())
        return next((kind for kind, count in self._room().items() if used[kind] < count), None)

    def take(self, tune_id: str, kind: str) -> None:
        """A trial has a place of a kind from now on."""
        self._kinds[tune_id] = kind

    def leave(self, tune_id: str) -> None:
        """A trial has no place any more. Idempotent."""
        self._kinds.pop(tune_id, None)

    def is_surplus(self, tune_id: str) -> bool:
        """Return whether a trial is one of more than there is room for, because nodes have left."""
        kind = self._kinds.get(tune_id)
        return kind is not None and Counter(self._kinds.values())[kind] > self._room().get(kind, 0)

    def slots(self, kind: str) -> Slots:
        """Return what a trial gets on nodes with one kind of GPU."""
        return self._slots.on_kind(kind)

    def slots_of(self, tune_id: str) -> Slots:
        """Return what a trial has."""
        return self.slots(self._kinds[tune_id])

    def bundle(self, tune_id: str) -> dict[str, float]:
        """Return what a trial has, as Ray names it: {resource: amount}, without those of which it has nothing."""
        slots, kind = self.slots_of(tune_id), self._kinds[tune_id]
        amounts = {"CPU": slots.cpu, "GPU": slots.gpu} | ({KIND_PREFIX + kind: KIND_SHARE} if kind else {})
        return {name: amount for name, amount in amounts.items() if amount}
