"""The parameters of a search space: a scalar is fixed, a list is choices, a mapping is a range or conditional choices.

A parameter with `when` is active only if other parameters have certain values. An inactive parameter is absent from the
trial and from the grid. Parameters are sampled in topological order: each follows the parameters that it depends on.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    model_validator,
)

from hpo.space.expressions import topological_order
from hpo.space.messages import InvalidValuesError, fields_by_key

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

MAX_EXACT_INT = 2**53  # Optuna stores every number as a float

Scalar = int | float | str | bool | None
Params = dict[str, Scalar]


class StrictModel(BaseModel):
    """A section of a search space: frozen, without unknown keys, without type conversions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, serialize_by_alias=True
    )

    @model_validator(mode="before")
    @classmethod
    def _read_nulls(cls, data: Any) -> Any:
        return without_nulls(cls, data) if isinstance(data, Mapping) else data


def without_nulls(model: type[BaseModel], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a section without those that are null and have another default: null means that it counts."""
    fields = fields_by_key(model)

    def has_default(key: str) -> bool:
        return key in fields and not fields[key].is_required() and fields[key].default is not None

    return {key: value for key, value in data.items() if value is not None or not has_default(key)}


def _finite(value: Scalar) -> Scalar:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a value must be finite, got {value}")
    return value


def is_same(one: Scalar, other: Scalar) -> bool:
    """Return whether two values are the same to the user: 1 is 1.0, but true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


class Fixed(StrictModel):
    """A parameter with one value."""

    value: Annotated[Scalar, AfterValidator(_finite)]
    """The value."""

    @property
    def when(self) -> None:
        """None: a fixed parameter is always active."""

    def distribution(self) -> BaseDistribution:
        """Return a categorical distribution with one value, so that storage and the dashboard show the parameter."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution([self.value])

    def suggest(self, trial: optuna.Trial, name: str) -> Scalar:
        """Return the value that Optuna suggests for a trial."""
        return trial.suggest_categorical(name, [self.value])

    def sample(self, rng: random.Random) -> Scalar:
        """Return a random value."""
        return self.value

    @property
    def count(self) -> int:
        """The number of values in a grid."""
        return 1

    def grid_values(self) -> Sequence[Scalar]:
        """Return the values in a grid."""
        return [self.value]

    def contains(self, value: Scalar) -> bool:
        """Return whether a value is one of this parameter's values."""
        return is_same(value, self.value)


def _distinct(choices: list[Scalar]) -> list[Scalar]:
    seen: dict[Scalar, Scalar] = {}
    for choice in map(_finite, choices):
        if choice in seen:  # Optuna does not distinguish 1, 1.0 and true
            raise ValueError(f"the choices {seen[choice]!r} and {choice!r} are the same")
        seen[choice] = choice
    return choices


When = Annotated[dict[str, Scalar | Annotated[list[Scalar], Field(min_length=1)]], Field(min_length=1)] | None


class Choices(StrictModel):
    """A parameter with a list of values."""

    type: Literal["categorical"] = "categorical"
    """One of a list of values."""
    choices: Annotated[list[Scalar], Field(min_length=1), AfterValidator(_distinct)]
    """The values."""
    when: When = None
    """When the parameter is active: other parameters and their values, such as `{optimizer: sgd}`. A list means any of its
    values."""
    default: Scalar = None
    """The value that trials used implicitly before this parameter was added: those of earlier studies are taken over with
    it. Also that of points_to_evaluate that leave the parameter out."""

    @model_validator(mode="after")
    def _check(self) -> Choices:
        if "default" in self.model_fields_set and not self.contains(self.default):
            raise InvalidValuesError((("default",), f"{self.default!r} is none of the choices {self.choices!r}"))
        return self

    def distribution(self) -> BaseDistribution:
        """Return the Optuna distribution."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.choices)

    def suggest(self, trial: optuna.Trial, name: str) -> Scalar:
        """Return the value that Optuna suggests for a trial."""
        return trial.suggest_categorical(name, self.choices)

    def sample(self, rng: random.Random) -> Scalar:
        """Return a random value."""
        return rng.choice(self.choices)

    @property
    def count(self) -> int:
        """The number of values in a grid."""
        return len(self.choices)

    def grid_values(self) -> Sequence[Scalar]:
        """Return the choices in the order of the file."""
        return self.choices

    def contains(self, value: Scalar) -> bool:
        """Return whether a value is one of this parameter's values."""
        return any(is_same(value, choice) for choice in self.choices)


MAX_GP_VALUES = 1_000_000  # of a range with steps: Optuna's Gaussian process keeps all of them in memory
_ExactInt = Annotated[int, Field(ge=-MAX_EXACT_INT, le=MAX_EXACT_INT)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class IntRange(StrictModel):
    """An integer from low to high, both included."""

    type: Literal["int"]
    """An integer from low to high, both included."""
    low: _ExactInt
    """The lowest value."""
    high: _ExactInt
    """The highest value."""
    log: bool = False
    """Whether values are sampled on a logarithmic scale."""
    step: PositiveInt = 1
    """The distance between two values."""
    when: When = None
    """When the parameter is active: other parameters and their values, such as `{optimizer: sgd}`. A list means any of its
    values."""
    default: _ExactInt | None = None
    """The value that trials used implicitly before this parameter was added: those of earlier studies are taken over with
    it. Also that of points_to_evaluate that leave the parameter out."""

    @model_validator(mode="after")
    def _check(self) -> IntRange:
        _check_range(self.low, self.high, self.log, None if self.step == 1 else self.step)
        _check_default(self, self.default)
        return self

    def distribution(self) -> BaseDistribution:
        """Return the Optuna distribution."""
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self.high, log=self.log, step=self.step)

    def suggest(self, trial: optuna.Trial, name: str) -> Scalar:
        """Return the value that Optuna suggests for a trial."""
        return trial.suggest_int(name, self.low, self.high, log=self.log, step=self.step)

    def sample(self, rng: random.Random) -> Scalar:
        """Return a random value."""
        if self.log:
            drawn = round(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
            return min(self.high, max(self.low, drawn))
        return self.low + self.step * rng.randrange(self.count)

    @property
    def count(self) -> int:
        """The number of values in a grid."""
        return (self.high - self.low) // self.step + 1

    def grid_values(self) -> range:
        """Return every value of the range."""
        return range(self.low, self.high + 1, self.step)

    def contains(self, value: Scalar) -> bool:
        """Return whether a value is one of this parameter's values."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if isinstance(value, float) and not value.is_integer():
            return False
        return int(value) in self.grid_values()


class FloatRange(StrictModel):
    """A floating-point number from low to high, both included."""

    type: Literal["float"]
    """A floating-point number from low to high, both included."""
    low: _Finite
    """The lowest value."""
    high: _Finite
    """The highest value."""
    log: bool = False
    """Whether values are sampled on a logarithmic scale."""
    step: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The distance between two values; null means a continuous range."""
    when: When = None
    """When the parameter is active: other parameters and their values, such as `{optimizer: sgd}`. A list means any of its
    values."""
    default: _Finite | None = None
    """The value that trials used implicitly before this parameter was added: those of earlier studies are taken over with
    it. Also that of points_to_evaluate that leave the parameter out."""

    @model_validator(mode="after")
    def _check(self) -> FloatRange:
        _check_range(self.low, self.high, self.log, self.step)
        _check_default(self, self.default)
        return self

    def distribution(self) -> BaseDistribution:
        """Return the Optuna distribution."""
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def suggest(self, trial: optuna.Trial, name: str) -> Scalar:
        """Return the value that Optuna suggests for a trial."""
        return trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)

    def sample(self, rng: random.Random) -> Scalar:
        """Return a random value."""
        if self.log:
            return min(self.high, max(self.low, math.exp(rng.uniform(math.log(self.low), math.log(self.high)))))
        if self.step is not None and self.count is not None:
            return min(self.high, self.low + self.step * rng.randrange(self.count))
        return rng.uniform(self.low, self.high)

    @property
    def count(self) -> int | None:
        """The number of values in a grid; None for a continuous range."""
        if self.low == self.high:
            return 1
        return None if self.step is None else round((self.high - self.low) / self.step) + 1

    def grid_values(self) -> Sequence[Scalar]:
        """Return every value of a range with a step; the two ends of a continuous range."""
        if self.count is None:
            return [self.low, self.high]
        return [min(self.high, self.low + i * (self.step or 0.0)) for i in range(self.count)]

    def contains(self, value: Scalar) -> bool:
        """Return whether a value is one of this parameter's values."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        return self.step is None or _is_whole((value - self.low) / self.step)


def describe_range(parameter: IntRange | FloatRange) -> str:
    """Return the values of a range, for messages."""
    step = "" if parameter.step in {None, 1} else f" in steps of {parameter.step}"
    return f"{parameter.low} to {parameter.high}{step}"


def nearest_step(value: float, low: float, high: float, step: float) -> float:
    """Return the nearest value of a range with a step, always with the same digits: a configuration's key has them."""
    return min(high, low + round((value - low) / step) * step)


def _is_whole(number: float) -> bool:
    return math.isfinite(number) and math.isclose(number, round(number), abs_tol=1e-9)


def _check_range(low: float, high: float, log: bool, step: float | None) -> None:
    if low > high:
        raise ValueError(f"low must not be above high, got low {low} and high {high}")
    if log and low <= 0:
        raise ValueError(f"log needs low > 0, got low {low}")
    if log and step is not None:
        raise ValueError("log and step cannot be combined")
    if step is not None and not _is_whole((high - low) / step):
        raise ValueError(f"step {step} does not divide the range from {low} to {high}")
    if not math.isfinite(high - low):
        raise ValueError(f"the range from {low} to {high} is too wide")


def _check_default(parameter: IntRange | FloatRange, default: float | None) -> None:
    if default is not None and not parameter.contains(default):
        text = f"{default} is not in the range from {describe_range(parameter)}"
        raise InvalidValuesError((("default",), text))


def _kind(raw: object) -> str:
    """Return the tag of the union member: `raw` is YAML when a space is read, and a model when it is written."""
    if isinstance(raw, list):
        return "list"
    if isinstance(raw, Mapping):
        return "categorical" if "choices" in raw and "type" not in raw else str(raw.get("type"))
    return str(getattr(raw, "type", "fixed"))


def _wrap(key: str, input_type: Any) -> BeforeValidator:
    """Accept a bare value for a mapping with one key."""
    return BeforeValidator(lambda raw: {key: raw}, json_schema_input_type=input_type)


Parameter = Annotated[
    Annotated[Fixed, _wrap("value", Scalar), Tag("fixed")]
    | Annotated[Choices, _wrap("choices", Annotated[list[Scalar], Field(min_length=1)]), Tag("list")]
    | Annotated[Choices, Tag("categorical")]
    | Annotated[IntRange, Tag("int")]
    | Annotated[FloatRange, Tag("float")],
    Discriminator(_kind),
]


# --- all parameters of a space --------------------------------------------------------------------------------------


def sampling_order(parameters: Mapping[str, Parameter]) -> list[str]:
    """Return the names so that each follows the parameters in its `when`. Otherwise the order of the file is kept."""
    return topological_order({name: parameter.when or () for name, parameter in parameters.items()})


def is_active(parameter: Parameter, params: Mapping[str, Scalar]) -> bool:
    """Return whether a parameter is active, given the values of the active parameters before it."""
    for name, expected in (parameter.when or {}).items():
        if name not in params:
            return False
        if not any(is_same(params[name], value) for value in as_list(expected)):
            return False
    return True


def sample_params(parameters: Mapping[str, Parameter], rng: random.Random) -> Params:
    """Return a random configuration.

    Args:
        parameters: in `sampling_order`.
        rng: the source of randomness.
    """
    params: Params = {}
    for name, parameter in parameters.items():
        if is_active(parameter, params):
            params[name] = parameter.sample(rng)
    return params


def iterate_grid(parameters: Mapping[str, Parameter]) -> Iterator[Params]:
    """Yield every configuration; the last parameter changes fastest. A continuous range contributes its two ends.

    Args:
        parameters: in `sampling_order`.
    """
    if all(parameter.when is None for parameter in parameters.values()):
        points = itertools.product(*(parameter.grid_values() for parameter in parameters.values()))
        yield from (dict(zip(parameters, point, strict=True)) for point in points)
        return
    items = list(parameters.items())

    def extend(params: Params, i: int) -> Iterator[Params]:
        if i == len(items):
            yield params
            return
        name, parameter = items[i]
        if not is_active(parameter, params):
            yield from extend(params, i + 1)
            return
        for value in parameter.grid_values():
            yield from extend({**params, name: value}, i + 1)

    yield from extend({}, 0)


def as_list(expected: Scalar | list[Scalar]) -> list[Scalar]:
    """Return the values of a `when`, where one value may stand for a list."""
    return expected if isinstance(expected, list) else [expected]


def find_too_large(parameters: Mapping[str, Parameter]) -> str | None:
    """Return a range with more values than a Gaussian process can take; None if there is none."""
    for name, parameter in parameters.items():
        if isinstance(parameter, IntRange | FloatRange) and (parameter.count or 0) > MAX_GP_VALUES:
            return name
    return None
