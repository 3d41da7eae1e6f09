"""Break drivers, workers, network, disk and database at random, then check the guarantees of storage with plain SQL.

    uv run python -m benchmarks.chaos --rounds 100 --seed 0 --storage postgresql --log chaos.jsonl

Each round runs a new study of toy trials (`benchmarks.toy:chain`). Its sampler, scheduler and budget, its drivers and its
faults are drawn from the seed and the number of the round. The drivers have different host identities and a lease of a few
seconds (`benchmarks.driver`). Drivers that were stopped are started again. At the end, the study must be as if nothing had
happened: `benchmarks.guarantees` says what that means.

Faults, by the names that --faults takes:

    driver       kill -9 of a driver
    worker       kill -9 of a worker
    interrupt    Ctrl-C, sometimes twice, or SIGTERM
    stop         SIGSTOP of a driver, with or without its workers, past its lease; then SIGCONT, sometimes with Ctrl-C
    disk         the disk of the checkpoints is full for a while (needs the right to mount)
    database     PostgreSQL crashes, and is started again
    partition    the network between a driver and PostgreSQL swallows packets, then recovers or resets
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from benchmarks.guarantees import Expected, read_rows, unfinished, violations
from benchmarks.postgres import Postgres
from benchmarks.proxy import Proxy

ROOT = Path(__file__).parent.parent
KILLS = ("driver", "worker", "interrupt", "database")
FAULTS: dict[str, tuple[str, ...]] = {"sqlite": ("driver", "worker", "interrupt", "stop", "disk")}
FAULTS["postgresql"] = (*FAULTS["sqlite"], "database", "partition")
CALM_SECONDS = 90.0  # within this time after the last fault, a study must be finished
DISK_BYTES = 32 * 2**20  # room for the reports of all drivers
# The signals themselves: before the command line handles them, or while Python exits.
INTERRUPTED_CODES = {130, -signal.SIGINT, -signal.SIGTERM}
CHECKPOINT_EVERY: tuple[int | str, ...] = (1, 1, 2, "auto")
IDENTITY = "chaos-"  # the start of all host identities


# --- what a round does, drawn before it starts ------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A planned fault.

    Attributes:
        kind: see the docstring of this module.
        at: when it starts, in seconds. It waits until there is something to break.
        is_early: whether `at` counts from the start of the drivers, else from the first trained epoch. Then it concerns a
            driver that trains.
        seconds: how long it lasts, if it lasts.
        driver: the number of the driver that it concerns, modulo those that are running.
        way: from 0 to 1, chooses between variants.
    """

    kind: str
    at: float
    is_early: bool
    seconds: float
    driver: int
    way: float


@dataclass(frozen=True)
class Plan:
    """The study of a round, its drivers and its faults.

    Attributes:
        sampler: its name.
        scheduler: its name.
        reduction_factor: of the scheduler.
        points: the values of x are 1 to this.
        budget: the number of trials; None for a whole grid.
        max_epochs: of a trial.
        epoch_seconds: the duration of an epoch.
        drivers: how many drivers share the study.
        slots: how many trials a driver runs at a time.
        lease_seconds: of the drivers.
        faults: in the order in which they start.
        checkpoint_every: `auto`, or epochs between two checkpoints.
        mode: of asha and hyperband.
    """

    sampler: str
    scheduler: str
    reduction_factor: int
    points: int
    budget: int | None
    max_epochs: int
    epoch_seconds: float
    drivers: int
    slots: int
    lease_seconds: float
    faults: tuple[Fault, ...]
    checkpoint_every: int | str
    mode: str

    @property
    def trials(self) -> int:
        """How many trials a finished study has."""
        return min(self.budget or self.points, self.points)

    @property
    def may_be_exhausted(self) -> bool:
        """Whether draws may all be duplicates before the budget is spent."""
        return self.sampler != "grid" and (self.budget or 0) * 4 > self.points

    @property
    def prunes_after(self) -> set[int]:
        """The epochs after which the scheduler may end a trial. Each epoch is judged, also in a trial that resumes."""
        if self.scheduler == "none":
            return set()
        if self.scheduler == "median":
            return set(range(1, self.max_epochs))
        return {rung for i in range(self.max_epochs) if (rung := self.reduction_factor**i) < self.max_epochs}

    def expected(self, *, is_exhausted: bool = False) -> Expected:
        """Return what the finished study must contain.

        Args:
            is_exhausted: whether a driver said that its draws were all duplicates.
        """
        least = 1 if self.may_be_exhausted and is_exhausted else self.trials
        return Expected(range(1, self.points + 1), self.max_epochs, (least, self.trials), self.prunes_after)

    def space(self, log: Path) -> dict[str, Any]:
        """Return the search space.

        Args:
            log: a file that gets a line for each computed epoch.
        """
        x: Any = list(range(1, self.points + 1))
        if self.sampler != "grid":
            x = {"type": "int", "low": 1, "high": self.points}
        scheduler: dict[str, Any] = {"name": self.scheduler}
        if self.scheduler != "none":
            scheduler["grace_period"] = 1  # see `prunes_after`
        if self.scheduler in {"asha", "hyperband"}:
            scheduler |= {"reduction_factor": self.reduction_factor, "mode": self.mode}
        return {
            "sampler": {"name": "tpe", "n_startup_trials": 3} if self.sampler == "tpe" else self.sampler,
            "scheduler": scheduler,
            "trainable": "benchmarks.toy:chain",
            "metric": "value",
            "max_epochs": self.max_epochs,
            "max_failures": 1000,
            "checkpoint_every": self.checkpoint_every,
            "budget": {} if self.budget is None else {"trials": self.budget},
            "resources": {"cpu": (os.cpu_count() or 1) / self.slots},
            "parameters": {"x": x, "epoch_seconds": self.epoch_seconds, "log": str(log)},
        }


def draw_plan(draw: random.Random, kinds: Sequence[str]) -> Plan:
    """Draw a plan.

    Args:
        draw: the source of randomness.
        kinds: the kinds of faults to choose from.
    """
    sampler = draw.choice(["grid", "random", "qmc", "tpe"])
    scheduler = draw.choice(["none", "asha", "hyperband", "median"])
    max_epochs = draw.randint(4, 9)
    epoch_seconds = round(draw.uniform(0.1, 0.4), 2)
    drivers, slots = draw.choice([(1, 2), (2, 1), (2, 1), (2, 2), (3, 1)])
    # About ten seconds of training: the drivers' starts take as long. Half of the epochs are pruned.
    epochs = 10 * drivers * slots / epoch_seconds * (1 if scheduler == "none" else 2)
    trials = min(max(round(epochs / max_epochs), 5), 60)
    if sampler == "grid":
        budget = draw.choice([None, trials])
        points = trials + (0 if budget is None else draw.randint(0, 4))
    else:
        budget = trials
        points = draw.choice([1000, 1000, 1000, max(3, trials - 2)])  # in the last one, draws run out
    lease_seconds = draw.choice([2.0, 3.0, 4.0])
    planned: list[Fault] = []
    for _ in range(draw.randint(3, 6)):
        kind = draw.choice(kinds)
        seconds = draw.uniform(1, 8)
        if kind == "stop":
            seconds = lease_seconds + draw.uniform(2, 6)  # others look for trials about once a second
        elif kind == "database":
            seconds = draw.uniform(0, 4)
        is_early = draw.random() < 0.2
        at = draw.uniform(0.5, 8)
        if planned and draw.random() < 0.3:  # a fault during another
            is_early, at = planned[-1].is_early, planned[-1].at + draw.uniform(0, 0.5)
        way = round(draw.random(), 2)
        planned.append(Fault(kind, round(at, 1), is_early, round(seconds, 1), draw.randrange(60), way))
    planned.sort(key=lambda fault: (not fault.is_early, fault.at))
    return Plan(
        sampler,
        scheduler,
        draw.choice([2, 3]),
        points,
        budget,
        max_epochs,
        epoch_seconds,
        drivers,
        slots,
        lease_seconds,
        tuple(planned),
        draw.choice(CHECKPOINT_EVERY),
        draw.choice(["stop", "promote"]),
    )


# --- a round ----------------------------------------------------------------------------------------------------------


@dataclass
class _Driver:
    """One of the drivers of a round, through all of its starts.

    Attributes:
        number: counts from 0.
        draw: decides how it is started again.
        url: the database, as this driver reaches it.
        proxy: between the driver and PostgreSQL; None for SQLite.
        process: its latest process.
        starts: how often it was started.
        expected_codes: the exit codes that the faults of this process explain.
        start_again_at: by the monotonic clock; None while it runs.
        is_finished: whether it said that the study is finished.
        is_stopped: whether it got SIGSTOP.
        is_partitioned: whether its proxy swallows packets.
    """

    number: int
    draw: random.Random
    url: str
    proxy: Proxy | None
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    expected_codes: set[int] = field(default_factory=set)
    start_again_at: float | None = 0.0
    is_finished: bool = False
    is_stopped: bool = False
    is_partitioned: bool = False

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def family(self) -> list[psutil.Process]:
        """Return its process, and those that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.is_running:
                assert self.process is not None
                parent = psutil.Process(self.process.pid)
                return [parent, *parent.children(recursive=True)]
        return []

    def workers(self) -> list[psutil.Process]:
        return [process for process in self.family() if _command_line(process).startswith("ray::TrialWorker")]


class Round:
    """One study, and the faults that disturb it.

    Args:
        folder: for the files of the round; it exists.
        url: an empty database.
        plan: the study and its faults.
        postgres: the database server, None for SQLite.
        seed: of what the plan leaves open: when and under which identity drivers are started again.

    Attributes:
        events: the faults that happened.
    """

    def __init__(self, folder: Path, url: str, plan: Plan, postgres: Postgres | None, seed: str) -> None:
        self.events: list[dict[str, Any]] = []
        self._folder = folder
        self._url = url
        self._plan = plan
        self._postgres = postgres
        self._log = folder / "epochs.log"
        self._space = folder / "chaos.yaml"
        self._runs = folder / "runs"
        self._is_mounted = False
        self._is_database_down = False
        self._ends: list[tuple[float, Callable[[], None]]] = []  # of the faults that last, by the monotonic clock
        self._started = 0.0
        self._drivers: list[_Driver] = []
        for number in range(plan.drivers):
            proxy = None
            if postgres is not None:
                proxy = Proxy(postgres.port)
                url = _with_port(self._url, proxy.port)
            self._drivers.append(_Driver(number, random.Random(f"{seed}/driver-{number}"), url, proxy))

    def run(self) -> list[str]:
        """Run the study until it is finished; return the violations found."""
        self._space.write_text(json.dumps(self._plan.space(self._log)))
        if any(fault.kind == "disk" for fault in self._plan.faults):
            self._runs.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(self._runs)], check=True)
            self._is_mounted = True
        pending = list(self._plan.faults)
        self._started = time.monotonic()
        calm_since = self._started
        first_epoch: float | None = None
        while time.monotonic() < calm_since + CALM_SECONDS:
            now = time.monotonic()
            for end in [end for end in self._ends if end[0] <= now]:
                self._ends.remove(end)
                end[1]()
                calm_since = max(calm_since, now)
            for driver in self._drivers:
                problem = self._look_after(driver)
                if problem:
                    return [problem]
            if all(driver.is_finished for driver in self._drivers):
                return self._verdict()
            if first_epoch is None and self._log.exists():
                first_epoch = calm_since = now
            for fault in list(pending):
                since = self._started if fault.is_early else first_epoch
                if since is not None and since + fault.at <= now and self._begin(fault):
                    pending.remove(fault)
                    calm_since = max(calm_since, time.monotonic() + fault.seconds)
            time.sleep(0.05)
        return [
            f"{CALM_SECONDS:.0f} s after the last fault: {unfinished(self._url, self._plan.trials) or 'a driver still runs'}"
        ]

    def close(self) -> None:
        """End all faults and kill all processes of the round."""
        self._end_faults()
        for driver in self._drivers:
            for process in driver.family():
                _kill(process)
            if driver.process is not None:
                driver.process.wait()
            if driver.proxy is not None:
                driver.proxy.close()
        for process in psutil.process_iter():  # of drivers that were killed
            with contextlib.suppress(psutil.Error):
                if Path(process.cwd()).is_relative_to(self._folder):
                    _kill(process)
        if self._is_mounted:
            subprocess.run(["umount", "--lazy", str(self._runs)], check=True)

    @property
    def starts(self) -> int:
        """How often drivers were started."""
        return sum(driver.starts for driver in self._drivers)

    def output(self) -> str:
        """Return all that the drivers printed."""
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self._folder.glob("driver-*.txt")))

    # --- drivers

    def _look_after(self, driver: _Driver) -> str:
        """Start a driver if it is time; return what is wrong if it exited with an unexpected code."""
        if driver.start_again_at is not None:
            if time.monotonic() >= driver.start_again_at:
                self._start(driver)
            return ""
        if driver.is_finished or driver.is_running or self._is_database_down:  # judged when the database can be read
            return ""
        assert driver.process is not None
        code = driver.process.returncode
        if code == 0:
            driver.is_finished = True
            state = "" if self._plan.may_be_exhausted else unfinished(self._url, self._plan.trials)
            return f"driver {driver.number} said that the study is finished, but it is {state}" if state else ""
        if code not in driver.expected_codes and not (code == 2 and self._was_refused(driver.process.pid)):
            return f"driver {driver.number} exited with {code}, start {driver.starts}"
        driver.start_again_at = time.monotonic() + driver.draw.uniform(0, 2)
        return ""

    def _start(self, driver: _Driver) -> None:
        # The same identity is a program that was started again, another one is another machine.
        generation = driver.draw.choice([0, driver.starts, driver.starts])
        # Two drivers share an identity if they are on one machine.
        machine = driver.number if driver.draw.random() < 0.9 else 0
        driver.starts += 1
        driver.expected_codes = set()
        driver.start_again_at = None
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HPO_STORAGE": driver.url, "PYTHONUNBUFFERED": "1"}
        identity, lease = f"{IDENTITY}{machine}.{generation}", str(self._plan.lease_seconds)
        with (self._folder / f"driver-{driver.number}-{driver.starts}.txt").open("wb") as output:
            driver.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.driver", identity, lease, str(self._space)],
                cwd=self._folder,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _was_refused(self, pid: int) -> bool:
        """Return whether a driver could not open the database, which an outage excuses. Later, it must wait."""
        if not any(event["kind"] in {"database", "partition"} for event in self.events):
            return False
        return (pid,) not in read_rows(self._url, "SELECT pid FROM hpo_runs")

    # --- faults

    def _begin(self, fault: Fault) -> bool:
        """Start a fault; return False if there is nothing to break now."""
        running = [driver for driver in self._drivers if driver.is_running and (fault.is_early or driver.workers())]
        if not running:
            return False
        driver = running[fault.driver % len(running)]
        breakers = {
            "driver": self._kill_driver,
            "worker": self._kill_worker,
            "interrupt": self._interrupt,
            "stop": self._stop,
            "disk": self._fill_disk,
            "database": self._crash_database,
            "partition": self._partition,
        }
        details = breakers[fault.kind](fault, driver)
        if details is None:
            return False
        event = {"at": round(time.monotonic() - self._started, 1), "kind": fault.kind, "details": details}
        self.events.append(event)
        return True

    def _kill_driver(self, _fault: Fault, driver: _Driver) -> str | None:
        assert driver.process is not None
        driver.expected_codes.add(-signal.SIGKILL)
        driver.process.kill()
        return f"driver {driver.number}"

    def _kill_worker(self, fault: Fault, driver: _Driver) -> str | None:
        workers = driver.workers()
        if not workers:
            return None
        _kill(workers[int(fault.way * len(workers)) % len(workers)])
        return f"driver {driver.number}"

    def _interrupt(self, fault: Fault, driver: _Driver) -> str | None:
        assert driver.process is not None
        if fault.way < 0.3:
            driver.expected_codes |= INTERRUPTED_CODES
            driver.process.terminate()
            return f"driver {driver.number}, SIGTERM"
        self._press_ctrl_c(driver)
        if fault.way < 0.7:
            return f"driver {driver.number}"
        process, pause = driver.process, min(fault.seconds, 2.0)

        def press_again() -> None:
            if driver.process is process:
                self._press_ctrl_c(driver)

        self._ends.append((time.monotonic() + pause, press_again))
        return f"driver {driver.number}, again after {pause} s"

    def _press_ctrl_c(self, driver: _Driver) -> None:
        """Send SIGINT to all processes of a driver, as a terminal does. Those that are stopped get it when they wake up."""
        if driver.is_running:
            assert driver.process is not None
            driver.expected_codes |= INTERRUPTED_CODES
            os.killpg(driver.process.pid, signal.SIGINT)

    def _stop(self, fault: Fault, driver: _Driver) -> str | None:
        if driver.is_stopped:
            return None
        with_workers, is_interrupted = fault.way < 0.5, int(fault.way * 100) % 3 == 0
        stopped = driver.family() if with_workers else driver.family()[:1]
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        driver.is_stopped = True

        def resume() -> None:
            driver.is_stopped = False
            for process in reversed(stopped):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

        if is_interrupted:  # it wakes up to release trials that it has lost
            self._press_ctrl_c(driver)
        self._ends.append((time.monotonic() + fault.seconds, resume))
        what = f"driver {driver.number}{' and its workers' if with_workers else ''}"
        return f"{what} for {fault.seconds} s{', then Ctrl-C' if is_interrupted else ''}"

    def _fill_disk(self, fault: Fault, _driver: _Driver) -> str | None:
        filler = self._runs / "filler"
        if filler.exists():
            return None
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**20))
        self._ends.append((time.monotonic() + fault.seconds, filler.unlink))
        return f"for {fault.seconds} s"

    def _crash_database(self, fault: Fault, _driver: _Driver) -> str | None:
        postgres = self._postgres
        assert postgres is not None
        if self._is_database_down:
            return None
        self._is_database_down = True
        postgres.stop(immediate=True)

        def start() -> None:
            postgres.start()
            self._is_database_down = False

        self._ends.append((time.monotonic() + fault.seconds, start))
        return f"for {fault.seconds} s"

    def _partition(self, fault: Fault, driver: _Driver) -> str | None:
        proxy = driver.proxy
        assert proxy is not None
        if driver.is_partitioned:
            return None
        only_answers, resets = fault.way < 0.4, int(fault.way * 100) % 2 == 0
        driver.is_partitioned = True
        proxy.swallow(only_answers=only_answers)

        def end() -> None:
            driver.is_partitioned = False
            (proxy.reset if resets else proxy.recover)()

        self._ends.append((time.monotonic() + fault.seconds, end))
        what = "its answers" if only_answers else "all"
        return f"driver {driver.number}, {what} for {fault.seconds} s, then {'reset' if resets else 'recovered'}"

    def _end_faults(self) -> None:
        ends, self._ends = self._ends, []
        for _, end in ends:
            end()

    # --- the end

    def _verdict(self) -> list[str]:
        """Return the violations of a study that all drivers called finished."""
        self._end_faults()
        found = violations(self._url, self._plan.expected(is_exhausted="no new trials: " in self.output()))
        foreign = [
            host for (host,) in read_rows(self._url, "SELECT host FROM hpo_runs") if not host.startswith(IDENTITY)
        ]
        found += [f"a driver ran as {host}" for host in foreign]
        if all(event["kind"] in KILLS for event in self.events):
            found += fallbacks(self._log.read_text(), self._plan.checkpoint_every)
        return found


def fallbacks(log: str, checkpoint_every: int | str) -> list[str]:
    """Return which trials lost epochs that were in a checkpoint.

    A checkpoint is written while the next epoch trains, and is complete before the one after it is written. A driver that
    another one takes for dead may train the epoch in flight at the same time.

    Args:
        log: a line for each trained epoch, x and the epoch.
        checkpoint_every: of the search space. Automatic checkpoints promise nothing in trials of seconds.
    """
    if not isinstance(checkpoint_every, int):
        return []
    found, last = [], Counter[str]()
    for x, epoch in (line.split() for line in log.splitlines()):
        if int(epoch) < last[x] - 2 * checkpoint_every:
            found.append(f"the trial with x = {x} trained epoch {epoch} again after epoch {last[x]}")
        last[x] = max(last[x], int(epoch))
    return found


def _with_port(url: str, port: int) -> str:
    return sa.make_url(url).set(port=port).render_as_string(hide_password=False)


def _command_line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


# --- all rounds -------------------------------------------------------------------------------------------------------


def run_round(
    folder: Path, number: int, seed: int, storage: str, postgres: Postgres | None, kinds: Sequence[str]
) -> dict[str, Any]:
    """Run one round; return its seed, plan, events and violations, ready for JSON.

    Args:
        folder: is created for the round's files.
        number: of the round.
        seed: of all rounds.
        storage: `sqlite` or `postgresql`.
        postgres: the running server; None for SQLite.
        kinds: of faults.
    """
    folder.mkdir()
    url = f"sqlite:///{folder}/chaos.db"
    if postgres is not None:
        name = f"round_{number}"
        url = postgres.create_database(name)
    plan = draw_plan(random.Random(f"{seed}/{number}"), kinds)
    started = time.monotonic()
    current = Round(folder, url, plan, postgres, f"{seed}/{number}")
    try:
        found = current.run()
    finally:
        current.close()
    output = current.output()
    if found:
        (folder / "tables.json").write_text(json.dumps(_tables(url), indent=1))
    return {
        "storage": storage,
        "seed": seed,
        "round": number,
        "plan": asdict(plan),
        "events": current.events,
        "starts": current.starts,
        "lost_trials": output.count("was taken over by another run"),
        "unsaved": output.count("no checkpoint after epoch"),
        "seconds": round(time.monotonic() - started),
        "violations": found,
    }


def _tables(url: str) -> dict[str, list[str]]:
    """Return the rows of the tables that explain a violation."""
    names = ["hpo_runs", "hpo_trials", "hpo_metrics", "trials", "trial_user_attributes", "trial_system_attributes"]
    names += ["trial_params", "trial_values", "trial_intermediate_values", "study_user_attributes"]
    return {name: [str(row) for row in read_rows(url, f"SELECT * FROM {name}")] for name in names}


def describe(result: dict[str, Any]) -> str:
    """Return what happened in a round, with the options that run it alone."""
    plan, verdict = result["plan"], "broken" if result["violations"] else "correct"
    budget = f"{plan['points']} points" if plan["budget"] is None else f"{plan['budget']} of {plan['points']} points"
    return "\n  ".join(
        [
            f"round {result['round']} (--storage {result['storage']} --seed {result['seed']} --first {result['round']} "
            f"--rounds 1): {verdict} in {result['seconds']} s",
            f"{plan['drivers']} drivers of {plan['slots']} slots, lease {plan['lease_seconds']:g} s; {plan['sampler']}, "
            f"{plan['scheduler']}, mode {plan['mode']}, {budget}, {plan['max_epochs']} epochs of "
            f"{plan['epoch_seconds']:g} s, checkpoint_every {plan['checkpoint_every']}",
            *[f"{event['at']:5.1f} s: {event['kind']}, {event['details']}" for event in result["events"]],
            f"{result['starts']} starts of drivers, {result['lost_trials']} trials lost to another driver, "
            f"{result['unsaved']} checkpoints not written",
            *result["violations"],
        ]
    )


def run_rounds(
    rounds: int,
    seed: int,
    storage: str,
    *,
    first: int = 0,
    kinds: Sequence[str] | None = None,
    log: Path | None = None,
    keep: Path | None = None,
) -> list[dict[str, Any]]:
    """Run rounds, print each, and return their results, see `run_round`.

    Args:
        rounds: how many.
        seed: of all rounds.
        storage: `sqlite` or `postgresql`.
        first: the number of the first round.
        kinds: of faults; None for all that the storage and the rights of this process allow.
        log: a file to which each result is appended, as a line of JSON.
        keep: a folder to which the files of broken rounds are moved.
    """
    results = []
    with tempfile.TemporaryDirectory(prefix="hpo-chaos-", ignore_cleanup_errors=True) as scratch:
        postgres = Postgres(Path(scratch) / "postgres", fsync=True) if storage == "postgresql" else None
        try:
            for number in range(first, first + rounds):
                folder = Path(scratch) / f"round-{number}"
                result = run_round(folder, number, seed, storage, postgres, kinds or available_faults(storage))
                results.append(result)
                print(describe(result), flush=True)
                if log is not None:
                    with log.open("a") as file:
                        file.write(json.dumps(result) + "\n")
                if keep is not None and result["violations"]:
                    keep.mkdir(parents=True, exist_ok=True)
                    shutil.move(folder, keep / f"{storage}-{seed}-{number}-{int(time.time())}")
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            if postgres is not None:
                postgres.stop()
    return results


def available_faults(storage: str) -> list[str]:
    """Return the kinds of faults that can be made: without the right to mount, no disk is filled."""
    return [kind for kind in FAULTS[storage] if kind != "disk" or os.geteuid() == 0]


def summarize(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the number of rounds, faults and violations, ready for JSON."""
    events = Counter(event["kind"] for result in results for event in result["events"])
    return {
        "rounds": len(results),
        "broken": [result["round"] for result in results if result["violations"]],
        "events": dict(events),
        "faults": sum(events.values()),
        "starts": sum(result["starts"] for result in results),
        "lost_trials": sum(result["lost_trials"] for result in results),
        "unsaved": sum(result["unsaved"] for result in results),
        "seconds": sum(result["seconds"] for result in results),
    }


def main() -> None:
    """Run the rounds; exit with 1 if a guarantee was violated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="the number of the first round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storage", choices=list(FAULTS), default="sqlite")
    parser.add_argument("--faults", help="kinds of faults, separated by commas; all by default")
    parser.add_argument(
        "--log", type=Path, help="a file that gets a line of JSON after each round; the last line counts all its rounds"
    )
    parser.add_argument("--keep", type=Path, help="a folder that gets the files of broken rounds")
    arguments = parser.parse_args()
    kinds = arguments.faults.split(",") if arguments.faults else None
    if kinds is not None and not set(kinds) <= set(FAULTS[arguments.storage]):
        parser.error(f"--faults for {arguments.storage}: {', '.join(FAULTS[arguments.storage])}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes and mounts of the round are removed
    results = run_rounds(
        arguments.rounds,
        arguments.seed,
        arguments.storage,
        first=arguments.first,
        kinds=kinds,
        log=arguments.log,
        keep=arguments.keep,
    )
    if arguments.log is not None:
        results = [json.loads(line) for line in arguments.log.read_text().splitlines()]
    summary = summarize(results)
    print(json.dumps(summary))
    sys.exit(1 if summary["broken"] else 0)


if __name__ == "__main__":
    main()
