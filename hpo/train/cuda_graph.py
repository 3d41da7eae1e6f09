"""A training step as a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class GraphedStep:
    """Captures a training step as a CUDA graph and replays it.

    A step of ResNet-18 is about 300 kernels. Launching them one by one takes longer than running them; a graph launches
    all of them at once. The first steps run eagerly: capturing requires a warm-up. Batches of another size always run
    eagerly. If the capture fails, every step does.

    Args:
        step: takes one training step on the images at some positions, int64 of shape (B,).
        batch_size: the size of the batches that are replayed.
    """

    WARM_UP = 3  # steps

    def __init__(self, step: Callable[[Tensor], None], batch_size: int) -> None:
        self._step = step
        self._indices = torch.zeros(batch_size, dtype=torch.int64, device="cuda")
        self._stream = torch.cuda.Stream()
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, indices: Tensor) -> None:
        """Take one step."""
        if len(indices) != len(self._indices):
            self._step(indices)
            return
        self._steps += 1
        if self._steps == self.WARM_UP + 1:
            self._graph = self._capture()
        if self._graph is not None:
            self._indices.copy_(indices)
            self._graph.replay()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step(indices)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._step(self._indices)
        except RuntimeError as error:
            warnings.warn(
                f"the training step cannot be captured as a CUDA graph, it runs eagerly: {error}", stacklevel=2
            )
            return None
        return graph
