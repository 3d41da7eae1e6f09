"""What SIGTERM does while Ray starts and ends in this process. Does not import ray."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Keep what SIGTERM does, in any thread.

    Ray's C++ code replaces it: when it starts, by writing a page of its log and aborting, and when it ends, by ending the
    process. No option of Ray leaves that out, and the module `signal` works in the main thread only.
    """
    api, number = ctypes.pythonapi, int(signal.SIGTERM)
    api.PyOS_getsig.restype = ctypes.c_void_p
    before = ctypes.c_void_p(api.PyOS_getsig(number))
    try:
        yield
    finally:
        api.PyOS_setsig(number, before)
