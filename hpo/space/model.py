"""Space, the validated form of a search-space file: its identity, its Optuna distributions, its grid.

The pydantic models here, in `hpo.space.parameters` and in `hpo.space.sections` define the file format; the JSON Schema is
generated from them, and a field's docstring is its description there. `hpo.space.rules` has the rules between sections.
`load_space` reports all problems of a file at once, each with file, line, column and key path.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, PrivateAttr, TypeAdapter, ValidationError, model_validator

from hpo.errors import HpoError, SettingError, SpaceError, nearest
from hpo.space.choice import choose_sampler
from hpo.space.command import uses_checkpoint_dir
from hpo.space.configuration_rules import RANDOM_POINTS
from hpo.space.continuation import Continuation, NamedContinuation
from hpo.space.document import Document
from hpo.space.expressions import Formulas
from hpo.space.grid_size import count_grid
from hpo.space.messages import Problem, explain, fields_by_key, group_by_key
from hpo.space.objectives import MAX_OBJECTIVES, ListedObjective, MetricName, Objective
from hpo.space.parameters import (
    FloatRange,
    IntRange,
    Parameter,
    Params,
    Scalar,
    StrictModel,
    is_active,
    iterate_grid,
    sample_params,
    sampling_order,
    without_nulls,
)
from hpo.space.points import complete_point
from hpo.space.recipient import Recipient, check_recipient
from hpo.space.rules import check_rules
from hpo.space.sections import (
    AutoSampler,
    Budget,
    Checkpoints,
    Data,
    NamedSampler,
    NamedScheduler,
    NamedSource,
    Resources,
    Scheduler,
    Seconds,
    Seed,
)
from hpo.space.valid_sections import ValidSections
from hpo.trainable import DEFAULT_TRAINABLE

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

SPACES_DIR = Path("search_spaces")
MAX_PARAMETERS = 200
MAX_REPLICATES = 100
MAX_POINTS = 100  # of points_to_evaluate


class Space(StrictModel):
    """A search: its parameters, its training, its sampler and scheduler, and its limits."""

    name: str
    description: str = ""
    """The purpose of the search. It is printed when the search starts."""
    trainable: Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$")] = DEFAULT_TRAINABLE
    """The function that trains one configuration, as module:function. The module is in the current folder or installed."""
    command: str | None = None
    """A script to run instead of a trainable, such as `python train.py --lr {lr}`, where `{lr}` becomes the value of lr. It
    prints one line of JSON with its metrics after each epoch."""
    report: Annotated[dict[str, str], Field(max_length=MAX_PARAMETERS, default_factory=dict)]
    """Patterns that read metrics from what the script prints, such as `accuracy: 'Accuracy: (\\d+/\\d+)'`. The group is the
    number, or a fraction. Without them, the script prints JSON."""
    metric: MetricName = "val_accuracy"
    """The metric to optimize. The trainable must report it. With several objectives, that of the first one."""
    direction: Literal["maximize", "minimize"] = "maximize"
    """Whether a higher or a lower value of the metric is better."""
    objectives: Annotated[list[ListedObjective], Field(min_length=1, max_length=MAX_OBJECTIVES)] | None = None
    """Several objectives, instead of metric and direction. In a space that is read, null if there is only one."""
    sampler: NamedSampler = AutoSampler(name="auto")
    """The algorithm that chooses the configurations: a name, or a mapping with a name and options. In a space that is read,
    `auto` is replaced by its choice."""
    scheduler: NamedScheduler = Scheduler()
    """The algorithm that stops trials early: a name, or a mapping with a name and options."""
    max_epochs: PositiveInt
    """Epochs of a trial that is not stopped early."""
    data: Data = Data()
    """The images for training and validation."""
    parameters: Annotated[dict[str, Parameter], Field(min_length=1, max_length=MAX_PARAMETERS)]
    """The hyperparameters. A scalar is fixed, a list is choices, a mapping is a range."""
    constraints: Annotated[list[str], Field(max_length=MAX_PARAMETERS, default_factory=list)]
    """Comparisons that every configuration must meet, such as `lr <= 0.004 * batch_size`."""
    derived: Annotated[dict[str, str], Field(max_length=MAX_PARAMETERS, default_factory=dict)]
    """Values computed from the parameters, such as `0.05 * max_epochs`. The trainable receives them with the parameters."""
    points_to_evaluate: Annotated[list[dict[str, Scalar]], Field(max_length=MAX_POINTS, default_factory=list)]
    """Configurations to train first, such as a known recipe. A parameter that is left out has its default, or its only
    value."""
    warm_start: Annotated[list[NamedSource], Field(default_factory=list)]
    """Earlier studies to learn from: a name, or a mapping with the name of a study and options."""
    continuation: Annotated[NamedContinuation, Field(alias="continue")] = Continuation()
    """With a larger max_epochs, which completed trials of earlier revisions are continued from their checkpoints: all, best
    N, none, or a mapping with options."""
    budget: Budget = Budget()
    """The limits at which the search ends."""
    resources: Resources = Resources()
    """The resources of one trial."""
    replicates: Annotated[int, Field(ge=1, le=MAX_REPLICATES)] = 1
    """Trainings of each configuration, with seeds that count up from `seed`. They are one trial: its value is their mean."""
    on_finish: Annotated[Recipient | None, BeforeValidator(check_recipient), Field(exclude=True, repr=False)] = None
    """Who is notified when the search has ended: a command, as a text or as a list of its arguments, or a URL that gets a
    POST of JSON. It is not stored with the study: a URL may contain a secret."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """How often a trial is retried after its worker crashed."""
    trial_timeout: Seconds | None = None
    """The longest time that one epoch may take: 90s, 30m, 4h, or seconds."""
    checkpoint_every: Literal["auto"] | PositiveInt = "auto"
    """Epochs between two checkpoints. auto: as often as costs at most 3 % of the training time, at least every 5 minutes of
    training, and whenever a trial ends or is interrupted."""
    checkpoints: Checkpoints = Checkpoints()
    """Which trials keep their checkpoints after they have ended. Unfinished and failed trials always keep theirs."""
    seed: Seed = 0
    """The seed of the training, and of a sampler without a seed."""

    _document: Document | None = PrivateAttr(default=None)
    _sampler_reason: str = PrivateAttr(default="")
    _left_out: frozenset[str] = PrivateAttr(default=frozenset())

    @model_validator(mode="after")
    def _unify_objectives(self) -> Space:
        """Let metric and direction be those of the first objective, and set objectives only if there are several."""
        if self.objectives is None:
            return self
        first, *others = self.objectives
        kept = self.objectives if others else None
        return self.model_copy(update={"metric": first.metric, "direction": first.direction, "objectives": kept})

    @model_validator(mode="after")
    def _choose_sampler(self) -> Space:
        if not isinstance(self.sampler, AutoSampler):
            return self
        count = partial(count_grid, self.parameters, self.constraints, self.derived, self.max_epochs)
        objectives = len(self.all_objectives)
        choice = choose_sampler(
            self.sampler, self.parameters, self.budget, self.scheduler, count, objectives=objectives
        )
        chosen = self.model_copy(update={"sampler": choice.sampler})
        chosen._sampler_reason = choice.reason  # noqa: SLF001 # a space, too
        return chosen

    @model_validator(mode="after")
    def _complete_points(self) -> Space:
        """Let each of `points_to_evaluate` be a whole configuration. The rules report those with mistakes."""
        if not self.points_to_evaluate:
            return self
        try:
            points = [complete_point(self._ordered, point) for point in self.points_to_evaluate]
        except ValueError:  # the conditions form a cycle: the rules report that
            return self
        if any(mistakes for _, mistakes in points):
            return self
        return self.model_copy(update={"points_to_evaluate": [point for point, _ in points]})

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Space:
        """Return the space of a stored study.

        Args:
            settings: what `study_options` gave to storage, `model_dump(mode="json")`. Keys that were added to the format
                later may be missing.

        Raises:
            SpaceError: this version of hpo cannot read the settings.
        """
        parameters = settings.get("parameters", {})
        if not isinstance(parameters, Mapping):
            raise SpaceError("this version of hpo cannot read the settings of the study: parameters is no mapping")
        data = {**settings, "parameters": {name: _undump_parameter(dump) for name, dump in parameters.items()}}
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problems = [p for path, details in group_by_key(error, data).items() for p in explain(path, details, cls)]
            text = "; ".join(f"{'.'.join(map(str, path)) or 'space'}: {text}" for path, text in problems)
            raise SpaceError(f"this version of hpo cannot read the settings of the study: {text}") from None

    # --- properties that depend on sampler, scheduler and trainable

    @property
    def is_default_trainable(self) -> bool:
        """Whether the search trains with hpo's own training loop, whose parameters and speed are known."""
        return self.command is None and self.trainable == DEFAULT_TRAINABLE

    @property
    def sampler_reason(self) -> str:
        """Why `auto` chose the sampler; empty if the file names one."""
        return self._sampler_reason

    @property
    def all_objectives(self) -> tuple[Objective, ...]:
        """The objectives, at least one, in the order of the file. The first one is that of `metric` and `direction`."""
        return tuple(self.objectives or [Objective(metric=self.metric, direction=self.direction)])

    @property
    def directions(self) -> tuple[Literal["maximize", "minimize"], ...]:
        """The direction of each objective."""
        return tuple(objective.direction for objective in self.all_objectives)

    @property
    def is_grid(self) -> bool:
        """Whether the search tries a finite list of configurations that is known before it starts."""
        return self.sampler.is_grid

    @property
    def learns_from_results(self) -> bool:
        """Whether the sampler chooses the next configuration from the results so far."""
        return self.sampler.learns

    @property
    def stops_trials_early(self) -> bool:
        """Whether a scheduler may prune trials."""
        return self.scheduler.stops_trials_early

    @property
    def saves_epochs(self) -> bool:
        """Whether a scheduler may prune trials without a replacement."""
        return self.stops_trials_early and self.population is None

    @property
    def population(self) -> int | None:
        """How many members train, if the scheduler replaces each trial that it stops; None for another scheduler."""
        return self.scheduler.population if self.scheduler.replaces_trials else None

    @property
    def saves_checkpoints(self) -> bool:
        """Whether trials have checkpoints: those of a script that uses no `{checkpoint_dir}` have none."""
        return self.command is None or uses_checkpoint_dir(self.command)

    @property
    def last_wait(self) -> int:
        """The last epoch after which a scheduler may let a trial wait, to train on from its checkpoint later; 0 for none."""
        if not (self.scheduler.halves and self.saves_checkpoints):
            return 0
        waits_once = self.scheduler.name == "asha" and not self.scheduler.promotes_trials
        return self.scheduler.min_epochs(self.max_epochs) if waits_once else self.max_epochs

    @property
    def has_conditions(self) -> bool:
        """Whether some parameters exist only for certain values of others (`when`)."""
        return any(parameter.when for parameter in self.parameters.values())

    @cached_property
    def total_trials(self) -> int | None:
        """The number of trials, or None if only the time budget ends the search. Of a population, the number of members."""
        if self.population is not None:
            return self.population
        return sum(1 for _ in self.planned_points()) if self.is_grid else self.budget.trials

    def planned_points(self) -> Iterator[Params]:
        """Yield the configurations of a grid, those to evaluate first, without those left out, up to the budget."""
        points = self.grid_points()
        if first := self.points_to_evaluate:
            known = {frozenset(point.items()) for point in first}
            points = itertools.chain(first, (point for point in points if frozenset(point.items()) not in known))
        if self._left_out:
            points = (point for point in points if self.config_key(point) not in self._left_out)
        return itertools.islice(points, self.budget.trials)

    def leaving_out(self, keys: Collection[str]) -> Space:
        """Return the same search without some points of its grid.

        Args:
            keys: of the configurations, see `config_key`.
        """
        space = self.model_copy()
        vars(space).pop("total_trials", None)  # cached
        space._left_out = frozenset(keys)  # noqa: SLF001 # a space, too
        return space

    @cached_property
    def named_keys(self) -> list[str]:
        """The keys of `points_to_evaluate`, in the order of the file."""
        return [self.config_key(point) for point in self.points_to_evaluate]

    def point_keys(self) -> set[str]:
        """Return the keys of the configurations of a grid, up to the budget; none for another search."""
        return {self.config_key(point) for point in self.planned_points()} if self.is_grid else set()

    def trainable_data(self, data_dir: Path) -> dict[str, Any]:
        """Return the `data` argument of the trainable."""
        return {**self.data.model_dump(), "data_dir": str(data_dir)}

    @property
    def study_options(self) -> dict[str, Any]:
        """The arguments of `storage.studies.open_study` for this search."""
        return {
            "name": self.name,
            "direction": self.directions,
            "fingerprint": self.fingerprint,
            "settings": self.model_dump(mode="json"),
            "total_trials": self.total_trials,
        }

    @property
    def file(self) -> Path | None:
        """The file that it was read from; None for the space of a stored study."""
        return None if self._document is None else self._document.path

    @contextmanager
    def locating_errors(self, *path: str | int, errors: tuple[type[Exception], ...] = (HpoError,)) -> Iterator[None]:
        """Prefix errors raised inside with the position of a key in the file."""
        try:
            yield
        except errors as error:
            position = "" if self._document is None else self._document.position(path)
            raise type(error)(f"{position}{error}") from None

    # --- identity

    @property
    def fingerprint(self) -> str:
        """The identity of the search: results with the same fingerprint are comparable.

        It covers everything that changes the value of a configuration or the set of configurations. Budget, resources,
        sampler and scheduler may change, but for pbt: the value of one of its trials is not that of its configuration alone.
        """
        identity = self.model_dump(
            include={"trainable", "metric", "direction", "max_epochs", "data", "parameters", "seed"}
        )
        for parameter in identity["parameters"].values():
            parameter.pop("default", None)  # only about earlier trials
            if parameter.get("when", False) is None:
                del parameter["when"]
        used = self._used({"constraints", "derived", "command", "report", "objectives"})
        population = {} if self.population is None else {"scheduler": self.scheduler.name}
        return _digest(identity | self.model_dump(include=used) | self._replicates | population)

    def config_key(self, params: Mapping[str, Scalar]) -> str:
        """Return the identity of a configuration: trainings with the same key differ at most in the number of epochs."""
        identity = {
            "params": dict(params),
            "data": self.data.model_dump(),
            "trainable": self.trainable,
            "seed": self.seed,
        }
        identity |= self.model_dump(include=self._used({"derived", "command", "report"}))
        return _digest(identity | self._replicates)

    def _used(self, names: set[str]) -> set[str]:
        """Return the names of the keys with a value. An unused key must not change identities from before it existed."""
        return {name for name in names if getattr(self, name)}

    @property
    def _replicates(self) -> dict[str, int]:
        return {"replicates": self.replicates} if self.replicates > 1 else {}

    # --- configurations

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the Optuna distribution of each parameter, in the order of the file."""
        return {name: parameter.distribution() for name, parameter in self.parameters.items()}

    def draw(self, trial: optuna.Trial) -> str:
        """Let Optuna suggest a configuration for a trial. Values that the trial already has are kept.

        Returns:
            The first constraint that the configuration violates; empty if it violates none.
        """
        params: Params = {}
        for name, parameter in self._ordered.items():
            if is_active(parameter, params):
                params[name] = parameter.suggest(trial, name)
        return self.broken_constraint(params)

    def find_misfit(self, params: Mapping[str, Scalar]) -> str:
        """Return why a configuration is none of this search, constraints apart; empty if it is one."""
        active: Params = {}
        for name, parameter in self._ordered.items():
            if is_active(parameter, active):
                if name not in params:
                    return f"it has no {name}"
                if not parameter.contains(params[name]):
                    return f"{name} cannot be {params[name]!r}"
                active[name] = params[name]
        return next((f"it has {name}, which is not active" for name in params if name not in active), "")

    def broken_constraint(self, params: Mapping[str, Scalar]) -> str:
        """Return the first constraint that a configuration breaks; empty if it breaks none."""
        return next((text for _, text in self._formulas.violations(params)), "")

    def grid_points(self) -> Iterator[Params]:
        """Yield every configuration that meets the constraints. A continuous range contributes its two ends."""
        return (params for params in iterate_grid(self._ordered) if not self._formulas.violations(params))

    def list_points(self, most: int) -> list[Params] | None:
        """Return every configuration that meets the constraints; None if there are more than `most`, or infinitely many."""
        count = count_grid(self.parameters, self.constraints, self.derived, self.max_epochs, most)
        return None if count is None else list(self.grid_points())

    def derive(self, params: Mapping[str, Scalar]) -> Params:
        """Return the derived values of a configuration."""
        return self._formulas.derive(params)

    def examples(self) -> Iterator[tuple[str, Scalar]]:
        """Yield (name, value) pairs that the trainable must accept.

        These are every choice, both ends of every range, and the derived values of a few random configurations.
        """
        for name, parameter in self.parameters.items():
            if isinstance(parameter, IntRange | FloatRange):
                yield from ((name, parameter.low), (name, parameter.high))
            else:
                yield from ((name, value) for value in parameter.grid_values())
        if self.derived:
            rng = random.Random(0)
            points = (sample_params(self._ordered, rng) for _ in range(RANDOM_POINTS))
            valid = (params for params in points if not self._formulas.violations(params))
            for params in itertools.islice(valid, 20):
                yield from self.derive(params).items()

    @cached_property
    def _ordered(self) -> dict[str, Parameter]:
        return {name: self.parameters[name] for name in sampling_order(self.parameters)}

    @cached_property
    def _formulas(self) -> Formulas:
        return Formulas(self.constraints, self.derived, self.max_epochs)


def _undump_parameter(dump: Any) -> Any:
    """Return a parameter as it is written in YAML, from its `model_dump`."""
    if not isinstance(dump, Mapping):
        return dump
    if set(dump) == {"value"}:
        return dump["value"]
    # null here means that the key was not given. As a value it could be a choice.
    return {key: value for key, value in dump.items() if value is not None or key not in {"default", "when"}}


def _digest(identity: object) -> str:
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- reading a file -----------------------------------------------------------------------------------------------


def known_spaces() -> list[str]:
    """Return the names of the spaces in search_spaces/, sorted."""
    return sorted(path.stem for path in SPACES_DIR.glob("*.yaml"))


def load_space(name_or_path: str, overrides: Sequence[str] = ()) -> Space:
    """Read and validate a search space.

    Args:
        name_or_path: the name of a file in search_spaces/ without its suffix, or the path of a YAML file.
        overrides: `KEY=VALUE` each, where the key is a dotted path and the value is YAML.

    Raises:
        SettingError: there is no such space; the message lists the known ones.
        SpaceError: the file or an override is invalid; the message has one line for each problem.
    """
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        path = SPACES_DIR / f"{name_or_path}.yaml"
        if not path.is_file():
            hint = nearest(name_or_path, known_spaces()) if known_spaces() else f"there are none in {SPACES_DIR}/"
            raise SettingError(f"there is no search space {name_or_path!r} in {SPACES_DIR}/: {hint}")
    document = Document(path)
    for override in overrides:
        document.override(override)
    document.data = without_nulls(Space, document.data)
    problems: list[Problem] = []
    if "name" in document.data:
        problems.append((("name",), f"a study has the name of its file, {path.stem!r}: leave name out"))
    if "@" in path.stem or not path.stem.isprintable():
        raise SettingError(
            f"rename {str(path)!r}: a study has the name of its file, which must not contain @, the sign before the number "
            "of a revision, or characters that cannot be printed"
        )
    try:
        space = Space.model_validate({**document.data, "name": path.stem})
        values = {field.alias or name: getattr(space, name) for name, field in Space.model_fields.items()}
    except ValidationError as error:
        problems += document.problems(error, Space)
        values = _validate_sections(document.data)
        _choose_sampler(values, document.data)
    problems += check_rules(ValidSections(values, document.data))
    if problems:
        raise document.error(problems)
    space._document = document  # noqa: SLF001 # this module defines it
    return space


def _validate_sections(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections that are valid alone, with defaults for the missing ones, and the valid parameters."""
    values: dict[str, Any] = {}
    for name, field in fields_by_key(Space).items():
        if name in data and name != "parameters":
            try:
                values[name] = _section_adapter(name).validate_python(data[name], strict=True)
            except ValidationError:
                continue
        elif name not in data and not field.is_required():
            values[name] = field.get_default(call_default_factory=True)
    if isinstance(data.get("parameters"), Mapping):
        values["parameters"] = {}
        for name, raw in list(data["parameters"].items())[:MAX_PARAMETERS]:
            try:
                values["parameters"][name] = _parameter_adapter().validate_python(raw)
            except ValidationError:
                continue
    return values


def _choose_sampler(values: dict[str, Any], data: Mapping[str, Any]) -> None:
    """Replace `auto` by its choice, or leave the sampler out if something that it depends on is invalid."""
    if isinstance(values.get("sampler"), AutoSampler):
        auto, parameters = values.pop("sampler"), values.get("parameters", {})
        needed = {"budget", "scheduler", "objectives", "constraints", "derived", "max_epochs"}
        if needed <= values.keys() and parameters and len(parameters) == len(data["parameters"]):
            points = partial(count_grid, parameters, values["constraints"], values["derived"], values["max_epochs"])
            count = len(values["objectives"] or [""])
            chosen = choose_sampler(auto, parameters, values["budget"], values["scheduler"], points, objectives=count)
            values["sampler"] = chosen.sampler


@cache
def _section_adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(fields_by_key(Space)[name].rebuild_annotation())


@cache
def _parameter_adapter() -> TypeAdapter[Parameter]:
    return TypeAdapter(Parameter)


def space_schema() -> dict[str, Any]:
    """Return the JSON Schema of a search-space file. Editors use it for completion and checks."""
    schema = Space.model_json_schema()
    del schema["properties"]["name"]  # the file's name, not a key in it
    schema["required"].remove("name")
    for section in (schema, *schema["$defs"].values()):
        required = section.get("required", ())
        for key, each in section["properties"].items():
            if key not in required and "const" not in each:
                section["properties"][key] = _or_null(each, schema["$defs"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Search space"}


def _or_null(key: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a key that has a default, for which null stands."""
    about = {name: value for name, value in key.items() if name in {"default", "description", "title"}}
    rest = {name: value for name, value in key.items() if name not in about}
    if "$ref" in rest:  # a key without a description has that of its section
        about = {"description": sections[rest["$ref"].rpartition("/")[2]]["description"], **about}
    alternatives, is_null = rest["anyOf"] if rest.keys() == {"anyOf"} else [rest], {"type": "null"}
    return {**about, "anyOf": alternatives if is_null in alternatives else [*alternatives, is_null]}
