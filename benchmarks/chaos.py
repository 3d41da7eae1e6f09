"""Kill drivers, workers and the database at random, then check the guarantees of storage with plain SQL.

    uv run python -m benchmarks.chaos --rounds 100 --seed 0 --storage postgresql

Each round runs a new study of toy trials (`benchmarks.toy:chain`) and a schedule drawn from the seed: drivers, workers
and the database are killed at random moments, drivers get Ctrl-C, and stopped drivers are started again. At the end,
every configuration must be COMPLETE exactly once, with every epoch stored and every value as in an undisturbed run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from benchmarks.postgres import Postgres
from benchmarks.toy import expected_value

ROOT = Path(__file__).parent.parent
POINTS = [1, 2, 3, 4, 5, 6]
MAX_EPOCHS = 6
ROUND_SECONDS = 300.0


@dataclass
class Round:
    """One study and its schedule of kills.

    Attributes:
        folder: files of the round: the space, the log of epochs, the drivers' output.
        url: the database.
        random: the source of the schedule.
        postgres: the database server, None for SQLite.
        driver_count: how many drivers share the study.
        events: who was killed, in order.
        drivers: the drivers' latest processes.
    """

    folder: Path
    url: str
    random: random.Random
    postgres: Postgres | None
    driver_count: int
    events: list[str] = field(default_factory=list)
    drivers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, kills: int) -> list[str]:
        """Run the study until it is finished, with this many kills; return the violations found."""
        path = self.folder / "chaos.yaml"
        log = self.folder / "epochs.log"
        path.write_text(json.dumps(_space(log)))
        self.drivers = [self._start(path) for _ in range(self.driver_count)]
        deadline = time.monotonic() + ROUND_SECONDS
        next_kill = time.monotonic() + self.random.uniform(4, 22)
        while time.monotonic() < deadline:
            time.sleep(0.05)
            for i, driver in enumerate(self.drivers):
                if driver.poll() not in {None, 0}:
                    if driver.returncode in {1, 2}:
                        return [f"a driver exited with {driver.returncode}:\n{self._output()}"]
                    self.drivers[i] = self._start(path)
            if all(driver.poll() == 0 for driver in self.drivers):
                extra = len(log.read_text().splitlines()) - len(POINTS) * MAX_EPOCHS
                # A kill costs each running trial at most one epoch. With two cores, a driver runs two trials.
                if extra > 2 * self.driver_count * len(self.events):
                    return [f"{extra} epochs were trained again after {len(self.events)} kills"]
                return violations(self.url, POINTS, MAX_EPOCHS)
            if kills and time.monotonic() > next_kill:
                kills -= 1
                self._kill()
                next_kill = time.monotonic() + self.random.uniform(1, 20)
        return [f"not finished after {ROUND_SECONDS:.0f} s:\n{self._output()}"]

    def stop(self) -> None:
        """Kill the drivers and all their children."""
        for driver in self.drivers:
            for child in _descendants(driver.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            driver.kill()
            driver.wait()

    def _start(self, path: Path) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HPO_STORAGE": self.url, "PYTHONUNBUFFERED": "1"}
        with (self.folder / "output.txt").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "hpo.run", str(path)],
                cwd=self.folder,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _output(self) -> str:
        return (self.folder / "output.txt").read_text()[-3000:]

    def _kill(self) -> None:
        living = [driver for driver in self.drivers if driver.poll() is None]
        victims = ["driver", "driver", "worker", "worker", "interrupt"] + ["database"] * 2 * bool(self.postgres)
        victim = self.random.choice(victims)
        driver = self.random.choice(living or self.drivers)
        if victim == "driver":
            driver.kill()
        elif victim == "interrupt":
            number = self.random.choice([signal.SIGINT, signal.SIGTERM])
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, number) if number == signal.SIGINT else driver.send_signal(number)
        elif victim == "worker":
            workers = [p for p in _descendants(driver.pid) if _name(p).startswith("ray::TrialWorker")]
            if not workers:
                return
            with contextlib.suppress(psutil.NoSuchProcess):
                self.random.choice(workers).kill()
        elif self.postgres is not None:
            self.postgres.stop(immediate=True)
            time.sleep(self.random.uniform(0, 4))
            self.postgres.start()
        self.events.append(victim)


def _space(log: Path) -> dict[str, Any]:
    return {
        "sampler": "grid",
        "trainable": "benchmarks.toy:chain",
        "metric": "value",
        "max_epochs": MAX_EPOCHS,
        "max_failures": 20,
        "parameters": {"x": POINTS, "epoch_seconds": 0.3, "log": str(log)},
    }


def _descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def violations(url: str, points: list[int], max_epochs: int) -> list[str]:
    """Return which guarantees of storage a finished study of `benchmarks.toy:chain` violates.

    Args:
        url: a database that contains this study only.
        points: the values of x in the grid.
        max_epochs: the epochs of each trial.
    """
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    violated: list[str] = []

    def rows(query: str) -> list[tuple[Any, ...]]:
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(query))]

    def expect(query: str, expected: list[tuple[Any, ...]]) -> None:
        found = rows(query)
        if found != expected:
            violated.append(f"{query}\n  expected {expected}\n  found    {found}")

    expect("SELECT CAST(state AS TEXT), count(*) FROM trials GROUP BY state", [("COMPLETE", len(points))])
    expect('SELECT count(*), count(DISTINCT "key") FROM hpo_trials', [(len(points), len(points))])
    expect(
        "SELECT param_value, count(*) FROM trial_params WHERE param_name = 'x' GROUP BY param_value ORDER BY 1",
        [(float(index), 1) for index in range(len(points))],
    )
    trials = rows("SELECT trial_id, param_value FROM trial_params WHERE param_name = 'x' ORDER BY trial_id")
    for trial_id, index in trials:
        values = [expected_value({"x": points[int(index)]}, 0, epoch) for epoch in range(1, max_epochs + 1)]
        epochs = list(enumerate(values, start=1))
        expect(
            f"SELECT epoch, value FROM hpo_metrics WHERE trial = {trial_id} AND name = 'value' ORDER BY epoch", epochs
        )
        expect(
            f"SELECT step, intermediate_value FROM trial_intermediate_values WHERE trial_id = {trial_id} ORDER BY step",
            epochs,
        )
        expect(f"SELECT value FROM trial_values WHERE trial_id = {trial_id}", [(values[-1],)])
    engine.dispose()
    return violated


def run_rounds(rounds: int, seed: int, storage: str, *, kills: int | None = None) -> dict[str, Any]:
    """Run rounds; return the settings, the number of each event and the violations, ready for JSON."""
    events: Counter[str] = Counter()
    found: list[str] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hpo-chaos-") as scratch:
        postgres = Postgres(Path(scratch) / "postgres") if storage == "postgresql" else None
        try:
            for number in range(rounds):
                draw = random.Random(f"{seed}/{number}")
                folder = Path(scratch) / f"round-{number}"
                folder.mkdir()
                url = postgres.create_database(f"round_{number}") if postgres else f"sqlite:///{folder}/chaos.db"
                current = Round(folder, url, draw, postgres, driver_count=draw.choice([1, 1, 2]))
                try:
                    violated = current.run(kills if kills is not None else draw.randint(2, 6))
                finally:
                    current.stop()
                events.update(current.events)
                found.extend(f"round {number}: {text}" for text in violated)
                verdict = "broken" if violated else "correct"
                kinds = ", ".join(current.events) or "no events"
                print(f"round {number}: {current.driver_count} drivers, {kinds}: {verdict}")
                for text in violated:
                    print(text)
                sys.stdout.flush()
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            if postgres is not None:
                postgres.stop()
    return {
        "storage": storage,
        "rounds": rounds,
        "seed": seed,
        "broken": len(found),
        "events": dict(events),
        "seconds": round(time.monotonic() - started),
        "violations": found,
    }


def main() -> None:
    """Run the rounds; exit with 1 if a guarantee was violated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storage", choices=["sqlite", "postgresql"], default="sqlite")
    arguments = parser.parse_args()
    result = run_rounds(arguments.rounds, arguments.seed, arguments.storage)
    print(json.dumps({name: value for name, value in result.items() if name != "violations"}))
    sys.exit(1 if result["broken"] else 0)


if __name__ == "__main__":
    main()
