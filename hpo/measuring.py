"""How a search shares this machine among its trials: measured, with CUDA MPS where trials share a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.search.listener import ProgressListener
from hpo.space.model import Space

if TYPE_CHECKING:
    from hpo.search.estimate import SearchEstimate
    from hpo.search.mps import Mps
    from hpo.search.probes import ImageCounts, Probes
    from hpo.search.slots import Node, Slots
    from hpo.space.parameters import Params


def start_probes(space: Space, data: Mapping[str, Any], runs_dir: Path) -> AbstractContextManager[Probes | None]:
    """Start a process that loads the data. None for other trainables, whose data and speed are unknown."""
    from hpo.search.probes import Probes

    return Probes(data, runs_dir) if space.is_default_trainable else nullcontext()


def measure(
    space: Space,
    slots: Slots,
    left: int | None,
    probes: Probes,
    images: ImageCounts,
    nodes: Sequence[Node],
    listener: ProgressListener,
    begun: Sequence[tuple[Params, int]],
) -> SearchEstimate | None:
    """Measure training steps; None if nothing is left to train, or the device is not on this machine."""
    from hpo.search.estimate import can_measure, estimate_search

    if left == 0 or slots.count == 0 or not can_measure(slots):
        return None
    listener.preparing("measuring training steps")
    return estimate_search(space, slots, left, probes, images, nodes, begun)


def note_mps_failure(mps: Mps, listener: ProgressListener) -> None:
    """Say why CUDA MPS is not used, if it was wanted."""
    if mps.failure:
        listener.note(f"CUDA MPS is not used, so trials that share a GPU take turns: {mps.failure}")


def keep_mps_if_shared(mps: Mps, slots: Slots, listener: ProgressListener) -> None:
    """Say that trials share a GPU under MPS, or stop it: with one trial a GPU, it would only add a way to fail."""
    if not slots.trials_share_gpu:
        mps.stop()
    elif mps.is_active:
        listener.note(
            f"{slots.trials_per_device} trials share a GPU under CUDA MPS: their kernels run at the same time"
        )
