"""How trials share a machine or a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hpo.errors import SettingError
from hpo.space.model import Space

MAX_WANTED = 16  # places that a search asks a cluster for at a time; when nodes have joined, it asks for more
KIND_PREFIX = "accelerator_type:"  # of the resource with which Ray names the kind of a node's GPUs


@dataclass(frozen=True)
class Node:
    """A machine on which trials can run.

    Attributes:
        cores: that Ray may use.
        gpus: that Ray may use.
        gpu_kind: what Ray calls its GPUs, such as H100; empty without any.
        id: Ray's id of it.
        address: host and port at which Ray's own process on it, the raylet, listens.
    """

    cores: float
    gpus: float = 0.0
    gpu_kind: str = ""
    id: str = ""
    address: tuple[str, int] = ("", 0)

    def room(self, cpu: float, gpu: float) -> int:
        """Return how many trials with so many cores and GPUs run on it at a time."""
        by_cpu = self.cores // cpu
        if gpu == 0:
            return int(by_cpu)
        # A trial with a fraction of a GPU uses one GPU only: 0.15 on 8 GPUs gives 8 x 6 trials.
        by_gpu = self.gpus * (1 / gpu // 1) if gpu < 1 else self.gpus // gpu
        return int(min(by_cpu, by_gpu))


@dataclass(frozen=True)
class Slots:
    """The places in which trials run.

    Attributes:
        count: how many trials run at a time. In a cluster, this changes with its nodes, see `room`.
        cpu: cores of each.
        gpu: GPUs of each; a fraction shares one GPU.
        gpu_by_kind: {kind of GPU: GPUs of a trial there}, where it differs from `gpu`.
    """

    count: int
    cpu: float
    gpu: float
    gpu_by_kind: Mapping[str, float] = field(default_factory=dict)

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

    def on_kind(self, kind: str) -> Slots:
        """Return what a trial gets on nodes with one kind of GPU."""
        return replace(self, gpu=self.gpu_by_kind.get(kind, self.gpu), gpu_by_kind={})

    def room(self, nodes: Iterable[Node]) -> dict[str, int]:
        """Return {kind of GPU: how many trials run at a time} on some nodes.

        Where all trials get the same, one kind, which is empty, stands for all nodes.
        """
        found: dict[str, int] = {}
        for node in nodes:
            kind = node.gpu_kind if self.gpu_by_kind else ""
            found[kind] = found.get(kind, 0) + node.room(self.cpu, self.on_kind(kind).gpu)
        return found


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
    return Slots(sum(node.room(cpu, gpu) for node in nodes), cpu, gpu)


def share_cores(nodes: Sequence[Node], gpu: float, trials: int | None) -> Slots:
    """Give each trial as many cores as possible while as many trials as possible run at a time.

    Args:
        nodes: the machines.
        gpu: GPUs of each trial.
        trials: how many trials need to run at a time; None for as many as possible.
    """

    def count(cpu: float) -> int:
        return sum(node.room(cpu, gpu) for node in nodes)

    wanted = count(1.0) if trials is None else min(count(1.0), trials)
    most = int(max((node.cores for node in nodes), default=1.0))
    # The first of which there is room for as many: the search is short, as a machine has few hundred cores.
    cpu = next((float(cpu) for cpu in range(most, 1, -1) if count(cpu) >= wanted), 1.0)
    return Slots(wanted, cpu, gpu)
