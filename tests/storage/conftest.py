"""An open database and a study in it, on each backend in turn."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.database import Database, open_database
from storage.study import Study
from tests.storage.builders import open_s


@pytest.fixture
def database(url: str, empty_database: Path) -> Iterator[Database]:
    if url.startswith("sqlite:"):
        shutil.copy(empty_database, url.removeprefix("sqlite:///"))
    with open_database(url) as opened:
        yield opened


@pytest.fixture
def study(database: Database) -> Study:
    return open_s(database)
