"""A cluster whose nodes change, as `Membership` sees it. Ray's own functions are replaced: the end-to-end tests start it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from hpo.search.slots import MAX_WANTED, Node, Room, Slots

pytestmark = pytest.mark.slow  # importing ray takes seconds


@pytest.fixture(scope="module")
def module() -> ModuleType:
    """The module under test. It imports ray."""
    from hpo.search.cluster import membership

    return membership


class FakeCluster:
    """The nodes and the placement groups of a cluster, and the time."""

    def __init__(self) -> None:
        self.nodes: list[Node] = [Node(2, id="a"), Node(4, id="b")]
        self.error: Exception | None = None
        self.groups: dict[int, str] = {}  # {number: state}
        self.bundles: list[dict[str, float]] = []
        self.selectors: list[Any] = []
        self.now = 100.0

    def read_nodes(self) -> list[Node]:
        if self.error is not None:
            raise self.error
        return list(self.nodes)

    def drain(self, name: str) -> None:
        self.nodes = [replace(node, is_drained=node.is_drained or node.id == name) for node in self.nodes]

    def placement_group(self, bundles: list[dict[str, float]], *, bundle_label_selector: Any) -> int:
        self.bundles += bundles
        self.selectors.append(bundle_label_selector)
        number = len(self.bundles)
        self.groups[number] = "PENDING"
        return number

    def table(self, group: int) -> dict[str, str]:
        return {"state": self.groups[group]}


def checks_of(refused: str = "") -> Mock:
    """Checks that have refused one node, or none."""
    selector = {"ray.io/node-id": f"!in({refused})"} if refused else None
    return Mock(selector=selector, usable=lambda nodes: [node for node in nodes if node.id != refused])


@pytest.fixture
def cluster(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    fake = FakeCluster()
    monkeypatch.setattr(module, "read_nodes", fake.read_nodes)
    monkeypatch.setattr(module, "placement_group", fake.placement_group)
    monkeypatch.setattr(module, "placement_group_table", fake.table)
    monkeypatch.setattr(module, "remove_placement_group", fake.groups.pop)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


def test_room_is_read_from_time_to_time_and_kept_while_the_head_does_not_answer(
    module: ModuleType, cluster: FakeCluster
) -> None:
    members = module.Membership(Slots(1, 1.0, 0.0), checks_of())
    assert members.room() == {"": Room(6, 0.0)}
    cluster.nodes.append(Node(1, id="c"))
    assert members.room() == {"": Room(6, 0.0)}, "it was read just now"
    cluster.now += module.POLL_SECONDS
    assert members.room() == {"": Room(7, 0.0)}
    cluster.error = ConnectionError("no head")
    cluster.now += module.POLL_SECONDS
    assert members.room() == {"": Room(7, 0.0)}
    cluster.error = None
    cluster.drain("b")
    cluster.now += module.POLL_SECONDS
    assert (members.room(), members.drained()) == ({"": Room(3, 0.0)}, {"b"})


def test_nothing_is_asked_of_a_head_that_is_away(module: ModuleType, cluster: FakeCluster) -> None:
    """Another one may answer in its place: then Ray would end this process."""
    answers = [True]
    members = module.Membership(Slots(1, 1.0, 0.0), checks_of(), lambda: answers[0])
    assert members.room() == {"": Room(6, 0.0)}
    answers[0], cluster.error = False, AssertionError("it must not be asked")
    cluster.now += module.POLL_SECONDS
    members.ask_for(2)
    assert (members.room(), cluster.bundles) == ({"": Room(6, 0.0)}, [])


def test_a_ray_of_our_own_stays_as_it_is(module: ModuleType, cluster: FakeCluster) -> None:
    cluster.error = AssertionError("it must not be asked")
    members = module.Membership(Slots(3, 1.0, 0.0), None)
    members.ask_for(4)
    assert (members.room(), members.drained(), members.has_left("a")) == ({"": Room(3, 0.0)}, set(), False)
    assert members.unused_gpus() == []
    assert members.node_of(None) == ""
    assert cluster.bundles == []


@pytest.fixture
def raylet() -> Iterator[tuple[str, int]]:
    """An address that answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()


def test_a_node_has_left_if_it_is_gone_or_drained_or_does_not_answer(
    module: ModuleType, cluster: FakeCluster, raylet: tuple[str, int]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        silent = closed.getsockname()
    cluster.nodes = [Node(1, id=name, address=raylet) for name in "ab"] + [Node(1, id="c", address=silent)]
    cluster.drain("b")
    members = module.Membership(Slots(1, 1.0, 0.0), checks_of())
    assert [members.has_left(name) for name in ("a", "b", "c", "d", "")] == [False, True, True, True, False]


def test_nodes_that_join_are_asked_and_their_gpus_are_seen(module: ModuleType, cluster: FakeCluster) -> None:
    cluster.nodes += [Node(1, 1, id="c"), Node(1, 1, id="refused")]
    checks = checks_of("refused")
    on_cpus, on_gpus = (module.Membership(Slots(1, 1.0, gpu), checks) for gpu in (0.0, 1.0))
    assert [node.id for node in on_cpus.unused_gpus()] == ["c"]
    checks.poll.assert_called_once_with(cluster.nodes)
    assert on_gpus.unused_gpus() == []


def test_places_are_asked_for_until_there_is_room_for_them(module: ModuleType, cluster: FakeCluster) -> None:
    members = module.Membership(Slots(0, 2.0, 0.5), checks_of())
    for _ in range(2):
        members.ask_for(3)
    assert cluster.bundles == [{"CPU": 2.0, "GPU": 0.5}] * 3
    cluster.groups[1] = "CREATED"
    members.ask_for(2)
    assert cluster.groups == {2: "PENDING", 3: "PENDING"}, "a trial takes the room of the first"
    members.ask_for(1000)
    assert len(cluster.groups) == MAX_WANTED
    members.ask_for(0)
    assert cluster.groups == {}


def test_without_gpus_none_are_asked_for(module: ModuleType, cluster: FakeCluster) -> None:
    module.Membership(Slots(0, 1.0, 0.0), checks_of()).ask_for(1)
    assert cluster.bundles == [{"CPU": 1.0}]


def test_the_node_of_a_worker_is_read_from_rays_table(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"ab": {"Address": {"NodeID": "n"}}}
    state: Any = SimpleNamespace(actor_table=table.get)
    monkeypatch.setattr(module.ray._private.state, "state", state)
    actor = SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: "ab"))
    assert module.Membership(Slots(0, 1.0, 0.0), checks_of()).node_of(actor) == "n"


def test_a_refused_node_has_no_room_and_is_not_asked_for(module: ModuleType, cluster: FakeCluster) -> None:
    members = module.Membership(Slots(1, 1.0, 0.0), checks_of("b"))
    assert members.room() == {"": Room(2, 0.0)}
    members.ask_for(1)
    assert cluster.selectors == [[{"ray.io/node-id": "!in(b)"}]]
