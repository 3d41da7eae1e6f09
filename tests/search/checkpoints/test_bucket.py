"""Which checkpoint of a bucket is the right one, and how trials start from it. On moto's S3 server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.toy import expected_value
from hpo.bucket import Bucket
from hpo.search import worker
from hpo.search.adoption import adopt_checkpoint
from hpo.search.checkpoints.bucket import (
    BucketStudy,
    BucketTrial,
    fetch_newest,
    newest_of,
    retry,
    upload_left,
)
from hpo.search.checkpoints.files import (
    Checkpoint,
    TakenOverError,
    checkpoint_file,
    claim_folder,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from hpo.search.messages import TrialReport, TrialSpec
from hpo.search.worker import run_trial
from tests.factories import trial_spec
from tests.s3 import S3Server

pytestmark = pytest.mark.slow

KEY = "k"


@pytest.fixture
def trial(bucket_url: str) -> BucketTrial:
    return BucketTrial(f"{bucket_url}/study-1/0", KEY)


@pytest.fixture
def away(s3_server: S3Server, bucket_url: str) -> Iterator[None]:
    """The server is away during the test."""
    s3_server.stop()
    yield
    s3_server.start()


def save(folder: Path, epoch: int, *, claim: int, interval: int = 0) -> Path:
    """Save the checkpoint of a claim, whose time and token are the same here."""
    claim_folder(folder, KEY, claim, claim)
    save_checkpoint(folder, Checkpoint(epoch, {epoch: {"value": 1.0}}, {"claim": claim}, KEY), claim, interval=interval)
    return checkpoint_file(folder, epoch)


def upload(trial: BucketTrial, folder: Path, epoch: int, *, claim: int) -> None:
    trial.upload(save(folder / f"of-{claim}", epoch, claim=claim), claim, claim)


def held(trial: BucketTrial) -> list[tuple[int, int]]:
    return [(each.claimed_milliseconds, each.epoch) for each in trial.read()]


# --- the right one ----------------------------------------------------------------------------------------------------


def test_the_last_epoch_of_the_latest_claim_counts_not_the_last_epoch(trial: BucketTrial, tmp_path: Path) -> None:
    file = save(tmp_path, 7, claim=1)
    upload(trial, tmp_path, 3, claim=2)
    # Late, by a worker that does not look whether it has lost the trial.
    Bucket(f"{trial.url}/{KEY}").upload(file, f"epoch-000007.1-1.{file.stat().st_size}.pt")

    assert held(trial) == [(2, 3), (1, 7)]
    fetch_newest(tmp_path / "other", trial, (-1, 0))
    found = load_checkpoint(tmp_path / "other", KEY)
    assert found is not None
    assert (found.epoch, found.state) == (3, {"claim": 2})


def test_a_worker_that_has_lost_its_trial_leaves_the_checkpoint_of_its_successor(
    trial: BucketTrial, tmp_path: Path
) -> None:
    upload(trial, tmp_path, 3, claim=2)

    with pytest.raises(TakenOverError):
        upload(trial, tmp_path, 4, claim=1)

    assert held(trial) == [(2, 3)]


def test_a_successor_replaces_what_its_predecessor_uploads_late(trial: BucketTrial, tmp_path: Path) -> None:
    upload(trial, tmp_path, 9, claim=1)
    upload(trial, tmp_path, 3, claim=2)

    assert held(trial) == [(2, 3)]


def test_an_object_that_is_not_whole_is_no_checkpoint(trial: BucketTrial, tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"12345")
    bucket = Bucket(f"{trial.url}/{KEY}")
    bucket.upload(tmp_path / "part", "epoch-000009.9-9.6.pt")

    assert trial.read() == []
    bucket.upload(tmp_path / "part", "epoch-000009.9-9.5.pt")
    assert held(trial) == [(9, 9)]


def test_epochs_that_others_start_from_stay(trial: BucketTrial, tmp_path: Path) -> None:
    for epoch in range(1, 8):
        trial.upload(save(tmp_path, epoch, claim=1, interval=2), 1, 1, interval=2)

    assert held(trial) == [(1, 7), (1, 6), (1, 4)]
    trial.trim()
    assert held(trial) == [(1, 7)]


# --- resumed from either ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ((2, 5), 5),  # of the same claim, newer
        ((2, 3), 4),
        ((1, 9), 4),  # of a claim before
        ((3, 2), 2),  # of a later claim, which did not reach the bucket
    ],
)
def test_the_folder_is_used_if_it_is_newer_than_the_bucket(
    trial: BucketTrial, tmp_path: Path, own: tuple[int, int], expected: int
) -> None:
    upload(trial, tmp_path, 4, claim=2)
    folder = tmp_path / "0"
    save(folder, own[1], claim=own[0])
    newest = newest_of(folder, KEY)
    claim_folder(folder, KEY, 4, 4)

    fetch_newest(folder, trial, newest)

    found = load_checkpoint(folder, KEY)
    assert found is not None
    assert found.epoch == expected
    assert found.state == {"claim": own[0] if expected == own[1] else 2}


def test_a_trial_goes_on_on_another_machine_with_the_same_values(trial: BucketTrial, tmp_path: Path) -> None:
    first = trial_spec(tmp_path / "a", bucket=trial.url, claimed_milliseconds=1)
    reports = run_trial(first)
    for _ in range(2):
        next(reports)
    _pause(reports)

    second = replace(first, folder=str(tmp_path / "b"), token=2, claimed_milliseconds=2, stored_epoch=2)
    found = list(_until_end(second))

    assert [(each.epoch, each.is_recalled) for each in found] == [(2, True), (3, False), (4, False)]
    assert found[-1].metrics["value"] == expected_value(first.params, 0, 4)
    assert held(trial) == [(2, 4)]


def _pause(reports: Iterator[TrialReport]) -> None:
    with pytest.raises(StopIteration) as end:
        reports.throw(worker.TrialPaused())  # type: ignore[attr-defined]
    assert end.value.value == ""  # it is saved, and uploaded


def _until_end(spec: TrialSpec) -> Iterator[TrialReport]:
    for report in run_trial(spec):
        assert not report.failure
        yield report
        if report.epoch == spec.max_epochs:
            return


@pytest.mark.usefixtures("away")
def test_a_trial_that_has_all_it_needs_starts_while_the_bucket_is_away(trial: BucketTrial, tmp_path: Path) -> None:
    report = next(run_trial(trial_spec(tmp_path, bucket=trial.url)))

    assert report.epoch == 1
    assert report.warning.startswith("it starts without what the bucket may have: the checkpoints in the bucket cannot")


@pytest.mark.usefixtures("away")
def test_a_trial_whose_epochs_are_in_the_bucket_only_waits_and_then_fails(
    trial: BucketTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "FETCH_SECONDS", 0.6)

    report = next(run_trial(trial_spec(tmp_path, bucket=trial.url, stored_epoch=2)))

    assert "the checkpoints in the bucket cannot be read" in report.failure


def test_what_fails_for_a_while_is_tried_again() -> None:
    errors = [OSError("away"), OSError("away")]

    def action() -> str:
        if errors:
            raise errors.pop()
        return "found"

    assert retry(action, 10.0) == "found"


# --- trials that continue others --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epoch", "expected"), [(0, 6), (4, 4), (3, 4), (2, 2)])
def test_a_trial_starts_from_the_nearest_checkpoint_of_its_parent_in_folder_or_bucket(
    trial: BucketTrial, tmp_path: Path, epoch: int, expected: int
) -> None:
    for each in (4, 6):
        trial.upload(save(tmp_path / "parent", each, claim=1, interval=2), 1, 1, interval=2)
    for each in (4, 6):
        checkpoint_file(tmp_path / "parent", each).unlink()
    save(tmp_path / "parent", 2, claim=1)
    claim_folder(tmp_path / "child", "child", 1)

    adopted = adopt_checkpoint(
        tmp_path / "child",
        "child",
        1,
        parent=tmp_path / "parent",
        parent_key=KEY,
        is_script=False,
        epoch=epoch,
        bucket=trial,
    )

    assert adopted is not None
    assert adopted.checkpoint.epoch == expected
    assert [path.name for path in (tmp_path / "child").glob("*epoch*")] == [f"epoch-{expected:06d}.pt"]
    assert not list((tmp_path / "child").glob("*.tmp"))


# --- what is left -----------------------------------------------------------------------------------------------------


def test_what_a_killed_worker_has_not_uploaded_is_uploaded_later(bucket_url: str, tmp_path: Path) -> None:
    study = BucketStudy(f"{bucket_url}/study-1")
    upload(study.trial(0, KEY), tmp_path / "elsewhere", 8, claim=2)
    save(tmp_path / "study/0", 9, claim=1)  # a later claim, on another machine, has trained on
    save(tmp_path / "study/1", 5, claim=1)

    assert upload_left(tmp_path / "study", study, interval=0, wait_seconds=0.0) == []

    found = {trial: [each.epoch for each in checkpoints] for trial, checkpoints in study.read().items()}
    assert found == {(0, KEY): [8], (1, KEY): [5]}


@pytest.mark.usefixtures("away")
def test_the_search_says_what_is_on_this_machine_only(bucket_url: str, tmp_path: Path) -> None:
    save(tmp_path / "study/1", 5, claim=1)

    notes = upload_left(tmp_path / "study", BucketStudy(f"{bucket_url}/study-1"), interval=0, wait_seconds=0.0)

    assert len(notes) == 1
    assert f"What was not uploaded is in {tmp_path / 'study'} only; the same command uploads it" in notes[0]
    assert list_checkpoints(tmp_path / "study/1")
