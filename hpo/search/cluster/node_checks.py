"""The nodes of a Ray cluster that was joined: whether each can run trials of this search. Those that cannot get none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.tune import PlacementGroupFactory
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hpo.errors import SettingError
from hpo.search.cluster.nodes import read_nodes
from hpo.search.cluster.versions import Problem, describe_versions
from hpo.search.slots import Node

ANSWER_SECONDS = 120.0  # how long a node may take to start a worker and answer, before the search starts
LATE_SECONDS = 20.0  # the same, after a worker could not start
NODE_LABEL = "ray.io/node-id"  # which Ray gives each node
# In Ray's report of an actor that could not be created.
_NOT_CREATED = ("creation task", "Failed to set up runtime environment")


class NodeChecks:
    """Asks each node of the cluster once whether it can run trials of this search, see `find_problem`.

    Before a search, a node that cannot is an error. One that joins later is asked, too. Until it has answered, Ray may place
    a trial there: its worker asks the same and hands the trial back.

    Args:
        folder: for the checkpoints of all studies.
        note: is called once for each node that joined later and is refused.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self._folder = folder
        self._note = note
        self._names: dict[str, str] = {}  # {id: name for the user} of the nodes that were asked
        self._refused: dict[str, Problem] = {}
        self._gpu_bytes: dict[str, int] = {}
        self._asked: dict[Any, str] = {}  # {reference to an answer: id}

    @property
    def refused(self) -> Collection[str]:
        """The ids of the nodes that run no trials of this search."""
        return self._refused.keys()

    @property
    def selector(self) -> dict[str, str] | None:
        """Which nodes may run trials, by Ray's labels; None for all."""
        return {NODE_LABEL: f"!in({','.join(sorted(self._refused))})"} if self._refused else None

    def usable(self, nodes: Iterable[Node]) -> list[Node]:
        """Return those of some nodes that are not refused, with the memory of their GPUs where they have said it."""
        return [
            replace(node, gpu_bytes=self._gpu_bytes.get(node.id, 0)) for node in nodes if node.id not in self._refused
        ]

    def check_all(self) -> None:
        """Ask all nodes, and wait for their answers.

        Raises:
            SettingError: a node cannot run trials of this search.
        """
        self._ask_new(read_nodes())
        self._refused = self._collect(ANSWER_SECONDS)
        if self._refused:
            listed = [f"  node {self._names[node]}: {each.reason}" for node, each in self._refused.items()]
            remedies = dict.fromkeys(each.remedy for each in self._refused.values())
            count = f"{len(self._refused)} of {len(self._names)} nodes"
            lines = [f"{count} of the Ray cluster cannot run trials of this search:", *listed, *remedies]
            raise SettingError("\n".join(lines))

    def poll(self, nodes: Iterable[Node]) -> None:
        """Ask those of some nodes that have joined, and refuse those that have answered that they cannot. Does not wait."""
        self._ask_new(nodes)
        for node, problem in self._collect(0.0).items():
            self.refuse(node, problem)

    def refuse(self, node: str, problem: Problem) -> None:
        """Place no trials on a node from now on.

        Args:
            node: its id.
            problem: why it cannot run them.
        """
        if node not in self._refused:
            self._refused[node] = problem
            name = self._names.get(node, node[:8])
            self._note(f"node {name} runs no trials of this search: {problem.reason}. {problem.remedy}")

    def is_at_fault(self, details: str, request: Any) -> bool:
        """Return whether a worker could not start because of its node: that is no failure of the trial.

        Waits a few seconds for nodes that have not answered yet.

        Args:
            details: Ray's report.
            request: with which the trial was placed.
        """
        if not any(text in details for text in _NOT_CREATED):
            return False
        self._ask_new(read_nodes())
        for node, problem in self._collect(LATE_SECONDS).items():
            self.refuse(node, problem)
        return bool(self.without_refused(request) != request)

    def without_refused(self, request: Any) -> Any:
        """Return a trial's request for resources that no refused node fulfils.

        Args:
            request: a PlacementGroupFactory. It may be one that this method returned.
        """
        selector = self.selector
        if selector is None:
            return request
        bundles = request.bundles
        return PlacementGroupFactory(
            bundles, strategy=request.strategy, bundle_label_selector=[dict(selector) for _ in bundles]
        )

    def _ask_new(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node.id not in self._names and not node.is_drained:
                there = NodeAffinitySchedulingStrategy(node.id, soft=False)
                ask: Any = ray.remote(_question(describe_versions(), str(self._folder)))
                asked = ask.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote()
                self._asked[asked] = node.id
                self._names[node.id] = node.name

    def _collect(self, timeout_seconds: float) -> dict[str, Problem]:
        """Return what the nodes that have answered now have said, without those that have no problem."""
        problems: dict[str, Problem] = {}
        if not self._asked:
            return problems
        answers, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=timeout_seconds)
        for answer in answers:
            node = self._asked.pop(answer)
            try:
                said = ray.get(answer)
            except ray.exceptions.RuntimeEnvSetupError as error:
                problems[node] = Problem(f"it has not received the code of the search: {_last_line(error)}")
            except ray.exceptions.RayTaskError as error:
                problems[node] = Problem(f"it has not said its versions: {_last_line(error)}")
            except ray.exceptions.RayError:  # it has left, or no worker could start: the worker of a trial asks again
                pass
            else:
                self._gpu_bytes[node] = said.get("gpu_bytes", 0)
                if "problem" in said:
                    problems[node] = Problem(*said["problem"])
        return problems


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def node_id() -> str:
    """Return the id of the node that this worker runs on."""
    return str(ray.get_runtime_context().get_node_id())


def _question(versions: Mapping[str, str], folder: str) -> Callable[[], dict[str, Any]]:
    """Return a function that a node can run without hpo: of a nested function, Ray sends the code, of others the name.

    It returns {"problem": what a `Problem` is made of}, if there is one, and {"gpu_bytes": memory of the smallest GPU}.
    """

    def answer() -> dict[str, Any]:
        try:
            from hpo.search.cluster.versions import find_problem, smallest_gpu_bytes
        except ImportError as error:
            return {"problem": ("hpo is not installed" if error.name == "hpo" else "hpo is of another version",)}
        problem = find_problem(versions, folder)
        found = {} if problem is None else {"problem": (problem.reason, problem.remedy)}
        return found | {"gpu_bytes": smallest_gpu_bytes()}

    return answer
