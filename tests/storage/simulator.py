"""A deterministic simulator: the real storage code of several drivers, interleaved at every statement, with faults.

    uv run python -m tests.storage.simulator --seeds 0 20000 --storage sqlite --jobs 2
    uv run python -m tests.storage.simulator --seed 7 --storage sqlite        # prints the schedule

A seed draws a study (grid or sampled, budget, pruner, training that is deterministic or not, checkpoints or none), two to
four drivers on the same or different machines, and a list of faults with the steps at which they strike. After each step
that committed something, `invariants.Invariants` reads the database with plain SQL. At the end the faults stop, drivers run
the study to its end, and every configuration must be finished.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import random
import shutil
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import psutil
import psycopg
import pytest
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution, IntDistribution

from storage import errors as errors_module
from storage import lease as lease_module
from storage import optuna_tables, sqlite_file
from storage import ownership as ownership_module
from storage import queue as queue_module
from storage import retry as retry_module
from storage import run as run_module
from storage import usage as usage_module
from storage import writer as writer_module
from storage.database import Database, open_database
from storage.errors import StorageError
from storage.ownership import LostTrialError
from storage.population import Child, Member, PopulationBased
from storage.promotion import PromotingHalving, StoppingHalving
from storage.pruners import Decision, Median, Pruner, SuccessiveHalving
from storage.records import CONTINUED_FROM
from storage.retry import failed_trials, retry_trials
from storage.run import Run
from storage.studies import find_study, open_study
from storage.writer import BATCH_SECONDS
from tests.storage.invariants import OTHER_SETTINGS, Invariants
from tests.storage.scheduler import Scheduler, SimulatedThreading, SimulatedTime, Task

LEASE_SECONDS = 6.0
MAX_FAILURES = 3
STORE_SECONDS = 1.0  # less than an epoch may take
MAX_STEPS = 20_000
EPOCHS = 3
FAULTS = (
    "kill",
    "error",
    "lost answer",
    "bug",
    "suspend",
    "clock",
    "boot clock",
    "outage",
    "restart",
    "restore",
    "delete",
    "exit",
    "retry",
)
# Pruners that no seed draws: population-based training, and the modes of asha in which trials wait.
SPECIAL = ("pbt", "promote", "stop")
MAX_RUNS = 4  # of one process, one after another


@dataclass
class Plan:
    """What a seed draws.

    Attributes:
        is_grid: whether the configurations are known before.
        trials: the number of configurations, and the budget.
        pruner: asha, median or none; one of SPECIAL where it is simulated.
        is_deterministic: whether training an epoch again gives the same value.
        keeps_checkpoints: whether a trial resumes after its last epoch; otherwise from the first.
        drivers: how many drivers start.
        hosts: how many machines there are.
        shares_folder: whether the machines share the folder of checkpoints. A worker notices there that another one has
            taken its trial; without it, a run that lost a trial works on.
        failure_chance: of a training, at each of its actions; the death of its worker has the same.
        faults: (step, kind).
    """

    is_grid: bool
    trials: int
    pruner: str
    is_deterministic: bool
    keeps_checkpoints: bool
    drivers: int
    hosts: int
    shares_folder: bool
    failure_chance: float
    faults: list[tuple[int, str]]

    @property
    def is_population(self) -> bool:
        return self.pruner == "pbt"

    @classmethod
    def draw(cls, scheduler: Scheduler, kinds: tuple[str, ...]) -> Plan:
        """Draw a plan."""
        draw = scheduler.draw
        drivers = draw.randint(2, 4)
        return cls(
            is_grid=draw.random() < 0.5,
            trials=draw.randint(2, 5),
            pruner=draw.choice(["none", "none", "asha", "median"]),
            is_deterministic=draw.random() < 0.3,
            keeps_checkpoints=draw.random() < 0.7,
            drivers=drivers,
            hosts=draw.choice([1, drivers, drivers]),
            shares_folder=draw.random() < 0.5,
            failure_chance=draw.choice([0.02, 0.02, 0.15]),
            faults=sorted((draw.randint(5, 500), draw.choice(kinds)) for _ in range(draw.randint(0, 6))),
        )


@dataclass(eq=False)
class Training:
    """A worker that trains a claimed trial."""

    claim: Any
    driver: Driver
    history: dict[int, float]
    recalled: list[int]

    @property
    def folder(self) -> str:
        return self.folder_of(self.claim.number)

    def folder_of(self, number: int) -> str:
        machine = "" if self.driver.simulation.plan.shares_folder else self.driver.machine
        return f"{machine}/{self.driver.unique_name}/{number}"


@dataclass(eq=False)
class Driver:
    """A process: it opens the study, claims trials, trains them, and ends. It may start another run, as a notebook does.

    Attributes:
        name: with the number of the process.
        machine: several drivers may share it.
        pid: of the process.
        live_runs: stands in for `lease.live_runs` of the process.
        exits: whether its run ends with an error at the next step.
        polls: {(trial, run) that stayed orphaned: how often, one after another, it found no trial}.
        is_killed: whether it got kill -9.
        suspended_until: in virtual seconds.
    """

    simulation: Simulation
    slot: int
    name: str
    machine: str
    pid: int
    born: float
    is_killed: bool = False
    has_ended: bool = False
    suspended_until: float = 0.0
    excused_until: float = 0.0  # it may have lost its trials
    run_id: int = -1
    trainings: list[Training] = field(default_factory=list)
    known: set[int] = field(default_factory=set)  # ids of the trials that it claimed and has not given back
    tokens: set[int] = field(default_factory=set)  # of the claims of its run
    study: Any = None
    unique_name: str = ""
    is_closing: bool = False
    live_runs: set[tuple[int, float]] = field(default_factory=set)
    exits: bool = False
    polls: dict[tuple[int, int], int] = field(default_factory=dict)

    def main(self) -> None:
        """The whole life of the process."""
        draw = self.simulation.scheduler.draw
        for _ in range(MAX_RUNS):
            starts_again = False
            try:
                starts_again = self._search() and draw.random() < 0.5
            except ExitError:
                starts_again = True
            except StorageError:
                assert self.simulation.was_replaced, f"{self.name} gave up without a reason: {traceback.format_exc()}"
                starts_again = draw.random() < 0.5
            self.run_id, self.is_closing, self.exits = -1, False, False
            self.polls.clear()
            self.trainings.clear()
            self.known.clear()
            self.tokens.clear()
            if not starts_again:
                break
            self.simulation.scheduler.hand_over("between two runs", seconds=draw.choice([0.0, 1.0, 10.0]))
        self.has_ended = self.is_killed = True  # its threads end with it

    def retry(self) -> None:
        """The whole life of `hpo retry`."""
        sim = self.simulation
        try:
            study = find_study(sim.databases[self.slot], sim.invariants.study_name())
            if study is not None:
                retry_trials(study, failed_trials(study), resume=sim.scheduler.draw.random() < 0.5)
        except StorageError:
            assert sim.was_replaced, f"{self.name} gave up without a reason: {traceback.format_exc()}"
        self.has_ended = self.is_killed = True

    def _search(self) -> bool:
        """Work on the study; return whether the run left before it was finished."""
        sim, plan = self.simulation, self.simulation.plan
        database = sim.databases[self.slot]
        self.study = open_study(
            database,
            "s",
            direction="maximize",
            fingerprint="f",
            settings={"metric": "m", "driver": self.name},  # new for each driver, so that it is written
            total_trials=plan.trials,
        )
        self.unique_name = self.study.unique_name
        self.study.optuna_study.sampler = optuna.samplers.RandomSampler(seed=sim.scheduler.draw.randint(0, 10**6))
        pruner: Pruner | None = None
        if plan.pruner == "asha":
            pruner = SuccessiveHalving(True, "s", 1, 2)
        elif plan.pruner == "median":
            pruner = Median(True, 1, startup_trials=1)
        elif plan.pruner == "promote":
            pruner = PromotingHalving(True, "s", 1, 2)
        elif plan.pruner == "stop":
            pruner = StoppingHalving(True, "s", 1, 2)
        elif plan.is_population:
            pruner = PopulationBased(True, 1, 0.5, 0, _breed)
        run = Run(
            self.study,
            config_key=lambda params: f"x={params['x']}",
            provenance={},
            draw=None if plan.is_grid else _draw,
            max_trials=None if plan.is_grid else plan.trials,
            learns=sim.scheduler.draw.random() < 0.3,
            pruner=pruner,
            max_failures=MAX_FAILURES,
            lease_seconds=LEASE_SECONDS,
            takes_turns=plan.is_population,
        )
        leaves = sim.scheduler.draw.randint(3, 40) if sim.scheduler.draw.random() < 0.2 else 10**9
        with run:
            self.run_id = run.run_id
            if plan.is_grid:
                points = [{"x": x} for x in range(plan.trials)]
                run.enqueue(points, {"x": CategoricalDistribution(list(range(plan.trials)))})
            try:
                for actions in itertools.count():
                    if actions > leaves and not self.is_closing:
                        self._leave(run)
                        break
                    if not self._act(run):
                        break
                self.is_closing = True
                if actions <= leaves:
                    run.flush()
                    if not sim.invariants.replacements:
                        sim.invariants.check_stored_device_time(self, missing_seconds=0.0)
            finally:
                # Its end may not be stored. Then it looks like a run that died.
                self.is_closing = True
                for training in self.trainings:
                    sim.invariants.note_freed(training.claim)
                sim.invariants.note_death(self)
        return bool(actions > leaves)

    def _act(self, run: Run) -> bool:
        """Do one thing; return False if nothing is left to do."""
        if self.exits:
            raise ExitError
        draw = self.simulation.scheduler.draw
        # A member that ends may leave a successor, after `claim` has found nothing.
        asks_again = self.simulation.plan.is_population and run.finished and not self.trainings
        if asks_again or (len(self.trainings) < 2 and draw.random() < 0.5):
            replacements = self.simulation.invariants.replacements
            if (asks_again or not run.finished) and not self._claim(run):
                if asks_again and run.finished:
                    return False
                if run.finished:
                    # A copy may be restored between the run's last look at the database and this one.
                    if self.simulation.invariants.replacements == replacements:
                        self.simulation.invariants.check_finished(self)
                elif not self.trainings:
                    self.simulation.invariants.check_poll(self)
                    self.simulation.scheduler.hand_over("poll", seconds=1.0)
                    return True
            self.polls.clear()
            return True
        if self.trainings:
            training = draw.choice(self.trainings)
            try:
                self._train(run, training)
            except LostTrialError:
                self._forget(training)
                self._free(run, training)
            return True
        return not run.finished

    def _claim(self, run: Run) -> bool:
        claim = run.claim()
        if claim is None:
            return False
        assert claim.trial_id not in {each.claim.trial_id for each in self.trainings if not self._has_lost(each)}, (
            f"{self.name} claimed trial {claim.number}, which it is working on"
        )
        self.known.add(claim.trial_id)
        self.tokens.add(claim.token)
        for each in self.trainings:
            if each.claim.trial_id == claim.trial_id:
                self._free(run, each)
        self.trainings = [each for each in self.trainings if each.claim.trial_id != claim.trial_id]
        training = Training(claim, self, {}, [])
        self.trainings.append(training)
        self._start_worker(run, training)
        return True

    def _has_lost(self, training: Training) -> bool:
        return self.simulation.invariants.owner_of(training.claim) is not training.claim.token

    def _start_worker(self, run: Run, training: Training) -> None:
        """As `hpo.search.worker.run_trial` does: from the newest checkpoint, epochs that storage lacks first."""
        sim, claim = self.simulation, training.claim
        run.hold_device(claim)
        sim.invariants.note_held(claim)
        _, attempt, history = sim.checkpoints.get(training.folder, (0, "", {}))
        training.history = dict(history) if attempt == claim.attempt and sim.plan.keeps_checkpoints else {}
        if not training.history and claim.continued_from is not None:
            _, _, of_parent = sim.checkpoints.get(training.folder_of(claim.continued_from["trial"]), (0, "", {}))
            last = claim.continued_from["epoch"] if sim.plan.keeps_checkpoints else 0
            training.history = {epoch: value for epoch, value in of_parent.items() if epoch <= last}
            sim.adopted[training.folder] = max(training.history, default=0)
        sim.checkpoints[training.folder] = (claim.token, claim.attempt, dict(training.history))
        differing = [epoch for epoch, value in training.history.items() if claim.values.get(epoch) != value]
        first = min([claim.epoch, *differing])
        training.recalled = [epoch for epoch in sorted(training.history) if epoch >= first]

    def _train(self, run: Run, training: Training) -> None:
        sim, claim, draw = self.simulation, training.claim, self.simulation.scheduler.draw
        chance = draw.random()
        if chance < sim.plan.failure_chance:
            sim.invariants.crashes[claim.trial_id] += 1
            sim.invariants.note_freed(claim)
            crashes = run.record_crash(claim)
            if crashes > MAX_FAILURES:
                self._fail(run, training, "the worker died")
            else:
                self._start_worker(run, training)
            return
        if chance < sim.plan.failure_chance + 0.02:
            self._forget(training)
            sim.invariants.note_freed(claim)
            run.release(claim)
            return
        if chance < 2 * sim.plan.failure_chance + 0.02:
            self._fail(run, training, "an error of the trainable")
            return
        if training.recalled:
            epoch = training.recalled.pop(0)
        else:
            epoch = max(training.history, default=0) + 1
            sim.scheduler.hand_over(
                f"trains trial {claim.number}, epoch {epoch}", seconds=draw.choice([0.0, 0.1, 1.0, 3.0])
            )
            training.history[epoch] = sim.train(claim, epoch)
            token, attempt, _ = sim.checkpoints[training.folder]
            if token != claim.token:  # another worker has taken the folder over
                self._forget(training)
                self._free(run, training)
                return
            sim.checkpoints[training.folder] = (token, attempt, dict(training.history))
        value = training.history[epoch]
        sim.invariants.trained[value] = training
        if sim.plan.pruner != "none" and epoch < EPOCHS:
            first = sim.adopted.get(training.folder, 0) + 1
            decision = run.decide(claim, epoch, {"m": value}, value, first_epoch=first)
            if decision is not Decision.CONTINUE:
                self._forget(training)
                sim.invariants.note_freed(claim)
            if decision is Decision.WAIT:
                run.release(claim)
            return
        run.report(claim, epoch, {"m": value}, value)
        if epoch == EPOCHS:
            sim.invariants.note_freed(claim)
            run.complete(claim, value)
            self.trainings.remove(training)

    def _fail(self, run: Run, training: Training, reason: str) -> None:
        self.simulation.invariants.note_freed(training.claim)
        run.fail(training.claim, f"{reason} [{training.claim.token}]")
        self.trainings.remove(training)

    def _leave(self, run: Run) -> None:
        """Ctrl-C."""
        self.is_closing = True
        run.leave()
        with contextlib.suppress(StorageError):
            run.flush()
            for training in list(self.trainings):
                self._forget(training)
                self.simulation.invariants.note_freed(training.claim)
                run.release(training.claim)

    def _free(self, run: Run, training: Training) -> None:
        self.simulation.invariants.note_freed(training.claim)
        run.free_device(training.claim)

    def _forget(self, training: Training) -> None:
        if training in self.trainings:
            self.trainings.remove(training)
        self.known.discard(training.claim.trial_id)


class ExitError(Exception):
    """An error of the caller, such as Ctrl-C: the run ends without releasing its trials."""


def _draw(trial: optuna.Trial) -> str:
    return "" if trial.suggest_int("x", 0, 9) != 5 else "x != 5"


def _breed(replaces: Mapping[str, Any], better: Member, epoch: int, rng: random.Random) -> Child:
    parent = {"trial": better.number, "epoch": epoch}
    params = {"x": rng.randint(0, 9)}
    key = f"{better.key}/{replaces['trial']}/{epoch}"
    return Child(key, params, {"x": IntDistribution(0, 9)}, {CONTINUED_FROM: parent})


class Simulation:
    """One seed.

    Args:
        seed: decides everything.
        backend: the databases of the drivers, reused from seed to seed.
        kinds: of the faults.
        pruner: replaces the one that the seed draws; those of SPECIAL are drawn by none.
    """

    def __init__(
        self, seed: int, backend: Backend, kinds: tuple[str, ...] = FAULTS, *, pruner: str | None = None
    ) -> None:
        self.scheduler = Scheduler(f"hpo/{seed}", backend.is_blocked, self._after_step)
        self.backend = backend
        self.databases = backend.databases
        self.plan = Plan.draw(self.scheduler, kinds)
        if pruner is not None:
            self.plan = replace(self.plan, is_grid=self.plan.is_grid and pruner != "pbt", pruner=pruner)
        self.invariants = Invariants(self, backend.connect_plain())
        self.drivers: list[Driver] = []
        self.checkpoints: dict[str, tuple[int, str, dict[int, float]]] = {}  # {folder: (owner, attempt, history)}
        self.adopted: dict[str, int] = {}  # {folder: the last epoch that a parent has trained}
        self.database_clock = 0.0  # seconds ahead of virtual time
        self.boot_clock = 0.0  # how far the machines' clocks were set
        self.down_until = 0.0
        self.was_replaced = False  # whether the database was restored, or the study deleted
        self.commits = 0
        self._next_error: dict[Task, BaseException] = {}
        self._in_statement: set[Task] = set()
        self._lost_answers = 0
        self._bugs = 0
        self._is_dirty = False
        self._copy: Any = None
        self._numbers = itertools.count(1)

    # --- the world around the storage code

    def train(self, claim: Any, epoch: int) -> float:
        """Return the objective after an epoch; a new number each time, unless training is deterministic."""
        if self.plan.is_deterministic:
            return float(random.Random(f"{claim.params['x']}/{epoch}").random())
        return self.scheduler.draw.random()

    def before_statement(self, what: str) -> None:
        """Hand control over, and raise the error that a fault has prepared."""
        task = self.scheduler.current
        if task is None:
            return
        self._in_statement.add(task)
        try:
            self.scheduler.hand_over(what)
        finally:
            self._in_statement.discard(task)
        if task in self._next_error:
            raise self._next_error.pop(task)
        if self.scheduler.now < self.down_until:
            raise self.backend.error()

    def after_commit(self) -> None:
        """Lose the answer, if a fault has prepared it."""
        self.commits += 1
        self._is_dirty = True
        if self._lost_answers and self.scheduler.current is not None:
            self._lost_answers -= 1
            self.scheduler.log.append("          the answer to COMMIT is lost")
            raise self.backend.error()

    # --- running

    def run(self) -> None:
        """Run the seed.

        Raises:
            AssertionError: an invariant does not hold.
        """
        for number in range(self.plan.drivers):
            self._start(number)
        faults = list(self.plan.faults)
        try:
            while self.scheduler.steps < MAX_STEPS:
                while faults and faults[0][0] <= self.scheduler.steps:
                    self._strike(faults.pop(0)[1])
                if not self.scheduler.step():
                    if not faults and self._is_finished():
                        break
                    while faults and not self._is_finished():
                        self._strike(faults.pop(0)[1])
                    self._start(self.scheduler.draw.randrange(4))
                    if len(self.drivers) > 30:
                        raise AssertionError("thirty drivers did not finish the study")
            else:
                raise AssertionError(f"the study is not finished after {MAX_STEPS} steps")
            self.invariants.check_end()
        finally:
            self.close()

    def close(self) -> None:
        """End all threads and connections."""
        for driver in self.drivers:
            driver.is_killed = True
        self.backend.break_connections()
        self.scheduler.drain()
        self.backend.close_plain()

    def _start(self, slot: int) -> None:
        driver = self._new_driver(slot, "driver")
        self.scheduler.spawn(driver, driver.name, driver.main)

    def _new_driver(self, slot: int, kind: str) -> Driver:
        number = next(self._numbers)
        machine = f"machine-{slot % self.plan.hosts}"
        driver = Driver(self, slot, f"{kind}-{number}", machine, 1000 + number, self.scheduler.now)
        self.drivers.append(driver)
        return driver

    def living(self) -> list[Driver]:
        """Return the drivers that run."""
        return [driver for driver in self.drivers if not driver.is_killed and not driver.has_ended]

    def _is_finished(self) -> bool:
        return self.invariants.is_finished()

    def _strike(self, kind: str) -> None:
        draw, living = self.scheduler.draw, self.living()
        self.scheduler.log.append(f"          FAULT {kind}")
        tasks = [task for task in self.scheduler.tasks if not task.is_done and not task.is_blocked]
        match kind:
            case "kill" if living:
                driver = draw.choice(living)
                self.scheduler.log.append(f"          of {driver.name}")
                driver.is_killed = True
                self.invariants.note_death(driver)
                for training in driver.trainings:
                    self.invariants.note_freed(training.claim)
                if all(each == "kill" for _, each in self.plan.faults):
                    self.invariants.check_stored_device_time(driver, STORE_SECONDS + BATCH_SECONDS)
                self.scheduler.drain()
                self.backend.break_connections(driver.slot, self)
                self._start(draw.randrange(4))
            case "exit" if living:
                driver = draw.choice(living)
                driver.exits = True
                if draw.random() < 0.7:  # the database is away until the run has left
                    self.down_until = self.scheduler.now + draw.choice([8.0, 20.0])
                self.scheduler.log.append(f"          of the run of {driver.name}")
            case "retry":
                for _ in range(draw.choice([1, 2])):
                    retrier = self._new_driver(draw.randrange(4), "retry")
                    self.scheduler.spawn(retrier, retrier.name, retrier.retry)
            case "error" if tasks:
                self._next_error[draw.choice(tasks)] = self.backend.error()
            case "lost answer":
                self._lost_answers += 1
            case "bug":
                writers = [task for task in tasks if "writer" in task.name]
                if writers:
                    self._next_error[draw.choice(writers)] = RuntimeError("a bug")
            case "suspend" if living:
                driver = draw.choice(living)
                seconds = draw.choice([1.0, 4.0, 8.0, 15.0])
                self.scheduler.log.append(f"          {driver.name} for {seconds:g} s")
                driver.suspended_until = self.scheduler.now + seconds
                driver.excused_until = max(driver.excused_until, driver.suspended_until + LEASE_SECONDS)
            case "clock":
                self.database_clock += draw.choice([-3600.0, -5.0, 5.0, 3600.0])
            case "boot clock":
                self.boot_clock += draw.choice([-3600.0, -5.0, 5.0, 3600.0])
            case "outage":
                self.down_until = self.scheduler.now + draw.choice([1.0, 8.0, 20.0])
            case "restart":
                self._break_connections()
            case "restore":
                if self._copy is None:
                    self._copy = self.backend.copy()
                    self.scheduler.log.append("          a copy is made")
                else:
                    self._break_connections()
                    self.backend.restore(self._copy)
                    self.was_replaced = True
                    self.invariants.forget()
                    self._is_dirty = True
            case "delete":
                self._break_connections()
                self.was_replaced = True
                self.backend.delete_study(self.invariants.study_name())
                if draw.random() < 0.7:  # on SQLite, another space gets the study's id
                    open_study(
                        self.databases[0],
                        draw.choice(["s", "t"]),
                        direction="minimize",
                        fingerprint="g",
                        settings=OTHER_SETTINGS,
                    )
                    self.backend.break_connections()
                self.invariants.forget()
                self._is_dirty = True

    def _break_connections(self) -> None:
        """Restart the server: statements fail, open transactions are rolled back, and no connection stays."""
        broken: set[Task] = set()

        def next_tasks() -> list[Task]:
            open_tasks = [task for task in self.scheduler.tasks if task in self._in_statement and task not in broken]
            return [task for task in open_tasks if not task.is_blocked]

        while tasks := next_tasks():
            for task in tasks:
                broken.add(task)
                self._next_error[task] = self.backend.error()
                self.scheduler.resume(task)
            self.scheduler.settle()  # tasks that waited for their locks have got them now
        self.backend.break_connections()

    def _after_step(self) -> None:
        if self._is_dirty:
            self._is_dirty = False
            self.invariants.check()


# --- databases --------------------------------------------------------------------------------------------------------


def _copy_file(source: Path, target: Path) -> None:
    with contextlib.closing(sqlite3.connect(source)) as old, contextlib.closing(sqlite3.connect(target)) as new:
        old.backup(new)


class Backend:
    """Four databases handles, one for each slot of a driver, on one database.

    Args:
        url: an empty database.
        folder: for copies.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.is_sqlite = url.startswith("sqlite")
        self._path = Path(url.removeprefix("sqlite:///"))
        self._folder = folder
        self.simulation: Simulation | None = None
        self._opened: list[Any] = []  # connections of the drivers; killed ones do not close theirs
        self.databases = [open_database(url) for _ in range(4)]
        self._empty = self.copy()
        for database in self.databases:
            self._instrument(database.engine)
            self._instrument(database.optuna_storage.engine)
        self._plain: Any = None

    def reset(self) -> None:
        """Empty the database."""
        self.simulation = None
        for database in self.databases:
            database.engine.dispose()
            database.optuna_storage.engine.dispose()
        self._close_opened()
        self.restore(self._empty)

    def connect_plain(self) -> Callable[[str], list[tuple[Any, ...]]]:
        """Return a function that runs SQL outside of the simulation."""
        if self.is_sqlite:
            sqlite = sqlite3.connect(self._path, timeout=0, isolation_level=None, check_same_thread=False)
            self._plain = sqlite
            return lambda query: sqlite.execute(query).fetchall()
        postgres = psycopg.connect(self.url, autocommit=True)
        self._plain = postgres
        return lambda query: postgres.execute(query).fetchall()

    def error(self) -> Exception:
        """Return the driver's error of a lost connection."""
        if self.is_sqlite:
            return sqlite3.OperationalError("database is locked")
        return psycopg.OperationalError("server closed the connection unexpectedly")

    def is_unlocked(self) -> bool:
        """Return whether no transaction of SQLite writes."""
        try:
            self._plain.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        self._plain.execute("ROLLBACK")
        return True

    def is_blocked(self, task: Task) -> bool:
        """Return whether a task waits for a lock of the server."""
        if self.is_sqlite or self._plain is None:
            return False
        pid = getattr(task, "backend_pid", None)
        query = f"SELECT 1 FROM pg_locks WHERE pid = {pid} AND NOT granted"  # pg_stat_activity lags behind
        return pid is not None and bool(self._plain.execute(query).fetchall())

    def _instrument(self, engine: sa.Engine) -> None:
        def execute(cursor: Any, statement: str, parameters: Any, context: Any, run: Callable[[], None]) -> bool:
            sim = self.simulation
            task = None if sim is None else sim.scheduler.current
            if sim is None or task is None:
                return False
            what = " ".join(statement.split())[:110]
            sim.before_statement(what)
            if not self.is_sqlite:
                task.backend_pid = cursor.connection.info.backend_pid  # type: ignore[attr-defined]
                run()
                return True
            while True:
                try:
                    run()
                except sqlite3.OperationalError as error:
                    if "locked" not in str(error):
                        raise
                    sim.scheduler.hand_over("waits for the lock of the database", is_ready=sim.backend.is_unlocked)
                else:
                    return True

        def do_execute(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
            return execute(cursor, statement, parameters, context, lambda: cursor.execute(statement, parameters))

        def do_executemany(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
            return execute(cursor, statement, parameters, context, lambda: cursor.executemany(statement, parameters))

        def do_execute_no_params(cursor: Any, statement: str, context: Any) -> bool:
            return execute(cursor, statement, None, context, lambda: cursor.execute(statement))

        sa.event.listen(engine, "connect", lambda connection, _: self._opened.append(connection))
        sa.event.listen(engine, "do_execute", do_execute)
        sa.event.listen(engine, "do_executemany", do_executemany)
        sa.event.listen(engine, "do_execute_no_params", do_execute_no_params)
        commit = engine.dialect.do_commit

        def do_commit(connection: Any) -> None:
            if self.simulation is not None:
                self.simulation.before_statement("COMMIT")
            commit(connection)
            if self.simulation is not None:
                self.simulation.after_commit()

        engine.dialect.do_commit = do_commit  # type: ignore[method-assign, assignment]

    def break_connections(self, slot: int | None = None, simulation: Simulation | None = None) -> None:
        """Close the connections of all drivers, as a restart of the server does, or of those of a killed driver."""
        for number, database in enumerate(self.databases):
            others = simulation.living() if simulation is not None else []
            if slot in {None, number} and not any(driver.slot == number for driver in others):
                database.engine.dispose()
                database.optuna_storage.engine.dispose()

    def copy(self) -> Any:
        """Return a copy of the database."""
        if self.is_sqlite:
            path = self._folder / f"copy-{time.monotonic_ns()}.db"
            _copy_file(self._path, path)
            return path
        with psycopg.connect(self.url) as connection:
            return {
                table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in self._tables(connection)
            }

    def restore(self, copy: Any) -> None:
        """Replace the content by that of a copy."""
        if self.is_sqlite:
            _copy_file(copy, self._path)
            return
        with psycopg.connect(self.url) as connection:
            connection.execute("SET session_replication_role = replica")
            connection.execute(f"TRUNCATE {', '.join(self._tables(connection))} RESTART IDENTITY")
            for table, rows in copy.items():
                for row in rows:
                    marks = ", ".join(["%s"] * len(row))
                    connection.execute(f"INSERT INTO {table} VALUES ({marks})", [_adapt(value) for value in row])
            for table, key in _SERIAL_KEYS.items():
                last = connection.execute(f"SELECT max({key}) FROM {table}").fetchone()
                if last and last[0] is not None:
                    connection.execute("SELECT setval(pg_get_serial_sequence(%s, %s), %s)", [table, key, last[0]])

    @staticmethod
    def _tables(connection: Any) -> list[str]:
        query = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
        return [row[0] for row in connection.execute(query)]

    def delete_study(self, name: str) -> None:
        """Delete a study as the dashboard does."""
        storage = optuna.storages.RDBStorage(
            self.url.replace("postgresql://", "postgresql+psycopg://"),
            skip_compatibility_check=True,  # it imports all of Optuna's migrations, each time
        )
        with contextlib.suppress(KeyError):  # no driver has created it yet
            optuna.delete_study(study_name=name, storage=storage)
        storage.engine.dispose()

    def close_plain(self) -> None:
        """Close the connection of `connect_plain`."""
        if self._plain is not None:
            self._plain.close()
            self._plain = None

    def close(self) -> None:
        """Close all connections."""
        self.close_plain()
        for database in self.databases:
            database.close()
        self._close_opened()

    def _close_opened(self) -> None:
        while self._opened:
            self._opened.pop().close()


_SERIAL_KEYS = {"studies": "study_id", "trials": "trial_id", "hpo_runs": "run"} | {
    table.name: next(iter(table.primary_key.columns)).name
    for table in (
        optuna_tables.study_directions,
        optuna_tables.study_user_attributes,
        optuna_tables.study_system_attributes,
        optuna_tables.trial_params,
        optuna_tables.trial_values,
        optuna_tables.trial_user_attributes,
        optuna_tables.trial_system_attributes,
        optuna_tables.intermediate_values,
    )
}


def _adapt(value: Any) -> Any:
    return psycopg.types.json.Json(value) if isinstance(value, dict | list) else value


# --- replacing the modules under test ---------------------------------------------------------------------------------


@contextlib.contextmanager
def simulated(
    backend: Backend, seed: int, kinds: tuple[str, ...] = FAULTS, *, pruner: str | None = None
) -> Iterator[Simulation]:
    """Replace time, threads, processes and machines in the storage code by those of a simulation."""
    backend.reset()
    simulation = Simulation(seed, backend, kinds, pruner=pruner)
    backend.simulation = simulation

    def scheduler() -> Scheduler:
        return simulation.scheduler

    def here() -> Driver:
        task = simulation.scheduler.current
        assert task is not None
        driver: Driver = task.host
        return driver

    class Process:
        def __init__(self, pid: int | None = None) -> None:
            wanted = here().pid if pid is None else pid
            found = [each for each in simulation.living() if each.pid == wanted and each.machine == here().machine]
            if not found:
                raise psutil.NoSuchProcess(wanted)
            self._driver = found[0]

        def create_time(self) -> float:
            return self._driver.born + simulation.boot_clock

        def status(self) -> str:
            return "running"

    class LiveRuns:
        """Each process has its own set."""

        def add(self, entry: tuple[int, float]) -> None:
            here().live_runs.add(entry)

        def discard(self, entry: tuple[int, float]) -> None:
            here().live_runs.discard(entry)

        def __contains__(self, entry: tuple[int, float]) -> bool:
            return entry in here().live_runs

    processes = SimpleNamespace(
        Process=Process,
        boot_time=lambda: simulation.boot_clock,
        AccessDenied=psutil.AccessDenied,
        NoSuchProcess=psutil.NoSuchProcess,
        STATUS_ZOMBIE="zombie",
    )

    def no_process(_pid: int, _signal: int) -> None:
        raise ProcessLookupError

    find_failures = retry_module._find_failures

    def find_and_note(study: Any) -> Any:
        failures = find_failures(study)
        simulation.scheduler.hand_over(
            "has read the failures", seconds=simulation.scheduler.draw.choice([0.0, 5.0, 20.0])
        )
        simulation.invariants.retried |= {(each.trial_id, each.token) for each in failures}
        return failures

    threads, clock = SimulatedThreading(scheduler), SimulatedTime(scheduler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease_module, "threading", threads)
        patch.setattr(writer_module, "threading", threads)
        patch.setattr(retry_module, "_find_failures", find_and_note)
        patch.setattr(run_module, "threading", threads)
        patch.setattr(run_module, "time", clock)
        patch.setattr(queue_module, "time", clock)
        patch.setattr(usage_module, "time", clock)
        patch.setattr(usage_module, "STORE_SECONDS", STORE_SECONDS)
        patch.setattr(errors_module, "time", clock)
        patch.setattr(lease_module, "psutil", processes)
        patch.setattr(lease_module, "os", SimpleNamespace(getpid=lambda: here().pid, kill=no_process))
        patch.setattr(lease_module, "host_id", lambda: here().machine)
        patch.setattr(lease_module, "live_runs", LiveRuns())
        patch.setattr(
            Database, "now_seconds", lambda _: sa.literal(scheduler().now + simulation.database_clock, sa.Float)
        )
        patch.setattr(
            ownership_module,
            "secrets",
            SimpleNamespace(randbits=lambda bits: simulation.scheduler.draw.getrandbits(bits)),
        )
        yield simulation
    backend.simulation = None


def run_seed(
    backend: Backend, seed: int, kinds: tuple[str, ...] = FAULTS, *, pruner: str | None = None
) -> tuple[str, list[str]]:
    """Run a seed; return the first violation, empty if there is none, and the schedule."""
    with simulated(backend, seed, kinds, pruner=pruner) as simulation:
        try:
            simulation.run()
        except AssertionError as error:
            return str(error), simulation.scheduler.log
        except Exception:  # noqa: BLE001 # an error of the storage code is a violation, too
            return traceback.format_exc(), simulation.scheduler.log
    return "", simulation.scheduler.log


@contextlib.contextmanager
def open_backend(storage: str) -> Iterator[Backend]:
    """Create a database for simulations: SQLite in memory-backed files, or a new PostgreSQL server."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="hpo-simulator-", dir=shared if shared.is_dir() else None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite_file, "BUSY_SECONDS", 0.0)
        if storage == "sqlite":
            backend = Backend(f"sqlite:///{folder}/hpo.db", folder)
            stop: Callable[[], None] = lambda: None  # noqa: E731
        else:
            from benchmarks.postgres import Postgres

            server = Postgres(folder)
            backend, stop = Backend(server.create_database("simulation"), folder), server.stop
        try:
            yield backend
        finally:
            backend.close()
            stop()
            shutil.rmtree(folder, ignore_errors=True)


def _run_range(job: tuple[str, int, int, tuple[str, ...], str | None]) -> list[tuple[int, str]]:
    storage, first, last, kinds, pruner = job
    failures = []
    with open_backend(storage) as backend:
        for seed in range(first, last):
            violation, _ = run_seed(backend, seed, kinds, pruner=pruner)
            if violation:
                failures.append((seed, violation))
                print(f"seed {seed}: {violation}", flush=True)
    return failures


def main() -> None:
    """Run seeds, or one seed with its schedule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs=2, type=int, default=(0, 200), metavar=("FIRST", "END"))
    parser.add_argument("--seed", type=int, help="run this one and print its schedule")
    parser.add_argument("--storage", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--pruner", choices=SPECIAL, help="this one in each seed")
    options = parser.parse_args()
    kinds, pruner = tuple(options.faults), options.pruner
    if options.seed is not None:
        with open_backend(options.storage) as backend:
            violation, log = run_seed(backend, options.seed, kinds, pruner=pruner)
        print("\n".join(log))
        print(violation or "no violation")
        sys.exit(bool(violation))
    started = time.monotonic()
    first, last = options.seeds
    size = 250
    jobs = [(options.storage, at, min(at + size, last), kinds, pruner) for at in range(first, last, size)]
    failures = 0
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for done, found in enumerate(pool.imap_unordered(_run_range, jobs), start=1):
            failures += len(found)
            print(
                f"{min(done * size, last - first)} seeds, {failures} failed, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
