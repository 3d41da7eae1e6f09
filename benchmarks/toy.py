"""Trainables that cost nothing, for tests and benchmarks of everything around the training.

`chain` computes in each epoch a number that depends on every epoch before it, through the checkpoint alone: a trial that
was killed and resumed any number of times ends in the very value of `expected_value`, or something was lost.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Report:
    """What a trainable yields; any object with these attributes will do."""

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
    """Yield a chain of hashes. `params`: x, its start; epoch_seconds, each epoch's length; log, a file of epochs done."""
    link = _start(params, seed)
    done = 0
    if checkpoint is not None:
        link, done = checkpoint["link"], checkpoint["epoch"]
    for epoch in range(done + 1, max_epochs + 1):
        time.sleep(params.get("epoch_seconds", 0.0))
        link = _next(link)
        if "log" in params:
            with Path(params["log"]).open("a") as log:
                log.write(f"{params['x']} {epoch}\n")
        yield Report(epoch, {"value": _as_number(link)}, {"link": link, "epoch": epoch})


def expected_value(params: Mapping[str, Any], seed: int, epoch: int) -> float:
    """Return what `chain` reports for an epoch if nothing was ever lost."""
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
    """Fail in epoch 2 in the way that `params["how"]` names; `once` means only if there was no such failure before."""
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
                case "memory":
                    raise MemoryError("no room for the batch")
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "die_once":
                    flag = Path(params["folder"]) / "died"
                    if not flag.exists():
                        flag.touch()
                        os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    time.sleep(3600)
                case "end_early":
                    return
                case "forget_metric":
                    yield Report(epoch, {"valeu": value}, {"epoch": epoch})
        yield Report(epoch, {"value": value}, {"epoch": epoch})


def noop(
    params: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    seed: int,
    max_epochs: int,
    device: str,
    checkpoint: Mapping[str, Any] | None = None,
) -> Iterator[Report]:
    """Yield a report an epoch and do nothing else."""
    done = checkpoint["epoch"] if checkpoint else 0
    for epoch in range(done + 1, max_epochs + 1):
        yield Report(epoch, {"value": params["x"] * epoch}, {"epoch": epoch})
