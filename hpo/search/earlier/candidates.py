"""Completed trials of shorter revisions of a study: what a search may continue, and which of them are the best."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from hpo.bucket import describe
from hpo.errors import SettingError, SpaceError
from hpo.paths import SCRIPT_DIR, RunsDir
from hpo.search.checkpoints.bucket import BucketStudy
from hpo.search.checkpoints.files import belongs_to, list_checkpoints, owner_key
from hpo.search.earlier.comparison import Comparison
from hpo.space.model import Space
from hpo.space.parameters import Params

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from storage.parents import Parent
    from storage.pareto import Direction
    from storage.study import Study


class Outlook(Enum):
    """What becomes of a trial with fewer epochs."""

    CONTINUED = "it starts from its parent's checkpoint"
    GONE = "the checkpoint is gone: the configuration is trained from the start"
    HORIZON = "its schedule depends on max_epochs: it cannot be continued"


@dataclass(frozen=True)
class Candidate:
    """A completed trial of an earlier revision whose configuration this search trains for more epochs.

    Attributes:
        params: the configuration, as one of this search.
        key: of the configuration.
        values: the objectives after its last epoch.
        parent: the trial.
        outlook: what becomes of it.
        epochs: {epoch: objectives} as its study has them; empty for one that a decision names.
    """

    params: Params
    key: str
    values: tuple[float, ...]
    parent: Parent
    outlook: Outlook
    epochs: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    @property
    def stored(self) -> dict[str, Any]:
        """What a study stores of it, see `restore_candidate`."""
        is_left = self.outlook is Outlook.HORIZON
        return {"params": self.params, "values": list(self.values), "horizon": is_left, "parent": self.parent.attribute}


def find_candidates(space: Space, revisions: Iterable[Study], runs_dir: RunsDir) -> dict[str, Candidate]:
    """Return {key of a configuration: its candidate}; of several trials, one with a checkpoint, and with the most epochs.

    The results that a revision has from another study count, too: the trials of that study are continued.

    Args:
        space: the search.
        revisions: the other ones of its study, all of one database.
        runs_dir: where checkpoints are.

    Raises:
        StorageError: the database cannot be used.
    """
    from storage.studies import all_studies

    index, shorter = CheckpointIndex(space, runs_dir), list(revisions)
    reused: dict[str, set[int]] = {}
    candidates = [each for revision in shorter for each in _candidates(space, revision, index, reused)]
    for revision in shorter:
        reused.pop(str(revision.identity), None)
    for study in all_studies(shorter[0].database) if reused else []:
        numbers = reused.get(str(study.identity), set())
        if numbers:
            candidates += (each for each in _candidates(space, study, index) if each.parent.number in numbers)
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        known = found.get(candidate.key)
        found[candidate.key] = candidate if known is None else max(known, candidate, key=_usefulness)
    return found


def rank_candidates(candidates: Sequence[Candidate], directions: Sequence[Direction]) -> list[Candidate]:
    """Return candidates by their values, best first: those after the largest epoch that all of them have.

    Later values of trials with more epochs would be better for that alone. Without such an epoch, last values are compared.
    """
    from storage.pareto import rank_best

    shared = set.intersection(*(set(each.epochs) for each in candidates)) if candidates else set()
    epoch = max(shared, default=None)
    worst = [-math.inf if direction == "maximize" else math.inf for direction in directions]

    def comparable(candidate: Candidate) -> list[float]:
        values = candidate.values if epoch is None else candidate.epochs[epoch]
        return [value if math.isfinite(value) else last for value, last in zip(values, worst, strict=True)]

    return [candidates[place] for place in rank_best([comparable(each) for each in candidates], directions)]


class CheckpointIndex:
    """Which trials have a checkpoint that this search can start from. The bucket is listed once per study.

    Args:
        space: the search.
        runs_dir: where checkpoints are.
    """

    def __init__(self, space: Space, runs_dir: RunsDir) -> None:
        self._space = space
        self._runs_dir = runs_dir
        self._known: dict[str, Container[tuple[int, str]]] = {}  # {URL of a study: what it has in the bucket}

    def has(self, parent: Parent) -> bool:
        """Return whether a trial has a checkpoint.

        Raises:
            SettingError: the bucket cannot be read.
        """
        space, runs_dir = self._space, self._runs_dir
        folder = runs_dir.trial(parent.files, parent.number)
        if not space.saves_checkpoints:
            return False
        if belongs_to(folder, parent.key) and list_checkpoints(folder):
            return space.command is None or (folder / SCRIPT_DIR).is_dir()
        url = runs_dir.bucket_study(parent.files)
        if space.command is not None or not url:
            return False
        if url not in self._known:
            try:
                self._known[url] = BucketStudy(url).read()
            except OSError as error:
                raise SettingError(f"--checkpoints: {url} cannot be read: {describe(error)}") from None
        return (parent.number, parent.key) in self._known[url]


def restore_candidate(space: Space, stored: Any, index: CheckpointIndex) -> Candidate | None:
    """Return what `Candidate.stored` describes; its checkpoint may be gone by now."""
    from storage.parents import Parent

    if not isinstance(stored, Mapping):
        return None
    params, values, parent = stored.get("params"), stored.get("values"), Parent.read(stored.get("parent"))
    if parent is None or not isinstance(values, list) or not isinstance(params, dict):
        return None
    are_numbers = len(values) == len(space.directions) and all(isinstance(value, int | float) for value in values)
    if not are_numbers or space.find_misfit(params):
        return None
    outlook = Outlook.CONTINUED if index.has(parent) else Outlook.GONE
    outlook = Outlook.HORIZON if stored.get("horizon") is True else outlook
    return Candidate(params, space.config_key(params), tuple(values), parent, outlook)


def _usefulness(candidate: Candidate) -> tuple[bool, int]:
    return candidate.outlook is Outlook.CONTINUED, candidate.parent.epoch


def _candidates(
    space: Space, earlier: Study, index: CheckpointIndex, reused: dict[str, set[int]] | None = None
) -> Iterator[Candidate]:
    """Yield the candidates of a study, and add to {hpo:id of a study: numbers} the trials whose results it has reused."""
    from storage.imports import Origin
    from storage.optuna_internals import trial_id

    try:
        before = Space.from_settings(earlier.settings)
    except SpaceError:  # of another version; the note about earlier studies says so
        return
    is_shorter = before.max_epochs < space.max_epochs
    if not is_shorter or before.all_objectives != space.all_objectives:
        return
    comparison, trials = Comparison(space, before, earlier, frozenset()), earlier.trained_trials()
    names = [each.metric for each in space.all_objectives]
    # Optuna stores the first objective of each epoch, which is enough for one.
    metrics = earlier.metrics_of([trial_id(each) for each in trials]) if len(names) > 1 else {}
    for trial in trials:
        values = tuple(trial.values or ()) if trial.state.name == "COMPLETE" else ()
        if not values or not all(map(math.isfinite, values)):
            continue
        origin = Origin.of(trial.user_attrs)
        if origin is not None:  # the study that trained it has the checkpoint
            if reused is not None:
                reused.setdefault(origin.identity, set()).add(origin.number)
            continue
        params = comparison.same_configuration(trial)
        if params is not None:
            parent = _parent(trial, before, earlier)
            outlook = Outlook.CONTINUED if index.has(parent) else Outlook.GONE
            if comparison.depends_on_horizon(trial):
                outlook = Outlook.HORIZON
            epochs: dict[int, tuple[float, ...]] = {
                epoch: (value,) for epoch, value in trial.intermediate_values.items()
            }
            if metrics:
                known = metrics[trial_id(trial)]
                epochs = {
                    epoch: tuple(found[name] for name in names)
                    for epoch, found in known.items()
                    if found.keys() >= set(names)
                }
            yield Candidate(params, space.config_key(params), values, parent, outlook, epochs)


def _parent(trial: FrozenTrial, before: Space, earlier: Study) -> Parent:
    from storage.parents import Parent
    from storage.records import attempt_of

    return Parent(
        # The first revision has this name as soon as there is a second one.
        study=earlier.name if "@" in earlier.name else f"{earlier.name}@1",
        number=trial.number,
        identity=earlier.identity or "",
        epoch=before.max_epochs,
        files=earlier.unique_name,
        key=owner_key(before.config_key(trial.params), attempt_of(trial.user_attrs)),
    )
