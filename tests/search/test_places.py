"""Which trial has which place while nodes join and leave."""

from __future__ import annotations

from hpo.search.places import Places
from hpo.search.slots import Room, Slots


def test_a_machine_has_as_many_places_as_slots() -> None:
    slots = Slots(2, 1.0, 0.0)
    places = Places(slots)
    assert [places.take(name) for name in "abc"] == [slots, slots, None]
    assert (places.count, places.taken) == (2, 2)
    assert places.bundle("a") == {"CPU": 1.0}
    for _ in range(2):
        places.leave("a")
    assert places.taken == 1
    assert places.take("c") == slots


def test_places_follow_the_room_and_their_kind() -> None:
    room = {"T4": Room(1, 1.0), "H100": Room(2, 0.5)}
    places = Places(Slots(0, 2.0, 0.5), lambda: room)
    taken = [places.take(name) for name in "abcd"]
    assert [slots and slots.devices for slots in taken] == [1.0, 0.5, 0.5, None]
    assert places.bundle("a") == {"CPU": 2.0, "GPU": 1.0, "accelerator_type:T4": 0.001}
    assert places.bundle("b") == {"CPU": 2.0, "GPU": 0.5, "accelerator_type:H100": 0.001}
    assert places.slots_of("a").devices == 1.0
    room = {"H100": Room(2, 0.5)}
    assert [places.is_surplus(name) for name in "abcd"] == [True, False, False, False]
    room = {"H100": Room(1, 0.5)}
    assert [places.is_surplus(name) for name in "bc"] == [True, True], "either may be released"
    places.leave("b")
    assert not places.is_surplus("c")


def test_when_a_second_kind_joins_trials_of_the_first_count() -> None:
    room = {"": Room(2, 0.5)}
    places = Places(Slots(2, 1.0, 0.5), lambda: room)
    assert [places.take(name) is not None for name in "abc"] == [True, True, False]
    room = {"H100": Room(2, 0.5), "T4": Room(1, 1.0)}
    assert [places.take(name) is not None for name in "cd"] == [True, False]


def test_a_trial_that_has_more_cores_than_any_node_is_placed_again_with_fewer() -> None:
    room = {"": Room(1, 0.0)}
    places = Places(Slots(1, 8.0, 0.0), lambda: room)
    places.take("a")
    assert (places.bundle("a"), places.is_surplus("a")) == ({"CPU": 8.0}, False)
    room = {"": Room(1, 0.0, 4.0)}
    assert places.is_surplus("a")
    places.leave("a")
    slots = places.take("b")
    assert slots is not None
    assert (slots.threads, places.bundle("b"), places.is_surplus("b")) == (4, {"CPU": 4.0}, False)


def test_nothing_is_free_where_there_is_no_node() -> None:
    places = Places(Slots(0, 1.0, 0.0), lambda: Slots(0, 1.0, 0.0).room([]))
    assert (places.count, places.take("a")) == (0, None)
