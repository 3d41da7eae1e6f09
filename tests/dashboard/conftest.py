"""A study as a run leaves it, and its files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hpo.paths import RunsDir
from storage.database import Database, open_database
from storage.studies import Study
from tests.dashboard.builders import make_study


@pytest.fixture
def runs_dir(tmp_path: Path) -> RunsDir:
    return RunsDir(tmp_path)


@pytest.fixture
def database(runs_dir: RunsDir) -> Iterator[Database]:
    with open_database(runs_dir.default_storage) as database:
        yield database


@pytest.fixture
def study(database: Database, runs_dir: RunsDir) -> Study:
    return make_study(database, runs_dir)
