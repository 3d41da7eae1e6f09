"""Which trials keep their checkpoints after they have ended: `checkpoints.keep` of the search space.

Unfinished trials keep theirs, to resume, and so do failed ones, for `hpo retry --resume`. The database ranks those that
completed, so any number of drivers agree. What is superfluous once stays so, because values of ended trials do not change:
deleting needs no lock, and any driver may do it again. With several objectives, a trial may become one of the best again,
when a new one dominates others; what was deleted stays deleted.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.paths import CONFIGURATION_FILE, SCRIPT_DIR, RunsDir
from hpo.search.checkpoints.bucket import BucketStudy
from hpo.search.checkpoints.files import belongs_to, list_checkpoints, owner_key
from hpo.space.model import Space

if TYPE_CHECKING:  # workers import this module too, and need no database
    from storage.ranking import EndedTrial
    from storage.study import Study

LAST_SECONDS = 10.0  # how long a run that ends waits until the bucket has deleted what it shall
IDLE_SHARE = 50  # asking the database takes at most 1/50 of the time


class Retention:
    """Deletes the checkpoints that a search does not keep, while its trials end.

    Best effort: what is left, because the database is away or a file cannot be deleted, `hpo clean` finds.

    Args:
        space: the search.
        study: its study.
        runs_dir: where its checkpoints are: the folder, and the bucket if there is one.
    """

    def __init__(self, space: Space, study: Study, runs_dir: RunsDir) -> None:
        self._space = space
        self._study = study
        self._folder = runs_dir.checkpoints(study.unique_name)
        bucket = runs_dir.bucket_study(study.unique_name)
        self._bucket = BucketStudy(bucket) if bucket else None
        self._deletions: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hpo-retention")
        self._ended: set[int] = set()  # numbers of trials of this driver that may have checkpoints
        self._next_time = 0.0

    def trial_ended(self, number: int) -> None:
        """Note that a trial of this driver is COMPLETE or PRUNED, and delete the checkpoints that are superfluous now.

        The end of this trial may be stored a moment later: then its checkpoints are deleted when the next trial ends.
        """
        self._ended.add(number)
        if time.monotonic() >= self._next_time:
            started = time.monotonic()
            self._ended -= self._delete(self._ended)
            self._next_time = time.monotonic() + IDLE_SHARE * (time.monotonic() - started)

    def run_ended(self) -> None:
        """Delete what is superfluous of any driver, such as one that was killed."""
        with suppress(OSError):
            numbers = set(trials_with_checkpoints(self._folder))
            if self._bucket is not None:
                with suppress(OSError):
                    numbers |= {number for number, _ in self._bucket.read()}
            self._delete(numbers)
            if self._space.population is not None:
                self._trim(numbers)
        wait(self._deletions, LAST_SECONDS)
        self._pool.shutdown(wait=False, cancel_futures=True)  # the next run deletes what the bucket did not answer to

    def _trim(self, numbers: Collection[int]) -> None:
        """Delete all but the newest checkpoint of members of a population that have ended, and from which none starts."""
        from storage import parents, ranking
        from storage.errors import StorageError

        with suppress(StorageError):
            ended = ranking.superfluous_trials(self._study, 0, None, among=numbers, timeout_seconds=0.0)
            found = parents.continued_trials(self._study.database, timeout_seconds=0.0) if ended else {}
            needed = found.get(str(self._study.identity), {})
            for trial in ended:
                folder = self._folder / str(trial.number)
                if trial.number in needed:
                    continue
                if is_of(folder, trial):
                    delete_files(list_checkpoints(folder)[1:])
                if self._bucket is not None:
                    self._in_bucket(self._bucket.trial(trial.number, owner_key(trial.key, trial.attempt)).trim)

    def _delete(self, numbers: Collection[int]) -> set[int]:
        """Delete what is superfluous of these trials; return those that need not be looked at again."""
        from storage.errors import StorageError

        done = set()
        with suppress(StorageError):
            for trial in superfluous_trials(self._space, self._study, numbers, timeout_seconds=0.0):
                folder = self._folder / str(trial.number)
                with suppress(OSError):  # one of reading may pass: then the next end of a trial finds the files
                    # A folder of an older version does not say whose it is: `hpo clean` asks before it deletes there.
                    if (folder / CONFIGURATION_FILE).is_file() and is_of(folder, trial):
                        delete_files(checkpoint_files(folder))
                    done.add(trial.number)
                if self._bucket is not None:
                    self._in_bucket(self._bucket.trial(trial.number, owner_key(trial.key, trial.attempt)).delete)
        return done

    def _in_bucket(self, delete: Callable[[], None]) -> None:
        """Delete something on a thread: the bucket may not answer."""
        self._deletions = [each for each in self._deletions if not each.done()]
        self._deletions.append(self._pool.submit(delete))


def superfluous_trials(
    space: Space, study: Study, numbers: Collection[int], *, timeout_seconds: float
) -> list[EndedTrial]:
    """Return which of these trials keep no checkpoints. A trial that an unfinished one continues keeps its own.

    Args:
        space: the search.
        study: its study.
        numbers: the trials to look at.
        timeout_seconds: how long to retry while the database is down.

    Raises:
        StorageError: the database cannot be used.
    """
    from storage import parents, ranking

    policy = space.checkpoints
    if policy.count is None or not numbers:
        return []
    directions = space.directions if policy.keeps_best else None
    found = ranking.superfluous_trials(study, policy.count, directions, among=numbers, timeout_seconds=timeout_seconds)
    needed = parents.continued_trials(study.database, timeout_seconds).get(str(study.identity), {}) if found else {}
    return [trial for trial in found if trial.number not in needed]


def trials_with_checkpoints(folder: Path) -> list[int]:
    """Return the numbers of the trials that have checkpoints here, ascending.

    Args:
        folder: of the study's checkpoints; it may be missing.
    """
    try:
        with os.scandir(folder) as entries:
            numbers = [int(entry.name) for entry in entries if entry.name.isdecimal()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(number for number in numbers if checkpoint_files(folder / str(number)))


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the checkpoints of a trial: files, and the folder that its script saves to; none if it cannot be read."""
    with suppress(OSError):  # missing, or deleted meanwhile
        names = set(os.listdir(folder))  # noqa: PTH208 # a study has many folders, most of them without checkpoints
        found = list_checkpoints(folder) if any(name.endswith(".pt") for name in names) else []
        return [*found, folder / SCRIPT_DIR] if SCRIPT_DIR in names else found
    return []


def is_deleted(folder: Path) -> bool:
    """Return whether a trial that ran here has no checkpoints any more: `checkpoints.keep` did not keep them."""
    has_run = (folder / CONFIGURATION_FILE).is_file()
    return has_run and not checkpoint_files(folder) and not any(folder.glob("*.damaged"))


def is_of(folder: Path, trial: EndedTrial) -> bool:
    """Return whether a folder is that of a trial. Folders of older versions, which do not say whose they are, count."""
    return belongs_to(folder, owner_key(trial.key, trial.attempt))


def delete_files(paths: Collection[Path]) -> None:
    """Delete files and folders, as far as possible."""
    for path in paths:
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
