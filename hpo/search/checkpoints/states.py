"""What a trainable may return as its state: what is allowed in it, its size, and copies of it.

This module does not import torch. A state with tensors comes from a process that has.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterable
from types import NoneType
from typing import TYPE_CHECKING, Any

from hpo.train.imported import imported_torch

if TYPE_CHECKING:
    from torch import Tensor

_PLAIN = {NoneType, bool, int, float, complex, str, bytes}
_DICTS = {dict, OrderedDict, Counter}
_SEQUENCES = {list, tuple, set}
_MAX_BITS = 2000  # of an integer: torch reads 255 bytes


def check_plain(value: Any, where: str = "state") -> None:
    """Raise TypeError for values that `weights_only` cannot load, while the trainable's author can still fix it.

    Args:
        value: the trainable's state, or a part of it.
        where: the name of the value in the message.
    """
    if type(value) in _PLAIN:
        if value == b"":
            raise TypeError(f"torch cannot load empty bytes, but {where} is b''")
        if type(value) is int and value.bit_length() > _MAX_BITS:
            raise TypeError(f"torch loads integers of {_MAX_BITS:,} bits, but {where} has {value.bit_length():,}")
    elif type(value) in _DICTS:
        for key, item in value.items():
            check_plain(key, f"a key of {where}")
            check_plain(item, f"{where}[{key!r}]")
        _check_attributes(value, where)
    elif type(value) in _SEQUENCES:
        for i, item in enumerate(value):
            check_plain(item, f"{where}[{i}]")
    elif _can_be_loaded(value):
        _check_attributes(value, where)
    else:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"a checkpoint holds tensors and plain values, but {where} is a {kind}")


def _check_attributes(value: Any, where: str) -> None:
    """Check the attributes of a value; torch itself adds `_metadata` to a state dict."""
    for name, item in _attributes(value).items():
        check_plain(item, f"{where}.{name}")


def has_tensors(value: Any) -> bool:
    """Return whether there is a tensor in a state."""
    return type(value) not in _PLAIN and (_is_tensor(value) or any(map(has_tensors, _items(value))))


def count_bytes(value: Any) -> int:
    """Return the size of all tensors in a state."""
    if type(value) in _PLAIN:
        return 0
    if _is_tensor(value):
        return int(value.element_size() * value.numel())
    return sum(map(count_bytes, _items(value)))


def copy_state(state: dict[str, Any], copies: dict[tuple[Any, ...], Tensor]) -> dict[str, Any]:
    """Return a copy of a state, with all tensors in the memory of the CPU.

    Args:
        state: dicts, lists, tuples and sets of tensors and plain values.
        copies: {position in the state: tensor} of an earlier copy. They are overwritten where the shapes agree.

    Raises:
        MemoryError: there is no room for the copy.
    """
    torch = imported_torch()
    try:
        copied: dict[str, Any] = _copy(state, copies, ())
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()  # copies to pinned memory run on the stream of the training
    except RuntimeError as error:  # torch's allocators
        raise MemoryError(str(error).splitlines()[0]) from error
    return copied


def _copy(value: Any, copies: dict[tuple[Any, ...], Tensor], path: tuple[Any, ...]) -> Any:
    if _is_tensor(value):
        copies[path] = _copy_tensor(value.detach(), copies.get(path))
        return copies[path]
    if isinstance(value, dict):
        copied = copy.copy(value)
        for key, item in value.items():  # not `update`, by which a Counter adds
            copied[key] = _copy(item, copies, (*path, key))
        for name, item in _attributes(value).items():
            setattr(copied, name, _copy(item, copies, (*path, f".{name}")))
        return copied
    if isinstance(value, list | tuple):
        items = [_copy(item, copies, (*path, i)) for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return set(value) if isinstance(value, set) else value


def _copy_tensor(tensor: Tensor, former: Tensor | None) -> Tensor:
    import torch

    if tensor.layout is not torch.strided:
        return tensor.clone().cpu()
    if former is None or (former.shape, former.dtype, former.stride()) != (tensor.shape, tensor.dtype, tensor.stride()):
        former = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return former.copy_(tensor, non_blocking=True)


def _is_tensor(value: Any) -> bool:
    torch = imported_torch()
    return torch is not None and isinstance(value, torch.Tensor)


def _can_be_loaded(value: Any) -> bool:
    """Return whether a value is one that torch can load again, such as a tensor of no other class that is not nested."""
    torch = imported_torch()
    if torch is None:
        return False
    if type(value) in {torch.dtype, torch.device, torch.Size}:
        return True
    return type(value) in {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer} and not value.is_nested


def _items(value: Any) -> Iterable[Any]:
    """Return what is in a value, attributes included."""
    if isinstance(value, dict):
        return itertools.chain(value.keys(), value.values(), _attributes(value).values())
    return value if isinstance(value, list | tuple | set) else ()


def _attributes(value: Any) -> dict[str, Any]:
    return getattr(value, "__dict__", {})
