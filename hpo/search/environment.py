"""The environment of a search: whether it can run the trainable, and its versions, for the record."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from hpo.errors import TrainableError
from hpo.paths import PACKAGE_DIR
from hpo.search.population import explored_names
from hpo.space.model import Space
from hpo.trainable import load_trainable

PACKAGES = ("torch", "torchvision", "optuna", "sqlalchemy", "ray", "numpy")  # whose versions are recorded


def check_trainable(space: Space) -> None:
    """Check, before anything slow starts, that the trainable can be imported and accepts the values of the space.

    Raises:
        TrainableError: it cannot be imported, or cannot take a value of the space; one line per mistake.
        SpaceError: a population has no hyperparameters that can change.
    """
    if space.population is not None:
        explored_names(space)
    if space.command is not None:
        from hpo.search.script import check_program

        with space.locating_errors("command"):
            check_program(space.command)
        return
    if not space.is_default_trainable:
        with space.locating_errors("trainable"), _path_restored():
            load_trainable(space.trainable)
        return
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


@contextmanager
def _path_restored() -> Iterator[None]:
    """Take what was added to Python's path off again: this process does not run the trainable."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before


def note_horizon(space: Space) -> str | None:
    """Return a note if a scheduler compares trials at epochs that say little, because of their schedules; else None."""
    if not (space.is_default_trainable and space.stops_trials_early):
        return None
    from hpo.train.params import TrainParams

    names = dict.fromkeys(str(value) for name, value in space.examples() if name == "schedule")
    late = [name for name in names if TrainParams(schedule=name).depends_on_horizon]
    if not late:
        return None
    return (
        f"scheduler {space.scheduler.name} compares trials before epoch {space.max_epochs}, where the learning rate of "
        f"schedule {' and '.join(late)} is still high: it may stop trials that would have ended well. A higher "
        f"scheduler.{'interval' if space.population else 'grace_period'}, or no scheduler, avoids this"
    )


def describe_environment() -> dict[str, Any]:
    """Return the environment that each run records: code version, package versions, Python, platform, machine."""
    code = metadata.version("hpo")
    git = ["git", "-C", str(PACKAGE_DIR), "describe", "--always", "--dirty", "--abbrev=12"]
    described = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "code": f"{code}+{described}" if described else code,
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.node(),
    }
