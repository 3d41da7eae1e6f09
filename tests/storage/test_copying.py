"""A copy of a study has all of it or does not exist, even if a process is killed, on and between all databases."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from benchmarks.postgres import Postgres
from storage import copying
from storage.copying import NameTakenError, SystemAttr, copy_study
from storage.database import Database, open_database, open_existing
from storage.errors import StorageError
from storage.optuna_internals import trial_id
from storage.studies import find_study, open_study
from storage.study import Study, study_names
from storage.summaries import summarize
from tests.storage.builders import GRID, POINTS, claim_one, grid_run, open_s, sql
from tests.storage.studies import content, full_study, kill_at

IDENTITY = "0123456789ab"

POSTGRES = [pytest.mark.postgres, pytest.mark.slow]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=POSTGRES)])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """Another database, on each backend in turn."""
    other = f"sqlite:///{tmp_path}/other.db"
    if request.param == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        other = server.create_database(f"copies_{tmp_path.parent.name}_{tmp_path.name}".replace("-", "_").lower()[-60:])
    with open_database(other) as opened:
        yield opened


def found(database: Database, name: str) -> Study:
    study = find_study(database, name)
    assert study is not None
    return study


def as_copied(rows: dict[str, Any], name: str, identity: str | None) -> dict[str, Any]:
    """Return the content of `full_study` as a copy has it: nobody works on it, and each trial names that of the study."""
    named = {row["trial_id"] for row in rows["trial_user_attributes"] if row["key"] in {"learned_from", "reused_from"}}
    for row in rows["trials"]:
        if row["state"].name in {"COMPLETE", "PRUNED"} and row["trial_id"] not in named:
            origin = {"study": "s", "id": identity, "trial": row["number"]}
            attr = {"trial_id": row["trial_id"], "key": "copied_from", "value_json": json.dumps(origin)}
            rows["trial_user_attributes"].append(attr)
    for row in rows["trials"]:
        if row["state"].name == "RUNNING":
            row["state"] = type(row["state"]).WAITING
    for row in rows["hpo_trials"]:
        if row["trial"] == 3:
            row["run"] = None
    for row in rows["hpo_runs"]:
        row |= {"ended": row["last_heard"], "lease_until": row["last_heard"]}
    for row in rows["study_user_attributes"]:
        if row.get("key") == "hpo:settings":
            row["value_json"] = json.dumps(json.loads(row["value_json"]) | {"name": name})
    rows["study_user_attributes"].append({"key": "hpo:brackets", "value_json": '"s"'})
    return rows


def check_copied(source: Database, target: Database, name: str) -> None:
    expected, copied = as_copied(content(source, "s"), name, found(source, "s").identity), content(target, name)
    assert copied.keys() == expected.keys()
    for table, rows in expected.items():
        assert copied[table] == sorted(rows, key=repr), table


def rename_notes(attr: SystemAttr, trial_ids: Any) -> SystemAttr:
    words = attr.key.split(":")
    if len(words) == 3 and words[2] == "note_ver":
        return SystemAttr(f"dashboard:{trial_ids[int(words[1])]}:note_ver", attr.value)
    return attr


def test_a_copy_has_every_row_in_another_database(database: Database, target: Database) -> None:
    full_study(database)
    open_study(target, "t", direction="minimize", fingerprint="g", settings={})  # so that primary keys differ
    copy_study(found(database, "s"), target, "c", IDENTITY)
    check_copied(database, target, "c")
    assert found(target, "c").identity == IDENTITY
    assert study_names(target) == ["t", "c"]
    (_, summary) = summarize(target)
    assert (summary.state, summary.unique_name) == ("resumable", f"c-{IDENTITY}")


def test_a_copy_has_every_row_in_the_same_database(database: Database) -> None:
    study = full_study(database)
    before = content(database, "s")
    copy_study(study, database, "c", IDENTITY)
    assert content(database, "s") == before
    check_copied(database, database, "c")
    tokens = [row[0] for row in sql(database, "SELECT token FROM hpo_trials WHERE token IS NOT NULL")]
    assert len(tokens) == len(set(tokens)) == 5, "three of the study, two of the copy"


def test_a_large_study_is_copied_in_parts(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    study = full_study(database)
    monkeypatch.setattr(copying, "TRIALS_AT_ONCE", 2)
    copy_study(study, database, "c", IDENTITY)
    check_copied(database, database, "c")


def test_attributes_with_primary_keys_are_translated(database: Database) -> None:
    study = full_study(database)
    copy_study(study, database, "c", IDENTITY, translate=rename_notes)
    copied = found(database, "c")
    noted = trial_id(copied.trials()[1])
    attrs = copied.system_attrs()
    assert attrs[f"dashboard:{noted}:note_ver"] == 1
    assert attrs["NSGAIISampler:parent:1"] == [noted]
    assert attrs["plain"] == 1


def test_a_copy_is_resumed_and_searched_to_its_end(database: Database, target: Database) -> None:
    study = full_study(database)
    copy_study(study, target, "c", IDENTITY)
    copied = open_study(
        target, "c", direction="maximize", fingerprint="f", settings={"name": "c", "metric": "m"}, total_trials=4
    )
    assert copied.identity == IDENTITY, "the same fingerprint under the new name"
    with grid_run(copied) as run:
        run.enqueue(POINTS, GRID)
        claim = claim_one(run)
        assert (claim.number, claim.values) == (3, {1: 2.5})
        run.complete(claim, 3.0)
        other = claim_one(run)
        assert (other.number, other.params) == (4, {"c": None}), "another program had started it"
        run.complete(other, 0.5)
        assert run.claim() is None
    assert [trial.state.name for trial in study.trials()] == ["COMPLETE", "COMPLETE", "FAIL", "RUNNING", "RUNNING"]


def test_an_edited_copy_is_a_revision_of_the_copy(database: Database) -> None:
    copy_study(full_study(database), database, "c", IDENTITY)
    edited = open_study(database, "c", direction="maximize", fingerprint="other", settings={"name": "c"})
    assert edited.name == "c@2"


def test_a_copy_of_a_running_study_is_of_one_moment(database: Database, target: Database) -> None:
    """What a run stores while the study is copied is not in the copy, not even in part."""
    study = open_s(database)
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claim = claim_one(run)
        run.report(claim, 1, {"m": 0.1}, 0.1)
        run.flush()
        expected = content(database, "s")

        def go_on() -> None:
            run.report(claim, 2, {"m": 0.2}, 0.2)
            run.complete(claim, 0.2)
            claim_one(run)
            run.flush()

        copy_study(study, target, "c", IDENTITY, on_snapshot=go_on)
        copied = content(target, "c")
        for table in ("hpo_metrics", "trial_intermediate_values", "trial_values"):
            assert copied.get(table) == expected.get(table), table
        (trial,) = found(target, "c").trials()
        assert (trial.state.name, trial.intermediate_values) == ("WAITING", {1: 0.1})
        (summary,) = summarize(target)
        assert summary.state == "resumable", "no run works on the copy"


def test_a_source_may_be_read_only(tmp_path: Path, target: Database) -> None:
    url = f"sqlite:///{tmp_path}/source.db"
    with open_database(url) as database:
        full_study(database)
    before = (tmp_path / "source.db").read_bytes()
    with open_existing(url) as reading:
        copy_study(found(reading, "s"), target, "c", IDENTITY)
        check_copied(reading, target, "c")
    assert (tmp_path / "source.db").read_bytes() == before
    assert not (tmp_path / "source.db-wal").exists()


@pytest.mark.parametrize("name", ["t", "t@2"])
def test_a_name_is_given_once(database: Database, target: Database, name: str) -> None:
    study = full_study(database)
    for fingerprint in ("f", "g"):
        open_study(target, "t", direction="maximize", fingerprint=fingerprint, settings={})
    before = content(target, "t"), content(target, "t@2")
    with pytest.raises(NameTakenError, match=f"has a study '{name}' already: choose another name"):
        copy_study(study, target, name, IDENTITY)
    assert (content(target, "t"), content(target, "t@2")) == before


def test_the_name_of_a_study_is_taken_by_its_revisions(database: Database) -> None:
    study = full_study(database)
    with database.engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO studies (study_name) VALUES ('t@2')"))
    with pytest.raises(NameTakenError):
        copy_study(study, database, "t", IDENTITY)


def test_a_study_that_was_deleted_meanwhile_is_not_copied(database: Database, target: Database) -> None:
    study = full_study(database)
    with database.engine.begin() as connection:
        connection.execute(sa.text("UPDATE studies SET study_name = 'other'"))
    with pytest.raises(StorageError, match="the study 's' was deleted or renamed meanwhile"):
        copy_study(study, target, "c", IDENTITY)
    assert study_names(target) == []


def test_what_hpo_does_not_write_is_one_message(database: Database, target: Database) -> None:
    study = full_study(database)
    with database.engine.begin() as connection:
        connection.execute(sa.text("UPDATE study_user_attributes SET value_json = '{' WHERE key = 'hpo:total'"))
    with pytest.raises(StorageError, match="the database holds what hpo does not write") as error:
        copy_study(study, target, "c", IDENTITY)
    assert str(error.value).startswith(database.url)
    assert study_names(target) == []


def test_a_lost_answer_is_no_second_copy(database: Database, target: Database) -> None:
    study = full_study(database)
    for _ in range(2):
        copy_study(study, target, "c", IDENTITY)
    assert study_names(target) == ["c"]
    check_copied(database, target, "c")


def test_an_error_names_the_database_that_failed(
    database: Database, target: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = full_study(database)
    with target.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE hpo_rungs RENAME TO gone"))
    with pytest.raises(StorageError) as error:
        copy_study(study, target, "c", IDENTITY)
    assert str(error.value).startswith(target.url)
    assert study_names(target) == []
    with database.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE hpo_trials RENAME TO gone"))
    with pytest.raises(StorageError) as error:
        copy_study(study, target, "c", IDENTITY)
    assert str(error.value).startswith(database.url)


@pytest.mark.slow
@pytest.mark.exhaustive(on="postgresql")
@pytest.mark.parametrize(
    ("url", "target"),
    [("sqlite", "sqlite"), pytest.param("postgresql", "postgresql", marks=POSTGRES)],
    indirect=True,
)
def test_a_kill_at_any_statement_leaves_none_or_all(database: Database, target: Database) -> None:
    full_study(database)
    urls = [each.engine.url.render_as_string(hide_password=False) for each in (database, target)]

    def copy(source: Database, other: Database) -> None:
        copy_study(found(source, "s"), other, "c", IDENTITY)

    outcomes = []
    for step in itertools.count(1):
        was_killed = kill_at(step, urls, copy)
        outcomes.append(study_names(target))
        if outcomes[-1]:
            check_copied(database, target, "c")
        if not was_killed:
            break
    assert outcomes[-1] == ["c"]
    assert outcomes.count([]) >= 16, "it was killed before each statement that writes, and before the commit"


@pytest.mark.slow
def test_two_processes_that_copy_to_one_name_make_one_copy(database: Database, target: Database) -> None:
    from concurrent.futures import ThreadPoolExecutor

    study = full_study(database)
    urls = [each.engine.url.render_as_string(hide_password=False) for each in (database, target)]

    def copy(identity: str) -> str:
        with open_database(urls[1]) as other, contextlib.suppress(NameTakenError):
            copy_study(study, other, "c", identity)
            return identity
        return ""

    with ThreadPoolExecutor(4) as pool:
        done = [each for each in pool.map(copy, [f"{number:012x}" for number in range(4)]) if each]
    assert [found(target, "c").identity] == done
    check_copied(database, target, "c")
