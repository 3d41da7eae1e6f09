"""The parameters of a search space: a scalar is fixed, a list is choices, a mapping is a range or conditional choices.

A parameter with `when` is active only if the parameters that it names have the values that it names. One that is inactive
is absent: from the draw, from the grid, from the trial. Parameters are drawn in an order in which each comes after those
that it depends on.
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

from hpo.errors import nearest
from hpo.space.document import InvalidValuesError
from hpo.space.expressions import topological_order

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

MAX_EXACT_INT = 2**53  # Optuna stores every number as a float

Scalar = int | float | str | bool | None
Params = dict[str, Scalar]


class Strict(BaseModel):
    """A part of a search space: frozen, without unknown keys, without conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


def _finite(value: Scalar) -> Scalar:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a value must be finite, got {value}")
    return value


def is_same(one: Scalar, other: Scalar) -> bool:
    """Tell whether two values are one to the user: 1 is 1.0, but true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


class Fixed(Strict):
    """A parameter with one value."""

    value: Annotated[Scalar, AfterValidator(_finite)]
    """The value."""

    @property
    def when(self) -> None:
        """Nothing: it is always active."""

    def distribution(self) -> BaseDistribution:
        """Return a categorical distribution of the one value, so that storage and dashboard show it."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution([self.value])

    def suggest(self, trial: optuna.Trial, name: str) -> Scalar:
        """Draw for a trial of Optuna."""
        return trial.suggest_categorical(name, [self.value])

    def sample(self, rng: random.Random) -> Scalar:
        """Draw at random."""
        return self.value

    @property
    def count(self) -> int:
        """How many values there are in a grid."""
        return 1

    def grid_values(self) -> Sequence[Scalar]:
        """Return the values of this parameter in a grid."""
        return [self.value]

    def takes(self, value: Scalar) -> bool:
        """Tell whether this parameter can have a value."""
        return is_same(value, self.value)


def _distinct(choices: list[Scalar]) -> list[Scalar]:
    seen: dict[Scalar, Scalar] = {}
    for choice in map(_finite, choices):
        if choice in seen:  # equal is the same: Optuna does not tell 1, 1.0 and true apart
            raise ValueError(f"the choices {seen[choice]!r} and {choice!r} are the same")
        seen[choice] = choice
    return choices


When = Annotated[dict[str, Scalar | Annotated[list[Scalar], Field(min_length=1)]], Field(min_length=1)] | None


class Choices(Strict):
    """A parameter that takes one of a list of values."""

    type: Literal["categorical"] = "categorical"
    """One of a list of values."""
    choices: Annotated[list[Scalar], Field(min_length=1), AfterValidator(_distinct)]
    """The values."""
    when: When = None
    """Active only if each parameter named here has this value, or one of this list of values: `{optimizer: sgd}`."""
    default: Scalar = None
    """The value that earlier trials, made before this parameter was there, implicitly used. It takes effect with the import
    of earlier trials, which is not built yet."""

    @model_validator(mode="after")
    def _check(self) -> Choices:
        if "default" in self.model_fields_set and not self.takes(self.default):
            raise InvalidValuesError((("default",), f"{self.default!r} is none of the choices {self.choices!r}"))
        return self

    def distribution(self) -> BaseDistribution:
        """Return the Optuna distribution."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.choices)

    def suggest(self, trial: optuna.Trial, name: str) -> Scalar:
        """Draw for a trial of Optuna."""
        return trial.suggest_categorical(name, self.choices)

    def sample(self, rng: random.Random) -> Scalar:
        """Draw at random."""
        return rng.choice(self.choices)

    @property
    def count(self) -> int:
        """How many values there are in a grid."""
        return len(self.choices)

    def grid_values(self) -> Sequence[Scalar]:
        """Return the choices in the order of the file."""
        return self.choices

    def takes(self, value: Scalar) -> bool:
        """Tell whether this parameter can have a value."""
        return any(is_same(value, choice) for choice in self.choices)


_ExactInt = Annotated[int, Field(ge=-MAX_EXACT_INT, le=MAX_EXACT_INT)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class IntRange(Strict):
    """An integer from low to high, both included."""

    type: Literal["int"]
    """An integer from low to high, both included."""
    low: _ExactInt
    """The lowest value."""
    high: _ExactInt
    """The highest value."""
    log: bool = False
    """Whether values are drawn on a logarithmic scale."""
    step: PositiveInt = 1
    """The distance of values from each other."""
    when: When = None
    """Active only if each parameter named here has this value, or one of this list of values: `{optimizer: sgd}`."""
    default: _ExactInt | None = None
    """The value that earlier trials, made before this parameter was there, implicitly used. It takes effect with the import
    of earlier trials, which is not built yet."""

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
        """Draw for a trial of Optuna."""
        return trial.suggest_int(name, self.low, self.high, log=self.log, step=self.step)

    def sample(self, rng: random.Random) -> Scalar:
        """Draw at random."""
        if self.log:
            drawn = round(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
            return min(self.high, max(self.low, drawn))
        return self.low + self.step * rng.randrange(self.count)

    @property
    def count(self) -> int:
        """How many values there are in a grid."""
        return (self.high - self.low) // self.step + 1

    def grid_values(self) -> range:
        """Return every integer of the range."""
        return range(self.low, self.high + 1, self.step)

    def takes(self, value: Scalar) -> bool:
        """Tell whether this parameter can have a value."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
            return False
        return int(value) in self.grid_values()


class FloatRange(Strict):
    """A real number from low to high."""

    type: Literal["float"]
    """A real number from low to high."""
    low: _Finite
    """The lowest value."""
    high: _Finite
    """The highest value."""
    log: bool = False
    """Whether values are drawn on a logarithmic scale."""
    step: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The distance of values from each other; without it the range is continuous."""
    when: When = None
    """Active only if each parameter named here has this value, or one of this list of values: `{optimizer: sgd}`."""
    default: _Finite | None = None
    """The value that earlier trials, made before this parameter was there, implicitly used. It takes effect with the import
    of earlier trials, which is not built yet."""

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
        """Draw for a trial of Optuna."""
        return trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)

    def sample(self, rng: random.Random) -> Scalar:
        """Draw at random."""
        if self.log:
            return min(self.high, max(self.low, math.exp(rng.uniform(math.log(self.low), math.log(self.high)))))
        if self.step is not None and self.count is not None:
            return min(self.high, self.low + self.step * rng.randrange(self.count))
        return rng.uniform(self.low, self.high)

    @property
    def count(self) -> int | None:
        """How many values there are in a grid, None for a continuous range."""
        return None if self.step is None else round((self.high - self.low) / self.step) + 1

    def grid_values(self) -> Sequence[Scalar]:
        """Return the values of a stepped range; of a continuous one its ends."""
        if self.step is None or self.count is None:
            return [self.low, self.high]
        return [min(self.high, self.low + i * self.step) for i in range(self.count)]

    def takes(self, value: Scalar) -> bool:
        """Tell whether this parameter can have a value."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        return self.step is None or _is_whole((value - self.low) / self.step)


def _is_whole(number: float) -> bool:
    return math.isfinite(number) and math.isclose(number, round(number), abs_tol=1e-9)


def _check_range(low: float, high: float, log: bool, step: float | None) -> None:
    if low > high:
        raise ValueError(f"low must not be above high, got low {low} and high {high}")
    if log and low <= 0:
        raise ValueError(f"log needs low > 0, got low {low}")
    if log and step is not None:
        raise ValueError("log and step exclude each other")
    if step is not None and not _is_whole((high - low) / step):
        raise ValueError(f"step {step} does not divide the range from {low} to {high}")
    if not math.isfinite(high - low):
        raise ValueError(f"the range from {low} to {high} is too wide")


def _check_default(parameter: IntRange | FloatRange, default: float | None) -> None:
    if default is not None and not parameter.takes(default):
        step = "" if parameter.step in {None, 1} else f" in steps of {parameter.step}"
        text = f"{default} is not in the range from {parameter.low} to {parameter.high}{step}"
        raise InvalidValuesError((("default",), text))


def _kind(raw: object) -> str:
    if isinstance(raw, list):
        return "list"
    if isinstance(raw, Mapping):
        return "categorical" if "choices" in raw and "type" not in raw else str(raw.get("type"))
    return str(getattr(raw, "type", "fixed"))  # a model on its way out, or a scalar on its way in


def _wrap(name: str, written: Any) -> BeforeValidator:
    return BeforeValidator(lambda raw: {name: raw}, json_schema_input_type=written)


Parameter = Annotated[
    Annotated[Fixed, _wrap("value", Scalar), Tag("fixed")]
    | Annotated[Choices, _wrap("choices", Annotated[list[Scalar], Field(min_length=1)]), Tag("list")]
    | Annotated[Choices, Tag("categorical")]
    | Annotated[IntRange, Tag("int")]
    | Annotated[FloatRange, Tag("float")],
    Discriminator(_kind),
]


# --- all parameters of a space --------------------------------------------------------------------------------------


def draw_order(parameters: Mapping[str, Parameter]) -> list[str]:
    """Return the names so that each comes after those that its `when` names, and else in the order of the file."""
    return topological_order({name: parameter.when or () for name, parameter in parameters.items()})


def is_active(parameter: Parameter, params: Mapping[str, Scalar]) -> bool:
    """Tell whether a parameter takes part, given the values of the active ones that come before it."""
    for name, wanted in (parameter.when or {}).items():
        if name not in params:
            return False
        if not any(is_same(params[name], value) for value in (wanted if isinstance(wanted, list) else [wanted])):
            return False
    return True


def sample(parameters: Mapping[str, Parameter], rng: random.Random) -> Params:
    """Return a configuration drawn at random.

    Args:
        parameters: in `draw_order`.
        rng: what it is drawn with.
    """
    params: Params = {}
    for name, parameter in parameters.items():
        if is_active(parameter, params):
            params[name] = parameter.sample(rng)
    return params


def grid_points_of(parameters: Mapping[str, Parameter]) -> Iterator[Params]:
    """Yield every configuration, the last parameter fastest; of a continuous range only the ends.

    Args:
        parameters: in `draw_order`.
    """
    if all(parameter.when is None for parameter in parameters.values()):
        points = itertools.product(*(parameter.grid_values() for parameter in parameters.values()))
        yield from (dict(zip(parameters, point, strict=True)) for point in points)
        return
    items = list(parameters.items())

    def below(i: int, params: Params) -> Iterator[Params]:
        if i == len(items):
            yield params
            return
        name, parameter = items[i]
        if not is_active(parameter, params):
            yield from below(i + 1, params)
            return
        for value in parameter.grid_values():
            yield from below(i + 1, {**params, name: value})

    yield from below(0, {})


def check_when(parameters: Mapping[str, Parameter], known: Sequence[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (key path, text) for each `when` that names what is not there; the paths start at the parameter.

    Args:
        parameters: those that are well by themselves.
        known: the names of all that are written.
    """
    for name, parameter in parameters.items():
        for other, wanted in (parameter.when or {}).items():
            path = (name, "when", other)
            if other not in known:
                yield path, f"there is no parameter {other!r}, {nearest(other, [n for n in known if n != name])}"
            elif other in parameters:
                for value in wanted if isinstance(wanted, list) else [wanted]:
                    if not parameters[other].takes(value):
                        yield path, f"{other} is never {value!r}{_values(parameters[other], value)}"


def _values(parameter: Parameter, value: Scalar) -> str:
    if isinstance(parameter, IntRange | FloatRange):
        return f", it lies from {parameter.low} to {parameter.high}"
    return f", {nearest(str(value), map(str, parameter.grid_values()))}"
