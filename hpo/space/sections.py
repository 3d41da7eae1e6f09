"""The sections of a search space beside its parameters: sampler, scheduler, data, budget, resources.

A sampler's keys are the arguments of Optuna's own sampler of that name, with Optuna's defaults.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, PositiveInt

from hpo.space.parameters import Strict

Probability = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no more

# --- samplers -----------------------------------------------------------------------------------------------------


class _Sampler(Strict):
    name: str
    """Which points are tried."""
    seed: Seed | None = None
    """Of the draws; without it, the space's own seed."""

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of Optuna's sampler, but for the seed."""
        return self.model_dump(exclude={"name", "seed"}, exclude_none=True)


class GridSampler(_Sampler):
    """Every combination of the values."""

    name: Literal["grid"]
    """Every combination of the values."""


class RandomSampler(_Sampler):
    """Independent draws."""

    name: Literal["random"]
    """Independent draws."""


class QMCSampler(_Sampler):
    """Draws that cover the space more evenly than random ones."""

    name: Literal["qmc"]
    """Draws that cover the space more evenly than random ones (quasi-Monte Carlo)."""
    qmc_type: Literal["sobol", "halton"] = "sobol"
    """The sequence."""
    scramble: bool = True
    """Whether the sequence is randomized by the seed."""


class TPESampler(_Sampler):
    """Bayesian optimization by Parzen estimators; the choice where you have none."""

    name: Literal["tpe"]
    """Bayesian optimization by Parzen estimators; the choice where you have none."""
    n_startup_trials: Annotated[int, Field(ge=0)] = 10
    """Random draws before it starts to learn."""
    n_ei_candidates: PositiveInt = 24
    """Candidates from which each draw is chosen."""
    multivariate: bool | None = None
    """Whether parameters are drawn jointly; without it, Optuna decides."""
    group: bool | None = None
    """Whether parameters that are active together are drawn jointly; without it, only where a parameter has `when`."""
    constant_liar: bool = True
    """Whether running trials keep others away from their points."""


class GPSampler(_Sampler):
    """Bayesian optimization by a Gaussian process; for few and dear trials. It learns from completed trials alone."""

    name: Literal["gp"]
    """Bayesian optimization by a Gaussian process; for few and dear trials. It learns from completed trials alone."""
    n_startup_trials: Annotated[int, Field(ge=0)] = 10
    """Random draws before it starts to learn."""
    deterministic_objective: bool = False
    """Whether the same parameters always give the same value."""


class CmaEsSampler(_Sampler):
    """Evolution of a normal distribution, for int and float ranges; choices are drawn at random beside it."""

    name: Literal["cmaes"]
    """Evolution of a normal distribution, for int and float ranges; choices are drawn at random beside it."""
    n_startup_trials: Annotated[int, Field(ge=0)] = 1
    """Random draws before it starts to learn."""
    popsize: Annotated[int, Field(ge=5)] | None = None
    """Trials of a generation; without it, by the number of parameters."""
    consider_pruned_trials: bool = False
    """Whether it also learns from trials that the scheduler stopped."""
    with_margin: bool = False
    """Whether integers and steps are kept from getting stuck on one value."""


class NSGAIISampler(_Sampler):
    """A genetic algorithm."""

    name: Literal["nsga2"]
    """A genetic algorithm."""
    population_size: Annotated[int, Field(ge=2)] = 50
    """Trials of a generation."""
    mutation_prob: Probability | None = None
    """How likely a parameter mutates; without it, 1 / number of parameters."""
    crossover_prob: Probability = 0.9
    """How likely a child has two parents."""
    swapping_prob: Probability = 0.5
    """How likely a parameter is taken from the second parent."""


Sampler = Annotated[
    GridSampler | RandomSampler | QMCSampler | TPESampler | GPSampler | CmaEsSampler | NSGAIISampler,
    Discriminator("name"),
]


def _named(raw: object) -> object:
    """Let `tpe` stand for `{name: tpe}`."""
    return {"name": raw} if isinstance(raw, str) else raw


_SamplerName = Literal["grid", "random", "qmc", "tpe", "gp", "cmaes", "nsga2"]
NamedSampler = Annotated[Sampler, BeforeValidator(_named, json_schema_input_type=_SamplerName | Sampler)]

# --- the scheduler ------------------------------------------------------------------------------------------------

_SchedulerName = Literal["none", "asha", "hyperband", "median", "pbt"]


class Scheduler(Strict):
    """Which trials are stopped early. Epochs are the resource."""

    name: _SchedulerName = "none"
    """none, asha (successive halving), hyperband, median; pbt is not built yet."""
    grace_period: PositiveInt = 1
    """Epochs that each trial gets."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """asha and hyperband: one in so many trials goes on to so many times the epochs."""


NamedScheduler = Annotated[Scheduler, BeforeValidator(_named, json_schema_input_type=_SchedulerName | Scheduler)]

# --- what it is trained on, and until when ------------------------------------------------------------------------


class Data(Strict):
    """Which images are trained and validated on; `hpo.train.data` knows the data sets."""

    dataset: str = "fashion_mnist"
    """The data set's name."""
    train_samples: Annotated[int, Field(ge=2)] | None = None  # batch norm cannot train on one
    """How many images are trained on; null for all."""
    val_samples: PositiveInt = 5000
    """How many images, held out of the training set, are validated on."""


_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", re.ASCII)


def _seconds(raw: object) -> object:
    if not isinstance(raw, str):
        return raw
    match = _DURATION.fullmatch(raw)
    if not raw or match is None or len(raw) > 40:
        raise ValueError(f"a duration is written like 90s, 30m, 4h or 1d12h, got {raw[:40]!r}")
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


Seconds = Annotated[
    float,
    Field(gt=0, allow_inf_nan=False),
    BeforeValidator(
        _seconds,
        json_schema_input_type=Annotated[float, Field(gt=0)]
        | Annotated[str, Field(pattern=r"^(?=.)(\d+d)?(\d+h)?(\d+m)?(\d+s)?$")],
    ),
]


class Budget(Strict):
    """Where the search ends."""

    trials: PositiveInt | None = None
    """Number of trials."""
    time: Seconds | None = None
    """Wall-clock time that the study has been run, over all its runs: 90s, 30m, 4h, 1d12h, or seconds."""
    gpu_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """GPU-hours; not built yet."""


class Resources(Strict):
    """What one trial takes. auto: one GPU where there are GPUs, else an equal share of the cores."""

    cpu: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = "auto"
    """Cores of a trial."""
    gpu: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = "auto"
    """GPUs of a trial; 0.5 lets two trials share one."""


class Objective(Strict):
    """One of several objectives; not built yet."""

    metric: str
    """The metric's name."""
    direction: Literal["maximize", "minimize"] = "maximize"
    """Whether more is better."""
