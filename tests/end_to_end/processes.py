"""Start `hpo` as a user does, as a process, and read the database with plain SQL."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.guarantees import Expected, read_rows, violations
from benchmarks.toy import held_processes
from tests.factories import ROOT, wait_until

DEADLINE_SECONDS = 240.0  # on two slow cores, with another test at work

# Four toy trials of six epochs.
POINTS = [1, 2, 3, 4]
MAX_EPOCHS = 6
# For tests in which trials do not have to run at the same time: a worker takes seconds to start.
ONE_AT_A_TIME = {"resources": {"cpu": os.cpu_count()}}


def chains(folder: Path, keys: Mapping[str, Any] | None = None, **params: Any) -> Path:
    """Write the search space of four toy trials, `benchmarks.toy:chain`, with more keys and params."""
    space = {
        "sampler": "grid",
        "trainable": "benchmarks.toy:chain",
        "metric": "value",
        "max_epochs": MAX_EPOCHS,
        "checkpoint_every": 1,
        "parameters": {"x": POINTS, "epoch_seconds": 0.1, **params},
        **(keys or {}),
    }
    return write_space(folder, "chains", space)


def write_space(folder: Path, name: str, space: dict[str, Any]) -> Path:
    """Write a search space."""
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(space))  # JSON is YAML
    return path


def environment(**variables: str) -> dict[str, str]:
    """Return the environment without the variables that change what `hpo` does, with this checkout on the path."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HPO_", "RAY_", "PGPASSWORD"))}
    # By default, Ray's workers have a low priority: next to tests that use all cores, one takes minutes to start.
    own = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "RAY_worker_niceness": "0"}
    return clean | own | variables


def command(*arguments: str | Path) -> list[str]:
    """Return `hpo ARGUMENTS`, run from this checkout."""
    return [sys.executable, "-m", "hpo", *map(str, arguments)]


def hpo(folder: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `hpo ARGUMENTS` in a folder to its end."""
    return python(folder, *command(*arguments)[1:], **variables)


def python(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in a folder to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


class Driver:
    """A running `hpo run`, in its own process group as in a terminal, so that Ctrl-C reaches all of its processes.

    What it prints goes to a file: a test can read it while the driver runs.
    """

    def __init__(self, folder: Path, number: int, *arguments: str | Path, **variables: str) -> None:
        self._printed = folder / f"driver-{number}.txt"
        with self._printed.open("w") as printed:
            self._process = subprocess.Popen(
                command("run", *arguments),
                cwd=folder,
                env=environment(**variables),
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def output(self) -> str:
        """Its output so far, stdout and stderr."""
        return self._printed.read_text()

    @property
    def is_running(self) -> bool:
        """Whether it has not exited."""
        return self._process.poll() is None

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; fail the test if the driver exits first."""
        try:
            wait_until(lambda: condition() or not self.is_running, DEADLINE_SECONDS)
            assert condition(), "the driver has exited"
        except AssertionError as error:
            self.kill()
            pytest.fail(f"{error}:\n{self.output}")

    def wait(self) -> int:
        """Wait until it exits; return its exit code."""
        return self._process.wait(timeout=DEADLINE_SECONDS)

    def press_ctrl_c(self) -> None:
        """Send SIGINT to all of its processes, as a terminal does."""
        os.killpg(self.pid, signal.SIGINT)

    def terminate(self) -> None:
        """Send SIGTERM to the driver only, as a service manager does."""
        self._process.terminate()

    def terminate_group(self) -> None:
        """Send SIGTERM to its process group, as a shell or a queue may do."""
        os.killpg(self.pid, signal.SIGTERM)

    def terminate_all(self) -> None:
        """Send SIGTERM to all of its processes, Ray's too, as `scancel` does."""
        for process in [*self.children(), psutil.Process(self.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()

    def kill(self) -> None:
        """Send SIGKILL to the driver only."""
        self._process.kill()
        self._process.wait()

    def is_held(self, hold: Path) -> bool:
        """Return whether one of its workers waits in an epoch, see `benchmarks.toy.hold_epochs`."""
        held = held_processes(hold)
        return bool(held) and bool(held & {child.pid for child in self.children()})

    def children(self) -> list[psutil.Process]:
        """Return the processes that it started, and those that they started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children(recursive=True)
        return []


def rows(database: Path | str, query: str) -> list[tuple[Any, ...]]:
    """Return what a query finds; nothing while the database or the table does not exist."""
    url = f"sqlite:///{database}" if isinstance(database, Path) else database
    return read_rows(url, query)


def count_epochs(database: Path | str) -> int:
    """Return how many epochs of toy trials are stored."""
    return len(rows(database, "SELECT 1 FROM hpo_metrics WHERE name = 'value'"))


def last_epochs(database: Path | str) -> dict[int, int]:
    """Return {number of the trial: its last stored epoch}, of toy trials."""
    query = "SELECT number, max(epoch) FROM hpo_metrics JOIN trials ON trial_id = trial WHERE name = 'value' GROUP BY 1"
    return dict(rows(database, query))


def count_states(database: Path | str) -> dict[str, int]:
    """Return {state: trials}."""
    return dict(rows(database, "SELECT CAST(state AS TEXT), count(*) FROM trials GROUP BY state"))


def check_chains(database: Path | str) -> None:
    """Check that each trial of `chains` is COMPLETE once, with every epoch and the right values."""
    url = f"sqlite:///{database}" if isinstance(database, Path) else database
    assert violations(url, Expected(POINTS, MAX_EPOCHS)) == []
