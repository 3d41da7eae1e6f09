"""The places in which trials run: how many there are now, which trial has which. Does not import ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from hpo.search.slots import KIND_PREFIX, Room, Slots

KIND_SHARE = 0.001  # Ray's nodes have 1 of the resource that names their kind of GPU


class Places:
    """The places of a search, as trials take them and as nodes join and leave.

    Args:
        slots: what a trial gets.
        room: returns {kind of GPU: the room} now, see `Slots.room`; None for `slots.count` always.
    """

    def __init__(self, slots: Slots, room: Callable[[], Mapping[str, Room]] | None = None) -> None:
        self._slots = slots
        self._room = room or (lambda: {"": Room(slots.count, slots.gpu)})
        self._taken: dict[str, tuple[str, Slots]] = {}  # {Tune's name of a trial: its kind of GPU, what it has}

    @property
    def count(self) -> int:
        """How many trials run at a time now."""
        return sum(room.count for room in self._room().values())

    @property
    def taken(self) -> int:
        """How many trials have a place."""
        return len(self._taken)

    def take(self, tune_id: str) -> Slots | None:
        """Take a place for a trial; return what the trial gets, None if no place is free."""
        rooms, used = self._room(), self._used()
        if self.taken >= sum(room.count for room in rooms.values()):
            return None
        for kind, room in rooms.items():
            if used[kind] < room.count:
                slots = replace(self._slots, gpu=room.gpu, cpu=room.cpu or self._slots.cpu)
                self._taken[tune_id] = kind, slots
                return slots
        return None

    def leave(self, tune_id: str) -> None:
        """A trial has no place any more. Idempotent."""
        self._taken.pop(tune_id, None)

    def is_surplus(self, tune_id: str) -> bool:
        """Return whether a trial is one of more than there is room for, or has more than there is, as nodes have left."""
        if tune_id not in self._taken:
            return False
        kind, slots = self._taken[tune_id]
        room = self._room().get(kind)
        return room is None or self._used()[kind] > room.count or slots.cpu > (room.cpu or slots.cpu)

    def slots_of(self, tune_id: str) -> Slots:
        """Return what a trial has."""
        return self._taken[tune_id][1]

    def bundle(self, tune_id: str) -> dict[str, float]:
        """Return what a trial has, as Ray names it: {resource: amount}, without those of which it has nothing."""
        kind, slots = self._taken[tune_id]
        amounts = {"CPU": slots.cpu, "GPU": slots.gpu} | ({KIND_PREFIX + kind: KIND_SHARE} if kind else {})
        return {name: amount for name, amount in amounts.items() if amount}

    def _used(self) -> Counter[str]:
        return Counter(kind for kind, _ in self._taken.values())
