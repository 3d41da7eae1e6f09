"""One trial in a worker process: a `TrialSpec` in, one `TrialReport` per epoch out. Does not import ray or the database.

The worker iterates the trainable. An epoch is reported when it has finished; its checkpoint, if it has one, is written while
the next epoch trains. Errors become reports too.
"""

from __future__ import annotations

import faulthandler
import os
import time
import traceback
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from hpo.paths import HANG_FILE, LOG_FILE, SCRIPT_DIR, seed_log
from hpo.search.adoption import Adopted, adopt_checkpoint
from hpo.search.checkpoints.bucket import FETCH_SECONDS, BucketTrial, fetch_newest, newest_of
from hpo.search.checkpoints.files import Checkpoint, TakenOverError, load_checkpoint, trim_checkpoints
from hpo.search.checkpoints.uploads import Uploader
from hpo.search.checkpoints.writer import CheckpointWriter
from hpo.search.messages import Ending, TrialReport, TrialSpec
from hpo.search.replicates import SEED_NOTE, EndedEarlyError, EpochPart, list_seeds, train_replicates
from hpo.search.script import ScriptError, run_script
from hpo.search.storable import storable_name, storable_provenance, storable_text
from hpo.space.command import CHECKPOINT_DIR, build_arguments, uses_checkpoint_dir
from hpo.train import gpu
from hpo.train.imported import imported_torch
from hpo.trainable import DEFAULT_TRAINABLE, FINAL_METRICS, STDERR_SUFFIX, load_trainable


class TrialPaused(Exception):  # noqa: N818 # not an error
    """Thrown into the generator of `run_trial`: the trial ends here, and its last epoch is saved."""


_hang_file: IO[str] | None = None  # where the watchdog of this process leaves the tracebacks, while it watches


@contextmanager
def watchdog(spec: TrialSpec) -> Iterator[None]:
    """Kill this process if an epoch takes too long, and leave the traceback of every thread in the trial's folder."""
    global _hang_file  # a process has one watchdog
    if spec.timeout is None:
        yield
        return
    folder = Path(spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / HANG_FILE).open("w") as file:
        _hang_file = file
        _restart_watchdog(spec)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            _hang_file = None


def _restart_watchdog(spec: TrialSpec) -> None:
    """Let the time of an epoch begin, if it is limited."""
    if spec.timeout is not None and _hang_file is not None:
        # Runs in C, without the GIL: it also catches a hang inside a library.
        faulthandler.dump_traceback_later(spec.timeout, exit=True, file=_hang_file)


def run_trial(spec: TrialSpec) -> Generator[TrialReport, None, str]:
    """Yield one report per epoch, starting from the newest checkpoint. A report with `failure` is the last one.

    When the trial ends, what it used on the GPU is free again. Memory of a failed step is freed before its report. A
    `TrialPaused` that is thrown in saves the last epoch and ends the trial.

    Returns:
        A warning if the last epoch of a paused trial could not be saved; else empty.
    """
    last: TrialReport | None = None
    try:
        try:
            return (yield from _report_epochs(spec))
        except TrialPaused:  # before its first epoch
            return ""
        except TakenOverError:
            last = TrialReport(is_taken_over=True)
        except (ScriptError, EndedEarlyError) as error:
            last = TrialReport(failure=str(error))
        except Exception as error:  # noqa: BLE001 # any error of a trainable fails the trial, not the worker
            last = _describe_failure(error, spec)
    finally:
        if spec.device == "cuda":
            gpu.free_memory()
    if last is not None:
        yield last
    return ""


def end_trial(reports: Generator[TrialReport, None, str], ending: Ending, spec: TrialSpec) -> str:
    """End a trial that its driver stops.

    Args:
        reports: of `run_trial`.
        ending: what becomes of its checkpoints.
        spec: of the trial.

    Returns:
        A warning if its last epoch could not be saved; else empty.
    """
    warning = ""
    if ending.saves:
        try:
            warning = reports.throw(TrialPaused()).failure  # of what failed while it was saved
        except StopIteration as end:
            warning = end.value or ""
        except TrialPaused:  # it has not started
            pass
    reports.close()
    if ending is Ending.DISCARD:
        trim_checkpoints(Path(spec.folder), spec.token, keep=0)
    elif ending is Ending.SAVE_ONLY and not warning:
        trim_checkpoints(Path(spec.folder), spec.token)
    return warning


def _report_epochs(spec: TrialSpec) -> Generator[TrialReport, None, str]:
    folder = Path(spec.folder)
    bucket = BucketTrial(spec.bucket, spec.key) if spec.bucket else None
    writer = CheckpointWriter(
        folder,
        spec.key,
        spec.token,
        every=spec.checkpoint_every,
        last_epoch=spec.max_epochs,
        interval=spec.interval,
        claimed_milliseconds=spec.claimed_milliseconds,
        uploader=None if bucket is None else _uploader(spec, bucket),
    )
    newest = None if bucket is None else newest_of(folder, spec.key)  # before the folder is claimed
    warning = writer.claim()
    if bucket is not None and newest is not None:
        warning = warning or _fetch(spec, bucket, newest)
    # A script that keeps no checkpoints starts from its first epoch and reports all of them again.
    keeps_checkpoints = spec.command is None or uses_checkpoint_dir(spec.command)
    checkpoint = load_checkpoint(folder, spec.key) if keeps_checkpoints else None
    continued_epoch: int | None = None
    if checkpoint is None and spec.parent_folder:
        adopted = _adopt(spec)
        continued_epoch = 0
        if adopted is not None:
            checkpoint, continued_epoch = adopted.checkpoint, adopted.checkpoint.epoch
            warning = warning or adopted.warning
    # Epochs of the parent are not reported one by one: no decision follows them.
    stored_epoch = max(spec.stored_epoch, continued_epoch or 0)
    history = dict(checkpoint.history) if checkpoint else {}
    device = _describe_device(spec)
    recorded: Mapping[str, Any] | None = None  # the provenance of the last report
    shown = ""  # the last warning of the trainable
    earlier = {epoch: metrics for epoch, metrics in history.items() if epoch < stored_epoch}
    of_end: dict[str, Any] = {}  # what the provenance has after the last epoch
    if checkpoint and spec.replicates > 1 and checkpoint.epoch == spec.max_epochs:
        of_end = list_seeds(checkpoint.state)
    for epoch in sorted(history):
        # Including the last stored epoch: the driver may have died before it acted on it.
        if epoch >= stored_epoch:
            yield TrialReport(
                epoch,
                history[epoch],
                is_recalled=True,
                history=earlier,
                continued_epoch=continued_epoch,
                provenance=_news(device | (of_end if epoch == spec.max_epochs else {}), recorded),
            )
            earlier, continued_epoch, recorded = {}, None, device
    with closing(writer), closing(_start_epochs(spec, checkpoint)) as epochs:
        seconds, started = 0.0, time.perf_counter()
        for finished in epochs:
            part_seconds = time.perf_counter() - started
            seconds += part_seconds
            if isinstance(finished, EpochPart):
                _restart_watchdog(spec)
                if keeps_checkpoints:
                    unsaved = writer.part_ended(history, finished.state, part_seconds)
                    if spec.command is not None:  # as after an epoch
                        unsaved = unsaved or writer.save_now()
                    warning = warning or unsaved
                started = time.perf_counter()
                continue
            # Any object with an epoch, metrics and a state is a report. Its numbers may be those of numpy.
            epoch = int(finished.epoch)
            metrics = {storable_name(name): float(value) for name, value in finished.metrics.items()}
            provenance = {**device, **storable_provenance(getattr(finished, "provenance", {}))}
            metrics["epoch_seconds"] = float(getattr(finished, "seconds", seconds))
            history[epoch] = metrics
            if keeps_checkpoints:
                unsaved = writer.epoch_ended(epoch, history, finished.state, part_seconds)
                if spec.command is not None:
                    # A script continues after the last epoch that it saved itself. No epoch before may be missing then.
                    unsaved = unsaved or writer.save_now()
                warning = warning or unsaved
            its_warning = getattr(finished, "warning", "")
            if its_warning != shown:
                warning, shown = "; ".join(filter(None, [warning, its_warning])), its_warning
            report = TrialReport(
                epoch,
                metrics,
                history=earlier,
                continued_epoch=continued_epoch,
                warning=warning,
                provenance=_news(provenance, recorded),
                needs_new_process=getattr(finished, "needs_new_process", False),
            )
            try:
                yield report
            except TrialPaused:
                return writer.save_now() if keeps_checkpoints else ""
            except GeneratorExit:
                writer.abandon_uploads()
                raise
            earlier, continued_epoch, warning, recorded = {}, None, "", provenance
            seconds, started = 0.0, time.perf_counter()
    yield TrialReport(failure=f"the trainable ended after epoch {max(history, default=0)} of {spec.max_epochs}")
    return ""


def _uploader(spec: TrialSpec, bucket: BucketTrial) -> Uploader:
    restart = partial(_restart_watchdog, spec)
    return Uploader(bucket, spec.token, spec.claimed_milliseconds, interval=spec.interval, on_progress=restart)


def _fetch(spec: TrialSpec, bucket: BucketTrial, newest: tuple[int, int]) -> str:
    """Fetch the trial's newest checkpoint, if it is in the bucket.

    Args:
        spec: of the trial.
        bucket: its checkpoints.
        newest: what its folder had before it was claimed.

    Returns:
        A warning if the bucket cannot be read, and the trial can do without.

    Raises:
        OSError: it cannot be read, and without, epochs would be trained again.
    """
    is_complete = newest[1] >= spec.stored_epoch  # nothing is lost, even if the bucket has more
    try:
        fetch_newest(Path(spec.folder), bucket, newest, wait_seconds=0.0 if is_complete else FETCH_SECONDS)
    except OSError as error:
        if not is_complete:
            raise
        return f"it starts without what the bucket may have: {error}"
    return ""


def _adopt(spec: TrialSpec) -> Adopted | None:
    """Take over the parent's checkpoint; None if it has none."""
    is_default = spec.command is None and spec.trainable == DEFAULT_TRAINABLE
    return adopt_checkpoint(
        Path(spec.folder),
        spec.key,
        spec.token,
        parent=Path(spec.parent_folder),
        parent_key=spec.parent_key,
        is_script=spec.command is not None,
        left_out=(*FINAL_METRICS, *(name + STDERR_SUFFIX for name in FINAL_METRICS)) if is_default else (),
        epoch=spec.parent_epoch,
        interval=spec.interval,
        bucket=BucketTrial(spec.parent_bucket, spec.parent_key) if spec.parent_bucket else None,
    )


def _news(provenance: Mapping[str, Any], recorded: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return None if provenance == recorded else provenance


def _describe_failure(error: Exception, spec: TrialSpec) -> TrialReport:
    is_short = gpu.is_out_of_memory(error)
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    for note in getattr(error, "__notes__", ()):
        if note.startswith(SEED_NOTE):
            text = f"seed {note.removeprefix(SEED_NOTE)}: {text}"
    return TrialReport(
        failure=storable_text(f"out of memory: {text}" if is_short else text),
        traceback=storable_text(traceback.format_exc()),
        is_out_of_memory=is_short,
        is_device_lost=gpu.is_mps_lost(error) or gpu.is_device_lost(),
        # A process whose trial failed in the middle of a step may keep memory of the GPU, such as that of a failed capture.
        needs_new_process=spec.device == "cuda",
    )


def _start_epochs(spec: TrialSpec, checkpoint: Checkpoint | None) -> Generator[Any, None, None]:
    """Start the training, or several: the generator yields one `EpochReport` per epoch, and maybe `EpochPart`s."""
    state = checkpoint.state if checkpoint else None
    if spec.replicates == 1:
        return _start_training(spec, spec.seed, state)
    seeds = range(spec.seed, spec.seed + spec.replicates)
    return train_replicates(partial(_start_training, spec), seeds, max_epochs=spec.max_epochs, state=state)


def _start_training(spec: TrialSpec, seed: int, state: Mapping[str, Any] | None) -> Generator[Any, None, None]:
    """Start the trainable, or the script that replaces it; the generator yields one `EpochReport` per epoch."""
    if spec.command is None:
        trainable = load_trainable(spec.trainable, spec.code_folder)
        _limit_threads(spec.threads)
        return trainable(
            spec.params,
            data=spec.data,
            seed=seed,
            max_epochs=spec.max_epochs,
            device=spec.device,
            checkpoint=state,
        )
    folder = Path(spec.folder)
    own, log = folder / SCRIPT_DIR, folder / LOG_FILE
    if spec.replicates > 1:
        own, log = own / f"seed-{seed}", seed_log(folder, seed)
    needs_epoch = uses_checkpoint_dir(spec.command)
    values = {
        "seed": seed,
        "max_epochs": spec.max_epochs,
        "device": spec.device,
        "data_dir": spec.data["data_dir"],
        CHECKPOINT_DIR: own,
    }
    if needs_epoch:
        own.mkdir(parents=True, exist_ok=True)
    return run_script(
        build_arguments(spec.command, values | spec.params),
        log=log,
        max_epochs=spec.max_epochs,
        threads=spec.threads,
        needs_epoch=needs_epoch,
        patterns=spec.patterns,
        last_turn=spec.max_epochs if spec.replicates > 1 else spec.last_wait,
        folder=Path(spec.code_folder),
    )


def _limit_threads(threads: int) -> None:
    """Let torch use this many threads, also if the trainable imports it later."""
    # Read by torch when it is imported:
    os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    if (torch := imported_torch()) is not None:
        torch.set_num_threads(threads)


def _describe_device(spec: TrialSpec) -> dict[str, Any]:
    if spec.device == "cuda":
        import torch

        name = torch.cuda.get_device_name()
    else:
        name = _processor_name()
    return {"device": spec.device, "device_name": name, "threads": spec.threads, "pid": os.getpid()}


def _processor_name() -> str:
    with suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "cpu"
