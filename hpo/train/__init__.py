"""The training of the documented grid. Knows torch, and nothing of the search around it.

Its names are loaded on first use: `hpo.train.params` can be imported without waiting for torch.
"""

from typing import TYPE_CHECKING, Any

from hpo.trainable import EpochReport

if TYPE_CHECKING:
    from hpo.train.loop import train

__all__ = ["EpochReport", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from hpo.train.loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
