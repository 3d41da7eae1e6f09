"""A training step as a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Protocol

import torch
from torch import Tensor


class Graph(Protocol):
    """Work on a device that is captured once and then replayed."""

    def run(self, work: Callable[[], None]) -> None:
        """Run the work eagerly, as a warm-up."""
        ...

    def capture(self, work: Callable[[], None]) -> None:
        """Record the work without running it.

        Raises:
            RuntimeError: the work cannot be captured.
        """
        ...

    def replay(self) -> None:
        """Run the captured work, on the same memory."""
        ...

    def reset(self) -> None:
        """Free the graph and its memory."""
        ...


class CudaGraph:
    """A `Graph` of torch.cuda. Warm-up and capture run on a side stream, as torch requires.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._stream = _side_stream(torch.cuda.current_device() if device.index is None else device.index)

    def run(self, work: Callable[[], None]) -> None:
        """Run the work eagerly, see `Graph`."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, work: Callable[[], None]) -> None:
        """Record the work, see `Graph`."""
        with torch.cuda.graph(self._graph, stream=self._stream):
            work()

    def replay(self) -> None:
        """Run the captured work, see `Graph`."""
        self._graph.replay()

    def reset(self) -> None:
        """Free the graph and its memory, see `Graph`."""
        self._graph.reset()


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Return the side stream of a GPU. All trials of a process share it: cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream(device)


def new_graph(device: torch.device) -> Graph | None:
    """Return a graph that can capture a step on a device; None on a CPU, where steps are not captured."""
    return CudaGraph(device) if device.type == "cuda" else None


class GraphedStep:
    """Captures a training step and replays it.

    A step of ResNet-18 is about 300 kernels. Launching them one by one takes longer than running them; a graph launches
    all of them at once. The first steps run eagerly: capturing requires a warm-up. Batches of another size always run
    eagerly. If the capture fails, every step does.

    The step is an argument of each call and is not kept: the learner has a GraphedStep, and a reference back to the learner
    would leave both, and the memory of the graph, to the cyclic garbage collector.

    Args:
        batch_size: the size of the batches that are replayed.
        device: of the indices.
        graph: captures and replays.

    Attributes:
        is_captured: whether the step was captured.
        failure: why it could not be captured; empty if it was not tried, or worked.
    """

    WARM_UP = 3  # steps

    def __init__(self, batch_size: int, device: torch.device, graph: Graph) -> None:
        self._indices = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._graph: Graph | None = graph  # None after `close`
        self._steps = 0
        self.is_captured = False
        self.failure = ""

    def __call__(self, step: Callable[[Tensor], None], indices: Tensor) -> None:
        """Take one step.

        Args:
            step: takes one training step on the images at some positions, int64 of shape (B,); always the same.
            indices: the positions.
        """
        if self._graph is None or self.failure or len(indices) != len(self._indices):
            step(indices)
            return
        self._steps += 1
        if self._steps <= self.WARM_UP:
            self._graph.run(lambda: step(indices))
            return
        if not self.is_captured:
            self._capture(self._graph, step)
        if self.is_captured:
            self._indices.copy_(indices)
            self._graph.replay()
        else:
            step(indices)

    def close(self) -> None:
        """Free the graph. Later steps run eagerly."""
        graph, self._graph, self.is_captured = self._graph, None, False
        if graph is not None:
            with suppress(RuntimeError):  # a device that is lost: the error that ended the training says so
                graph.reset()

    def _capture(self, graph: Graph, step: Callable[[Tensor], None]) -> None:
        try:
            with _no_collection():
                graph.capture(lambda: step(self._indices))
            self.is_captured = True
        except RuntimeError as error:  # torch.AcceleratorError and torch.OutOfMemoryError are such
            self.failure = (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect garbage now and not inside the block: a graph that is freed during a capture invalidates the capture."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
