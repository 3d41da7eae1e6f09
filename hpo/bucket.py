"""Objects in a bucket of Amazon S3, Google Cloud Storage, or a service that speaks their protocol.

The library is pyarrow: Ray Tune depends on it and uses it for the same, it speaks to both services, and needs nothing else.
fsspec would need s3fs and gcsfs, with aiohttp and aiobotocore, which allows few versions of a user's boto3.

Credentials are those of the environment, as each service documents it. They are never stored, and no URL has any.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hpo.errors import SettingError
from hpo.paths import RunsDir, atomic_file

SCHEMES = ("s3", "gs")
PART_BYTES = 8 * 2**20  # so much of a file is in memory; S3 takes parts of 5 MiB and more
CONNECT_SECONDS = 5.0
IDLE_SECONDS = 30.0  # without a byte; by default 3, which is short for a service that puts a large object together
_NOISE = re.compile(r" \(Request ID: .*?\)|^When .*?: (?=AWS Error)|; Details: .*$")
_REFUSED = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY",
    "SIGNATURE",
    "HTTP response code 403",
    "Forbidden",
    "PERMISSION_DENIED",
)


@dataclass(frozen=True)
class StoredObject:
    """An object in a bucket.

    Attributes:
        name: below the URL of the `Bucket`, with slashes.
        size: in bytes.
    """

    name: str
    size: int


@dataclass(frozen=True)
class Bucket:
    """The objects below a URL. Thread-safe. Every method raises OSError if the service does not answer, or refuses.

    Attributes:
        url: such as `s3://bucket/folder`, see `locate`.
    """

    url: str

    def list_objects(self, folder: str = "") -> list[StoredObject]:
        """Return all objects below a folder, by name; none if the folder or the bucket does not exist."""
        from pyarrow.fs import FileSelector, FileType

        root = self._path("")
        found = self._system.get_file_info(FileSelector(self._path(folder), recursive=True, allow_not_found=True))
        names = [(each.path[len(root) + 1 :], each) for each in found if each.type == FileType.File]
        return sorted((StoredObject(name, int(each.size)) for name, each in names), key=lambda each: each.name)

    def list_folders(self) -> list[str]:
        """Return the names of the folders at the URL."""
        from pyarrow.fs import FileSelector, FileType

        found = self._system.get_file_info(FileSelector(self._path(""), allow_not_found=True))
        return sorted(each.base_name for each in found if each.type == FileType.Directory)

    def upload(self, file: Path, name: str, on_progress: Callable[[], None] = lambda: None) -> None:
        """Upload a file, in parts: memory holds one of them.

        A reader sees the object when it is complete. But if reading the file fails in the middle, pyarrow completes the
        object with what it has: the caller puts the size into the name, to tell such an object from a whole one.

        Args:
            file: the file, which does not change.
            name: of the object.
            on_progress: is called after each part.
        """
        with file.open("rb") as source, self._system.open_output_stream(self._path(name)) as target:
            while part := source.read(PART_BYTES):
                target.write(part)
                on_progress()

    def download(self, name: str, file: Path) -> None:
        """Download an object, in parts. The file appears when it is complete.

        Raises:
            FileNotFoundError: there is no such object.
        """
        with self._system.open_input_stream(self._path(name)) as source, atomic_file(file, sync=True) as target:
            while part := source.read(PART_BYTES):
                target.write(part)

    def copy(self, name: str, new_name: str) -> None:
        """Copy an object. The service does it."""
        self._system.copy_file(self._path(name), self._path(new_name))

    def delete(self, names: Collection[str]) -> None:
        """Delete objects. Those that are gone are no error."""
        for name in names:
            with suppress(FileNotFoundError):
                self._system.delete_file(self._path(name))

    def delete_with_folder(self, names: Collection[str]) -> None:
        """Delete objects, and the folder if nothing is left in it: pyarrow leaves an empty object for each folder."""
        self.delete(names)
        if not self.list_objects():
            with suppress(FileNotFoundError):
                self._system.delete_dir(self._path(""))

    def check(self) -> None:
        """Write and delete an object, so that a search does not begin which could not save anything.

        Raises:
            SettingError: the bucket is not there, does not answer, or refuses.
        """
        probe = f".writable-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            with self._system.open_output_stream(self._path(probe)) as stream:
                stream.write(b"hpo writes this file to try whether it may, and deletes it\n")
            self.list_objects(probe)
            self.delete([probe])
        except OSError as error:
            raise SettingError(self._advice(error)) from None

    def _advice(self, error: OSError) -> str:
        """Return a message for an error of the first request."""
        reason = describe(error)
        scheme, bucket = self.url.partition("://")[0], urlsplit(self.url).netloc
        create = f"aws s3 mb s3://{bucket}" if scheme == "s3" else f"gcloud storage buckets create gs://{bucket}"
        if "NO_SUCH_BUCKET" in reason or "bucket does not exist" in reason:
            return f"--checkpoints {self.url}: no bucket {bucket!r}. Create it (`{create}`), or correct the URL"
        credentials = (
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the role of the machine"
            if scheme == "s3"
            else "GOOGLE_APPLICATION_CREDENTIALS, or the service account of the machine"
        )
        if any(each in reason for each in _REFUSED):
            return (
                f"--checkpoints {self.url}: access is refused ({reason}). The credentials come from the environment, "
                f"{credentials}; they must be allowed to list, read, write and delete objects there"
            )
        variable = "AWS_ENDPOINT_URL, AWS_REGION" if scheme == "s3" else "the network"
        return (
            f"--checkpoints {self.url}: it cannot be written to ({reason}). Check the URL, {variable} and the credentials "
            f"in the environment, {credentials}"
        )

    def _path(self, name: str) -> str:
        return "/".join(filter(None, (self.url.partition("://")[2].strip("/"), name)))

    @property
    def _system(self) -> Any:
        scheme, bucket = self.url.partition("://")[0], urlsplit(self.url).netloc
        if scheme == "gs":
            return _open_gs()
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        return _open_s3(bucket, endpoint, os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "")


def locate(runs_dir: Path | str, checkpoints: Path | str | None) -> RunsDir:
    """Return where a search has its files.

    Args:
        runs_dir: the folder of all files.
        checkpoints: where checkpoints are: a folder, or a URL in a bucket, where copies are then; None for `runs_dir`.

    Raises:
        SettingError: the URL is of no service that hpo knows, names no bucket, or contains credentials or options.
    """
    text = str(checkpoints or "")
    if "://" in text:
        return RunsDir(Path(runs_dir), bucket_url=_check_url(text))
    return RunsDir(Path(runs_dir), Path(text).absolute() if text else None)


def _check_url(url: str) -> str:
    """Return the URL of a folder in a bucket, without a slash at its end."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise SettingError(f"--checkpoints: {parts.scheme}:// is not known; allowed are a path, s3:// and gs://")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise SettingError(
            f"--checkpoints: {parts.scheme}://BUCKET/FOLDER has no user, no password and no options: credentials come from "
            "the environment, such as AWS_ACCESS_KEY_ID, and so do AWS_REGION and AWS_ENDPOINT_URL"
        )
    if not parts.netloc:
        raise SettingError(f"--checkpoints {url}: it names no bucket, as in {parts.scheme}://BUCKET/FOLDER")
    return url.rstrip("/")


def describe(error: Exception) -> str:
    """Return the reason of an error in one line."""
    return _NOISE.sub("", str(error).splitlines()[0] if str(error) else type(error).__name__)


@cache
def _open_gs() -> Any:
    from pyarrow import fs

    return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=CONNECT_SECONDS))


@cache  # a client is a pool of connections
def _open_s3(bucket: str, endpoint: str, region: str) -> Any:
    """Return pyarrow's file system. It does not retry: the caller does, and knows for how long."""
    from pyarrow import fs

    parts = urlsplit(endpoint)
    if not region:  # else pyarrow asks the metadata service of EC2, which does not answer elsewhere
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        scheme=parts.scheme or "https",
        endpoint_override=parts.netloc or None,
        region=region,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=IDLE_SECONDS,
        background_writes=False,  # else all parts of a file that the network is too slow for are in memory
        allow_delayed_open=True,  # a small file is one request
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )
