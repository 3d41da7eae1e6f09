"""Fixtures of all test packages, and the order in which tests run.

`uv run pytest` runs test files in parallel (pytest-xdist, `--dist loadfile`): all tests of a file run in one worker, one
after another, so a fixture of a module is built once. Each worker has its own folders, its own ports and, if one of its
tests needs it, its own PostgreSQL server, which a test may stop and start. `--exhaustive` adds the tests with this
marker, and `--every 4` leaves three of four tests out.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything imports torch or numpy: the workers share the cores, and the order of every sum is fixed.
os.environ["OMP_NUM_THREADS"] = "1"
# Hundreds of processes import hpo; images of Docker set this variable, and then each of them compiles it again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from benchmarks.postgres import Postgres
    from storage.database import Database
    from tests.factories import HpoHere
    from tests.s3 import S3Server

sys.dont_write_bytecode = False  # this process has read the variable already

MEMORY_BYTES = 8 * 2**30  # free ones, of the folder in memory, for the databases of all workers

_numbers = itertools.count()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run the tests with the marker `exhaustive`, too")
    parser.addoption("--every", type=int, default=1, metavar="N", help="run each Nth test of each file only")


@pytest.hookimpl(trylast=True)  # what `-m` and `-k` leave out does not count
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the options exclude, and put the files with the longest tests first: the workers end together."""
    numbers: defaultdict[Path, Iterator[int]] = defaultdict(itertools.count)
    chosen: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        is_chosen = config.getoption("exhaustive") or not _is_exhaustive(item)
        is_chosen = is_chosen and next(numbers[item.path]) % config.getoption("every") == 0
        (chosen if is_chosen else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen

    seconds: defaultdict[Path, float] = defaultdict(float)
    for item in items:
        seconds[item.path] += _guess_seconds(item)
    items.sort(key=lambda item: -seconds[item.path])  # stable: the order within a file stays


def pytest_collection_finish() -> None:
    """Leave what the collection has imported out of garbage collections, which take half of the time of the quick tests."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let the process end as usual: torch's extensions would report frozen objects as leaks."""
    gc.unfreeze()


def _is_exhaustive(item: pytest.Item) -> bool:
    backends = [marker.kwargs.get("on") for marker in item.iter_markers("exhaustive")]
    return None in backends or ("postgresql" in backends and item.get_closest_marker("postgres") is not None)


def _guess_seconds(item: pytest.Item) -> float:
    ray = item.get_closest_marker("ray")
    if ray is not None:
        return 30.0 * int(ray.kwargs.get("starts", 1))
    return 3.0 if item.get_closest_marker("slow") else 0.1


@pytest.fixture(scope="session", autouse=True)
def compiled_statements() -> Iterator[None]:
    """Let all engines share the statements that they have compiled: nearly every test opens its own database."""
    from sqlalchemy.engine import Engine
    from sqlalchemy.util import LRUCache

    caches: defaultdict[type, LRUCache[Any, Any]] = defaultdict(lambda: LRUCache(1000))
    shared = property(lambda engine: caches[type(engine.dialect)], lambda _engine, _cache: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_compiled_cache", shared, raising=False)
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL 18. A test that stops it must start it again."""
    from benchmarks.postgres import Postgres

    # In memory where there is enough of it: hundreds of databases have 300 files each.
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > MEMORY_BYTES
    folder = Path(tempfile.mkdtemp(prefix="hpo-test-pg-", dir=memory if has_room else None))
    server = Postgres(folder)
    yield server
    server.stop(immediate=True)  # what it has not written is deleted
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def template(postgres: Postgres) -> str:
    """The name of a database without studies, on the server. Copying it is faster than creating the tables in each test."""
    from storage.database import open_database

    open_database(postgres.create_database("template")).close()
    return "template"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A running S3 server. A test that stops it must start it again."""
    from tests.s3 import S3Server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def bucket_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty folder in a new bucket, whose server this process finds."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server.create_bucket()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=[pytest.mark.postgres, pytest.mark.slow])])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database on each backend in turn. It has no tables yet, unless the test takes `database`, too."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/hpo.db"
    server: Postgres = request.getfixturevalue("postgres")
    source = request.getfixturevalue("template") if "database" in request.fixturenames else "template1"
    return server.create_database(f"test_{next(_numbers)}", f"TEMPLATE {source} STRATEGY file_copy")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite database without studies. Copying it is faster than creating the tables in each test."""
    from storage.database import open_database

    path = tmp_path_factory.mktemp("empty") / "hpo.db"
    open_database(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> Iterator[Database]:
    """An open database without studies, `tmp_path / "hpo.db"`."""
    from storage.database import open_database

    shutil.copy(empty_database, tmp_path)
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as opened:
        yield opened


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Train with one thread: trials set the number of threads of the process that they run in."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def few_test_images() -> Iterator[None]:
    """Score the first 100 of the 500 test images of the sample, to save time."""
    from hpo.train.data import load
    from hpo.train.fashion_mnist import read_sample

    train, (images, labels) = read_sample()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hpo.train.data.read_sample", lambda: (train, (images[:100], labels[:100])))
        load.cache_clear()
        yield
    load.cache_clear()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A real Chromium."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium is installed")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def hpo_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[HpoHere]:
    """`hpo_here(folder, "report", "grid")` runs `hpo report grid` in a folder, in this process: no imports are repeated."""
    from hpo.run import main
    from tests.factories import Finished

    variables = (
        "HPO_STORAGE",
        "HPO_STORAGE_FILE",
        "HPO_CHECKPOINTS",
        "HPO_DASHBOARD_READER_PASSWORD",
        "HPO_DATA_DIR",
        "HPO_ON_FINISH",
        "HPO_DASHBOARD_PASSWORD",
        "PGPASSWORD",
        "RAY_ADDRESS",
    )
    for name in variables:
        monkeypatch.delenv(name, raising=False)  # the command removes some of them; they come back after the test
    umask = os.umask(0o022)
    os.umask(umask)

    def run(folder: Path, *arguments: str, **variables: str) -> Finished:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["hpo", *arguments])
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Finished(ended.value.code, printed.out, printed.err)

    yield run
    os.umask(umask)
