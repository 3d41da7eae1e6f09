"""Reading and writing our tables, and those of Optuna's that are written in bulk."""

from __future__ import annotations

import math

import pytest

from storage import optuna_tables, records, tables
from storage.database import Database
from storage.optuna_internals import trial_id
from storage.study import Study
from tests.storage.builders import GRID, POINTS, claim_one, grid_run


def add_trials(study: Study, count: int) -> list[int]:
    """Add trials and register them; return their ids."""
    ids = [study.database.optuna_storage.create_new_trial(study.study_id) for _ in range(count)]
    with study.database.engine.begin() as connection:
        rows = [{"trial": trial_id, "study": study.study_id, "key": str(trial_id)} for trial_id in ids]
        connection.execute(tables.trials.insert(), rows)
    return ids


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.25])
def test_optuna_reads_the_intermediate_values_that_we_write(study: Study, database: Database, value: float) -> None:
    (trial_id,) = add_trials(study, 1)
    with database.engine.begin() as connection:
        optuna_tables.write_values(connection, [(trial_id, 1, 0.0), (trial_id, 2, 0.5)])
        optuna_tables.write_values(connection, [(trial_id, 1, value)])
        optuna_tables.write_values(connection, [])
    assert repr(study.trials()[0].intermediate_values) == repr({1: value, 2: 0.5})


def test_metrics_are_read_as_they_were_last_written(study: Study, database: Database) -> None:
    one, two = add_trials(study, 2)
    with database.engine.begin() as connection:
        records.write_metrics(
            connection, [(one, 2, {"m": 0.2}), (one, 1, {"m": 0.1, "loss": 1.0}), (two, 1, {"m": 0.3})]
        )
        records.write_metrics(connection, [(one, 1, {"loss": math.nan, "huge": math.inf})])
        records.write_metrics(connection, [])
    nan = pytest.approx(math.nan, nan_ok=True)
    of_one = {1: {"m": 0.1, "loss": nan, "huge": math.inf}, 2: {"m": 0.2}}
    assert records.read_metrics(database, study.study_id) == {one: of_one, two: {1: {"m": 0.3}}}
    assert list(records.read_metrics(database, study.study_id, [one])) == [one]
    assert study.metrics() == {0: of_one, 1: {1: {"m": 0.3}}}
    assert study.metrics_of([two, -1]) == {two: {1: {"m": 0.3}}, -1: {}}


def test_the_name_of_a_metric_may_be_long(study: Study, database: Database) -> None:
    (trial_id,) = add_trials(study, 1)
    name = "layer." * 50
    with database.engine.begin() as connection:
        records.write_metrics(connection, [(trial_id, 1, {name: 0.5})])
    assert study.metrics() == {0: {1: {name: 0.5}}}


def test_study_attributes_are_replaced_together(study: Study) -> None:
    study.set_system_attrs({"a": 1, "b": [1, 2]})
    study.set_system_attrs({"b": {"c": None}, "d": "text"})
    study.set_system_attrs({})
    found = study.system_attrs()
    assert {name: found[name] for name in ("a", "b", "d")} == {"a": 1, "b": {"c": None}, "d": "text"}


def test_a_trial_that_never_started_has_no_provenance(study: Study, database: Database) -> None:
    (trial_id,) = add_trials(study, 1)
    assert records.read_provenance(database, trial_id) == records.read_provenance(database, -1) == {}
    assert study.provenances(study.trials()) == {0: {}}


def test_the_provenances_of_all_trials_are_those_of_each(study: Study, database: Database) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS[:3], GRID)
        for number in range(2):
            claim = claim_one(run)
            run.record(claim, {}, {"threads": number})
            run.complete(claim, 0.5)
        run.release(claim_one(run))
    ids = [trial_id(trial) for trial in study.trials()]
    assert study.whole_provenances() == {each: records.read_provenance(database, each) for each in ids}
    assert study.whole_provenances()[ids[0]] == {"code": "test", "threads": 0}
    assert study.whole_provenances()[ids[2]] == {}, "no run has it"


def test_metrics_of_more_trials_than_a_query_may_name_are_read(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.study._MAX_IDS", 2)
    ids = add_trials(study, 5)
    with database.engine.begin() as connection:
        records.write_metrics(connection, [(each, 1, {"m": float(each)}) for each in ids])
    assert study.metrics_of([*ids[1:], -1]) == {each: {1: {"m": float(each)}} for each in ids[1:]} | {-1: {}}
