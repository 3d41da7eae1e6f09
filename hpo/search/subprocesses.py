"""Python processes that do for a search what this process should not: import torch, train steps."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

from hpo.paths import PACKAGE_DIR


class PythonProcess(NamedTuple):
    """A process, and the pipe to it."""

    process: subprocess.Popen[bytes]
    pipe: Connection

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.kill()
        self.process.wait()


def start_python(function: Callable[[int], None]) -> PythonProcess:
    """Start a process that calls a function with the file descriptor of a pipe to this process.

    It finds the modules that this process finds. Ctrl-C is for this process only, which must end the other one.

    Args:
        function: of a module.
    """
    ours, theirs = multiprocessing.Pipe()
    name = function.__name__
    # multiprocessing would import the caller's main module again, which may be a script that starts a search.
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", f"from {function.__module__} import {name}; {name}({theirs.fileno()})"],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGE_DIR.parent), *sys.path])},
        start_new_session=True,
    )
    theirs.close()
    return PythonProcess(process, ours)
