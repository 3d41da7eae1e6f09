"""Fixtures that write and load a search space."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpo.errors import SpaceError
from hpo.space.model import Space, load_space
from tests.space.examples import unmark

Write = Callable[[str], Path]
Load = Callable[..., Space]
ErrorOf = Callable[..., str]
CheckError = Callable[[str, list[str]], None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a search space with the name `space`."""

    def write(text: str) -> Path:
        path = tmp_path / "space.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def load(write: Write) -> Load:
    """Load a search space from YAML, with overrides."""
    return lambda text, *overrides: load_space(str(write(text)), overrides)


@pytest.fixture
def make(write: Write) -> Load:
    """Load a search space with the given parameters and other keys."""

    def make(parameters: dict[str, Any], **keys: Any) -> Space:
        space = {"sampler": "random", "max_epochs": 4, "budget": {"trials": 9}, "parameters": parameters}
        return load_space(str(write(json.dumps(space | keys))))  # JSON is YAML

    return make


@pytest.fixture
def error_of(write: Write) -> ErrorOf:
    """Load an invalid search space; return the message of the error."""

    def error_of(text: str, *overrides: str) -> str:
        path = write(text)
        with pytest.raises(SpaceError) as caught:
            load_space(str(path), overrides)
        return str(caught.value)

    return error_of


@pytest.fixture
def check_error(tmp_path: Path, error_of: ErrorOf) -> CheckError:
    """Load a search space with one mistake, marked by »; check that the message is one line with its position and texts."""

    def check_error(marked: str, fragments: list[str]) -> None:
        text, position = unmark(marked)
        error = error_of(text)
        assert error.startswith(f"{tmp_path}/space.yaml:{position}: ")
        assert "\n" not in error
        assert [fragment for fragment in fragments if fragment not in error] == []

    return check_error
