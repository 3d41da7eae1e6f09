"""What the bucket has of studies: which of it no search needs, and copying it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpo.bucket import Bucket, StoredObject
from hpo.errors import SpaceError
from hpo.paths import RunsDir
from hpo.search.checkpoints.bucket import BucketStudy
from hpo.search.checkpoints.files import owner_key
from hpo.search.checkpoints.retention import superfluous_trials
from hpo.space.model import Space

if TYPE_CHECKING:
    from storage.study import Study


@dataclass(frozen=True)
class BucketFiles:
    """Objects of a study that can be deleted for the same reason.

    Attributes:
        what: the reason.
        url: of the study in the bucket.
        objects: below that URL.
    """

    what: str
    url: str
    objects: tuple[StoredObject, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(each.size for each in self.objects)


def not_needed(study: Study, url: str, needed: Collection[int], *, is_shared: bool) -> list[BucketFiles]:
    """Return what a study that is not running does not need in the bucket.

    Args:
        study: the study.
        url: of the study in the bucket.
        needed: numbers of its trials that others continue, perhaps from an earlier attempt.
        is_shared: whether another database may have it, too, with other attempts.

    Raises:
        OSError: the bucket cannot be read.
        StorageError: the database cannot be used.
    """
    found = BucketStudy(url).bucket.list_objects()
    known = BucketStudy(url).read(found)
    numbers = {number for number, _ in known}
    garbage = []
    with suppress(SpaceError):  # settings of another version
        space = Space.from_settings(study.settings)
        ended = superfluous_trials(space, study, numbers, timeout_seconds=0.0)
        keys = {(trial.number, owner_key(trial.key, trial.attempt)) for trial in ended}
        kept = space.checkpoints
        what = f"checkpoints of ended trials; checkpoints.keep is {kept.keep}: those of {kept.description}"
        garbage.append(BucketFiles(what, url, _of(found, keys)))
    # Of several attempts, the last one has the latest claim. Unless it has saved nothing yet: then an earlier one is kept.
    last = {number: max((each[0], key) for (its, key), each in known.items() if its == number)[1] for number in numbers}
    earlier = {(number, key) for number, key in known if key != last[number] and number not in needed}
    if not is_shared:
        garbage.append(BucketFiles("of earlier attempts", url, _of(found, earlier)))
    return [each for each in garbage if each.objects]


def of_deleted(url: str, continued: Mapping[int, str], what: str = "of a deleted study") -> BucketFiles:
    """Return what can be deleted of a deleted study; see `hpo.studies.deleting.not_continued`.

    Raises:
        OSError: the bucket cannot be read.
    """
    found = Bucket(url).list_objects()
    kept = {str(number) for number in continued}
    return BucketFiles(what, url, tuple(each for each in found if each.name.split("/")[0] not in kept))


def delete_objects(runs_dir: RunsDir, unique_name: str) -> None:
    """Delete what a copy that no trial continues has in the bucket, as far as possible."""
    if runs_dir.bucket_url:
        bucket = Bucket(runs_dir.bucket_study(unique_name))
        with suppress(OSError):
            bucket.delete_with_folder([each.name for each in bucket.list_objects()])


def copy_objects(runs_dir: RunsDir, unique_name: str, new_unique_name: str) -> None:
    """Let a copy of a study have the checkpoints that the study has in the bucket. What is there is not copied again.

    Raises:
        OSError: the bucket does not answer, or refuses.
    """
    if runs_dir.bucket_url:
        source, target = runs_dir.bucket_study(unique_name), runs_dir.bucket_study(new_unique_name)
        bucket, copied = Bucket(runs_dir.bucket_url), set(Bucket(target).list_objects())
        for each in Bucket(source).list_objects():
            if each not in copied:
                with suppress(FileNotFoundError):  # a newer one has replaced it
                    bucket.copy(*(f"{url.removeprefix(f'{bucket.url}/')}/{each.name}" for url in (source, target)))


def _of(found: Collection[StoredObject], keys: Collection[tuple[int, str]]) -> tuple[StoredObject, ...]:
    prefixes = tuple(f"{number}/{key}/" for number, key in keys)
    return tuple(each for each in found if each.name.startswith(prefixes)) if prefixes else ()
