"""Databases of older versions are brought forward, and rows of deleted studies are deleted."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.storages._rdb.models import BaseModel
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect

from hpo.studies import other_databases
from storage import database, migrations, queue
from storage.database import Database, open_database, open_for_reading
from storage.errors import StorageError
from storage.ownership import LostTrialError
from storage.studies import find_study
from storage.summaries import summarize
from storage.tables import metadata
from tests.storage.builders import allow_takeovers, claim_one, claim_point, grid_run, open_s, script_of, sql

VERSIONS = tuple(range(1, migrations.VERSION))
TABLES_OF_VERSION_1 = ["hpo_metrics", "hpo_runs", "hpo_trials"]
OUR_TABLES = [*TABLES_OF_VERSION_1, "hpo_usage"]
POINTS = [{"x": x} for x in range(1, 7)]
GRID = {"x": optuna.distributions.CategoricalDistribution([1, 2, 3, 4, 5, 6])}


def write_old(path: Path, version: int = 1) -> None:
    """Create the SQLite database of an older version."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script_of(version))


@pytest.fixture(params=VERSIONS, ids=[f"version {version}" for version in VERSIONS])
def old_version(request: pytest.FixtureRequest) -> int:
    version: int = request.param
    return version


@pytest.fixture
def old_url(url: str, tmp_path: Path, old_version: int) -> str:
    """The URL of a database of each older version, on each backend in turn."""
    if url.startswith("sqlite:"):
        write_old(Path(url.removeprefix("sqlite:///")), old_version)
        return url
    write_old(tmp_path / "source.db", old_version)
    with open_database(url) as target:
        _make_old(target, tmp_path / "source.db", old_version)
    return url


def _make_old(target: Database, source: Path, version: int) -> None:
    """Empty a PostgreSQL database, take back what later versions added, and fill it from the SQLite file of a version."""
    engine = sa.create_engine(f"sqlite:///{source}")
    tables = [*BaseModel.metadata.sorted_tables, *metadata.sorted_tables]
    with target.engine.begin() as connection, engine.connect() as old:
        for table in tables:
            connection.execute(table.delete())
        for name, (on, _) in migrations._BEFORE_DELETE.items() if version < 4 else ():
            connection.execute(sa.text(f"DROP TRIGGER {name} ON {on}"))
            connection.execute(sa.text(f"DROP FUNCTION {name}"))
        for name, (on, _) in migrations._TRIGGERS.items() if version < 3 else ():
            if version == 1 or name == "hpo_id_deleted":
                connection.execute(sa.text(f"DROP TRIGGER {name} ON {on}"))
                connection.execute(sa.text(f"DROP FUNCTION {name}"))
        if version > 1:  # the function of its trigger knows no later table
            of_later_tables = "DELETE FROM hpo_rungs WHERE trial = OLD.trial_id; " if version > 2 else ""
            of_later_tables += "DELETE FROM hpo_imports WHERE trial = OLD.trial_id; " if version > 4 else ""
            connection.exec_driver_sql(
                "CREATE OR REPLACE FUNCTION hpo_trial_deleted() RETURNS trigger LANGUAGE plpgsql AS "
                f"$$ BEGIN DELETE FROM hpo_metrics WHERE trial = OLD.trial_id; {of_later_tables}"
                "DELETE FROM hpo_trials WHERE trial = OLD.trial_id; RETURN NULL; END $$"
            )
        connection.execute(sa.text("DROP TABLE hpo_usage"))
        if version < 5:
            connection.execute(sa.text("DROP TABLE hpo_imports"))
        for statement in (
            (
                "DROP INDEX hpo_trials_by_state",
                "DROP TABLE hpo_rungs, hpo_deleted_studies",
                "ALTER TABLE hpo_trials DROP COLUMN token, DROP COLUMN claimed_epoch",
                "ALTER TABLE hpo_runs DROP COLUMN takeover_after",
            )
            if version < 3
            else ()
        ):
            connection.execute(sa.text(statement))
        for table in tables:
            if not sa.inspect(old).has_table(table.name):
                continue
            rows = [dict(row) for row in old.execute(sa.text(f"SELECT * FROM {table.name}")).mappings()]
            rows = [{name: _decode(table.c[name], value) for name, value in row.items()} for row in rows]
            if rows:
                connection.execute(table.insert(), rows)
            (key, *more) = table.primary_key.columns
            sequence = (
                None if more else connection.scalar(sa.select(sa.func.pg_get_serial_sequence(table.name, key.name)))
            )
            if sequence is not None and rows:
                connection.execute(sa.select(sa.func.setval(sequence, max(row[key.name] for row in rows))))
        if version == 1:
            connection.execute(sa.text("ALTER TABLE hpo_metrics ALTER COLUMN name TYPE VARCHAR(100)"))
    engine.dispose()


def _decode(column: sa.Column[Any], value: Any) -> Any:
    """Return a value of SQLite as the column's type has it."""
    decode = column.type.result_processor(sqlite_dialect(), None)
    return value if decode is None else decode(value)


@pytest.fixture
def migrated(old_url: str) -> Iterator[Database]:
    with open_database(old_url) as database:
        yield database


def delete_in_optuna(url: str, study: str) -> None:
    """Delete a study as a program does that knows Optuna only."""
    storage = optuna.storages.RDBStorage(url)
    optuna.delete_study(study_name=study, storage=storage)
    storage.engine.dispose()


def rows_of(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    return {table: sql(database, f"SELECT * FROM {table}") for table in OUR_TABLES}


def test_a_search_of_an_older_version_is_resumed(migrated: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "SILENT_SHARE", 0.0)
    assert sql(migrated, "SELECT version FROM hpo_schema") == [(migrations.VERSION,)]
    study = open_s(migrated)
    assert study.name == "s", "the same study, not a new revision"
    assert [trial.state.name for trial in study.trials()] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING", "RUNNING"]
    assert study.metrics()[0] == {1: {"m": 0.1, "loss": 1.0}, 2: {"m": 0.2, "loss": 0.5}}
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        allow_takeovers(migrated)
        run._queue._claim_existing(0)  # sees the dead runs first
        claims = [claim_one(run) for _ in range(3)]
        assert [(claim.number, claim.epoch) for claim in claims] == [(3, 1), (4, 1), (5, 0)]
        assert run.claim() is None


def test_the_device_time_of_earlier_versions_is_that_of_their_epochs(old_url: str) -> None:
    """They trained on half a GPU, on the CPU, on what another program has written, for no time, and on negative GPUs."""
    engine = sa.create_engine(old_url.replace("postgresql://", "postgresql+psycopg://"))
    provenances = {1: '{"device": "cuda", "gpu": 0.5}', 2: '{"device": "cpu"}', 3: '[{"device": "cuda"}]'}
    provenances[5] = '{"device": "cuda", "gpu": -1}'
    with engine.begin() as connection:
        for trial, provenance in provenances.items():
            update = sa.text("UPDATE hpo_trials SET provenance = :provenance WHERE trial = :trial")
            connection.execute(update, {"trial": trial, "provenance": provenance})
            for epoch in (1, 2) if trial < 4 else ():
                insert = sa.text("INSERT INTO hpo_metrics VALUES (:trial, :epoch, 'epoch_seconds', 10.0 * :trial)")
                connection.execute(insert, {"trial": trial, "epoch": epoch})
        connection.execute(sa.text("INSERT INTO hpo_metrics VALUES (4, 1, 'epoch_seconds', NULL)"))
        connection.execute(sa.text("INSERT INTO hpo_metrics VALUES (5, 1, 'epoch_seconds', 50.0)"))
    engine.dispose()
    with open_database(old_url) as database:
        rows = sql(database, "SELECT trial, study, device, devices, seconds FROM hpo_usage ORDER BY trial")
        assert rows == [
            (1, 1, "cuda", 0.5, 20.0),
            (2, 1, "cpu", 1.0, 40.0),
            (3, 1, "cpu", 1.0, 60.0),
            (5, 1, "cuda", 1.0, 50.0),
        ]
        assert open_s(database).device_seconds() == 160.0


@pytest.mark.parametrize("old_version", [5], indirect=True)
def test_the_device_time_of_a_trial_from_an_earlier_study_is_not_counted_twice(old_url: str) -> None:
    engine = sa.create_engine(old_url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO hpo_metrics VALUES (1, 1, 'epoch_seconds', 10.0)"))
        connection.execute(sa.text("INSERT INTO hpo_imports VALUES (1, 1, 'earlier', 0, 'reused')"))
    engine.dispose()
    with open_database(old_url) as database:
        assert sql(database, "SELECT * FROM hpo_usage") == []


def test_an_older_version_is_read_without_a_migration(old_url: str, old_version: int) -> None:
    """As `hpo plan` and `hpo list` do."""
    database = open_for_reading(old_url)
    assert database is not None
    with database:
        (summary,) = summarize(database)
        assert (summary.name, summary.state, summary.best) == ("s", "resumable", 0.2)
        study = find_study(database, "s")
        assert study is not None
        assert len(study.ended_keys()) == 3
        assert [ending[:2] for ending in study.endings()] == [(0, "COMPLETE"), (1, "PRUNED")]
        assert len(study.whole_provenances()) == 5
        assert study.metrics_of([1])[1]
        with pytest.raises(sa.exc.DBAPIError, match=r"read.?only"), database.engine.begin() as connection:
            connection.execute(sa.text("DELETE FROM hpo_trials"))
        assert sql(database, "SELECT version FROM hpo_schema") == [(old_version,)]


def test_tables_of_optuna_alone_are_read_without_ours(url: str) -> None:
    assert url.startswith("sqlite:") or open_for_reading(url) is None
    optuna_url = url.replace("postgresql://", "postgresql+psycopg://")
    theirs = optuna.storages.RDBStorage(optuna_url)
    optuna.create_study(study_name="theirs", storage=theirs)
    theirs.engine.dispose()
    database = open_for_reading(url)
    assert database is not None
    with database:
        assert [summary.name for summary in summarize(database)] == ["theirs"]
        study = find_study(database, "theirs")
        assert study is not None
        assert study.ended_keys() == set()
        assert not [name for name in sa.inspect(database.engine).get_table_names() if name.startswith("hpo")]


def test_after_a_migration_the_name_of_a_metric_may_be_long(migrated: Database) -> None:
    study, name = open_s(migrated), "layer." * 50
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claim = claim_one(run)
        run.report(claim, 2, {name: 0.5}, 0.5)
        run.flush()
    assert study.metrics()[claim.number][2] == {name: 0.5}


def test_a_migration_happens_once(old_url: str, old_version: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hpo.storage"):
        for _ in range(2):
            open_database(old_url).close()
    assert len(caplog.messages) == 1
    assert f"migrated from version {old_version} to {migrations.VERSION}" in caplog.messages[0]


def test_a_migrated_database_equals_a_new_one(tmp_path: Path, old_version: int) -> None:
    write_old(tmp_path / "old.db", old_version)
    ddl = []
    for name in ("old", "new"):
        with open_database(f"sqlite:///{tmp_path}/{name}.db") as database:
            ddl.append(
                sql(database, "SELECT type, name, sql FROM sqlite_master WHERE sql LIKE '%hpo_%' ORDER BY type, name")
            )
    assert ddl[0] == ddl[1]


def test_the_old_sqlite_file_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, copy = tmp_path / "hpo.db", tmp_path / "hpo.db.version-1"
    write_old(path)
    path.chmod(0o640)
    open_database(f"sqlite:///{path}").close()
    with closing(sqlite3.connect(copy)) as connection:
        assert list(connection.execute("SELECT version FROM hpo_schema")) == [(1,)]
        assert list(connection.execute("SELECT count(*) FROM hpo_metrics")) == [(10,)]
    assert copy.stat().st_mode & 0o777 == 0o640
    assert str(copy) in caplog.text


def test_a_copy_of_an_earlier_migration_is_kept(tmp_path: Path) -> None:
    """As when the migrated file is moved away, and another old one gets its name."""
    path = tmp_path / "hpo.db"
    names = ["hpo.db.version-1", "hpo.db.2.version-1", "hpo.db.3.version-1"]
    for name in names:
        write_old(path)
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE studies SET study_name = ?", (name,))
        open_database(f"sqlite:///{path}").close()
        path.unlink()
    for name in names:
        with closing(sqlite3.connect(tmp_path / name)) as connection:
            assert connection.execute("SELECT study_name FROM studies").fetchone() == (name,)
            assert connection.execute("SELECT version FROM hpo_schema").fetchone() == (1,)
        assert other_databases._MIGRATED.search(name)


def test_a_file_that_is_opened_through_a_link_meanwhile_is_migrated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    write_old(tmp_path / "real/hpo.db")
    (tmp_path / "link.db").symlink_to(tmp_path / "real/hpo.db")
    entered, opened = threading.Event(), threading.Event()
    back_up = migrations.back_up

    def wait_for_the_other(connection: sa.Connection, version: int) -> Path | None:
        entered.set()
        assert not opened.wait(0.3)
        return back_up(connection, version)

    def open_link() -> None:
        open_database(f"sqlite:///{tmp_path}/link.db").close()
        opened.set()

    monkeypatch.setattr(migrations, "back_up", wait_for_the_other)
    first = threading.Thread(target=lambda: open_database(f"sqlite:///{tmp_path}/real/hpo.db").close())
    second = threading.Thread(target=open_link)
    first.start()
    assert entered.wait(30)
    monkeypatch.setattr(migrations, "back_up", lambda *_: pytest.fail("migrated twice"))
    second.start()
    first.join()
    second.join()
    assert opened.is_set()
    assert [path.name for path in tmp_path.glob("real/*.version-*")] == ["hpo.db.version-1"]
    assert not list(tmp_path.glob("*.lock"))


def test_a_file_that_was_migrated_since_it_was_looked_at_is_not_migrated_again(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as opened:
        database._migrate(opened.engine, 1, opened.url)
    assert not list(tmp_path.glob("*.version-*"))


def test_without_a_copy_nothing_is_migrated(tmp_path: Path) -> None:
    write_old(tmp_path / "hpo.db")
    (tmp_path / ".hpo.db.version-1.tmp/in the way").mkdir(parents=True)
    with pytest.raises(StorageError, match="cannot be backed up first: Is a directory"):
        open_database(f"sqlite:///{tmp_path}/hpo.db")
    with closing(sqlite3.connect(tmp_path / "hpo.db")) as connection:
        assert list(connection.execute("SELECT version FROM hpo_schema")) == [(1,)]


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hpo.db"
    write_old(path)

    def fail(connection: sa.Connection) -> None:
        migrations._from_1(connection)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(migrations._STEPS, 1, fail)
        with pytest.raises(KeyboardInterrupt):
            open_database(f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as connection:
        assert list(connection.execute("SELECT version FROM hpo_schema")) == [(1,)]
        assert list(connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")) == []
    open_database(f"sqlite:///{path}").close()


@pytest.mark.parametrize("old_version", [1], indirect=True)
def test_tables_that_the_dashboard_did_not_create_are_created(old_url: str) -> None:
    """`hpo dashboard` of version 1 left a new database without hpo_runs, hpo_trials and hpo_metrics."""
    engine = sa.create_engine(old_url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        for table in TABLES_OF_VERSION_1:
            connection.execute(sa.text(f"DROP TABLE {table}"))
    engine.dispose()
    with open_database(old_url) as database:
        assert rows_of(database) == {table: [] for table in OUR_TABLES}
        with grid_run(open_s(database, "another space")) as run:
            assert claim_point(run).number == 0


def test_rows_of_deleted_studies_are_removed(old_url: str) -> None:
    """Version 1 left our rows when another program deleted a study."""
    delete_in_optuna(old_url, "s")
    with open_database(old_url) as database:
        assert rows_of(database) == {table: [] for table in OUR_TABLES}


def test_a_study_can_be_deleted_from_a_session_with_another_search_path(url: str) -> None:
    if url.startswith("sqlite:"):
        pytest.skip("SQLite has no search_path")
    with open_database(url) as database:
        with grid_run(open_s(database)) as run:
            run.complete(claim_point(run), 0.5)
        with database.engine.begin() as connection:
            connection.execute(sa.text("SET LOCAL search_path = pg_catalog"))
            connection.execute(sa.text("DELETE FROM public.studies"))
        assert rows_of(database) == {table: [] for table in OUR_TABLES}


def test_deleting_a_study_deletes_its_rows_by_any_program(url: str) -> None:
    with open_database(url) as database:
        for fingerprint in ("kept", "deleted"):
            with grid_run(open_s(database, fingerprint)) as run:
                claim = claim_point(run)
                run.report(claim, 1, {"m": 0.5}, 0.5)
                run.complete(claim, 0.5)
        before = rows_of(database)
        assert {table: len(rows) for table, rows in before.items()} == dict.fromkeys(OUR_TABLES, 2)
        delete_in_optuna(url, "s@2")
        assert rows_of(database) == {table: rows[:1] for table, rows in before.items()}


@pytest.mark.parametrize("first", ["DELETE FROM trial_", "DELETE FROM trials", "DELETE FROM stud"])
def test_a_study_is_deleted_although_a_run_adds_to_it_meanwhile(url: str, first: str) -> None:
    if url.startswith("sqlite:"):
        pytest.skip("SQLite has one writer at a time")
    storage = optuna.storages.RDBStorage(url.replace("postgresql://", "postgresql+psycopg://"))
    with open_database(url) as database:
        with grid_run(open_s(database)) as run:
            run.enqueue(POINTS, GRID)
            claims = [claim_one(run) for _ in range(2)]
            for claim in claims:
                run.report(claim, 1, {"m": 0.5}, 0.5)
            run.flush()

            def work() -> None:
                with contextlib.suppress(StorageError, LostTrialError):  # the study was deleted first
                    claim_one(run)
                    run.report(claims[1], 2, {"m": 0.6}, 0.6)
                    run.flush()

            added = threading.Thread(target=work)

            def add(_1: Any, _2: Any, statement: str, *_: Any) -> None:
                if statement.startswith(first) and added.ident is None:
                    added.start()
                    added.join(0.5 if first.startswith("DELETE FROM stud") else 10.0)  # it may wait for the deletion

            sa.event.listen(storage.engine, "before_cursor_execute", add)
            optuna.delete_study(study_name="s", storage=storage)
            added.join()
        assert rows_of(database) == {table: [] for table in OUR_TABLES}
        for table in BaseModel.metadata.sorted_tables:
            if table.name != "version_info":
                assert sql(database, f"SELECT * FROM {table.name}") == []
    storage.engine.dispose()


def test_a_run_whose_study_is_deleted_stops_and_touches_no_other_study(url: str) -> None:
    """SQLite gives the ids of the deleted study and trials to the next ones."""
    with open_database(url) as database, grid_run(open_s(database)) as stale:
        lost = claim_point(stale)
        stale.report(lost, 1, {"m": 0.5}, 0.5)
        stale.flush()
        delete_in_optuna(url, "s")
        again = open_s(database)
        assert again.metrics() == {}
        with grid_run(again) as run:
            claim = claim_point(run)
            assert claim.epoch == 0
            stale.record_crash(lost)
            stale.report(lost, 2, {"m": 0.75}, 0.75)
            stale.flush()
            with pytest.raises(LostTrialError):
                stale.complete(lost, 0.75)
            with pytest.raises(StorageError, match=r"the study 's' was deleted .* the same command creates it again"):
                stale.claim()
            assert rows_of(database)["hpo_metrics"] == []
            assert sql(database, "SELECT run, crashes FROM hpo_trials") == [(run.run_id, 0)]
            run.report(claim, 1, {"m": 0.25}, 0.25)
            run.complete(claim, 0.25)
        assert again.metrics() == {0: {1: {"m": 0.25}}}
