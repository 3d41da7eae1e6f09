"""Many drivers on one PostgreSQL: trials a second, how long a claim waits, connections, and how evenly trials are shared.

    uv run python -m benchmarks.drivers --drivers 1 4 16 64 --trials 1000

A driver is a process with what `hpo run` uses of storage, without Ray: a `TrialCoordinator` on a `Run`, with one slot. Its
trials are those of `benchmarks.toy:chain`, which compute nothing. Storage sees each driver as on another machine. All
drivers of a row are ready before the first one claims. The server flushes commits to the disk. At the end, plain SQL checks
that each configuration was trained once, that the budget is exact, and that each trial has all of its epochs. With
--device-seconds, only `budget.gpu_hours` ends the search, and the table shows how far the drivers overshoot it. Prints a
table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import psycopg
import sqlalchemy as sa

from benchmarks.guarantees import Expected, read_rows, violations
from benchmarks.postgres import Postgres
from benchmarks.toy import chain
from hpo.paths import RunsDir
from hpo.search.coordinator import TrialCoordinator
from hpo.search.earlier.continuation import open_continued, plan_continuation
from hpo.search.listener import NullListener
from hpo.search.messages import TrialReport
from hpo.search.runs import open_run
from hpo.search.slots import Slots
from hpo.space.model import Space, load_space
from storage import lease
from storage.database import Database, open_database
from storage.studies import find_revision

START_SECONDS = 300.0  # until all drivers are ready
LOOK_SECONDS = 0.05  # between two looks at the server's connections
NAME = "driver-"  # the start of the names by which the server knows the connections of drivers
POINTS = 10**6  # values of x, unless the search is a grid


@dataclass(frozen=True)
class Load:
    """What the drivers of a row do.

    Attributes:
        sampler: its name.
        drivers: how many share the study.
        trials: the budget of all together.
        epochs: of a trial.
        epoch_seconds: the duration of an epoch.
        device_seconds: a budget of device time instead of one of trials; 0 for none.
    """

    sampler: str
    drivers: int
    trials: int
    epochs: int = 1
    epoch_seconds: float = 0.0
    device_seconds: float = 0.0

    def write_space(self, folder: Path) -> Path:
        """Write the search space."""
        x: Any = {"type": "int", "low": 1, "high": POINTS}
        budget: dict[str, Any] = {"trials": self.trials}
        if self.device_seconds:
            budget = {"gpu_hours": self.device_seconds / 3600}
        elif self.sampler == "grid":
            x, budget = list(range(1, self.trials + 1)), {}
        space = {
            "sampler": self.sampler,
            "trainable": "benchmarks.toy:chain",
            "metric": "value",
            "max_epochs": self.epochs,
            "budget": budget,
            "parameters": {"x": x},
        }
        path = folder / "drivers.yaml"
        path.write_text(json.dumps(space))  # JSON is YAML
        return path


@dataclass(frozen=True)
class Driven:
    """What one driver did.

    Attributes:
        trials: how many it ended.
        waits: seconds of each claim that returned a trial.
        locks: seconds of each statement that locked the study.
        cpu_seconds: of its process, from its first claim on.
        error: why it ended early; empty if it did not.
    """

    trials: int = 0
    waits: list[float] = field(default_factory=list)
    locks: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0
    error: str = ""


# --- a driver ---------------------------------------------------------------------------------------------------------


def drive(load: Load, path: Path, url: str, barrier: Any, results: Any) -> None:
    """Be one driver: get ready, wait for the others, run trials until the search is done, and send a `Driven`."""
    os.chdir(path.parent)
    setattr(lease, "host_id", lambda: url)  # noqa: B010 # as on another machine; mypy forbids to assign a function
    driven = Driven(error="it did not start")
    try:
        space = load_space(str(path))
        with open_database(url) as database, _coordinator(space, database, path.parent) as coordinator:
            driven = _drive(load, database, coordinator, barrier)
    except Exception as error:  # noqa: BLE001 # reported by the benchmark
        driven = Driven(error=f"{type(error).__name__}: {error}")
        barrier.abort()
    results.put(driven)


@contextlib.contextmanager
def _coordinator(space: Space, database: Database, folder: Path) -> Iterator[TrialCoordinator]:
    runs_dir = RunsDir(folder)
    before = find_revision(database, space.name, space.fingerprint)
    study, continuation = open_continued(database, plan_continuation(space, before, database, runs_dir), runs_dir)
    with open_run(continuation, study, {}) as run:
        coordinator = TrialCoordinator(
            space, run, Slots(1, 1.0, 0.0), data={}, runs_dir=runs_dir, listener=NullListener()
        )
        try:
            yield coordinator
        finally:
            coordinator.release_all()
            if coordinator.error is not None:
                raise coordinator.error


def _drive(load: Load, database: Database, coordinator: TrialCoordinator, barrier: Any) -> Driven:
    locks = _time_locks(database)
    waits: list[float] = []
    trials = 0
    barrier.wait(START_SECONDS)
    cpu_seconds = time.process_time()
    while not coordinator.is_done:
        name = f"t{len(waits)}"
        asked = time.monotonic()
        spec = coordinator.next_trial(name)
        if spec is None:
            time.sleep(0.02)  # other drivers run the last trials
            continue
        waits.append(time.monotonic() - asked)
        coordinator.on_started(name)
        params = {**spec.params, "epoch_seconds": load.epoch_seconds}
        for report in chain(params, data={}, seed=spec.seed, max_epochs=spec.max_epochs, device="cpu"):
            ending = coordinator.on_report(name, TrialReport(report.epoch, report.metrics))
            if ending is not None:
                trials += report.epoch == spec.max_epochs
                coordinator.on_saved(name, "")
                break
    return Driven(trials, waits, locks, time.process_time() - cpu_seconds)


def _time_locks(database: Database) -> list[float]:
    """Return a list that gets the seconds of each statement that locks the study: a round trip, and the wait for others."""
    seconds: list[float] = []

    def before(_connection: Any, _cursor: Any, statement: str, _values: Any, context: Any, _many: bool) -> None:
        context.started = time.monotonic() if "FOR NO KEY UPDATE" in statement else None

    def after(_connection: Any, _cursor: Any, _statement: str, _values: Any, context: Any, _many: bool) -> None:
        if context.started is not None:
            seconds.append(time.monotonic() - context.started)

    sa.event.listen(database.engine, "before_cursor_execute", before)
    sa.event.listen(database.engine, "after_cursor_execute", after)
    return seconds


# --- the server -------------------------------------------------------------------------------------------------------


class Watch:
    """Looks at the connections of a server until it is closed."""

    def __init__(self, url: str) -> None:
        self.most = 0  # connections of all drivers
        self.most_of_one = 0
        self.counts: list[int] = []  # of all drivers, at each look since `reset`
        self.waiting: list[int] = []  # those that wait for a lock, at each look since `reset`
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(url,), daemon=True)
        self._thread.start()

    def reset(self) -> None:
        """Forget what was seen."""
        self.most, self.most_of_one, self.counts, self.waiting = 0, 0, [], []

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        self._thread.join()

    def _look(self, url: str) -> None:
        query = f"SELECT application_name, wait_event_type FROM pg_stat_activity WHERE application_name LIKE '{NAME}%'"
        with psycopg.connect(url, autocommit=True) as connection:
            while not self._closed.wait(LOOK_SECONDS):
                rows = connection.execute(query).fetchall()
                self.counts.append(len(rows))
                self.most = max(self.most, len(rows))
                self.most_of_one = max(self.most_of_one, *Counter(name for name, _ in rows).values(), 0)
                self.waiting.append(sum(kind == "Lock" for _, kind in rows))


def server_cpu_seconds(server: Postgres) -> float:
    """Return the CPU time that all processes of a server have used."""
    first = psutil.Process(int((server.folder / "postmaster.pid").read_text().split()[0]))
    times = first.cpu_times()
    seconds = times.user + times.system + times.children_user + times.children_system  # the latter of those that ended
    for child in first.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            seconds += child.cpu_times().user + child.cpu_times().system
    return float(seconds)


# --- a row of the table -----------------------------------------------------------------------------------------------


def measure(server: Postgres, load: Load) -> dict[str, Any]:
    """Run a search with all of its drivers in a new database; return its figures, with what is wrong in `mistakes`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["benchmarks.guarantees", "benchmarks.postgres", "hpo.search.coordinator", "storage.run"]
    )
    url = server.create_database(f"drivers_{time.monotonic_ns()}")
    with tempfile.TemporaryDirectory(prefix="drivers-") as name:
        path = load.write_space(Path(name))
        open_database(url).close()  # creates the tables
        watch = Watch(server.url())
        barrier, results = context.Barrier(load.drivers + 1), context.Queue()
        processes: list[ForkServerProcess] = []
        for i in range(load.drivers):
            arguments = (load, path, f"{url}?application_name={NAME}{i}", barrier, results)
            processes.append(context.Process(target=drive, args=arguments))
            processes[-1].start()
        try:
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait(START_SECONDS)
            opening = watch.most
            watch.reset()
            server_seconds = server_cpu_seconds(server)
            driven = [results.get(timeout=600.0) for _ in processes]
            time.sleep(0.5)  # the server's processes for the drivers end
            server_seconds = server_cpu_seconds(server) - server_seconds
        finally:
            watch.close()
            for process in processes:
                process.join(10.0)
                process.kill()
    ended = sum(each.trials for each in driven)
    (seconds,) = read_rows(url, "SELECT extract(epoch FROM max(datetime_complete) - min(datetime_start)) FROM trials")[
        0
    ]
    waits = sorted(wait for each in driven for wait in each.waits) or [0.0]
    locks = sorted(lock for each in driven for lock in each.locks) or [0.0]
    shares = sorted(each.trials for each in driven)
    return {
        "sampler": load.sampler,
        "drivers": load.drivers,
        "epochs": load.epochs,
        "trials": ended,
        "seconds": round(float(seconds or 0), 3),
        "trials_per_second": round(ended / float(seconds), 1) if seconds else 0.0,
        "claim_ms": [round(1000 * each, 1) for each in (statistics.median(waits), _percentile(waits), waits[-1])],
        "lock_ms": [round(1000 * each, 1) for each in (statistics.median(locks), _percentile(locks), locks[-1])],
        "locks_per_trial": round(len(locks) / ended, 2) if ended else 0.0,
        "shares": [shares[0], statistics.median(shares), shares[-1]],
        "driver_ms": round(1000 * sum(each.cpu_seconds for each in driven) / ended, 2) if ended else 0.0,
        "server_ms": round(1000 * server_seconds / ended, 2) if ended else 0.0,
        "connections": watch.most,
        "connections_median": statistics.median(watch.counts or [0]),
        "connections_of_one": watch.most_of_one,
        "connections_opening": opening,
        "waiting_for_locks": round(statistics.fmean(watch.waiting or [0]), 1),
        **_overshoot(url, load),
        "mistakes": [each.error for each in driven if each.error] + _mistakes(url, load),
    }


def _percentile(values: Sequence[float], share: float = 0.99) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


def _overshoot(url: str, load: Load) -> dict[str, float]:
    if not load.device_seconds:
        return {}
    ((used,),) = read_rows(url, "SELECT sum(seconds * devices) FROM hpo_usage")
    return {"device_seconds": round(used, 2), "overshoot": round(used - load.device_seconds, 2)}


def _mistakes(url: str, load: Load) -> list[str]:
    """Return what is wrong with the study, by plain SQL."""
    if load.device_seconds:
        twice = read_rows(url, 'SELECT "key", count(*) FROM hpo_trials GROUP BY "key" HAVING count(*) > 1')
        running = read_rows(url, "SELECT number FROM trials WHERE CAST(state AS TEXT) NOT IN ('COMPLETE', 'WAITING')")
        return [f"{count} trials have the key {key}" for key, count in twice] + [
            f"trial {each} is left" for each in running
        ]
    points = range(1, (load.trials if load.sampler == "grid" else POINTS) + 1)
    return violations(url, Expected(points, load.epochs, (load.trials, load.trials)))


COLUMNS = {
    "sampler": "sampler",
    "drivers": "drivers",
    "trials/s": "trials_per_second",
    "claim ms": "claim_ms",
    "lock ms": "lock_ms",
    "shares": "shares",
    "driver ms": "driver_ms",
    "server ms": "server_ms",
    "connections": "connections",
}


def show(row: Mapping[str, Any]) -> str:
    """Return a row as text: of claims and locks median, 99 % and most; of shares least, median and most."""
    texts = [
        " / ".join(f"{each:g}" for each in value) if isinstance(value, list) else str(value)
        for value in (row[key] for key in COLUMNS.values())
    ]
    overshoot = [f"{row['device_seconds']} device-seconds, {row['overshoot']:+}"] if "overshoot" in row else []
    return "  ".join(f"{text:>{width(name)}}" for name, text in zip(COLUMNS, texts, strict=True)) + "".join(
        f"\n  {text}" for text in [*overshoot, *row["mistakes"]]
    )


def width(column: str) -> int:
    """Return how many characters a column has."""
    return max(len(column), 21 if column in {"claim ms", "lock ms", "shares"} else 6)


def main() -> None:
    """Measure each number of drivers with each sampler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drivers", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--samplers", nargs="+", default=["random", "grid"])
    parser.add_argument("--trials", type=int, default=1000, help="the budget of all drivers together")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--epoch-seconds", type=float, default=0.0)
    parser.add_argument("--device-seconds", type=float, default=0.0, help="a budget of device time instead of trials")
    options = parser.parse_args()
    print("  ".join(f"{name:>{width(name)}}" for name in COLUMNS))
    rows = []
    with tempfile.TemporaryDirectory(prefix="drivers-pg-") as folder:
        server = Postgres(Path(folder), fsync=True)
        try:
            for sampler in options.samplers:
                for drivers in options.drivers:
                    load = Load(
                        sampler, drivers, options.trials, options.epochs, options.epoch_seconds, options.device_seconds
                    )
                    rows.append(measure(server, load))
                    print(show(rows[-1]), flush=True)
        finally:
            server.stop()
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
