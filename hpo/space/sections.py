"""The sections of a search space other than its parameters: sampler, scheduler, data, budget, resources, checkpoints.

A sampler's keys are the arguments of the Optuna sampler with that name. They have Optuna's defaults, except that qmc
scrambles its sequence. Properties say what a sampler or a scheduler can do, so that
no other module compares names.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, PositiveInt, model_validator

from hpo.space.messages import InvalidValuesError
from hpo.space.parameters import StrictModel
from hpo.space.shares import BestN, check_share, count_share

Probability = Annotated[float, Field(ge=0, le=1)]
MAX_SEED = 2**32 - 1  # numpy's limit
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]

# --- samplers -----------------------------------------------------------------------------------------------------


class _Sampler(StrictModel):
    is_grid: ClassVar[bool] = False  # tries a finite list of configurations
    learns: ClassVar[bool] = False  # the next configuration depends on earlier results
    allows_conditions: ClassVar[bool] = True  # can leave out inactive parameters
    allows_objectives: ClassVar[bool] = True  # can search for several objectives
    needs_range: ClassVar[bool] = False  # needs an int or float range with more than one value

    name: str
    """The algorithm that chooses the configurations."""
    seed: Seed | None = None
    """The seed of the sampler; null means the seed of the space."""

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of Optuna's sampler, except for the seed."""
        return self.model_dump(exclude={"name", "seed"}, exclude_none=True)


class AutoSampler(_Sampler):
    """The sampler that suits the parameters, the budget and the scheduler; the search says which one, and why."""

    name: Literal["auto"]
    """The sampler that suits the parameters, the budget and the scheduler; the search says which one, and why."""


class GridSampler(_Sampler):
    """Every combination of the values."""

    is_grid = True

    name: Literal["grid"]
    """Every combination of the values."""


class RandomSampler(_Sampler):
    """Independent random values."""

    name: Literal["random"]
    """Independent random values."""


class QMCSampler(_Sampler):
    """A quasi-Monte Carlo sequence, which covers the space more evenly than random values."""

    allows_conditions = False

    name: Literal["qmc"]
    """A quasi-Monte Carlo sequence, which covers the space more evenly than random values."""
    qmc_type: Literal["sobol", "halton"] = "sobol"
    """The sequence."""
    scramble: bool = True
    """Whether the seed randomizes the sequence."""


class TPESampler(_Sampler):
    """Bayesian optimization with tree-structured Parzen estimators; a good first choice."""

    learns = True

    name: Literal["tpe"]
    """Bayesian optimization with tree-structured Parzen estimators; a good first choice."""
    n_startup_trials: Annotated[int, Field(ge=0)] | None = None
    """Random trials before the sampler learns; null means 10, or 5 in addition to the trials of earlier searches."""
    n_ei_candidates: PositiveInt = 24
    """Candidates from which each value is chosen."""
    multivariate: bool | None = None
    """Whether parameters are sampled jointly; null leaves it to Optuna."""
    group: bool | None = None
    """Whether parameters that are active together are sampled jointly; null means only where a parameter has `when`."""
    constant_liar: bool = True
    """Whether the sampler avoids the configurations of running trials."""

    @model_validator(mode="after")
    def _check(self) -> TPESampler:
        if self.group and self.multivariate is False:
            text = "group needs multivariate sampling: leave multivariate out, or set it to true"
            raise InvalidValuesError((("group",), text))
        return self


class GPSampler(_Sampler):
    """Bayesian optimization with a Gaussian process, for few and expensive trials. It learns from stopped trials, too."""

    learns = True
    allows_conditions = False

    name: Literal["gp"]
    """Bayesian optimization with a Gaussian process, for few and expensive trials. It learns from stopped trials, too."""
    n_startup_trials: Annotated[int, Field(ge=0)] = 10
    """Random trials before the sampler learns."""
    deterministic_objective: bool = False
    """Whether the same parameters always give the same value."""


class CmaEsSampler(_Sampler):
    """CMA-ES, an evolution strategy for int and float ranges. Choices are sampled at random."""

    learns = True
    allows_conditions = False
    allows_objectives = False
    needs_range = True

    name: Literal["cmaes"]
    """CMA-ES, an evolution strategy for int and float ranges. Choices are sampled at random."""
    n_startup_trials: Annotated[int, Field(ge=0)] = 1
    """Random trials before the sampler learns."""
    popsize: Annotated[int, Field(ge=5)] | None = None
    """Trials in a generation; null derives it from the number of parameters."""
    consider_pruned_trials: bool = False
    """Whether the sampler also learns from pruned trials."""
    with_margin: bool = False
    """Whether integers and steps get a margin, which keeps them from converging to one value too early."""


class NSGAIISampler(_Sampler):
    """NSGA-II, a genetic algorithm."""

    learns = True

    name: Literal["nsga2"]
    """NSGA-II, a genetic algorithm."""
    population_size: Annotated[int, Field(ge=2)] = 50
    """Trials in a generation."""
    mutation_prob: Probability | None = None
    """The probability that a parameter mutates; null means 1 / number of parameters."""
    crossover_prob: Probability = 0.9
    """The probability that a child has two parents."""
    swapping_prob: Probability = 0.5
    """The probability that a child takes a parameter from its second parent."""


Sampler = Annotated[
    AutoSampler | GridSampler | RandomSampler | QMCSampler | TPESampler | GPSampler | CmaEsSampler | NSGAIISampler,
    Discriminator("name"),
]


def _expand_name(raw: object) -> object:
    """Accept `tpe` for `{name: tpe}`."""
    return {"name": raw} if isinstance(raw, str) else raw


_SamplerName = Literal["auto", "grid", "random", "qmc", "tpe", "gp", "cmaes", "nsga2"]
NamedSampler = Annotated[Sampler, BeforeValidator(_expand_name, json_schema_input_type=_SamplerName | Sampler)]

# --- the scheduler ------------------------------------------------------------------------------------------------

_SchedulerName = Literal["none", "asha", "hyperband", "median", "pbt"]
_HALVING = {"asha", "hyperband"}
_OF_HALVING = {"grace_period", "reduction_factor", "mode"}
_OF_PBT = {"population", "interval", "quantile", "resample", "factor", "explore"}
MAX_POPULATION = 1000


class Scheduler(StrictModel):
    """The algorithm that stops trials early. Its resource is the epoch."""

    name: _SchedulerName = "none"
    """none, asha (successive halving), hyperband, median or pbt (population-based training)."""
    grace_period: Literal["auto"] | PositiveInt = "auto"
    """Epochs before a trial may be stopped. auto: max_epochs / reduction_factor**2, rounded up."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """asha and hyperband: 1 of `reduction_factor` trials continues, with `reduction_factor` times the epochs."""
    mode: Literal["stop", "promote"] = "stop"
    """asha and hyperband: what happens to the other trials. stop: they end, but where one trial trains at a time, the first
    ones wait until there are `reduction_factor` to compare. promote: they wait, and train on from their checkpoint when they
    are among the best of all that came after them."""
    population: Annotated[int, Field(ge=2, le=MAX_POPULATION)] = 8
    """pbt: how many members the population has."""
    interval: PositiveInt = 5
    """pbt: epochs between two comparisons of a member with the others."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """pbt: the share of the members that are replaced, and the share of those that replace them."""
    resample: Probability = 0.25
    """pbt: the probability that a hyperparameter is drawn again where a member is replaced. Otherwise a number is multiplied
    or divided by `factor`, and a choice is kept."""
    factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 1.2
    """pbt: by what a number is multiplied or divided."""
    explore: Annotated[list[str], Field(min_length=1)] | None = None
    """pbt: the hyperparameters that change while a member trains. null: with the built-in training, all that may; else all
    int and float ranges."""

    def min_epochs(self, max_epochs: int) -> int:
        """Return the epochs before a trial may be stopped.

        By default, trials are compared twice before their last epoch. More comparisons stop good trials that start slowly:
        measured by `benchmarks.worth`.
        """
        return math.ceil(max_epochs / self.reduction_factor**2) if self.grace_period == "auto" else self.grace_period

    @property
    def stops_trials_early(self) -> bool:
        """Whether the scheduler may stop a trial before its last epoch."""
        return self.name != "none"

    @property
    def halves(self) -> bool:
        """Whether the scheduler is a form of successive halving."""
        return self.name in _HALVING

    @property
    def promotes_trials(self) -> bool:
        """Whether trials wait that are not among the best, instead of ending."""
        return self.mode == "promote"

    @property
    def replaces_trials(self) -> bool:
        """Whether each trial that the scheduler stops is replaced by one that continues another trial."""
        return self.name == "pbt"

    @property
    def unused_options(self) -> set[str]:
        """The options that have no effect."""
        by_name = {
            **dict.fromkeys(_HALVING, _OF_HALVING),
            "median": {"grace_period"},
            "none": _OF_HALVING,
            "pbt": _OF_PBT,
        }
        return (_OF_HALVING | _OF_PBT) - by_name[self.name]


NamedScheduler = Annotated[Scheduler, BeforeValidator(_expand_name, json_schema_input_type=_SchedulerName | Scheduler)]

# --- data, budget, resources, checkpoints -------------------------------------------------------------------------


class Data(StrictModel):
    """The images for training and validation. The data sets are defined in `hpo.train.data`."""

    dataset: str = "fashion_mnist"
    """The name of the data set."""
    train_samples: Annotated[int, Field(ge=2)] | None = None  # batch norm cannot train on one image
    """Images for training; null means all."""
    val_samples: Annotated[int, Field(ge=0)] = 5000
    """Images held out of the training set for validation. With 0 there are no val_ metrics."""


_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", re.ASCII)


def parse_duration(raw: object) -> object:
    """Return the seconds of a text such as `1h30m`; anything else unchanged.

    Raises:
        ValueError: the text is no duration.
    """
    if not isinstance(raw, str):
        return raw
    match = _DURATION.fullmatch(raw)
    if not raw or match is None or len(raw) > 40:
        raise ValueError(f"write a duration like 90s, 30m, 4h or 1d12h, got {raw[:40]!r}")
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


Seconds = Annotated[
    float,
    Field(gt=0, allow_inf_nan=False),
    BeforeValidator(
        parse_duration,
        json_schema_input_type=Annotated[float, Field(gt=0)]
        | Annotated[str, Field(pattern=r"^(?=.)(\d+d)?(\d+h)?(\d+m)?(\d+s)?$")],
    ),
]


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Cost(StrictModel):
    """What device time costs, in any currency."""

    example: ClassVar[str] = "{gpu_hour: 2.5, limit: 20}"

    gpu_hour: Positive
    """The price of a device-hour: one GPU for an hour, or one trial on the CPU."""
    limit: Positive | None = None
    """What the study may cost, summed over its runs; null only shows the cost."""

    def of(self, device_seconds: float) -> float:
        """Return the price of device time."""
        return self.gpu_hour * device_seconds / 3600


def _refuse_text(raw: object) -> object:
    if not isinstance(raw, str):
        return raw
    raise ValueError(f"write a number of hours, such as 8 or 0.5, got {raw[:40]!r}")


class Budget(StrictModel):
    """The limits at which the search ends."""

    trials: PositiveInt | None = None
    """Number of trials."""
    time: Seconds | None = None
    """Wall-clock time of the study, summed over its runs: 90s, 30m, 4h, 1d12h, or seconds."""
    patience: PositiveInt | None = None
    """Number of trials that end one after another without a better value; with several objectives, without a new trial on
    the Pareto front."""
    gpu_hours: Annotated[Positive | None, BeforeValidator(_refuse_text)] = None
    """Device-hours that the trials of the study use, summed over its runs: of GPUs, or of trials on the CPU."""
    cost: Cost | None = None
    """What device time costs, and what the study may cost."""

    @property
    def ends_search(self) -> bool:
        """Whether there is any limit."""
        return self.limits_device_time or any(each is not None for each in (self.trials, self.time, self.patience))

    @property
    def limits_device_time(self) -> bool:
        """Whether device time ends the search."""
        return self.device_seconds < math.inf

    @property
    def shows_device_time(self) -> bool:
        """Whether the user wants to know what was used: there is a limit, or a price."""
        return self.limits_device_time or self.cost is not None

    @property
    def device_seconds(self) -> float:
        """The device-seconds after which the search ends, at the first of its limits; infinite without one."""
        by_cost = math.inf if self.cost is None or self.cost.limit is None else self.cost.limit / self.cost.gpu_hour
        return 3600 * min(math.inf if self.gpu_hours is None else self.gpu_hours, by_cost)


class Resources(StrictModel):
    """The resources of one trial. auto means one GPU where there are GPUs, otherwise an equal share of the cores."""

    cpu: Positive | Literal["auto"] = "auto"
    """CPU cores for each trial."""
    gpu: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = "auto"
    """GPUs for each trial; with 0.5, two trials share a GPU. auto measures how many trials can share one."""


def _check_keep(raw: object) -> object:
    if isinstance(raw, int) and not isinstance(raw, bool) and raw >= 1:
        return raw
    return check_share(raw, ["all", "none"], "best 3", "all, none, best N (such as best 3) or a number above 0")


Keep = Annotated[
    int | str,
    BeforeValidator(
        _check_keep,
        json_schema_input_type=Literal["all", "none"] | BestN | PositiveInt,
    ),
]


class Checkpoints(StrictModel):
    """Which trials keep their checkpoints after they have ended. Unfinished and failed trials always keep theirs."""

    keep: Keep = "best 3"
    """best N: the N best trials that completed; with several objectives, those on the Pareto front first. A number N: the N
    that completed last. none, or all: pruned ones too."""

    @property
    def count(self) -> int | None:
        """How many trials that completed keep their checkpoints; None for all, pruned ones too."""
        if isinstance(self.keep, int):
            return self.keep
        return count_share(self.keep)

    @property
    def keeps_best(self) -> bool:
        """Whether the best trials keep their checkpoints, not the last ones."""
        return isinstance(self.keep, str)

    @property
    def description(self) -> str:
        """Which trials keep their checkpoints, as in `the checkpoints of the best 3 trials`."""
        if self.count is None:
            return "all trials"
        if self.count == 0:
            return "no trial that has completed"
        which = "best" if self.keeps_best else "last"
        if self.count == 1:
            return f"the {which} trial"
        return f"the {which} {self.count} trials"


def _expand_study(raw: object) -> object:
    """Accept `grid` for `{study: grid}`."""
    return {"study": raw} if isinstance(raw, str) else raw


def _check_trials(raw: object) -> object:
    return check_share(raw, ["all"], "best 20", "all or best N (such as best 20)")


Difference = Literal["data", "max_epochs", "metric", "trainable"]


class Source(StrictModel):
    """An earlier study to learn from."""

    example: ClassVar[str] = "the name of a study, or {study: grid, trials: best 20}"

    study: Annotated[str, Field(min_length=1)]
    """The name of the study. grid means its latest revision, grid@1 the first one."""
    storage: str | None = None
    """The URL of the database that has the study, without a password; by default, the database of this search."""
    trials: Annotated[
        str,
        BeforeValidator(
            _check_trials,
            json_schema_input_type=Literal["all"] | BestN,
        ),
    ] = "all"
    """all, or best N: only the N best trials that completed."""
    despite: Annotated[list[Difference], Field(default_factory=list)]
    """What may differ: data, max_epochs, metric or trainable. Otherwise, trials whose values cannot be compared with those
    of this search are left out."""

    @property
    def count(self) -> int | None:
        """How many of the best trials are taken; None for all."""
        return count_share(self.trials)


NamedSource = Annotated[
    Source, BeforeValidator(_expand_study, json_schema_input_type=Annotated[str, Field(min_length=1)] | Source)
]
