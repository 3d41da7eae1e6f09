"""A study as a run leaves it. It is built once; each test has a copy of its files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpo.paths import RunsDir
from storage.database import Database, open_database
from storage.studies import Study, find_study
from tests.dashboard.builders import make_study


@pytest.fixture(scope="session")
def empty_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty")
    open_database(RunsDir(folder).default_storage).close()
    return folder


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory, empty_runs: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(empty_runs, folder, dirs_exist_ok=True)
    with open_database(RunsDir(folder).default_storage) as database:
        make_study(database, RunsDir(folder))
    return folder


@pytest.fixture
def runs_dir(tmp_path: Path) -> RunsDir:
    return RunsDir(tmp_path)


@pytest.fixture
def database(runs_dir: RunsDir, empty_runs: Path) -> Iterator[Database]:
    """A database without studies."""
    shutil.copytree(empty_runs, runs_dir.root, dirs_exist_ok=True)
    with open_database(runs_dir.default_storage) as database:
        yield database


@pytest.fixture
def study(runs_dir: RunsDir, finished_runs: Path) -> Iterator[Study]:
    """The study of `make_study`."""
    shutil.copytree(finished_runs, runs_dir.root, dirs_exist_ok=True)
    with open_database(runs_dir.default_storage) as database:
        study = find_study(database, "search")
        assert study is not None
        yield study
