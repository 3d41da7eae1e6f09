"""Population-based training of a search space: which hyperparameters change, and what replaces a member.

`storage.population` decides who is replaced, in the database. Here is what it needs of the search space.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hpo.errors import SpaceError
from hpo.search.checkpoints.files import owner_key
from hpo.space.exploration import explore
from hpo.space.model import Space
from hpo.space.parameters import FloatRange, IntRange, Params, Scalar, sampling_order

if TYPE_CHECKING:
    from storage.population import Child, Member, PopulationBased
    from storage.study import Study

MAX_TRIES = 100  # to find hyperparameters that meet the constraints; then those of the better member are kept


def trial_key(space: Space, params: Mapping[str, Scalar], replaces: object) -> str:
    """Return the identity of a trial: its configuration, and for a successor in a population, whose place it took.

    The configuration of a successor says how it trains from now on, not how it was trained: another trial may have the same.

    Args:
        space: the search.
        params: the hyperparameters of the trial.
        replaces: its user attribute `replaces`; None without one.
    """
    key = space.config_key(params)
    if replaces is None:
        return key
    text = json.dumps([key, replaces], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def owner_of(space: Space, params: Mapping[str, Scalar], attrs: Mapping[str, Any]) -> str:
    """Return whose the folder of a trial is, see `owner_key`.

    Args:
        space: the search.
        params: the hyperparameters of the trial.
        attrs: its user attributes.
    """
    from storage.records import REPLACES, attempt_of

    return owner_key(trial_key(space, params, attrs.get(REPLACES)), attempt_of(attrs))


def explored_names(space: Space) -> list[str]:
    """Return the hyperparameters of a space that change while a member of its population trains.

    Raises:
        SpaceError: there are none, or one that is named cannot change; with file and line.
    """
    parameters = {name: each for name, each in space.parameters.items() if each.count != 1}
    fixed = _fixed_names(space)
    for i, name in enumerate(space.scheduler.explore or ()):
        if name in fixed:
            with space.locating_errors("scheduler", "explore", i):
                raise SpaceError(
                    f"{name} cannot change while hpo.train:train trains; what can: {_list(parameters.keys() - fixed)}"
                )
    if space.scheduler.explore is not None:
        return list(space.scheduler.explore)
    if space.is_default_trainable:
        names = [name for name in parameters if name not in fixed]
    else:
        names = [name for name, each in parameters.items() if isinstance(each, IntRange | FloatRange)]
    if not names:
        with space.locating_errors("scheduler"):
            what = f"but {_list(fixed & parameters.keys())}" if space.is_default_trainable else "that is a range"
            raise SpaceError(
                f"pbt changes hyperparameters while a trial trains, and there is none {what}: add a range, or use scheduler "
                "asha, hyperband or median"
            )
    return names


def _fixed_names(space: Space) -> frozenset[str]:
    """Return the hyperparameters that a checkpoint of the built-in training does not allow to change."""
    if not space.is_default_trainable:
        return frozenset()
    from hpo.train.params import CHECKPOINT_PARAMS

    return frozenset(CHECKPOINT_PARAMS)


def _list(names: object) -> str:
    return ", ".join(sorted(names)) or "none"  # type: ignore[call-overload]


def explore_params(space: Space, params: Params, rng: random.Random) -> Params:
    """Return hyperparameters near those of a member, which meet the constraints.

    Those of the member are returned if none are found.
    """
    names, fixed = explored_names(space), _fixed_names(space)
    ordered = {name: space.parameters[name] for name in sampling_order(space.parameters)}
    kept = _values(space, params, fixed)
    for _ in range(MAX_TRIES):
        explored = explore(
            ordered, params, names, resample=space.scheduler.resample, factor=space.scheduler.factor, rng=rng
        )
        if not space.broken_constraint(explored) and _values(space, explored, fixed) == kept:
            return explored
    return dict(params)


def _values(space: Space, params: Params, names: frozenset[str]) -> dict[str, Scalar]:
    """Return those of these values that a configuration has, derived ones too."""
    return {name: value for name, value in (params | space.derive(params)).items() if name in names}


def build_population(space: Space, study: Study) -> PopulationBased:
    """Return what replaces the members of a space's population.

    Args:
        space: the search.
        study: its study, which has the parents of the successors.
    """
    from storage.parents import Parent
    from storage.population import Child, PopulationBased
    from storage.records import CONTINUED_FROM

    distributions = space.distributions()

    def breed(replaces: Mapping[str, Any], better: Member, epoch: int, rng: random.Random) -> Child:
        params = explore_params(space, better.params, rng)
        parent = Parent(
            study=study.name,
            number=better.number,
            identity=study.identity or "",
            epoch=epoch,
            files=study.unique_name,
            key=owner_key(better.key, better.attempt),
        )
        return Child(
            trial_key(space, params, replaces),
            params,
            {name: distributions[name] for name in params},
            {CONTINUED_FROM: parent.attribute},
        )

    scheduler, sampler = space.scheduler, space.sampler
    return PopulationBased(
        maximize=space.direction == "maximize",
        interval=scheduler.interval,
        quantile=scheduler.quantile,
        seed=space.seed if sampler.seed is None else sampler.seed,
        breed=breed,
    )
