"""Which trials of earlier studies a search takes over: what its sampler learns from, and what need not be trained again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpo.errors import SettingError, SpaceError, nearest
from hpo.space.model import Space
from hpo.space.parameters import Scalar
from hpo.space.sections import Source
from hpo.space.translation import Translation, TranslationError, translate

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from storage.database import Database
    from storage.imports import ImportedTrial, Origin
    from storage.studies import Study

# Optuna's other samplers that learn read only trials that they have drawn themselves.
LEARN_FROM_OTHERS = {"tpe", "gp"}
MAX_REASONS = 3  # in a note; the report has all


class _RefusalError(Exception):
    """A trial cannot be taken over. The message says why, in words that fit several trials."""


@dataclass(frozen=True)
class Found:
    """What a search takes over from one earlier study.

    Attributes:
        study: what names the earlier study, see `storage.studies.references`.
        storage: the database that has it, without a password; empty for the search's own.
        learned: from how many trials the sampler learns.
        reused: how many results stand.
        refused: {reason: number of trials} that are not taken over.
        seen: what it depends on: the state of the earlier study, and the options.
        trials: the trials, by number; empty if the study has taken over all of them before.
    """

    study: str
    storage: str = ""
    learned: int = 0
    reused: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    seen: str = ""
    trials: Sequence[ImportedTrial] = ()

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Found | None:
        """Return what a study stores of it; None if another program has changed that."""
        kinds = {"study": str, "storage": str, "learned": int, "reused": int, "refused": dict, "seen": str}
        if stored.keys() != kinds.keys() or any(type(stored[name]) is not kind for name, kind in kinds.items()):
            return None
        if any(type(count) is not int for count in stored["refused"].values()):
            return None
        return cls(**stored)

    @property
    def has_trials(self) -> bool:
        """Whether anything of it is taken over."""
        return bool(self.learned or self.reused)

    @property
    def attribute(self) -> dict[str, Any]:
        """What the study stores of it."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "trials"}

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
        stored = _stored_source(study, source)
        with space.locating_errors("warm_start"), _open(source, database, password) as (where, earlier):
            if earlier is None and stored is not None:  # it was deleted; its trials stay
                found.append(stored)
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
    from storage.imports import import_trials

    if found:
        points = {space.config_key(point) for point in space.planned_points()} if space.is_grid else None
        trials = [trial for each in found for trial in each.trials]
        import_trials(study, trials, points=points, sources=[each.attribute for each in found])


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
    for stored in _stored_sources(study):
        if stored.get("seen") == seen and (found := Found.read(stored)) is not None:
            return found
    return dataclasses.replace(_read(space, study, earlier, source), storage=where, seen=seen)


def _stored_sources(study: Study | None) -> list[dict[str, Any]]:
    from storage.imports import SOURCES

    stored = [] if study is None else study.attrs.get(SOURCES)
    return [each for each in stored if isinstance(each, dict)] if isinstance(stored, list) else []


def _stored_source(study: Study | None, source: Source) -> Found | None:
    """Return what a study has taken over from a source before; None if it has not."""
    for stored in _stored_sources(study):
        if str(stored.get("study")).partition("@")[0] == source.study.partition("@")[0]:
            return Found.read(stored)
    return None


def _read(space: Space, study: Study | None, earlier: Study, source: Source) -> Found:
    from storage.imports import Origin

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
    comparison = _Comparison(space, before, earlier, frozenset(source.despite))
    taken: list[ImportedTrial] = []
    for trial in trials:
        try:
            taken.append(comparison.take_over(trial))
        except (_RefusalError, TranslationError) as error:
            refused[str(error)] += 1
    reused = sum(trial.key is not None for trial in taken)
    found = comparison.complete(taken)
    return Found(earlier.reference, learned=len(taken) - reused, reused=reused, refused=refused, trials=found)


class _Comparison:
    """Compares the trials of one earlier study with a search.

    Args:
        space: the search.
        before: the search of the earlier study.
        earlier: the earlier study.
        despite: see `Source`.
    """

    def __init__(self, space: Space, before: Space, earlier: Study, despite: frozenset[str]) -> None:
        self._space = space
        self._before = before
        self._earlier = earlier
        self._despite = despite
        self._is_same_code = _code_of(space) == _code_of(before)
        self._trainings = space.is_default_trainable and before.is_default_trainable
        self._defaults = _default_params() if self._trainings else {}
        self._epochs: dict[int, dict[int, dict[str, float]]] | None = None
        self._trials: dict[Origin, FrozenTrial] = {}
        self._distributions = space.distributions()

    def take_over(self, trial: FrozenTrial) -> ImportedTrial:
        """Return a trial as one of the search.

        Raises:
            _RefusalError: its value cannot be compared.
            TranslationError: the search has no such configuration.
        """
        from optuna.trial import TrialState

        from storage.imports import ImportedTrial, Origin

        self._check("data", self._space.data == self._before.data, "it had other data")
        self._check("trainable", self._is_same_code, "it ran other code")
        derived = trial.user_attrs.get("derived")
        params = trial.params | (derived if isinstance(derived, dict) else {})
        translation = translate(self._space, params, defaults=self._defaults)
        state, values, is_exact = self._cut(trial, params)
        own = self._earlier.identity or ""
        origin = Origin.of(trial.user_attrs) or Origin(self._earlier.name, own, trial.number)
        is_reused = is_exact and state == "COMPLETE" and self._is_trained_the_same_way(translation)
        sampler = self._space.sampler.name
        if not is_reused and sampler not in LEARN_FROM_OTHERS:
            raise _RefusalError(f"sampler {sampler} uses only results that stand")
        self._trials[origin] = trial
        key = self._space.config_key(translation.params) if is_reused else None
        last = max(values)
        return ImportedTrial(
            origin,
            translation.params,
            {name: self._distributions[name] for name in translation.params},
            TrialState[state],
            values[last],
            key,
            values if is_reused else {last: values[last]} if state == "PRUNED" else {},
            attrs=self._attrs(trial, translation, is_reused=is_reused),
            started=trial.datetime_start,
            completed=trial.datetime_complete,
        )

    def complete(self, taken: Sequence[ImportedTrial]) -> list[ImportedTrial]:
        """Return the same trials; those whose results stand with all of their metrics, and what is needed to replay them."""
        from storage.optuna_internals import trial_id

        ids = {trial.origin: trial_id(self._trials[trial.origin]) for trial in taken if trial.key is not None}
        metrics = self._earlier.metrics_of(list(ids.values())) if ids else {}

        def with_metrics(trial: ImportedTrial) -> ImportedTrial:
            epochs = metrics[ids[trial.origin]]
            return dataclasses.replace(
                trial,
                metrics={epoch: found for epoch, found in epochs.items() if epoch <= self._space.max_epochs},
                provenance=self._earlier.provenance(self._trials[trial.origin].number),
            )

        return [with_metrics(trial) if trial.origin in ids else trial for trial in taken]

    def _check(self, what: str, is_same: bool, reason: str) -> None:
        if not is_same and what not in self._despite:
            raise _RefusalError(f"{reason} (despite: [{what}] takes it)")

    def _cut(self, trial: FrozenTrial, params: Mapping[str, Scalar]) -> tuple[str, dict[int, float], bool]:
        """Return a trial as it was after the search's number of epochs.

        Returns:
            Its state, {epoch: finite objective}, and whether these are what the search would measure.
        """
        (values, is_metric), state = self._values(trial), trial.state.name
        if not values:
            raise _RefusalError("it has no finite value")
        epochs, wanted = self._before.max_epochs, self._space.max_epochs
        if state == "COMPLETE" and epochs == wanted and wanted not in values:
            raise _RefusalError(f"it has no value after epoch {wanted}")
        if epochs == wanted:
            return state, values, is_metric
        if epochs > wanted and not self._depends_on_horizon(params):
            state = "COMPLETE" if wanted in values else state
            if state == "COMPLETE" and wanted not in values:
                raise _RefusalError(f"it has no value after epoch {wanted}")
            return state, {epoch: value for epoch, value in values.items() if epoch <= wanted}, is_metric
        self._check("max_epochs", False, f"it was trained for {epochs} epochs, not {wanted}")
        return state, values, False

    def _values(self, trial: FrozenTrial) -> tuple[dict[int, float], bool]:
        """Return {epoch: value}, without values that are not finite, and whether they are of the search's metric.

        Without a finite value after its last epoch, it is of no use: then there are no values.
        """
        is_metric = True
        if self._space.metric == self._before.metric:
            values = dict(trial.intermediate_values)
            if not values and trial.state.name == "COMPLETE" and trial.value is not None:
                values = {self._before.max_epochs: trial.value}
        else:
            values = {
                epoch: found[self._space.metric]
                for epoch, found in self._metrics_of(trial).items()
                if self._space.metric in found
            }
            if not values:
                self._check("metric", False, f"it has no {self._space.metric}")
                values, is_metric = dict(trial.intermediate_values), False
        last = max(values, default=0)
        if last and not math.isfinite(values[last]):
            return {}, is_metric
        return {epoch: value for epoch, value in values.items() if math.isfinite(value)}, is_metric

    def _metrics_of(self, trial: FrozenTrial) -> dict[int, dict[str, float]]:
        from storage.optuna_internals import trial_id

        if self._epochs is None:
            ended = [trial_id(each) for each in self._earlier.trained_trials()]
            self._epochs = self._earlier.metrics_of(ended)
        return self._epochs.get(trial_id(trial), {})

    def _depends_on_horizon(self, params: Mapping[str, Scalar]) -> bool:
        """Whether a longer training is not the continuation of a shorter one; True if this is not known."""
        if not self._trainings:
            return True
        from hpo.train.params import HORIZON_SCHEDULES, TrainParams

        return params.get("schedule", TrainParams.schedule) in HORIZON_SCHEDULES

    def _is_trained_the_same_way(self, translation: Translation) -> bool:
        return (
            translation.is_same
            and self._is_same_code
            and self._space.data == self._before.data
            and self._space.seed == self._before.seed
        )

    def _attrs(self, trial: FrozenTrial, translation: Translation, *, is_reused: bool) -> dict[str, Any]:
        derived = self._space.derive(translation.params)
        attrs: dict[str, Any] = {"derived": derived} if derived else {}
        if is_reused and self._before.max_epochs == self._space.max_epochs:
            attrs |= {name: value for name, value in trial.user_attrs.items() if name.startswith("test_")}
        return attrs


def _code_of(space: Space) -> tuple[Any, ...]:
    return space.trainable, space.command, space.report


def _default_params() -> dict[str, Scalar]:
    from hpo.train.params import TrainParams

    return dataclasses.asdict(TrainParams())
