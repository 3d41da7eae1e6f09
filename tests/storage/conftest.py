"""An open database and a study in it, on each backend in turn."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.database import Database, open_database
from storage.studies import Study
from tests.storage.builders import open_s


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without studies. Copying it is faster than creating the tables in each test."""
    path = tmp_path_factory.mktemp("template") / "hpo.db"
    open_database(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def database(url: str, sqlite_template: Path) -> Iterator[Database]:
    if url.startswith("sqlite:"):
        shutil.copy(sqlite_template, url.removeprefix("sqlite:///"))
    with open_database(url) as opened:
        yield opened


@pytest.fixture
def study(database: Database) -> Study:
    return open_s(database)
