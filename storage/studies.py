"""Opening, finding and reading studies. A `storage.run.Run` writes their trials."""

from __future__ import annotations

import contextlib
import gc
import re
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeVar

import optuna
import sqlalchemy as sa
from optuna.trial import FrozenTrial
from sqlalchemy.exc import IntegrityError

from storage import optuna_tables, records, tables, usage
from storage.database import Database
from storage.errors import StorageError, name_strange_content, retry_while_down
from storage.optuna_internals import DraftStorage, study_id, trial_id
from storage.optuna_tables import StudyKey
from storage.ownership import StudyDeletedError, lock_study, study_deleted
from storage.pareto import Direction
from storage.records import NEVER_RUN

T = TypeVar("T")
_FIRST = "@1"  # a name that ends so means the first revision, whose own name has no such ending
_REVISION = re.compile(r"[2-9]|[1-9][0-9]+")
_MAX_IDS = 1000  # in one query: databases bound the number
_IDENTITY = re.compile(r"[0-9a-f]{12}")  # `hpo:id`; file names contain it
BRACKETS = "hpo:brackets"  # user attribute of a copy: from which name Hyperband derives the brackets of its trials
FILES = "hpo:files"  # user attribute of a study that was renamed: the name under which its files are stored


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


def study_names(database: Database) -> list[str]:
    """Return the names of all studies, oldest first."""
    summaries = retry_while_down(database, lambda: database.optuna_storage.get_all_studies())
    return [summary.study_name for summary in summaries]


def deleted_studies(database: Database) -> set[str]:
    """Return the `hpo:id` of each study that was deleted from this database. What no study can have is left out."""

    def read() -> set[str]:
        with database.engine.connect() as connection:
            found = connection.scalars(sa.select(tables.deleted_studies.c.id))
            return {each for each in found if isinstance(each, str) and _IDENTITY.fullmatch(each)}

    return retry_while_down(database, read)


def all_studies(database: Database) -> list[Study]:
    """Return every revision of every study, oldest first."""
    return [study for name in study_names(database) if (study := _load(database, name)) is not None]


def find_study(database: Database, name: str) -> Study | None:
    """Return the study with this name, or None.

    A name without a revision means the latest one. `NAME@1` means the first one, unless another program has given a study
    this very name.
    """
    if "@" in name:
        names, first = study_names(database), name.removesuffix(_FIRST)
        found = name if name in names or "@" in first else first
        return _load(database, found) if found in names else None
    revisions = _revisions(database, name)
    return _load(database, revisions[-1]) if revisions else None


def renamed_from(database: Database, name: str) -> list[str]:
    """Return what names the studies that had this name before they were renamed first, oldest first.

    Args:
        database: the database.
        name: a name that no study has. Without a revision, it means all revisions; `NAME@1` means the first one.
    """
    is_any, first = "@" not in name, name.removesuffix(_FIRST)
    renamed = [study for study in all_studies(database) if study.first_name]
    found = [
        each for each in renamed if each.first_name in {name, first} or (is_any and _is_revision(each.first_name, name))
    ]
    known = references(study_names(database))
    return [known.get(each.name, each.name) for each in found]


def references(names: Iterable[str]) -> dict[str, str]:
    """Return {name: what names the study} for users: `find_study` finds the study by it, not a later revision.

    It is the name itself, but `NAME@1` for the first revision of a study that has later ones. If another program has given
    a study the name `NAME@1`, nothing names the first revision: its name is returned.

    Args:
        names: of all studies of a database.
    """
    known = set(names)
    bases = {name: name.partition("@")[0] for name in known}
    revised = {base for name, base in bases.items() if name != base and _is_revision(name, base)}
    return {name: name + _FIRST if name in revised and name + _FIRST not in known else name for name in known}


def find_revision(database: Database, name: str, fingerprint: str) -> Study | None:
    """Return the revision of a study that has this fingerprint, or None.

    Args:
        database: the database to search.
        name: the study's name, without a revision.
        fingerprint: the identity of the search.

    Raises:
        StorageError: a study of another program has the name.
    """
    for revision in _revisions(database, name):
        study = _load(database, revision)
        if study is None:
            continue
        found = study.attrs.get("hpo:fingerprint")
        if found is None and study.trials():
            raise StorageError(
                f"the study {revision!r} in {database.url} was created by another program; rename the search space, or "
                "name another database with --storage"
            )
        if found in {None, fingerprint}:
            return study
    return None


def other_revisions(database: Database, name: str, study: Study | None) -> list[Study]:
    """Return the other revisions of a study that hpo created, newest first.

    Args:
        database: the database.
        name: the study's name, without a revision.
        study: the study; None for one that does not exist yet.
    """
    known = [each for each in reversed(_revisions(database, name)) if study is None or each != study.name]
    return [found for each in known if (found := _load(database, each)) is not None and found.is_ours]


def open_study(
    database: Database,
    name: str,
    *,
    direction: Direction | Sequence[Direction],
    fingerprint: str,
    settings: Mapping[str, Any],
    total_trials: int | None = None,
) -> Study:
    """Return the revision of a study that has this fingerprint; create it if there is none.

    Args:
        database: the database of the study.
        name: the first revision's name, without `@`; later ones are `name@2`, `name@3`, ...
        direction: maximize or minimize; of several objectives, one each.
        fingerprint: the identity of the search. Studies of different fingerprints never share trials.
        settings: plain values to store with the study. They replace those of an earlier opening.
        total_trials: after how many ended trials the study is finished; None if only time ends it.

    Raises:
        StorageError: a study of another program has the name, or the database cannot be used.
    """
    directions = [direction] if isinstance(direction, str) else list(direction)
    if "@" in name:
        raise StorageError(f"a study cannot be named {name!r}: what follows @ is the number of a revision")

    def open_or_create() -> Study | None:
        revisions = _revisions(database, name)  # first: a study that appears after it makes the insertion fail
        study = find_revision(database, name, fingerprint)
        attrs = {} if study is None else study.attrs
        if "hpo:id" in attrs and identity_of(attrs) is None:
            raise StorageError(
                f"the study {study and study.name!r} in {database.url} has an attribute hpo:id that hpo did not write, so "
                "its files cannot be distinguished from those of other studies: rename the search space, or delete the study"
            )
        if study is not None and "hpo:fingerprint" not in attrs:
            _check_directions(study, directions)
        # The budget, for example, may have changed since the study was last opened.
        wanted = {"hpo:settings": dict(settings), "hpo:total": total_trials}
        changed = {attr: value for attr, value in wanted.items() if attr not in attrs or attrs[attr] != value}
        identity = {"hpo:id": uuid.uuid4().hex[:12], "hpo:fingerprint": fingerprint}
        identity = {attr: value for attr, value in identity.items() if attr not in attrs}
        is_it = study is None or study.identity == attrs.get("hpo:id")
        if not is_it or attrs.get("hpo:fingerprint", fingerprint) != fingerprint:
            return None  # another process has opened it first, or another study has its id now
        if study is not None and not changed and not identity:
            return study
        new = f"{name}@{_revision(revisions[-1]) + 1}" if revisions else name
        with database.transaction() as connection:
            if study is None:
                # Meanwhile, a study may have been deleted, and another process may have created this one.
                known = optuna_tables.read_study_attr(connection, "hpo:fingerprint")
                found = {each: value for each, value in known.items() if _is_revision(each, name)}
                if set(found) != set(revisions) or fingerprint in found.values() or None in found.values():
                    return None
                opened = optuna_tables.insert_study(connection, new, directions)
            elif not optuna_tables.lock_study(connection, study.key):
                return None
            else:
                opened = study.study_id
            optuna_tables.write_study_attrs(connection, opened, changed)
            if identity:
                optuna_tables.insert_study_attrs(connection, opened, identity)
                # optuna-dashboard labels the axes of its plots with it.
                labels = {"study:metric_names": metric_names(settings)}
                optuna_tables.write_study_system_attrs(connection, opened, labels)
        if study is None:
            created = _load(database, new)
            return created if created is not None and created.identity == identity["hpo:id"] else None
        return replace(study, identity=identity.get("hpo:id", study.identity))

    def unless_overtaken() -> Study | None:
        try:
            return open_or_create()
        except (IntegrityError, StudyDeletedError):  # another process has created the same revision, or deleted it
            return None

    while True:
        opened = retry_while_down(database, unless_overtaken)
        if opened is not None:
            return opened


def settings_of(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attribute `hpo:settings`; empty if there is none, or if another program has made something else of it."""
    value = attrs.get("hpo:settings")
    return value if isinstance(value, dict) else {}


def identity_of(attrs: Mapping[str, Any]) -> str | None:
    """Return the attribute `hpo:id`; None if there is none, or if it is not as hpo writes it: it becomes part of paths."""
    value = attrs.get("hpo:id")
    return value if isinstance(value, str) and _IDENTITY.fullmatch(value) else None


def unique_name_of(name: str, attrs: Mapping[str, Any]) -> str:
    """Return `Study.unique_name` of a study with this name and these user attributes; empty if hpo did not create it."""
    identity = identity_of(attrs)
    return f"{_first_name(attrs) or name}-{identity}" if identity else ""


def _first_name(attrs: Mapping[str, Any]) -> str:
    value = attrs.get(FILES)
    return value if isinstance(value, str) else ""


def revisions_of(names: Iterable[str], name: str) -> list[str]:
    """Return which of these names of studies are revisions of a study, the first one included."""
    return [known for known in names if _is_revision(known, name)]


def metric_names(settings: Mapping[str, Any]) -> list[str]:
    """Return the names of the objectives, as the settings of a study say; `value` for an unknown one."""
    objectives = settings.get("objectives")
    if isinstance(objectives, list) and all(isinstance(each, dict) for each in objectives) and objectives:
        return [str(each.get("metric", "value")) for each in objectives]
    return [str(settings.get("metric", "value"))]


def _check_directions(study: Study, directions: Sequence[str]) -> None:
    """Raise StorageError if another program created a study with other directions, such as the dashboard's default."""
    found, wanted = [each.name.lower() for each in study.optuna_study.directions], " and ".join(directions)
    if found != directions:
        raise StorageError(
            f"the study {study.name!r} in {study.database.url} was created by another program, to {' and '.join(found)}, "
            f"but the search space says {wanted}: delete the study, which has no trials, or rename the search space"
        )


def _load(database: Database, name: str) -> Study | None:
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


def _revisions(database: Database, name: str) -> list[str]:
    return sorted(revisions_of(study_names(database), name), key=_revision)


def _is_revision(known: str, name: str) -> bool:
    """Return whether `open_study` may have named a study so. Names that other programs give may contain `@`, too."""
    return known == name or (known.startswith(f"{name}@") and _REVISION.fullmatch(known, len(name) + 1) is not None)


def _revision(name: str) -> int:
    return int(name.partition("@")[2] or 1)
