"""A study in a database, and what its attributes say. `storage.studies` opens and finds studies."""

from __future__ import annotations

import contextlib
import gc
import re
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeGuard, TypeVar

import optuna
from optuna.trial import FrozenTrial
from sqlalchemy.exc import IntegrityError

from storage import optuna_tables, records, usage
from storage.database import Database
from storage.errors import StorageError, name_strange_content, retry_while_down
from storage.optuna_internals import DraftStorage, study_id, trial_id
from storage.optuna_tables import StudyKey
from storage.ownership import lock_study, study_deleted
from storage.records import NEVER_RUN
from storage.revisions import references

T = TypeVar("T")
BRACKETS = "hpo:brackets"  # user attribute of a copy: from which name Hyperband derives the brackets of its trials
TOTAL = "hpo:total"  # user attribute: how many trials the study will have; None where only time ends the search
FILES = "hpo:files"  # user attribute of a study that was renamed: the name under which its files are stored
_MAX_IDS = 1000  # in one query: databases bound the number
_IDENTITY = re.compile(r"[0-9a-f]{12}")  # `hpo:id`; file names contain it


@dataclass(frozen=True)
class Study:
    """A study in a database: for reading, and to start runs on.

    Reading methods retry while the database is down, and raise StorageError when it cannot be used (after retries).

    Attributes:
        name: the study's name. The second revision of a space has the name `name@2`.
        study_id: its primary key.
        optuna_study: the same study as an Optuna object.
        drafts: the storage of `optuna_study`.
        identity: its attribute `hpo:id`, random; None for a study that another program created, or changed in a way that hpo
            does not. SQLite gives the ids of deleted studies to new ones.
        first_name: the name that it had before it was renamed first; empty if it was never renamed.
    """

    database: Database
    name: str
    study_id: int
    optuna_study: optuna.Study
    drafts: DraftStorage
    identity: str | None = None
    first_name: str = ""

    @property
    def key(self) -> StudyKey:
        """What tells it from other studies."""
        return StudyKey(self.study_id, self.name, self.identity)

    @property
    def bracket_name(self) -> str:
        """From which Hyperband derives the brackets of trials: it stays when the study is renamed or copied."""
        value = self.attrs.get(BRACKETS)
        return value if isinstance(value, str) else self.first_name or self.name

    @property
    def attrs(self) -> dict[str, Any]:
        """The user attributes of the study."""
        return self._read(lambda: self.optuna_study.user_attrs)

    @property
    def reference(self) -> str:
        """What names the study for users, see `references`. It changes when a second revision is created."""
        return references(study_names(self.database)).get(self.name, self.name)

    def trials(self) -> list[FrozenTrial]:
        """Return all trials, ordered by number."""
        storage = self.database.optuna_storage  # not through `optuna_study`, which never reads finished trials again
        with without_garbage_collection():
            return self._read(lambda: storage.get_all_trials(self.study_id, deepcopy=False))

    def trained_trials(self) -> list[FrozenTrial]:
        """Return the trials whose results are the study's.

        Left out are those never run, which were duplicates or broke a constraint, and those of earlier studies from which
        only the sampler learns.
        """
        return [
            trial
            for trial in self.trials()
            if trial.user_attrs.get("fail_reason") not in NEVER_RUN and records.LEARNED_FROM not in trial.user_attrs
        ]

    def counts(self) -> Counter[str]:
        """Return {state: number of trials} for `trained_trials`, without reading the trials."""
        rows = retry_while_down(
            self.database, lambda: records.count_trials(self.database, without=NEVER_RUN, study_id=self.study_id)
        )
        return Counter({row.state: row.trials for row in rows})

    def count_ended(self) -> int:
        """Return how many trials have ended."""
        counts = self.counts()
        return counts["COMPLETE"] + counts["PRUNED"] + counts["FAIL"]

    def count_retried(self) -> int:
        """Return how many trials that have not ended `hpo retry` lets run again."""
        return retry_while_down(self.database, lambda: records.count_retried(self.database, self.study_id)).get(
            self.study_id, 0
        )

    def keys(self) -> set[str]:
        """Return the keys of all configurations. Trials that another program added have none."""
        return retry_while_down(self.database, lambda: records.read_keys(self.database, self.study_id))

    def ended_keys(self) -> set[str]:
        """Return the keys of the configurations that have ended. Trials that another program added have none."""
        return retry_while_down(self.database, lambda: records.read_ended_keys(self.database, self.study_id))

    def count_ended_keys(self) -> int:
        """Return how many configurations have ended, of those that the budget counts."""
        found = retry_while_down(self.database, lambda: records.count_ended_keys(self.database, self.study_id))
        return found.get(self.study_id, 0)

    def metrics(self, trials: Iterable[FrozenTrial] | None = None) -> dict[int, records.Metrics]:
        """Return {trial number: {epoch: {name: value}}}.

        Args:
            trials: the trials to include, if the caller has read them; None reads and includes all.
        """
        by_trial = retry_while_down(self.database, lambda: records.read_metrics(self.database, self.study_id))
        trials = self.trials() if trials is None else trials
        return {trial.number: by_trial.get(trial_id(trial), {}) for trial in trials}

    def provenances(self, trials: Iterable[FrozenTrial]) -> dict[int, dict[str, Any]]:
        """Return {trial number: provenance} of these trials: device, threads, data hash."""
        by_trial = retry_while_down(self.database, lambda: records.read_provenances(self.database, self.study_id))
        return {trial.number: by_trial.get(trial_id(trial), {}) for trial in trials}

    def whole_provenances(self) -> dict[int, dict[str, Any]]:
        """Return {trial_id: what is needed to run it again} of all trials, see `provenance`."""
        return retry_while_down(self.database, lambda: records.read_whole_provenances(self.database, self.study_id))

    def endings(self) -> list[tuple[int, str, datetime]]:
        """Return (number, state, when it ended) of each trial that completed or was pruned, see `records.read_endings`."""
        return retry_while_down(self.database, lambda: records.read_endings(self.database, self.study_id))

    def device_seconds(self) -> float:
        """Return the device-seconds that the study has used, as stored."""
        found = retry_while_down(self.database, lambda: usage.read_device_seconds(self.database, self.study_id))
        return found.get(self.study_id, 0.0)

    def device_seconds_by_trial(self) -> dict[int, dict[str, float]]:
        """Return {trial_id: {`cuda` or `cpu`: device-seconds}}, as stored."""
        return retry_while_down(self.database, lambda: usage.read_by_trial(self.database, self.study_id))

    def runs(self) -> list[Any]:
        """Return the rows of hpo_runs for this study, oldest first, each with `now`, the database's time."""
        return retry_while_down(self.database, lambda: records.read_runs(self.database, self.study_id))

    def provenance(self, number: int) -> dict[str, Any]:
        """Return what is needed to run a trial again.

        Args:
            number: of the trial.

        Raises:
            StorageError: the study has no such trial, or the database cannot be used (after retries).
        """
        storage = self.database.optuna_storage

        def read() -> dict[str, Any]:
            # Not by position: numbers have gaps where a program has deleted trials.
            trial = storage.get_trial_id_from_study_id_trial_number(self.study_id, number)
            return records.read_provenance(self.database, trial)

        try:
            return retry_while_down(self.database, read)
        except KeyError:
            raise StorageError(f"the study {self.name!r} in {self.database.url} has no trial {number}") from None

    def metrics_of(self, trial_ids: Collection[int]) -> dict[int, records.Metrics]:
        """Return {trial_id: {epoch: {name: value}}} of these trials. The metrics of others are not read."""
        ids = list(trial_ids)

        def read() -> dict[int, records.Metrics]:
            found: dict[int, records.Metrics] = {}
            for start in range(0, len(ids), _MAX_IDS):
                found |= records.read_metrics(self.database, self.study_id, ids[start : start + _MAX_IDS])
            return found

        metrics = retry_while_down(self.database, read)
        return {trial_id: metrics.get(trial_id, {}) for trial_id in ids}

    def count_epochs(self) -> dict[int, int]:
        """Return {trial_id: number of epochs} that are stored."""
        return retry_while_down(self.database, lambda: records.count_epochs(self.database, self.study_id))

    def system_attrs(self) -> dict[str, Any]:
        """Return the system attributes, which Optuna and optuna-dashboard store with the study."""
        return self._read(lambda: self.database.optuna_storage.get_study_system_attrs(self.study_id))

    def _read(self, operation: Callable[[], T]) -> T:
        """Run a reading operation of Optuna, which raises KeyError for a study that was deleted."""
        try:
            return retry_while_down(self.database, operation)
        except KeyError:
            raise study_deleted(self.database, self.name) from None

    def set_system_attrs(self, attrs: Mapping[str, Any]) -> None:
        """Set these system attributes in one transaction.

        Raises:
            StorageError: the study was deleted, or the database cannot be used (after retries).
        """

        def write() -> None:
            with self.database.transaction() as connection:
                lock_study(connection, self.database, self.key)
                optuna_tables.write_study_system_attrs(connection, self.study_id, attrs)

        retry_while_down(self.database, write)

    def change_system_attrs(self, find_changes: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
        """Set what a function returns for all system attributes. Nothing that others set between the two is overwritten.

        Args:
            find_changes: gets {name: value}, and returns those that change. It may be called more than once.

        Raises:
            StorageError: the study was deleted, or the database cannot be used (after retries).
        """

        def write() -> bool:
            with contextlib.suppress(IntegrityError), self.database.transaction() as connection:
                lock_study(connection, self.database, self.key)
                found = optuna_tables.lock_study_system_attrs(connection, self.study_id)
                changes = find_changes(found)
                known = {name: value for name, value in changes.items() if name in found}
                optuna_tables.write_study_system_attrs(connection, self.study_id, known)
                added = {name: value for name, value in changes.items() if name not in found}
                optuna_tables.insert_study_system_attrs(connection, self.study_id, added)
                return True
            return False  # another program has added one of them meanwhile

        while not retry_while_down(self.database, write):
            pass

    def is_first(self, key: str, value: str) -> bool:
        """Set a system attribute. Return whether it was another one: of several callers with a value, one is the first.

        Raises:
            StorageError: the study was deleted, or the database cannot be used (after retries).
        """
        caller = uuid.uuid4().hex  # so that a repetition after a lost answer is not the second

        def write() -> bool:
            with self.database.transaction() as connection:
                lock_study(connection, self.database, self.key)
                known = optuna_tables.read_study_system_attr(connection, self.study_id, key)
                if isinstance(known, list) and known[:1] == [value]:
                    return known[1:] == [caller]
                optuna_tables.write_study_system_attrs(connection, self.study_id, {key: [value, caller]})
                return True

        return retry_while_down(self.database, write)

    @property
    def is_ours(self) -> bool:
        """Whether hpo created the study, not another program that uses Optuna."""
        return self.identity is not None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the study was opened with."""
        return settings_of(self.attrs)

    @property
    def unique_name(self) -> str:
        """A name that no other study has, in any database. Files of the study are stored under it, even if it is renamed."""
        return f"{self.first_name or self.name}-{self.identity}"


def load_study(database: Database, name: str) -> Study | None:
    """Return a study; None if it was deleted meanwhile."""
    storage = DraftStorage(database.optuna_storage, lambda: name_strange_content(database.url))

    def load() -> optuna.Study:
        study = optuna.load_study(study_name=name, storage=storage)
        if not study.directions:
            raise ValueError(f"the study {name!r} has no direction")
        return study

    try:
        study = retry_while_down(database, load)
        # If another study has its id now, this is the other one's, which has another name.
        attrs = retry_while_down(database, lambda: study.user_attrs)
    except KeyError:
        return None
    return Study(database, name, study_id(study), study, storage, identity_of(attrs), _first_name(attrs))


def study_names(database: Database) -> list[str]:
    """Return the names of all studies, oldest first."""
    summaries = retry_while_down(database, lambda: database.optuna_storage.get_all_studies())
    return [summary.study_name for summary in summaries]


def describe_counts(counts: Mapping[str, int]) -> str:
    """Return what a message says of {state: number of trials}, such as `3 COMPLETE, 1 FAIL`; empty without trials."""
    return ", ".join(f"{count:,} {state}" for state, count in sorted(counts.items()))


def settings_of(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attribute `hpo:settings`; empty if there is none, or if another program has made something else of it."""
    value = attrs.get("hpo:settings")
    return value if isinstance(value, dict) else {}


def identity_of(attrs: Mapping[str, Any]) -> str | None:
    """Return the attribute `hpo:id`; None if there is none, or if it is not as hpo writes it: it becomes part of paths."""
    value = attrs.get("hpo:id")
    return value if is_identity(value) else None


def is_identity(value: object) -> TypeGuard[str]:
    """Return whether a value is an `hpo:id` as hpo writes it."""
    return isinstance(value, str) and _IDENTITY.fullmatch(value) is not None


def unique_name_of(name: str, attrs: Mapping[str, Any]) -> str:
    """Return `Study.unique_name` of a study with this name and these user attributes; empty if hpo did not create it."""
    identity = identity_of(attrs)
    return f"{_first_name(attrs) or name}-{identity}" if identity else ""


def _first_name(attrs: Mapping[str, Any]) -> str:
    value = attrs.get(FILES)
    return value if isinstance(value, str) else ""


def metric_names(settings: Mapping[str, Any]) -> list[str]:
    """Return the names of the objectives, as the settings of a study say; `value` for an unknown one."""
    objectives = settings.get("objectives")
    if isinstance(objectives, list) and all(isinstance(each, dict) for each in objectives) and objectives:
        return [str(each.get("metric", "value")) for each in objectives]
    return [str(settings.get("metric", "value"))]


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disable garbage collection: it would scan the millions of objects of a large study again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
