"""A run's lease: the time until which other runs treat its driver as alive. A thread renews it."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from storage import tables
from storage.database import RETRY_SECONDS, Database, retry_while_down

LEASE_SECONDS = 60.0
SECONDS_1970 = 1e9  # version 1 of our tables stored the start of a process in seconds since 1970, far above any uptime


class Lease:
    """A row in hpo_runs and the thread that renews it.

    Args:
        provenance: versions and command of the run, for a replay.
        lease_seconds: how long the run counts as alive after its last renewal. It renews six times as often.
    """

    def __init__(
        self,
        database: Database,
        study_id: int,
        *,
        provenance: Mapping[str, Any],
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self.run_id = -1  # set by `start`
        self._database = database
        self._study_id = study_id
        self._provenance = dict(provenance)
        self._lease_seconds = lease_seconds
        self._stopped = threading.Event()
        self._no_takeover_before = 0.0  # by the monotonic clock

    def start(self) -> None:
        """Insert the row, which sets `run_id`, and start the thread."""

        def insert() -> int:
            now = self._database.now_seconds()
            row = sa.insert(tables.runs).values(
                study=self._study_id,
                host=host_id(),
                pid=os.getpid(),
                process_started=started_after_boot(psutil.Process()),
                started=now,
                last_heard=now,
                lease_until=now + self._lease_seconds,
                provenance=self._provenance,
            )
            with self._database.engine.begin() as connection:
                return int(connection.execute(row.returning(tables.runs.c.run)).scalar_one())

        self.run_id = retry_while_down(self._database, insert)
        threading.Thread(target=self._keep_renewing, name="hpo-lease", daemon=True).start()

    def stop(self) -> None:
        """Stop the thread. The lease expires unless `end` is called."""
        self._stopped.set()

    def end(self, timeout_seconds: float = RETRY_SECONDS) -> None:
        """Mark the run as ended. Other runs may take its trials at once."""

        def write() -> None:
            now = self._database.now_seconds()
            with self._database.engine.begin() as connection:
                connection.execute(self._update().values(ended=now, last_heard=now, lease_until=now))

        self.stop()
        retry_while_down(self._database, write, timeout_seconds)

    def renew(self) -> None:
        """Extend the lease from now."""
        table = tables.runs
        with self._database.engine.begin() as connection:
            now = self._database.now_seconds()
            had_expired = connection.scalar(sa.select(table.c.lease_until < now).where(table.c.run == self.run_id))
            connection.execute(self._update().values(last_heard=now, lease_until=now + self._lease_seconds))
            if had_expired:
                # During an outage all leases expire. Let the other living runs renew theirs before their trials are taken.
                self._no_takeover_before = time.monotonic() + self._lease_seconds

    def exists(self) -> bool:
        """Return whether the run is in the database. It is deleted with its study."""
        query = sa.select(tables.runs.c.run).where(tables.runs.c.run == self.run_id)
        with self._database.engine.connect() as connection:
            return connection.scalar(query) is not None

    def is_dead(self, run: Any) -> bool:
        """Return whether another run is dead, so that its trials may be taken.

        Args:
            run: its row in hpo_runs, with `now`, the database's time.
        """
        if run.host == host_id():
            return is_process_dead(run)  # no need to wait until the lease expires
        return bool(run.lease_until < run.now) and time.monotonic() >= self._no_takeover_before

    def _update(self) -> sa.Update:
        return tables.runs.update().where(tables.runs.c.run == self.run_id)

    def _keep_renewing(self) -> None:
        while not self._stopped.wait(self._lease_seconds / 6):
            # While the database is down, the next renewal tries again.
            with contextlib.suppress(Exception):
                self.renew()


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


def is_process_dead(run: Any) -> bool:
    """Return whether the process of a run on this machine has ended.

    Args:
        run: a row of hpo_runs whose `host` is `host_id()`.
    """
    try:
        process = psutil.Process(run.pid)
        started = run.process_started
        if started > SECONDS_1970:
            started -= psutil.boot_time()
        is_other = abs(started_after_boot(process) - started) > 1.0  # the PID was reused
        return is_other or bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
