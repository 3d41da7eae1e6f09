"""Reads the nodes of a Ray cluster. Ray must be up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpo.search.slots import KIND_PREFIX, Node


def read_nodes() -> list[Node]:
    """Return the nodes that have cores or GPUs for trials, also those that are drained."""
    import ray

    state: Any = ray._private.state.state  # noqa: SLF001 # no public function lists drained nodes; pyproject.toml bounds ray
    drained = state.get_draining_nodes()
    nodes = [
        Node(
            cores=each["Resources"].get("CPU", 0.0),
            gpus=each["Resources"].get("GPU", 0.0),
            gpu_kind=_gpu_kind(each["Resources"]),
            id=each["NodeID"],
            name=f"{each['NodeManagerHostname']} ({each['NodeManagerAddress']}, {each['NodeID'][:8]})",
            address=(each["NodeManagerAddress"], each["NodeManagerPort"]),
            is_drained=each["NodeID"] in drained,
        )
        for each in ray.nodes()
        if each["Alive"]
    ]
    # Without either: such as the container of the driver, which only connects it to the cluster.
    return [node for node in nodes if node.cores or node.gpus]


def _gpu_kind(resources: Mapping[str, float]) -> str:
    kinds = sorted(name.removeprefix(KIND_PREFIX) for name in resources if name.startswith(KIND_PREFIX))
    return kinds[0] if kinds and resources.get("GPU") else ""
