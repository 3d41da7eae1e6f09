"""The process in which a search imports the trainable of a user, to check it. See `trainable_check`."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection

from hpo import trainable
from hpo.errors import TrainableError
from hpo.trainable import load_trainable


def serve(file_descriptor: int) -> None:
    """Import the trainable whose name comes through a pipe; answer what is wrong with it, an empty text if nothing is.

    Args:
        file_descriptor: of the pipe.
    """
    with suppress(EOFError, ConnectionError), Connection(file_descriptor) as pipe:
        pipe.send(_find_mistake(pipe.recv()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # at once: torch takes a second to clean up


def _find_mistake(name: str) -> str:
    try:
        load_trainable(name)
    except TrainableError as error:
        return str(error)
    except BaseException as error:  # noqa: BLE001 # a module may also end the process, by `sys.exit`
        return f"trainable: {name.partition(':')[0]} cannot be imported:\n{_describe(error)}"
    return ""


def _describe(error: BaseException) -> str:
    """Return an error as Python prints it, without the calls of hpo and of Python's import system."""
    described = traceback.TracebackException.from_exception(error)
    described.stack[:] = [
        frame
        for frame in described.stack
        if frame.filename not in {__file__, trainable.__file__}
        and not frame.filename.startswith("<frozen importlib")
        and not frame.filename.endswith("/importlib/__init__.py")
    ]
    return "".join(described.format()).rstrip()
