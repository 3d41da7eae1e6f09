"""The process in which a search imports the trainable of a user, to check it. See `trainable_check`."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from hpo import trainable
from hpo.errors import TrainableError
from hpo.trainable import load_trainable

MAX_CHARACTERS = 10_000  # of a message

_is_importing = False  # in this process


def serve(file_descriptor: int) -> None:
    """Import the trainable whose name comes through a pipe; answer what is wrong with it, an empty text if nothing is.

    Args:
        file_descriptor: of the pipe.
    """
    global _is_importing
    pipe = Connection(file_descriptor)
    with suppress(EOFError, OSError):
        name = pipe.recv()
        threading.Thread(target=_end_with_driver, args=(pipe,), daemon=True).start()
        _is_importing = True
        mistake = _find_mistake(name)
        _clean_up()
        pipe.send(mistake)
    os._exit(0)  # without the second in which torch would be taken apart


def refuse_while_importing() -> None:
    """Refuse to start a search in the process that imports its trainable: that search would import it again, without end.

    Raises:
        TrainableError: this is that process.
    """
    if _is_importing:
        raise TrainableError(
            "trainable: the module starts a search when it is imported: do that below `if __name__ == '__main__':`"
        )


def _end_with_driver(pipe: Connection) -> None:
    """End this process, and those that it has started, when the driver is gone. It sends nothing more."""
    with suppress(OSError):
        pipe.poll(None)
        os.killpg(0, signal.SIGKILL)


def _find_mistake(name: str) -> str:
    try:
        load_trainable(name)
    except TrainableError as error:
        return str(error)
    except BaseException as error:  # noqa: BLE001 # a module may also end the process, by `sys.exit`
        return f"trainable: {name.partition(':')[0]} cannot be imported:\n{_describe(error)}"
    return ""


def _clean_up() -> None:
    """Do what the module has asked for at exit, such as deleting temporary folders, and write what it has printed."""
    exit_functions: Any = atexit
    exit_functions._run_exitfuncs()  # noqa: SLF001 # a normal exit takes a second with torch
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # the module has closed or replaced it
            stream.flush()


def _describe(error: BaseException) -> str:
    """Return an error as Python prints it, without the calls of hpo and of Python's import system."""
    described = traceback.TracebackException.from_exception(error)
    for each in _chain(described):
        each.stack[:] = [frame for frame in each.stack if not _is_internal(frame.filename)]
    text = "".join(described.format()).rstrip()
    half = MAX_CHARACTERS // 2
    return text if len(text) <= MAX_CHARACTERS else f"{text[:half]}\n[...]\n{text[-half:]}"


def _chain(described: traceback.TracebackException | None) -> Iterator[traceback.TracebackException]:
    """Yield an error and those that led to it."""
    if described is not None:
        yield described
        yield from _chain(described.__cause__)
        yield from _chain(described.__context__)


def _is_internal(filename: str) -> bool:
    return (
        filename in {__file__, trainable.__file__}
        or filename.startswith("<frozen importlib")
        or filename.endswith("/importlib/__init__.py")
    )
