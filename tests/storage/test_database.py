"""Opening databases, locks, and the messages for driver errors."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from benchmarks.postgres import Postgres
from storage import database, migrations
from storage.database import Database, StorageError, open_database, retry_while_down, translate_errors
from storage.studies import find_study, open_study
from tests.factories import wait_until
from tests.storage.builders import open_in_process, open_s, sql

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
    monkeypatch.setattr(database, "_IDLE_TRANSACTION_SECONDS", 1)
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
        (f"postgresql://user:{PASSWORD}@host:port/name", "not a database URL"),
        (f"postgresql+psycopg2://user:{PASSWORD}@host/name", "does not use the driver .*psycopg2"),
        (f"postgresql+asyncpg://user:{PASSWORD}@host/name", "does not use the driver .*asyncpg"),
        (f"postgresql://user:{PASSWORD}@127.0.0.1:9/name", "no server answers there"),
        (f"postgresql://user@127.0.0.1:9/name?connect_timeout=5&password={PASSWORD}", "no server answers there"),
    ],
)
def test_a_wrong_url_raises_an_error_without_the_password(bad: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        open_database(bad)
    assert PASSWORD not in str(caught.value)
    assert caught.value.__cause__ is None  # its traceback would show the driver's message


@pytest.mark.postgres
@pytest.mark.slow
def test_a_wrong_password_or_database_names_the_remedy(postgres: Postgres) -> None:
    url = postgres.create_database("rights")
    with pytest.raises(StorageError, match="wrong user or password") as caught:
        open_database(url.replace(postgres.password, PASSWORD))
    assert PASSWORD not in str(caught.value)
    with pytest.raises(StorageError, match=r'database "nowhere" does not exist: create it'):
        open_database(postgres.url("nowhere"))


@pytest.mark.postgres
@pytest.mark.slow
def test_a_user_without_rights_raises_an_error_that_names_the_right_to_grant(postgres: Postgres) -> None:
    url = sa.make_url(postgres.create_database("norights"))
    admin = sa.create_engine(url.set(drivername="postgresql+psycopg"))
    with admin.begin() as connection:
        connection.execute(sa.text("CREATE ROLE reader LOGIN PASSWORD 'reader'"))
    admin.dispose()
    reader = url.set(username="reader", password="reader").render_as_string(hide_password=False)
    with pytest.raises(StorageError, match=r"lacks rights .*grant it CREATE"):
        open_database(reader)


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
    ],
)
def test_a_file_of_another_program_stays_the_same_to_the_last_byte(tmp_path: Path, statements: list[str]) -> None:
    """Even where a table has the name of one of Optuna's: no lock next to it, and no WAL in its header."""
    file = tmp_path / "theirs.db"
    with closing(sqlite3.connect(file)) as connection, connection:
        for statement in statements:
            connection.execute(statement)
    content = file.read_bytes()
    for create in (False, True):
        with pytest.raises(StorageError, match="belongs to another program"):
            open_database(f"sqlite:///{file}", create=create)
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE hpo_schema SET version = 99", "newer version of hpo"),
        ("UPDATE alembic_version SET version_num = 'v3.0.0.d'", "another version of Optuna"),
    ],
)
def test_a_file_of_another_version_stays_the_same_to_the_last_byte(
    tmp_path: Path, statement: str, message: str
) -> None:
    file = tmp_path / "hpo.db"
    open_database(f"sqlite:///{file}").close()
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(statement)
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    for lock in tmp_path.glob("*.lock"):
        lock.unlink()
    content = file.read_bytes()
    with pytest.raises(StorageError, match=message):
        open_database(f"sqlite:///{file}")
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


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
        with database._schema_lock(second.engine, url):
            entered.set()

    with open_database(url) as first, open_database(url) as second:
        with database._schema_lock(first.engine, url):
            thread = threading.Thread(target=enter)
            thread.start()
            assert not entered.wait(0.2)
        assert entered.wait(10)
        thread.join()


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
    with open_database(url) as first, database._schema_lock(first.engine, url):
        monkeypatch.setattr(database, "OPENING_SECONDS", 0.5)
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
