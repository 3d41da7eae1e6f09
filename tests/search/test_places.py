"""Which trial has which place while nodes join and leave."""

from __future__ import annotations

import pytest

from hpo.search.places import Places
from hpo.search.slots import Slots


def test_a_machine_has_as_many_places_as_slots() -> None:
    places = Places(Slots(2, 1.0, 0.0))
    for name in "ab":
        kind = places.find_free()
        assert kind == ""
        places.take(name, kind)
    assert (places.count, places.taken, places.find_free()) == (2, 2, None)
    assert places.bundle("a") == {"CPU": 1.0}
    for _ in range(2):
        places.leave("a")
    assert (places.taken, places.find_free()) == (1, "")


def test_places_follow_the_room_and_their_kind() -> None:
    room = {"T4": 1, "H100": 2}
    places = Places(Slots(0, 2.0, 0.5, {"T4": 1.0}), lambda: room)
    for name, kind in (("a", "T4"), ("b", "H100"), ("c", "H100")):
        assert places.find_free() == kind
        places.take(name, kind)
    assert places.find_free() is None
    assert places.bundle("a") == {"CPU": 2.0, "GPU": 1.0, "accelerator_type:T4": 0.001}
    assert places.bundle("b") == {"CPU": 2.0, "GPU": 0.5, "accelerator_type:H100": 0.001}
    assert places.slots_of("a").devices == 1.0
    room = {"H100": 2}
    assert [places.is_surplus(name) for name in "abcd"] == [True, False, False, False]
    room = {"H100": 1}
    assert [places.is_surplus(name) for name in "bc"] == [True, True], "either may be released"
    places.leave("b")
    assert not places.is_surplus("c")


@pytest.mark.parametrize("cpu", [1.0, 3.0])
def test_nothing_is_free_where_there_is_no_node(cpu: float) -> None:
    places = Places(Slots(0, cpu, 0.0), dict)
    assert (places.count, places.find_free()) == (0, None)
