"""Whether a search can run its trainable, found before trials start."""

from __future__ import annotations

from hpo.errors import TrainableError
from hpo.search.population import explored_names
from hpo.search.subprocesses import start_python
from hpo.search.trainable_import import serve
from hpo.space.model import Space
from hpo.trainable import require_module


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

    It is imported in another process, while this one goes on: it may import torch, which takes over a second, and as long
    again when a process ends. A context manager: leaving the context ends that process. The built-in training and commands
    need no such check.

    Args:
        space: the search.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        is_own = space.command is None and not space.is_default_trainable
        self._child = start_python(serve) if is_own else None
        if self._child is not None:
            self._child.pipe.send(space.trainable)

    def __enter__(self) -> TrainableCheck:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def wait(self) -> None:
        """Wait until the trainable is imported.

        Raises:
            TrainableError: it cannot be imported, or is not a `hpo.trainable.Trainable`.
        """
        if self._child is None:
            return
        try:
            mistake = self._child.pipe.recv()
        except (EOFError, ConnectionError):
            code = self._child.process.wait()
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            mistake = f"trainable: the process that imported {self._space.trainable} was ended {how}"
        self.close()  # now: it would be a zombie until the search ends
        if mistake:
            with self._space.locating_errors("trainable"):
                raise TrainableError(mistake)
