"""Whether a search can run its trainable, found before trials start."""

from __future__ import annotations

import signal
from contextlib import suppress

from hpo.errors import TrainableError
from hpo.search.population import explored_names
from hpo.search.subprocesses import PythonProcess, start_python
from hpo.search.trainable_import import serve
from hpo.space.model import Space
from hpo.trainable import require_module

POLL_SECONDS = 0.1  # between looks whether the process still runs


def check_values(space: Space) -> None:
    """Check, before anything slow starts, what needs no `TrainableCheck`.

    Raises:
        TrainableError: the built-in training cannot take a value of the space, or there is no such command or module; one
            line per mistake.
        SpaceError: a population has no hyperparameters that can change.
    """
    if space.population is not None:
        explored_names(space)
    if space.command is not None:
        from hpo.search.script import check_program

        with space.locating_errors("command"):
            check_program(space.command)
    elif space.is_default_trainable:
        _check_built_in(space)
    else:
        with space.locating_errors("trainable"):
            require_module(space.trainable)


def _check_built_in(space: Space) -> None:
    from hpo.train.params import read_params  # does not import torch; only workers do

    mistakes: dict[str, None] = {}
    for name, value in space.examples():
        try:
            with space.locating_errors("derived" if name in space.derived else "parameters", name):
                read_params({name: value})
        except TrainableError as error:
            mistakes[str(error)] = None
    if mistakes:
        raise TrainableError("\n".join(mistakes))


class TrainableCheck:
    """Checks that a trainable of the user can be imported.

    Another process imports it, and this one does not wait: a module that imports torch takes over a second, and another
    second at exit. A context manager: leaving the context ends the other process. The built-in training and commands need no
    such check.

    Args:
        space: the search.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self._is_needed = space.command is None and not space.is_default_trainable
        self._child: PythonProcess | None = None

    def __enter__(self) -> TrainableCheck:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def start(self) -> None:
        """Start to import the trainable, unless that was done before."""
        if self._is_needed:
            self._is_needed = False
            self._child = start_python(serve)
            with suppress(OSError):  # it has ended: `wait` says so
                self._child.pipe.send(self._space.trainable)

    def look(self) -> None:
        """Raise what is known already. See `wait`."""
        if self._child is not None and self._child.pipe.poll():
            self.wait()

    def wait(self) -> None:
        """Wait until the trainable is imported. `start` was called before.

        Raises:
            TrainableError: it cannot be imported, or is not a `hpo.trainable.Trainable`.
        """
        if self._child is None:
            return
        mistake = self._receive(self._child)
        self._close()  # now: it would be a zombie until the search ends
        if mistake:
            with self._space.locating_errors("trainable"):
                raise TrainableError(mistake)

    def _receive(self, child: PythonProcess) -> str:
        """Return what is wrong, or how the process has ended instead of saying so."""
        # A process that the module has forked may keep the pipe open.
        while not child.pipe.poll(POLL_SECONDS) and child.process.poll() is None:
            pass
        with suppress(EOFError, OSError):
            if child.pipe.poll():
                return str(child.pipe.recv())
        code = child.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"trainable: the process that imported {self._space.trainable} {how}"

    def _close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None
