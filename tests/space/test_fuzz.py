"""Any file loads, or fails quickly with an error that has its position. Hypothesis searches for files that do neither."""

from __future__ import annotations

import copy
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from hpo.errors import HpoError
from hpo.space.document import Document
from hpo.space.model import load_space
from tests.factories import ROOT
from tests.space.examples import FULL

CPU_SECONDS = 5  # for one load; most take 10 ms, but a machine may be slow and busy

TEXTS = [FULL, *((ROOT / f"search_spaces/{name}.yaml").read_text() for name in ("grid", "quick", "extended", "recipe"))]
FRAGMENTS = [
    "\t", "\n", " ", ":", "- ", "{", "}", "[", "]", ",", "&a ", "*a", "*stem", "!!int ", "!x ", "|\n", ">\n", "'", '"', "#",
    "%", "@", "`", "? ", "---\n", "...\n", "<<: *stem\n", "1e999", "-1", "0", ".nan", ".inf", "9" * 400, "true", "null",
    "\u2028", "\x00", "\ufeff", "\ud7ff", "é", "{lr}", "when: ", "low: ", "~", "2024-01-01", "lr", "grid", "cmaes", "\r",
]  # fmt: skip

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 10**30, -(10**400), 2**53, 1e308, -1e308, 5e-324, float("inf"), float("nan"), 1e-300])
    | st.floats()
    | st.sampled_from(
        ["", "sgd", "lr", "grid", "qmc", "gp", "cmaes", "nsga2", "tpe", "pbt", "median", "lr < 0", "1/0", "4h"]
    )
    | st.text(max_size=12)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "low", "high", "step", "log", "choices", "when", "default", "name", "lr", "a"])
            | st.text(max_size=5),
            inner,
            max_size=5,
        )
        | st.fixed_dictionaries({"type": st.sampled_from(["int", "float"]), "low": inner, "high": inner, "step": inner})
        | st.fixed_dictionaries({"choices": inner, "when": inner})
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "space.yaml"


@pytest.fixture(scope="module")
def documents(file: Path) -> list[dict[str, Any]]:
    """The texts as values."""
    found = []
    for text in TEXTS:
        file.write_text(text)
        found.append(Document(file).data)
    return found


def check(file: Path, text: str) -> bool:
    """Load a file. Return whether it is valid. A valid space must have configurations."""
    file.write_bytes(text.encode(errors="surrogatepass"))
    started = time.process_time()
    try:
        space = load_space(str(file))
    except HpoError as error:
        if not str(error).startswith(str(file)) or len(str(error)) > 100_000:
            pytest.fail(f"the error has no position, or is too long: {error}")
        return False
    finally:
        assert time.process_time() - started < CPU_SECONDS
    json.dumps([space.fingerprint, space.model_dump(mode="json")]).encode()
    if space.is_grid:
        assert set(next(space.grid_points())) <= set(space.distributions())
    else:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        space.draw(study.ask())
    return True


def all_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a value."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from all_paths(item, (*path, key))


def write_yaml(value: Any) -> str:
    stream = io.StringIO()
    YAML(typ="safe", pure=True).dump(value, stream)
    return stream.getvalue()


SETTINGS = settings(
    max_examples=300,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_the_files_below_are_valid_before_they_are_changed(file: Path, text: str) -> None:
    assert check(file, text)


@pytest.mark.slow
@SETTINGS
@given(data=st.data())
def test_a_file_with_a_random_change_of_its_text_loads_or_is_refused(file: Path, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(TEXTS))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        removed = data.draw(st.sampled_from([0, 0, 1, 3, 40]))
        new = data.draw(st.sampled_from(FRAGMENTS) | st.text(max_size=4))
        text = text[:start] + new + text[start + removed :]
    check(file, text)


@pytest.mark.slow
@SETTINGS
@given(data=st.data())
def test_a_file_with_a_random_change_of_its_values_loads_or_is_refused(
    file: Path, documents: list[dict[str, Any]], data: st.DataObject
) -> None:
    document = copy.deepcopy(data.draw(st.sampled_from(documents)))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(all_paths(document))))
        parent: Any = document
        for key in path[:-1]:
            parent = parent[key]
        match data.draw(st.sampled_from(["replace", "replace", "delete", "rename"])):
            case "replace":
                parent[path[-1]] = data.draw(values)
            case "delete":
                del parent[path[-1]]
            case "rename" if isinstance(parent, dict):
                parent[data.draw(st.text(max_size=8) | st.sampled_from(["lr", "lrr", "when"]))] = parent.pop(path[-1])
        if not document:
            break
    check(file, write_yaml(document))
