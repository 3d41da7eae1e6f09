"""The nodes of a Ray cluster as they join, leave and are drained, and what a search asks the cluster for.

A node is drained when its machine will be taken away: by `ray drain-node`, a notice of the cloud, or SIGTERM to
`ray start --block`. Ray places nothing on it any more, and ends it when it is idle or at its deadline.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import hpo.search.cluster.connection  # noqa: F401 # first: it sets the environment that ray reads when it is imported

# isort: split
import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from hpo.search.cluster.node_checks import NodeChecks
from hpo.search.cluster.nodes import read_nodes
from hpo.search.slots import MAX_WANTED, Node, Room, Slots

CONNECT_SECONDS = 2.0  # within which a raylet answers
POLL_SECONDS = 1.0  # between two readings of the nodes


class Membership:
    """The places for trials in a cluster that may change.

    Args:
        slots: what each trial gets.
        checks: of the nodes of a cluster that was joined, also those that join later; None if Ray was started for this
            search, and stays as it is.
        answers: returns whether the head of the cluster is there. Nothing is asked of it otherwise: the call would wait.
    """

    def __init__(self, slots: Slots, checks: NodeChecks | None, answers: Callable[[], bool] = lambda: True) -> None:
        self.checks = checks
        self._slots = slots
        self._answers = answers
        self._read_at = -float("inf")
        self._nodes: list[Node] = []
        self._wanted: list[PlacementGroup] = []

    def _refresh(self) -> None:
        if self.checks is not None and self._answers() and time.monotonic() - self._read_at >= POLL_SECONDS:
            # A head node that is being restarted gives no answer. What was known stays then.
            with suppress(ray.exceptions.RayError, RuntimeError, ConnectionError):
                self._nodes = read_nodes()
                self.checks.poll(self._nodes)
            self._read_at = time.monotonic()

    def _usable(self) -> list[Node]:
        """Return the nodes on which trials may start."""
        self._refresh()
        nodes = [node for node in self._nodes if not node.is_drained]
        return nodes if self.checks is None else self.checks.usable(nodes)

    def room(self) -> dict[str, Room]:
        """Return {kind of GPU: the room for trials}, see `Slots.room`."""
        if self.checks is None:
            return {"": Room(self._slots.count, self._slots.gpu)}
        return self._slots.room(self._usable())

    def unused_gpus(self) -> list[Node]:
        """Return the nodes whose GPUs are not used, because the trials run on CPUs."""
        return [] if self._slots.gpu else [node for node in self._usable() if node.gpus]

    def drained(self) -> set[str]:
        """Return the ids of the nodes that are drained."""
        self._refresh()
        return {node.id for node in self._nodes if node.is_drained}

    def has_left(self, node_id: str) -> bool:
        """Return whether a node is not there any more, or is drained.

        Ray notices within 15 s that a machine was switched off, but at once that a worker on it is gone. So its raylet is
        asked.
        """
        if self.checks is None or not node_id:
            return False
        self._read_at = -float("inf")
        self._refresh()
        node = next((node for node in self._nodes if node.id == node_id), None)
        if node is None or node.is_drained:
            return True
        try:
            socket.create_connection(node.address, CONNECT_SECONDS).close()
        except OSError:
            return True
        return False

    def node_of(self, actor: Any) -> str:
        """Return Ray's id of the node of an actor that has started; empty where nodes stay."""
        if self.checks is None:
            return ""
        # No public function asks for one actor without Ray's dashboard; pyproject.toml bounds the version of Ray.
        state: Any = ray._private.state.state  # noqa: SLF001
        return str(state.actor_table(actor._actor_id.hex())["Address"]["NodeID"])  # noqa: SLF001

    def ask_for(self, count: int) -> None:
        """Ask the cluster for places beyond those that there are, so that its autoscaler, if it has one, adds nodes.

        A place is a placement group that waits. As soon as there is room for it, it is removed: a trial takes the room.

        Args:
            count: how many places; 0 withdraws what was asked for.
        """
        if self.checks is None or not self._answers():
            return
        kept: list[PlacementGroup] = []
        for group in self._wanted:
            if len(kept) < count and placement_group_table(group)["state"] == "PENDING":
                kept.append(group)
            else:
                remove_placement_group(group)
        bundle = {"CPU": self._slots.cpu} | ({"GPU": self._slots.gpu} if self._slots.gpu else {})
        selector = self.checks.selector
        labels = None if selector is None else [selector]
        kept += [
            placement_group([bundle], bundle_label_selector=labels) for _ in range(min(count, MAX_WANTED) - len(kept))
        ]
        self._wanted = kept
