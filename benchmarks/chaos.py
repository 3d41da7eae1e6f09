"""Kill everything, again and again, and look in plain SQL whether storage has kept its promises.

    python -m benchmarks.chaos --rounds 100 --seed 0 --storage postgresql

Each round is a fresh study of toy trials (`benchmarks.toy:chain`) and a schedule drawn from the seed: drivers, workers and
the database are killed at random moments, drivers get Ctrl-C, and whoever died is started again. Then the study must be
whole: every configuration COMPLETE exactly once, every epoch stored, every value as if nothing had ever died.
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
    """One study and what is done to it."""

    folder: Path
    url: str
    random: random.Random
    postgres: Postgres | None
    driver_count: int
    events: list[str] = field(default_factory=list)
    drivers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, kills: int) -> list[str]:
        """Run the study through its kills; return what is wrong in the end."""
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
                        return [f"a driver gave up with {driver.returncode}:\n{self._output()}"]
                    self.drivers[i] = self._start(path)
            if all(driver.poll() == 0 for driver in self.drivers):
                extra = len(log.read_text().splitlines()) - len(POINTS) * MAX_EPOCHS
                # A kill may cost each trial in flight one epoch; a machine of two cores runs two trials in each driver.
                if extra > 2 * self.driver_count * len(self.events):
                    return [f"{extra} epochs were computed again, after {len(self.events)} kills"]
                return violations(self.url, POINTS, MAX_EPOCHS)
            if kills and time.monotonic() > next_kill:
                kills -= 1
                self._kill()
                next_kill = time.monotonic() + self.random.uniform(1, 20)
        return [f"not finished after {ROUND_SECONDS:.0f} s:\n{self._output()}"]

    def stop(self) -> None:
        """Leave no process behind."""
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
    """Return the promises of storage that a study of `benchmarks.toy:chain` breaks, found by plain SQL.

    Args:
        url: the database, with this one study in it.
        points: the values of x in the grid.
        max_epochs: of each trial.
    """
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    wrong: list[str] = []

    def rows(query: str) -> list[tuple[Any, ...]]:
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(query))]

    def expect(query: str, expected: list[tuple[Any, ...]]) -> None:
        found = rows(query)
        if found != expected:
            wrong.append(f"{query}\n  expected {expected}\n  found    {found}")

    expect("SELECT CAST(state AS TEXT), count(*) FROM trials GROUP BY state", [("COMPLETE", len(points))])
    expect('SELECT count(*), count(DISTINCT "key") FROM hpo_trials', [(len(points), len(points))])
    expect(
        "SELECT param_value, count(*) FROM trial_params WHERE param_name = 'x' GROUP BY param_value ORDER BY 1",
        [(float(index), 1) for index in range(len(points))],
    )
    trials = rows("SELECT trial_id, param_value FROM trial_params WHERE param_name = 'x' ORDER BY trial_id")
    for trial, index in trials:
        values = [expected_value({"x": points[int(index)]}, 0, epoch) for epoch in range(1, max_epochs + 1)]
        epochs = list(enumerate(values, start=1))
        expect(f"SELECT epoch, value FROM hpo_metrics WHERE trial = {trial} AND name = 'value' ORDER BY epoch", epochs)
        expect(
            f"SELECT step, intermediate_value FROM trial_intermediate_values WHERE trial_id = {trial} ORDER BY step",
            epochs,
        )
        expect(f"SELECT value FROM trial_values WHERE trial_id = {trial}", [(values[-1],)])
    engine.dispose()
    return wrong


def run_rounds(rounds: int, seed: int, storage: str, *, kills: int | None = None) -> dict[str, Any]:
    """Run rounds and return what was done and what was found, as plain values."""
    events: Counter[str] = Counter()
    broken: list[str] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hpo-chaos-") as scratch:
        postgres = Postgres(Path(scratch) / "postgres") if storage == "postgresql" else None
        try:
            for number in range(rounds):
                draw = random.Random(f"{seed}/{number}")
                folder = Path(scratch) / f"round-{number}"
                folder.mkdir()
                url = postgres.create_database(f"round_{number}") if postgres else f"sqlite:///{folder}/chaos.db"
                one = Round(folder, url, draw, postgres, driver_count=draw.choice([1, 1, 2]))
                try:
                    wrong = one.run(kills if kills is not None else draw.randint(2, 6))
                finally:
                    one.stop()
                events.update(one.events)
                broken.extend(f"round {number}: {text}" for text in wrong)
                verdict = "broken" if wrong else "whole"
                print(f"round {number}: {one.driver_count} drivers, {', '.join(one.events) or 'no events'}: {verdict}")
                for text in wrong:
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
        "broken": len(broken),
        "events": dict(events),
        "seconds": round(time.monotonic() - started),
        "violations": broken,
    }


def main() -> None:
    """Run the rounds of the command line; exit 1 if a promise was broken."""
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
