"""Python processes that do for a search what this process should not: import torch, train steps."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NamedTuple

from hpo.paths import PACKAGE_DIR

# Python's path is an argument, not a variable: another Python that the process starts must not get it.
_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import {name}; {name}(int(sys.argv[2]))"


class PythonProcess(NamedTuple):
    """A process, and the pipe to it."""

    process: subprocess.Popen[bytes]
    pipe: Connection

    def close(self) -> None:
        """End the process, and those that it has started."""
        self.pipe.close()
        self.process.kill()
        with suppress(ProcessLookupError, PermissionError):  # no other is left; macOS says the latter
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start_python(function: Callable[[int], None]) -> PythonProcess:
    """Start a process that calls a function with the file descriptor of a pipe to this process.

    It finds modules in the folders in which this process finds them. Ctrl-C is for this process only, which must end the
    other one.

    Args:
        function: at the top level of a module.
    """
    ours, theirs = multiprocessing.Pipe()
    # Not one of the standard streams, if this process has closed them: what the function prints would go there.
    number = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
    theirs.close()
    code = _CODE.format(module=function.__module__, name=function.__name__)
    path = json.dumps([*map(str, sys.path), str(PACKAGE_DIR.parent)])
    try:
        # multiprocessing would import the caller's main module again, which may be a script that starts a search.
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, path, str(number)],
            pass_fds=[number],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    finally:
        os.close(number)
    return PythonProcess(process, ours)
