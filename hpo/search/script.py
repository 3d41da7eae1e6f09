"""A script as a trainable: `command: python train.py --lr {lr}`, which prints a line of JSON with its metrics each epoch.

The command is split into arguments once, and values are put into arguments: no shell reads them. What the script prints
beside its metrics, and all of its standard error, is appended to the trial's log. When the trial ends before the script
does, the script's whole process group is killed; also when this process is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hpo.errors import TrainableError, nearest

LOG_FILE = "log.txt"
CHECKPOINT_DIR = "checkpoint_dir"
# What a command may use beside parameters and derived values.
PLACEHOLDERS = ("seed", "max_epochs", "device", "data_dir", CHECKPOINT_DIR)
STOP_SECONDS = 5.0  # between the request to end and the kill
LAST_LINES = 5  # of the log, in the reason of a failure

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)([^{}]*)\}")


class ScriptError(Exception):
    """The script failed; the text says how, with the last lines of its output."""


@dataclass(frozen=True)
class Epoch:
    """What a script reported for one epoch; it keeps its own checkpoints."""

    epoch: int
    metrics: dict[str, float]

    def state(self) -> dict[str, Any]:
        """Return nothing."""
        return {}


def find_command_mistakes(command: str, known: Iterable[str]) -> list[str]:
    """Return what is wrong with a command: a text for each mistake.

    Args:
        command: as it was written.
        known: the names of parameters and derived values.
    """
    try:
        arguments = shlex.split(command)
    except ValueError as error:
        return [f"cannot be split into arguments: {error}"]
    if not arguments:
        return ["names no program"]
    if _PLACEHOLDER.search(arguments[0]):
        return ["the program cannot be a placeholder"]
    names = [*known, *PLACEHOLDERS]
    found = []
    for name, rest in _PLACEHOLDER.findall(command):
        if rest:
            found.append(f"write {{{name}}} without {rest!r}")
        elif name not in names:
            found.append(f"there is no value {{{name}}}, {nearest(name, names)}")
    return found


def check_program(command: str) -> None:
    """Look for the program of a command.

    Raises:
        TrainableError: it is not there.
    """
    program = shlex.split(command)[0]
    if shutil.which(program) is None:
        raise TrainableError(f"command: there is no program {program!r} on the PATH")


def uses_checkpoint_dir(command: str) -> bool:
    """Tell whether the script keeps checkpoints, and goes on from them when it is started again."""
    return any(name == CHECKPOINT_DIR for name, _ in _PLACEHOLDER.findall(command))


def build_arguments(command: str, values: Mapping[str, Any]) -> list[str]:
    """Return the program and its arguments.

    Args:
        command: one without mistakes.
        values: of the placeholders. One that has none is an inactive parameter: the argument that uses it is left out,
            and with it the flag before it.
    """
    arguments: list[str] = []
    flag = False  # whether the argument before is the flag of this one
    for argument in shlex.split(command):
        names = [name for name, _ in _PLACEHOLDER.findall(argument)]
        if all(name in values for name in names):
            arguments.append(_PLACEHOLDER.sub(lambda match: _written(values[match[1]]), argument))
        elif flag and argument.startswith("{"):
            arguments.pop()
        flag = argument.startswith("-") and not names
    return arguments


def run_script(
    arguments: Sequence[str], *, log: Path, max_epochs: int, threads: int, needs_epoch: bool
) -> Generator[Epoch, None, None]:
    """Start a script and yield an Epoch for each line of JSON with numbers in it.

    Args:
        arguments: the program and its arguments.
        log: what it prints is appended here.
        max_epochs: the last epoch. It is told when the script has ended, so that it can put its things in order.
        threads: OMP_NUM_THREADS of the script.
        needs_epoch: lines must say their `epoch`; else they may, and are counted from 1.

    Raises:
        ScriptError: it ended with an error, or before the last epoch, or its epochs do not count up.
        OSError: it could not be started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as kept, _started(arguments, kept, threads) as script:
        done = 0
        last: Epoch | None = None
        assert script.stdout is not None
        for line in script.stdout:
            kept.write(line)
            kept.flush()
            metrics = _metrics(line)
            if metrics is None:
                continue
            epoch = _next_epoch(metrics, done, needs_epoch=needs_epoch)
            if last is not None:  # it goes on beyond the last epoch: no need to wait for it
                break
            done = epoch
            if epoch >= max_epochs:
                last = Epoch(epoch, metrics)
            else:
                yield Epoch(epoch, metrics)
        else:
            how = _wait(script)
            if how:
                raise ScriptError(f"the script {how} after epoch {done}{_tail(log)}")
        if last is None:
            raise ScriptError(f"the script ended after epoch {done} of {max_epochs}{_tail(log)}")
        yield last


def _written(value: Any) -> str:
    """Return a value as YAML writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _metrics(line: str) -> dict[str, float] | None:
    """Return the numbers of a line of JSON; None if it is no such line."""
    if not line.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(line)
        items = found.items()
        numbers = {str(k): float(v) for k, v in items if isinstance(v, int | float) and not isinstance(v, bool)}
    except (ValueError, RecursionError, OverflowError):
        return None
    return numbers or None


def _next_epoch(metrics: dict[str, float], done: int, *, needs_epoch: bool) -> int:
    """Take the epoch out of the metrics, or count."""
    told = metrics.pop("epoch", None)
    if told is None:
        if needs_epoch:
            raise ScriptError(f"with {{{CHECKPOINT_DIR}}}, each line of metrics must say its epoch")
        return done + 1
    if not told.is_integer() or told <= done:
        raise ScriptError(f"epochs are counted up from 1, but the script told epoch {told:g} after epoch {done}")
    return int(told)


@contextlib.contextmanager
def _started(arguments: Sequence[str], log: IO[str], threads: int) -> Iterator[subprocess.Popen[str]]:
    """Run a script in a process group of its own, which does not outlive the `with`, nor this process."""
    script = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        # Lines must come when they are printed, not when a buffer is full.
        env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads)},
    )
    # Reads from a pipe that only this process holds open: when that breaks, this process is dead.
    guard = subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _; kill -s KILL -- "-$1"', "guard", str(script.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield script
    finally:
        # Until the script is waited for, its number is not given out again: neither kill can hit another process.
        _kill_group(script)
        guard.kill()
        guard.communicate()
        script.communicate()


def _wait(script: subprocess.Popen[str], seconds: float | None = None) -> str | None:
    """Wait for the end without taking it note of; return how it ended if not well, None if it has not ended."""
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
    """Ask the script to end, then kill it and whatever it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS, of a zombie
        os.killpg(script.pid, signal.SIGTERM)
        _wait(script, STOP_SECONDS)
        os.killpg(script.pid, signal.SIGKILL)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    return ": " + " | ".join(line.strip() for line in lines if line.strip()) if lines else ", without a word"
