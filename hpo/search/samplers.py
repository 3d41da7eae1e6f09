"""Samplers and pruners, built from a space."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hpo.search.population import build_population
from hpo.space.model import Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

    from storage.pruners import Pruner
    from storage.study import Study

OWN_STARTUP_TRIALS = 5  # of TPE, in addition to trials of earlier searches: better than none, by `benchmarks.worth`
TPE_HISTORY = 500  # finished trials that TPE sees; `benchmarks.tpe_history` measures what they cost, and the results


def build_sampler(space: Space, run_id: int, *, taken_over: int = 0) -> BaseSampler:
    """Return the sampler of a space.

    Args:
        space: the search.
        run_id: the run that draws. It is part of the seed, so that two drivers of one study draw different points.
        taken_over: how many trials the study has taken over from earlier ones.
    """
    import optuna
    from optuna import samplers

    base = space.seed if space.sampler.seed is None else space.sampler.seed
    seed = (base * 1_000_003 + run_id) % 2**32
    options = space.sampler.options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match space.sampler.name:
            case "qmc":
                return _build_qmc(space, seed=base, **options)
            case "tpe":
                if space.has_conditions and options.get("multivariate") is not False:
                    options = {"group": True} | options
                # Not more than the sampler sees, or it would draw at random forever. Of Hyperband, it sees one bracket.
                if taken_over and space.scheduler.name != "hyperband":
                    options = {"n_startup_trials": min(taken_over + OWN_STARTUP_TRIALS, TPE_HISTORY)} | options
                return samplers.TPESampler(seed=seed, **options)
            case "gp":
                from hpo.search.gp_sampler import ExtrapolatingGPSampler

                is_allowed = _constraints_of(space) if space.constraints else None
                return ExtrapolatingGPSampler(
                    is_allowed=is_allowed, seed=seed, warn_independent_sampling=False, **options
                )
            case "cmaes":
                from hpo.search.cmaes_sampler import StoredCmaEsSampler

                return StoredCmaEsSampler(seed=seed, warn_independent_sampling=False, **options)
            case "nsga2":
                return samplers.NSGAIISampler(seed=seed, **options)
            case "grid" | "random":
                return samplers.RandomSampler(seed=seed)
            case other:
                raise NotImplementedError(f"sampler {other}")


def _constraints_of(space: Space) -> Callable[[Mapping[str, Any]], bool]:
    """Return a function that says whether a configuration meets the constraints; it may lack parameters with one value."""
    single = {name for name, distribution in space.distributions().items() if distribution.single()}
    known = {name: space.parameters[name].grid_values()[0] for name in single}

    def is_allowed(params: Mapping[str, Any]) -> bool:
        return not space.broken_constraint(known | dict(params))

    return is_allowed


def history_limit(space: Space) -> int | None:
    """Return how many finished trials the space's sampler sees at most, see `storage.history`; None for all.

    Only TPE can do with a part: it needs the best trials, and a sample of the others.
    """
    if space.sampler.name != "tpe":
        return None
    return max(TPE_HISTORY, space.sampler.n_startup_trials or 0)


def _build_qmc(space: Space, **options: Any) -> BaseSampler:
    """Return a sampler of one sequence, which all runs of a study share: storage keeps the position."""
    from optuna.samplers import QMCSampler

    distributions = space.distributions()

    class SpaceQMCSampler(QMCSampler):
        # Optuna learns the search space from earlier trials and draws at random until it sees one. Ours is known before.
        def infer_relative_search_space(self, *_: object) -> dict[str, BaseDistribution]:
            return distributions

    return SpaceQMCSampler(warn_independent_sampling=False, **options)


def build_pruner(space: Space, study: Study) -> Pruner | None:
    """Return the pruner of a space's scheduler; None if it has none.

    Pruners decide from stored values, so a resumed search decides like an uninterrupted one.

    Args:
        space: the search.
        study: its study.
    """
    from storage.promotion import PromotingHalving, StoppingHalving
    from storage.pruners import Median, SuccessiveHalving

    scheduler, maximize = space.scheduler, space.direction == "maximize"
    min_epochs = scheduler.min_epochs(space.max_epochs)
    halving: type[SuccessiveHalving] = SuccessiveHalving
    if space.last_wait:
        halving = PromotingHalving if scheduler.promotes_trials else StoppingHalving
    match scheduler.name:
        case "asha":
            return halving(maximize, study.name, min_epochs, scheduler.reduction_factor)
        case "hyperband":
            return halving.hyperband(
                maximize=maximize,
                study_name=study.bracket_name,
                min_epochs=min_epochs,
                max_epochs=space.max_epochs,
                reduction_factor=scheduler.reduction_factor,
            )
        case "median":
            return Median(maximize, min_epochs)
        case "pbt":
            return build_population(space, study)
        case "none":
            return None
        case other:
            raise NotImplementedError(f"scheduler {other}")


def build_optuna_pruner(space: Space, study: Study) -> BasePruner:
    """Return Optuna's pruner for its samplers: under Hyperband, they learn from the trials of a bracket only.

    Raises:
        StorageError: the database cannot be used (after retries).
    """
    from optuna import pruners
    from optuna.trial import TrialState, create_trial

    from storage.errors import retry_while_down

    if space.scheduler.name != "hyperband":
        return pruners.NopPruner()
    pruner = pruners.HyperbandPruner(
        min_resource=space.scheduler.min_epochs(space.max_epochs),
        max_resource=space.max_epochs,
        reduction_factor=space.scheduler.reduction_factor,
    )
    trial = create_trial(state=TrialState.RUNNING)
    # Optuna creates the brackets in the first call, and reads the study for it.
    retry_while_down(study.database, lambda: pruner.prune(study.optuna_study, trial))
    return pruner
