"""Taking over trials of earlier studies: the sampler then knows their results, and nothing is trained twice.

A trial that is taken over is a new trial of the study, with the study's own distributions. `hpo_imports` says where it is
from. It never changes: the study that trained it can be changed or deleted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, Self

import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from storage import optuna_tables, records, tables
from storage.errors import retry_while_down
from storage.ownership import lock_study
from storage.records import COPIED_FROM, LEARNED_FROM, REUSED_FROM, Metrics, Params
from storage.study import Study
from storage.tables import LEARNED, POINT, REUSED

SOURCES = "hpo:sources"  # user attribute of a study


@dataclass(frozen=True)
class Origin:
    """The trial of an earlier study.

    Attributes:
        study: the name of the study that trained it, for people.
        identity: the attribute `hpo:id` of this study.
        number: its number there.
    """

    study: str
    identity: str
    number: int

    @classmethod
    def of(cls, attrs: Mapping[str, Any]) -> Origin | None:
        """Return where a trial with these user attributes was taken over from; None if its own study trained it."""
        return cls._read(attrs, REUSED_FROM) or cls._read(attrs, LEARNED_FROM)

    @classmethod
    def of_training(cls, study: Study, trial: FrozenTrial) -> Origin:
        """Return which study trained a trial: another one if it was taken over, or came with a copy of that study."""
        attrs = trial.user_attrs
        return cls.of(attrs) or cls._read(attrs, COPIED_FROM) or cls(study.name, study.identity or "", trial.number)

    @classmethod
    def _read(cls, attrs: Mapping[str, Any], name: str) -> Origin | None:
        value = attrs.get(name)
        if isinstance(value, Mapping) and isinstance(value.get("trial"), int):
            return cls(str(value.get("study")), str(value.get("id")), value["trial"])
        return None


class OvertakenError(Exception):
    """Another process has stored what it has read of earlier studies."""


@dataclass(frozen=True)
class TakenOver:
    """What a study has taken over from an earlier one.

    Attributes:
        study: what names the earlier study, see `studies.references`.
        storage: the database that has it, without a password; empty for the study's own.
        learned: from how many trials the sampler learns.
        reused: how many results stand: their configurations were not trained again.
        refused: {reason: number of trials} that were not taken over.
        seen: what it depends on: the state of the earlier study, and the options.
    """

    study: str
    storage: str = ""
    learned: int = 0
    reused: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    seen: str = ""

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Self:
        """Return what is stored, of which any program may have changed a part: that is left out."""
        numbers = [value if type(value := stored.get(name)) is int else 0 for name in ("learned", "reused")]
        refused = stored.get("refused")
        counts = refused.items() if isinstance(refused, Mapping) else ()
        return cls(
            str(stored.get("study", "")),
            str(stored.get("storage", "")),
            numbers[0],
            numbers[1],
            {str(reason): count for reason, count in counts if type(count) is int},
            str(stored.get("seen", "")),
        )

    @property
    def attribute(self) -> dict[str, Any]:
        """What the study stores of it."""
        return {each.name: getattr(self, each.name) for each in fields(TakenOver)}


def read_sources(attrs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the user attributes of a study say of earlier studies, see `TakenOver.read`."""
    stored = attrs.get(SOURCES)
    return [each for each in stored if isinstance(each, dict)] if isinstance(stored, list) else []


@dataclass(frozen=True)
class ImportedTrial:
    """A trial to take over.

    Attributes:
        origin: where it is from.
        params: {name: value}, as in the new study.
        distributions: {name: distribution} of these params, as in the new study.
        state: COMPLETE or PRUNED.
        value: the objective of the new study, the first one of several.
        key: of its configuration, if the new study would train it in the same way: then its result stands. None if only the
            sampler learns from it.
        values: {epoch: objective}.
        metrics: {epoch: {name: value}}, stored with a key only.
        attrs: further user attributes.
        provenance: what is needed to run it again.
        started: when it was started, in UTC without a time zone; None if this is not known.
        completed: when it ended.
        other_values: the other objectives of the new study.
    """

    origin: Origin
    params: Params
    distributions: Mapping[str, BaseDistribution]
    state: TrialState
    value: float
    key: str | None = None
    values: Mapping[int, float] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    started: datetime | None = None
    completed: datetime | None = None
    other_values: tuple[float, ...] = ()


class Known:
    """What a study has already, and what is added to it meanwhile: it is not taken over.

    The number of a trial is not enough to know it again: an earlier study whose database was restored from a copy gives
    numbers out again. Then the time at which the trial ended is another one. Trials that are passed on keep theirs.

    Args:
        ended: {(hpo:id of an earlier study, number there): when these trials ended} of trials that were taken over.
        keys: of the study's configurations.
    """

    def __init__(self, ended: Mapping[tuple[str, int], set[datetime]], keys: set[str]) -> None:
        self._ended: dict[tuple[str, int], set[datetime | None]] = {origin: {*times} for origin, times in ended.items()}
        self._keys = keys

    def has(self, trial: ImportedTrial) -> bool:
        """Return whether this very trial was taken over."""
        times = self._ended.get(_numbered(trial), set())
        return trial.completed in times or (trial.completed is None and bool(times))

    def has_configuration(self, trial: ImportedTrial) -> bool:
        """Return whether the study has the configuration of a trial whose result would stand."""
        return trial.key in self._keys

    def add(self, trial: ImportedTrial) -> str:
        """Add a trial; return its `hpo_imports.source`."""
        times = self._ended.setdefault(_numbered(trial), set())
        # (study, source, number) is unique.
        source = f"{trial.origin.identity} {trial.completed}" if times else trial.origin.identity
        times.add(trial.completed)
        if trial.key is not None:
            self._keys.add(trial.key)
        return source


def read_known(study: Study | None) -> Known:
    """Return what a study has already; nothing for one that does not exist yet.

    Raises:
        StorageError: the database cannot be used (after retries).
    """
    if study is None:
        return Known({}, set())

    def read() -> Known:
        with study.database.engine.connect() as connection:
            return _read_known(connection, study.study_id, study.database.missing_tables)

    return retry_while_down(study.database, read)


def count_imported(study: Study) -> int:
    """Return how many trials a study has taken over from earlier ones.

    Raises:
        StorageError: the database cannot be used (after retries).
    """
    query = sa.select(sa.func.count()).where(tables.imports.c.study == study.study_id)

    def read() -> int:
        with study.database.engine.connect() as connection:
            return connection.scalar(query) or 0

    return retry_while_down(study.database, read)


def import_trials(
    study: Study,
    imported: Sequence[ImportedTrial],
    *,
    points: Collection[str] = (),
    sources: Sequence[TakenOver] = (),
    seen: Any = None,
) -> dict[str, int]:
    """Add trials of earlier studies to a study: all of them, or none. Idempotent: those that the study has are left out.

    Args:
        study: the study.
        imported: the trials, in this order.
        points: see `set_points`.
        sources: stored as the study's attribute `hpo:sources`, for reports.
        seen: that attribute when the sources were read; None if there was none.

    Returns:
        {role: number of trials that were added}; see `tables.LEARNED`.

    Raises:
        OvertakenError: another process has stored other sources since then: it may have read them later.
        StorageError: the study was deleted, or the database cannot be used (after retries).
    """

    def write() -> dict[str, int]:
        with study.database.transaction() as connection:
            lock_study(connection, study.database, study.key)
            described = [source.attribute for source in sources]
            stored = optuna_tables.read_study_user_attr(connection, study.study_id, SOURCES)
            if described and stored not in (seen, described):
                raise OvertakenError
            added = _insert(connection, study.study_id, imported)
            _set_roles(connection, study.study_id, points)
            if described:
                optuna_tables.write_study_attrs(connection, study.study_id, {SOURCES: described})
            return added

    return retry_while_down(study.database, write)


def set_points(study: Study, points: Collection[str]) -> None:
    """Let the budget count the results of earlier studies that are points of the study's grid: the grid may have changed.

    Args:
        study: the study.
        points: keys of the points; none for a study that is no grid.

    Raises:
        StorageError: the study was deleted, or the database cannot be used (after retries).
    """

    def write() -> None:
        with study.database.engine.connect() as connection:
            if not _find_changed_roles(connection, study.study_id, points):
                return
        with study.database.transaction() as connection:
            lock_study(connection, study.database, study.key)
            _set_roles(connection, study.study_id, points)

    retry_while_down(study.database, write)


def _insert(connection: sa.Connection, study_id: int, imported: Sequence[ImportedTrial]) -> dict[str, int]:
    known = _read_known(connection, study_id)
    number = optuna_tables.next_number(connection, study_id)
    added: list[tuple[int, ImportedTrial]] = []
    sources: list[str] = []
    for trial in imported:
        if known.has(trial) or known.has_configuration(trial):
            continue
        sources.append(known.add(trial))
        trial_id = optuna_tables.insert_trial(connection, study_id, number + len(added), TrialState.WAITING)
        optuna_tables.write_params(connection, trial_id, trial.params, trial.distributions)
        optuna_tables.end(connection, trial_id, trial.state, trial.value, trial.other_values)
        optuna_tables.set_times(connection, trial_id, trial.started, trial.completed)
        added.append((trial_id, trial))
    optuna_tables.write_values(
        connection, ((trial_id, epoch, value) for trial_id, trial in added for epoch, value in trial.values.items())
    )
    optuna_tables.write_attrs(
        connection,
        ((trial_id, {**trial.attrs, _attribute(trial): _describe(trial.origin)}) for trial_id, trial in added),
    )
    reused = [(trial_id, trial) for trial_id, trial in added if trial.key is not None]
    if reused:
        rows = [
            {"trial": trial_id, "study": study_id, "key": trial.key, "provenance": dict(trial.provenance)}
            for trial_id, trial in reused
        ]
        connection.execute(tables.trials.insert(), rows)
    records.write_metrics(
        connection, ((trial_id, epoch, found) for trial_id, trial in reused for epoch, found in trial.metrics.items())
    )
    if added:
        rows = [
            {
                "trial": trial_id,
                "study": study_id,
                "source": source,
                "number": trial.origin.number,
                "role": _role(trial),
            }
            for (trial_id, trial), source in zip(added, sources, strict=True)
        ]
        connection.execute(tables.imports.insert(), rows)
    return {role: sum(_role(trial) == role for _, trial in added) for role in (LEARNED, REUSED)}


def _read_known(connection: sa.Connection, study_id: int, missing_tables: Collection[str] = ()) -> Known:
    table, ours, trial = tables.imports, tables.trials, optuna_tables.trials
    keys: set[str] = set()
    if ours.name not in missing_tables:
        keys.update(connection.scalars(sa.select(ours.c.key).where(ours.c.study == study_id)))
    ended: dict[tuple[str, int], set[datetime]] = {}
    if table.name not in missing_tables:
        query = sa.select(table.c.source, table.c.number, trial.c.datetime_complete)
        query = query.join(trial, trial.c.trial_id == table.c.trial).where(table.c.study == study_id)
        for row in connection.execute(query):
            ended.setdefault((row.source.partition(" ")[0], row.number), set()).add(row.datetime_complete)
    return Known(ended, keys)


def _numbered(trial: ImportedTrial) -> tuple[str, int]:
    return trial.origin.identity, trial.origin.number


def _set_roles(connection: sa.Connection, study_id: int, points: Collection[str]) -> None:
    for trial_id, role in _find_changed_roles(connection, study_id, points).items():
        update = tables.imports.update().where(tables.imports.c.trial == trial_id)
        connection.execute(update.values(role=role))


def _find_changed_roles(connection: sa.Connection, study_id: int, points: Collection[str]) -> dict[int, str]:
    """Return {trial_id: role} of the reused trials whose role is another one now."""
    table, ours = tables.imports, tables.trials
    query = sa.select(ours.c.trial, ours.c.key, table.c.role).join(table, table.c.trial == ours.c.trial)
    rows = connection.execute(query.where(table.c.study == study_id)).all()
    roles = {row.trial: (POINT if row.key in points else REUSED, row.role) for row in rows}
    return {trial_id: role for trial_id, (role, before) in roles.items() if role != before}


def _role(trial: ImportedTrial) -> str:
    return LEARNED if trial.key is None else REUSED


def _attribute(trial: ImportedTrial) -> str:
    return LEARNED_FROM if trial.key is None else REUSED_FROM


def _describe(origin: Origin) -> dict[str, Any]:
    return {"study": origin.study, "trial": origin.number, "id": origin.identity}
