"""Training of the documented grid: ResNet-18 on Fashion-MNIST. Of hpo, it imports `errors` and `trainable` only.

`hpo.train:train` is the default trainable. It is imported on first use, so that `hpo.train.params` does not import torch.
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


def __dir__() -> list[str]:
    return __all__
