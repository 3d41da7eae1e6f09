"""The write-behind buffer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from storage import reporting, writer
from storage.database import Database
from storage.errors import StorageError
from storage.optuna_tables import StudyKey
from storage.reporting import TrialUpdate, Written
from storage.study import Study
from tests.factories import trial_states, wait_until
from tests.storage.builders import GRID, POINTS, claim_one, claim_point, grid_run, sql


def test_no_update_is_lost_between_put_and_the_background_thread(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "BATCH_SECONDS", 0.0)
    with grid_run(study) as run:
        claim = claim_point(run)
        for epoch in range(1, 401):
            run.report(claim, epoch, {"m": 0.5}, 0.5)
            if epoch % 40 == 0:
                run.flush()
    assert sql(database, "SELECT count(*) FROM hpo_metrics") == [(400,)]
    assert len(study.trials()[0].intermediate_values) == 400


@pytest.mark.parametrize("error", [StorageError("the disk is full"), KeyError("Record does not exist")])
def test_updates_that_could_not_be_written_are_kept(
    study: Study, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(writer, "BATCH_SECONDS", 0.0)
    with grid_run(study) as run:
        claim = claim_point(run)
        with monkeypatch.context() as patch:
            failures: list[Exception] = []

            def fail(*_: Any, **__: Any) -> None:
                failures.append(error)
                raise error

            patch.setattr(writer, "retry_while_down", fail)
            run.report(claim, 1, {"m": 0.5}, 0.5)
            wait_until(lambda: len(failures) > 2)  # the background thread survives an error
            with pytest.raises(StorageError, match=str(error.args[0])):
                run.flush()
        run.complete(claim, 0.5)
    assert trial_states(study) == ["COMPLETE"]
    assert study.trials()[0].intermediate_values == {1: 0.5}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Path("/data"), "TypeError: Object of type PosixPath is not JSON serializable"),
        (math.nan, "invalid input syntax"),
    ],
)
def test_what_cannot_be_stored_is_reported_with_its_trial_and_the_cause(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch, value: Any, reason: str
) -> None:
    if value is math.nan and database.engine.dialect.name == "sqlite":
        pytest.skip("SQLite stores any text as JSON")
    monkeypatch.setattr(writer, "BATCH_SECONDS", 3600.0)
    with grid_run(study) as run:
        run.enqueue(POINTS[:2], GRID)
        good, bad = claim_one(run), claim_one(run)
        run.complete(good, 0.5)
        run.record(bad, {}, {"fact": value})
        with pytest.raises(StorageError, match=f"cannot store what trial 1 reported: .*{reason}"):
            run.flush()
        assert trial_states(study) == ["COMPLETE", "RUNNING"]
        run._writer._updates.clear()  # the run can end


def test_what_the_database_refuses_of_one_trial_does_not_keep_others_from_being_stored(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "BATCH_SECONDS", 3600.0)
    write, refuses = reporting.write, True

    def refuse(database: Database, study: StudyKey, updates: list[TrialUpdate], **options: Any) -> Written:
        if refuses and any("bad" in update.metrics for update in updates):
            raise KeyError("refused")
        return write(database, study, updates, **options)

    monkeypatch.setattr(reporting, "write", refuse)
    with grid_run(study) as run:
        run.enqueue(POINTS[:2], GRID)
        bad, good = claim_one(run), claim_one(run)
        run.report(bad, 1, {"bad": 0.5}, 0.5)
        run.complete(good, 0.5)
        with pytest.raises(StorageError, match="refused"):
            run.flush()
        assert trial_states(study) == ["RUNNING", "COMPLETE"]
        refuses = False
        run.complete(bad, 0.5)
    assert trial_states(study) == ["COMPLETE", "COMPLETE"]
    assert study.trials()[0].intermediate_values == {1: 0.5}
