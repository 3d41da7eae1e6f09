"""YAML file -> frozen, validated Space; its identity; its Optuna distributions; its grid.

The pydantic models below are the one truth of the file format. Every mistake of a file is reported at once, each
with file, line, column and key path.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from hpo.errors import SettingError, SpaceError, TrainableError, nearest

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SPACES_DIR = Path("search_spaces")
MAX_FILE_BYTES = 100_000  # a search space is ten lines; anything near this is the wrong file
MAX_YAML_NODES = 20_000  # after aliases are expanded: stops YAML bombs
MAX_YAML_DEPTH = 20  # of collections inside each other; the parser itself recurses
MAX_GRID = 100_000  # configurations

Scalar = int | float | str | bool | None
Params = dict[str, Scalar]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# --- parameters: a scalar is fixed, a list is choices, a mapping is a range ---------------------------------------


def _finite(value: Scalar) -> Scalar:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a value must be finite, got {value}")
    return value


class Fixed(_Strict):
    """A parameter with one value."""

    value: Annotated[Scalar, AfterValidator(_finite)]

    def distribution(self) -> BaseDistribution:
        """Return a categorical distribution of the one value, so that storage and dashboard show it."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution([self.value])

    @property
    def count(self) -> int:
        """How many values there are in a grid."""
        return 1

    def grid(self) -> Sequence[Scalar]:
        """Return the values of this parameter in a grid."""
        return [self.value]


def _distinct(choices: list[Scalar]) -> list[Scalar]:
    seen: dict[Scalar, Scalar] = {}
    for choice in map(_finite, choices):
        if choice in seen:  # equal is the same: Optuna does not tell 1, 1.0 and true apart
            raise ValueError(f"the choices {seen[choice]!r} and {choice!r} are the same")
        seen[choice] = choice
    return choices


class Choices(_Strict):
    """A parameter that takes one of a list of values."""

    type: Literal["categorical"] = "categorical"
    choices: Annotated[list[Scalar], Field(min_length=1), AfterValidator(_distinct)]

    def distribution(self) -> BaseDistribution:
        """Return the Optuna distribution."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.choices)

    @property
    def count(self) -> int:
        """How many values there are in a grid."""
        return len(self.choices)

    def grid(self) -> Sequence[Scalar]:
        """Return the choices in the order of the file."""
        return self.choices


class IntRange(_Strict):
    """An integer from low to high, both included."""

    type: Literal["int"]
    low: int
    high: int
    log: bool = False
    step: PositiveInt = 1

    @model_validator(mode="after")
    def _check(self) -> IntRange:
        _check_range(self.low, self.high, self.log, None if self.step == 1 else self.step)
        return self

    def distribution(self) -> BaseDistribution:
        """Return the Optuna distribution."""
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self.high, log=self.log, step=self.step)

    @property
    def count(self) -> int:
        """How many values there are in a grid."""
        return len(self.grid())

    def grid(self) -> range:
        """Return every integer of the range."""
        return range(self.low, self.high + 1, self.step)


class FloatRange(_Strict):
    """A real number from low to high."""

    type: Literal["float"]
    low: Annotated[float, Field(strict=False, allow_inf_nan=False)]
    high: Annotated[float, Field(strict=False, allow_inf_nan=False)]
    log: bool = False
    step: Annotated[float, Field(strict=False, gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _check(self) -> FloatRange:
        _check_range(self.low, self.high, self.log, self.step)
        return self

    def distribution(self) -> BaseDistribution:
        """Return the Optuna distribution."""
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    @property
    def count(self) -> int | None:
        """How many values there are in a grid, None for a continuous range."""
        return None if self.step is None else round((self.high - self.low) / self.step) + 1

    def grid(self) -> Sequence[Scalar]:
        """Return the values of a stepped range; of a continuous one its ends."""
        if self.step is None or self.count is None:
            return [self.low, self.high]
        return [min(self.high, self.low + i * self.step) for i in range(self.count)]


def _check_range(low: float, high: float, log: bool, step: float | None) -> None:
    if low > high:
        raise ValueError(f"low must not be above high, got low {low} and high {high}")
    if log and low <= 0:
        raise ValueError(f"log needs low > 0, got low {low}")
    if log and step is not None:
        raise ValueError("log and step exclude each other")
    if step is not None:
        steps = (high - low) / step
        if not math.isfinite(steps) or not math.isclose(steps, round(steps), abs_tol=1e-9):
            raise ValueError(f"step {step} does not divide the range from {low} to {high}")


def _parameter_kind(raw: object) -> str:
    if isinstance(raw, list):
        return "list"
    if isinstance(raw, Mapping):
        return str(raw.get("type"))
    return str(getattr(raw, "type", "fixed"))  # a model on its way out, or a scalar on its way in


def _wrap(name: str) -> BeforeValidator:
    return BeforeValidator(lambda raw: {name: raw})


Parameter = Annotated[
    Annotated[Fixed, _wrap("value"), Tag("fixed")]
    | Annotated[Choices, _wrap("choices"), Tag("list")]
    | Annotated[Choices, Tag("categorical")]
    | Annotated[IntRange, Tag("int")]
    | Annotated[FloatRange, Tag("float")],
    Discriminator(_parameter_kind),
]


# --- the other sections -------------------------------------------------------------------------------------------


def _named(raw: object) -> object:
    """Let `tpe` stand for `{name: tpe}`."""
    return {"name": raw} if isinstance(raw, str) else raw


class Sampler(_Strict):
    """Which points are tried: Optuna's samplers, and every point of a grid."""

    name: Literal["grid", "random", "tpe", "nsga2"]
    seed: Annotated[int, Field(ge=0)] | None = None


class Scheduler(_Strict):
    """Which trials are stopped early. Epochs are the resource."""

    name: Literal["none", "asha", "hyperband", "median"] = "none"
    grace_period: PositiveInt = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 3


class Data(_Strict):
    """Which images are trained and validated on; `hpo.data` knows the data sets."""

    dataset: str = "fashion_mnist"
    train_samples: Annotated[int, Field(ge=2)] | None = None  # batch norm cannot train on one
    val_samples: PositiveInt = 5000


_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def _seconds(raw: object) -> object:
    if isinstance(raw, bool) or not isinstance(raw, str):
        return raw
    match = _DURATION.fullmatch(raw)
    if not raw or match is None:
        raise ValueError("a duration is written like 90s, 30m, 4h or 1d12h")
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


Seconds = Annotated[float, Field(gt=0, strict=False, allow_inf_nan=False), BeforeValidator(_seconds)]


class Budget(_Strict):
    """Where the search ends: `time` is wall-clock time that the study has been run, over all its runs."""

    trials: PositiveInt | None = None
    time: Seconds | None = None


class Resources(_Strict):
    """What one trial takes. auto: one GPU where there are GPUs, else an equal share of the cores."""

    cpu: Annotated[float, Field(gt=0, strict=False)] | Literal["auto"] = "auto"
    gpu: Annotated[float, Field(ge=0, strict=False)] | Literal["auto"] = "auto"


class Space(_Strict):
    """A whole search: what is tried, on what, how, and until when."""

    name: str
    description: str = ""
    trainable: Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$")] = "hpo.train:train"
    metric: str = "val_accuracy"
    direction: Literal["maximize", "minimize"] = "maximize"
    sampler: Annotated[Sampler, BeforeValidator(_named)]
    scheduler: Annotated[Scheduler, BeforeValidator(_named)] = Scheduler()
    max_epochs: PositiveInt
    data: Data = Data()
    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]
    budget: Budget = Budget()
    resources: Resources = Resources()
    max_failures: Annotated[int, Field(ge=0)] = 2
    trial_timeout: Seconds | None = None
    checkpoint_every: PositiveInt = 1
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("parameters")
    @classmethod
    def _check_names(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        for name in parameters:
            if not name.isidentifier():
                raise ValueError(f"a parameter's name is a Python identifier, got {name!r}")
        return parameters

    @model_validator(mode="after")
    def _check_together(self) -> Space:
        if self.sampler.name == "grid":
            points = 1
            for name, parameter in self.parameters.items():
                if parameter.count is None:
                    raise ValueError(
                        f"sampler grid needs finitely many values, but parameters.{name} is continuous: "
                        "give a list or a step, or take sampler random or tpe"
                    )
                points *= parameter.count
            if points > MAX_GRID:
                raise ValueError(
                    f"this grid has {points} configurations, more than {MAX_GRID}: give fewer values, or take sampler "
                    "random or tpe"
                )
        elif self.budget.trials is None and self.budget.time is None:
            raise ValueError(f"sampler {self.sampler.name} never ends by itself: give budget.trials or budget.time")
        if self.scheduler.name != "none" and self.scheduler.grace_period >= self.max_epochs:
            raise ValueError(
                f"scheduler {self.scheduler.name} has no room: grace_period {self.scheduler.grace_period} must be "
                f"below max_epochs {self.max_epochs}"
            )
        return self

    @property
    def fingerprint(self) -> str:
        """The identity of the search: what makes results comparable. Budgets, resources and samplers may change."""
        identity = self.model_dump(
            include={"trainable", "metric", "direction", "max_epochs", "data", "parameters", "seed"}
        )
        return _digest(identity)

    def key(self, params: Mapping[str, Scalar]) -> str:
        """Return the identity of a configuration: the same key means the same training run, however long."""
        return _digest(
            {"params": dict(params), "data": self.data.model_dump(), "trainable": self.trainable, "seed": self.seed}
        )

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the Optuna distribution of each parameter, in the order of the file."""
        return {name: parameter.distribution() for name, parameter in self.parameters.items()}

    def examples(self) -> Iterator[tuple[str, Scalar]]:
        """Yield (name, value) for each choice and each end of a range: what a trainable must be able to take."""
        for name, parameter in self.parameters.items():
            if isinstance(parameter, IntRange | FloatRange):
                yield from ((name, parameter.low), (name, parameter.high))
            else:
                yield from ((name, value) for value in parameter.grid())

    def grid(self) -> Iterator[Params]:
        """Yield every configuration, the last parameter fastest; of a continuous range only the ends."""
        points = itertools.product(*(parameter.grid() for parameter in self.parameters.values()))
        return (dict(zip(self.parameters, point, strict=True)) for point in points)


def _digest(identity: object) -> str:
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- the trainable ------------------------------------------------------------------------------------------------


def load_trainable(name: str) -> Callable[..., Iterator[Any]]:
    """Import a trainable, see `hpo.train.Trainable`.

    Args:
        name: `module:function`.

    Raises:
        TrainableError: no such module or function, or it is not a generator function of the right signature.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists; something that it imports does not
        raise TrainableError(
            f"trainable: no module {module_name!r}; it is looked for in the folder that the command runs in and among "
            "the installed packages"
        ) from None
    function = getattr(module, function_name, None)
    if function is None:
        names = [n for n, value in vars(module).items() if inspect.isgeneratorfunction(value)]
        raise TrainableError(
            f"trainable: {module_name} has no function {function_name!r}, {nearest(function_name, names)}"
        )
    wanted = {"data", "seed", "max_epochs", "device", "checkpoint"}
    if not inspect.isgeneratorfunction(function) or not wanted <= set(inspect.signature(function).parameters):
        raise TrainableError(
            f"trainable: {name} must be a generator function "
            "(params, *, data, seed, max_epochs, device, checkpoint=None) that yields EpochReports"
        )
    checked: Callable[..., Iterator[Any]] = function
    return checked


# --- reading a file -----------------------------------------------------------------------------------------------


def known_spaces() -> list[str]:
    """Return the names of the spaces in search_spaces/, sorted."""
    return sorted(path.stem for path in SPACES_DIR.glob("*.yaml"))


def load_space(name_or_path: str, overrides: Sequence[str] = ()) -> Space:
    """Read a search space.

    Args:
        name_or_path: a file name in search_spaces/ without its ending, or a path to a YAML file.
        overrides: `KEY=VALUE` each, the key a dotted path, the value read as YAML.

    Raises:
        SettingError: no such space; the text lists the known ones.
        SpaceError: the file or an override is wrong; a line for each mistake.
    """
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        path = SPACES_DIR / f"{name_or_path}.yaml"
        if not path.is_file():
            hint = nearest(name_or_path, known_spaces()) if known_spaces() else f"{SPACES_DIR}/ has none here"
            raise SettingError(f"there is no search space {name_or_path!r} in {SPACES_DIR}/: {hint}")
    document = _Document(path)
    for override in overrides:
        document.override(override)
    if "name" in document.data:
        raise SpaceError(f"{document.position(('name',))}name: a study is named after its file, {path.stem!r}")
    try:
        return Space.model_validate({**document.data, "name": path.stem})
    except ValidationError as error:
        raise SpaceError(document.explain(error)) from None


class _Loader(yaml.CSafeLoader):
    """YAML 1.2's core schema: 1e-4 is a number, on/off/yes/no are the words that the user wrote."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^{_pattern}$"), _first)

_Path = tuple[str | int, ...]


def _merge(details: list[dict[str, Any]]) -> dict[str, Any]:
    """Make one of the complaints that the members of a union have about one value."""
    messages = dict.fromkeys(detail["msg"].removeprefix("Input should be ").partition(",")[0] for detail in details)
    return details[0] if len(details) == 1 else details[0] | {"msg": "Input should be " + " or ".join(messages)}


class _Document:
    """A YAML mapping as plain data that remembers where each value was written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._where: dict[_Path, str] = {}
        self._nodes = 0
        try:
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise SpaceError(f"{path}: {size} bytes; a search space has at most {MAX_FILE_BYTES}")
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise SettingError(f"cannot read the search space {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise SpaceError(f"{path}: not a text file in UTF-8") from None
        data = self._parse(text, f"{path}:")
        if data is None:
            raise SpaceError(f"{path}: the file is empty; it needs at least sampler, max_epochs and parameters")
        if not isinstance(data, dict):
            raise SpaceError(f"{path}:1:1: a search space is a mapping of keys to values")
        self.data: dict[str, Any] = data

    def override(self, assignment: str) -> None:
        """Apply one `--set KEY=VALUE`."""
        where = f"--set {assignment}"
        key, equals, text = assignment.partition("=")
        names = key.split(".")
        if not equals or not all(names):
            raise SettingError(f"{where}: write KEY=VALUE, for example --set max_epochs=2")
        value = self._parse(text, f"{where}: ", prefix=tuple(names))
        section = self.data
        for name in names[:-1]:
            if isinstance(section.get(name), str):  # `sampler: tpe` grows into `sampler: {name: tpe}`
                section[name] = _named(section[name])
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise SettingError(f"{where}: {name} is a single value, it has no part {names[-1]!r}")
        section[names[-1]] = value
        self._where[tuple(names)] = f"{where}: "

    def explain(self, error: ValidationError) -> str:
        """Return a line for each mistake: where, which key, what is allowed, what was got."""
        groups: dict[_Path, list[dict[str, Any]]] = {}
        for detail in error.errors(include_url=False):
            path = self._real_path(detail["loc"])
            if detail["type"] in {"missing", "extra_forbidden"}:
                path += detail["loc"][-1:]
            groups.setdefault(path, []).append(dict(detail))
        return "\n".join(self._explain_one(_merge(details)) for details in groups.values())

    def _explain_one(self, detail: dict[str, Any]) -> str:
        path = self._real_path(detail["loc"])
        kind, got = detail["type"], detail["input"]
        message = detail["msg"].removeprefix("Value error, ")
        if kind == "extra_forbidden":
            path = (*path, detail["loc"][-1]) if path[-1:] != detail["loc"][-1:] else path
            message = f"unknown key, {nearest(str(path[-1]), self._allowed_beside(path))}"
        elif kind == "missing":
            message = f"the key {detail['loc'][-1]!r} is missing"
        elif kind == "union_tag_invalid":
            message = f"a range needs `type:` int, float or categorical, got {got.get('type')!r}"
        elif kind == "string_pattern_mismatch":
            message = f"write module:function, got {got!r}"
        elif not isinstance(got, dict | BaseModel) and kind != "value_error":
            message = f"{message[:1].lower()}{message[1:]}, got {got!r}"
        key_path = ".".join(map(str, path))
        return f"{self.position(path)}{key_path + ': ' if key_path else ''}{message}"

    def _real_path(self, loc: Sequence[str | int]) -> _Path:
        """Keep of a pydantic location what the user wrote: it also names the tags of unions and the wrapped fields."""
        path: list[str | int] = []
        value: Any = self.data
        for part in loc:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                continue
            path.append(part)
        return tuple(path)

    def _allowed_beside(self, path: _Path) -> list[str]:
        model: type[BaseModel] = Space
        if len(path) == 3 and path[0] == "parameters":
            kinds: dict[str, type[BaseModel]] = {"int": IntRange, "float": FloatRange}
            model = kinds.get(self.data["parameters"][path[1]].get("type"), Choices)
        elif len(path) == 2:
            sections: dict[str, type[BaseModel]] = {
                "sampler": Sampler,
                "scheduler": Scheduler,
                "data": Data,
                "budget": Budget,
            }
            model = sections.get(str(path[0]), Resources)
        return [name for name in model.model_fields if name != "name" or model is not Space]

    def position(self, path: _Path) -> str:
        """Return `file:line:column: ` of the nearest written key on a path, or the override that set it."""
        while path and path not in self._where:
            path = path[:-1]
        return self._where.get(path, f"{self.path}: ")

    def _parse(self, text: str, where: str, prefix: _Path = ()) -> Any:
        try:
            depth = 0
            for event in yaml.parse(text, Loader=_Loader):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > MAX_YAML_DEPTH:
                    raise SpaceError(f"{where} more than {MAX_YAML_DEPTH} lists or mappings inside each other")
            node = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            at = f"{mark.line + 1}:{mark.column + 1}: " if mark and where.endswith(f"{self.path}:") else ""
            line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
            is_tab = "\t" in line[: len(line) - len(line.lstrip())]
            hint = "; YAML is indented by spaces, not by tabs" if is_tab else ""
            raise SpaceError(f"{where}{at}not YAML: {error.problem}{hint}") from None
        except yaml.YAMLError as error:
            raise SpaceError(f"{where} not YAML: {error}") from None
        return None if node is None else self._plain(node, prefix, where, ())

    def _plain(self, node: yaml.Node, path: _Path, where: str, parents: tuple[int, ...]) -> Any:
        self._nodes += 1
        at = _at(where, node)
        if self._nodes > MAX_YAML_NODES or id(node) in parents:
            raise SpaceError(f"{at}the file expands to more than {MAX_YAML_NODES} values")
        kind = {"map": yaml.MappingNode, "seq": yaml.SequenceNode}.get(node.tag.rpartition(":")[2], yaml.ScalarNode)
        if not node.tag.startswith("tag:yaml.org,2002:") or not isinstance(node, kind):
            raise SpaceError(f"{at}the tag {node.tag} is not allowed")
        parents = (*parents, id(node))
        self._where.setdefault(path, at)
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key_at = _at(where, key_node)
                if not isinstance(key_node, yaml.ScalarNode):
                    raise SpaceError(f"{key_at}a key is a single word")
                key = str(key_node.value)
                if key in mapping:
                    raise SpaceError(f"{key_at}the key {key!r} appears twice")
                self._where[(*path, key)] = key_at
                mapping[key] = self._plain(value_node, (*path, key), where, parents)
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, (*path, i), where, parents) for i, item in enumerate(node.value)]
        text = str(node.value)
        try:
            match node.tag.rpartition(":")[2]:
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    return int(text)
                case "float":
                    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
                case "str":
                    return text
        except (ValueError, KeyError):
            raise SpaceError(f"{at}{text[:40]!r} is not what the tag {node.tag} says") from None
        raise SpaceError(f"{at}the tag {node.tag} is not allowed")


def _at(where: str, node: yaml.Node) -> str:
    """Return `file:line:column: ` of a node in a file; an override has no lines."""
    mark = node.start_mark
    return f"{where}{mark.line + 1}:{mark.column + 1}: " if where.endswith(":") else where
