"""One trial in a worker process: plain values in, a TrialReport an epoch out.

The worker iterates the trainable, saves a checkpoint before it epochs an epoch, and turns whatever goes wrong into a
TrialReport that says so. It knows neither ray nor the database.
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

from hpo.search.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from hpo.search.script import LOG_FILE, ScriptError, run_script
from hpo.space.command import CHECKPOINT_DIR, build_arguments, uses_checkpoint_dir
from hpo.trainable import load_trainable

HANG_FILE = "hang.txt"


@dataclass(frozen=True)
class TrialSpec:
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
class TrialReport:
    """What a worker says after each epoch, or instead of one."""

    epoch: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    recalled: bool = False  # read from a checkpoint, not trained just now
    failure: str = ""
    traceback: str = ""
    warning: str = ""
    provenance: Mapping[str, Any] | None = None


@contextmanager
def watchdog(spec: TrialSpec) -> Iterator[None]:
    """Kill this process if the epoch takes too long, leaving every thread's traceback in the trial's folder."""
    if spec.timeout is None:
        yield
        return
    folder = Path(spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / HANG_FILE).open("w") as file:
        # Runs in C without Python's lock: a hang inside a library is caught too.
        faulthandler.dump_traceback_later(spec.timeout, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def run_trial(spec: TrialSpec) -> Generator[TrialReport, None, None]:
    """Yield a report an epoch, from the newest checkpoint on; a report with `failure` is the last one."""
    import torch

    folder = Path(spec.folder)
    try:
        torch.set_num_threads(spec.threads)
        # A script without a folder for its own checkpoints starts from the beginning, and tells all of its epochs again.
        keeps_checkpoints = spec.command is None or uses_checkpoint_dir(spec.command)
        checkpoint = load_checkpoint(folder) if keeps_checkpoints else None
        history = dict(checkpoint.history) if checkpoint else {}
        provenance: Mapping[str, Any] | None = _provenance(spec)
        for epoch in sorted(history):
            # The last stored one too: the driver may have died before it had acted on it.
            if epoch >= spec.stored_epoch:
                yield TrialReport(epoch, history[epoch], recalled=True, provenance=provenance)
                provenance = None
        with closing(_epochs(spec, checkpoint)) as epochs:
            started = time.perf_counter()
            for epoch_report in epochs:
                metrics = {str(name): float(value) for name, value in epoch_report.metrics.items()}
                metrics["epoch_seconds"] = time.perf_counter() - started
                history[epoch_report.epoch] = metrics
                warning = ""
                is_due = epoch_report.epoch % spec.checkpoint_every == 0 or epoch_report.epoch == spec.max_epochs
                if keeps_checkpoints and is_due:
                    try:
                        # Before the epoch is reported: what storage holds can be gone on from.
                        save_checkpoint(folder, Checkpoint(epoch_report.epoch, history, epoch_report.state()))
                    except OSError as error:
                        warning = f"no checkpoint after epoch {epoch_report.epoch}: {error}"
                yield TrialReport(epoch_report.epoch, metrics, warning=warning, provenance=provenance)
                provenance = None
                started = time.perf_counter()
        yield TrialReport(failure=f"the trainable ended after epoch {max(history, default=0)} of {spec.max_epochs}")
    except ScriptError as error:
        yield TrialReport(failure=str(error))
    except Exception as error:  # noqa: BLE001 # whatever a trainable raises is the trial's failure, not the worker's
        reason = "out of memory" if "OutOfMemory" in type(error).__name__ or isinstance(error, MemoryError) else ""
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        yield TrialReport(failure=f"{reason}: {text}" if reason else text, traceback=traceback.format_exc())


def _epochs(spec: TrialSpec, checkpoint: Checkpoint | None) -> Generator[Any, None, None]:
    """Start the trainable, or the script that takes its place."""
    if spec.command is None:
        return load_trainable(spec.trainable)(
            spec.params,
            data=spec.data,
            seed=spec.seed,
            max_epochs=spec.max_epochs,
            device=spec.device,
            checkpoint=checkpoint.state if checkpoint else None,
        )
    folder = Path(spec.folder)
    needs_epoch = uses_checkpoint_dir(spec.command)
    values = {
        "seed": spec.seed,
        "max_epochs": spec.max_epochs,
        "device": spec.device,
        "data_dir": spec.data["data_dir"],
        CHECKPOINT_DIR: folder / "script",
    }
    if needs_epoch:
        (folder / "script").mkdir(parents=True, exist_ok=True)
    return run_script(
        build_arguments(spec.command, values | spec.params),
        log=folder / LOG_FILE,
        max_epochs=spec.max_epochs,
        threads=spec.threads,
        needs_epoch=needs_epoch,
    )


def _provenance(spec: TrialSpec) -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_name() if spec.device == "cuda" else _processor()
    return {"device": spec.device, "device_name": device, "threads": spec.threads, "pid": os.getpid()}


def _processor() -> str:
    with suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "cpu"
