"""The JSON Schema, which editors use for completion, accepts and refuses what the models do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import jsonschema  # type: ignore[import-untyped]
import pytest
from ruamel.yaml import YAML

from hpo.errors import SpaceError
from hpo.run import main
from hpo.space.model import Space, load_space, space_schema
from hpo.space.sections import Sampler
from tests.factories import ROOT
from tests.space.examples import FULL

SPACES = sorted((ROOT / "search_spaces").glob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(space_schema())


def as_json(text: str) -> Any:
    return json.loads(json.dumps(YAML(typ="safe", pure=True).load(text)))


def errors(text: str) -> list[Any]:
    return list(VALIDATOR.iter_errors(as_json(text)))


def test_the_committed_schema_is_generated_from_the_models() -> None:
    committed = (ROOT / "search_spaces/schema.json").read_text()
    assert json.loads(committed) == space_schema(), "run: hpo schema > search_spaces/schema.json"


def test_the_command_line_prints_the_committed_schema(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["hpo", "schema"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == (ROOT / "search_spaces/schema.json").read_text()


def test_the_schema_is_valid_json_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(space_schema())


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_each_shipped_space_names_the_schema_and_conforms_to_it(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    assert errors(text) == []


SHORT_FORMS = [
    FULL,
    "sampler: tpe\nscheduler: asha\nmax_epochs: 2\nbudget: {time: 90}\nparameters: {a: 1, b: x, c: null, d: true, e: [a]}",
    "sampler: {name: gp}\nmax_epochs: 2\nbudget: {time: 1d}\nparameters: {a: {choices: [1]}}",
    "sampler: grid\nmax_epochs: 2\ncheckpoints: {keep: 3}\nparameters: {a: 1}",
    "scheduler:\nwarm_start:\nbudget:\nmax_epochs: 2\ncheckpoints: {keep: null}\nparameters: {a: 1}",
    "sampler: {name: grid, seed: null}\nmax_epochs: 2\nobjectives:\nparameters: {a: 1}",
    "sampler: grid\ntrial_timeout: 1.5\nmax_epochs: 2\nresources: {gpu: 0.5}\nparameters: {a: {type: int, low: 1, high: 2}}",
]


@pytest.mark.parametrize("text", SHORT_FORMS, ids=range(len(SHORT_FORMS)))
def test_every_short_form_is_valid_for_the_schema_and_for_the_models(tmp_path: Path, text: str) -> None:
    assert errors(text) == []
    path = tmp_path / "space.yaml"
    path.write_text(text)
    load_space(str(path))


HEAD = "max_epochs: 2\nbudget: {trials: 2}\n"
WRONG = [
    HEAD + "sampler: tpe",
    HEAD + "sampler: tpee\nparameters: {a: 1}",
    HEAD + "sampler: {name: random, n_startup_trials: 1}\nparameters: {a: 1}",
    HEAD + "sampler: {name: tpe, n_startup_trials: many}\nparameters: {a: 1}",
    HEAD + "sampler: tpe\nscheduler: ash\nparameters: {a: 1}",
    HEAD + "sampler: tpe\nparameters: {}",
    HEAD + "sampler: tpe\nparameters: {a: []}",
    HEAD + "sampler: tpe\nparameters: {a: {type: int, low: 1}}",
    HEAD + "sampler: tpe\nparameters: {a: {type: int, low: 1, high: 2, lgo: true}}",
    HEAD + "sampler: tpe\nparameters: {a: {type: float, low: 1, high: x}}",
    HEAD + "sampler: tpe\nparameters: {a: {type: categorical, choices: [[1]]}}",
    HEAD + "sampler: tpe\nparameters: {a: 1}\nmetrc: x",
    HEAD + "sampler: tpe\nparameters: {a: 1}\nname: x",
    HEAD + "sampler: tpe\nparameters: {a: 1}\nseed: -1",
    HEAD + "sampler: tpe\nparameters: {a: 1}\nconstraints: a < 1",
    HEAD + "sampler: tpe\nparameters: {a: 1}\ntrial_timeout: 4 hours",
    HEAD + "sampler: tpe\nparameters: {a: 1}\ntrainable: my_module",
    HEAD + "sampler: tpe\nparameters: {a: 1}\ncheckpoints: {keep: best}",
    HEAD + "sampler: tpe\nparameters: {a: 1}\ncheckpoints: {keep: 0}",
    HEAD + "sampler: tpe\nparameters: {a: 1}\nobjectives: [{metric: a, direction: null}]",
    HEAD + "sampler: tpe\nparameters: {a: 1}\nbudgets: null",
    HEAD + "sampler: tpe\nparameters: null",
    HEAD.replace("2\n", "null\n", 1) + "sampler: tpe\nparameters: {a: 1}",
]


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_an_invalid_file_is_refused_by_the_schema_and_by_the_models(tmp_path: Path, text: str) -> None:
    assert errors(text)
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(SpaceError):
        load_space(str(path))


def test_every_key_has_a_description() -> None:
    schema = space_schema()
    objects = [schema, *(found for found in schema["$defs"].values() if found["type"] == "object")]
    assert len(objects) > 10
    for found in objects:
        for name, key in found["properties"].items():
            # A key without its own description has that of its section.
            section = schema["$defs"][key["$ref"].rpartition("/")[2]] if "$ref" in key else {}
            assert key.get("description") or section.get("description"), f"{found['title']}.{name}"


def test_the_schema_lists_the_names_of_all_samplers() -> None:
    union = get_args(Sampler)[0]
    names = [get_args(model.model_fields["name"].annotation)[0] for model in get_args(union)]
    assert space_schema()["properties"]["sampler"]["anyOf"][0]["enum"] == names
    assert "name" in Space.model_fields
    assert "name" not in space_schema()["properties"]
