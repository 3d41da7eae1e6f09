"""The errors of a GPU that a program must tell apart, and the memory that a process keeps on it.

This module does not import torch: a process without it has not used a GPU through it.
"""

from __future__ import annotations

import gc
from contextlib import suppress

from hpo.train.imported import imported_torch

# What torch raises when memory is short, apart from OutOfMemoryError: RuntimeError or its subclass AcceleratorError, with
# the status of CUDA, cuBLAS or cuDNN. The libraries report a handle that they cannot allocate as not initialized.
# A context for which there is no room is refused with "out of memory"; a GPU in exclusive mode refuses it as busy.
OUT_OF_MEMORY = (
    "out of memory",
    "ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "busy or unavailable",
    "can't allocate memory",  # of a CPU
    "create MPS client have been exhausted",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory does not suffice, on a GPU or a CPU."""
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:  # torch.OutOfMemoryError, and others
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def is_device_lost() -> bool:
    """Return whether this process can never use its GPU again.

    After an illegal address, a failed assert on the device or a failed launch, every later call of CUDA in the process
    returns the same error. So the device is asked, instead of comparing messages: this also finds an error that torch has
    not seen yet, and one that a library such as cuBLAS reported in its own words.
    """
    torch = imported_torch()
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:  # torch.AcceleratorError is one
        return not is_out_of_memory(error)
    return False


def is_mps_lost(error: BaseException) -> bool:
    """Return whether an error says that CUDA MPS does not serve this process, as after a fatal error of a neighbour.

    Its server starts again when all of its clients have ended, and then serves new processes.
    """
    return isinstance(error, RuntimeError) and "MPS" in str(error) and not is_out_of_memory(error)


def free_memory() -> None:
    """Return the memory that this process no longer uses to the GPU, for other processes."""
    gc.collect()
    torch = imported_torch()
    if torch is not None and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # after a failed capture, torch 2.11 asserts; the process ends soon
            torch.cuda.empty_cache()
