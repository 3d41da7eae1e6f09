"""Trainables that compute almost nothing: tests and benchmarks use them to exercise everything around the training.

Each value that `chain` reports depends on every epoch before it, only through the checkpoint. A trial that is killed and
resumed any number of times must end with `expected_value`; any other value means that something was lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Report:
    """A report of an epoch: the service accepts any object with these attributes."""

    epoch: int
    metrics: dict[str, float]
    checkpoint: dict[str, Any]

    def state(self) -> dict[str, Any]:
        """Return the checkpoint."""
        return self.checkpoint


def chain(
    params: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    seed: int,
    max_epochs: int,
    device: str,
    checkpoint: Mapping[str, Any] | None = None,
) -> Iterator[Report]:
    """Yield a chain of hashes.

    Args:
        params: `x` starts the chain. Optional: `epoch_seconds`, the duration of an epoch; `log`, a file that gets a line
            for each computed epoch; `hold`, see `hold_epochs`.
        data: unused.
        seed: part of the start of the chain.
        max_epochs: the last epoch.
        device: unused.
        checkpoint: the state of the last epoch that was saved.
    """
    link = _start(params, seed)
    done = 0
    if checkpoint is not None:
        link, done = checkpoint["link"], checkpoint["epoch"]
    for epoch in range(done + 1, max_epochs + 1):
        if "hold" in params:
            _wait_while_held(Path(params["hold"]), epoch)
        time.sleep(params.get("epoch_seconds", 0.0))
        link = _next(link)
        if "log" in params:
            with Path(params["log"]).open("a") as log:
                log.write(f"{params['x']} {epoch}\n")
        yield Report(epoch, {"value": _as_number(link)}, {"link": link, "epoch": epoch})


def hold_epochs(hold: Path, epoch: int) -> None:
    """Let every `chain` whose `params["hold"]` is this file wait in this epoch until the file is removed.

    `held_processes` returns who waits.
    """
    shutil.rmtree(_waiting_folder(hold), ignore_errors=True)
    _waiting_folder(hold).mkdir(exist_ok=True)
    draft = hold.with_suffix(".draft")
    draft.write_text(str(epoch))
    draft.replace(hold)


def held_processes(hold: Path) -> set[int]:
    """Return the PIDs of the processes that have waited since the last call of `hold_epochs`."""
    return {int(file.name) for file in _waiting_folder(hold).iterdir()}


def _waiting_folder(hold: Path) -> Path:
    return hold.with_name(f"{hold.name}-waiting")


def _wait_while_held(hold: Path, epoch: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        while int(hold.read_text()) <= epoch:
            (_waiting_folder(hold) / str(os.getpid())).touch()
            time.sleep(0.02)


def expected_value(params: Mapping[str, Any], seed: int, epoch: int) -> float:
    """Return the value that `chain` reports for an epoch if nothing was lost."""
    link = _start(params, seed)
    for _ in range(epoch):
        link = _next(link)
    return _as_number(link)


def _start(params: Mapping[str, Any], seed: int) -> str:
    return f"{params['x']}/{seed}"


def _next(link: str) -> str:
    return hashlib.sha256(link.encode()).hexdigest()


def _as_number(link: str) -> float:
    return int(link[:12], 16) / 16**12


def failing(
    params: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    seed: int,
    max_epochs: int,
    device: str,
    checkpoint: Mapping[str, Any] | None = None,
) -> Iterator[Report]:
    """Fail in epoch 2 in the way that `params["how"]` names. `die_once` and `raise_once` fail only the first time."""
    done = checkpoint["epoch"] if checkpoint else 0
    for epoch in range(done + 1, max_epochs + 1):
        value = epoch / 10
        if epoch == 2:
            match params["how"]:
                case "nan":
                    value = math.nan
                case "inf":
                    value = math.inf
                case "raise":
                    raise ValueError("the trainable's own words")
                case "raise_once" if _is_first_time(params):
                    raise ValueError("only the first time")
                case "memory":
                    raise MemoryError("no room for the batch")
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "die_once" if _is_first_time(params):
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    time.sleep(3600)
                case "end_early":
                    return
                case "forget_metric":
                    yield Report(epoch, {"valeu": value}, {"epoch": epoch})
        yield Report(epoch, {"value": value}, {"epoch": epoch})


def _is_first_time(params: Mapping[str, Any]) -> bool:
    """Return whether this way to fail was not used before, and note in `params["folder"]` that it is now."""
    flag = Path(params["folder"]) / params["how"]
    is_first = not flag.exists()
    flag.touch()
    return is_first


def noop(
    params: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    seed: int,
    max_epochs: int,
    device: str,
    checkpoint: Mapping[str, Any] | None = None,
) -> Iterator[Report]:
    """Yield one report per epoch and do nothing else."""
    done = checkpoint["epoch"] if checkpoint else 0
    for epoch in range(done + 1, max_epochs + 1):
        yield Report(epoch, {"value": params["x"] * epoch}, {"epoch": epoch})


def trade_off(
    params: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    seed: int,
    max_epochs: int,
    device: str,
    checkpoint: Mapping[str, Any] | None = None,
) -> Iterator[Report]:
    """Report two metrics that a search can have as objectives, `gain` and `cost`.

    Args:
        params: either `pair`, a text with both values such as `3 1.5`, or `x` and `y` from 0 to 1: then the gain is x, and
            the cost is x squared plus y. In a pair, `nan` is a value; without the second number, no cost is reported.
        data: unused.
        seed: unused.
        max_epochs: the last epoch.
        device: unused.
        checkpoint: the state of the last epoch that was saved.
    """
    done = checkpoint["epoch"] if checkpoint else 0
    values = (
        [float(part) for part in params["pair"].split()]
        if "pair" in params
        else [params["x"], params["x"] ** 2 + params["y"]]
    )
    for epoch in range(done + 1, max_epochs + 1):
        yield Report(epoch, dict(zip(("gain", "cost"), values, strict=False)), {"epoch": epoch})
