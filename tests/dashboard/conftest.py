"""A study as a run leaves it. It is built once; each test has a copy of its files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpo.paths import RunsDir
from storage.database import open_database
from storage.studies import find_study
from storage.study import Study
from tests.dashboard.builders import make_study


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(empty_database, folder)
    with open_database(RunsDir(folder).default_storage) as database:
        make_study(database, RunsDir(folder))
    return folder


@pytest.fixture
def runs_dir(tmp_path: Path) -> RunsDir:
    """The folder of a run. The fixture `database` is its default storage."""
    return RunsDir(tmp_path)


@pytest.fixture
def study(runs_dir: RunsDir, finished_runs: Path) -> Iterator[Study]:
    """The study of `make_study`."""
    shutil.copytree(finished_runs, runs_dir.root, dirs_exist_ok=True)
    with open_database(runs_dir.default_storage) as database:
        study = find_study(database, "search")
        assert study is not None
        yield study
