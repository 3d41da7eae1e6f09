"""search_spaces/README.md names every key of the format, and its examples load."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from hpo.errors import SpaceError
from hpo.space.command import PLACEHOLDERS
from hpo.space.continuation import Continuation
from hpo.space.expressions import FUNCTIONS
from hpo.space.messages import fields_by_key
from hpo.space.model import Space, load_space
from hpo.space.objectives import Objective
from hpo.space.parameters import Choices, FloatRange, IntRange
from hpo.space.sections import Budget, Checkpoints, Data, Resources, Sampler, Scheduler
from hpo.train.params import OPTIMIZERS, PRECISIONS, SCHEDULES, STEMS, TrainParams, read_params
from tests.factories import ROOT

README = (ROOT / "search_spaces/README.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
YAML_BLOCKS = [text for language, text in BLOCKS if language == "yaml"]
SHIPPED = sorted(path.name for path in (ROOT / "search_spaces").glob("*.yaml"))

# Completes a block that shows only some keys.
REST = {
    "sampler": "sampler: tpe",
    "max_epochs": "max_epochs: 20",
    "budget": "budget: {trials: 4}",
    "parameters": "parameters: {batch_size: [64, 128, 256], lr: {type: float, low: 1e-4, high: 1.0, log: true}}",
}


def write_space(folder: Path, block: str) -> Path:
    """Write a block of the README to a file, completed to a whole space."""
    missing = [line for key, line in REST.items() if not re.search(rf"^{key}:", block, re.MULTILINE)]
    path = folder / "mistakes.yaml"  # the name in the README's error messages
    path.write_text("\n".join([block, *missing]))
    return path


def annotated_block() -> str:
    (text,) = [text for text in YAML_BLOCKS if text.startswith("# yaml-language-server: $schema=schema.json\n")]
    return text


def wrong_block() -> str:
    (text,) = [text for text in YAML_BLOCKS if "grdi" in text]
    return text


def keys_of(space: Space) -> set[str]:
    """Return the keys that a file has."""
    return {Space.model_fields[name].alias or name for name in space.model_fields_set}


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that a type names, or only itself."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for member in get_args(annotation):
        yield from models_in(member)


def test_the_annotated_file_loads_and_uses_every_key_that_is_built(tmp_path: Path) -> None:
    path = tmp_path / "annotated.yaml"
    path.write_text(annotated_block())
    space = load_space(str(path))
    missing = fields_by_key(Space).keys() - keys_of(space)
    assert missing == {"trainable", "command", "report", "objectives"}
    used = {type(parameter).__name__ for parameter in space.parameters.values()}
    assert {"Fixed", "Choices", "FloatRange"} <= used
    assert space.parameters["momentum"].when == {"optimizer": "sgd"}
    for name, value in space.examples():
        read_params({name: value})  # the built-in training accepts every parameter


@pytest.mark.parametrize("block", [block for block in YAML_BLOCKS if "grdi" not in block])
def test_every_example_loads(tmp_path: Path, block: str) -> None:
    space = load_space(str(write_space(tmp_path, block)))
    keys = set(re.findall(r"^(\w+):", block, re.MULTILINE))
    assert keys
    assert keys <= keys_of(space)


def test_the_file_with_mistakes_gives_the_errors_that_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shown,) = [text for language, text in BLOCKS if not language]
    (tmp_path / "mistakes.yaml").write_text(wrong_block())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpaceError) as error:
        load_space("mistakes.yaml")
    assert str(error.value) == shown.rstrip("\n")


def test_the_overrides_that_are_shown_apply() -> None:
    (command,) = re.findall(r"`(hpo run grid --set .*?)`", README)
    overrides = re.findall(r"--set (\S+)", command)
    assert len(overrides) == 2
    space = load_space(str(ROOT / "search_spaces/grid.yaml"), overrides)
    assert space.max_epochs == 2
    assert next(space.grid_points())["lr"] == 0.02


@pytest.mark.parametrize(
    "model",
    [
        Space,
        Data,
        Budget,
        Resources,
        Checkpoints,
        Continuation,
        Objective,
        Choices,
        IntRange,
        FloatRange,
        *models_in(Sampler),
        *models_in(Scheduler),
    ],
    ids=lambda model: model.__name__,
)
def test_every_key_is_named(model: type[BaseModel]) -> None:
    section = {
        Data: "data.",
        Budget: "budget.",
        Resources: "resources.",
        Checkpoints: "checkpoints.",
        Continuation: "continue.",
    }.get(model, "")
    names = fields_by_key(model).keys() - ({"name"} if model is Space else set())  # the file gives the study its name
    assert {name for name in names if not re.search(rf"`{section}{name}(:.*?)?`", README)} == set()


@pytest.mark.parametrize("annotation", [Sampler, Scheduler], ids=["sampler", "scheduler"])
def test_every_name_of_a_sampler_or_scheduler_is_listed(annotation: Any) -> None:
    names = [name for model in models_in(annotation) for name in get_args(model.model_fields["name"].annotation)]
    assert names
    assert {name for name in names if f"`{name}`" not in README and f"`scheduler: {name}`" not in README} == set()


@pytest.mark.parametrize("model", [*models_in(Sampler), *models_in(Scheduler)], ids=lambda model: model.__name__)
def test_every_option_is_listed_with_its_default(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        if name in {"name", "seed"} or field.is_required() or field.default is None:
            continue
        default = f"`{field.default}`" if isinstance(field.default, str) else str(field.default).lower()
        assert re.search(rf"`{name}` \({re.escape(default)}[;)]", README), f"{name} of {model.__name__}: {default}"


def test_every_parameter_of_the_built_in_training_is_listed_with_its_default() -> None:
    for field in fields(TrainParams):
        default = f"`{field.default}`" if isinstance(field.default, str) else str(field.default).lower()
        assert f"| `{field.name}` | {default} |" in README
    assert {value for value in (*OPTIMIZERS, *PRECISIONS, *STEMS, *SCHEDULES) if f"`{value}`" not in README} == set()


def test_every_placeholder_and_every_function_is_listed() -> None:
    assert {name for name in PLACEHOLDERS if f"`{{{name}}}`" not in README} == set()
    assert f"`{' '.join(FUNCTIONS)}`" in README


def test_every_key_that_is_not_built_is_listed_as_such() -> None:
    (sentence,) = [line for line in README.splitlines() if line.startswith("A file that uses what is not built yet")]
    for name in ("scheduler: pbt",):
        assert f"`{name}`" in sentence


@pytest.mark.parametrize("name", SHIPPED)
def test_every_file_that_ships_is_listed(name: str) -> None:
    assert f"[{name}]({name})" in README
