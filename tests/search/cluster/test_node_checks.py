"""The nodes of a cluster, without Ray: a fake keeps what was asked, and answers when a test says so."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.tune import PlacementGroupFactory

from hpo.errors import SettingError
from hpo.search.cluster import node_checks as module
from hpo.search.cluster.node_checks import NODE_LABEL, NodeChecks
from hpo.search.cluster.versions import Problem, describe_versions
from hpo.search.slots import Node

pytestmark = pytest.mark.slow  # imports ray
NO_CREATION = "The actor died because of an error raised in its creation task"
ONE_CORE = PlacementGroupFactory([{"CPU": 1.0}])


class FakeRay:
    """Stands in for the module `ray`."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.alive: dict[str, Node] = {}
        self.asked: list[str] = []
        self.answers: dict[str, Any] = {}
        self.question: Callable[[], Any] = lambda: None

    def add(self, *names: str, **changes: Any) -> None:
        self.alive |= {name: Node(1, id=name, name=f"host-{name}", **changes) for name in names}

    def nodes(self) -> list[Node]:
        return list(self.alive.values())

    def remote(self, function: Callable[[], Any]) -> Any:
        self.question = function

        def options(*, num_cpus: float, max_retries: int, scheduling_strategy: Any) -> Any:
            assert num_cpus == 0, "it waits for no trial"
            assert not scheduling_strategy.soft
            node = scheduling_strategy.node_id

            def ask() -> Any:
                self.asked.append(node)
                return node

            return SimpleNamespace(remote=ask)

        return SimpleNamespace(options=options)

    def wait(self, asked: list[str], *, num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        return [node for node in asked if node in self.answers], []

    def get(self, node: str) -> Any:
        if isinstance(self.answers[node], Exception):
            raise self.answers[node]
        return self.answers[node]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    fake.add("a")
    fake.answers = {"a": {"gpu_bytes": 0}}
    monkeypatch.setattr(module, "ray", fake)
    monkeypatch.setattr(module, "NodeAffinitySchedulingStrategy", lambda node_id, soft: SimpleNamespace(**locals()))
    monkeypatch.setattr(module, "read_nodes", fake.nodes)
    return fake


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def nodes(fake: FakeRay, notes: list[str], tmp_path: Path) -> NodeChecks:
    return NodeChecks(tmp_path, notes.append)


def test_each_node_is_asked_once_and_those_that_leave_are_not(nodes: NodeChecks, fake: FakeRay) -> None:
    fake.add("gpu")
    fake.add("leaves", is_drained=True)
    fake.answers["gpu"] = {"gpu_bytes": 80}
    nodes.check_all()
    nodes.poll(fake.nodes())
    assert fake.asked == ["a", "gpu"]
    assert not nodes.refused
    assert nodes.without_refused(ONE_CORE) is ONE_CORE
    known = [Node(1, id="a"), Node(1, 1, id="gpu"), Node(1, id="joined just now")]
    assert nodes.usable(known) == [known[0], Node(1, 1, gpu_bytes=80, id="gpu"), known[2]]


def test_nodes_that_cannot_run_trials_are_one_error_before_a_search(nodes: NodeChecks, fake: FakeRay) -> None:
    fake.add("b", "c", "d")
    fake.answers |= {
        "b": {"problem": ("torch is 1.0 and 2.0 here",)},
        "c": {"problem": ("hpo is not installed",)},
        "d": {"problem": ("it cannot write to /home/a: Permission denied", "Start elsewhere")},
    }
    with pytest.raises(SettingError) as caught:
        nodes.check_all()
    assert str(caught.value).splitlines() == [
        "3 of 4 nodes of the Ray cluster cannot run trials of this search:",
        "  node host-b: torch is 1.0 and 2.0 here",
        "  node host-c: hpo is not installed",
        "  node host-d: it cannot write to /home/a: Permission denied",
        Problem("").remedy,
        "Start elsewhere",
    ]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ray.exceptions.RuntimeEnvSetupError("no room"), "it has not received the code of the search: no room"),
        (ray.exceptions.RayTaskError("f", "Traceback\nOSError: no disk", OSError()), "not said its versions: OSError"),
    ],
)
def test_a_node_whose_answer_failed_cannot_run_trials(
    nodes: NodeChecks, fake: FakeRay, error: Exception, reason: str
) -> None:
    fake.answers["a"] = error
    with pytest.raises(SettingError, match=reason):
        nodes.check_all()


def test_a_node_that_has_left_is_no_problem(nodes: NodeChecks, fake: FakeRay) -> None:
    fake.answers["a"] = ray.exceptions.NodeDiedError("gone")
    nodes.check_all()


def test_a_node_that_joins_later_is_asked_and_refused_with_one_note(
    nodes: NodeChecks, fake: FakeRay, notes: list[str]
) -> None:
    nodes.check_all()
    fake.add("b")
    for _ in range(2):
        nodes.poll(fake.nodes())
    assert (fake.asked, notes) == (["a", "b"], [])
    fake.answers["b"] = {"problem": ("hpo is not installed",)}
    for _ in range(2):
        nodes.poll(fake.nodes())
    nodes.refuse("b", Problem("a worker says so, too"))
    assert notes == [f"node host-b runs no trials of this search: hpo is not installed. {Problem('').remedy}"]


def test_trials_are_placed_on_other_nodes(nodes: NodeChecks) -> None:
    request = PlacementGroupFactory([{"CPU": 2.0, "GPU": 0.5}])
    nodes.refuse("b", Problem("x"))
    nodes.refuse("a", Problem("x"))
    placed = nodes.without_refused(request)
    assert placed.bundles == request.bundles
    assert [node.id for node in nodes.usable([Node(1, id=name) for name in "abc"])] == ["c"]
    assert placed._bound.arguments["bundle_label_selector"] == [{NODE_LABEL: "!in(a,b)"}]
    assert nodes.without_refused(placed) == placed
    assert placed != request, "Tune gives a trial only the actors with its own request"


def test_a_worker_that_could_not_start_is_the_fault_of_a_node_once(
    nodes: NodeChecks, fake: FakeRay, notes: list[str]
) -> None:
    nodes.check_all()
    assert not nodes.is_at_fault(NO_CREATION, ONE_CORE), "all nodes are fine"
    fake.add("b")
    fake.answers["b"] = {"problem": ("hpo is not installed",)}
    assert not nodes.is_at_fault("the worker died", ONE_CORE)
    assert nodes.is_at_fault(NO_CREATION, ONE_CORE)
    assert len(notes) == 1
    assert not nodes.is_at_fault(NO_CREATION, nodes.without_refused(ONE_CORE)), "it was placed elsewhere"


def answer_of(fake: FakeRay, nodes: NodeChecks) -> Any:
    """What a node answers that receives the question as Ray sends it."""
    nodes.check_all()
    return cloudpickle.loads(cloudpickle.dumps(fake.question))()


def test_a_node_with_the_same_versions_has_no_problem(nodes: NodeChecks, fake: FakeRay) -> None:
    assert answer_of(fake, nodes) == {"gpu_bytes": 0}


def test_a_node_with_other_versions_answers_with_the_difference(
    nodes: NodeChecks, fake: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.check_all()
    monkeypatch.setattr("hpo.search.cluster.versions.describe_versions", lambda: describe_versions() | {"torch": "0.1"})
    reason, remedy = cloudpickle.loads(cloudpickle.dumps(fake.question))()["problem"]
    assert reason == f"torch is 0.1 and {describe_versions()['torch']} here"
    assert remedy == Problem("").remedy


@pytest.mark.parametrize(
    ("missing", "reason"),
    [("hpo", "hpo is not installed"), ("hpo.search.cluster.versions", "hpo is of another version")],
)
def test_a_node_without_hpo_can_answer(
    nodes: NodeChecks, fake: FakeRay, monkeypatch: pytest.MonkeyPatch, missing: str, reason: str
) -> None:
    nodes.check_all()
    sent = cloudpickle.dumps(fake.question)
    for name in [name for name in sys.modules if name.split(".")[0] == "hpo"]:
        monkeypatch.delitem(sys.modules, name)
    original = builtins.__import__

    def find(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == "hpo":
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", find)
    assert cloudpickle.loads(sent)() == {"problem": (reason,)}
