"""Checkpoints are uploaded while the trial trains, one at a time. On moto's S3 server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpo.search.checkpoints import writer as checkpoint_writer
from hpo.search.checkpoints.bucket import BucketTrial
from hpo.search.checkpoints.files import TakenOverError, checkpoint_file, epoch_of
from hpo.search.checkpoints.uploads import Uploader
from hpo.search.checkpoints.writer import CheckpointWriter
from tests.factories import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.slow

KEY, LAST_EPOCH = "k", 100


class Gate:
    """Takes the place of `BucketTrial.upload`: each upload lasts until it is let through."""

    def __init__(self) -> None:
        self.uploaded: list[int] = []
        self.error: Exception | None = None
        self.at_a_time = 0
        self._gate, self._begun = threading.Semaphore(0), threading.Semaphore(0)

    def upload(self, _trial: BucketTrial, file: Path, _token: int, _claimed: int, **_: Any) -> None:
        self.at_a_time += 1
        assert self.at_a_time == 1
        self._begun.release()
        assert self._gate.acquire(timeout=30)
        self.at_a_time -= 1
        if self.error is not None:
            raise self.error
        self.uploaded.append(epoch_of(file))

    def wait_for_upload(self) -> None:
        assert self._begun.acquire(timeout=30), "no upload has started"

    def let_through(self, count: int = 1) -> None:
        self._gate.release(count)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(BucketTrial, "upload", lambda *given, **options: gate.upload(*given, **options))
    yield gate
    gate.let_through(100)


@pytest.fixture
def writer_of(tmp_path: Path) -> Iterator[Callable[..., CheckpointWriter]]:
    built: list[CheckpointWriter] = []

    def build(url: str, interval: int = 0) -> CheckpointWriter:
        uploader = Uploader(BucketTrial(url, KEY), 1, 1, interval=interval)
        writer = CheckpointWriter(
            tmp_path / "trial", KEY, 1, every=1, last_epoch=LAST_EPOCH, interval=interval, uploader=uploader
        )
        writer.claim()
        built.append(writer)
        return writer

    yield build
    for writer in built:
        writer.abandon_uploads()
        writer.close()


def end_epoch(writer: CheckpointWriter, epoch: int) -> str:
    return writer.epoch_ended(epoch, {epoch: {"value": 1.0}}, lambda: {"epoch": epoch}, 1.0)


def wait_for_file(folder: Path, epoch: int) -> None:
    wait_until(lambda: checkpoint_file(folder / "trial", epoch).exists())


def test_training_goes_on_while_one_file_is_uploaded_and_files_between_are_left_out(
    gate: Gate, writer_of: Callable[..., CheckpointWriter]
) -> None:
    writer = writer_of("s3://none/study/0")
    end_epoch(writer, 1)
    gate.wait_for_upload()
    for epoch in (2, 3, 4):  # each returns, although the bucket does not
        end_epoch(writer, epoch)
    wait_until(lambda: bool(writer._uploader and epoch_of(writer._uploader._pending[-1]) == 4))
    gate.let_through(2)

    assert writer.save_now() == ""
    assert gate.uploaded == [1, 4]


def test_epochs_that_others_start_from_are_uploaded_before_they_are_reported(
    gate: Gate, writer_of: Callable[..., CheckpointWriter]
) -> None:
    writer = writer_of("s3://none/study/0", interval=2)
    gate.let_through(10)

    end_epoch(writer, 1)
    end_epoch(writer, 2)

    assert gate.uploaded[-1] == 2


def test_a_worker_finds_out_in_the_bucket_that_it_has_lost_its_trial(
    gate: Gate, writer_of: Callable[..., CheckpointWriter]
) -> None:
    gate.error = TakenOverError()
    writer = writer_of("s3://none/study/0")
    gate.let_through()
    end_epoch(writer, 1)

    with pytest.raises(TakenOverError):
        writer.save_now()


def test_the_trial_goes_on_while_the_bucket_is_away_and_its_last_checkpoint_is_uploaded(
    bucket_url: str, s3_server: S3Server, writer_of: Callable[..., CheckpointWriter], tmp_path: Path
) -> None:
    trial = BucketTrial(f"{bucket_url}/study/0", KEY)
    writer, notes = writer_of(trial.url), list[str]()
    s3_server.stop()
    try:
        for epoch in range(1, 4):
            notes.append(end_epoch(writer, epoch))
            wait_for_file(tmp_path, epoch)
            wait_until(lambda: bool(writer._uploader and writer._uploader._error))
        notes.append(end_epoch(writer, 4))
    finally:
        s3_server.start()
    notes.append(end_epoch(writer, LAST_EPOCH))

    assert [each.epoch for each in trial.read()] == [LAST_EPOCH]
    said = [note for note in notes if note]
    assert len(said) == 1  # once
    assert said[0].startswith(
        f"uploads to {bucket_url.removesuffix('/runs')} wait, and the trial continues: AWS Error NETWORK"
    )


def test_a_trial_that_ends_without_the_bucket_says_what_is_only_on_its_machine(
    bucket_url: str,
    s3_server: S3Server,
    writer_of: Callable[..., CheckpointWriter],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint_writer, "PATIENCE_SECONDS", 0.3)
    writer = writer_of(f"{bucket_url}/study/0")
    s3_server.stop()
    try:
        warning = end_epoch(writer, LAST_EPOCH)
    finally:
        s3_server.start()

    assert warning.startswith(f"its checkpoint after epoch {LAST_EPOCH} is only in {tmp_path / 'trial'} on ")
    assert "NETWORK_CONNECTION" in warning
