"""Opening databases, locks, and the messages for driver errors."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from benchmarks.postgres import Postgres
from storage import engines, migrations, optuna_tables, sqlite_file, versions, wal
from storage.database import Database, open_database, open_existing, open_for_reading
from storage.errors import StorageError, retry_while_down, translate_errors
from storage.parents import needed_ids
from storage.studies import all_studies, find_study, open_study
from storage.tables import metadata
from storage.urls import contains_password, without_password
from storage.versions import schema_lock
from tests.factories import wait_until
from tests.storage.builders import open_in_process, open_s, script_of, sql

PASSWORD = "do-not-show-me"


@pytest.mark.slow
def test_processes_can_open_the_same_new_database_at_the_same_time(url: str) -> None:
    count = 8
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.storage.builders", "alembic.command", "psycopg", "pytest"])
    answers: multiprocessing.Queue[str] = context.Queue()
    barrier = context.Barrier(count)
    processes = [context.Process(target=open_in_process, args=(url, barrier, answers)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found == ["opened"] * count
    with open_database(url) as database, database.engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM studies")) == 1
        assert connection.scalar(sa.text("SELECT count(*) FROM hpo_schema")) == 1


def test_sqlite_is_opened_with_wal_and_synchronous_normal(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path}/new/folder/hpo.db") as database:
        for engine in (database.engine, database.optuna_storage.engine):
            with engine.connect() as connection:
                assert connection.scalar(sa.text("PRAGMA journal_mode")) == "wal"
                assert connection.scalar(sa.text("PRAGMA synchronous")) == 1
                assert connection.scalar(sa.text("PRAGMA trusted_schema")) == 0
                assert connection.scalar(sa.text("PRAGMA busy_timeout")) == 60_000


@pytest.mark.postgres
@pytest.mark.slow
def test_a_bare_postgresql_url_uses_psycopg_3_with_pre_ping(postgres: Postgres) -> None:
    url = postgres.create_database("bare")
    assert url.startswith("postgresql://")
    with open_database(url) as database:
        for engine in (database.engine, database.optuna_storage.engine):
            assert engine.dialect.driver == "psycopg"
            assert engine.pool._pre_ping


@pytest.mark.postgres
@pytest.mark.slow
def test_a_lost_connection_is_noticed_on_both_sides_within_about_a_minute(postgres: Postgres) -> None:
    url = postgres.create_database("tcp") + "?keepalives_count=5"
    with open_database(url) as database:
        for engine in (database.engine, database.optuna_storage.engine):
            with engine.connect() as connection:
                names = ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout")
                shown = [connection.exec_driver_sql(f"SHOW {name}").scalar() for name in names]
                assert shown == ["30", "10", "3", "60000"]
                client = connection.connection.driver_connection.info.get_parameters()  # type: ignore[union-attr]
                assert {name: client[name] for name in ("keepalives_idle", "keepalives_count", "tcp_user_timeout")} == {
                    "keepalives_idle": "30",
                    "keepalives_count": "5",  # what the URL says
                    "tcp_user_timeout": "60000",
                }


@pytest.mark.postgres
@pytest.mark.slow
def test_a_process_that_is_suspended_in_a_transaction_does_not_stop_the_others(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_IDLE_TRANSACTION_SECONDS", 1)
    lock = sa.text("SELECT study_name FROM studies FOR UPDATE")
    with open_database(postgres.create_database("suspended")) as opened:
        open_s(opened)
        attempts = 0

        def suspended_once() -> Any:
            nonlocal attempts
            attempts += 1
            with opened.transaction() as connection:
                connection.execute(lock)
                if attempts == 1:
                    with opened.transaction() as other:  # waits until the server has ended this transaction
                        assert other.scalar(lock) == "s"
                return connection.scalar(lock)

        assert retry_while_down(opened, suspended_once, timeout_seconds=30) == "s"
        assert attempts == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (f"not a url {PASSWORD}", "not a database URL"),
        (f"mysql://user:{PASSWORD}@host/name", "mysql is not supported"),
        (f"nonsense://user:{PASSWORD}@host/name", "no driver for nonsense"),
        ("sqlite://", "ends with the process; name a file"),
        ("sqlite:///:memory:", "ends with the process; name a file"),
        ("sqlite:///%3Amemory%3A?timeout=5", "ends with the process; name a file"),
        ("sqlite:///file:x?mode=memory&cache=shared&uri=true", "ends with the process; name a file"),
        ("sqlite:///file:/x?vfs=memdb&uri=true", "ends with the process; name a file"),
        ("sqlite:///file::memory:?uri=true", "by their path, not by a file: URI"),
        ("sqlite:///file::memory:", "by their path, not by a file: URI"),
        ("sqlite:///x.db?uri=true", "option 'uri' of a SQLite URL .allowed: check_same_thread and timeout"),
        ("sqlite:///x.db?timeout=abc", "option timeout of a SQLite URL must be a number of seconds"),
        ("sqlite:///x.db?timeout=1&timeout=2", "option timeout of a SQLite URL must be a number of seconds"),
        ("sqlite:///x.db?check_same_thread=perhaps", "option check_same_thread of a SQLite URL must be true or false"),
        (f"sqlite:///{'a' * 300}.db", "the path of the database cannot be used: File name too long"),
        ("sqlite:///a\0b.db", "the path of the database cannot be used: .*embedded null"),
        ("sqlite:////caf\udce9/x.db", "is no Unicode: start in its folder"),
        ("sqlite:///.", "is a folder: name a file in it"),
        (f"postgresql://user:{PASSWORD}@host:port/name", "not a database URL"),
        (f"postgresql+psycopg2://user:{PASSWORD}@host/name", "does not use the driver .*psycopg2"),
        (f"postgresql+asyncpg://user:{PASSWORD}@host/name", "does not use the driver .*asyncpg"),
        (f"postgresql://user:{PASSWORD}@127.0.0.1:9/name", "no server answers there"),
        (f"postgresql://user@127.0.0.1:9/name?connect_timeout=5&password={PASSWORD}", "no server answers there"),
        (f"postgresql://user@127.0.0.1:9/name?sslmode=disable&sslpassword={PASSWORD}", "no server answers there"),
        (f"postgresql://user@127.0.0.1:9/name?options=-c%20my.key%3D{PASSWORD}", "no server answers there"),
        (f"postgresql://user:half@{PASSWORD}@127.0.0.1:9/name", "write an @ in a user name or password as %40"),
    ],
)
def test_a_wrong_url_raises_an_error_without_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=message) as caught:
        open_database(bad)
    assert list(tmp_path.iterdir()) == []
    assert PASSWORD not in str(caught.value)
    assert caught.value.__cause__ is None  # its traceback would show the driver's message


@pytest.mark.parametrize(
    ("url", "shown", "has_password"),
    [
        ("sqlite:///runs/a b.db", "sqlite:///runs/a b.db", False),
        ("postgresql://me@host:5432/db", "postgresql+psycopg://me@host:5432/db", False),
        ("postgresql://me:s%40cret@host/db", "postgresql+psycopg://me:***@host/db", True),
        ("postgresql://host/db?user=me&password=s", "postgresql+psycopg://me:***@host/db", True),
        (
            "postgresql://me@host/db?sslpassword=s&sslmode=require",
            "postgresql+psycopg://me@host/db?sslmode=require&sslpassword=***",
            True,
        ),
        (
            "postgresql://me@host/db?oauth_client_secret=s&oauth_client_id=hpo&application_name=a+b",
            "postgresql+psycopg://me@host/db?application_name=a+b&oauth_client_id=hpo&oauth_client_secret=***",
            True,
        ),
        ("postgresql://me@host/db?scram_client_key=s", "postgresql+psycopg://me@host/db?scram_client_key=***", True),
        ("postgresql://me@host/db?passfile=/p", "postgresql+psycopg://me@host/db?passfile=%2Fp", False),
        # An option that hpo does not know may be a secret.
        ("postgresql://me@host/db?new=a&new=b", "postgresql+psycopg://me@host/db?new=***", False),
        (
            "postgresql://me@host/db?options=-c%20search_path%3Dhpo,public",
            "postgresql+psycopg://me@host/db?options=-c+search_path%3Dhpo%2Cpublic",
            False,
        ),
        (
            "postgresql://me@host/db?options=-csearch_path%3Dhpo%20-c%20my.key%3Ds",
            "postgresql+psycopg://me@host/db?options=***",
            False,
        ),
        ("postgresql://host/db?user=s:s", "postgresql+psycopg://s%3As@host/db", False),
    ],
)
def test_urls_are_shown_without_their_password(url: str, shown: str, has_password: bool) -> None:
    assert without_password(url) == shown
    assert contains_password(url) is has_password


def test_no_option_is_shown_that_libpq_would_hide() -> None:
    for option in psycopg.pq.Conninfo.get_defaults():
        name = option.keyword.decode()
        if option.dispchar == b"*" and name != "password":
            assert without_password(f"postgresql://host/db?{name}={PASSWORD}").endswith(f"{name}=***")
            assert contains_password(f"postgresql://host/db?{name}={PASSWORD}")


@pytest.mark.postgres
@pytest.mark.slow
def test_user_and_password_may_be_in_the_query(postgres: Postgres) -> None:
    url = sa.make_url(postgres.create_database("queried"))
    query = {"user": str(url.username), "password": postgres.password}
    moved = sa.URL.create("postgresql", host=url.host, port=url.port, database=url.database, query=query)
    with open_database(moved.render_as_string(hide_password=False)) as database:
        assert all_studies(database) == []
        assert database.optuna_storage.get_all_studies() == []


@pytest.mark.postgres
@pytest.mark.slow
def test_a_wrong_password_or_database_names_the_remedy(postgres: Postgres) -> None:
    url = postgres.create_database("rights")
    with pytest.raises(StorageError, match="wrong user or password") as caught:
        open_database(url.replace(postgres.password, PASSWORD))
    assert PASSWORD not in str(caught.value)
    with pytest.raises(StorageError, match=r'database "nowhere" does not exist: create it'):
        open_database(postgres.url("nowhere"))


def test_a_database_of_another_program_is_refused_and_not_changed(url: str) -> None:
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE customers (name TEXT)"))
    with pytest.raises(StorageError, match=r"belongs to another program .it has the tables customers"):
        open_database(url)
    assert sa.inspect(engine).get_table_names() == ["customers"]
    engine.dispose()


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE customers (name TEXT)"],
        ["CREATE TABLE studies (id INTEGER, title TEXT)", "INSERT INTO studies VALUES (1, 'law')"],
        ["CREATE TABLE studies (study_id INTEGER, study_name TEXT)", "CREATE TABLE trials (court TEXT)"],
        # The names of all columns that hpo needs: a register of clinical studies.
        [
            "CREATE TABLE studies (study_id INTEGER, study_name TEXT, sponsor TEXT)",
            "CREATE TABLE patients (id INTEGER)",
        ],
        ["CREATE TABLE studies (study_id INTEGER, study_name TEXT)"],
        ["CREATE TABLE hpo_schema (id INTEGER)"],
        ["CREATE TABLE alembic_version (version_num TEXT)", "INSERT INTO alembic_version VALUES ('2fa8')"],
        ["CREATE TABLE all_studies (id INTEGER)", "CREATE VIEW studies AS SELECT id FROM all_studies"],
    ],
)
@pytest.mark.parametrize("journal", ["delete", "persist", "wal"])
def test_a_file_of_another_program_stays_the_same_to_the_last_byte(
    tmp_path: Path, statements: list[str], journal: str
) -> None:
    """Even where a table has the name of one of Optuna's: no lock next to it, and no WAL in its header."""
    file = tmp_path / "theirs.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(f"PRAGMA journal_mode={journal}")
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    _check_that_it_is_refused_and_not_changed(file, "belongs to another program")


def _check_that_it_is_refused_and_not_changed(file: Path, message: str) -> None:
    before = {path: path.read_bytes() for path in file.parent.iterdir()}
    for create in (False, True):
        with pytest.raises(StorageError, match=message):
            open_database(f"sqlite:///{file}", create=create)
    assert {path: path.read_bytes() for path in file.parent.iterdir()} == before


def test_a_table_of_another_program_may_not_differ_from_ours_by_case_only(tmp_path: Path) -> None:
    """For SQLite, both names are those of the same table."""
    file = tmp_path / "theirs.db"
    optuna.storages.RDBStorage(f"sqlite:///{file}").engine.dispose()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE HPO_Runs (mine TEXT)")
    _check_that_it_is_refused_and_not_changed(file, "belongs to another program .it has the tables hpo_runs")


KILLED_WRITERS = {
    "a wal": "c.execute('PRAGMA journal_mode=wal'); c.execute('CREATE TABLE songs (name TEXT)')",
    "a hot journal": "c.execute('CREATE TABLE songs (name TEXT)'); c.execute('PRAGMA cache_size=1'); "
    "c.execute('INSERT INTO songs VALUES (zeroblob(1000000))'); c.commit(); "
    "c.execute('UPDATE songs SET name = zeroblob(900000)')",
}


@pytest.mark.parametrize("left", KILLED_WRITERS)
def test_what_another_program_left_when_it_was_killed_stays_the_same(tmp_path: Path, left: str) -> None:
    file = tmp_path / "theirs.db"
    code = f"import os, sqlite3; c = sqlite3.connect({str(file)!r}); {KILLED_WRITERS[left]}; os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list(tmp_path.iterdir())) > 1
    _check_that_it_is_refused_and_not_changed(file, "belongs to another program")


def test_optunas_tables_may_be_next_to_those_of_another_program(url: str) -> None:
    """Programs share a PostgreSQL database. hpo changes its own tables and Optuna's only."""
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    optuna.storages.RDBStorage(engine.url.render_as_string(hide_password=False)).engine.dispose()
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE customers (name TEXT)"))
        connection.execute(sa.text("INSERT INTO customers VALUES ('a')"))
    with open_database(url) as opened:
        open_s(opened)
        assert sql(opened, "SELECT * FROM customers") == [("a",)]
    engine.dispose()


def test_a_table_of_another_program_with_a_name_of_ours_is_refused(url: str) -> None:
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    optuna.storages.RDBStorage(engine.url.render_as_string(hide_password=False)).engine.dispose()
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE hpo_runs (name TEXT)"))
    tables = sa.inspect(engine).get_table_names()
    with pytest.raises(StorageError, match=r"another program .it has the tables hpo_runs"):
        open_database(url)
    assert sa.inspect(engine).get_table_names() == tables
    engine.dispose()


REPLACED_TABLES = {
    "a view": ["ALTER TABLE {table} RENAME TO other", "CREATE VIEW {table} AS SELECT * FROM other"],
    "a view in upper case": ["ALTER TABLE {table} RENAME TO other", "CREATE VIEW {TABLE} AS SELECT * FROM other"],
    "a virtual table": ["DROP TABLE {table}", "CREATE VIRTUAL TABLE {table} USING fts5({columns})"],
}


@pytest.mark.parametrize("table", ["studies", "trial_params", "hpo_runs", "hpo_schema", "alembic_version"])
@pytest.mark.parametrize("replacement", REPLACED_TABLES)
def test_a_file_in_which_a_view_has_the_name_of_a_table_is_refused(
    empty_database: Path, tmp_path: Path, table: str, replacement: str
) -> None:
    """It would give another answer each time, or none for ever."""
    file = Path(shutil.copy(empty_database, tmp_path))
    with closing(sqlite3.connect(file)) as connection:
        columns = ", ".join(name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})"))
        for (trigger,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {trigger}")
        for statement in REPLACED_TABLES[replacement]:
            connection.execute(statement.format(table=table, TABLE=table.upper(), columns=columns))
        connection.commit()
    for opens in (open_database, open_existing, open_for_reading):
        with pytest.raises(StorageError, match=f"{table} is not an ordinary table"):
            opens(f"sqlite:///{file}")
    if table == "studies":
        with pytest.raises(StorageError, match=f"{table} is not an ordinary table"):
            needed_ids(file)


@pytest.mark.postgres
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["VIEW", "MATERIALIZED VIEW"])
def test_a_server_on_which_a_view_has_the_name_of_a_table_is_refused(postgres: Postgres, kind: str) -> None:
    url = postgres.create_database(f"view_{kind[:3].lower()}")
    with open_database(url) as opened, opened.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE hpo_runs RENAME TO other")
        connection.exec_driver_sql(f"CREATE {kind} hpo_runs AS SELECT * FROM other")
    with pytest.raises(StorageError, match="hpo_runs is not an ordinary table"):
        open_database(url)


@pytest.mark.parametrize("created", range(0, 20, 3))
def test_tables_that_a_killed_process_began_to_create_are_completed(tmp_path: Path, created: int) -> None:
    """It leaves the first ones: ours, then Optuna's, then the versions."""
    tables = [*metadata.tables.values(), *optuna_tables.metadata.tables.values()]
    engine = sa.create_engine(f"sqlite:///{tmp_path}/hpo.db")
    for table in tables[:created]:
        table.create(engine)
    engine.dispose()
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as opened:
        assert open_s(opened).name == "s"


def test_a_file_that_a_search_cannot_write_is_refused_at_once(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.close()
    for lock in tmp_path.glob("*.lock"):
        lock.unlink()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # as root has it for a file with `chattr +i`
    if database.engine.dialect.name == "sqlite":
        for create in (True, False):
            with pytest.raises(StorageError, match="the file is read-only: make it and its folder writable"):
                open_database(database.url, create=create)
        assert sorted(tmp_path.iterdir()) == before


def test_a_lock_that_cannot_be_written_is_named_with_the_remedy(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/hpo.db"
    open_database(url).close()
    (lock,) = tmp_path.glob("*.lock")
    lock.unlink()
    lock.mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*\.lock: .*make it and its folder writable"):
        open_database(url)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_existing_database_is_only_read_unless_its_tables_are_older(tmp_path: Path, version: int) -> None:
    file = tmp_path / "hpo.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(script_of(version))
    with open_existing(f"sqlite:///{file}") as opened:
        assert sql(opened, "SELECT version FROM hpo_schema") == [(migrations.VERSION,)]
    for path in set(tmp_path.iterdir()) - {file}:
        path.unlink()
    before = file.read_bytes()
    with open_existing(f"sqlite:///{file}") as opened:
        (study,) = all_studies(opened)
        assert study.metrics()
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == before


# --- a WAL of another file ----------------------------------------------------------------------------------------------

SEARCH = """
import os, sqlite3, sys
from contextlib import closing
from optuna.distributions import CategoricalDistribution
from storage.database import open_database
from tests.storage.builders import claim_one, grid_run, open_s

path, copied, killed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with grid_run(open_s(open_database(f"sqlite:///{path}"))) as run:
    run.enqueue([{"x": x} for x in range(200)], {"x": CategoricalDistribution(list(range(200)))})
    for number in range(200):
        claim = claim_one(run)
        for epoch in range(1, 6):
            run.report(claim, epoch, {"m": float(epoch)}, float(epoch))
        run.complete(claim, 1.0)
        if number == copied:
            run.flush()
            with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(path + ".copy")) as target:
                source.backup(target)
        if number == killed:
            run.flush()
            os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module")
def killed_search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hpo.db` and its WAL, as a killed search left them, and an older copy of the database."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", SEARCH, str(folder / "hpo.db"), "60", "180"]
    subprocess.run(command, check=False, cwd=Path(__file__).parents[2])
    assert sqlite_file.has_wal(folder / "hpo.db")
    return folder


@pytest.mark.slow
def test_a_copy_that_is_restored_next_to_an_old_wal_is_refused_and_not_damaged(
    killed_search: Path, tmp_path: Path
) -> None:
    for path in killed_search.iterdir():
        shutil.copy(path, tmp_path)
    file = tmp_path / "hpo.db"
    time.sleep(0.02)
    shutil.copy(tmp_path / "hpo.db.copy", file)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StorageError, match=r"If you restored a copy: .* delete hpo\.db-wal and hpo\.db-shm"):
        open_database(f"sqlite:///{file}")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    for suffix in ("wal", "shm"):
        Path(f"{file}-{suffix}").unlink()
    with open_database(f"sqlite:///{file}") as opened:
        assert sql(opened, "PRAGMA integrity_check") == [("ok",)]
        assert sql(opened, "SELECT count(*) FROM trials WHERE state = 'COMPLETE'") == [(61,)]


def test_transactions_that_write_are_numbered_in_the_file(tmp_path: Path) -> None:
    """So each is in the first page of the file, by which `wal` recognizes the file of a WAL."""
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as opened:
        open_s(opened)
        (before,) = sql(opened, "PRAGMA user_version")[0]
        with opened.transaction() as connection:
            connection.execute(sa.text("SELECT count(*) FROM trials"))
        assert sql(opened, "PRAGMA user_version") == [(before,)]
        with opened.transaction() as connection:
            connection.execute(sa.text("DELETE FROM studies"))
        assert sql(opened, "PRAGMA user_version") == [(before + 1,)]
        with opened.engine.connect() as connection:
            connection.execute(sa.text(f"PRAGMA user_version = {wal.STAMPS - 1}"))
        with opened.transaction() as connection:
            connection.execute(sa.text("INSERT INTO hpo_deleted_studies VALUES ('a')"))
        assert sql(opened, "PRAGMA user_version") == [(0,)]


@pytest.mark.slow
def test_the_wal_of_a_killed_search_is_used_without_reading_it_first(
    killed_search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("hpo.db", "hpo.db-shm", "hpo.db-wal"):  # the WAL changes last, as in a search
        shutil.copy(killed_search / name, tmp_path)
        time.sleep(0.02)
    monkeypatch.setattr(wal, "belongs", lambda *_: pytest.fail("the WAL was read"))
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as opened:
        assert sql(opened, "SELECT count(*) FROM trials WHERE state = 'COMPLETE'") == [(181,)]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE hpo_schema SET version = 99", "newer version of hpo"),
        ("UPDATE alembic_version SET version_num = 'v3.0.0.d'", "another version of Optuna"),
    ],
)
@pytest.mark.parametrize("journal", ["delete", "persist", "wal"])
def test_a_file_of_another_version_stays_the_same_to_the_last_byte(
    tmp_path: Path, statement: str, message: str, journal: str
) -> None:
    file = tmp_path / "hpo.db"
    open_database(f"sqlite:///{file}").close()
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(statement)
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute(f"PRAGMA journal_mode={journal}")
        connection.execute("PRAGMA user_version=1")
    for lock in tmp_path.glob("*.lock"):
        lock.unlink()
    _check_that_it_is_refused_and_not_changed(file, message)


def test_tables_of_an_older_optuna_get_none_of_ours(url: str) -> None:
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    optuna.storages.RDBStorage(engine.url.render_as_string(hide_password=False)).engine.dispose()
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 'v3.0.0.d'"))
    tables = sa.inspect(engine).get_table_names()
    for _ in range(2):
        with pytest.raises(StorageError, match=r"another version of Optuna .its tables: v3\.0\.0\.d"):
            open_database(url)
    assert sa.inspect(engine).get_table_names() == tables
    engine.dispose()


def test_a_database_of_another_version_is_refused(url: str) -> None:
    with open_database(url) as database:
        with database.engine.begin() as connection:
            connection.execute(sa.text("UPDATE hpo_schema SET version = 99"))
        with pytest.raises(StorageError, match=r"written by a newer version of hpo .* version 99"):
            open_database(url)
        with database.engine.begin() as connection:
            connection.execute(sa.text(f"UPDATE hpo_schema SET version = {migrations.VERSION}"))
            connection.execute(sa.text("UPDATE alembic_version SET version_num = 'v0.9.0.a'"))
        with pytest.raises(StorageError, match="another version of Optuna"):
            open_database(url)


def test_a_file_that_is_not_a_database_is_refused_and_not_changed(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("shopping list\n" * 100)
    with pytest.raises(StorageError, match="not a SQLite database"):
        open_database(f"sqlite:///{file}")
    assert file.read_text().startswith("shopping list")


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot create the folder .*/file/below"):
        open_database(f"sqlite:///{tmp_path}/file/below/hpo.db")


def test_tables_are_created_by_one_process_at_a_time(url: str) -> None:
    entered = threading.Event()

    def enter() -> None:
        with schema_lock(second.engine, url):
            entered.set()

    with open_database(url) as first, open_database(url) as second:
        with schema_lock(first.engine, url):
            thread = threading.Thread(target=enter)
            thread.start()
            assert not entered.wait(0.2)
        assert entered.wait(10)
        thread.join()


@pytest.mark.parametrize(
    ("rights", "expected"), [(0o600, 0o600), (0o644, 0o600), (0o660, 0o660), (0o664, 0o660), (0o666, 0o666)]
)
def test_only_who_may_write_to_a_database_may_use_its_lock(tmp_path: Path, rights: int, expected: int) -> None:
    """Any other user who could only read the lock could hold it, and nobody could open the database."""
    url, file = f"sqlite:///{tmp_path}/hpo.db", tmp_path / "hpo.db"
    umask = os.umask(0)
    try:
        open_database(url).close()
        [lock] = tmp_path.glob("*.lock")
        assert lock.stat().st_mode & 0o777 == 0o600, "the database is not shared yet"
        file.chmod(rights)
        open_database(url).close()
        assert lock.stat().st_mode & 0o777 == expected
        lock.chmod(0o666)  # of an earlier version of hpo
        open_database(url).close()
        assert lock.stat().st_mode & 0o777 == expected
        lock.unlink()
        open_database(url).close()
        assert lock.stat().st_mode & 0o777 == expected
    finally:
        os.umask(umask)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
def test_a_lock_belongs_to_the_group_of_the_database_and_roots_to_its_owner(tmp_path: Path) -> None:
    url, file = f"sqlite:///{tmp_path}/hpo.db", tmp_path / "hpo.db"
    open_database(url).close()
    os.chown(file, 1234, 5678)
    file.chmod(0o660)
    open_database(url).close()
    [lock] = tmp_path.glob("*.lock")
    assert (lock.stat().st_uid, lock.stat().st_gid, lock.stat().st_mode & 0o777) == (1234, 5678, 0o660)


def test_a_link_in_the_place_of_a_lock_leads_to_no_other_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/hpo.db"
    open_database(url).close()
    [lock] = tmp_path.glob("*.lock")
    lock.unlink()
    theirs = tmp_path / "theirs"
    theirs.touch(mode=0o640)
    lock.symlink_to(theirs)
    with pytest.raises(StorageError, match=r"cannot write .*lock"):
        open_database(url)
    assert theirs.stat().st_mode & 0o777 == 0o640


def test_a_transaction_writes_alone_on_sqlite(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as opened, opened.transaction():
        other = sqlite3.connect(tmp_path / "hpo.db", timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.close()


def test_now_seconds_is_the_unix_time(url: str) -> None:
    with open_database(url) as database, database.engine.connect() as connection:
        assert connection.scalar(sa.select(database.now_seconds())) == pytest.approx(time.time(), abs=2.0)


@pytest.mark.postgres
@pytest.mark.slow
def test_an_operation_is_retried_until_the_server_is_back(postgres: Postgres, caplog: pytest.LogCaptureFixture) -> None:
    with open_database(postgres.create_database("outage")) as database:
        open_study(database, "s", direction="maximize", fingerprint="f", settings={})
        postgres.stop(immediate=True)

        def start_when_unavailable() -> None:
            try:
                wait_until(lambda: "the database is unavailable" in caplog.text)
            finally:
                postgres.start()

        thread = threading.Thread(target=start_when_unavailable)
        thread.start()
        found = find_study(database, "s")
        thread.join()
        assert found is not None
    assert "the database is unavailable" in caplog.text


@pytest.mark.postgres
@pytest.mark.slow
def test_an_operation_fails_when_the_server_stays_down(postgres: Postgres) -> None:
    with open_database(postgres.create_database("gone")) as database:
        postgres.stop(immediate=True)
        try:
            with pytest.raises(StorageError, match=r"still unavailable after 1 s\. no server answers there"):
                retry_while_down(database, lambda: database.optuna_storage.get_all_studies(), timeout_seconds=1.0)
        finally:
            postgres.start()


def test_a_full_disk_is_not_retried(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        with database.engine.begin() as connection:
            pages = connection.scalar(sa.text("PRAGMA page_count"))

        def fill() -> None:
            with database.engine.begin() as connection:
                connection.execute(sa.text(f"PRAGMA max_page_count = {pages}"))  # SQLite reports this as a full disk
                connection.execute(sa.text("CREATE TABLE big AS SELECT zeroblob(10000000) AS b"))

        started = time.monotonic()
        with pytest.raises(StorageError, match="the disk is full: free some space"):
            retry_while_down(database, fill)
        assert time.monotonic() - started < 5


def test_a_damaged_file_is_reported(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        database.engine.dispose()
        database.optuna_storage.engine.dispose()
        file = tmp_path / "hpo.db"
        with sqlite3.connect(file) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        content = bytearray(file.read_bytes())
        content[100:] = b"\xff" * (len(content) - 100)
        file.write_bytes(content)
        with pytest.raises(StorageError, match="the file is damaged"):
            open_database(f"sqlite:///{file}")


def test_an_interrupt_in_a_statement_stays_an_interrupt(database: Database) -> None:
    """A connection in the middle of a statement cannot be put back into the pool, which raises another error."""

    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise OperationalError("SELECT 1", {}, Exception("can't change 'autocommit' now"))

    with pytest.raises(KeyboardInterrupt):
        retry_while_down(database, interrupted)
    with pytest.raises(KeyboardInterrupt), translate_errors("url"):
        interrupted()


def test_opening_does_not_wait_forever_for_a_process_that_is_suspended_while_it_opens(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_database(url) as first, schema_lock(first.engine, url):
        monkeypatch.setattr(versions, "OPENING_SECONDS", 0.5)
        with pytest.raises(StorageError, match="another process has been opening it for over") as raised:
            open_database(url)
        message = str(raised.value)
        if url.startswith("sqlite:"):
            assert ".lock` shows its PID" in message
        else:
            pid = int(message.partition("pg_terminate_backend(")[2].partition(")")[0])
            assert sql(first, f"SELECT application_name FROM pg_stat_activity WHERE pid = {pid}") == [("hpo",)]
    with open_database(url):
        pass
