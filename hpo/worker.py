"""One trial in a worker process: plain values in, a Message an epoch out.

The worker iterates the trainable, saves a checkpoint before it reports an epoch, and turns whatever goes wrong into a
Message that says so. It knows neither ray nor the database.
"""

from __future__ import annotations

import faulthandler
import os
import time
import traceback
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpo.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from hpo.command import CHECKPOINT_DIR, LOG_FILE, ScriptError, build_arguments, run_script, uses_checkpoint_dir
from hpo.space import load_trainable

HANG_FILE = "hang.txt"


@dataclass(frozen=True)
class Assignment:
    """All that a worker is told of a trial: plain values.

    Attributes:
        trainable: `module:function`.
        command: the script that takes its place, None if there is none.
        params: hyperparameters and derived values.
        stored_epoch: the last epoch that storage holds; it and later ones found in a checkpoint are reported again.
        folder: where the trial's checkpoints lie, a path that every worker can reach.
        timeout: seconds without an epoch after which the worker counts as hung; None for no limit.
    """

    trainable: str
    command: str | None
    params: dict[str, Any]
    data: dict[str, Any]
    seed: int
    max_epochs: int
    stored_epoch: int
    folder: str
    checkpoint_every: int
    device: str
    threads: int
    timeout: float | None


@dataclass(frozen=True)
class Message:
    """What a worker says after each epoch, or instead of one."""

    epoch: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    recalled: bool = False  # read from a checkpoint, not trained just now
    failure: str = ""
    traceback: str = ""
    warning: str = ""
    provenance: Mapping[str, Any] | None = None


@contextmanager
def watchdog(assignment: Assignment) -> Iterator[None]:
    """Kill this process if the epoch takes too long, leaving every thread's traceback in the trial's folder."""
    if assignment.timeout is None:
        yield
        return
    folder = Path(assignment.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / HANG_FILE).open("w") as file:
        # Runs in C without Python's lock: a hang inside a library is caught too.
        faulthandler.dump_traceback_later(assignment.timeout, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def run_trial(assignment: Assignment) -> Generator[Message, None, None]:
    """Yield a message an epoch, from the newest checkpoint on; a message with `failure` is the last one."""
    import torch

    folder = Path(assignment.folder)
    try:
        torch.set_num_threads(assignment.threads)
        # A script without a folder for its own checkpoints starts from the beginning, and tells all of its epochs again.
        keeps_checkpoints = assignment.command is None or uses_checkpoint_dir(assignment.command)
        checkpoint = load_checkpoint(folder) if keeps_checkpoints else None
        history = dict(checkpoint.history) if checkpoint else {}
        provenance: Mapping[str, Any] | None = _provenance(assignment)
        for epoch in sorted(history):
            # The last stored one too: the driver may have died before it had acted on it.
            if epoch >= assignment.stored_epoch:
                yield Message(epoch, history[epoch], recalled=True, provenance=provenance)
                provenance = None
        with closing(_reports(assignment, checkpoint)) as reports:
            started = time.perf_counter()
            for report in reports:
                metrics = {str(name): float(value) for name, value in report.metrics.items()}
                metrics["epoch_seconds"] = time.perf_counter() - started
                history[report.epoch] = metrics
                warning = ""
                is_due = report.epoch % assignment.checkpoint_every == 0 or report.epoch == assignment.max_epochs
                if keeps_checkpoints and is_due:
                    try:
                        # Before the epoch is reported: what storage holds can be gone on from.
                        save_checkpoint(folder, Checkpoint(report.epoch, history, report.state()))
                    except OSError as error:
                        warning = f"no checkpoint after epoch {report.epoch}: {error}"
                yield Message(report.epoch, metrics, warning=warning, provenance=provenance)
                provenance = None
                started = time.perf_counter()
        yield Message(failure=f"the trainable ended after epoch {max(history, default=0)} of {assignment.max_epochs}")
    except ScriptError as error:
        yield Message(failure=str(error))
    except Exception as error:  # noqa: BLE001 # whatever a trainable raises is the trial's failure, not the worker's
        reason = "out of memory" if "OutOfMemory" in type(error).__name__ or isinstance(error, MemoryError) else ""
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        yield Message(failure=f"{reason}: {text}" if reason else text, traceback=traceback.format_exc())


def _reports(assignment: Assignment, checkpoint: Checkpoint | None) -> Generator[Any, None, None]:
    """Start the trainable, or the script that takes its place."""
    if assignment.command is None:
        return load_trainable(assignment.trainable)(
            assignment.params,
            data=assignment.data,
            seed=assignment.seed,
            max_epochs=assignment.max_epochs,
            device=assignment.device,
            checkpoint=checkpoint.state if checkpoint else None,
        )
    folder = Path(assignment.folder)
    needs_epoch = uses_checkpoint_dir(assignment.command)
    values = {
        "seed": assignment.seed,
        "max_epochs": assignment.max_epochs,
        "device": assignment.device,
        "data_dir": assignment.data["data_dir"],
        CHECKPOINT_DIR: folder / "script",
    }
    if needs_epoch:
        (folder / "script").mkdir(parents=True, exist_ok=True)
    return run_script(
        build_arguments(assignment.command, values | assignment.params),
        log=folder / LOG_FILE,
        max_epochs=assignment.max_epochs,
        threads=assignment.threads,
        needs_epoch=needs_epoch,
    )


def _provenance(assignment: Assignment) -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_name() if assignment.device == "cuda" else _processor()
    return {"device": assignment.device, "device_name": device, "threads": assignment.threads, "pid": os.getpid()}


def _processor() -> str:
    with suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "cpu"
