"""Which trials a search continues: with a larger `max_epochs`, it resumes from the checkpoints of earlier revisions.

Only completed trials are continued. A pruned one is not: its scheduler has judged it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hpo.errors import SpaceError
from hpo.paths import RunsDir
from hpo.search.earlier.candidates import (
    Candidate,
    CheckpointIndex,
    Outlook,
    find_candidates,
    rank_candidates,
    restore_candidate,
)
from hpo.space.model import Space
from hpo.space.parameters import Params

if TYPE_CHECKING:
    from storage.database import Database
    from storage.study import Study

MAX_NAMED = 5  # trials in a note
LEFT = "left as it is"  # what becomes of a configuration that this search does not train


@dataclass(frozen=True)
class Decision:
    """What is done with the trials of shorter revisions. The study stores it.

    Attributes:
        options: by which it was made: with others, it is made again.
        chosen: see `ContinuationPlan`; also those beyond the budget.
        left: see `ContinuationPlan`.
        former: those that were chosen by other options, which another driver may still follow.
        seen: what the study had stored when it was made.
    """

    options: Mapping[str, Any]
    chosen: Sequence[Candidate]
    left: Sequence[Candidate]
    former: Sequence[Candidate] = ()
    seen: Any = None

    @property
    def stored(self) -> dict[str, Any]:
        """What the study stores."""
        chosen, left, former = ([each.stored for each in found] for found in (self.chosen, self.left, self.former))
        return {"options": dict(self.options), "chosen": chosen, "left": left} | ({"former": former} if former else {})


@dataclass(frozen=True)
class ContinuationPlan:
    """What a search does with the trials of shorter revisions.

    Attributes:
        space: the search, without the points of its grid that are left as they are.
        chosen: the trials that are continued, or whose configurations are trained from the start: those that
            `points_to_evaluate` names, then the best first.
        left: those whose configurations stay as they are, best first.
        decision: what the study is to store of it; None for nothing.
    """

    space: Space
    chosen: Sequence[Candidate] = ()
    left: Sequence[Candidate] = ()
    decision: Decision | None = None

    @property
    def attrs(self) -> dict[str, dict[str, Any]]:
        """{key of a configuration: user attributes of the trial that continues another one}."""
        from storage.records import CONTINUED_FROM

        continued = (each for each in self.chosen if each.outlook is Outlook.CONTINUED)
        return {each.key: {CONTINUED_FROM: each.parent.attribute} for each in continued}

    @property
    def parents(self) -> set[tuple[str, int]]:
        """(`hpo:id` of the study, number) of the trials that are continued."""
        return {(each.parent.identity, each.parent.number) for each in _with(self.chosen, Outlook.CONTINUED)}

    @property
    def sources(self) -> set[str]:
        """The names of the studies of these trials."""
        return {each.parent.study for each in (*self.chosen, *self.left)}

    def first_points(self) -> list[Params]:
        """Return the configurations that are trained before all others: points of the grid, or those before any draw."""
        if not self.space.is_grid:
            return [*self.space.points_to_evaluate, *(each.params for each in self.chosen)]
        points = {self.space.config_key(point): point for point in self.space.planned_points()}
        keys = [*self.space.named_keys, *(each.key for each in self.chosen)]
        return [*(points.pop(key) for key in keys if key in points), *points.values()]

    @property
    def outlooks(self) -> dict[str, str]:
        """{key of a configuration: what becomes of it}, of those that are continued or left as they are."""
        continued = _with(self.chosen, Outlook.CONTINUED)
        left = {each.key: LEFT for each in self.left} if self.space.is_grid else {}
        return {each.key: f"continued from {each.parent}" for each in continued} | left

    def begun(self, ended: Collection[str]) -> list[tuple[Params, int]]:
        """Return (configuration, epoch) of the trials that start after an epoch of their parent.

        Args:
            ended: keys of the configurations that have ended: they are left out.
        """
        continued = _with(self.chosen, Outlook.CONTINUED)
        return [(each.params, each.parent.epoch) for each in continued if each.key not in ended]

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

    What the study has decided before stands, unless the options of `continue` have changed. A trial counts if this search
    would train its configuration in the same way: parameters, derived values, data, seeds and trainable are the same, and
    so are the objectives, by which trials are ranked.

    Args:
        space: the search.
        study: its study; None if it does not exist yet.
        database: of the study; None if it does not exist yet. It is only read.
        runs_dir: where checkpoints are.

    Raises:
        StorageError: the database cannot be used.
    """
    if database is None or not space.continuation.is_wanted or space.population is not None:
        return ContinuationPlan(space)
    from storage.continuations import CONTINUATION

    stored = None if study is None else study.attrs.get(CONTINUATION)
    decision = _read_decision(space, stored, runs_dir)
    if decision is None or decision.options != _options_of(space):
        decision = replace(_decide(space, study, database, runs_dir, decision), seen=stored)
    return _follow(space, decision)


def open_continued(
    database: Database, continuation: ContinuationPlan, runs_dir: RunsDir
) -> tuple[Study, ContinuationPlan]:
    """Open the study of a search, and store which trials it continues.

    Returns:
        The study, and what it continues: another plan if another run has made one meanwhile.

    Raises:
        StorageError: the database cannot be used.
    """
    from storage.continuations import settle_continuation
    from storage.studies import open_study

    space, decision = continuation.space, continuation.decision
    study = open_study(database, **space.study_options)
    if decision is None or decision.stored == decision.seen:
        return study, continuation
    settled = settle_continuation(study, decision.seen, decision.stored)
    made = None if settled == decision.stored else _read_decision(space, settled, runs_dir)
    if made is None or made.options != decision.options:
        return study, continuation
    continuation = _follow(space, made)
    return open_study(database, **continuation.space.study_options), continuation  # its number of trials is another one


def _options_of(space: Space) -> dict[str, Any]:
    options = {**space.continuation.model_dump(mode="json"), "is_grid": space.is_grid}
    return options | ({"points_to_evaluate": sorted(space.named_keys)} if space.named_keys else {})


def _decide(
    space: Space, study: Study | None, database: Database, runs_dir: RunsDir, before: Decision | None
) -> Decision:
    """Choose trials by the options of the search.

    Args:
        space: the search.
        study: its study; None if it does not exist yet.
        database: of the study.
        runs_dir: where checkpoints are.
        before: the decision by other options: its trials may be of studies that were renamed or deleted since.
    """
    from storage.studies import other_revisions

    best = find_candidates(space, other_revisions(database, space.name, study), runs_dir)
    for candidate in () if before is None else (*before.chosen, *before.left):
        best.setdefault(candidate.key, candidate)
    options = space.continuation
    ranked = rank_candidates(list(best.values()), space.directions)
    named = set(space.named_keys)
    wanted = [each for each in ranked if each.key in named]
    wanted += [each for each in ranked[: options.count(is_grid=space.is_grid)] if each.key not in named]
    chosen = [
        each
        for each in wanted
        if each.outlook is not Outlook.HORIZON or options.horizon == "restart" or each.key in named
    ]
    keys = {each.key for each in chosen}
    left = [each for each in ranked if each.key not in keys]
    former = [] if before is None else [each for each in (*before.former, *before.chosen) if each.key not in keys]
    return Decision(_options_of(space), chosen, left if space.is_grid else _with(left, Outlook.HORIZON), former)


def _follow(space: Space, decision: Decision) -> ContinuationPlan:
    """Return what a search does by a decision. Its grid may be one with a budget."""
    chosen, left = decision.chosen, decision.left
    if space.is_grid:
        space = space.leaving_out({each.key for each in left})
    if space.is_grid and chosen and space.budget.trials is not None:
        planned = space.point_keys()
        chosen = [each for each in chosen if each.key in planned]
    elif not space.is_grid and space.budget.trials is not None:
        # They count in the budget, and start before all others but the points that are named.
        others = set(space.named_keys) - {each.key for each in chosen}
        chosen = chosen[: max(0, space.budget.trials - len(others))]
    is_empty = decision.seen is None and not decision.chosen and not left
    return ContinuationPlan(space, chosen, left, None if is_empty else decision)


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


def _read_decision(space: Space, stored: Any, runs_dir: RunsDir) -> Decision | None:
    """Return the decision that a study has stored; None if there is none, or if another program has changed it."""
    if not isinstance(stored, Mapping) or not isinstance(stored.get("options"), Mapping):
        return None
    found: dict[str, list[Candidate]] = {}
    index = CheckpointIndex(space, runs_dir)
    for name in ("chosen", "left", "former"):
        entries = stored.get(name, [] if name == "former" else None)
        candidates = (
            [restore_candidate(space, each, index) for each in entries] if isinstance(entries, list) else [None]
        )
        found[name] = [each for each in candidates if each is not None]
        if len(found[name]) < len(candidates):
            return None
    return Decision(stored["options"], found["chosen"], found["left"], found["former"], stored)


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
