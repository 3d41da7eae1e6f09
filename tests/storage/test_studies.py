"""Opening, finding and summarizing studies."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import sqlalchemy as sa

from storage import records, studies
from storage.database import Database, open_database
from storage.errors import StorageError
from storage.lease import is_run_alive
from storage.retry import retry_trials
from storage.studies import find_study, open_study
from storage.study import Study
from storage.summaries import Summary, state_of, summarize
from tests.factories import after_statement
from tests.storage.builders import GRID, POINTS, claim_one, claim_point, grid_run, kill, open_s, sampled_run


def test_a_study_of_another_fingerprint_is_a_new_revision(database: Database) -> None:
    first, again, changed = open_s(database, "f"), open_s(database, "f"), open_s(database, "g")
    assert (first.study_id, first.name) == (again.study_id, "s")
    assert changed.name == "s@2"
    assert open_s(database, "f").name == "s"
    assert open_s(database, "h").name == "s@3"
    assert first.unique_name != changed.unique_name
    latest, second = find_study(database, "s"), find_study(database, "s@2")
    assert latest is not None
    assert latest.name == "s@3"
    assert second is not None
    assert second.study_id == changed.study_id
    assert find_study(database, "t") is None
    assert [study.name for study in studies.all_studies(database)] == ["s", "s@2", "s@3"]


def test_the_first_revision_is_named_once_there_are_later_ones(database: Database) -> None:
    first = open_s(database, "f")
    assert first.reference == "s"
    second = open_s(database, "g")
    assert (first.reference, second.reference) == ("s@1", "s@2")
    assert [summary.name for summary in summarize(database)] == ["s@1", "s@2"]
    for study in (first, second):
        found = find_study(database, study.reference)
        assert found is not None
        assert found.key == study.key
    assert find_study(database, "t@1") is None
    assert find_study(database, "s@2@1") is None


def test_a_study_of_another_program_may_have_the_name_of_the_first_revision(database: Database) -> None:
    optuna.create_study(storage=database.optuna_storage, study_name="s@1")
    first, _ = open_s(database, "f"), open_s(database, "g")
    found = find_study(database, "s@1")
    assert found is not None
    assert found.name == "s@1"
    assert first.reference == "s"
    assert [summary.name for summary in summarize(database)] == ["s@1", "s", "s@2"]


def test_a_study_of_another_program_is_refused(database: Database) -> None:
    foreign = optuna.create_study(storage=database.optuna_storage, study_name="s")
    foreign.add_trial(optuna.create_trial(value=1.0))
    with pytest.raises(StorageError, match=r"the study 's' in .* was created by another program; rename"):
        open_study(database, "s", direction="maximize", fingerprint="f", settings={})


def test_a_study_whose_creator_died_is_completed(database: Database) -> None:
    optuna.create_study(storage=database.optuna_storage, study_name="s", direction="maximize")
    study = open_s(database)
    assert study.name == "s"
    assert study.optuna_study.user_attrs["hpo:fingerprint"] == "f"


@pytest.mark.parametrize("directions", [["minimize"], ["maximize", "minimize"]])
def test_a_study_that_was_created_with_another_direction_is_refused(database: Database, directions: Any) -> None:
    """As with the button of the dashboard, which minimizes by default: the best trial would be the worst one."""
    optuna.create_study(storage=database.optuna_storage, study_name="s", directions=directions)
    with pytest.raises(StorageError, match=r"to minimize.*says maximize|to maximize and minimize.*says maximize"):
        open_s(database)


@pytest.mark.parametrize("name", ["s@best", "s@", "s@2.0", "s@\N{SUPERSCRIPT TWO}", "s@-1", "s@1", "s@02"])
def test_the_name_of_a_study_of_another_program_is_no_revision(database: Database, name: str) -> None:
    foreign = optuna.create_study(storage=database.optuna_storage, study_name=name)
    foreign.add_trial(optuna.create_trial(value=1.0))
    assert [open_s(database).name, open_s(database, "g").name, open_s(database).name] == ["s", "s@2", "s"]
    found = [studies.find_study(database, each) for each in (name, "s", "s@2", "s@3")]
    assert [None if study is None else study.name for study in found] == [name, "s@2", "s@2", None]


def test_a_study_whose_name_would_be_a_revision_is_refused(database: Database) -> None:
    with pytest.raises(StorageError, match="cannot be named 'lr@2'"):
        open_study(database, "lr@2", direction="maximize", fingerprint="f", settings={})


# --- summaries


def summary(database: Database) -> Summary:
    (only,) = summarize(database)
    return only


def test_a_grid_is_running_then_resumable_then_finished(database: Database) -> None:
    study = open_s(database, total_trials=len(POINTS))
    line = summary(database)
    assert (line.state, line.counts, line.best, line.last_activity) == ("resumable", {}, None, None)
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        assert summary(database).state == "running"
        run.complete(claim_one(run), 0.25)
        run.flush()
        line = summary(database)
        assert (line.counts, line.best) == ({"COMPLETE": 1}, 0.25)
    assert summary(database).state == "resumable"
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        while claim := run.claim():
            run.complete(claim, 0.5)
    line = summary(database)
    assert (line.state, line.counts, line.best, line.metric) == ("finished", {"COMPLETE": 4}, 0.5, "m")
    assert line.last_activity is not None
    assert abs(line.last_activity - time.time()) < 60


def test_a_budget_below_what_has_ended_is_finished(database: Database) -> None:
    with sampled_run(open_s(database, total_trials=3), max_trials=3) as run:
        run.complete(claim_one(run), 0.5)
        run.release(claim_one(run))
    assert summary(database).state == "resumable"
    open_s(database, total_trials=1)
    assert summary(database).counts == {"COMPLETE": 1, "WAITING": 1}
    assert summary(database).state == "finished"


@pytest.mark.parametrize("total", [2, None])
def test_a_trial_that_another_program_added_does_not_count_for_the_budget(
    database: Database, total: int | None
) -> None:
    """Runs count configurations, of which such a trial has none."""
    study = open_s(database, total_trials=total)
    study.optuna_study.add_trial(optuna.create_trial(value=0.5))
    assert (summary(database).counts, summary(database).state) == ({"COMPLETE": 1}, "resumable")
    with sampled_run(study, max_trials=2) as run:
        run.complete(claim_one(run), 0.5)
        run.flush()
        assert len(study.ended_keys()) == 1
        run.release(claim_one(run))
    assert (summary(database).counts, summary(database).state) == ({"COMPLETE": 2, "WAITING": 1}, "resumable")
    with sampled_run(study, max_trials=2) as run:
        run.complete(claim_one(run), 0.5)
        assert run.claim() is None
    assert (summary(database).counts, summary(database).state) == ({"COMPLETE": 3}, "finished")


def test_a_trial_that_was_retried_is_run_whatever_the_budget_says(database: Database) -> None:
    """Unlike one that was interrupted, see above."""
    study = open_s(database, total_trials=3)
    with sampled_run(study, max_trials=3) as run:
        run.complete(claim_one(run), 0.5)
        run.fail(claim_one(run), "a bug")
    open_s(database, total_trials=1)
    retry_trials(study, [1])
    assert study.count_retried() == 1
    assert (summary(database).counts, summary(database).state) == ({"COMPLETE": 1, "WAITING": 1}, "resumable")
    with sampled_run(study, max_trials=1) as run:
        claim = claim_one(run)
        run.flush()
        assert (claim.number, study.count_retried()) == (1, 1)
        run.complete(claim, 0.5)
        assert run.claim() is None
    assert study.count_retried() == 0
    assert summary(database).state == "finished"


def test_a_study_whose_run_was_killed_is_resumable_at_once(study: Study, database: Database) -> None:
    run = grid_run(study).__enter__()
    claim_point(run)
    assert summary(database).state == "running"
    kill(run)
    assert summary(database).state == "resumable"


def test_a_sampled_study_is_finished_when_its_budget_is_spent(database: Database) -> None:
    settings = {"metric": "m", "sampler": {"name": "random"}, "budget": {"trials": 2}}
    study = open_study(database, "s", direction="minimize", fingerprint="f", settings=settings, total_trials=2)
    states = []
    with sampled_run(study) as run:
        for value in (0.5, 0.25):
            run.complete(claim_one(run), value)
            run.flush()
            ended = len(study.ended_keys())
            states.append(state_of(study.attrs, summary(database).counts, is_running=False, ended=ended, retried=0))
    assert states == ["resumable", "finished"]
    assert summary(database).best == 0.25


def test_a_study_whose_points_are_all_left_as_they_are_is_finished(database: Database) -> None:
    """The budget of its search is 0 trials: other studies have their results."""
    open_s(database, total_trials=0)
    assert [each.state for each in summarize(database)] == ["finished"]


@pytest.mark.parametrize("table", ["hpo_trials", "hpo_rungs"])
def test_a_search_that_ends_while_it_is_listed_has_no_trials_left(url: str, database: Database, table: str) -> None:
    with open_database(url) as other, sampled_run(open_s(other, total_trials=1)) as run:
        claim = claim_one(run)

        def end() -> None:
            run.complete(claim, 0.5)
            run.__exit__(None, None, None)

        with after_statement(database, table, end):
            assert summary(database).state == "running"
        assert summary(database).state == "finished"


@pytest.mark.parametrize(("total", "state"), [(1, "finished"), (2, "resumable"), (None, "finished")])
def test_the_state_and_the_settings_are_those_of_the_latest_opening(
    database: Database, total: int | None, state: str
) -> None:
    options: dict[str, Any] = {"direction": "minimize", "fingerprint": "f"}
    study = open_study(database, "s", settings={"scheduler": "asha"}, total_trials=5, **options)
    with sampled_run(study) as run:
        run.complete(claim_one(run), 0.5)
    assert summary(database).state == "resumable"
    again = open_study(database, "s", settings={"scheduler": "none"}, total_trials=total, **options)
    assert again.name == "s"
    assert study.settings == {"scheduler": "none"}
    assert summary(database).state == state


def test_the_state_of_a_study_that_version_1_opened_last_is_read(database: Database) -> None:
    states = []
    for attrs in ({"hpo:points": 2}, {"hpo:points": 1}, {"hpo:settings": {"budget": {"trials": 2}}}):
        states.append(state_of({"hpo:settings": {}} | attrs, {"COMPLETE": 1}, is_running=False, ended=1, retried=0))
    assert states == ["resumable", "finished", "resumable"]


@pytest.mark.parametrize(("heard", "state"), [(99.0, "running"), (100.5, "running"), (3700.0, "resumable")])
def test_a_lease_that_ends_too_late_does_not_hold(heard: float, state: str) -> None:
    """The database's clock was set back by an hour after a driver on another machine had died."""
    row = {"run": 1, "host": "another machine", "pid": 1, "process_started": 0.0, "started": heard - 50.0}
    run = SimpleNamespace(**row, last_heard=heard, lease_until=heard + 60.0, ended=None, now=100.0)
    assert (
        state_of({"hpo:settings": {}, "hpo:total": 2}, {"RUNNING": 1}, is_running=is_run_alive(run), ended=0, retried=0)
        == state
    )


def test_a_duplicate_is_not_counted_as_a_failure(study: Study, database: Database) -> None:
    for reason in (records.DUPLICATE, records.REJECTED, "the disk is full"):
        failed = optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL, user_attrs={"fail_reason": reason})
        study.optuna_study.add_trial(failed)
    study.optuna_study.add_trial(optuna.trial.create_trial(value=0.5))
    assert summary(database).counts == study.counts() == {"COMPLETE": 1, "FAIL": 1}
    assert study.count_ended() == 2


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo"])
def test_the_last_activity_does_not_depend_on_the_time_zone(
    database: Database, monkeypatch: pytest.MonkeyPatch, zone: str
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        theirs = optuna.create_study(study_name="theirs", storage=database.optuna_storage)
        theirs.add_trial(optuna.trial.create_trial(value=0.5))
        theirs.ask()
        last = summary(database).last_activity
    finally:
        monkeypatch.undo()
        time.tzset()
    assert last is not None
    assert abs(last - time.time()) < 60


def test_a_study_of_another_program_has_no_state(database: Database) -> None:
    foreign = optuna.create_study(
        study_name="theirs", storage=database.optuna_storage, directions=["minimize", "maximize"]
    )
    foreign.add_trial(optuna.trial.create_trial(values=[1.0, 2.0]))
    infinite = optuna.create_study(study_name="infinite", storage=database.optuna_storage, direction="maximize")
    infinite.add_trial(optuna.trial.create_trial(value=math.inf))
    line, of_infinite = summarize(database)
    assert (line.name, line.state, line.counts, line.best) == ("theirs", "", {"COMPLETE": 1}, None)
    assert line.last_activity is not None
    assert of_infinite.best is None


def replace_study(database: Database) -> Study:
    """Delete the study `s`. On SQLite, a study of another space gets its id."""
    with open_database(database.engine.url.render_as_string(hide_password=False)) as other:
        optuna.delete_study(study_name="s", storage=other.optuna_storage)
    return open_study(database, "other", direction="minimize", fingerprint="g", settings={"metric": "loss"})


def test_one_caller_is_the_first_with_a_value(study: Study) -> None:
    assert [study.is_first("k", value) for value in ("a", "a", "b", "b", "a")] == [True, False, True, False, True]


def test_the_first_caller_is_the_first_after_a_lost_answer(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(_: object, operation: Callable[[], bool]) -> bool:
        operation()
        return operation()

    monkeypatch.setattr("storage.studies.retry_while_down", twice)
    assert study.is_first("k", "a")
    assert not study.is_first("k", "a")


def test_nothing_is_written_to_the_study_that_has_the_id_of_a_deleted_one(study: Study, database: Database) -> None:
    other = replace_study(database)
    operations: list[Callable[[], Any]] = [
        lambda: grid_run(study).__enter__(),
        lambda: study.set_system_attrs({"hpo:published": 7}),
        lambda: study.is_first("hpo:announced", "the end"),
        lambda: retry_trials(study, [0]),
    ]
    before = other.attrs, other.system_attrs()
    for operation in operations:
        with pytest.raises(StorageError, match="'s' was deleted"):
            operation()
    assert (other.attrs, other.system_attrs()) == before
    assert other.runs() == []
    again = open_s(database)
    assert again.key != study.key
    with grid_run(again) as run:
        claim_point(run)


@pytest.mark.parametrize("value", ["../../other", "0123456789ab/..", "0123456789AB", "", 7, None])
def test_a_study_whose_hpo_id_was_changed_is_not_ours(study: Study, database: Database, value: Any) -> None:
    """Paths are made of it."""
    study.optuna_study.set_user_attr("hpo:id", value)
    changed = find_study(database, "s")
    assert changed is not None
    assert not changed.is_ours
    assert changed.unique_name == "s-None"
    (summary,) = summarize(database)
    assert summary.unique_name == ""
    with pytest.raises(StorageError, match="has an attribute hpo:id that hpo did not write"):
        open_s(database)


@pytest.mark.parametrize("value", [[1], "x", 7, None, {"budget": 5}, {"budget": {"trials": "x"}, "metric": [1]}])
def test_a_study_with_odd_settings_is_listed(study: Study, database: Database, value: Any) -> None:
    other = open_s(database, "another")
    study.optuna_study.set_user_attr("hpo:settings", value)
    study.optuna_study.set_user_attr("hpo:total", value)
    assert [summary.name for summary in summarize(database)] == ["s@1", "s@2"]
    assert isinstance(study.settings, dict)
    assert other.settings


@pytest.mark.parametrize("new_name", ["other", "s"])
def test_a_study_that_is_deleted_while_it_is_opened_is_created_again(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch, new_name: str
) -> None:
    find = studies.find_revision
    others: list[Study] = []

    def find_then_delete(*arguments: Any) -> Study | None:
        found = find(*arguments)
        if not others:
            optuna.delete_study(study_name="s", storage=database.optuna_storage)
            monkeypatch.setattr(studies, "find_revision", find)
            others.append(
                open_study(database, new_name, direction="minimize", fingerprint="g", settings={"metric": "loss"})
            )
        return found

    monkeypatch.setattr(studies, "find_revision", find_then_delete)
    opened = open_s(database, total_trials=5)
    assert opened.attrs["hpo:fingerprint"] == "f"
    assert opened.attrs["hpo:total"] == 5
    assert opened.attrs["hpo:id"] == opened.identity
    (other,) = others
    assert other.settings == {"metric": "loss"}
    assert other.attrs["hpo:total"] is None
    assert other.unique_name != opened.unique_name


@pytest.mark.parametrize("replaced", [False, True])
def test_a_study_that_is_deleted_while_studies_are_listed_is_left_out(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch, *, replaced: bool
) -> None:
    with grid_run(study) as run:
        run.complete(claim_point(run), 0.5)
    find = database.optuna_storage.get_all_studies

    def find_then_delete() -> Any:
        found = find()
        optuna.delete_study(study_name="s", storage=database.optuna_storage)
        if replaced:
            optuna.create_study(study_name="theirs", storage=database.optuna_storage)
        return found

    monkeypatch.setattr(database.optuna_storage, "get_all_studies", find_then_delete)
    assert summarize(database) == []


def test_the_provenance_of_a_trial_is_found_by_its_number(study: Study, database: Database) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS[:3], GRID)
        for number in range(3):
            claim = claim_one(run)
            run.record(claim, {}, {"threads": number})
            run.complete(claim, 0.5)
    with database.transaction() as connection:  # another program deletes a trial
        for table in ("trial_values", "trial_params", "trials"):
            connection.execute(
                sa.text(f"DELETE FROM {table} WHERE trial_id IN (SELECT trial_id FROM trials WHERE number = 0)")
            )
    found = find_study(database, "s")
    assert found is not None
    assert [found.provenance(number)["threads"] for number in (1, 2)] == [1, 2]
    with pytest.raises(StorageError, match=r"the study 's' in .* has no trial 0"):
        found.provenance(0)
