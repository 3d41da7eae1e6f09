"""A graph on the CPU that behaves as one of CUDA: it repeats recorded operations on recorded memory, without Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

Operation = tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]


class Recorder(TorchDispatchMode):
    """Keeps the operations that run inside it, and a copy of each tensor from outside as it was before."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: set[int] = set()  # storages that an operation created

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [each.detach() for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        for each in inputs:
            if storage_of(each) not in self._own | self.before.keys():
                whole = torch.empty(0, dtype=each.dtype).set_(each.untyped_storage())
                self.before[storage_of(each)] = whole, whole.clone()
        out = func(*args, **kwargs)
        outputs = [each for each in tree_flatten(out)[0] if isinstance(each, Tensor)]
        known = {storage_of(each) for each in inputs}
        fresh = [None if storage_of(each) in known else each.detach() for each in outputs]
        self._own |= {storage_of(each) for each in fresh if each is not None}
        # Detached, so that the recording holds memory and no graph of autograd.
        held_args, held_kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
        self.operations.append((func, held_args, held_kwargs, fresh))
        return out


def storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class RecordedGraph:
    """A `Graph` of `hpo.train.cuda_graph`. As on a GPU, capturing changes no tensor.

    Attributes:
        calls: the names of the methods that were called, in order.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.operations: list[Operation] = []

    def run(self, work: Callable[[], None]) -> None:
        self.calls.append("run")
        work()

    def capture(self, work: Callable[[], None]) -> None:
        self.calls.append("capture")
        with Recorder() as recorder:
            work()
        for tensor, before in recorder.before.values():
            tensor.copy_(before)
        self.operations = recorder.operations

    @torch.no_grad()
    def replay(self) -> None:
        self.calls.append("replay")
        for func, args, kwargs, outputs in self.operations:
            out = [each for each in tree_flatten(func(*args, **kwargs))[0] if isinstance(each, Tensor)]
            for recorded, new in zip(outputs, out, strict=True):
                if recorded is not None:
                    recorded.copy_(new)

    def reset(self) -> None:
        self.calls.append("reset")
        self.operations = []


class FailingGraph(RecordedGraph):
    """A graph that cannot be captured, as after an operation that waits for the device."""

    def capture(self, work: Callable[[], None]) -> None:
        self.calls.append("capture")
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nSearch for `...'")
