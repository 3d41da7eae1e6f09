"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.processes import Driver


@pytest.fixture
def start_driver(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """`start_driver("space.yaml")` starts `hpo run space.yaml` in `tmp_path`. After the test no driver is left."""
    drivers: list[Driver] = []

    def start(*arguments: str | Path, **variables: str) -> Driver:
        drivers.append(Driver(tmp_path, len(drivers), *arguments, **variables))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()
