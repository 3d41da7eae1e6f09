"""A driver's run on a study, set up as the search space says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from hpo.search.samplers import build_optuna_pruner, build_pruner, build_sampler, history_limit

if TYPE_CHECKING:
    from hpo.search.earlier.continuation import ContinuationPlan
    from hpo.space.model import Space
    from storage.run import Run
    from storage.study import Study

MAX_LISTED_POINTS = 10_000  # of a space that is not a grid; a list of more would take too long


@contextmanager
def open_run(continuation: ContinuationPlan, study: Study, provenance: Mapping[str, Any]) -> Iterator[Run]:
    """Start a run that claims trials by the space's sampler and ends them by its scheduler.

    Args:
        continuation: the search, and which trials of earlier revisions it continues.
        study: its study.
        provenance: versions and command of the run, for the record.

    Raises:
        StorageError: the database cannot be used (after retries).
    """
    from storage.imports import count_imported

    space = continuation.space
    study.optuna_study.pruner = build_optuna_pruner(space, study)
    with build_run(space, study, provenance) as run:
        run.enqueue(continuation.first_points(), space.distributions(), continuation.attrs)
        if not space.is_grid:
            study.optuna_study.sampler = build_sampler(space, run.run_id, taken_over=count_imported(study))
        yield run


def build_run(space: Space, study: Study, provenance: Mapping[str, Any]) -> Run:
    """Return a run with the settings of a space, which has not started; see `open_run`."""
    from storage.run import Run

    return Run(
        study,
        config_key=space.config_key,
        provenance=provenance,
        draw=None if space.is_grid else space.draw,
        list_points=partial(space.list_points, MAX_LISTED_POINTS),
        max_trials=space.budget.trials if space.population is None else space.population,
        learns=space.learns_from_results,
        history_limit=history_limit(space),
        pruner=build_pruner(space, study),
        max_failures=space.max_failures,
        takes_turns=space.population is not None,
    )
