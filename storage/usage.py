"""Device time: for how long the trials of a study held a GPU, or a slot of the CPU.

A claim inserts a row with 0 seconds. The run that claimed measures with a `Meter` for how long the trial holds its device,
and stores the sum since the claim. storage/README.md says what is exact, and what a crash may lose.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from storage import tables
from storage.database import Database

STORE_SECONDS = 10.0  # between two times at which a run stores its device time while it has nothing to report
Account = tuple[int, int]  # (trial_id, token): the row of a claim


@dataclass(frozen=True)
class Device:
    """What a trial holds while a worker runs it.

    Attributes:
        name: `cuda` or `cpu`.
        count: how many; less than 1 for a share of a GPU.
    """

    name: str
    count: float


CPU = Device("cpu", 1.0)


class Meter:
    """Measures for how long the claims of one run hold their devices, by the monotonic clock. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for a moment
        self._seconds: dict[Account, float] = {}  # of periods that have ended
        self._since: dict[Account, float] = {}  # of those that hold a device now
        self._unstored: set[Account] = set()  # those that have stopped since their last reading was stored
        self._devices: dict[Account, float] = {}  # how many devices each claim holds
        self._total = 0.0  # device-seconds of `_seconds`
        self._stored_at = time.monotonic()

    def open(self, account: Account, devices: float) -> None:
        """Note how many devices the claim holds while a worker runs it; 1 if this is not called."""
        with self._lock:
            self._devices[account] = devices

    def start(self, account: Account) -> None:
        """The claim holds its devices from now on. Nothing changes if it does already."""
        with self._lock:
            self._since.setdefault(account, time.monotonic())
            self._unstored.discard(account)  # it is stored with those that hold a device

    def stop(self, account: Account) -> None:
        """The claim holds no device from now on; it may start again. Nothing changes if it holds none."""
        with self._lock:
            self._stop(account)

    def stop_all(self) -> None:
        """No claim holds a device from now on."""
        with self._lock:
            for account in list(self._since):
                self._stop(account)

    def _stop(self, account: Account) -> None:
        since = self._since.pop(account, None)
        if since is not None:
            seconds = time.monotonic() - since
            self._seconds[account] = self._seconds.get(account, 0.0) + seconds
            self._total += seconds * self._devices.get(account, 1.0)
            self._unstored.add(account)

    @property
    def device_seconds(self) -> float:
        """The device-seconds of all claims so far."""
        with self._lock:
            now = time.monotonic()
            held = sum((now - since) * self._devices.get(account, 1.0) for account, since in self._since.items())
            return self._total + held

    @property
    def is_due(self) -> bool:
        """Whether readings must be stored: a claim has stopped, or none was stored for `STORE_SECONDS`."""
        with self._lock:
            is_late = time.monotonic() - self._stored_at >= STORE_SECONDS
            return bool(self._unstored) or (bool(self._since) and is_late)

    def read(self) -> dict[Account, float]:
        """Return {account: its seconds so far}, of those that are not stored completely."""
        with self._lock:
            now = time.monotonic()
            return {
                account: self._seconds.get(account, 0.0) + (now - self._since.get(account, now))
                for account in self._since.keys() | self._unstored
            }

    def note_stored(self, readings: Mapping[Account, float]) -> None:
        """The database has these readings."""
        with self._lock:
            self._stored_at = time.monotonic()
            self._unstored -= {
                account for account, seconds in readings.items() if seconds == self._seconds.get(account)
            }


def insert(connection: sa.Connection, account: Account, *, study_id: int, run_id: int, device: Device) -> None:
    """Insert the row of a new claim, in the transaction that claims."""
    trial_id, token = account
    row = {"trial": trial_id, "token": token, "study": study_id, "run": run_id, "seconds": 0.0}
    connection.execute(tables.usage.insert(), row | {"device": device.name, "devices": device.count})


def store(connection: sa.Connection, readings: Mapping[Account, float]) -> None:
    """Store the seconds of some claims. They never fall. A claim whose trial was deleted has no row, and is left out.

    Args:
        connection: in the caller's transaction.
        readings: {account: seconds so far}.
    """
    if not readings:
        return
    table = tables.usage
    is_later = sa.and_(
        table.c.trial == sa.bindparam("of_trial"),
        table.c.token == sa.bindparam("of_token"),
        table.c.seconds < sa.bindparam("so_far"),
    )
    rows = [
        {"of_trial": trial_id, "of_token": token, "so_far": seconds}
        for (trial_id, token), seconds in sorted(readings.items())  # in one order: two transactions may lock these rows
    ]
    connection.execute(table.update().where(is_later).values(seconds=sa.bindparam("so_far")), rows)


def read_device_seconds(
    database: Database, study_id: int | None = None, *, without_run: int | None = None
) -> dict[int, float]:
    """Return {study_id: device-seconds} as stored.

    Args:
        database: the database.
        study_id: of this study only; None for all studies.
        without_run: leave out what this run used.
    """
    table = tables.usage
    if table.name in database.missing_tables:
        return {}
    query = sa.select(table.c.study, sa.func.sum(table.c.seconds * table.c.devices)).group_by(table.c.study)
    if study_id is not None:
        query = query.where(table.c.study == study_id)
    if without_run is not None:
        query = query.where(table.c.run.is_distinct_from(without_run))
    with database.engine.connect() as connection:
        return {study: float(seconds) for study, seconds in connection.execute(query)}


def read_by_trial(database: Database, study_id: int) -> dict[int, dict[str, float]]:
    """Return {trial_id: {device: device-seconds}} of a study, as stored. Devices are `cuda` and `cpu`."""
    table = tables.usage
    seconds = sa.func.sum(table.c.seconds * table.c.devices)
    query = sa.select(table.c.trial, table.c.device, seconds).where(table.c.study == study_id)
    found: dict[int, dict[str, float]] = {}
    with database.engine.connect() as connection:
        for trial_id, device, device_seconds in connection.execute(query.group_by(table.c.trial, table.c.device)):
            found.setdefault(trial_id, {})[device] = float(device_seconds)
    return found
