"""Files are read without a change, and what others write meanwhile is no damage."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from storage import sqlite_file
from storage.database import open_database, open_for_reading
from storage.errors import StorageError, retry_while_down
from storage.studies import find_study
from storage.summaries import summarize
from tests.storage.builders import GRID, POINTS, claim_one, grid_run, open_s


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file in WAL mode that nobody has open."""
    path = tmp_path / "hpo.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE rows (value TEXT)")
        connection.execute("INSERT INTO rows VALUES ('first')")
        connection.commit()
    return path


def write(file: Path, value: str = "second") -> None:
    """Write as another program that opens the file, and closes it."""
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("INSERT INTO rows VALUES (?)", (value,))


def read(connection: sqlite3.Connection) -> list[str]:
    return [value for (value,) in connection.execute("SELECT value FROM rows")]


def test_a_file_that_nobody_has_open_is_read_without_files_next_to_it(file: Path) -> None:
    with closing(sqlite_file.connect(file, 1.0)) as connection:
        assert read(connection) == ["first"]
        assert list(file.parent.iterdir()) == [file]
    assert list(file.parent.iterdir()) == [file]


def test_rows_are_fetched_as_with_any_connection(file: Path) -> None:
    for value in "bcde":
        write(file, value)
    with closing(sqlite_file.connect(file, 1.0)) as connection:
        cursor = connection.execute("SELECT value FROM rows")
        assert cursor.fetchone() == ("first",)
        assert cursor.fetchmany(2) == [("b",), ("c",)]
        assert next(cursor) == ("d",)
        assert cursor.fetchall() == [("e",)]
        assert cursor.fetchone() is None


def test_a_file_that_another_program_changes_is_not_read_further(file: Path) -> None:
    with closing(sqlite_file.connect(file, 1.0)) as connection:
        assert sqlite_file.can_go_on(connection)
        write(file)
        with pytest.raises(sqlite3.OperationalError, match="changed the file while it was read") as raised:
            read(connection)
        assert sqlite_file.is_change(raised.value)
        assert not sqlite_file.can_go_on(connection)
    with closing(sqlite_file.connect(file, 1.0)) as connection:
        assert read(connection) == ["first", "second"]


def test_a_change_in_the_middle_of_an_answer_is_noticed(file: Path) -> None:
    with closing(sqlite_file.connect(file, 1.0)) as connection:
        connection.create_function("write", 0, lambda: write(file))
        with pytest.raises(sqlite3.OperationalError, match="changed the file while it was read"):
            connection.execute("SELECT value, write() FROM rows")


def test_a_change_is_not_called_damage_and_damage_is(file: Path) -> None:
    with closing(sqlite_file.connect(file, 1.0)) as connection:
        content = file.read_bytes()
        file.write_bytes(content[:4096] + b"\xff" * 4096)
        with pytest.raises(sqlite3.OperationalError, match="changed the file while it was read"):
            read(connection)
    with closing(sqlite_file.connect(file, 1.0)) as connection, pytest.raises(sqlite3.DatabaseError, match="malformed"):
        read(connection)


def test_a_transaction_begins_on_a_new_connection_once_there_is_a_wal(file: Path) -> None:
    with closing(sqlite_file.connect(file, 1.0)) as alone, closing(sqlite3.connect(file)) as writer:
        writer.execute("INSERT INTO rows VALUES ('second')")
        writer.commit()
        assert read(alone) == ["first"]  # the file itself has not changed
        assert not sqlite_file.can_go_on(alone)
        with closing(sqlite_file.connect(file, 1.0)) as connection:
            assert read(connection) == ["first", "second"]
            writer.execute("INSERT INTO rows VALUES ('third')")
            writer.commit()
            assert sqlite_file.can_go_on(connection)
            assert read(connection) == ["first", "second", "third"]


CLOSE = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM rows').fetchall(); c.close()"


@pytest.mark.slow
def test_reading_does_not_end_the_locks_of_other_connections_of_the_process(file: Path) -> None:
    """Otherwise, another program takes itself for the last one, and deletes the WAL that this process writes to."""
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("INSERT INTO rows VALUES ('second')")
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the WAL is empty, as if nobody had the file open
        with closing(sqlite_file.connect(file, 1.0)) as reader:
            assert read(reader) == ["first", "second"]
        subprocess.run([sys.executable, "-c", CLOSE, str(file)], check=True)
        assert Path(f"{file}-wal").exists()


def test_a_database_that_is_open_for_reading_shows_what_runs_write_later(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/hpo.db"
    with open_database(url) as database:
        open_s(database)
    reading = open_for_reading(url)
    assert reading is not None
    with reading:
        study = find_study(reading, "s")
        assert study is not None
        assert summarize(reading)[0].counts == {}
        for expected in (1, 2, 3):
            with open_database(url) as database, grid_run(open_s(database)) as run:
                run.enqueue([POINTS[expected]], GRID)
                claim = claim_one(run)
                run.report(claim, 1, {"m": 1.0}, 1.0)
                run.complete(claim, 1.0)
                run.flush()
                assert study.counts() == {"COMPLETE": expected}  # from the WAL
            assert study.counts() == {"COMPLETE": expected}
            assert len(study.trials()) == expected


def test_a_reading_operation_is_repeated_if_the_file_changes_meanwhile(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/hpo.db"
    with open_database(url) as database:
        open_s(database)
    reading = open_for_reading(url)
    assert reading is not None
    attempts = 0

    def count_studies() -> int:
        nonlocal attempts
        attempts += 1
        with reading.engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
            if attempts == 1:
                with open_database(url) as database:
                    open_s(database, "another")
            return int(connection.scalar(sa.text("SELECT count(*) FROM studies")) or 0)

    with reading:
        assert retry_while_down(reading, count_studies) == 2
        assert attempts == 2


def test_a_damaged_file_is_reported_by_those_who_only_read_it(tmp_path: Path) -> None:
    file = tmp_path / "hpo.db"
    with open_database(f"sqlite:///{file}") as database:
        open_s(database)
    content = file.read_bytes()
    file.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    with pytest.raises(StorageError, match="the file is damaged"):
        open_for_reading(f"sqlite:///{file}")
