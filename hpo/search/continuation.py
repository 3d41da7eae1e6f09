"""Which trials a search continues: with a larger `max_epochs`, it resumes from the checkpoints of earlier revisions.

Only completed trials are continued. A pruned one is not: its scheduler has judged it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from hpo.errors import SpaceError
from hpo.paths import SCRIPT_DIR, RunsDir
from hpo.search.checkpoints import belongs_to, list_checkpoints, owner_key
from hpo.search.comparison import Comparison
from hpo.space.model import Space
from hpo.space.parameters import Params

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from storage.database import Database
    from storage.parents import Parent
    from storage.studies import Study

MAX_NAMED = 5  # trials in a note


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
    """

    params: Params
    key: str
    values: tuple[float, ...]
    parent: Parent
    outlook: Outlook


@dataclass(frozen=True)
class ContinuationPlan:
    """What a search does with the trials of shorter revisions.

    Attributes:
        space: the search, without the points of its grid that are left as they are.
        chosen: the trials that are continued, or whose configurations are trained from the start, best first.
        left: those whose configurations stay as they are, best first.
    """

    space: Space
    chosen: Sequence[Candidate] = ()
    left: Sequence[Candidate] = ()

    @property
    def attrs(self) -> dict[str, dict[str, Any]]:
        """{key of a configuration: user attributes of the trial that continues another one}."""
        from storage.records import CONTINUED_FROM

        continued = (each for each in self.chosen if each.outlook is Outlook.CONTINUED)
        return {each.key: {CONTINUED_FROM: each.parent.attribute} for each in continued}

    @property
    def sources(self) -> set[str]:
        """The names of the studies of these trials."""
        return {each.parent.study for each in (*self.chosen, *self.left)}

    def first_points(self) -> list[Params]:
        """Return the configurations that are trained before all others: points of the grid, or those before any draw."""
        first = [each.params for each in self.chosen]
        if not self.space.is_grid:
            return first
        points = {self.space.config_key(point): point for point in self.space.planned_points()}
        continued = [points.pop(key) for each in self.chosen if (key := each.key) in points]
        return [*continued, *points.values()]

    def notes(self, known: Collection[str]) -> Iterator[str]:
        """Yield notes for the user.

        Args:
            known: keys of the configurations that the study has already: nothing is said of them.
        """
        chosen = [each for each in self.chosen if each.key not in known]
        max_epochs, options = self.space.max_epochs, self.space.continuation
        if found := _with(chosen, Outlook.CONTINUED):
            yield f"continues {_count(found)} to epoch {max_epochs} from {_their(found, 'checkpoint')}: {_name(found)}"
        if found := _with(chosen, Outlook.GONE):
            why = (
                f"{_their(found, 'checkpoint')} {'is' if len(found) == 1 else 'are'} gone"
                if self.space.saves_checkpoints
                else "a script without {checkpoint_dir} has no checkpoints"
            )
            yield f"trains {_count(found)} from the start, because {why}: {_name(found)}"
        horizon = "because {} depends on max_epochs"
        if found := _with(chosen, Outlook.HORIZON):
            why = horizon.format(_their(found, "schedule"))
            yield f"trains {_count(found)} from the start, {why}: {_name(found)}"
        left = [each for each in self.left if each.key not in known]
        found = _with(left, Outlook.HORIZON) if options.horizon == "leave" else []
        if found:
            why = horizon.format(_their(found, "schedule"))
            yield f"leaves {_count(found)} as {'it is' if len(found) == 1 else 'they are'}, {why}: {_name(found)}"
        if more := [each for each in left if each not in found]:
            yield f"leaves {_count(more)} as {'it is' if len(more) == 1 else 'they are'} (continue: {options.trials})"


def plan_continuation(
    space: Space, study: Study | None, database: Database | None, runs_dir: RunsDir
) -> ContinuationPlan:
    """Return what a search does with the completed trials of its other revisions that had fewer epochs.

    A trial counts if this search would train its configuration in the same way: parameters, derived values, data, seeds and
    trainable are the same, and so are the objectives, by which trials are ranked.

    Args:
        space: the search.
        study: its study; None if it does not exist yet.
        database: of the study; None if it does not exist yet. It is only read.
        runs_dir: where checkpoints are.

    Raises:
        StorageError: the database cannot be used.
    """
    options = space.continuation
    if database is None or not options.is_wanted or space.population is not None:
        return ContinuationPlan(space)
    from storage.pareto import rank_best
    from storage.studies import other_revisions

    best: dict[str, Candidate] = {}
    for revision in other_revisions(database, space.name, study):
        for candidate in _candidates(space, revision, runs_dir):
            known = best.get(candidate.key)
            best[candidate.key] = candidate if known is None else max(known, candidate, key=_usefulness)
    candidates = list(best.values())
    ranked = [candidates[i] for i in rank_best([each.values for each in candidates], space.directions)]
    wanted = ranked[: options.count(is_grid=space.is_grid)]
    chosen = [each for each in wanted if each.outlook is not Outlook.HORIZON or options.horizon == "restart"]
    keys = {each.key for each in chosen}
    left = [each for each in ranked if each.key not in keys]
    if space.is_grid and left:
        space = space.leaving_out({each.key for each in left})
    if space.is_grid and chosen and space.budget.trials is not None:
        planned = space.point_keys()
        chosen = [each for each in chosen if each.key in planned]
    return ContinuationPlan(space, chosen, left if space.is_grid else _with(left, Outlook.HORIZON))


def lacks_points(study: Study, runs_dir: RunsDir) -> bool:
    """Return whether points of a grid have not ended. `hpo run` trains them, although as many trials have ended.

    Those may be other points: they were enqueued by hand, or waited when the budget was reduced.

    Args:
        study: the study, of any search.
        runs_dir: where checkpoints are.

    Raises:
        StorageError: the database cannot be used.
    """
    try:
        space = Space.from_settings(study.settings)
    except SpaceError:  # of another version
        return False
    if not space.is_grid:
        return False
    ended = study.ended_keys()
    if space.point_keys() <= ended:
        return False
    return not plan_continuation(space, study, study.database, runs_dir).space.point_keys() <= ended


def _usefulness(candidate: Candidate) -> tuple[bool, int]:
    return candidate.outlook is Outlook.CONTINUED, candidate.parent.epoch


def _candidates(space: Space, earlier: Study, runs_dir: RunsDir) -> Iterator[Candidate]:
    from storage.imports import Origin

    try:
        before = Space.from_settings(earlier.settings)
    except SpaceError:  # of another version; the note about earlier studies says so
        return
    is_shorter = before.max_epochs < space.max_epochs
    if not is_shorter or before.all_objectives != space.all_objectives:
        return
    comparison = Comparison(space, before, earlier, frozenset())
    for trial in earlier.trained_trials():
        values = tuple(trial.values or ()) if trial.state.name == "COMPLETE" else ()
        # A result that was taken over is that of another revision, which has the checkpoint.
        if not values or not all(map(math.isfinite, values)) or Origin.of(trial.user_attrs) is not None:
            continue
        params = comparison.same_configuration(trial)
        if params is not None:
            parent = _parent(trial, before, earlier)
            outlook = Outlook.CONTINUED if _has_checkpoint(space, parent, runs_dir) else Outlook.GONE
            if comparison.depends_on_horizon(trial):
                outlook = Outlook.HORIZON
            yield Candidate(params, space.config_key(params), values, parent, outlook)


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


def _has_checkpoint(space: Space, parent: Parent, runs_dir: RunsDir) -> bool:
    folder = runs_dir.trial(parent.files, parent.number)
    if not space.saves_checkpoints or not belongs_to(folder, parent.key) or not list_checkpoints(folder):
        return False
    return space.command is None or (folder / SCRIPT_DIR).is_dir()


def _with(candidates: Iterable[Candidate], outlook: Outlook) -> list[Candidate]:
    return [each for each in candidates if each.outlook is outlook]


def _count(found: Sequence[Candidate]) -> str:
    return f"{len(found):,} trial{'' if len(found) == 1 else 's'}"


def _their(found: Sequence[Candidate], what: str) -> str:
    return f"its {what}" if len(found) == 1 else f"their {what}{'' if what == 'schedule' else 's'}"


def _name(found: Sequence[Candidate]) -> str:
    named = ", ".join(str(each.parent) for each in found[:MAX_NAMED])
    more = len(found) - MAX_NAMED
    return f"{named} and {more:,} more" if more > 0 else named
