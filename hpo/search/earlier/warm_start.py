"""Which trials of earlier studies a search takes over: what its sampler learns from, and what need not be trained again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hpo.errors import HpoError, SettingError, SpaceError
from hpo.search.earlier.comparison import Comparison, RefusalError
from hpo.search.earlier.missing_source import missing_source
from hpo.space.model import Space
from hpo.space.sections import Source
from hpo.space.translation import TranslationError
from storage.errors import MissingDatabaseError, StorageError
from storage.imports import (
    SOURCES,
    ImportedTrial,
    Origin,
    OvertakenError,
    TakenOver,
    import_trials,
    read_known,
    read_sources,
)
from storage.pareto import rank_best
from storage.studies import renamed_from

if TYPE_CHECKING:
    from storage.database import Database
    from storage.study import Study

MAX_REASONS = 3  # in a note; the report has all


@dataclass(frozen=True)
class Found(TakenOver):
    """What a search takes over from one earlier study.

    Attributes:
        trials: the trials, by number; empty if the study has taken over all of them before.
        problem: why the earlier study was not read; empty if it was. Then this is what was taken over before.
        known_to: `hpo:id` of the study that has what `trials` leaves out; None if it did not exist.
        stored: the sources that this study had stored then.
        is_named: whether the search space names it; other revisions of the study are read without being named.
    """

    trials: Sequence[ImportedTrial] = ()
    problem: str = ""
    known_to: str | None = field(default=None, compare=False)
    stored: Any = field(default=None, compare=False)
    is_named: bool = field(default=False, compare=False)

    @property
    def is_worth_a_note(self) -> bool:
        """Whether anything of it is taken over, it could not be read, or the search space names it."""
        return bool(self.learned or self.reused or self.problem or self.is_named)

    def __str__(self) -> str:
        left_out = sum(self.refused.values())
        parts = []
        if self.learned:
            parts.append(f"learns from {_count(self.learned, 'trial')}")
        if self.reused:
            parts.append(f"reuses {_count(self.reused, 'result')}")
        if left_out:
            reasons = [f"{reason} ({count})" for reason, count in Counter(self.refused).most_common()]
            more = len(reasons) - MAX_REASONS
            listed = "; ".join(reasons[:MAX_REASONS] + ([f"and {_count(more, 'other reason')}"] if more > 0 else []))
            parts.append(f"leaves out {_count(left_out, 'trial')}: {listed}")
        where = f" in {self.storage}" if self.storage else ""  # several databases may have a study of this name
        text = f"warm start from {self.study}{where}: {', '.join(parts) or 'it has no results yet'}"
        return f"{text}. Nothing new is taken over, because {self.problem}" if self.problem else text


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def find_trials(
    space: Space,
    study: Study | None,
    database: Database | None,
    password: str | None = None,
    continued: Collection[tuple[str, int]] = (),
) -> list[Found]:
    """Return what a search takes over from the other revisions of its study, and from those of `warm_start`.

    Databases are only read: tables of an older version are not migrated.

    Args:
        space: the search.
        study: its study; None if it does not exist yet.
        database: of the study; None if it does not exist yet.
        password: the PostgreSQL password of other databases.
        continued: (hpo:id, number) of earlier trials that the search continues: they do not count as left out.

    Raises:
        SettingError: an earlier study does not exist, hpo did not create it, or nothing of it fits.
        StorageError: a database cannot be used. Where the study has taken over trials from it before, `Found.problem` says
            so instead.
    """
    return _Finder(space, study, database, password, continued).find()


def take_over_trials(
    space: Space,
    study: Study,
    found: Sequence[Found],
    password: str | None = None,
    continued: Collection[tuple[str, int]] = (),
) -> Sequence[Found]:
    """Add the trials of earlier studies to a study: all that it does not have yet, or none. Idempotent.

    Args:
        space: the search.
        study: its study.
        found: see `find_trials`.
        password: see `find_trials`.
        continued: see `find_trials`.

    Returns:
        What was found; read again if it was found for another study, which was deleted meanwhile, or if another driver
        has taken over trials since.

    Raises:
        SettingError: see `find_trials`.
        StorageError: the study was deleted, or a database cannot be used.
    """
    is_current = all(each.known_to in {None, study.identity} for each in found)
    while True:
        if not is_current:
            found = find_trials(space, study, study.database, password, continued)
        if not found:
            return found
        trials = [trial for each in found for trial in each.trials]
        try:
            import_trials(study, trials, points=space.point_keys(), sources=found, seen=found[0].stored)
        except OvertakenError:
            is_current = False
        else:
            return found


class _Finder:
    """Finds what a search takes over; see `find_trials`."""

    def __init__(
        self,
        space: Space,
        study: Study | None,
        database: Database | None,
        password: str | None,
        continued: Collection[tuple[str, int]],
    ) -> None:
        self._space = space
        self._study = study
        self._database = database
        self._password = password
        self._continued = continued
        attrs = {} if study is None else study.attrs
        self._stored = attrs.get(SOURCES)
        self._before = _known_sources(attrs)
        self._known = read_known(study)
        self._identities = {None if study is None else study.identity}  # of studies that are not read any more
        self._named: set[tuple[Origin, datetime | None]] = set()  # trials of the sources so far, and when they ended

    def find(self) -> list[Found]:
        from storage.studies import other_revisions

        sources = {(source.study, source.storage): source for source in self._space.warm_start}
        name = self._space.name
        own = sources.pop((name, None), None) or Source(study=name, despite=[])
        found: list[Found] = []
        for source in sources.values():
            index = self._space.warm_start.index(source)
            # Without those of the search's own database.
            errors = (HpoError,) if source.storage is None else (HpoError, StorageError)
            with self._space.locating_errors("warm_start", index, errors=errors):
                found += [dataclasses.replace(each, is_named=True) for each in self._from_source(source)]
        for revision in [] if self._database is None else other_revisions(self._database, name, self._study):
            if revision.identity not in self._identities:
                # The first one has this name as soon as there is a second one.
                reference = revision.name if "@" in revision.name else f"{revision.name}@1"
                found.append(dataclasses.replace(self._from_study(revision, own, ""), study=reference))
        identity = None if self._study is None else self._study.identity
        return [dataclasses.replace(each, known_to=identity, stored=self._stored) for each in found]

    def _from_source(self, source: Source) -> list[Found]:
        """Return what is taken over from a source; nothing if another one has named the same study."""
        where = _where(source)
        known = _known_source(self._before, source, where)
        try:
            with _open(source, self._database, self._password) as (database, earlier):
                if earlier is None and known is not None:  # it was deleted or renamed; its trials stay
                    renamed = [] if database is None else renamed_from(database, source.study)
                    problem = f"it was renamed to {' or '.join(renamed)}: name that in warm_start" if renamed else ""
                    return [dataclasses.replace(known, problem=problem)]
                if earlier is None:
                    raise missing_source(self._space, source, database)
                if earlier.identity in self._identities:
                    return []
                self._identities.add(earlier.identity)
                found = self._from_study(earlier, source, where)
                if found.refused and not (found.learned or found.reused):
                    self._check_names(earlier, source)
                return [found]
        except StorageError as error:
            if source.storage is None:
                raise
            kind, reason = type(error), str(error)
            if isinstance(error, MissingDatabaseError):  # `storage` names it, and not --storage
                kind, reason = StorageError, f"there is no database {error.url}: correct its storage"
            if known is None:
                raise kind(f"warm_start: {source.study} cannot be read: {reason}") from None
            return [dataclasses.replace(known, problem=f"it cannot be read: {reason}")]

    def _check_names(self, earlier: Study, source: Source) -> None:
        parameters = earlier.settings.get("parameters")
        if not isinstance(parameters, Mapping) or not (self._space.parameters.keys() & set(parameters)):
            raise SettingError(f"warm_start: {source.study} has no parameter in common with this search")

    def _from_study(self, earlier: Study, source: Source, where: str) -> Found:
        """Return what is taken over from a study. A large one is read only if something has changed since the last time."""
        options = self._space.model_dump(mode="json", include={"parameters", "sampler"}) | source.model_dump()
        state: list[Any] = [earlier.identity, earlier.endings(), options]
        if continued := sorted(number for identity, number in self._continued if identity == earlier.identity):
            state.append(continued)
        seen = hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()[:16]
        before = next((found for found in self._before if found.seen == seen), None)
        return before or dataclasses.replace(self._read(earlier, source), storage=where, seen=seen)

    def _read(self, earlier: Study, source: Source) -> Found:
        from storage.optuna_internals import trial_id

        refused: Counter[str] = Counter()
        own = None if self._study is None else self._study.identity
        trials = [
            trial
            for trial in earlier.trained_trials()
            if trial.state.name in {"COMPLETE", "PRUNED"}
            and (own is None or Origin.of_training(earlier, trial).identity != own)
        ]
        try:
            before = Space.from_settings(earlier.settings)
        except SpaceError:
            return Found(earlier.reference, refused={"another version of hpo wrote its settings": len(trials)})
        if source.count is not None:
            completed = [trial for trial in trials if trial.state.name == "COMPLETE" and trial.values]
            best = rank_best([trial.values for trial in completed], before.directions, source.count)
            trials = sorted((completed[i] for i in best), key=lambda trial: trial.number)
        comparison = Comparison(self._space, before, earlier, frozenset(source.despite))
        taken: dict[int, ImportedTrial] = {}
        for trial in trials:
            try:
                taken[trial_id(trial)] = self._unless_superfluous(comparison.take_over(trial))
            except (RefusalError, TranslationError) as error:
                if (earlier.identity, trial.number) not in self._continued:
                    refused[str(error)] += 1
        reused = sum(trial.key is not None for trial in taken.values())
        found = comparison.complete(taken)
        return Found(earlier.reference, learned=len(taken) - reused, reused=reused, refused=refused, trials=found)

    def _unless_superfluous(self, trial: ImportedTrial) -> ImportedTrial:
        """Return the trial.

        Raises:
            RefusalError: the study has the result of another training of the same configuration, or will have it; or another
                source has this very trial, as a copy of a study does.
        """
        named = (dataclasses.replace(trial.origin, study=""), trial.completed)  # a copy may have another name for it
        if named in self._named:
            raise RefusalError("another source has the same trial")
        self._named.add(named)
        if not self._known.has(trial):
            if self._known.has_configuration(trial):
                raise RefusalError("this search has the configuration already")
            self._known.add(trial)
        return trial


def _where(source: Source) -> str:
    """Return the URL of a source's database, without a password; empty for the search's own."""
    from storage.urls import contains_password, without_password

    if source.storage is None:
        return ""
    try:
        has_password, url = contains_password(source.storage), without_password(source.storage)
    except StorageError as error:
        raise type(error)(f"warm_start: {source.study} cannot be read: {error}") from None
    if has_password:
        raise SettingError("warm_start: leave the password out of the file, and put it in PGPASSWORD or ~/.pgpass")
    return url


@contextmanager
def _open(
    source: Source, database: Database | None, password: str | None
) -> Iterator[tuple[Database | None, Study | None]]:
    """Open the database of an earlier study; yield it, None without tables, and the study, None without one."""
    from storage.database import open_for_reading
    from storage.studies import find_study

    opened = database if source.storage is None else open_for_reading(source.storage, password)
    try:
        study = None if opened is None else find_study(opened, source.study)
        if study is not None and not study.is_ours:
            raise SettingError(
                f"warm_start: another program created the study {source.study!r} in {study.database.url}"
            )
        yield opened, study
    finally:
        if source.storage is not None and opened is not None:
            opened.close()


def _known_sources(attrs: Mapping[str, Any]) -> list[Found]:
    """Return what a study has taken over before. What another program has changed is left out."""
    return [found for each in read_sources(attrs) if (found := Found.read(each)).attribute == each]


def _known_source(before: Sequence[Found], source: Source, where: str) -> Found | None:
    """Return what a study has taken over from a source before; None if it has not.

    Args:
        before: see `_known_sources`.
        source: the source. A name without a revision means the latest one, whichever that was.
        where: its database.
    """
    base, at, revision = source.study.partition("@")
    here = [found for found in before if found.storage == where]
    same = [found for found in here if found.study == source.study]
    if not same and not at:
        same = [found for found in here if found.study.partition("@")[0] == base]
    if not same and revision == "1":  # before there was a second one
        same = [found for found in here if found.study == base]
    return max(same, key=lambda found: _revision(found.study), default=None)


def _revision(name: str) -> int:
    revision = name.partition("@")[2]
    return int(revision) if revision.isdecimal() else 1
