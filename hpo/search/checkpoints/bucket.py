"""The checkpoints of trials in a bucket: copies of those on the disks of the machines that train them.

    URL/STUDY/NUMBER/KEY/epoch-000007.CLAIMED-TOKEN.BYTES.pt

The name says all that a reader needs. KEY is that of `owner_key`, so other attempts are elsewhere. CLAIMED is when the trial
was claimed, by the database's clock: a worker that has lost its trial does not overwrite what its successor writes, and
readers take the last epoch of the latest claim. BYTES tells an object whose upload was not complete.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from hpo.bucket import Bucket, StoredObject, describe
from hpo.search.checkpoints.files import (
    TakenOverError,
    checkpoint_file,
    distance,
    epoch_of,
    list_checkpoints,
    read_claim,
)

FETCH_SECONDS = 300.0  # how long a trial that cannot start otherwise waits for the bucket
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.5, 30.0  # between two attempts
_NAME = re.compile(r"epoch-(\d{6,})\.(\d+)-(\d+)\.(\d+)\.pt")

_T = TypeVar("_T")


@dataclass(frozen=True, order=True)
class BucketCheckpoint:
    """A checkpoint in a bucket. The largest is the one to resume from.

    Attributes:
        claimed_milliseconds: when the trial was claimed for the worker that has written it.
        epoch: the last finished epoch.
        token: of the claim.
        size: in bytes.
    """

    claimed_milliseconds: int
    epoch: int
    token: int
    size: int

    @property
    def name(self) -> str:
        """The name of the object in its folder."""
        return f"epoch-{self.epoch:06d}.{self.claimed_milliseconds}-{self.token}.{self.size}.pt"

    @classmethod
    def read(cls, found: StoredObject) -> BucketCheckpoint | None:
        """Return the checkpoint that an object is; None if it is none, or not whole."""
        match = _NAME.fullmatch(found.name.rpartition("/")[2])
        if match is None or int(match[4]) != found.size:
            return None
        return cls(int(match[2]), int(match[1]), int(match[3]), found.size)


@dataclass(frozen=True)
class BucketTrial:
    """The checkpoints of one attempt of a trial in a bucket. Errors of the service are OSError.

    Attributes:
        url: of the trial.
        key: see `owner_key`.
    """

    url: str
    key: str

    @cached_property
    def _bucket(self) -> Bucket:
        return Bucket(f"{self.url}/{self.key}")

    def read(self) -> list[BucketCheckpoint]:
        """Return the checkpoints that are whole, the one to resume from first."""
        return sorted(filter(None, map(BucketCheckpoint.read, self._bucket.list_objects())), reverse=True)

    def upload(
        self,
        file: Path,
        token: int,
        claimed_milliseconds: int,
        *,
        interval: int = 0,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Upload a checkpoint, then delete those that it replaces.

        Args:
            file: see `checkpoint_file`.
            token: of the claim.
            claimed_milliseconds: when that was made.
            interval: see `save_checkpoint`.
            on_progress: is called after each part.

        Raises:
            TakenOverError: a later claim has written checkpoints. This one is not left there.
        """
        own = BucketCheckpoint(claimed_milliseconds, epoch_of(file), token, file.stat().st_size)
        self._bucket.upload(file, own.name, on_progress)
        found = self.read()
        if any(each.claimed_milliseconds > claimed_milliseconds for each in found):
            self._bucket.delete([own.name])
            raise TakenOverError(f"a later claim of this trial has checkpoints in {self.url}")
        self._delete_but_newest(found, interval)

    def _delete_but_newest(self, found: Iterable[BucketCheckpoint], interval: int) -> None:
        newest, *others = found
        shared = [each for each in (newest, *others) if interval and each.epoch % interval == 0]
        self._bucket.delete([each.name for each in others if each not in shared[:2]])

    def trim(self) -> None:
        """Delete all but the newest checkpoint of a trial that has ended."""
        if found := self.read():
            self._delete_but_newest(found, 0)

    def delete(self) -> None:
        """Delete all checkpoints, whole or not."""
        self._bucket.delete([each.name for each in self._bucket.list_objects()])

    def download(self, checkpoint: BucketCheckpoint, file: Path) -> None:
        """Download a checkpoint; see `Bucket.download`."""
        self._bucket.download(checkpoint.name, file)


def newest_of(folder: Path, key: str) -> tuple[int, int]:
    """Return (when the claim was made, epoch) of the newest checkpoint in a folder; (-1, 0) if there is none of this key.

    Args:
        folder: of a trial, before it is claimed again.
        key: see `owner_key`.
    """
    claim, found = read_claim(folder), list_checkpoints(folder)
    return (claim.claimed_milliseconds, epoch_of(found[0])) if found and claim.key in {None, key} else (-1, 0)


def fetch_newest(folder: Path, trial: BucketTrial, newest: tuple[int, int], *, wait_seconds: float = 0.0) -> None:
    """Let the checkpoint in a trial's folder be that of the bucket, if that is the one to resume from.

    Args:
        folder: the trial's folder.
        trial: the same trial in the bucket.
        newest: what the folder had, see `newest_of`.
        wait_seconds: for how long to try while the bucket does not answer.

    Raises:
        OSError: the bucket does not answer, or the file cannot be written.
    """

    def fetch() -> None:
        for found in trial.read()[:1]:
            file = checkpoint_file(folder, found.epoch)
            if (found.claimed_milliseconds, found.epoch) <= newest or _is_copied(found, file, newest[1]):
                return
            folder.mkdir(parents=True, exist_ok=True)
            trial.download(found, file)
            for other in list_checkpoints(folder):
                if epoch_of(other) > found.epoch:  # of a claim before
                    other.unlink(missing_ok=True)

    retry(fetch, wait_seconds)


def _is_copied(found: BucketCheckpoint, file: Path, newest_epoch: int) -> bool:
    with suppress(FileNotFoundError):
        return newest_epoch == found.epoch and file.stat().st_size == found.size
    return False


@contextmanager
def nearest_file(folder: Path, parent: Path, trial: BucketTrial, epoch: int) -> Iterator[Path | None]:
    """Fetch the checkpoint of another trial, if the bucket has a nearer one than its folder; see `read_checkpoint`.

    Args:
        folder: of the trial that continues it: the file is there, and deleted at the end of the `with` block.
        parent: of the other trial.
        trial: the same in the bucket.
        epoch: that is wanted; 0 for the newest.

    Raises:
        OSError: the bucket does not answer, or the file cannot be written.
    """
    near = [distance(epoch_of(path), epoch) for path in list_checkpoints(parent)]
    if epoch and any(each == distance(epoch, epoch) for each in near):
        yield None
        return
    file = folder / f".parent.{os.getpid()}-{secrets.token_hex(4)}.tmp"

    def fetch() -> bool:
        found = min(trial.read(), key=lambda each: distance(each.epoch, epoch), default=None)
        if found is None or any(each <= distance(found.epoch, epoch) for each in near):
            return False
        folder.mkdir(parents=True, exist_ok=True)
        trial.download(found, file)
        return True

    try:
        yield file if retry(fetch, FETCH_SECONDS) else None
    finally:
        file.unlink(missing_ok=True)


def retry(action: Callable[[], _T], wait_seconds: float) -> _T:
    """Return what an action returns, and repeat it with growing pauses while it raises OSError.

    Args:
        action: what to do.
        wait_seconds: for how long to try.

    Raises:
        OSError: it has failed until then.
    """
    deadline, delay = time.monotonic() + wait_seconds, FIRST_DELAY_SECONDS
    while True:
        try:
            return action()
        except OSError as error:
            if time.monotonic() + delay > deadline:
                raise OSError(f"the checkpoints in the bucket cannot be read: {describe(error)}") from error
        time.sleep(delay)
        delay = min(2 * delay, MAX_DELAY_SECONDS)


# --- whole studies ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BucketStudy:
    """The checkpoints of a study in a bucket. Errors of the service are OSError.

    Attributes:
        url: of the study.
    """

    url: str

    @property
    def bucket(self) -> Bucket:
        """Its objects; their names start with NUMBER/KEY/."""
        return Bucket(self.url)

    def trial(self, number: int, key: str) -> BucketTrial:
        """Return one attempt of a trial."""
        return BucketTrial(f"{self.url}/{number}", key)

    def read(self, objects: Iterable[StoredObject] | None = None) -> Mapping[tuple[int, str], list[BucketCheckpoint]]:
        """Return {(number, key): its checkpoints, the one to resume from first}.

        Args:
            objects: what is there; None to ask the bucket.
        """
        found: dict[tuple[int, str], list[BucketCheckpoint]] = {}
        for each in self.bucket.list_objects() if objects is None else objects:
            number, _, rest = each.name.partition("/")
            checkpoint = BucketCheckpoint.read(each)
            if number.isdecimal() and checkpoint is not None:
                found.setdefault((int(number), rest.partition("/")[0]), []).append(checkpoint)
        for checkpoints in found.values():
            checkpoints.sort(reverse=True)
        return found


def upload_left(folder: Path, study: BucketStudy, *, interval: int, wait_seconds: float) -> list[str]:
    """Upload what is in a study's folder and not in the bucket: its worker was killed, or the bucket was away.

    Args:
        folder: of the study's checkpoints.
        study: the same in the bucket.
        interval: see `save_checkpoint`.
        wait_seconds: for how long to try while the bucket does not answer.

    Returns:
        Notes for the user: which trials have their checkpoints in the folder only, and why.
    """
    try:
        known = retry(study.read, wait_seconds)
    except OSError as error:
        return [f"{describe(error)}. What was not uploaded is in {folder} only; the same command uploads it"]
    left: list[str] = []
    reason = ""
    for path in sorted((each for each in folder.glob("*") if each.name.isdecimal()), key=lambda each: int(each.name)):
        claim, files = read_claim(path), list_checkpoints(path)
        if claim.key is None or not files:
            continue
        own = claim.claimed_milliseconds, epoch_of(files[0])
        newest = known.get((int(path.name), claim.key), [])
        if newest and (newest[0].claimed_milliseconds, newest[0].epoch) >= own:
            continue
        try:
            if not reason:
                trial = study.trial(int(path.name), claim.key)
                trial.upload(files[0], claim.token, claim.claimed_milliseconds, interval=interval)
                continue
        except TakenOverError:  # just now
            continue
        except OSError as error:
            if not files[0].exists():  # it was deleted meanwhile
                continue
            reason = describe(error)
        left.append(path.name)
    if not left:
        return []
    return [f"checkpoints of trials {', '.join(left)} are in {folder} only: {reason}. The same command uploads them"]
