"""Leases: a run counts as alive until its lease expires or its process ends."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from storage import lease
from storage.database import Database
from storage.lease import Lease, host_id, is_process_dead
from storage.studies import Study
from storage.tables import read_runs
from tests.storage.builders import expire_leases


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start_lease(study: Study, **options: Any) -> Lease:
    started = Lease(study.database, study.study_id, provenance={}, **options)
    started.start()
    return started


def start_far_lease(study: Study, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Lease:
    """Start the lease of a run on another machine."""
    with monkeypatch.context() as patch:
        patch.setattr(lease, "host_id", lambda: "another machine")
        return start_lease(study, **options)


def row_of(study: Study, of: Lease) -> Any:
    return next(row for row in read_runs(study.database, study.study_id) if row.run == of.run_id)


def test_a_thread_renews_the_lease(study: Study) -> None:
    renewed = start_lease(study, lease_seconds=0.5)
    first = row_of(study, renewed)
    wait_until(lambda: row_of(study, renewed).lease_until > first.lease_until)
    renewed.end()
    last = row_of(study, renewed)
    assert first.last_heard < last.ended == pytest.approx(last.lease_until, abs=0.1)
    assert last.ended == pytest.approx(last.last_heard, abs=0.1)


def test_a_run_on_another_machine_is_alive_until_its_lease_expires(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, far = start_lease(study), start_far_lease(study, monkeypatch, lease_seconds=0.3)
    far.stop()
    wait_until(lambda: own.is_dead(row_of(study, far)))
    far.renew()
    row = row_of(study, far)
    assert row.lease_until > row.last_heard
    own.stop()


def test_after_an_outage_the_other_runs_get_time_to_renew(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, far = start_lease(study), start_far_lease(study, monkeypatch)
    clock = time.monotonic()
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: clock))
    assert not own.is_dead(row_of(study, far))
    expire_leases(database)
    assert own.is_dead(row_of(study, far))
    own.renew()
    assert not own.is_dead(row_of(study, far))
    clock += lease.LEASE_SECONDS + 1
    assert own.is_dead(row_of(study, far))
    far.renew()
    assert not own.is_dead(row_of(study, far))
    own.stop()
    far.stop()


def test_a_run_on_this_machine_is_dead_as_soon_as_its_process_is() -> None:
    child = subprocess.Popen(["sleep", "60"])
    process = psutil.Process(child.pid)
    run = SimpleNamespace(pid=child.pid, process_started=process.create_time())
    assert not is_process_dead(run)
    assert is_process_dead(SimpleNamespace(pid=run.pid, process_started=run.process_started - 60)), "the PID was reused"
    child.kill()
    wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE)
    assert is_process_dead(run), "a zombie is dead"
    child.wait()
    assert is_process_dead(run)


def test_the_identity_of_a_machine_does_not_change() -> None:
    assert host_id() == host_id()
    assert host_id().count("/") >= 1
