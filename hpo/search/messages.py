"""What a driver and its workers send each other about a trial, as plain values. Imports no ray, no torch and no storage."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


@dataclass(frozen=True)
class TrialSpec:
    """All that a worker needs to run a trial, as plain values.

    Attributes:
        trainable: `module:function`.
        command: the script that is run instead of the trainable, or None.
        patterns: read the metrics of the script; empty if it prints JSON.
        key: of the configuration and the attempt: files of another one are not used.
        token: of the claim: a worker with an earlier one saves no checkpoint any more.
        params: hyperparameters and derived values.
        data: what the trainable gets as `data`.
        seed: of the training; the first one, if there are several.
        max_epochs: the last epoch.
        stored_epoch: the last epoch that storage holds. The worker reports it again, and later ones from the checkpoint.
        folder: the trial's folder, for checkpoints and logs.
        checkpoint_every: epochs between checkpoints; None for as many as cost little, see `CheckpointWriter`.
        device: `cpu` or `cuda`.
        threads: the threads that torch uses.
        timeout: seconds without an epoch after which the worker counts as hung; None for no limit.
        code_folder: the folder in which the search was started, or what was sent of it to this machine. The trainable may be
            there, and a script runs there.
        parent_folder: the folder of the trial that this one continues; empty if it starts from its first epoch.
        parent_key: whose that folder must be.
        parent_epoch: from the checkpoint after which epoch it starts, see `read_checkpoint`; 0 for the last.
        interval: after each multiple of this many epochs, other trials may start from this one's checkpoint. It is on the
            disk before the epoch is reported. 0 if none does.
        replicates: how many trainings the trial is, with seeds that count up; see `train_replicates`.
        last_wait: the last epoch after which the driver may end the trial, and resume it later; 0 for none. A script is
            stopped until that is decided: it must not train, and save, epochs that have not been read.
        claimed_milliseconds: when the trial was claimed, by the database's clock.
        bucket: the URL of the trial in a bucket, where its checkpoints are, too; empty without one.
        parent_bucket: that of the trial that this one continues.
    """

    trainable: str
    command: str | None
    patterns: dict[str, str]
    key: str
    token: int
    params: dict[str, Any]
    data: dict[str, Any]
    seed: int
    max_epochs: int
    stored_epoch: int
    folder: str
    checkpoint_every: int | None
    device: str
    threads: int
    timeout: float | None
    code_folder: str
    parent_folder: str = ""
    parent_key: str = ""
    parent_epoch: int = 0
    interval: int = 0
    replicates: int = 1
    last_wait: int = 0
    claimed_milliseconds: int = 0
    bucket: str = ""
    parent_bucket: str = ""


@dataclass(frozen=True)
class TrialReport:
    """The message that a worker sends after each epoch, or when the trial fails.

    Attributes:
        epoch: the finished epoch; 0 in the report of a failure.
        metrics: of that epoch.
        is_recalled: whether the epoch was read from a checkpoint, not trained just now.
        history: {epoch: metrics} of the epochs before, from the checkpoint; with the first report only.
        continued_epoch: the epoch of the parent's checkpoint from which the trial starts, 0 if the parent has none; None if
            it resumes from its own, or has no parent. With the first report only.
        is_taken_over: whether another worker trains the trial now. Nothing follows such a report.
        failure: why the trial failed, in one line; empty if it did not. Nothing follows such a report.
        traceback: of the failure.
        warning: something that went wrong and does not stop the trial.
        provenance: where the trial runs and how; with the first report, and again when it changes.
        is_out_of_memory: whether the memory of the device did not suffice. Only with `failure`.
        is_device_lost: whether no trial can use the GPU any more in this process. Only with `failure`.
        needs_new_process: whether this process must not run another trial.
        node: the name of the machine.
    """

    epoch: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    is_recalled: bool = False
    history: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    continued_epoch: int | None = None
    is_taken_over: bool = False
    failure: str = ""
    traceback: str = ""
    warning: str = ""
    provenance: Mapping[str, Any] | None = None
    is_out_of_memory: bool = False
    is_device_lost: bool = False
    needs_new_process: bool = False
    node: str = field(default_factory=platform.node)


class Ending(Enum):
    """What becomes of the checkpoints of a trial that its driver ends."""

    KEEP = "those that are written stay"
    SAVE = "the last epoch is saved, if it is not"
    SAVE_ONLY = "the last epoch is saved, and earlier ones are deleted"
    DISCARD = "they are deleted"

    @property
    def saves(self) -> bool:
        """Whether the last epoch is saved."""
        return self in {Ending.SAVE, Ending.SAVE_ONLY}
