"""Checkpoints are written atomically; the previous one is the fallback."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpo.search.checkpoints.files import (
    Checkpoint,
    belongs_to,
    claim_folder,
    load_checkpoint,
    save_checkpoint,
    trim_checkpoints,
)
from tests.factories import Attack


def checkpoint_of(epoch: int, **more: Any) -> Checkpoint:
    state = {"epoch": epoch, "weight": torch.full((50, 50), float(epoch)), **more}
    return Checkpoint(epoch, {past: {"val_accuracy": past / 10} for past in range(1, epoch + 1)}, state)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def epoch_in(folder: Path) -> int | None:
    found = load_checkpoint(folder, "k")
    return None if found is None else found.epoch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints, of epochs 1 and 2."""
    folder = tmp_path / "study" / "trial"
    save_checkpoint(folder, checkpoint_of(1))
    save_checkpoint(folder, checkpoint_of(2))
    return folder


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    saved = Checkpoint(
        epoch=7,
        history={6: {"val_loss": 0.1 + 0.2}, 7: {"val_loss": 1e-300}},
        state={"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rest": [None, True, "word", 2**60]},
    )
    save_checkpoint(tmp_path, saved)
    loaded = load_checkpoint(tmp_path, "k")
    assert loaded is not None
    assert (loaded.epoch, loaded.history, loaded.state["rest"]) == (saved.epoch, saved.history, saved.state["rest"])
    again = torch.nn.Linear(3, 2)
    again.load_state_dict(loaded.state["model"])
    assert torch.equal(again.weight, model.weight)
    moments, loaded_moments = optimizer.state_dict()["state"], loaded.state["optimizer"]["state"]
    assert moments.keys() == loaded_moments.keys()
    for number, slots in moments.items():
        for name, value in slots.items():
            assert torch.equal(loaded_moments[number][name], value)


def test_no_folder_and_an_empty_folder_have_no_checkpoint(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, "k") is None
    assert load_checkpoint(tmp_path / "absent", "k") is None


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    for epoch in (8, 9, 10, 11):  # the names must sort as the numbers do
        save_checkpoint(tmp_path, checkpoint_of(epoch))
    assert len(names_in(tmp_path)) == 2
    assert epoch_in(tmp_path) == 11
    next(tmp_path.glob("*11.pt")).unlink()
    assert epoch_in(tmp_path) == 10


def test_an_epoch_saved_twice_is_the_later_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint_of(1, attempt="first"))
    save_checkpoint(tmp_path, checkpoint_of(1, attempt="second"))
    found = load_checkpoint(tmp_path, "k")
    assert found is not None
    assert found.state["attempt"] == "second"
    assert len(names_in(tmp_path)) == 1


def test_a_finished_trial_keeps_its_newest(folder: Path) -> None:
    claim_folder(folder, "k", 5)
    trim_checkpoints(folder, 4)
    assert len(list(folder.glob("*.pt"))) == 2, "another worker has claimed it"
    trim_checkpoints(folder, 5)
    assert len(list(folder.glob("*.pt"))) == 1
    assert epoch_in(folder) == 2


def test_what_cannot_be_deleted_or_read_stays_without_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim_folder(folder, "k", 5)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    for name in ("unlink", "read_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, fail)
            trim_checkpoints(folder, 5)
        assert len(list(folder.glob("*.pt"))) == 2


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999], ids=lambda part: f"{part:.1%} of it")
def test_a_truncated_file_is_set_aside_and_the_one_before_is_taken(folder: Path, part: float) -> None:
    newest = max(folder.glob("*.pt"))
    content = newest.read_bytes()
    newest.write_bytes(content[: int(len(content) * part)])
    found = load_checkpoint(folder, "k")
    assert found is not None
    assert found.epoch == 1
    assert torch.equal(found.state["weight"], checkpoint_of(1).state["weight"])
    assert newest.with_suffix(".damaged").exists()
    assert not newest.exists()
    # The trial reaches the same epoch again.
    save_checkpoint(folder, checkpoint_of(2))
    assert epoch_in(folder) == 2


@pytest.mark.parametrize(
    "content",
    [b"not a checkpoint", pickle.dumps({"epoch": 2}, protocol=2), b"PK\x03\x04"],
    ids=["text", "pickle", "zip"],
)
def test_a_file_that_is_no_checkpoint_is_set_aside(folder: Path, content: bytes) -> None:
    newest = max(folder.glob("*.pt"))
    newest.write_bytes(content)
    assert epoch_in(folder) == 1
    assert newest.with_suffix(".damaged").read_bytes() == content


def test_a_checkpoint_without_its_parts_is_set_aside(folder: Path) -> None:
    newest = max(folder.glob("*.pt"))
    torch.save({"epoch": 2}, newest)
    assert epoch_in(folder) == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=["stale", "memory", "allocator"],
)
def test_an_error_that_may_pass_damages_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    before, load = names_in(folder), torch.load

    def fail_for(epochs: set[int]) -> Callable[..., Any]:
        def fail(path: Path, **options: Any) -> Any:
            if int(path.stem.removeprefix("epoch-")) in epochs:
                raise error
            return load(path, **options)

        return fail

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail_for({2}))
        assert epoch_in(folder) == 1
        patch.setattr(torch, "load", fail_for({1, 2}))
        with pytest.raises(type(error)):
            load_checkpoint(folder, "k")
    assert names_in(folder) == before
    assert epoch_in(folder) == 2


def test_with_every_file_damaged_there_is_no_checkpoint(folder: Path) -> None:
    for path in folder.glob("*.pt"):
        path.write_bytes(b"")
    assert load_checkpoint(folder, "k") is None
    assert [path.suffix for path in folder.iterdir()] == [".damaged", ".damaged"]


# --- whose files ----------------------------------------------------------------------------------------------------


def test_a_folder_belongs_to_the_configuration_that_claims_it_first(tmp_path: Path) -> None:
    folder = tmp_path / "study" / "0"
    assert belongs_to(folder, "a")
    assert claim_folder(folder, "a") == ""
    save_checkpoint(folder, checkpoint_of(1))
    assert claim_folder(folder, "a") == ""
    assert epoch_in(folder) == 1
    assert belongs_to(folder, "a")
    assert not belongs_to(folder, "b")


def test_files_of_other_configurations_are_kept_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "0"
    for key, warning in (("a", ""), ("b", "they are now in 0.other-1"), ("c", "they are now in 0.other-2")):
        assert claim_folder(folder, key).endswith(warning)
        assert load_checkpoint(folder, "k") is None
        save_checkpoint(folder, checkpoint_of(1, key=key))
    assert names_in(tmp_path) == ["0", "0.other-1", "0.other-2"]
    found = load_checkpoint(tmp_path / "0.other-1", "k")
    assert found is not None
    assert found.state["key"] == "a"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"key": '])
def test_a_folder_whose_owner_cannot_be_read_is_claimed(folder: Path, content: str) -> None:
    (folder / "configuration.json").write_text(content)
    assert belongs_to(folder, "a")
    assert claim_folder(folder, "a") == ""
    assert not belongs_to(folder, "b")
    assert epoch_in(folder) == 2


def test_a_folder_of_an_older_version_is_that_of_the_trial_that_resumes(folder: Path) -> None:
    assert belongs_to(folder, "a")
    assert claim_folder(folder, "a") == ""
    assert epoch_in(folder) == 2
    assert not belongs_to(folder, "b")


def test_a_checkpoint_of_another_configuration_is_not_used(tmp_path: Path) -> None:
    """An older copy of the database gives the number out again, and the folder does not say whose it is."""
    claim_folder(tmp_path / "0", "x")
    for epoch in (1, 2):
        save_checkpoint(tmp_path / "0", replace(checkpoint_of(epoch), key="x"))
    (tmp_path / "0/configuration.json").write_bytes(b"")
    claim_folder(tmp_path / "0", "k")
    assert load_checkpoint(tmp_path / "0", "k") is None
    assert names_in(tmp_path / "0") == ["configuration.json", "epoch-000001.other", "epoch-000002.other"]


def test_a_checkpoint_of_an_earlier_version_says_not_whose_it_is(tmp_path: Path) -> None:
    torch.save({"epoch": 2, "history": {}, "state": {}}, tmp_path / "epoch-000002.pt")
    assert epoch_in(tmp_path) == 2


# --- writing that fails -------------------------------------------------------------------------------------------


def test_a_full_disk_is_an_os_error_and_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = names_in(folder)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            save_checkpoint(folder, checkpoint_of(3))
    assert names_in(folder) == before
    assert epoch_in(folder) == 2
    save_checkpoint(folder, checkpoint_of(3))
    assert epoch_in(folder) == 3


def test_a_write_that_the_system_cuts_off_is_an_os_error_and_leaves_what_was_there(folder: Path) -> None:
    resource = pytest.importorskip("resource", reason="needs a limit on the size of files")
    before = names_in(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = checkpoint_of(3, more=torch.zeros(1_000_000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):  # not what torch's writer makes of it
            save_checkpoint(folder, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(folder) == before
    assert epoch_in(folder) == 2


def test_a_state_that_cannot_be_written_leaves_what_was_there(folder: Path) -> None:
    before = names_in(folder)
    with pytest.raises(TypeError, match=r"state\['function'\] is a builtins.function"):
        save_checkpoint(folder, checkpoint_of(3, function=lambda: None))
    assert names_in(folder) == before
    assert epoch_in(folder) == 2


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        save_checkpoint(tmp_path / "file" / "trial", checkpoint_of(1))


# --- loading runs no code -----------------------------------------------------------------------------------------


def test_a_checkpoint_that_carries_code_is_refused_and_the_code_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "the code ran"
    newest = folder / "epoch-000003.pt"
    torch.save({"epoch": 3, "history": {}, "state": {"payload": Attack(mark)}}, newest)
    assert epoch_in(folder) == 2
    assert not mark.exists()
    # Only to show that the file was a working attack.
    torch.load(newest.with_suffix(".damaged"), weights_only=False)
    assert mark.exists()


# --- what must be noticed -----------------------------------------------------------------------------------------


def test_a_flipped_bit_is_noticed(folder: Path) -> None:
    newest = max(folder.glob("*.pt"))
    content = bytearray(newest.read_bytes())
    place = content.find(torch.full((4,), 2.0).numpy().tobytes())  # in the weights of epoch 2
    assert place > 0
    content[place] ^= 1
    newest.write_bytes(content)
    assert epoch_in(folder) == 1


def test_a_half_written_file_of_a_killed_worker_is_removed_at_the_next_start(folder: Path) -> None:
    leftover = folder / "epoch-000003.4242.tmp"
    leftover.write_bytes(b"half")
    assert epoch_in(folder) == 2
    assert not leftover.exists()


def test_a_state_that_could_not_be_loaded_again_is_refused_while_it_is_saved(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['best'\]\[1\] is a numpy.float64"):
        save_checkpoint(folder, checkpoint_of(3, best=[0.5, np.float64(0.5)]))
    assert epoch_in(folder) == 2
