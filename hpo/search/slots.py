"""How trials share a machine or a cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpo.errors import SettingError
from hpo.space.model import Space


@dataclass(frozen=True)
class Slots:
    """The places in which trials run.

    Attributes:
        count: how many trials run at a time.
        cpu: cores of each.
        gpu: GPUs of each; a fraction shares one GPU.
    """

    count: int
    cpu: float
    gpu: float

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


def may_share_gpu(space: Space) -> bool:
    """Return whether a search may run several trials on one GPU, if there is one.

    With `auto`, only trials of the built-in training share a GPU: how many can do so is measured.
    """
    if space.total_trials is not None and space.total_trials < 2:
        return False
    gpu = space.resources.gpu
    return space.is_default_trainable if gpu == "auto" else 0 < gpu <= 0.5


def plan_slots(space: Space, trials: int | None, cores: float, gpus: float) -> Slots:
    """Divide a machine or a cluster among trials, without measuring.

    Args:
        space: its `resources` are used as given; `auto` is one GPU per trial where there are GPUs, else an equal share of
            the cores, at least one.
        trials: how many trials there are to run; None if unknown.
        cores: cores of the whole cluster.
        gpus: GPUs of the whole cluster.

    Raises:
        SettingError: a trial asks for more than the cluster has.
    """
    gpu = (1.0 if gpus else 0.0) if space.resources.gpu == "auto" else space.resources.gpu
    if gpu > gpus:
        raise SettingError(
            f"resources.gpu is {gpu:g}, but there {'is' if gpus == 1 else 'are'} {gpus:g} here: lower it, or leave it auto"
        )
    # A trial with a fraction of a GPU uses one GPU only: 0.15 on 8 GPUs gives 8 x 6 trials.
    by_gpu = math.inf if gpu == 0 else (gpus * (1 / gpu // 1) if gpu < 1 else gpus // gpu)
    if space.resources.cpu == "auto":
        count = max(1, int(min(by_gpu, cores, trials or math.inf)))
        return Slots(count, float(max(1, cores // count)), gpu)
    if space.resources.cpu > cores:
        raise SettingError(f"resources.cpu is {space.resources.cpu:g}, but there are {cores:g} cores here")
    return Slots(int(min(by_gpu, cores // space.resources.cpu)), space.resources.cpu, gpu)
