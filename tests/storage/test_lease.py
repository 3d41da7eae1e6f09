"""Leases: a run counts as alive until its lease expires or its process ends."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
import pytest
import sqlalchemy as sa

from storage import claims, lease, ownership, tables
from storage.database import Database, open_database
from storage.errors import StorageError
from storage.lease import Lease, host_id, is_run_dead, started_after_boot
from storage.records import read_runs
from storage.study import Study
from tests.factories import ROOT, wait_until
from tests.storage.builders import allow_takeovers, expire_leases, open_s


def start_lease(study: Study, **options: Any) -> Lease:
    started = Lease(study.database, study.key, provenance={}, **options)
    started.start()
    return started


def start_far_lease(study: Study, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Lease:
    """Start the lease of a run on another machine."""
    with monkeypatch.context() as patch:
        patch.setattr(lease, "host_id", lambda: "another machine")
        return start_lease(study, **options)


def stop(started: Lease) -> None:
    """Stop a lease and wait for its thread, which must not renew it while the database is closed."""
    started.stop()
    started._thread.join()


def row_of(study: Study, of: Lease) -> Any:
    return next(row for row in read_runs(study.database, study.study_id) if row.run == of.key.run_id)


def test_a_thread_renews_the_lease(study: Study) -> None:
    renewed = start_lease(study, lease_seconds=0.5)
    first = row_of(study, renewed)
    wait_until(lambda: row_of(study, renewed).lease_until > first.lease_until)
    stop(renewed)  # PostgreSQL may still store a renewal that has begun
    renewed.end()
    last = row_of(study, renewed)
    assert first.last_heard < last.ended == pytest.approx(last.lease_until, abs=0.1)
    assert last.ended == pytest.approx(last.last_heard, abs=0.1)


def claim_by(study: Study, of: Lease) -> claims.Scan:
    token = ownership.new_token()
    return claims.claim_existing(study.database, of.key, token, own_tokens={token}, is_run_dead=lease.is_run_dead)


def start_trial(study: Study, of: Lease) -> int:
    """Create a trial that a run owns; return its number."""
    configuration = claims.Configuration("key", {}, {})
    claim = claims.register(study.database, of.key, ownership.new_token(), configuration, None)
    assert isinstance(claim, ownership.ClaimedTrial)
    return claim.number


def test_the_trial_of_a_run_on_another_machine_is_taken_once_its_lease_has_expired(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, far = start_lease(study), start_far_lease(study, monkeypatch)
    allow_takeovers(database)
    far.stop()
    number = start_trial(study, far)
    scan = claim_by(study, own)
    assert scan.claim is None
    assert scan.others_are_running
    expire_leases(database, far.key.run_id)
    far.renew()
    assert claim_by(study, own).claim is None
    expire_leases(database, far.key.run_id)
    taken = claim_by(study, own).claim
    assert taken is not None
    assert taken.number == number
    stop(own)


def test_after_an_outage_the_other_runs_get_time_to_renew(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim itself notices that its own lease has expired, too: the thread may renew it before or after."""
    own, far = start_lease(study, lease_seconds=1.0), start_far_lease(study, monkeypatch)
    stop(own)
    far.stop()
    allow_takeovers(database)
    start_trial(study, far)
    expire_leases(database)
    assert claim_by(study, own).claim is None
    assert claim_by(study, own).claim is None, "its lease holds again, but only since the last claim"
    own.renew()
    assert claim_by(study, own).claim is None
    wait_until(lambda: claim_by(study, own).claim is not None)


def test_a_run_that_starts_after_an_outage_gives_the_others_time_to_renew(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = start_far_lease(study, monkeypatch)
    far.stop()
    start_trial(study, far)
    expire_leases(database)
    new = start_lease(study, lease_seconds=1.0)
    assert claim_by(study, new).claim is None
    wait_until(lambda: claim_by(study, new).claim is not None)
    stop(new)


def test_the_trial_of_a_run_that_has_ended_is_taken_at_once(study: Study) -> None:
    own, other = start_lease(study), start_lease(study)
    start_trial(study, other)
    assert claim_by(study, own).claim is None, "it is a run of this process that continues"
    other.end()
    assert claim_by(study, own).claim is not None
    stop(own)


def test_the_trial_of_a_run_of_this_process_is_taken_at_once_even_if_its_end_was_not_stored(study: Study) -> None:
    """As in a notebook: the database was away when the run left, and the process lives on."""
    own, other = start_lease(study), start_lease(study)
    start_trial(study, other)
    assert claim_by(study, own).claim is None
    other.stop()
    assert claim_by(study, own).claim is not None
    stop(own)


def test_runs_with_the_same_key_in_two_databases_are_told_apart(study: Study, tmp_path: Path) -> None:
    other = start_lease(study)
    start_trial(study, other)
    other.stop()
    with open_database(f"sqlite:///{tmp_path}/second.db") as second:
        living = start_lease(open_s(second))
        assert living.key.run_id == other.key.run_id
        own = start_lease(study)
        assert claim_by(study, own).claim is not None
        for each in (living, own):
            stop(each)


_FORGET_KEYS = {
    "sqlite": "DELETE FROM sqlite_sequence WHERE name = 'hpo_runs'",
    "postgresql": "SELECT setval('hpo_runs_run_seq', 1, false)",
}


def test_a_run_whose_key_a_restored_copy_gave_to_another_one_touches_nothing_of_it(
    study: Study, database: Database
) -> None:
    first = start_lease(study)
    with database.engine.begin() as connection:  # a copy from before it started has no row, and gives the key out again
        connection.execute(tables.runs.delete())
        connection.execute(sa.text(_FORGET_KEYS[connection.dialect.name]))
    second = start_lease(study)
    assert first.key.run_id == second.key.run_id
    before = row_of(study, second)[:-1]  # without the time of reading
    with pytest.raises(StorageError, match="restored from an older copy"):
        claim_by(study, first)
    first.renew()
    first.end()
    assert row_of(study, second)[:-1] == before
    stop(second)


@pytest.mark.slow
def test_a_suspended_process_on_this_machine_loses_its_trials_once_its_lease_has_expired(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = subprocess.Popen(["sleep", "60"])
    with monkeypatch.context() as patch:
        process = psutil.Process(child.pid)
        patch.setattr(lease, "os", SimpleNamespace(getpid=lambda: child.pid))
        patch.setattr(psutil, "Process", lambda: process)
        other = start_lease(study)
    other._stopped.set()
    own = start_lease(study)
    number = start_trial(study, other)
    allow_takeovers(database)
    assert claim_by(study, own).claim is None
    assert claim_by(study, own).others_are_running
    expire_leases(database, other.key.run_id)
    taken = claim_by(study, own).claim
    assert taken is not None
    assert taken.number == number
    stop(own)
    child.kill()
    child.wait()


@pytest.mark.slow
def test_a_run_on_this_machine_is_dead_as_soon_as_its_process_is() -> None:
    child = subprocess.Popen(["sleep", "60"])
    process = psutil.Process(child.pid)
    run = SimpleNamespace(host=host_id(), pid=child.pid, process_started=started_after_boot(process))
    assert not is_run_dead(run)
    earlier = SimpleNamespace(host=run.host, pid=run.pid, process_started=run.process_started - 60)
    assert is_run_dead(earlier), "the PID was reused"
    assert is_run_dead(SimpleNamespace(host="another machine")) is None
    child.kill()
    wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE)
    assert is_run_dead(run), "a zombie is dead"
    child.wait()
    assert is_run_dead(run)


@pytest.mark.parametrize(
    ("found", "killed", "is_dead"),
    [
        (psutil.NoSuchProcess(1), ProcessLookupError(), True),
        (psutil.NoSuchProcess(1), PermissionError(), None),
        (psutil.AccessDenied(1), None, None),
    ],
)
def test_a_process_that_proc_hides_does_not_count_as_dead(
    monkeypatch: pytest.MonkeyPatch, found: Exception, killed: Exception | None, *, is_dead: bool | None
) -> None:
    """As /proc does with the processes of other users, mounted with `hidepid=2`."""

    def look(_: int) -> NoReturn:
        raise found

    def kill(pid: int, number: int) -> None:
        assert (pid, number) == (4711, 0)
        if killed is not None:
            raise killed

    monkeypatch.setattr(psutil, "Process", look)
    monkeypatch.setattr(lease, "os", SimpleNamespace(getpid=os.getpid, kill=kill))
    row = SimpleNamespace(run=1, started=1.0, host=host_id(), pid=4711, process_started=1.0)
    assert is_run_dead(row) is is_dead


def test_a_change_of_the_clock_kills_no_run(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    own = start_lease(study)
    started, boot = psutil.Process().create_time(), psutil.boot_time()
    row = row_of(study, own)
    of_version_1 = SimpleNamespace(
        run=row.run, started=row.started, host=host_id(), pid=os.getpid(), process_started=started
    )
    assert not is_run_dead(of_version_1)
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: started + 3600)  # psutil adds the time of the boot
    monkeypatch.setattr(psutil, "boot_time", lambda: boot + 3600)
    assert not is_run_dead(row_of(study, own))
    stop(own)


@pytest.mark.slow
def test_all_processes_of_a_machine_have_the_same_host_id() -> None:
    code = "from storage.lease import host_id; print(host_id())"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout == f"{host_id()}\n"


def test_a_container_with_another_host_name_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    here = host_id()
    monkeypatch.setattr(platform, "node", lambda: "another name")
    assert host_id() != here


@pytest.mark.skipif(not Path("/proc/sys/kernel/random/boot_id").exists(), reason="needs Linux")
def test_a_reboot_changes_the_host_id(monkeypatch: pytest.MonkeyPatch) -> None:
    here, read_text = host_id(), Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: "another boot" if path.name == "boot_id" else read_text(path))
    assert host_id() != here


def test_a_renewal_that_failed_is_repeated_soon(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    renewals: list[float] = []

    def fail_twice(_: Lease) -> None:
        renewals.append(time.monotonic())
        if len(renewals) <= 2:
            raise StorageError("away")

    monkeypatch.setattr(Lease, "renew", fail_twice)
    lease = Lease(study.database, study.key, provenance={}, lease_seconds=6.0)
    lease.start()
    wait_until(lambda: len(renewals) == 3)
    stop(lease)
    assert renewals[2] - renewals[0] < 0.9, "a sixth of a lease is a second"
