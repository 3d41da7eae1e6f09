"""A driver's operations: claiming, reporting and finishing trials, with one run and with several."""

from __future__ import annotations

import contextlib
import math
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution
from sqlalchemy.exc import OperationalError

from storage import reporting
from storage import run as run_module
from storage.database import Database, open_database
from storage.pruners import Median
from storage.study import Study
from tests.factories import trial_states
from tests.storage.builders import GRID, POINTS, claim_one, claim_point, grid_run, locked, open_s, prune, sql

if TYPE_CHECKING:
    from benchmarks.postgres import Postgres


def test_a_grid_is_claimed_point_by_point_until_it_is_finished(study: Study) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claimed = []
        while (claim := run.claim()) is not None:
            assert not run.finished
            claimed.append(claim.params)
            run.report(claim, 1, {"m": 0.5}, 0.5)
            run.complete(claim, 0.5)
        assert run.finished
    assert claimed == POINTS
    assert trial_states(study) == ["COMPLETE"] * 4


def test_a_search_is_not_finished_while_its_last_trial_waits_again(study: Study, database: Database) -> None:
    """The end of the last trial is still in the buffer when the database turns out to be restored from a copy."""
    with grid_run(study, learns=False) as run:
        run.enqueue(POINTS[:1], GRID)
        lost = claim_one(run)
        for epoch in (1, 2):
            run.report(lost, epoch, {"m": epoch / 4}, epoch / 4)
        run.flush()
        with database.engine.begin() as connection:  # what a copy from before the second epoch lacks
            connection.exec_driver_sql("DELETE FROM trial_intermediate_values WHERE step = 2")
            connection.exec_driver_sql("DELETE FROM hpo_metrics WHERE epoch = 2")
        with run._writer.paused():
            run.report(lost, 3, {"m": 0.75}, 0.75)
            run.complete(lost, 0.75)
            assert run._queue.claim() is None
            assert run.finished, "as far as the database knows"
        again = claim_one(run)
        assert again.values == {1: 0.25}
        assert not run.finished
        run.complete(again, 0.75)
        assert run.claim() is None
        assert run.finished
    assert trial_states(study) == ["COMPLETE"]


def test_report_stores_every_metric_and_can_be_repeated(study: Study, database: Database) -> None:
    with grid_run(study) as run:
        claim = claim_point(run)
        for epoch in (1, 2, 2):
            run.report(claim, epoch, {"m": epoch / 10, "loss": math.nan, "huge": math.inf}, epoch / 10)
        run.complete(claim, 0.2, {"test_accuracy": 0.3})
    trial = study.trials()[0]
    assert trial.intermediate_values == {1: 0.1, 2: 0.2}
    assert trial.value == 0.2
    assert trial.user_attrs["test_accuracy"] == 0.3
    rows = sql(database, "SELECT epoch, name, value FROM hpo_metrics ORDER BY epoch, name")
    assert rows == [
        (epoch, name, value)
        for epoch in (1, 2)
        for name, value in (("huge", math.inf), ("loss", None), ("m", epoch / 10))
    ]


def test_the_state_of_a_trial_says_how_it_ended(study: Study) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claims = [claim_one(run) for _ in range(4)]
        for claim in claims:
            run.report(claim, 1, {"m": 0.1}, 0.1)
            run.report(claim, 2, {"m": 0.2}, 0.2)
        run.complete(claims[0], 0.2)
        prune(run, claims[1])
        run.fail(claims[2], "m is nan after epoch 2", "Traceback ...")
        run.release(claims[3])
    trials = study.trials()
    assert trial_states(study) == ["COMPLETE", "PRUNED", "FAIL", "WAITING"]
    assert trials[1].value == 0.2
    assert all(trial.intermediate_values == {1: 0.1, 2: 0.2} for trial in trials)
    assert trials[2].user_attrs == {"fail_reason": "m is nan after epoch 2", "traceback": "Traceback ..."}


def test_complete_can_be_repeated(study: Study) -> None:
    with grid_run(study) as run:
        claim = claim_point(run)
        run.complete(claim, 0.5)
        run.complete(claim, 0.5)
    assert trial_states(study) == ["COMPLETE"]


def test_trials_that_end_in_one_batch_are_stored_in_the_order_in_which_they_ended(
    study: Study, database: Database
) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS[:2], GRID)
        first, second = claim_one(run), claim_one(run)
        with run._writer.paused():  # all of it is one batch
            run.report(second, 1, {"m": 0.5}, 0.5)
            run.complete(first, 0.5)
            run.complete(second, 0.5)
    assert sql(database, "SELECT number FROM trials ORDER BY datetime_complete") == [(0,), (1,)]


def test_crashes_are_counted_across_runs(study: Study) -> None:
    with grid_run(study) as run:
        claim = claim_point(run)
        run.record_crash(claim)
        run.release(claim)
    with grid_run(study) as run:
        assert claim_one(run).crashes == 1


def test_provenance_of_a_trial_includes_that_of_its_run(study: Study) -> None:
    with grid_run(study) as run:
        claim = claim_point(run)
        run.record(claim, {}, {"device": "cpu", "threads": 2})
        run.complete(claim, 0.5)
    assert study.provenance(0) == {"code": "test", "device": "cpu", "threads": 2}


def test_elapsed_seconds_counts_simultaneous_runs_once(study: Study, database: Database) -> None:
    insert = sa.text(
        "INSERT INTO hpo_runs (study, host, pid, process_started, started, last_heard, lease_until, provenance)"
        " VALUES (:study, 'h', 1, 0, :started, :last_heard, 0, '{}')"
    )
    with grid_run(study) as run:
        for started, last_heard in ((0.0, 10.0), (5.0, 12.0), (100.0, 103.0)):
            with database.engine.begin() as connection:
                row = {"study": study.study_id, "started": started, "last_heard": last_heard}
                connection.execute(insert, row)
        assert run.elapsed_seconds() == pytest.approx(15.0, abs=1.0)


def test_after_a_run_that_could_not_store_its_end_another_one_of_the_process_goes_on(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook: the disk was full, space was freed, and the search is started again."""

    def fail(_: Database) -> NoReturn:
        raise OperationalError("", None, sqlite3.OperationalError("database or disk is full"))

    with monkeypatch.context() as patch, grid_run(study) as first:  # `patch` ends after the run
        claim = claim_point(first)
        patch.setattr(Database, "transaction", fail)
        first.report(claim, 1, {"m": 0.5}, 0.5)
    with grid_run(study) as second:
        again = claim_one(second)
        assert again.number == claim.number
        second.complete(again, 0.5)
    assert trial_states(study) == ["COMPLETE"]


def test_the_lease_is_ended_even_if_the_last_updates_are_refused(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise KeyError("refused")

    with grid_run(study) as run:
        claim = claim_point(run)
        monkeypatch.setattr(reporting, "write", refuse)
        run.report(claim, 1, {"m": 0.5}, 0.5)
    assert sql(database, "SELECT count(*) FROM hpo_runs WHERE ended IS NULL") == [(0,)]


def test_a_run_that_cannot_start_leaves_no_lease(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(Median, "prepare", fail)
    with pytest.raises(KeyboardInterrupt), grid_run(study, pruner=Median(maximize=True, min_epochs=1)):
        pass
    assert sql(database, "SELECT count(*) FROM hpo_runs WHERE ended IS NULL") == [(0,)]


@contextlib.contextmanager
def unavailable(request: pytest.FixtureRequest, database: Database) -> Iterator[None]:
    """Lock the SQLite file, or stop the server."""
    if database.engine.dialect.name == "sqlite":
        with locked(Path(str(database.engine.url.database))):
            yield
        return
    server: Postgres = request.getfixturevalue("postgres")
    server.stop(immediate=True)
    try:
        yield
    finally:
        server.start()


@pytest.mark.slow
def test_leaving_does_not_wait_for_a_database_that_is_away(
    study: Study, database: Database, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "EXIT_SECONDS", 5.0)
    with contextlib.ExitStack() as stack:
        with grid_run(study) as run:
            claim = claim_point(run)
            stack.enter_context(unavailable(request, database))
            run.report(claim, 1, {"m": 0.5}, 0.5)
            time.sleep(1.0)  # the writer's thread now waits for the database
            started = time.monotonic()
        assert time.monotonic() - started < 5.0 + 2.0
    with grid_run(study) as run:
        assert claim_one(run).number == claim.number


@pytest.mark.slow
def test_four_runs_share_a_grid_without_a_duplicate(url: str, study: Study) -> None:
    values = list(range(24))
    claimed: list[int] = []
    errors: list[BaseException] = []

    def drive() -> None:
        try:
            with open_database(url) as database, grid_run(open_s(database)) as run:
                run.enqueue([{"a": a} for a in values], {"a": CategoricalDistribution(values)})
                while (claim := run.claim()) is not None or not run.finished:
                    if claim is not None:
                        claimed.append(claim.params["a"])
                        run.report(claim, 1, {"m": 0.5}, 0.5)
                        run.complete(claim, 0.5)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(claimed) == values
    assert Counter(trial_states(study)) == {"COMPLETE": len(values)}
