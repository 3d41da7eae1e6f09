"""How a machine or a cluster is divided among trials."""

from __future__ import annotations

import pytest

from hpo.errors import SettingError
from hpo.search.slots import Node, Slots, plan_slots
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


def test_room_follows_the_nodes_and_what_a_trial_gets_follows_the_kind_of_gpu() -> None:
    nodes = [Node(8, 2, "H100"), Node(8, 2, "T4"), Node(8, 1, "T4"), Node(8)]
    assert Slots(1, 2.0, 0.0).room(nodes) == {"": 16}
    assert Slots(1, 1.0, 0.5).room(nodes) == {"": 10}
    by_kind = Slots(1, 1.0, 0.25, {"T4": 1.0})
    assert by_kind.room(nodes) == {"H100": 8, "T4": 3, "": 0}
    assert by_kind.on_kind("T4") == Slots(1, 1.0, 1.0)
    assert by_kind.on_kind("H100") == Slots(1, 1.0, 0.25)
    assert by_kind.room([]) == {}
