"""How trials share a machine or a cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpo.errors import SettingError
from hpo.space.model import Space


@dataclass(frozen=True)
class Slots:
    """How trials share the machine: `count` at a time, each with so many cores and GPUs."""

    count: int
    cpu: float
    gpu: float

    @property
    def threads(self) -> int:
        """Torch's threads in one trial."""
        return max(1, int(self.cpu))

    @property
    def device(self) -> str:
        """The device of a trial."""
        return "cuda" if self.gpu > 0 else "cpu"


def plan_slots(space: Space, trials: int | None, cores: float, gpus: float) -> Slots:
    """Divide a machine or a cluster among trials, without measuring.

    Args:
        space: its `resources` are honoured; `auto` is one GPU a trial where there are GPUs, else an equal share of the
            cores, at least one.
        trials: how many there are to run, None if not known.
        cores: of the whole cluster.
        gpus: likewise.

    Raises:
        SettingError: a trial asks for more than there is.
    """
    gpu = (1.0 if gpus else 0.0) if space.resources.gpu == "auto" else space.resources.gpu
    if gpu > gpus:
        raise SettingError(
            f"resources.gpu is {gpu:g}, but there {'is' if gpus == 1 else 'are'} {gpus:g} here: lower it, or leave it auto"
        )
    # A fraction of a GPU never spans two: 0.15 on 8 GPUs is 8 x 6.
    by_gpu = math.inf if gpu == 0 else (gpus * (1 / gpu // 1) if gpu < 1 else gpus // gpu)
    if space.resources.cpu == "auto":
        count = max(1, int(min(by_gpu, cores, trials or math.inf)))
        return Slots(count, float(max(1, cores // count)), gpu)
    if space.resources.cpu > cores:
        raise SettingError(f"resources.cpu is {space.resources.cpu:g}, but there are {cores:g} cores here")
    return Slots(int(min(by_gpu, cores // space.resources.cpu)), space.resources.cpu, gpu)
