from __future__ import annotations

import multiprocessing
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from benchmarks.postgres import Postgres
from storage.database import StorageError, open_database, retry_while_down
from storage.studies import find_study, open_study

PASSWORD = "do-not-show-me"


def _open(url: str, start: float, answers: multiprocessing.Queue[str]) -> None:
    time.sleep(max(0.0, start - time.time()))  # all at the same moment
    try:
        with open_database(url) as database:
            open_study(database, "same", direction="maximize", fingerprint="f", settings={"metric": "m"})
            answers.put("opened")
    except BaseException as error:  # noqa: BLE001
        answers.put(f"{type(error).__name__}: {error}")


def test_twenty_processes_open_the_same_fresh_database_at_once(url: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["storage.studies"])
    answers: multiprocessing.Queue[str] = context.Queue()
    start = time.time() + 4
    processes = [context.Process(target=_open, args=(url, start, answers)) for _ in range(20)]
    for process in processes:
        process.start()
    got = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert got == ["opened"] * 20
    with open_database(url) as database, database.engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM studies")) == 1
        assert connection.scalar(sa.text("SELECT count(*) FROM hpo_schema")) == 1


def test_sqlite_is_opened_with_wal_and_normal_synchronisation(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path}/new/folder/hpo.db") as database:
        for engine in (database.engine, database.optuna_storage.engine):
            with engine.connect() as connection:
                assert connection.scalar(sa.text("PRAGMA journal_mode")) == "wal"
                assert connection.scalar(sa.text("PRAGMA synchronous")) == 1
                assert connection.scalar(sa.text("PRAGMA busy_timeout")) == 60_000


def test_a_bare_postgresql_url_is_psycopg_3_with_pre_ping(postgres: Postgres) -> None:
    url = postgres.create_database("bare")
    assert url.startswith("postgresql://")
    with open_database(url) as database:
        for engine in (database.engine, database.optuna_storage.engine):
            assert engine.dialect.driver == "psycopg"
            assert engine.pool._pre_ping  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (f"not a url {PASSWORD}", "not a database URL"),
        (f"mysql://user:{PASSWORD}@host/name", "mysql is not supported"),
        (f"nonsense://user:{PASSWORD}@host/name", "no driver for nonsense"),
        ("sqlite://", "would not outlive the run"),
        (f"postgresql://user:{PASSWORD}@127.0.0.1:9/name", "no server answers there"),
    ],
)
def test_a_wrong_url_says_what_to_write_and_keeps_the_password(bad: str, said: str) -> None:
    with pytest.raises(StorageError, match=said) as caught:
        open_database(bad)
    assert PASSWORD not in str(caught.value)
    assert caught.value.__cause__ is None  # a cause would show the driver's own text in a traceback


def test_a_wrong_password_or_database_names_the_remedy(postgres: Postgres) -> None:
    url = postgres.create_database("rights")
    with pytest.raises(StorageError, match="wrong user or password") as caught:
        open_database(url.replace(postgres.password, PASSWORD))
    assert PASSWORD not in str(caught.value)
    with pytest.raises(StorageError, match=r'database "nowhere" does not exist: create it'):
        open_database(postgres.url("nowhere"))


def test_a_user_without_rights_is_told_which_to_grant(postgres: Postgres) -> None:
    url = sa.make_url(postgres.create_database("norights"))
    admin = sa.create_engine(url.set(drivername="postgresql+psycopg"))
    with admin.begin() as connection:
        connection.execute(sa.text("CREATE ROLE reader LOGIN PASSWORD 'reader'"))
    admin.dispose()
    reader = url.set(username="reader", password="reader").render_as_string(hide_password=False)
    with pytest.raises(StorageError, match="grant them CREATE"):
        open_database(reader)


def test_a_database_of_another_program_is_left_alone(url: str) -> None:
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE customers (name TEXT)"))
    with pytest.raises(StorageError, match=r"belongs to another program .it has the tables customers"):
        open_database(url)
    assert sa.inspect(engine).get_table_names() == ["customers"]
    engine.dispose()


def test_a_database_of_another_version_is_refused(url: str) -> None:
    with open_database(url) as database:
        with database.engine.begin() as connection:
            connection.execute(sa.text("UPDATE hpo_schema SET version = 99"))
        with pytest.raises(StorageError, match="another version of hpo"):
            open_database(url)
        with database.engine.begin() as connection:
            connection.execute(sa.text("UPDATE hpo_schema SET version = 1"))
            connection.execute(sa.text("UPDATE alembic_version SET version_num = 'v0.9.0.a'"))
        with pytest.raises(StorageError, match="another version of Optuna"):
            open_database(url)


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("shopping list\n" * 100)
    with pytest.raises(StorageError, match="not a SQLite database"):
        open_database(f"sqlite:///{file}")
    assert file.read_text().startswith("shopping list")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot create the folder .*/file/below"):
        open_database(f"sqlite:///{tmp_path}/file/below/hpo.db")


def test_the_lock_keeps_others_out_until_it_is_released(url: str) -> None:
    inside: list[str] = []

    def enter() -> None:
        with second.lock("study x"):
            inside.append("second")

    with open_database(url) as first, open_database(url) as second:
        with first.lock("study x"):
            thread = threading.Thread(target=enter)
            thread.start()
            time.sleep(0.3)
            inside.append("first")
        thread.join(timeout=10)
        assert inside == ["first", "second"]
        with first.lock("study x"), second.lock("study y"):  # another name is another lock
            pass


def test_the_clock_of_the_database_is_in_seconds(url: str) -> None:
    with open_database(url) as database, database.engine.connect() as connection:
        assert connection.scalar(sa.select(database.seconds())) == pytest.approx(time.time(), abs=2.0)


def test_an_operation_waits_for_a_server_that_comes_back(postgres: Postgres) -> None:
    with open_database(postgres.create_database("outage")) as database:
        open_study(database, "s", direction="maximize", fingerprint="f", settings={})
        postgres.stop(immediate=True)
        timer = threading.Timer(3.0, postgres.start)
        timer.start()
        started = time.monotonic()
        found = find_study(database, "s")
        timer.join()
        assert found is not None
        assert time.monotonic() - started > 1.0


def test_an_operation_gives_up_on_a_server_that_stays_away(postgres: Postgres) -> None:
    with open_database(postgres.create_database("gone")) as database:
        postgres.stop(immediate=True)
        try:
            with pytest.raises(StorageError, match=r"still away after 1 s\. no server answers there"):
                retry_while_down(database, lambda: database.optuna_storage.get_all_studies(), patience=1.0)
        finally:
            postgres.start()


def test_a_full_disk_is_not_waited_for(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        with database.engine.begin() as connection:
            pages = connection.scalar(sa.text("PRAGMA page_count"))

        def fill() -> None:
            with database.engine.begin() as connection:
                connection.execute(sa.text(f"PRAGMA max_page_count = {pages}"))  # what a full disk is to SQLite
                connection.execute(sa.text("CREATE TABLE big AS SELECT zeroblob(10000000) AS b"))

        started = time.monotonic()
        with pytest.raises(StorageError, match="the disk is full: free some space"):
            retry_while_down(database, fill)
        assert time.monotonic() - started < 5


def test_a_damaged_file_is_reported_as_such(tmp_path: Path) -> None:
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
