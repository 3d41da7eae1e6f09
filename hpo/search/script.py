"""Runs the user's script as a trial: `command: python train.py --lr {lr}`.

The script prints a line of JSON with its metrics for each epoch; or patterns find them in what it prints. All of its output
is appended to the trial's log. When the trial ends first, or when this process is killed, the script's process group is
killed, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hpo.errors import TrainableError
from hpo.space.command import CHECKPOINT_DIR
from hpo.space.patterns import OutputReader, PatternError

STOP_SECONDS = 5.0  # between SIGTERM and SIGKILL
STDERR_SECONDS = 1.0  # how long to wait for the rest of stderr after the script has ended
TAIL_LINES = 5  # the last lines of the log that are part of the reason of a failure


class ScriptError(Exception):
    """The script failed. The message has the reason and the last lines of the output."""


@dataclass(frozen=True)
class ScriptEpoch:
    """The metrics that a script reported for one epoch. Has the attributes of `hpo.trainable.EpochReport`."""

    epoch: int
    metrics: dict[str, float]

    def state(self) -> dict[str, Any]:
        """Return an empty checkpoint: a script saves its own."""
        return {}


def check_program(command: str) -> None:
    """Check that the program of a command exists.

    Raises:
        TrainableError: it is not on the PATH.
    """
    program = shlex.split(command)[0]
    if shutil.which(program) is None:
        raise TrainableError(f"command: there is no program {program!r} on the PATH")


def run_script(
    arguments: Sequence[str],
    *,
    log: Path,
    max_epochs: int,
    threads: int,
    needs_epoch: bool,
    patterns: Mapping[str, str] | None = None,
    last_turn: int = 0,
    folder: Path | None = None,
) -> Generator[ScriptEpoch, None, None]:
    """Start a script and yield a ScriptEpoch for each line of JSON that has numbers.

    Closing the generator stops the script.

    Args:
        arguments: the program and its arguments.
        log: the file to which the output is appended.
        max_epochs: the last epoch. It is yielded after the script has ended, so that the script can finish its work.
        threads: the script's OMP_NUM_THREADS.
        needs_epoch: whether each line must have an `epoch`. Otherwise lines without one are counted from 1.
        patterns: read the metrics instead of JSON, see `OutputReader`, also from stderr, where Python's logging writes.
        last_turn: up to this epoch, the script is stopped (SIGSTOP) while the generator waits to be asked for the next one,
            so that others can use the device, and that it does not run ahead of them.

    Raises:
        ScriptError: the script failed, ended before the last epoch, or reported epochs that do not increase.
        OSError: the script could not be started.
    """
    parse = OutputReader(patterns).read if patterns else _parse_metrics
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("a", encoding="utf-8") as log_file,
        _started(arguments, log, threads, folder, merges_stderr=bool(patterns)) as (script, stderr_copier),
    ):
        epoch = 0
        last_epoch: ScriptEpoch | None = None
        assert script.stdout is not None
        for line in script.stdout:
            _append(log_file, line)
            try:
                metrics = parse(line)
            except PatternError as error:
                raise ScriptError(f"{error}{_tail(log)}") from None
            if metrics is None:
                continue
            next_epoch = _take_epoch(metrics, epoch, needs_epoch=needs_epoch)
            if last_epoch is not None:  # the script trains beyond the last epoch: do not wait for its end
                break
            epoch = next_epoch
            if epoch >= max_epochs:
                last_epoch = ScriptEpoch(epoch, metrics)
            else:
                if epoch > last_turn:
                    yield ScriptEpoch(epoch, metrics)
                    continue
                _signal_group(script, signal.SIGSTOP)
                try:
                    yield ScriptEpoch(epoch, metrics)
                except GeneratorExit:
                    # Asked to end, it could train and save one more epoch, which would not be read.
                    _signal_group(script, signal.SIGKILL)
                    raise
                _signal_group(script, signal.SIGCONT)
        else:
            failure = _wait(script)
            if stderr_copier is not None:
                stderr_copier.join(STDERR_SECONDS)
            if failure:
                raise ScriptError(f"the script {failure} after epoch {epoch}{_tail(log)}")
        if last_epoch is None:
            raise ScriptError(f"the script ended after epoch {epoch} of {max_epochs}{_tail(log)}")
        yield last_epoch


def _parse_metrics(line: str) -> dict[str, float] | None:
    """Return the numbers of a line of JSON; None if the line is not a JSON object with numbers."""
    if not line.lstrip().startswith("{"):
        return None
    try:
        items = json.loads(line).items()
        numbers = {str(k): float(v) for k, v in items if isinstance(v, int | float) and not isinstance(v, bool)}
    except (ValueError, RecursionError, OverflowError):
        return None
    return numbers or None


def _take_epoch(metrics: dict[str, float], previous: int, *, needs_epoch: bool) -> int:
    """Remove the epoch from the metrics and return it; without one, return the number after the previous epoch."""
    epoch = metrics.pop("epoch", None)
    if epoch is None:
        if needs_epoch:
            raise ScriptError(f"with {{{CHECKPOINT_DIR}}}, each line of metrics must have an epoch")
        return previous + 1
    if not epoch.is_integer() or epoch <= previous:
        remedy = "" if needs_epoch or previous else "; if it reports none, they are counted"
        if needs_epoch and epoch == 0:
            remedy = (
                "; one that counts from 0 must report the next number, also after it has resumed. Without "
                f"{{{CHECKPOINT_DIR}}}, it need not report epochs: then they are counted, and it starts again after a crash"
            )
        raise ScriptError(
            f"epochs must count up from 1, but the script reported epoch {epoch:g} after epoch {previous}{remedy}"
        )
    return int(epoch)


@contextlib.contextmanager
def _started(
    arguments: Sequence[str], log: Path, threads: int, folder: Path | None, *, merges_stderr: bool
) -> Iterator[tuple[subprocess.Popen[str], threading.Thread | None]]:
    """Run a script in a separate process group. It ends with the `with` block or with this process.

    Args:
        arguments: see `run_script`.
        log: see `run_script`.
        threads: see `run_script`.
        folder: see `run_script`.
        merges_stderr: whether stdout has the lines of stderr, too, in the order in which they were written.

    Yields:
        The script, whose stdout is to be read, and the thread that copies its stderr to the log; None if that is merged.
    """
    script = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merges_stderr else subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        cwd=folder,
        # Unbuffered, so that an epoch arrives when it is printed.
        env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads)},
    )
    # The guard kills the group when its stdin closes. Only this process holds the other end, so that happens when it dies.
    guard = subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _; kill -s KILL -- "-$1"', "guard", str(script.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert script.stdout is not None
    stderr_copier = None
    if script.stderr is not None:
        stderr_copier = threading.Thread(target=_copy_lines, args=(script.stderr, log), name="hpo-stderr", daemon=True)
    try:
        if stderr_copier is not None:
            stderr_copier.start()
        yield script, stderr_copier
    finally:
        # Until `wait` below, the system does not reuse the script's PID: neither kill can hit another process.
        _kill_group(script)
        guard.kill()
        guard.communicate()
        # Do not read to the end: a daemon that the script started in another session may hold the pipes open.
        script.stdout.close()
        script.wait()
        if stderr_copier is not None:
            stderr_copier.join(STDERR_SECONDS)


def _copy_lines(stderr: IO[str], log: Path) -> None:
    """Append stderr to the log line by line.

    The script does not write to the log itself: an unbuffered Python writes a line in several parts, and lines from stdout
    would end up between them.
    """
    with stderr, log.open("a", encoding="utf-8") as log_file:
        for line in stderr:
            _append(log_file, line)


def _append(log_file: IO[str], line: str) -> None:
    """Write and flush a line. The log is opened for appending: lines from two threads do not mix."""
    log_file.write(line)
    log_file.flush()


def _wait(script: subprocess.Popen[str], seconds: float | None = None) -> str | None:
    """Wait until the script has ended, without reaping it.

    Returns:
        How it failed; empty if it succeeded, None if it is still running after `seconds`.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        options = os.WEXITED | os.WNOWAIT | (0 if deadline is None else os.WNOHANG)
        ended = os.waitid(os.P_PID, script.pid, options)
        if ended is not None:
            if ended.si_code == os.CLD_EXITED:
                return f"ended with exit code {ended.si_status}" if ended.si_status else ""
            return f"was killed by {signal.Signals(ended.si_status).name}"
        if deadline is not None and time.monotonic() >= deadline:
            return None
        time.sleep(0.02)


def _kill_group(script: subprocess.Popen[str]) -> None:
    """Ask the script to end; then kill it and all processes in its group."""
    _signal_group(script, signal.SIGTERM)
    _signal_group(script, signal.SIGCONT)  # one that was stopped does not hear the first one
    _wait(script, STOP_SECONDS)
    _signal_group(script, signal.SIGKILL)


def _signal_group(script: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal to all processes of a script. It may have ended, but must not have been reaped."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # PermissionError: a zombie on macOS
        os.killpg(script.pid, number)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    return ": " + " | ".join(line.strip() for line in lines if line.strip()) if lines else ", without any output"
