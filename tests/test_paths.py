from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hpo.errors import SettingError
from hpo.paths import RunsDir, atomic_file, is_new_database, write_atomically


def test_everything_is_below_the_root(tmp_path: Path) -> None:
    runs = RunsDir(tmp_path)
    paths = [
        runs.artifacts,
        runs.reports,
        runs.checkpoints("s-1"),
        runs.trial("s-1", 3),
        runs.report("s"),
        runs.export("s", 3),
    ]
    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(tmp_path) for path in paths)
    assert runs.trial("s-1", 3).is_relative_to(runs.checkpoints("s-1"))
    assert runs.report("s").is_relative_to(runs.reports)


def test_the_default_storage_is_below_the_default_root() -> None:
    assert RunsDir().default_storage == "sqlite:///runs/hpo.db"


@pytest.mark.parametrize(
    ("study", "folder"),
    [
        ("grid", "grid"),
        ("grid@2", "grid@2"),
        ("a+b-c.d_e", "a+b-c.d_e"),
        ("größe", "größe"),
        ("x" * 100, "x" * 100),
        # With a part of the SHA-256 of the name:
        ("../../etc", "_.._etc~74ccf3c5"),
        ("a/b\\c d", "a_b_c_d~d43012b6"),
        ("..", "_~5ec1f7e7"),
        ("", "_~e3b0c442"),
        ("x" * 300, "x" * 100 + "~0d4e2ca9"),
        ("\N{HIRAGANA LETTER A}" * 100, "\N{HIRAGANA LETTER A}" * 66 + "~74584a8c"),
        ("ä b", "ä_b~83ec61e9"),
        (".hidden", "hidden~16924190"),
        ("a\udcff", "a_~d76edf05"),
    ],
)
def test_a_study_of_any_name_has_a_report_folder(study: str, folder: str) -> None:
    assert RunsDir(Path("runs")).report(study) == Path("runs/reports") / folder


def test_no_two_studies_share_a_report_folder() -> None:
    names = [
        "a_b",
        "a b",
        "a,b",
        "a/b",
        "a~b",
        "hidden",
        ".hidden",
        "..hidden",
        "_",
        "",
        ".",
        "..",
        "x" * 100,
        "x" * 101,
    ]
    folders = {RunsDir().report(name) for name in names}
    assert len(folders) == len(names)
    assert folders.isdisjoint({RunsDir().report(folder.name) for folder in folders if "~" in folder.name})


@pytest.mark.parametrize("name", ["../../other", "/etc", "..", ".", "", "a/../../b", "a\0b"])
def test_no_name_from_a_database_leaves_its_folder(name: str) -> None:
    runs = RunsDir(Path("runs"))
    assert runs.checkpoints(name).parent == Path("runs/checkpoints")
    assert runs.checkpoints(name).name not in {"", ".", ".."}
    assert runs.export(name, 3).parent == Path("runs/exports")


def test_the_name_of_a_search_space_is_the_name_of_its_folders() -> None:
    name = "größe @ lr=0.1\\x"
    assert RunsDir().checkpoints(f"{name}-0123456789ab") == Path("runs/checkpoints", f"{name}-0123456789ab")
    assert RunsDir().export(name, 3) == Path("runs/exports", f"{name}-3")


def test_a_trial_number_that_is_no_number_is_no_path() -> None:
    number: Any = "../../other"  # SQLite stores a text in a column of integers
    with pytest.raises(ValueError, match="invalid literal"):
        RunsDir().trial("s-1", number)


def test_a_new_folder_is_private_and_an_existing_one_stays_as_it_is(tmp_path: Path) -> None:
    assert RunsDir(tmp_path / "runs").make().root.stat().st_mode & 0o777 == 0o700
    (tmp_path / "runs").chmod(0o775)
    assert RunsDir(tmp_path / "runs").make().root.stat().st_mode & 0o777 == 0o775


def test_make_creates_the_folder_and_leaves_nothing_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = RunsDir(Path("new/runs")).make()
    assert runs.root == tmp_path.resolve() / "new/runs"
    assert list(runs.root.iterdir()) == []
    assert runs.make() == runs


def test_make_names_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(SettingError, match=f"cannot write to {tmp_path}/runs: "):
        RunsDir(tmp_path / "runs").make()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_atomically(path, b"first")

    def run_out_of_space() -> None:
        with atomic_file(path) as file:
            file.write(b"sec")
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        run_out_of_space()
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("sync", [False, True])
def test_a_synced_file_and_its_name_are_flushed_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, sync: bool
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append((tmp_path / "file").exists()))
    with atomic_file(tmp_path / "file", sync=sync) as file:
        file.write(b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert synced == ([False, True] if sync else []), "the content, and then the name"


@pytest.mark.parametrize(
    ("url", "is_new"),
    [
        ("sqlite:///{folder}/new.db", True),
        ("sqlite+pysqlite:///{folder}/new.db?timeout=5", True),
        ("sqlite:///{folder}/old.db", False),
        ("sqlite:///{folder}/old.db?timeout=5", False),
        ("postgresql://host/new.db", False),
    ],
)
def test_a_sqlite_file_that_does_not_exist_is_a_new_database(tmp_path: Path, url: str, *, is_new: bool) -> None:
    (tmp_path / "old.db").touch()
    assert is_new_database(url.format(folder=tmp_path)) == is_new


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing/page.html", b"")
