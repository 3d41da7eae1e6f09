"""Whether a machine can run the trials of a driver on another one: its packages, its disk, its GPUs. Does not import ray."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from hpo.paths import PACKAGE_DIR

SMI_SECONDS = 20.0  # how long nvidia-smi may take: it loads the driver, if nothing else has


@dataclass(frozen=True)
class Problem:
    """Why a machine cannot run the trials of a search.

    Attributes:
        reason: in one line.
        remedy: a sentence without its full stop.
    """

    reason: str
    remedy: str = (
        "Install there what this machine has, such as with the same image, or with `uv sync` from the same checkout, and "
        "start Ray there again"
    )


def find_problem(versions: Mapping[str, str], folder: str) -> Problem | None:
    """Return why this machine cannot run trials of a driver; None if it can.

    Args:
        versions: of the driver's machine, see `describe_versions`.
        folder: for checkpoints and logs. It is created.
    """
    differences = list_differences(versions, describe_versions())
    if differences:
        return Problem(differences)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        return Problem(
            f"it cannot write to {folder}: {error.strerror}",
            "Start the search from a folder that each node can create, or name such a folder with --checkpoints",
        )
    return None


def smallest_gpu_bytes() -> int:
    """Return the memory of the smallest GPU of this machine; 0 without one, or if it is unknown."""
    ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]  # MiB
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
        return min(int(line) for line in answer.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0


@cache
def describe_versions() -> dict[str, str]:
    """Return {name: version} of what must be the same on the driver's machine and on each node.

    - python, without its last number: Ray sends compiled code, and Ray itself accepts no other.
    - ray: its processes exchange messages of one version.
    - torch, without the build, such as +cu130: trials that are compared must be trained alike, and checkpoints move between
      nodes. Those with and without GPUs have different builds of one version.
    - hpo: driver and workers exchange objects of its classes. Its version rarely changes, so a hash of its source belongs
      to it.

    Not compared are optuna and sqlalchemy, which only the driver uses; torchvision, which downloads data sets; and numpy
    and the other packages of a trainable: nothing says which ones matter, and a missing one fails the trial by name.
    """
    major, minor, _ = platform.python_version_tuple()
    versions = {"python": f"{major}.{minor}"}
    for name in ("ray", "torch"):
        try:
            versions[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            versions[name] = ""
    try:
        version = metadata.version("hpo")
    except metadata.PackageNotFoundError:  # on the path, and not installed
        version = "not installed"
    versions["hpo"] = f"{version}, source {hash_source()}"
    return versions


@cache
def hash_source(home: Path = PACKAGE_DIR.parent) -> str:
    """Return a hash of the source of hpo and storage, 12 hexadecimal digits.

    Args:
        home: the folder that both packages are in.
    """
    digest = hashlib.sha256()
    for package in ("hpo", "storage"):
        for path in sorted((home / package).rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(home).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def list_differences(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """Return how the versions on another machine differ from those of this one; empty if they do not.

    Args:
        here: of this machine, see `describe_versions`.
        there: of the other one; "" for a package that is missing. What it does not say is not compared.
    """
    return "; ".join(
        f"{name} is {there[name]} and {version} here" if there[name] else f"{name} is not installed"
        for name, version in here.items()
        if there.get(name, version) != version
    )
