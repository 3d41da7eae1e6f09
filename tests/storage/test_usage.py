"""Device time is stored for each claim: exactly, once, and even if the trial is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from storage import run as run_module
from storage import usage, writer
from storage.database import Database
from storage.errors import StorageError
from storage.ownership import ClaimedTrial
from storage.run import Run
from storage.study import Study
from storage.summaries import summarize
from storage.usage import Device, Meter
from tests.factories import Clock, wait_until
from tests.storage.builders import GRID, POINTS, claim_one, grid_run, kill, open_s, prune, sql

A, B = (1, 10), (2, 20)  # accounts


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(1000.0)
    monkeypatch.setattr(usage, "time", clock)
    return clock


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written in the background."""
    monkeypatch.setattr(writer, "BATCH_SECONDS", 3600.0)


HALF_A_GPU = Device("cuda", 0.5)


def stored(database: Database) -> list[tuple[int, float]]:
    """Return (number of the trial, seconds) of each claim, in the order of the claims."""
    query = "SELECT number, seconds FROM hpo_usage JOIN trials ON trial_id = trial ORDER BY run, number, seconds DESC"
    return [(number, seconds) for number, seconds in sql(database, query)]


# --- the meter --------------------------------------------------------------------------------------------------------


def test_a_meter_adds_up_the_periods_of_a_claim(clock: Clock) -> None:
    meter = Meter()
    meter.start(A)
    clock.now += 2
    meter.start(A)  # it holds the device already
    meter.start(B)
    clock.now += 3
    meter.stop(A)
    meter.stop(A)
    clock.now += 10
    meter.start(A)
    clock.now += 1
    assert meter.read() == {A: 6.0, B: 14.0}
    assert meter.device_seconds == 20.0
    meter.stop_all()
    clock.now += 100
    assert (meter.read(), meter.device_seconds) == ({A: 6.0, B: 14.0}, 20.0)


def test_a_reading_counts_as_stored_only_if_nothing_followed_it(clock: Clock) -> None:
    meter = Meter()
    meter.start(A)
    clock.now += 2
    earlier = meter.read()
    clock.now += 1
    meter.stop(A)
    meter.note_stored(earlier)
    assert meter.is_due
    assert meter.read() == {A: 3.0}
    meter.note_stored(meter.read())
    assert not meter.is_due
    assert meter.read() == {}
    assert meter.device_seconds == 3.0


def test_while_nothing_is_reported_a_reading_is_due_every_ten_seconds(clock: Clock) -> None:
    meter = Meter()
    clock.now += 100
    assert not meter.is_due, "no trial runs"
    meter.start(A)
    meter.note_stored({})
    clock.now += 9
    assert not meter.is_due
    clock.now += 1
    assert meter.is_due
    meter.note_stored(meter.read())
    assert not meter.is_due


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_each_end_of_a_trial_stores_its_device_time(
    study: Study, database: Database, clock: Clock, quiet: None
) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claims = [claim_one(run, HALF_A_GPU) for _ in range(4)]
        assert stored(database) == [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0)]
        for claim in claims:
            run.hold_device(claim)
            clock.now += 1
            run.report(claim, 1, {"m": 0.5}, 0.5)
        completed, failed, pruned, released = claims
        clock.now += 10
        run.complete(completed, 0.5)
        clock.now += 10
        run.fail(failed, "a reason")
        prune(run, pruned)
        run.free_device(pruned)
        clock.now += 10
        run.release(released)
        clock.now += 10
    assert stored(database) == [(0, 14.0), (1, 23.0), (2, 22.0), (3, 31.0)]
    assert study.device_seconds() == 90.0 / 2
    assert sql(database, "SELECT DISTINCT study, run, device, devices FROM hpo_usage") == [
        (study.study_id, run.run_id, "cuda", 0.5)
    ]
    by_trial = study.device_seconds_by_trial()
    assert by_trial == {claim.trial_id: {"cuda": s / 2} for claim, s in zip(claims, (14, 23, 22, 31), strict=True)}


def test_the_time_between_a_dead_worker_and_its_successor_does_not_count(
    study: Study, database: Database, clock: Clock
) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claim = claim_one(run)
        run.hold_device(claim)
        clock.now += 5
        run.record_crash(claim)
        clock.now += 100
        run.hold_device(claim)
        clock.now += 7
        run.complete(claim, 0.5)
    assert stored(database) == [(0, 12.0)]


def test_a_resumed_and_a_retried_trial_adds_to_what_it_has_used(study: Study, clock: Clock) -> None:
    for device, seconds in ((Device("cpu", 1.0), 5), (Device("cuda", 2.0), 7)):
        with grid_run(study) as run:
            run.enqueue(POINTS[:1], GRID)
            claim = claim_one(run, device)
            run.hold_device(claim)
            clock.now += seconds
            run.release(claim)
    assert study.device_seconds() == 5 + 2 * 7
    assert study.device_seconds_by_trial() == {claim.trial_id: {"cpu": 5.0, "cuda": 14.0}}


def test_a_killed_run_loses_only_what_followed_its_last_reading(study: Study, database: Database, clock: Clock) -> None:
    """It reports nothing: its epoch is longer than that."""
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claim = claim_one(run)
        run.hold_device(claim)
        clock.now += usage.STORE_SECONDS
        wait_until(lambda: stored(database) == [(0, usage.STORE_SECONDS)])
        clock.now += usage.STORE_SECONDS - 1
        kill(run)
        assert stored(database) == [(0, usage.STORE_SECONDS)]
        with grid_run(study) as successor:
            successor.enqueue(POINTS, GRID)
            again = claim_one(successor)
            assert again.number == 0
            successor.hold_device(again)
            clock.now += 3
            successor.complete(again, 0.5)
        assert stored(database) == [(0, usage.STORE_SECONDS), (0, 3.0)]


def test_a_run_that_lost_its_trial_still_accounts_for_what_it_used(
    study: Study, database: Database, clock: Clock
) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claim = claim_one(run)
        run.hold_device(claim)
        clock.now += 5
        with database.engine.begin() as connection:
            connection.execute(sa.text("UPDATE hpo_trials SET token = 1"))
        run.report(claim, 1, {"m": 0.5}, 0.5)
        run.flush()
        assert sql(database, "SELECT count(*) FROM hpo_metrics") == [(0,)]
        assert stored(database) == [(0, 5.0)]
        clock.now += 2
        run.free_device(claim)
    assert stored(database) == [(0, 7.0)]


@pytest.mark.parametrize("earlier", [False, True])
def test_repeating_a_reading_changes_nothing(study: Study, database: Database, clock: Clock, earlier: bool) -> None:
    """As after a lost answer, or by a thread that was left behind."""
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claim = claim_one(run)
        run.hold_device(claim)
        clock.now += 5
        run.complete(claim, 0.5)
        run.flush()
        for _ in range(2):
            with database.transaction() as connection:
                usage.store(connection, {claim.account: 4.0 if earlier else 5.0})
        assert stored(database) == [(0, 5.0)]


def test_the_device_time_of_a_deleted_study_goes_to_no_other(study: Study, database: Database, clock: Clock) -> None:
    """SQLite gives its ids to the next one."""
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        lost = claim_one(run)
        run.hold_device(lost)
        clock.now += 5
        database.optuna_storage.delete_study(study.study_id)
        other = open_s(database)
        with grid_run(other) as of_other:
            of_other.enqueue(POINTS, GRID)
            claim = claim_one(of_other)
            run.free_device(lost)
            run.flush()
            assert sql(database, "SELECT token, seconds FROM hpo_usage") == [(claim.token, 0.0)]


def test_device_time_that_cannot_be_stored_is_an_error_and_kept(
    study: Study, database: Database, clock: Clock, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claim = claim_one(run)
        run.hold_device(claim)
        clock.now += 5
        run.free_device(claim)
        with monkeypatch.context() as patch:
            patch.setattr(usage, "store", fail)
            with pytest.raises(StorageError, match=r"cannot store the device time: .*a bug"):
                run.flush()
        run.flush()
        assert stored(database) == [(0, 5.0)]


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_runs(study: Study, clock: Clock, quiet: None) -> Iterator[tuple[Run, ClaimedTrial, Run, ClaimedTrial]]:
    """Two runs, each with a trial that holds half a GPU."""
    with grid_run(study) as first, grid_run(study) as second:
        claims = []
        for run in (first, second):
            run.enqueue(POINTS, GRID)
            claims.append(claim_one(run, HALF_A_GPU))
            run.hold_device(claims[-1])
        yield first, claims[0], second, claims[1]


def test_a_run_knows_its_own_device_time_and_what_others_have_stored(
    two_runs: tuple[Run, ClaimedTrial, Run, ClaimedTrial], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, claim, second, other = two_runs
    now = Clock()
    monkeypatch.setattr(run_module, "time", now)
    clock.now += 10
    assert first.device_seconds() == 5.0, "the other has stored nothing"
    second.report(other, 1, {"m": 0.5}, 0.5)
    second.flush()
    assert first.device_seconds() == 5.0, "it has just looked"
    now.now += run_module.OTHERS_SECONDS
    assert first.device_seconds() == 5.0 + 5.0
    first.complete(claim, 0.5)
    first.flush()
    clock.now += 10
    assert first.device_seconds() == 5.0 + 5.0, "its trial has ended"
    assert second.device_seconds() == 10.0 + 5.0


def test_a_list_of_studies_says_what_each_has_used_and_what_it_costs(study: Study, database: Database) -> None:
    (before,) = summarize(database)
    assert (before.device_seconds, before.cost) == (0.0, None)
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claim_one(run)
    with database.engine.begin() as connection:
        connection.execute(sa.text("UPDATE hpo_usage SET seconds = 1800.0"))
    prices: list[tuple[object, float | None]] = [
        ({"budget": {"cost": {"gpu_hour": 2.5, "limit": None}}}, 1.25),
        ({"budget": {"cost": None}}, None),
        ({"budget": {"cost": {"gpu_hour": "cheap"}}}, None),
        ({"budget": 1}, None),
    ]
    for settings, cost in prices:
        study.optuna_study.set_user_attr("hpo:settings", settings)
        (summary,) = summarize(database)
        assert (summary.device_seconds, summary.cost) == (1800.0, cost)
