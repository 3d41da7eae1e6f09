"""Which trials of earlier studies a search takes over: what its sampler learns from, and what need not be trained again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpo.errors import SettingError, SpaceError, nearest
from hpo.search.comparison import Comparison, RefusalError
from hpo.space.model import Space
from hpo.space.sections import Source
from hpo.space.translation import TranslationError
from storage.imports import ImportedTrial, Origin, TakenOver, import_trials, read_sources

if TYPE_CHECKING:
    from storage.database import Database
    from storage.studies import Study

MAX_REASONS = 3  # in a note; the report has all


@dataclass(frozen=True)
class Found(TakenOver):
    """What a search takes over from one earlier study.

    Attributes:
        trials: the trials, by number; empty if the study has taken over all of them before.
    """

    trials: Sequence[ImportedTrial] = ()

    @property
    def has_trials(self) -> bool:
        """Whether anything of it is taken over."""
        return bool(self.learned or self.reused)

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
        return f"warm start from {self.study}: {', '.join(parts) or 'it has no results yet'}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def find_trials(
    space: Space, study: Study | None, database: Database | None, password: str | None = None
) -> list[Found]:
    """Return what a search takes over from the other revisions of its study, and from those of `warm_start`.

    Args:
        space: the search.
        study: its study; None if it does not exist yet.
        database: of the study; None if it does not exist yet.
        password: the PostgreSQL password of other databases.

    Raises:
        SettingError: an earlier study does not exist, hpo did not create it, or nothing of it fits.
        StorageError: a database cannot be used.
    """
    from storage.studies import other_revisions

    found: list[Found] = []
    identities = {None if study is None else study.identity}
    sources = {(source.study, source.storage): source for source in space.warm_start}
    own = sources.pop((space.name, None), None) or Source(study=space.name, despite=[])
    for source in sources.values():
        known = _known_source(study, source)
        with space.locating_errors("warm_start"), _open(source, database, password) as (where, earlier):
            if earlier is None and known is not None:  # it was deleted; its trials stay
                found.append(known)
            elif earlier is None:
                raise _unknown(source, database)
            elif earlier.identity not in identities:
                identities.add(earlier.identity)
                taken = _find(space, study, earlier, source, where)
                if taken.refused and not taken.has_trials and not (space.parameters.keys() & _names(earlier)):
                    raise SettingError(f"warm_start: {source.study} has no parameter in common with this search")
                found.append(taken)
    revisions = [] if database is None else other_revisions(database, space.name, study)
    for revision in revisions:
        if revision.identity not in identities:
            # The first one has this name as soon as there is a second one.
            name = revision.name if "@" in revision.name else f"{revision.name}@1"
            found.append(dataclasses.replace(_find(space, study, revision, own, ""), study=name))
    return found


def take_over_trials(space: Space, study: Study, found: Sequence[Found]) -> None:
    """Add the trials of earlier studies to a study: all that it does not have yet, or none. Idempotent.

    Args:
        space: the search.
        study: its study.
        found: see `find_trials`.

    Raises:
        StorageError: the study was deleted, or the database cannot be used.
    """
    if found:
        trials = [trial for each in found for trial in each.trials]
        import_trials(study, trials, points=space.point_keys(), sources=found)


@contextmanager
def _open(source: Source, database: Database | None, password: str | None) -> Iterator[tuple[str, Study | None]]:
    """Open the database of an earlier study; yield its URL, empty for the search's own, and the study, None without one."""
    from storage.database import open_existing
    from storage.studies import find_study
    from storage.urls import contains_password

    if source.storage is not None and contains_password(source.storage):
        raise SettingError("warm_start: leave the password out of the file, and put it in PGPASSWORD or ~/.pgpass")
    opened = database if source.storage is None else open_existing(source.storage, password)
    try:
        study = None if opened is None else find_study(opened, source.study)
        if study is not None and not study.is_ours:
            raise SettingError(
                f"warm_start: another program created the study {source.study!r} in {study.database.url}"
            )
        yield ("" if source.storage is None or opened is None else opened.url), study
    finally:
        if source.storage is not None and opened is not None:
            opened.close()


def _unknown(source: Source, database: Database | None) -> SettingError:
    if source.storage is not None:
        return SettingError(f"warm_start: there is no study {source.study!r} in its storage")
    if database is None:
        return SettingError(f"warm_start: there is no study {source.study!r}: the database does not exist yet")
    from storage.studies import study_names

    known = study_names(database)
    hint = nearest(source.study, known) if known else "it has none"
    return SettingError(f"warm_start: there is no study {source.study!r} in {database.url}: {hint}")


def _names(study: Study) -> set[str]:
    parameters = study.settings.get("parameters")
    return set(parameters) if isinstance(parameters, Mapping) else set()


def _find(space: Space, study: Study | None, earlier: Study, source: Source, where: str) -> Found:
    """Return what is taken over from a study. A large one is read only if something has changed since the last time."""
    counts = earlier.counts()
    state = [earlier.identity, counts["COMPLETE"], counts["PRUNED"]]  # trials that have ended do not change
    options = space.model_dump(mode="json", include={"parameters", "sampler"}) | source.model_dump()
    seen = hashlib.sha256(json.dumps([state, options], sort_keys=True).encode()).hexdigest()[:16]
    for found in _known_sources(study):
        if found.seen == seen:
            return found
    return dataclasses.replace(_read(space, study, earlier, source), storage=where, seen=seen)


def _known_sources(study: Study | None) -> list[Found]:
    """Return what a study has taken over before. What another program has changed is left out."""
    stored = [] if study is None else read_sources(study.attrs)
    return [found for each in stored if (found := Found.read(each)).attribute == each]


def _known_source(study: Study | None, source: Source) -> Found | None:
    """Return what a study has taken over from a source before; None if it has not."""
    base = source.study.partition("@")[0]
    return next((each for each in _known_sources(study) if each.study.partition("@")[0] == base), None)


def _read(space: Space, study: Study | None, earlier: Study, source: Source) -> Found:
    refused: Counter[str] = Counter()
    trials = [
        trial
        for trial in earlier.trained_trials()
        if trial.state.name in {"COMPLETE", "PRUNED"}
        and (study is None or (origin := Origin.of(trial.user_attrs)) is None or origin.identity != study.identity)
    ]
    try:
        before = Space.from_settings(earlier.settings)
    except SpaceError:
        return Found(earlier.reference, refused={"another version of hpo wrote its settings": len(trials)})
    if source.count is not None:
        completed = [trial for trial in trials if trial.state.name == "COMPLETE" and trial.value is not None]
        completed.sort(key=lambda trial: trial.value or 0.0, reverse=before.direction == "maximize")
        trials = sorted(completed[: source.count], key=lambda trial: trial.number)
    comparison = Comparison(space, before, earlier, frozenset(source.despite))
    taken: list[ImportedTrial] = []
    for trial in trials:
        try:
            taken.append(comparison.take_over(trial))
        except (RefusalError, TranslationError) as error:
            refused[str(error)] += 1
    reused = sum(trial.key is not None for trial in taken)
    found = comparison.complete(taken)
    return Found(earlier.reference, learned=len(taken) - reused, reused=reused, refused=refused, trials=found)
