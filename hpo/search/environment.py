"""The environment of a search, for the record, and what to note about its schedules."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from typing import Any

from hpo.paths import PACKAGE_DIR
from hpo.space.model import Space

PACKAGES = ("torch", "torchvision", "optuna", "sqlalchemy", "ray", "numpy")  # whose versions are recorded


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
