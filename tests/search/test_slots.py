"""How a machine or a cluster is divided among trials."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hpo.errors import SettingError
from hpo.search.slots import Node, Room, Slots, plan_slots
from tests.factories import shipped_space


@pytest.mark.parametrize(
    ("cores", "gpus", "resources", "trials", "expected"),
    [
        (2, 0, "{}", 3, Slots(2, 1, 0)),
        (8, 0, "{}", 3, Slots(3, 2, 0)),
        (8, 0, "{}", None, Slots(8, 1, 0)),
        (16, 2, "{}", 3, Slots(2, 8, 1)),
        (64, 8, "{gpu: 0.15}", 1000, Slots(48, 1, 0.15)),
        (64, 8, "{gpu: 0.5, cpu: 2}", 1000, Slots(16, 2, 0.5)),
        (64, 8, "{gpu: 2}", 1000, Slots(4, 16, 2)),
        (4, 0, "{cpu: 2}", 10, Slots(2, 2, 0)),
        (1, 0, "{}", 1, Slots(1, 1, 0)),
    ],
)
def test_machine_is_divided_among_trials(
    cores: int, gpus: int, resources: str, trials: int | None, expected: Slots
) -> None:
    assert plan_slots(shipped_space("quick", f"resources={resources}"), trials, [Node(cores, gpus)]) == expected


@pytest.mark.parametrize(
    ("resources", "said"), [("{gpu: 1}", "resources.gpu is 1"), ("{cpu: 4}", "resources.cpu is 4")]
)
def test_asking_for_more_than_the_machine_has_is_refused(resources: str, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        plan_slots(shipped_space("quick", f"resources={resources}"), None, [Node(2.0)])


@pytest.mark.parametrize(
    ("slots", "devices"), [(Slots(2, 4.0, 0.0), 1.0), (Slots(4, 1.0, 0.25), 0.25), (Slots(1, 4.0, 2.0), 2.0)]
)
def test_a_trial_holds_its_gpus_or_on_the_cpu_one_device(slots: Slots, devices: float) -> None:
    assert slots.devices == devices


# --- clusters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "resources", "trials", "expected"),
    [
        ([Node(3), Node(3)], "{cpu: 2}", 9, Slots(2, 2, 0)),  # not 3: a trial runs on one machine
        ([Node(2)] * 4, "{}", 1, Slots(1, 2, 0)),
        ([Node(2)] * 4, "{}", 3, Slots(3, 2, 0)),
        ([Node(0), Node(8), Node(2)], "{}", 5, Slots(5, 2, 0)),
        ([Node(0), Node(8, 2), Node(64)], "{}", 9, Slots(2, 4, 1)),
        ([Node(4, 1), Node(4, 1), Node(64)], "{gpu: 0.5}", 9, Slots(4, 2, 0.5)),
        ([], "{}", 9, Slots(0, 1, 0)),
        ([Node(0)], "{gpu: 2, cpu: 4}", 9, Slots(0, 4, 2)),
    ],
)
def test_a_cluster_is_divided_by_its_machines(
    nodes: list[Node], resources: str, trials: int | None, expected: Slots
) -> None:
    assert plan_slots(shipped_space("quick", f"resources={resources}"), trials, nodes, may_grow=True) == expected


GIB = 2**30


def test_trials_have_fewer_cores_where_no_node_has_as_many() -> None:
    """The number was chosen for the nodes at the start. They may leave, and smaller ones may join."""
    slots = Slots(1, 8.0, 0.0, may_have_fewer_cores=True)
    assert slots.room([Node(8), Node(4)]) == {"": Room(1, 0.0)}, "there is room for a trial as it is"
    assert slots.room([Node(4), Node(2)]) == {"": Room(1, 0.0, 4.0)}
    assert slots.room([Node(1), Node(1)]) == {"": Room(2, 0.0, 1.0)}
    assert slots.room([]) == slots.room([Node(0)]) == {"": Room(0, 0.0)}
    assert replace(slots, may_have_fewer_cores=False).room([Node(4)]) == {"": Room(0, 0.0)}, "the user chose 8"


def test_no_gpu_is_unused_because_its_node_has_fewer_cores() -> None:
    slots = Slots(1, 8.0, 1.0, may_have_fewer_cores=True)
    assert slots.room([Node(8, 1)]) == {"": Room(1, 1.0)}
    assert slots.room([Node(8, 1), Node(3, 1), Node(2)]) == {"": Room(2, 1.0, 3.0)}
    assert slots.room([Node(8, 1), Node(6, 4)]) == {"": Room(5, 1.0, 1.0)}


def test_room_follows_the_nodes() -> None:
    nodes = [Node(8, 2, "H100"), Node(8, 2, "T4"), Node(8, 1, "T4"), Node(8)]
    assert Slots(1, 2.0, 0.0).room(nodes) == {"": Room(16, 0.0)}
    assert Slots(1, 1.0, 0.5).room(nodes) == {"": Room(10, 0.5)}
    assert Slots(1, 1.0, 0.5).room([]) == {"": Room(0, 0.5)}


def test_a_gpu_with_less_memory_is_shared_by_fewer_trials() -> None:
    large, small = Node(8, 2, "H100", 80 * GIB), Node(8, 1, "T4", 15 * GIB)
    for trial_gib, expected in (
        (6, {"H100": Room(8, 0.25), "T4": Room(2, 0.5)}),
        (2, {"": Room(12, 0.25)}),
        (12, {"H100": Room(8, 0.25), "T4": Room(1, 1.0)}),
        (16, {"H100": Room(8, 0.25), "T4": Room(0, math.inf)}),
    ):
        slots = Slots(1, 1.0, 0.25, trial_gib * GIB)
        assert slots.room([large, small, Node(8)]) == expected, trial_gib
    unknown = Node(8, 1, "A10")
    assert Slots(1, 1.0, 0.25, 12 * GIB).room([small, unknown]) == {"A10": Room(4, 0.25), "T4": Room(1, 1.0)}
    assert Slots(1, 1.0, 1.0, 16 * GIB).room([large, small]) == {"": Room(3, 1.0)}, "no trial shares a GPU"
