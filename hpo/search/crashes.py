"""Why a worker died: from what it left in the folder of its trial, or else from Ray's report."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hpo.paths import HANG_FILE, LOST_FILE


def find_reason(folder: Path, report: str, timeout: float | None) -> tuple[str, str]:
    """Return why a worker died, and details: stacks, or Ray's report. Its files are read once, and deleted.

    Args:
        folder: of the trial.
        report: Ray's.
        timeout: seconds without an epoch after which a worker is killed.
    """
    with suppress(OSError):
        hang = folder / HANG_FILE
        stacks = hang.read_text()
        if stacks:
            hang.unlink()
            return f"no epoch within trial_timeout {timeout:g} s, worker killed", stacks
    with suppress(OSError):
        lost = folder / LOST_FILE
        reason, _, stack = lost.read_text().partition("\n")
        lost.unlink()
        return f"the GPU could not be used any more, worker ended: {reason}", stack
    if "OutOfMemory" in report or "running low on memory" in report:
        return "out of memory: Ray killed the worker", report
    return "the worker process died", report
