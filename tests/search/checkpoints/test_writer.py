"""Checkpoints are written while the next epoch trains, as often as they are cheap."""

from __future__ import annotations

import errno
import itertools
import platform
import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo.search.checkpoints import writer as checkpoint_writer
from hpo.search.checkpoints.files import Checkpoint, TakenOverError, claim_folder, load_checkpoint, save_checkpoint
from hpo.search.checkpoints.states import copy_state
from hpo.search.checkpoints.writer import COST_SHARE, MAX_WORK_SECONDS, CheckpointWriter

LAST_EPOCH = 1000
KEY = "k"


class Disk:
    """Takes the place of `save_checkpoint`: each write lasts until it is let through, and may fail."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.written: list[int] = []
        self.errors: list[Exception] = []
        self._gate = threading.Semaphore(0)
        self._begun = threading.Semaphore(0)

    def save(self, folder: Path, checkpoint: Checkpoint, token: int = 0, *, interval: int = 0) -> None:
        self.started.append(checkpoint.epoch)
        self._begun.release()
        assert self._gate.acquire(timeout=30)
        if self.errors:
            raise self.errors.pop(0)
        self.written.append(checkpoint.epoch)

    def wait_for_write(self) -> None:
        assert self._begun.acquire(timeout=30), "no write has started"

    def let_through(self, writes: int = 1) -> None:
        self._gate.release(writes)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", disk.save)
    yield disk
    disk.let_through(100)


@pytest.fixture
def writer_of(tmp_path: Path) -> Iterator[Callable[..., CheckpointWriter]]:
    built: list[CheckpointWriter] = []

    def build(every: int | None = 1, token: int = 0) -> CheckpointWriter:
        built.append(CheckpointWriter(tmp_path / "trial", KEY, token, every=every, last_epoch=LAST_EPOCH))
        return built[-1]

    yield build
    for writer in built:
        writer.close()


def end_epoch(writer: CheckpointWriter, epoch: int, state: dict[str, Any] | None = None, seconds: float = 1.0) -> str:
    return writer.epoch_ended(epoch, {epoch: {"value": 1.0}}, lambda: state or {"epoch": epoch}, seconds)


# --- while the next epoch trains ------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(disk: Disk, writer_of: Callable[..., CheckpointWriter]) -> None:
    writer = writer_of()
    end_epoch(writer, 1)  # returns, although the disk does not
    disk.wait_for_write()
    assert disk.written == []
    disk.let_through()
    writer.close()
    assert disk.written == [1]


def test_one_checkpoint_is_written_at_a_time(disk: Disk, writer_of: Callable[..., CheckpointWriter]) -> None:
    writer = writer_of()
    end_epoch(writer, 1)
    disk.wait_for_write()
    second = threading.Thread(target=end_epoch, args=(writer, 2))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "each epoch was asked for: the second waits for the first"
    assert disk.started == [1]
    disk.let_through(2)
    second.join(30)
    writer.close()
    assert disk.written == [1, 2]


def test_an_automatic_checkpoint_is_left_out_while_one_is_written(
    disk: Disk, writer_of: Callable[..., CheckpointWriter]
) -> None:
    writer = writer_of(every=None)
    end_epoch(writer, 1, seconds=MAX_WORK_SECONDS)
    disk.wait_for_write()
    end_epoch(writer, 2, seconds=MAX_WORK_SECONDS)
    assert disk.started == [1]
    disk.let_through(2)
    writer.close()


def test_a_checkpoint_has_the_state_at_the_end_of_its_epoch(
    disk: Disk, writer_of: Callable[..., CheckpointWriter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next epoch changes the tensors and the lists in place while they are written."""

    def save_late(folder: Path, checkpoint: Checkpoint, token: int = 0, *, interval: int = 0) -> None:
        disk.save(folder, checkpoint, token)
        save_checkpoint(folder, checkpoint, token)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", save_late)
    weight, history, losses = torch.ones(3), {1: {"value": 1.0}}, [1.0]
    writer = writer_of()
    writer.epoch_ended(1, history, lambda: {"weight": weight, "losses": losses}, 1.0)
    disk.wait_for_write()
    weight.mul_(2)
    losses.append(2.0)
    history[2] = {"value": 2.0}
    disk.let_through()
    writer.close()
    found = load_checkpoint(tmp_path / "trial", KEY)
    assert found is not None
    assert found.state["weight"].tolist() == [1.0, 1.0, 1.0]
    assert (found.state["losses"], found.history) == ([1.0], {1: {"value": 1.0}})


def test_the_last_epoch_is_on_the_disk_before_it_is_reported(
    tmp_path: Path, writer_of: Callable[..., CheckpointWriter]
) -> None:
    writer = writer_of(every=None)
    assert end_epoch(writer, LAST_EPOCH, seconds=0.0) == ""
    found = load_checkpoint(tmp_path / "trial", KEY)
    assert found is not None
    assert found.epoch == LAST_EPOCH


def test_saving_now_saves_the_last_epoch_once(disk: Disk, writer_of: Callable[..., CheckpointWriter]) -> None:
    writer = writer_of(every=2)
    assert writer.save_now() == ""
    assert disk.started == []
    disk.let_through(10)
    end_epoch(writer, 1)
    for _ in range(2):
        assert writer.save_now() == ""
    end_epoch(writer, 2)
    assert writer.save_now() == ""
    assert disk.written == [1, 2]


# --- how often ------------------------------------------------------------------------------------------------------------


def test_a_number_of_epochs_is_kept(disk: Disk, writer_of: Callable[..., CheckpointWriter]) -> None:
    disk.let_through(10)
    writer = writer_of(every=3)
    for epoch in range(1, 8):
        end_epoch(writer, epoch, seconds=10_000.0)
    writer.close()
    assert disk.written == [3, 6]


@pytest.mark.parametrize(
    ("cost_seconds", "epoch_seconds"), [(0.3, 1.0), (0.3, 7.0), (0.5, 100.0), (4.0, 50.0), (60.0, 50.0), (1e-3, 1e-3)]
)
def test_automatic_checkpoints_cost_their_share_and_come_at_least_every_five_minutes(
    monkeypatch: pytest.MonkeyPatch,
    writer_of: Callable[..., CheckpointWriter],
    cost_seconds: float,
    epoch_seconds: float,
) -> None:
    """The thread reports a cost instead of its CPU time."""
    epochs: list[int] = []
    clock = [0.0]

    def save(folder: Path, checkpoint: Checkpoint, token: int = 0, *, interval: int = 0) -> None:
        epochs.append(checkpoint.epoch)
        clock[0] += cost_seconds

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", save)
    monkeypatch.setattr(time, "thread_time", lambda: clock[0])
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    writer = writer_of(every=None)
    for epoch in range(1, 900):
        end_epoch(writer, epoch, seconds=epoch_seconds)
        if writer._save is not None:
            writer._save.result.result()
    gaps = [b - a for a, b in itertools.pairwise(epochs)]
    assert len(gaps) > 2
    assert max(gaps) * epoch_seconds <= max(cost_seconds / COST_SHARE, epoch_seconds) + epoch_seconds
    assert max(gaps) * epoch_seconds <= MAX_WORK_SECONDS + epoch_seconds
    if cost_seconds / COST_SHARE < MAX_WORK_SECONDS:
        assert len(gaps) * cost_seconds <= COST_SHARE * 1.01 * sum(gaps) * epoch_seconds


def test_the_first_automatic_checkpoint_depends_on_the_size_of_the_state(
    disk: Disk, writer_of: Callable[..., CheckpointWriter]
) -> None:
    disk.let_through(10)
    small, large = (
        {"weight": torch.zeros(10)},
        {"weight": torch.zeros(10_000_000)},
    )  # 40 MB: 0.4 s, which is 3 % of 13 s
    for state, seconds, expected in ((small, 1.0, [1]), (large, 5.0, [3])):
        disk.written.clear()
        writer = writer_of(every=None)
        for epoch in (1, 2, 3):
            end_epoch(writer, epoch, state, seconds)
            if disk.written or writer._save is not None:
                break
        writer.close()
        assert disk.written == expected


# --- what goes wrong ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_written_is_a_warning_of_a_later_epoch_and_due_again(
    disk: Disk, writer_of: Callable[..., CheckpointWriter]
) -> None:
    disk.errors.append(OSError("no space left on device"))
    disk.let_through(10)
    writer = writer_of(every=None)
    assert end_epoch(writer, 1, seconds=MAX_WORK_SECONDS) == ""
    assert writer._save is not None
    assert isinstance(writer._save.result.exception(timeout=30), OSError)
    assert end_epoch(writer, 2, seconds=1.0) == "no checkpoint after epoch 1: no space left on device"
    writer.close()
    assert disk.written == [2]


def test_without_room_on_the_disk_the_folder_the_machine_and_the_remedy_are_said(
    disk: Disk, writer_of: Callable[..., CheckpointWriter], tmp_path: Path
) -> None:
    disk.errors.append(OSError(errno.ENOSPC, "No space left on device"))
    disk.let_through(1)
    writer = writer_of()
    said = end_epoch(writer, LAST_EPOCH)
    assert re.fullmatch(
        rf"no checkpoint after epoch {LAST_EPOCH}: no room for it in {tmp_path}\S* on {platform.node()}\. "
        "Free some: `hpo clean` lists what no search needs",
        said,
    )
    writer.close()


def test_without_room_for_the_copy_training_goes_on(
    disk: Disk, writer_of: Callable[..., CheckpointWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    writer = writer_of()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", no_room)
        assert end_epoch(writer, 1, {"w": torch.ones(2)}) == "no checkpoint after epoch 1: CUDA error: out of memory"
    disk.let_through(1)
    assert end_epoch(writer, 2, {"w": torch.ones(2)}) == ""
    writer.close()
    assert disk.written == [2]


def test_a_state_that_cannot_be_loaded_fails_in_its_own_epoch(
    disk: Disk, writer_of: Callable[..., CheckpointWriter]
) -> None:
    with pytest.raises(TypeError, match=r"state\['model'\] is a torch.nn.modules.linear.Linear"):
        end_epoch(writer_of(), 1, {"model": torch.nn.Linear(1, 1)})


def test_a_worker_whose_trial_was_taken_over_notices_it_in_the_next_epoch(
    tmp_path: Path, writer_of: Callable[..., CheckpointWriter]
) -> None:
    writer = writer_of(token=1)
    assert writer.claim() == ""
    claim_folder(tmp_path / "trial", KEY, 2)
    end_epoch(writer, 1)
    with pytest.raises(TakenOverError):
        end_epoch(writer, 2)


# --- the copy -------------------------------------------------------------------------------------------------------------


def test_a_copy_loads_as_the_state_does_and_shares_nothing_with_it() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    state = {"model": model.state_dict(), "rest": [1, (2.5, "x"), {"a", None}, torch.tensor(3)]}
    copied = copy_state(state, {})
    assert isinstance(copied["model"], OrderedDict)
    assert copied["model"]._metadata == state["model"]._metadata  # type: ignore[attr-defined]
    assert copied["rest"][:3] == [1, (2.5, "x"), {"a", None}]
    for name, tensor in model.state_dict().items():
        assert torch.equal(copied["model"][name], tensor)
        assert copied["model"][name].stride() == tensor.stride()
        assert copied["model"][name].data_ptr() != tensor.data_ptr()


def test_a_copy_has_the_same_counts() -> None:
    state = {"counts": Counter("aab")}
    copied = copy_state(state, {})
    assert copied == {"counts": Counter(a=2, b=1)}
    copied["counts"]["a"] = 0
    assert state["counts"]["a"] == 2


def test_a_copy_has_its_own_attributes() -> None:
    state = OrderedDict(a=1)
    state.history = [1]  # type: ignore[attr-defined]
    copied = copy_state({"m": state}, {})
    state.history.append(2)  # type: ignore[attr-defined]
    assert copied["m"].history == [1]


def test_the_memory_of_a_copy_is_used_again_where_the_shapes_agree() -> None:
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    first = copy_state({"w": torch.ones(3), "grows": torch.ones(2)}, copies)
    second = copy_state({"w": torch.zeros(3), "grows": torch.ones(4)}, copies)
    assert second["w"] is first["w"]
    assert first["w"].tolist() == [0.0] * 3
    assert second["grows"].tolist() == [1.0] * 4


def test_sparse_tensors_and_weights_with_gradients_can_be_copied() -> None:
    sparse = torch.eye(3).to_sparse()
    copied = copy_state({"sparse": sparse, "weight": torch.ones(2, requires_grad=True)}, {})
    assert torch.equal(copied["sparse"].to_dense(), torch.eye(3))
    assert not copied["weight"].requires_grad
