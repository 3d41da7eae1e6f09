"""A search on PostgreSQL: no process and no file shows the password, and the search survives a restart of the server."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from benchmarks.postgres import Postgres
from benchmarks.toy import hold_epochs
from tests.end_to_end.processes import Driver, chains, check_chains, count_epochs, rows

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.ray, pytest.mark.postgres]


@dataclass(frozen=True)
class Search:
    """A search that has ended, and observations of its processes while it ran.

    Attributes:
        url: the database, with the password.
        password: the password.
        processes: the command line and environment of the driver, and of each process that it started.
        leaks: files with the password in them, of Ray and of the run.
        file_count: how many files were read.
        output: everything that was printed.
    """

    url: str
    password: str
    processes: list[str]
    leaks: list[Path]
    file_count: int
    output: str


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres) -> Search:
    """Run a search; look at its processes and files in the middle, then restart the server under it."""
    folder = tmp_path_factory.mktemp("postgres")
    url, hold = postgres.create_database("searched"), folder / "hold"
    hold_epochs(hold, 3)
    driver = Driver(folder, 0, chains(folder, hold=str(hold)), HPO_STORAGE=url)
    try:
        driver.wait_until(lambda: count_epochs(url) >= 2 and driver.is_held(hold))
        children = driver.children()
        processes = [
            " ".join([*process.cmdline(), *process.environ().values()])
            for process in [psutil.Process(driver.pid), *children]
        ]
        files = [file for each in [*_ray_folders(children), folder] for file in each.rglob("*") if file.is_file()]
        leaks = [file for file in files if _holds(file, postgres.password)]

        postgres.stop(immediate=True)
        hold.unlink()
        driver.wait_until(lambda: "the database is unavailable" in driver.output)
        postgres.start()
        assert driver.wait() == 0, driver.output
    finally:
        driver.kill()
    leaks += [file for file in folder.rglob("*") if _holds(file, postgres.password)]
    return Search(url, postgres.password, processes, leaks, len(files), driver.output)


def _ray_folders(processes: list[psutil.Process]) -> set[Path]:
    words = (Path(word) for process in processes for word in process.cmdline() if "/hpo-ray-" in word)
    return {Path("/", *path.parts[1:3]) for path in words if path.parts[1] == "tmp"}


def _holds(file: Path, password: str) -> bool:
    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
        return password.encode() in file.read_bytes()
    return False


def test_no_process_gets_the_password(search: Search) -> None:
    assert "chains.yaml" in search.processes[0], "the driver"
    assert any("ray::TrialWorker" in process for process in search.processes)
    assert not any(search.password in process for process in search.processes)


def test_no_file_and_no_output_holds_the_password(search: Search) -> None:
    assert search.file_count > 10
    assert search.leaks == []
    assert search.password not in search.output
    provenance = rows(search.url, "SELECT CAST(provenance AS TEXT) FROM hpo_runs")
    assert len(provenance) == 1
    assert search.password not in str(provenance)


def test_a_restart_of_the_server_is_waited_out(search: Search) -> None:
    assert "the database is unavailable" in search.output
    check_chains(search.url)
