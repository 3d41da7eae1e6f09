"""Objects in a bucket, on moto's S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo.bucket import PART_BYTES, Bucket, StoredObject, locate
from hpo.errors import SettingError
from tests.s3 import S3Server

pytestmark = pytest.mark.slow


def test_a_file_comes_back_as_it_was_and_is_uploaded_in_parts(bucket_url: str, tmp_path: Path) -> None:
    bucket, file = Bucket(bucket_url), tmp_path / "large"
    file.write_bytes(bytes(range(256)) * (3 * PART_BYTES // 256) + b"end")
    progress: list[None] = []

    bucket.upload(file, "a/large", lambda: progress.append(None))
    bucket.download("a/large", tmp_path / "copy")

    assert (tmp_path / "copy").read_bytes() == file.read_bytes()
    assert len(progress) == 4  # parts


def test_objects_are_listed_copied_and_deleted(bucket_url: str, tmp_path: Path) -> None:
    bucket = Bucket(bucket_url)
    (tmp_path / "file").write_bytes(b"12345")
    for name in ("a/1", "a/2/3", "b/1"):
        bucket.upload(tmp_path / "file", name)

    bucket.copy("b/1", "c/1")
    bucket.delete(["a/2/3", "gone"])

    assert bucket.list_objects("a") == [StoredObject("a/1", 5)]
    assert bucket.list_folders() == ["a", "b", "c"]
    assert [each.name for each in bucket.list_objects()] == ["a/1", "b/1", "c/1"]
    assert bucket.list_objects("nothing") == []


def test_a_bucket_that_can_be_written_to_passes_the_check_and_stays_empty(bucket_url: str) -> None:
    Bucket(bucket_url).check()

    assert Bucket(bucket_url).list_objects() == []


def test_a_missing_bucket_is_one_message_with_the_remedy(bucket_url: str) -> None:
    with pytest.raises(SettingError, match=r"no bucket 'missing'\. Create it \(`aws s3 mb s3://missing`\)"):
        Bucket("s3://missing/runs").check()


def test_refused_credentials_are_one_message_that_does_not_show_them(bucket_url: str, s3_server: S3Server) -> None:
    s3_server.refuse(everything=True)
    try:
        with pytest.raises(SettingError, match="access is refused") as caught:
            Bucket(bucket_url).check()
    finally:
        s3_server.refuse(everything=False)

    assert "AWS_ACCESS_KEY_ID" in str(caught.value)
    assert "SecretOfTheBucket" not in str(caught.value)


def test_a_server_that_does_not_answer_is_one_message(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")

    with pytest.raises(SettingError, match=r"cannot be written to .*connect.* Check the URL, AWS_ENDPOINT_URL"):
        Bucket(bucket_url).check()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://key:secret@bucket/runs", "no user, no password and no options"),
        ("s3://bucket/runs?secret_key=secret", "no user, no password and no options"),
        ("s3:///runs", "names no bucket"),
        ("http://bucket/runs", "allowed are a path, s3:// and gs://"),
    ],
)
def test_a_url_that_cannot_be_used_is_explained_without_its_secrets(url: str, message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        locate("runs", url)

    assert "secret" not in str(caught.value)


def test_a_path_moves_the_folder_of_checkpoints_and_a_url_does_not(tmp_path: Path) -> None:
    moved, uploaded = locate(tmp_path / "runs", tmp_path / "disk"), locate(tmp_path / "runs", "s3://bucket/folder/")

    assert moved.trial("study-1", 3) == tmp_path / "disk/study-1/3"
    assert moved.bucket_trial("study-1", 3) == ""
    assert moved.artifacts == tmp_path / "runs/artifacts"
    assert uploaded.trial("study-1", 3) == tmp_path / "runs/checkpoints/study-1/3"
    assert uploaded.bucket_trial("study-1", 3) == "s3://bucket/folder/study-1/3"
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match="--checkpoints names it"):
        locate(tmp_path / "runs", tmp_path / "file/disk").make()
