"""A SQLite database for each test, and one finished grid for tests that only read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpo.report.results import Results
from storage.database import Database, open_database
from tests.report.studies import finish_grid_in


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables, to copy: creating them takes longer than most tests."""
    folder = tmp_path_factory.mktemp("empty")
    with open_database(f"sqlite:///{folder}/hpo.db"):
        pass
    return folder / "hpo.db"


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> Iterator[Database]:
    shutil.copyfile(empty_database, tmp_path / "hpo.db")
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as opened:
        yield opened


@pytest.fixture(scope="session")
def grid_results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of a finished grid. Its database is not to be changed."""
    return finish_grid_in(tmp_path_factory.mktemp("grid"))


@pytest.fixture
def undrawn_png(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the slowest part of a report, for tests that do not look at the PNG files."""
    monkeypatch.setattr("hpo.report.png_figures.to_png", lambda _: b"")
