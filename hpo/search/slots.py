"""How trials share a machine or a cluster."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hpo.errors import SettingError
from hpo.space.model import Space

CONTEXT_BYTES = 2**30  # upper bound of CUDA's own GPU memory per process
MAX_WANTED = 16  # places that a search asks a cluster for at a time; when nodes have joined, it asks for more
KIND_PREFIX = "accelerator_type:"  # of the resource with which Ray names the kind of a node's GPUs


@dataclass(frozen=True)
class Node:
    """A machine on which trials can run.

    Attributes:
        cores: that Ray may use.
        gpus: that Ray may use.
        gpu_kind: what Ray calls its GPUs, such as H100; empty without any.
        gpu_bytes: memory of its smallest GPU; 0 if unknown.
        id: Ray's id of it.
        name: for the user.
        address: host and port at which Ray's own process on it, the raylet, listens.
        is_drained: whether Ray starts nothing on it any more, because its machine will be taken away.
    """

    cores: float
    gpus: float = 0.0
    gpu_kind: str = ""
    gpu_bytes: int = 0
    id: str = ""
    name: str = ""
    address: tuple[str, int] = ("", 0)
    is_drained: bool = False

    def room(self, cpu: float, gpu: float) -> int:
        """Return how many trials of this size run on it at a time."""
        by_cpu = self.cores // cpu
        if gpu == 0:
            return int(by_cpu)
        # A trial with a fraction of a GPU uses one GPU only: 0.15 on 8 GPUs gives 8 x 6 trials.
        by_gpu = self.gpus * (1 / gpu // 1) if gpu < 1 else self.gpus // gpu
        return int(min(by_cpu, by_gpu))


@dataclass(frozen=True)
class Room:
    """The room for trials on nodes with one kind of GPU.

    Attributes:
        count: how many trials run at a time.
        gpu: GPUs of each.
        cpu: cores of each, if fewer than `Slots.cpu`.
    """

    count: int
    gpu: float
    cpu: float | None = None


@dataclass(frozen=True)
class Slots:
    """The places in which trials run.

    Attributes:
        count: how many trials run at a time. In a cluster, this changes with its nodes, see `room`.
        cpu: cores of each.
        gpu: GPUs of each; a fraction shares one GPU.
        trial_bytes: the GPU memory that each needs, without CUDA's own; 0 if unknown. A GPU with less memory than the one
            for which `gpu` was chosen is shared by fewer trials.
        may_have_fewer_cores: whether `cpu` was chosen for the nodes that there were: see `room`.
    """

    count: int
    cpu: float
    gpu: float
    trial_bytes: int = 0
    may_have_fewer_cores: bool = False

    @property
    def threads(self) -> int:
        """The threads that torch uses in one trial."""
        return max(1, int(self.cpu))

    @property
    def device(self) -> str:
        """The device of a trial: `cuda` or `cpu`."""
        return "cuda" if self.gpu > 0 else "cpu"

    @property
    def devices(self) -> float:
        """How many devices a trial holds, for its device time: its GPUs, or on the CPU one, its slot."""
        return self.gpu or 1.0

    @property
    def trials_per_device(self) -> int:
        """How many trials share one GPU, or the CPU."""
        return self.count if self.gpu == 0 else max(1, int(1 / self.gpu))

    @property
    def trials_share_gpu(self) -> bool:
        """Whether several trials use one GPU."""
        return self.gpu > 0 and self.trials_per_device > 1

    def gpu_on(self, node: Node) -> float:
        """Return the GPUs of a trial on a node; infinite if it does not fit into the memory of one."""
        if not self.trials_share_gpu or not self.trial_bytes or not node.gpu_bytes:
            return self.gpu
        fitting = min(self.trials_per_device, (node.gpu_bytes + CONTEXT_BYTES) // (self.trial_bytes + CONTEXT_BYTES))
        return 1 / fitting if fitting else math.inf

    def room(self, nodes: Sequence[Node]) -> dict[str, Room]:
        """Return {kind of GPU: the room} on some nodes. Where trials get the same of all nodes, the kind is empty.

        With `may_have_fewer_cores`, trials have so few that each GPU is used, or one trial runs, also on smaller nodes.
        """
        shares = {self.gpu_on(node) for node in nodes if node.gpus} or {self.gpu}
        if len(shares) == 1:
            gpu = shares.pop()
            return {"": self._room(nodes, gpu)}
        found: dict[str, Room] = {}
        for kind in sorted({node.gpu_kind for node in nodes if node.gpus}):
            alike = [node for node in nodes if node.gpu_kind == kind and node.gpus]
            gpu = max(self.gpu_on(node) for node in alike)
            found[kind] = self._room(alike, gpu)
        return found

    def _room(self, nodes: Sequence[Node], gpu: float) -> Room:
        cpu = self.cpu
        if self.may_have_fewer_cores:
            most = count_room(nodes, 1.0, gpu)
            cpu = _most_cores(nodes, gpu, most if gpu else min(1, most), up_to=cpu)
        return Room(count_room(nodes, cpu, gpu), gpu, None if cpu == self.cpu else cpu)


def may_share_gpu(space: Space) -> bool:
    """Return whether a search may run several trials on one GPU, if there is one.

    With `auto`, only trials of the built-in training share a GPU: how many can do so is measured.
    """
    if space.total_trials is not None and space.total_trials < 2:
        return False
    gpu = space.resources.gpu
    return space.is_default_trainable if gpu == "auto" else 0 < gpu <= 0.5


def plan_slots(space: Space, trials: int | None, nodes: Sequence[Node], *, may_grow: bool = False) -> Slots:
    """Divide a machine or a cluster among trials, without measuring.

    Args:
        space: its `resources` are used as given; `auto` is one GPU per trial where there are GPUs, else an equal share of
            the cores, at least one.
        trials: how many trials there are to run; None if unknown.
        nodes: the machines.
        may_grow: whether other nodes may join: a trial that has no room yet waits for one.

    Raises:
        SettingError: a trial asks for more than any machine has, and none may join.
    """
    gpu, cpu = space.resources.gpu, space.resources.cpu
    if gpu == "auto":
        gpu = 1.0 if any(node.gpus for node in nodes) else 0.0
    most_gpus, most_cores = (max((getattr(node, name) for node in nodes), default=0.0) for name in ("gpus", "cores"))
    if gpu > most_gpus and not may_grow:
        raise SettingError(
            f"resources.gpu is {gpu:g}, but there {'is' if most_gpus == 1 else 'are'} {most_gpus:g} here: "
            "lower it, or leave it auto"
        )
    if cpu == "auto":
        return share_cores(nodes, gpu, trials)
    if cpu > most_cores and not may_grow:
        raise SettingError(f"resources.cpu is {cpu:g}, but there are {most_cores:g} cores here")
    return Slots(count_room(nodes, cpu, gpu), cpu, gpu)


def count_room(nodes: Iterable[Node], cpu: float, gpu: float) -> int:
    """Return how many trials of this size run on some nodes at a time."""
    return sum(node.room(cpu, gpu) for node in nodes)


def share_cores(nodes: Sequence[Node], gpu: float, trials: int | None) -> Slots:
    """Give each trial as many cores as possible while as many trials as possible run at a time.

    Args:
        nodes: the machines.
        gpu: GPUs of each trial.
        trials: how many trials need to run at a time; None for as many as possible.
    """

    most = count_room(nodes, 1.0, gpu)
    wanted = most if trials is None else min(most, trials)
    largest = max((node.cores for node in nodes), default=1.0)
    return Slots(wanted, _most_cores(nodes, gpu, wanted, up_to=largest), gpu)


def _most_cores(nodes: Sequence[Node], gpu: float, wanted: int, *, up_to: float) -> float:
    """Return the most cores that each of `wanted` trials can have, at least 1.

    The search is short: a machine has few hundred cores.
    """
    return next((float(cpu) for cpu in range(int(up_to), 1, -1) if count_room(nodes, cpu, gpu) >= wanted), 1.0)
