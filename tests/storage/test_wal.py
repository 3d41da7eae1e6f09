"""A WAL is used with the file that it belongs to, and not with a copy that replaced the file."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from storage import sqlite_file, wal

TICK_SECONDS = 0.02  # the times of files are that coarse


class Writer:
    """Writes to `live/hpo.db` as hpo does: each transaction has the next number. Checkpoints happen when a test asks."""

    def __init__(self, folder: Path) -> None:
        (folder / "live").mkdir()
        self.file = folder / "live/hpo.db"
        self._folder = folder
        self._connection = sqlite3.connect(self.file, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA wal_autocheckpoint=0")
        for table in ("rows", "counts"):
            self._connection.execute(f"CREATE TABLE {table} (value TEXT)")
        self._connection.execute("INSERT INTO counts VALUES ('0')")
        self.write(400)
        self.checkpoint()

    def write(self, rows: int = 10) -> None:
        execute = self._connection.execute
        execute("BEGIN IMMEDIATE")
        for _ in range(rows):
            execute("INSERT INTO rows VALUES (hex(randomblob(50)))")
        execute("UPDATE counts SET value = value + 1")
        (number,) = execute("PRAGMA user_version").fetchone()
        execute(f"PRAGMA user_version = {number + 1}")
        execute("COMMIT")

    def checkpoint(self) -> None:
        """Move the WAL into the file; the next transaction begins a new one."""
        self._connection.execute("PRAGMA wal_checkpoint(RESTART)")

    def checkpoint_next_to_a_reader(self) -> None:
        """Move what the reader does not need any more."""
        self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def back_up(self) -> Path:
        """Copy the database as the command `.backup` does."""
        copy = self._folder / "copy.db"
        copy.unlink(missing_ok=True)
        with closing(sqlite3.connect(copy)) as target:
            self._connection.backup(target)
        return copy

    def copy_file(self) -> Path:
        """Copy the file alone, as a user does while nobody has it open."""
        return Path(shutil.copy(self.file, self._folder / "copied.db"))

    def read(self) -> sqlite3.Connection:
        """Begin to read: what is written later stays in the WAL until the connection is closed."""
        reader = sqlite3.connect(self.file)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM counts").fetchone()
        return reader

    def kill(self, file: Path | None = None) -> Path:
        """Return a database as a killed process leaves it, whose file changed last.

        Args:
            file: what replaces its file.
        """
        killed = self._folder / "killed.db"
        shutil.copy(f"{self.file}-wal", f"{killed}-wal")
        time.sleep(TICK_SECONDS)
        shutil.copy(file or self.file, killed)
        return killed

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    opened = Writer(tmp_path)
    yield opened
    opened.close()


def test_a_wal_belongs_to_its_file_after_each_page_that_a_checkpoint_has_copied(writer: Writer, tmp_path: Path) -> None:
    before = writer.copy_file().read_bytes()
    for _ in range(5):
        writer.write()
    killed = writer.kill()
    writer.checkpoint()
    after = writer.file.read_bytes()
    assert len(after) > len(before) > 10 * 4096
    for end in range(4096, len(after) + 4096, 4096):
        killed.write_bytes(after[:end] + before[end:])
        assert not sqlite_file.has_wal_of_another_file(killed)


def test_a_wal_belongs_to_its_file_when_a_reader_kept_a_checkpoint_from_the_first_page(writer: Writer) -> None:
    writer.write(50)
    with closing(writer.read()):
        writer.write(1)
        before = writer.file.read_bytes()
        writer.checkpoint_next_to_a_reader()
        assert writer.file.read_bytes()[:4096] == before[:4096]
        assert writer.file.read_bytes() != before
        assert not sqlite_file.has_wal_of_another_file(writer.kill())


def test_a_wal_belongs_to_its_file_when_it_begins_with_the_creation_of_the_tables(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "new.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        for table in ("rows", "counts"):
            connection.execute(f"CREATE TABLE {table} (value TEXT)")
        with closing(sqlite3.connect(tmp_path / "new.db")) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM rows").fetchone()
            connection.execute("PRAGMA user_version = 1")
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
            for suffix in ("-wal", ""):
                shutil.copy(f"{tmp_path}/new.db{suffix}", f"{tmp_path}/killed.db{suffix}")
                time.sleep(TICK_SECONDS)
    assert not sqlite_file.has_wal_of_another_file(tmp_path / "killed.db")


def test_a_wal_belongs_to_its_file_when_another_program_wrote_first(writer: Writer) -> None:
    """One that does not count its transactions, such as optuna-dashboard."""
    with closing(sqlite3.connect(writer.file, isolation_level=None)) as other:
        other.execute("INSERT INTO rows VALUES (zeroblob(20000))")
        with closing(writer.read()):
            writer.write()
            writer.checkpoint_next_to_a_reader()
            assert not sqlite_file.has_wal_of_another_file(writer.kill())


def test_a_wal_without_a_whole_transaction_is_not_used_by_sqlite(writer: Writer, tmp_path: Path) -> None:
    writer.write()
    killed = writer.kill(writer.back_up())
    content = Path(f"{killed}-wal").read_bytes()
    for length in (1, 32, 32 + 24 + 4096):
        Path(f"{killed}-wal").write_bytes(content[:length])
        time.sleep(TICK_SECONDS)
        shutil.copy(tmp_path / "copy.db", killed)
        assert not sqlite_file.has_wal_of_another_file(killed)


def older(writer: Writer, copy: Callable[[], Path]) -> Path:
    copied = copy()
    for _ in range(3):
        writer.write()
        writer.checkpoint()
    writer.write()
    return copied


def from_before_the_wal(writer: Writer, copy: Callable[[], Path]) -> Path:
    copied = copy()
    writer.write()
    writer.write()
    return copied


def from_within_the_wal(writer: Writer, copy: Callable[[], Path]) -> Path:
    writer.write()
    writer.write(1)
    copied = copy()
    writer.write(1)
    return copied


def from_after_the_wal(writer: Writer, copy: Callable[[], Path]) -> Path:
    writer.write()
    return copy()


@pytest.mark.parametrize(
    "make", [older, from_before_the_wal, from_within_the_wal, from_after_the_wal], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("kind", ["back_up", "copy_file"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "the WAL was copied to the file before"])
def test_a_wal_does_not_belong_to_a_copy(
    writer: Writer, make: Callable[[Writer, Callable[[], Path]], Path], kind: str, checkpoint: bool
) -> None:
    copied = make(writer, getattr(writer, kind))
    if checkpoint:
        writer.checkpoint()
    killed = writer.kill(copied)
    before = killed.read_bytes(), Path(f"{killed}-wal").read_bytes()
    assert sqlite_file.has_wal_of_another_file(killed)
    assert (killed.read_bytes(), Path(f"{killed}-wal").read_bytes()) == before


def test_a_wal_does_not_belong_to_an_empty_file_or_one_with_other_pages(writer: Writer, tmp_path: Path) -> None:
    writer.write()
    (tmp_path / "empty.db").touch()
    with closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("PRAGMA page_size=1024")
        other.execute("CREATE TABLE rows (value TEXT)")
    for name in ("empty.db", "other.db"):
        assert sqlite_file.has_wal_of_another_file(writer.kill(tmp_path / name))


def test_a_link_to_a_file_has_the_wal_of_the_file(writer: Writer, tmp_path: Path) -> None:
    copied = writer.back_up()
    writer.write()
    link = tmp_path / "link.db"
    link.symlink_to(writer.kill(copied))
    assert sqlite_file.has_wal_of_another_file(link)


HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("SELECT * FROM rows").fetchone()
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_wal_belongs_to_the_file_of_a_program_that_has_it_open(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint may change the file at any time, so its content says nothing."""
    writer.write()
    killed = writer.kill()
    monkeypatch.setattr(wal, "belongs", lambda *_: False)
    assert sqlite_file.has_wal_of_another_file(killed)
    command = [sys.executable, "-c", HOLD, str(killed)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        assert not sqlite_file.has_wal_of_another_file(killed)
        process.kill()
    time.sleep(TICK_SECONDS)
    os.utime(killed)  # if root opens a file, SQLite changes the owner of its WAL, and so its time
    assert sqlite_file.has_wal_of_another_file(killed)
    with closing(sqlite3.connect(killed)) as connection:
        connection.execute("SELECT * FROM rows").fetchone()
        os.utime(killed)
        assert not sqlite_file.has_wal_of_another_file(killed)


def test_a_file_that_others_change_while_it_is_compared_is_compared_again(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.write()
    killed = writer.kill()
    answers = [False, True]

    def belongs(path: Path) -> bool:
        time.sleep(TICK_SECONDS)
        os.utime(path)
        return answers.pop(0)

    monkeypatch.setattr(wal, "belongs", belongs)
    assert not sqlite_file.has_wal_of_another_file(killed)
    assert answers == []
