"""PostgreSQL as others may have set it up: settings of databases and roles, encodings, rights, connections that end."""

from __future__ import annotations

import contextlib
import threading
import zlib

import psycopg
import pytest
import sqlalchemy as sa

from benchmarks.postgres import USER, Postgres
from storage.database import Database, open_database
from storage.errors import StorageError
from storage.summaries import summarize
from tests.factories import trial_states, wait_until
from tests.storage.builders import GRID, POINTS, claim_one, claim_point, grid_run, open_s, sampled_run

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

# Settings of a database that would break promises of storage.
HOSTILE = {
    "default_transaction_isolation": "repeatable read",
    "statement_timeout": "2s",
    "lock_timeout": "2s",
    "transaction_timeout": "2s",
    "extra_float_digits": "0",
}
THIRD = 1 / 3


def execute(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


@pytest.fixture(scope="module")
def hostile(postgres: Postgres) -> str:
    """The URL of a database with these settings."""
    url = postgres.create_database("hostile")
    execute(url, *(f"ALTER DATABASE hostile SET {name} = '{value}'" for name, value in HOSTILE.items()))
    return url


def test_settings_of_the_database_do_not_count(hostile: str) -> None:
    with open_database(hostile) as database:
        with database.transaction() as connection:
            shown = {name: connection.scalar(sa.text(f"SHOW {name}")) for name in (*HOSTILE, "transaction_isolation")}
        with database.optuna_storage.engine.connect() as connection:
            level = connection.scalar(sa.text("SHOW transaction_isolation"))
    assert (shown.pop("transaction_isolation"), level) == ("read committed", "read committed")
    assert shown.pop("default_transaction_isolation") == "repeatable read", "each transaction names its own"
    assert shown.pop("extra_float_digits") == "1"
    assert set(shown.values()) == {"0"}


def test_a_claim_waits_for_the_lock_of_another_run_for_longer_than_the_server_likes(hostile: str) -> None:
    with open_database(hostile) as database:
        study = open_s(database)
        blocker = psycopg.connect(hostile)
        blocker.execute("SET statement_timeout = 0; SET transaction_timeout = 0")
        blocker.execute("SELECT * FROM studies FOR NO KEY UPDATE")
        threading.Timer(3.5, blocker.close).start()
        with grid_run(study) as run:
            claim = claim_point(run)
            run.report(claim, 1, {"m": THIRD}, THIRD)
            run.release(claim)
            resumed = claim_one(run)
            assert resumed.values == {1: THIRD}, "no digit is lost"
            run.report(resumed, 2, {"m": 1.0}, 1.0)
            run.complete(resumed, 1.0)
        assert trial_states(study) == ["COMPLETE"]


def test_a_budget_holds_for_runs_that_draw_at_the_same_time(postgres: Postgres) -> None:
    url = postgres.create_database("repeatable")
    execute(url, "ALTER DATABASE repeatable SET default_transaction_isolation = 'repeatable read'")
    rounds, barrier = 6, threading.Barrier(3)
    errors: list[BaseException] = []

    def search(database: Database) -> None:
        try:
            for _ in range(rounds):
                barrier.wait(60)
                with sampled_run(open_s(database), max_trials=1) as run:
                    barrier.wait(60)
                    claim = run.claim()
                    barrier.wait(60)
                    if claim is not None:
                        assert trial_states(run.study) == ["RUNNING"]
                        # As another program does, which does not fail when a run renews its lease meanwhile.
                        execute(url, "SET default_transaction_isolation = 'read committed'", "DELETE FROM studies")
        except BaseException as error:  # noqa: BLE001 # raised in the main thread
            errors.append(error)
            barrier.abort()

    databases = [open_database(url) for _ in range(3)]
    threads = [threading.Thread(target=search, args=(database,)) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for database in databases:
        database.close()
    assert errors == []


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_the_encoding_of_the_database_does_not_count(postgres: Postgres, encoding: str) -> None:
    options = f"ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    with open_database(postgres.create_database(f"encoded_{encoding}", options)) as database:
        study = open_s(database)
        with grid_run(study) as run:
            claim = claim_point(run)
            run.record(claim, {"note": "größe"})
            run.report(claim, 1, {"m": 1.0, "größe": 2.0}, 1.0)
            run.complete(claim, 1.0)
        assert study.trials()[0].user_attrs["note"] == "größe"
        assert [(each.name, each.counts) for each in summarize(database)] == [("s", {"COMPLETE": 1})]
        if encoding == "LATIN1":
            with grid_run(study) as run:
                run.enqueue(POINTS[1:2], GRID)
                claim = claim_one(run)
                run.report(claim, 1, {"m": 1.0, "日本": 2.0}, 1.0)
                with pytest.raises(StorageError, match="create the database with ENCODING 'UTF8'"):
                    run.flush()


def test_a_connection_that_ends_while_a_process_waits_to_open_is_one_message(postgres: Postgres) -> None:
    url = postgres.create_database("waiting")
    open_database(url).close()
    waiting = "FROM pg_stat_activity WHERE datname = 'waiting' AND application_name = 'hpo' AND wait_event = 'advisory'"
    with psycopg.connect(url, autocommit=True) as blocker:
        blocker.execute("SELECT pg_advisory_lock(%s)", (zlib.crc32(b"hpo/schema"),))

        def end_it() -> None:
            with psycopg.connect(url, autocommit=True) as other:
                wait_until(lambda: other.execute(f"SELECT 1 {waiting}").fetchone() is not None)
                other.execute(f"SELECT pg_terminate_backend(pid) {waiting}")

        thread = threading.Thread(target=end_it)
        thread.start()
        with pytest.raises(StorageError, match="terminating connection"):
            open_database(url)
        thread.join()


@pytest.fixture(scope="module")
def restricted(postgres: Postgres) -> str:
    """The URL of a database with our tables, for a role that may do nothing with them."""
    url = sa.make_url(postgres.create_database("restricted"))
    open_database(url.render_as_string(hide_password=False)).close()
    execute(url.render_as_string(hide_password=False), "CREATE ROLE restricted LOGIN PASSWORD 'restricted'")
    return url.set(username="restricted", password="restricted").render_as_string(hide_password=False)


def test_a_role_without_rights_on_tables_is_told_which_to_grant(restricted: str, postgres: Postgres) -> None:
    message = "grant it SELECT, INSERT, UPDATE and DELETE on all tables of the schema, and USAGE on its sequences"
    with pytest.raises(StorageError, match=message):
        open_database(restricted)
    admin = postgres.url("restricted")
    execute(
        admin,
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO restricted",
        "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO restricted",
    )
    with open_database(restricted) as database, grid_run(open_s(database)) as run:
        run.complete(claim_point(run), 0.5)


def test_a_role_that_may_create_no_tables_is_told_so(restricted: str, postgres: Postgres) -> None:
    postgres.create_database("norights")
    url = sa.make_url(restricted).set(database="norights").render_as_string(hide_password=False)
    with pytest.raises(StorageError, match=r"lacks rights .*grant it USAGE and CREATE on the schema"):
        open_database(url)


def test_a_server_that_only_reads_is_said(postgres: Postgres) -> None:
    url = postgres.create_database("standby")
    open_database(url).close()
    execute(url, "ALTER DATABASE standby SET default_transaction_read_only = on")
    with open_database(url) as database, pytest.raises(StorageError, match=r"the server only reads .*name the primary"):
        open_s(database)


def connections_of(url: str, name: str) -> int:
    with psycopg.connect(url, autocommit=True) as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
        ((count,),) = connection.execute(query, (name,)).fetchall()
    return int(count)


def test_a_driver_holds_one_connection(postgres: Postgres) -> None:
    """64 drivers share a server with the default of 100 connections."""
    url = postgres.create_database("connections")
    with open_database(f"{url}?application_name=one") as database, grid_run(open_s(database)) as run:
        run.enqueue(POINTS, GRID)
        for _ in POINTS:
            claim = claim_one(run)
            run.report(claim, 1, {"m": 0.5}, 0.5)
            run.complete(claim, 0.5)
            run.flush()
            run._lease.renew()
        wait_until(lambda: connections_of(url, "one") == 1)  # the server's process of one that was closed ends soon
        run.study.trials()
        assert connections_of(url, "one") <= 2, "this is read through Optuna, which keeps its own"


def test_a_server_without_connections_names_the_remedy(postgres: Postgres) -> None:
    url = postgres.create_database("full")
    execute(
        url,
        "CREATE ROLE limited LOGIN PASSWORD 'limited' CONNECTION LIMIT 0",
        "GRANT ALL ON SCHEMA public TO limited",
    )
    with pytest.raises(StorageError, match='too many connections for role "limited": raise this limit'):
        open_database(url.replace(f"{USER}:{postgres.password}", "limited:limited"))
    # All that a server has, but those that it reserves for its administrators.
    with psycopg.connect(url) as connection:
        ((most,),) = connection.execute("SHOW max_connections").fetchall()
    held: list[psycopg.Connection] = []
    try:
        with contextlib.suppress(psycopg.OperationalError):
            held += (psycopg.connect(url) for _ in range(int(most)))
        with pytest.raises(StorageError, match="no connection left: raise its max_connections, or start fewer drivers"):
            open_database(url)
    finally:
        for each in held:
            each.close()
