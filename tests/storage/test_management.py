"""Renaming and deleting a study: all or nothing, and not under a running search."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import optuna
import pytest
import sqlalchemy as sa

from storage import optuna_tables, tables
from storage.copying import NameTakenError, copy_study
from storage.database import Database
from storage.errors import StorageError
from storage.management import StudyRunningError, delete_study, rename_study
from storage.ownership import StudyDeletedError
from storage.studies import deleted_studies, find_study, open_study
from storage.study import Study, study_names
from storage.summaries import summarize
from tests.storage.builders import GRID, POINTS, claim_one, expire_leases, grid_run, open_s, sql
from tests.storage.studies import content, full_study, kill_at

OTHER = "0123456789ab"


def found(database: Database, name: str) -> Study:
    study = find_study(database, name)
    assert study is not None
    return study


def of_no_study(database: Database) -> list[str]:
    """Return the tables with rows that belong to no study."""
    known = {name: content(database, name) for name in study_names(database)}
    left = []
    for table in (*optuna_tables.metadata.sorted_tables, *tables.metadata.sorted_tables):
        with database.engine.connect() as connection:
            total = connection.scalar(sa.select(sa.func.count()).select_from(table))
        counted = (
            len(known)
            if table is optuna_tables.studies
            else sum(len(each.get(table.name, ())) for each in known.values())
        )
        if total != counted and table.name not in {"hpo_schema", "hpo_deleted_studies", "version_info"}:
            left.append(table.name)
    return left


# --- rename -------------------------------------------------------------------------------------------------------------


def test_a_renamed_study_keeps_everything_else(database: Database) -> None:
    study = full_study(database)
    before = content(database, "s")
    rename_study(study, "t")
    after = content(database, "t")
    assert study_names(database) == ["t"]
    attributes = "study_user_attributes"
    assert {name: rows for name, rows in after.items() if name != attributes} == {
        name: rows for name, rows in before.items() if name != attributes
    }
    new = found(database, "t")
    assert new.settings == {"name": "t", "metric": "m"}
    assert (new.identity, new.unique_name) == (study.identity, study.unique_name), "its files stay where they are"
    assert summarize(database)[0].unique_name == study.unique_name
    assert len(after[attributes]) == len(before[attributes]) + 1


def test_a_study_that_is_renamed_twice_keeps_its_files(database: Database) -> None:
    study = open_s(database)
    for name in ("t", "u", "s"):
        rename_study(found(database, study_names(database)[0]), name)
        assert found(database, name).unique_name == study.unique_name
    copy_study(found(database, "s"), database, "c", OTHER)
    assert found(database, "c").unique_name == f"c-{OTHER}", "the files of a copy are its own"


def test_a_renamed_study_is_resumed_under_its_new_name(database: Database) -> None:
    study = open_s(database)
    rename_study(study, "t")
    options = {"direction": "maximize", "settings": {"metric": "m", "name": "t"}}
    again = open_study(database, "t", fingerprint="f", **options)  # type: ignore[arg-type]
    assert (again.identity, again.unique_name) == (study.identity, study.unique_name)
    assert open_study(database, "t", fingerprint="g", **options).name == "t@2"  # type: ignore[arg-type]
    assert open_s(database).identity != study.identity, "the former name is free"


def test_a_run_that_comes_back_after_the_study_was_renamed_changes_nothing(database: Database) -> None:
    with grid_run(open_s(database)) as run:
        run.enqueue(POINTS, GRID)
        claim_one(run)
        expire_leases(database, run.run_id)  # it was suspended
        rename_study(run.study, "t")
        with pytest.raises(
            StudyDeletedError, match=r"the study 's' was renamed to 't' .* give the search space this name"
        ):
            run.claim()
        with pytest.raises(StudyDeletedError, match="renamed to 't'"):
            run.study.set_system_attrs({"a": 1})
    assert len(found(database, "t").trials()) == 1


@pytest.mark.parametrize("name", ["t", "u"])
def test_the_name_of_another_study_is_refused(database: Database, name: str) -> None:
    study = full_study(database)
    for fingerprint in ("f", "g"):
        open_study(database, "t", direction="maximize", fingerprint=fingerprint, settings={})
    with database.engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO studies (study_name) VALUES ('u@2')"))
    before = content(database, "s")
    with pytest.raises(NameTakenError, match=f"has a study '{name}' already"):
        rename_study(study, name)
    assert content(database, "s") == before


def test_a_rename_after_a_lost_answer_changes_nothing(database: Database) -> None:
    study = full_study(database)
    rename_study(study, "t")
    before = content(database, "t")
    rename_study(study, "t")
    assert content(database, "t") == before
    with pytest.raises(StorageError, match="the study 's' was deleted or renamed meanwhile"):
        rename_study(study, "u")


# --- delete -------------------------------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_deleted_study(database: Database) -> None:
    study = full_study(database)
    copy_study(study, database, "c", OTHER)
    before = content(database, "c")
    delete_study(study)
    assert study_names(database) == ["c"]
    assert of_no_study(database) == []
    assert content(database, "c") == before
    assert deleted_studies(database) == {study.identity}
    delete_study(study)  # the answer was lost
    delete_study(found(database, "c"))
    assert of_no_study(database) == []


def test_a_study_that_was_renamed_meanwhile_is_not_deleted(database: Database) -> None:
    study = full_study(database)
    rename_study(study, "t")
    with pytest.raises(StorageError, match="the study 's' was deleted or renamed meanwhile"):
        delete_study(study)
    assert study_names(database) == ["t"]


def test_deleting_deletes_what_optuna_deletes(database: Database) -> None:
    full_study(database)
    full_study(database, "t")
    optuna.delete_study(study_name="s", storage=database.optuna_storage)
    left = {table.name: sql(database, f"SELECT count(*) FROM {table.name}") for table in tables.metadata.sorted_tables}
    delete_study(found(database, "t"))
    full_study(database, "u")
    again = {table.name: sql(database, f"SELECT count(*) FROM {table.name}") for table in tables.metadata.sorted_tables}
    assert again | {"hpo_deleted_studies": [(1,)]} == left


# --- both ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [delete_study, lambda study: rename_study(study, "t")], ids=["delete", "rename"])
def test_a_running_study_is_refused(database: Database, change: Callable[[Study], None]) -> None:
    study = open_s(database)
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claim_one(run)
        run.flush()
        before = content(database, "s")
        with pytest.raises(StudyRunningError, match=r"'s' is running \(process \d+ on .+\): stop the search first"):
            change(study)
        assert content(database, "s") == before
    change(study)
    assert study_names(database) in ([], ["t"])


@pytest.mark.slow
@pytest.mark.exhaustive(on="postgresql")
@pytest.mark.parametrize("verb", ["delete", "rename"])
def test_a_kill_at_any_statement_leaves_the_study_or_its_change(database: Database, verb: str) -> None:
    full_study(database)
    url = database.engine.url.render_as_string(hide_password=False)
    before, done = content(database, "s"), [] if verb == "delete" else ["t"]

    def change(opened: Database) -> None:
        study = found(opened, "s")
        delete_study(study) if verb == "delete" else rename_study(study, "t")

    kills = 0
    for step in itertools.count(1):
        was_killed = kill_at(step, [url], change)
        kills += was_killed
        assert study_names(database) in (["s"], done)
        if study_names(database) == done:
            assert of_no_study(database) == []
            break
        assert content(database, "s") == before
    assert kills >= (12 if verb == "delete" else 3), "before each statement that writes, and before the commit"
