"""A run's lease: the time until which other runs treat its driver as alive. A thread renews it."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from storage import tables
from storage.database import Database
from storage.errors import RETRY_SECONDS, retry_while_down
from storage.optuna_tables import StudyKey
from storage.ownership import RunKey, is_row_of, lock_study, renew_lease
from storage.usage import CPU

LEASE_SECONDS = 60.0
MAX_FAILURES = 2
RENEWAL_SHARE = 1 / 6  # of a lease: between two renewals
# A run that starts just after an outage must not take the trials of living runs.
STARTUP_SHARE = 1 / 3
CLOCK_SECONDS = 1.0  # by which a lease may have been renewed after the database's time was read
# The living runs of this process, as (run, started): two databases may have runs with the same key. A run that has ended
# here may be open in the database, which was away when it ended. This set distinguishes it from others.
live_runs: set[tuple[int, float]] = set()
SECONDS_1970 = 1e9  # version 1 of our tables stored the start of a process in seconds since 1970, far above any uptime


class Lease:
    """A row in hpo_runs and the thread that renews it.

    Args:
        provenance: versions and command of the run, for a replay.
        lease_seconds: how long the run counts as alive after its last renewal. It renews six times as often.
        max_failures: see `ownership.RunKey`.
    """

    def __init__(
        self,
        database: Database,
        study: StudyKey,
        *,
        provenance: Mapping[str, Any],
        lease_seconds: float = LEASE_SECONDS,
        max_failures: int = MAX_FAILURES,
    ) -> None:
        # `start` sets run_id and started, and each claim the device.
        self.key = RunKey(study, -1, 0.0, lease_seconds, max_failures, CPU)
        self._database = database
        self._provenance = dict(provenance)
        self._entry = (-1, 0.0)  # in `live_runs`
        self._stopped = threading.Event()
        self._thread: threading.Thread

    def start(self) -> None:
        """Insert the row, which sets `key.run_id`, and start the thread.

        If the answer was lost, the repetition inserts another row. The first one owns no trial, and counts as dead.

        Raises:
            StorageError: the study was deleted, or the database cannot be used (after retries).
        """
        seconds = self.key.lease_seconds

        def insert() -> tuple[int, float]:
            now = self._database.now_seconds()
            row = sa.insert(tables.runs).values(
                study=self.key.study.study_id,
                host=host_id(),
                pid=os.getpid(),
                process_started=started_after_boot(psutil.Process()),
                started=now,
                last_heard=now,
                lease_until=now + seconds,
                takeover_after=now + seconds * STARTUP_SHARE,
                provenance=self._provenance,
            )
            with self._database.transaction() as connection:
                lock_study(connection, self._database, self.key.study)
                inserted = connection.execute(row.returning(tables.runs.c.run, tables.runs.c.started)).one()
            return inserted.run, inserted.started

        self._entry = retry_while_down(self._database, insert)
        self.key = replace(self.key, run_id=self._entry[0], started=self._entry[1])
        live_runs.add(self._entry)
        self._thread = threading.Thread(target=self._keep_renewing, name="hpo-lease", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread. From now on, other runs of this process may take the trials of this one, even without `end`."""
        self._stopped.set()
        live_runs.discard(self._entry)

    def end(self, timeout_seconds: float = RETRY_SECONDS) -> None:
        """Mark the run as ended. Other runs may take its trials at once."""

        def write() -> None:
            now = self._database.now_seconds()
            update = tables.runs.update().where(is_row_of(self.key))
            with self._database.transaction() as connection:
                connection.execute(update.values(ended=now, last_heard=now, lease_until=now))

        self.stop()
        retry_while_down(self._database, write, timeout_seconds)

    def renew(self) -> None:
        """Extend the lease from now. Idempotent."""
        with self._database.transaction() as connection:
            renew_lease(connection, self._database, self.key)

    def _keep_renewing(self) -> None:
        pause_seconds = interval = self.key.lease_seconds * RENEWAL_SHARE
        while not self._stopped.wait(pause_seconds):
            pause_seconds = interval / 10  # while the database is down
            with contextlib.suppress(Exception):
                self.renew()
                pause_seconds = interval


def host_id() -> str:
    """Return this machine's identity: host name, boot id and PID namespace. Within it, a PID names one process."""
    parts = [platform.node()]
    for source in (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")):
        with contextlib.suppress(OSError):
            parts.append(source.readlink().name if source.is_symlink() else source.read_text().strip())
    return "/".join(parts)


def started_after_boot(process: psutil.Process) -> float:
    """Return when a process started, in seconds after the machine did: a change of the clock does not change it."""
    return process.create_time() - psutil.boot_time()


def is_run_dead(run: Any) -> bool | None:
    """Return whether a run has ended, or its process has; None if its lease decides.

    The lease decides for a living process on this machine, too: it may be suspended.

    Args:
        run: a row with `run`, `host`, `pid`, `process_started` and `started` of hpo_runs.
    """
    if run.host != host_id():
        return None
    try:
        process = psutil.Process(run.pid)
        started = run.process_started
        if started > SECONDS_1970:
            started -= psutil.boot_time()
        is_other = abs(started_after_boot(process) - started) > 1.0  # the PID was reused
        if is_other or process.status() == psutil.STATUS_ZOMBIE:
            return True
    except psutil.AccessDenied:
        return None
    except psutil.NoSuchProcess:
        return None if _is_hidden(run.pid) else True
    if run.pid == os.getpid():
        return (run.run, run.started) not in live_runs
    return None


def is_run_alive(run: Any) -> bool:
    """Return whether a run works on its study, as far as the database and this machine know.

    If the database's clock was set back, leases end too late. A living run corrects its own with the next renewal.

    Args:
        run: a row of `records.read_runs`.
    """
    holds = run.lease_until >= run.now and run.last_heard <= run.now + CLOCK_SECONDS
    return run.ended is None and holds and not is_run_dead(run)


def _is_hidden(pid: int) -> bool:
    """Return whether a process exists that /proc does not show: with `hidepid=2`, it hides those of other users."""
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
