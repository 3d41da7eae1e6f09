"""Kernels of cuDNN whose numbers do not change from run to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic_kernels(is_wanted: bool) -> Iterator[None]:
    """Let cuDNN choose only kernels that add in a fixed order, inside the block. Without `is_wanted`, change nothing.

    A CUDA graph that is captured inside the block keeps these kernels.
    """
    if not is_wanted:
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    # The benchmark chooses by speed: two runs may get different kernels, each of them deterministic.
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
