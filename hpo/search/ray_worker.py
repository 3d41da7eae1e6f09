"""The process in which trials run, as an actor of Ray. Workers need no database, and never get its URL."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import hpo.search.cluster.connection  # noqa: F401 # first: it sets the environment that ray reads when it is imported

# isort: split
from ray import tune

from hpo.paths import LOST_FILE
from hpo.search.cluster.code_package import CODE_DIR
from hpo.search.cluster.node_checks import node_id
from hpo.search.cluster.versions import Problem, find_problem
from hpo.search.messages import Ending, TrialReport, TrialSpec
from hpo.search.worker import end_trial, run_trial, watchdog
from hpo.trainable import load_trainable


class TrialWorker(tune.Trainable):
    """A Ray actor that runs one trial after another. What trainables import, such as torch, is imported once per worker."""

    _home: Path | None = None  # where Ray started this process; a trainable may go elsewhere

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """Return what the trial gets of a node."""
        return tune.PlacementGroupFactory([config["bundle"]])

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial. Errors are not raised here, because Tune would not report the trial."""
        self._spec = TrialSpec(**config["spec"])
        self._reports: Generator[TrialReport, None, str] | None = None
        self._needs_new_process = False
        self._problem: Problem | None = None  # why no trial of this search must run on this node
        if "versions" in config:  # of a driver that may be on another machine
            self._home = self._home or Path.cwd()
            self._spec = replace(self._spec, code_folder=_enter_code(self._home))
            self._problem = find_problem(config["versions"], self._spec.folder)
        if self._problem is not None:
            return
        # Import slow modules here, outside the timed epochs. If an import fails, `step` raises the error and reports it.
        if self._spec.command is None:
            with suppress(Exception):
                load_trainable(self._spec.trainable, self._spec.code_folder)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial, unless this process must not run another one.

        Tune reports the error for a trial that is PENDING and removes this worker: StudyScheduler releases the trial, which
        then starts in a new worker. If the process ended here, Tune would count a failure of the trial.

        Raises:
            RuntimeError: this process must not run another trial.
        """
        if self._needs_new_process:
            raise RuntimeError("this process must not run another trial")
        self.setup(new_config)
        return True

    def end(self, ending: Ending) -> str:
        """Free what the trial uses, and stop what it runs, such as a script; see `end_trial`."""
        return "" if self._reports is None else end_trial(self._reports, ending, self._spec)

    def step(self) -> dict[str, Any]:
        """Run one epoch. A process that can no longer use its GPU ends: the trial is retried in another."""
        if self._problem is not None:
            return {"problem": self._problem, "node": node_id()}
        if self._reports is None:
            self._reports = run_trial(self._spec)
        with watchdog(self._spec):
            report = next(self._reports)
        if report.is_device_lost:
            # Not by an exception: a process that has lost its GPU may hang while Python shuts down.
            with suppress(OSError):
                (Path(self._spec.folder) / LOST_FILE).write_text(f"{report.failure}\n{report.traceback}")
            os._exit(1)
        self._needs_new_process = self._needs_new_process or report.needs_new_process
        return {"report": report}


def _enter_code(home: Path) -> str:
    """Go to the code that was sent to this node, and return its folder: as on the driver's machine, a trial runs there.

    Args:
        home: where Ray started this process: the folder with the code, or that of `ray start` if nothing was sent.
    """
    sent = home / CODE_DIR
    if not sent.is_dir():
        return str(home)
    os.chdir(sent)
    sys.path[:] = [path for path in sys.path if path != str(home)]  # see `code_package`
    return str(sent)
