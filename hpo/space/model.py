"""YAML file -> frozen, validated Space; its identity; its Optuna distributions; its grid.

The pydantic models here, in `hpo.space.parameters` and in `hpo.space.sections` are the one truth of the file format: the JSON Schema is
generated from them. `hpo.space.rules` holds what must fit together. Every mistake of a file is reported at once, each with file,
line, column and key path.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt, PrivateAttr, TypeAdapter, ValidationError

from hpo.errors import HpoError, SettingError, SpaceError, nearest
from hpo.space.document import Document, Problem
from hpo.space.expressions import Formulas
from hpo.space.parameters import (
    FloatRange,
    IntRange,
    Parameter,
    Params,
    Scalar,
    Strict,
    draw_order,
    grid_points_of,
    is_active,
    sample,
)
from hpo.space.rules import SAMPLES, Draft, check_rules
from hpo.space.sections import (
    Budget,
    Data,
    NamedSampler,
    NamedScheduler,
    Objective,
    Resources,
    Scheduler,
    Seconds,
    Seed,
)
from hpo.trainable import DEFAULT_TRAINABLE

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

SPACES_DIR = Path("search_spaces")
MAX_PARAMETERS = 200


class Space(Strict):
    """A whole search: what is tried, on what, how, and until when."""

    name: str
    description: str = ""
    """What the search is for; shown where it starts."""
    trainable: Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$")] = DEFAULT_TRAINABLE
    """What is trained: module:function, looked for in the folder that the command runs in and among installed packages."""
    command: str | None = None
    """In the place of `trainable`, a script that prints a line of JSON with its metrics each epoch; `{lr}` stands for the
    value of lr."""
    metric: str = "val_accuracy"
    """The metric that is optimized, one that the trainable reports."""
    direction: Literal["maximize", "minimize"] = "maximize"
    """Whether more of the metric is better."""
    objectives: Annotated[list[Objective], Field(min_length=1)] | None = None
    """Several objectives in the place of metric and direction; not built yet."""
    sampler: NamedSampler
    """Which points are tried: a name, or a mapping with a name and options."""
    scheduler: NamedScheduler = Scheduler()
    """Which trials are stopped early: a name, or a mapping with a name and options."""
    max_epochs: PositiveInt
    """Epochs of a trial that is not stopped."""
    data: Data = Data()
    """Which images are trained and validated on."""
    parameters: Annotated[dict[str, Parameter], Field(min_length=1, max_length=MAX_PARAMETERS)]
    """A scalar is fixed, a list is choices, a mapping is a range."""
    constraints: Annotated[list[str], Field(max_length=MAX_PARAMETERS, default_factory=list)]
    """Comparisons that every configuration meets, like `lr <= 0.004 * batch_size`."""
    derived: Annotated[dict[str, str], Field(max_length=MAX_PARAMETERS, default_factory=dict)]
    """Values that are computed from the parameters, like `0.05 * max_epochs`, and handed to the trainable with them."""
    warm_start: Annotated[list[str], Field(default_factory=list)]
    """Earlier studies to learn from; not built yet."""
    budget: Budget = Budget()
    """Where the search ends."""
    resources: Resources = Resources()
    """What one trial takes."""
    replicates: PositiveInt = 1
    """Seeds a configuration; more than 1 is not built yet."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """How often a trial is started again after its worker crashed."""
    trial_timeout: Seconds | None = None
    """The longest that an epoch may take: 90s, 30m, 4h, or seconds."""
    checkpoint_every: PositiveInt = 1
    """Epochs between checkpoints."""
    seed: Seed = 0
    """Of the training, and of the sampler if it has none of its own."""

    _document: Document | None = PrivateAttr(default=None)

    @property
    def is_default_trainable(self) -> bool:
        """Whether our own training loop is searched over, of which more is known than of others."""
        return self.command is None and self.trainable == DEFAULT_TRAINABLE

    @property
    def is_grid(self) -> bool:
        """Whether the search tries a finite list of configurations that is known before it starts."""
        return self.sampler.name == "grid"

    @property
    def learns_from_results(self) -> bool:
        """Whether the sampler's next draw depends on the results so far."""
        return self.sampler.name not in {"grid", "random", "qmc"}

    @property
    def stops_trials_early(self) -> bool:
        """Whether a scheduler may prune trials."""
        return self.scheduler.name != "none"

    @property
    def total_trials(self) -> int | None:
        """The number of trials in all, or None where only the time budget ends the search."""
        return sum(1 for _ in self.planned_points()) if self.is_grid else self.budget.trials

    def planned_points(self) -> Iterator[Params]:
        """Yield the configurations of a grid that its budget allows, in order."""
        return itertools.islice(self.grid_points(), self.budget.trials)

    def trainable_data(self, data_dir: Path) -> dict[str, Any]:
        """Return what the trainable gets as `data`."""
        return {**self.data.model_dump(), "data_dir": str(data_dir)}

    @contextmanager
    def locating_errors(self, *path: str) -> Iterator[None]:
        """Say of an error in here that it is about a key of the file, and where that was written."""
        try:
            yield
        except HpoError as error:
            where = "" if self._document is None else self._document.position(path)
            raise type(error)(f"{where}{error}") from None

    # --- identity

    @property
    def fingerprint(self) -> str:
        """The identity of the search: what makes results comparable. Budgets, resources and samplers may change."""
        identity = self.model_dump(
            include={"trainable", "metric", "direction", "max_epochs", "data", "parameters", "seed"}
        )
        for parameter in identity["parameters"].values():
            parameter.pop("default", None)  # says something of earlier trials only
            if parameter.get("when", False) is None:
                del parameter["when"]
        return _digest(identity | self.model_dump(include=self._used({"constraints", "derived", "command"})))

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Space:
        """Return the space that a study was opened with, from the settings that storage holds.

        Raises:
            SpaceError: another version of hpo wrote them, and this one cannot read them.
        """
        written = dict(settings)
        written["parameters"] = {
            name: parameter["value"] if set(parameter) == {"value"} else _without_nulls(parameter)
            for name, parameter in settings["parameters"].items()
        }
        try:
            return cls.model_validate(written)
        except ValidationError as error:
            raise SpaceError(f"the stored settings cannot be read by this version of hpo: {error}") from None

    @property
    def study_options(self) -> dict[str, Any]:
        """What `storage.studies.open_study` is told of this search."""
        return {
            "name": self.name,
            "direction": self.direction,
            "fingerprint": self.fingerprint,
            "settings": self.model_dump(mode="json"),
        }

    def config_key(self, params: Mapping[str, Scalar]) -> str:
        """Return the identity of a configuration: the same key means the same training run, however long."""
        identity = {
            "params": dict(params),
            "data": self.data.model_dump(),
            "trainable": self.trainable,
            "seed": self.seed,
        }
        return _digest(identity | self.model_dump(include=self._used({"derived", "command"})))

    def _used(self, names: set[str]) -> set[str]:
        """Return those of the names that are given: what is not used leaves identities as they were before it was built."""
        return {name for name in names if getattr(self, name)}

    # --- configurations

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the Optuna distribution of each parameter, in the order of the file."""
        return {name: parameter.distribution() for name, parameter in self.parameters.items()}

    def draw(self, trial: optuna.Trial) -> str:
        """Draw a configuration for a trial of Optuna; return the constraint that it breaks, empty if it breaks none.

        What the trial has been given already stays; inactive parameters are not drawn.
        """
        params: Params = {}
        for name, parameter in self._ordered.items():
            if is_active(parameter, params):
                params[name] = parameter.suggest(trial, name)
        return next((text for _, text in self._formulas.broken(params)), "")

    def grid_points(self) -> Iterator[Params]:
        """Yield every configuration that meets the constraints; of a continuous range only the ends."""
        return (params for params in grid_points_of(self._ordered) if not self._formulas.broken(params))

    def derive(self, params: Mapping[str, Scalar]) -> Params:
        """Return the derived values of a configuration."""
        return self._formulas.derive(params)

    def examples(self) -> Iterator[tuple[str, Scalar]]:
        """Yield (name, value) for each choice and each end of a range: what a trainable must be able to take.

        Derived values follow, of a few configurations.
        """
        for name, parameter in self.parameters.items():
            if isinstance(parameter, IntRange | FloatRange):
                yield from ((name, parameter.low), (name, parameter.high))
            else:
                yield from ((name, value) for value in parameter.grid_values())
        if self.derived:
            rng = random.Random(0)
            points = (sample(self._ordered, rng) for _ in range(SAMPLES))
            possible = (params for params in points if not self._formulas.broken(params))
            for params in itertools.islice(possible, 20):
                yield from self.derive(params).items()

    @cached_property
    def _ordered(self) -> dict[str, Parameter]:
        return {name: self.parameters[name] for name in draw_order(self.parameters)}

    @cached_property
    def _formulas(self) -> Formulas:
        return Formulas(self.constraints, self.derived, self.max_epochs)


def _without_nulls(parameter: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out a `default` and a `when` that nobody wrote: null could be meant as a value."""
    return {key: value for key, value in parameter.items() if value is not None or key not in {"default", "when"}}


def _digest(identity: object) -> str:
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    document = Document(path)
    for override in overrides:
        document.override(override)
    problems: list[Problem] = []
    if "name" in document.data:
        problems.append((("name",), f"a study is named after its file, {path.stem!r}"))
    try:
        space = Space.model_validate({**document.data, "name": path.stem})
        given = {name: getattr(space, name) for name in Space.model_fields}
    except ValidationError as error:
        problems += document.problems(error, Space)
        given = _what_is_well(document.data)
    problems += check_rules(Draft(given, document.data))
    if problems:
        raise document.error(problems)
    space._document = document
    return space


def _what_is_well(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections without mistakes, defaults for those that are not there; the parameters one by one."""
    given: dict[str, Any] = {}
    for name, field in Space.model_fields.items():
        if name in data and name != "parameters":
            try:
                given[name] = _section_adapter(name).validate_python(data[name], strict=True)
            except ValidationError:
                continue
        elif name not in data and not field.is_required():
            given[name] = field.get_default(call_default_factory=True)
    if isinstance(data.get("parameters"), Mapping):
        given["parameters"] = {}
        for name, raw in list(data["parameters"].items())[:MAX_PARAMETERS]:
            try:
                given["parameters"][name] = _parameter_adapter().validate_python(raw)
            except ValidationError:
                continue
    return given


@cache
def _section_adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(Space.model_fields[name].rebuild_annotation())


@cache
def _parameter_adapter() -> TypeAdapter[Parameter]:
    return TypeAdapter(Parameter)


def space_schema() -> dict[str, Any]:
    """Return the JSON Schema of a search-space file, from which editors complete and underline."""
    schema = Space.model_json_schema()
    del schema["properties"]["name"]  # the file's own
    schema["required"].remove("name")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Search space"}
