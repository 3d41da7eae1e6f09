"""`hpo compare`, `copy`, `rename` and `delete`, as a user types them, and the same functions of the Python API."""

from __future__ import annotations

import json
import shutil
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import pytest

from hpo.api import DeletedStudy, copy_study, delete_study, list_studies, rename_study
from hpo.errors import SettingError
from hpo.paths import RunsDir
from storage import management
from storage.database import open_database
from storage.errors import StorageError
from storage.studies import find_study, open_study
from storage.study import study_names
from storage.tables import runs as runs_table
from tests.factories import HpoHere, search_without_ray, toy_space
from tests.report.studies import optuna_study
from tests.storage.builders import script_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """A folder with the finished study `toy`, and `wide` with two revisions."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "runs").mkdir(mode=0o700)
    shutil.copy(empty_database, folder / "runs")
    with open_database(f"sqlite:///{folder}/runs/hpo.db") as database:
        search_without_ray(toy_space(folder), database, folder / "runs")
        for x in ([5], [6]):
            search_without_ray(toy_space(folder, "wide", parameters={"x": x}), database, folder / "runs")
    return folder


@pytest.fixture
def here(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, the working folder."""
    folder = tmp_path / "here"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    return folder


def names(url: str = "sqlite:///runs/hpo.db") -> list[str]:
    with open_database(url) as database:
        return study_names(database)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "hpo.db" not in path.name}


# --- compare ----------------------------------------------------------------------------------------------------------


def test_compare_prints_a_table_and_writes_a_page(here: Path, hpo_here: HpoHere) -> None:
    done = hpo_here(here, "compare", "toy", "wide@1", "wide")
    assert done.returncode == 0, done.stderr
    first_words = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    assert first_words[2:5] == ["toy", "wide@1", "wide@2"]
    assert "Page: runs/comparisons/toy+wide@1+wide@2/index.html\n" in done.stdout
    assert (here / "runs/comparisons/toy+wide@1+wide@2/index.html").is_file()


def test_compare_reads_other_databases_and_prints_json(here: Path, hpo_here: HpoHere) -> None:
    copy_study("toy", "old", to="sqlite:///other.db")
    before = everything(here)
    done = hpo_here(here, "compare", "toy", "--other", "old", "sqlite:///other.db", "--json")
    found = json.loads(done.stdout)
    assert [(each["name"], each["storage"]) for each in found["studies"]] == [
        ("toy", "sqlite:///runs/hpo.db"),
        ("old", "sqlite:///other.db"),
    ]
    toy, old = (
        {key: value for key, value in each.items() if key not in {"name", "storage"}} for each in found["studies"]
    )
    assert toy == old, "the copy has the same progress"
    assert found["differences"] == []
    assert everything(here) == before, "no page is written"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least two studies"),
        (["toy"], "name at least two studies"),
        (["toy", "toy"], "toy: this is one study, named twice. Name each study once"),
        (["wide", "wide@2"], "wide and wide@2: this is one study, named twice"),
        (["toy", "--other", "toy", "sqlite:///./runs/hpo.db"], "toy: this is one study, named twice"),
        (["toy", "tyo"], "there is no study 'tyo' in sqlite:///runs/hpo.db: did you mean toy?"),
        (["toy", "frobnicate"], "there is no study 'frobnicate' in sqlite:///runs/hpo.db: allowed: toy, wide, wide@2"),
        (
            ["toy", "--other", "x", "sqlite:///no.db"],
            "there is no database sqlite:///no.db: correct the URL after --other x",
        ),
        (["toy", "--other", "x", "postgresql://me:secret@host/db"], "every user of this machine can read a password"),
    ],
)
def test_compare_refuses_with_one_message(here: Path, hpo_here: HpoHere, arguments: list[str], message: str) -> None:
    before = everything(here)
    done = hpo_here(here, "compare", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"hpo: {message}")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr
    assert everything(here) == before


def old_database(path: Path) -> tuple[str, str]:
    """Create a database of version 5; return its only study and its URL."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script_of(5))
        ((name,),) = connection.execute("SELECT study_name FROM studies")
    return name, f"sqlite:///{path}"


def test_a_study_that_was_renamed_is_named(here: Path, hpo_here: HpoHere) -> None:
    for study, new_name in (("wide", "second"), ("wide", "first")):
        rename_study(study, new_name)
    for name, renamed in (("wide", "first or second"), ("wide@1", "first"), ("wide@2", "second")):
        done = hpo_here(here, "report", name)
        assert done.stderr == f"hpo: there is no study '{name}' in sqlite:///runs/hpo.db: it was renamed to {renamed}\n"


@pytest.mark.parametrize("verb", ["compare", "copy"])
def test_a_database_of_an_older_version_that_is_only_read_is_not_migrated(
    here: Path, hpo_here: HpoHere, verb: str
) -> None:
    name, url = old_database(here / "old.db")
    before, known = (here / "old.db").read_bytes(), sorted(here.iterdir())
    arguments = {
        "compare": ["toy", "--other", name, url],
        "copy": [name, "new", "--storage", url, "--to", "sqlite:///runs/hpo.db"],
    }
    done = hpo_here(here, verb, *arguments[verb])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"hpo: {url} has tables of version 5, not 6, and is only read here. `hpo migrate")
    assert ((here / "old.db").read_bytes(), sorted(here.iterdir())) == (before, known)


def test_the_database_of_a_copy_is_migrated_and_that_is_said(
    here: Path, hpo_here: HpoHere, caplog: pytest.LogCaptureFixture
) -> None:
    name, url = old_database(here / "old.db")
    done = hpo_here(here, "copy", "toy", "new", "--to", url)
    assert done.returncode == 0, done.stderr
    assert f"{url}: tables migrated from version 5 to 6; the old file is kept as" in caplog.text
    assert names(url) == [name, "new"]


# --- copy -------------------------------------------------------------------------------------------------------------


def test_copy_says_how_to_continue(here: Path, hpo_here: HpoHere) -> None:
    done = hpo_here(here, "copy", "toy", "new")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("toy is copied to new in sqlite:///runs/hpo.db\nIt has trials: 2 COMPLETE; ")
    assert "search_spaces/new.yaml" in done.stdout
    assert names() == ["toy", "wide", "wide@2", "new"]
    (new,) = (each for each in list_studies() if each.name == "new")
    assert new.state == "finished"
    assert new.disk_bytes > 0


def test_the_latest_revision_is_copied_unless_another_is_named(here: Path) -> None:
    for name, reference in (("wide", "wide@2"), ("wide@1", "wide@1")):
        copied = copy_study(name, f"of-{reference[-1]}", to="sqlite:///other.db")
        assert copied.source == reference
    with open_database("sqlite:///other.db") as database:
        assert [find_study(database, name).trials()[-1].params for name in ("of-1", "of-2")] == [{"x": 5}, {"x": 6}]  # type: ignore[union-attr]


def test_another_url_of_the_same_database_is_that_database(here: Path) -> None:
    assert copy_study("toy", "new", to=f"sqlite:///{here}/runs/hpo.db").counts == {"COMPLETE": 2}
    assert names() == ["toy", "wide", "wide@2", "new"]


def test_a_copy_is_private(here: Path, hpo_here: HpoHere) -> None:
    for path in (here / "runs/checkpoints").glob("toy-*/*/*"):
        path.chmod(0o600)  # as `hpo run` leaves them
    hpo_here(here, "copy", "toy", "new", "--to", "sqlite:///runs/other.db")
    (folder,) = (here / "runs/checkpoints").glob("new-*")
    for path in (folder, *folder.rglob("*"), here / "runs/other.db"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


def test_files_that_are_on_another_machine_are_said_to_be_missing(here: Path) -> None:
    shutil.rmtree(here / "runs/checkpoints")
    (remark,) = copy_study("toy", "new").remarks
    assert remark.startswith("no checkpoints and logs: runs/checkpoints/toy-") or "is not on this machine" in remark


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tyo", "new"], "there is no study 'tyo' in sqlite:///runs/hpo.db: did you mean toy?"),
        (["toy", "wide"], "sqlite:///runs/hpo.db has a study 'wide' already: choose another name"),
        (["toy", "new@2"], "a study cannot be named 'new@2': it has the name of a file in search_spaces/"),
        (["toy", "a/b"], "a study cannot be named 'a/b'"),
        (["toy", ""], "a study cannot be named ''"),
        (["toy", ".."], "a study cannot be named '..'"),
        (["toy", "."], "a study cannot be named '.'"),
        (["toy", "é" * 101], "...: at most 200 bytes are allowed"),
        (["toy", "new", "--storage", "sqlite:///no.db"], "there is no database sqlite:///no.db yet"),
        (["toy", "new", "--to", "mysql://host/db"], "mysql"),
        (["toy", "new", "--to=postgresql://me:secret@host/db"], "every user of this machine can read a password"),
        (["plain", "new"], "study plain was not created by hpo, so hpo does not know its files"),
    ],
)
def test_copy_refuses_with_one_message(here: Path, hpo_here: HpoHere, arguments: list[str], message: str) -> None:
    with open_database("sqlite:///runs/hpo.db") as database:
        optuna_study(database)
    known, before = names(), everything(here)
    done = hpo_here(here, "copy", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr
    assert (names(), everything(here)) == (known, before), "nothing is written"


def test_an_unknown_study_creates_no_database(here: Path) -> None:
    with pytest.raises(SettingError, match="there is no study 'tyo'"):
        copy_study("tyo", "new", to="sqlite:///other.db")
    assert not (here / "other.db").exists()


# --- rename -------------------------------------------------------------------------------------------------------------


def test_a_renamed_study_is_found_and_resumed_under_its_new_name(here: Path, hpo_here: HpoHere) -> None:
    before = everything(here)
    done = hpo_here(here, "rename", "toy", "new")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("toy is new now.")
    assert everything(here) == before, "files stay"
    (listed,) = (each for each in list_studies() if each.name == "new")
    assert listed.disk_bytes > 0
    with open_database("sqlite:///runs/hpo.db") as database:
        study, listener = search_without_ray(toy_space(here, "new"), database, here / "runs")
        assert (study.name, [event for event in listener.events if event[0] == "started"]) == ("new", [])


def test_a_revision_is_renamed_alone(here: Path) -> None:
    assert rename_study("wide", "newest") == "wide@2"
    assert names() == ["toy", "wide", "newest"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tyo", "new"], "did you mean toy?"),
        (["toy", "wide"], "has a study 'wide' already"),
        (["toy", "toy"], "the study has the name 'toy' already"),
        (["toy", "new@2"], "a study cannot be named 'new@2'"),
        (["toy", "x" * 201], "...: at most 200 bytes are allowed"),
    ],
)
def test_rename_refuses_with_one_message(here: Path, hpo_here: HpoHere, arguments: list[str], message: str) -> None:
    known = names()
    done = hpo_here(here, "rename", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert names() == known


# --- delete -------------------------------------------------------------------------------------------------------------


def answer(monkeypatch: pytest.MonkeyPatch, *, is_yes: bool) -> list[str]:
    """Answer the question as in a terminal; return the list of questions."""
    asked: list[str] = []

    def confirm(question: str, **_: Any) -> bool:
        asked.append(question)
        return is_yes

    monkeypatch.setattr(click, "confirm", confirm)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    return asked


@pytest.mark.parametrize("is_yes", [True, False])
def test_delete_asks_first(here: Path, hpo_here: HpoHere, monkeypatch: pytest.MonkeyPatch, *, is_yes: bool) -> None:
    asked, before = answer(monkeypatch, is_yes=is_yes), everything(here)
    done = hpo_here(here, "delete", "wide")
    assert len(asked) == 1
    assert done.returncode == 0
    assert done.stdout.startswith("wide@2 in sqlite:///runs/hpo.db has trials: 1 COMPLETE; ")
    if is_yes:
        assert names() == ["toy", "wide"]
        assert len(list((here / "runs/checkpoints").glob("wide@2-*"))) == 0
        assert len(list((here / "runs/checkpoints").glob("wide-*"))) == 1
    else:
        assert (names(), everything(here)) == (["toy", "wide", "wide@2"], before)
        assert done.stdout.endswith("Nothing is deleted.\n")


def test_delete_without_a_terminal_needs_yes(here: Path, hpo_here: HpoHere) -> None:
    before = everything(here)
    done = hpo_here(here, "delete", "toy")
    assert done.returncode == 2
    assert done.stderr.startswith("hpo: nothing is deleted: nobody can answer here. This deletes it: ")
    assert "hpo delete toy --yes" in done.stderr
    assert everything(here) == before
    assert hpo_here(here, "delete", "toy", "--yes").returncode == 0
    assert names() == ["wide", "wide@2"]
    assert list((here / "runs/checkpoints").glob("toy-*")) == []


def test_without_a_question_one_of_several_revisions_must_be_named(here: Path, hpo_here: HpoHere) -> None:
    """The same command again would delete the revision before."""
    known, before = names(), everything(here)
    done = hpo_here(here, "delete", "wide", "--yes")
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)
    assert done.stderr.startswith("hpo: nothing is deleted: wide means wide@2 now, and another revision after")
    assert done.stderr.endswith("hpo delete wide@2 --yes\n")
    assert (names(), everything(here)) == (known, before)
    assert hpo_here(here, "delete", "wide@2", "--yes").returncode == 0
    assert hpo_here(here, "delete", "wide@2", "--yes").returncode == 2
    assert names() == ["toy", "wide"]
    assert hpo_here(here, "delete", "wide", "--yes").returncode == 0


def test_a_deletion_that_is_finished_says_that_another_study_stays(here: Path, hpo_here: HpoHere) -> None:
    with open_database("sqlite:///runs/hpo.db") as database:
        study = find_study(database, "wide@2")
        assert study is not None
        management.delete_study(study)
    done = hpo_here(here, "delete", "wide", "--yes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wide@2 is deleted in sqlite:///runs/hpo.db, but not its files: ")
    assert "wide@1 is another study, and stays. This deletes it: " in done.stdout
    assert names() == ["toy", "wide"]


def test_a_deletion_that_was_killed_after_the_rows_are_gone_is_completed(here: Path, hpo_here: HpoHere) -> None:
    with open_database("sqlite:///runs/hpo.db") as database:
        study = find_study(database, "toy")
        assert study is not None
        management.delete_study(study)
    done = hpo_here(here, "delete", "toy", "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert list((here / "runs/checkpoints").glob("toy-*")) == []
    assert hpo_here(here, "delete", "toy", "--yes").returncode == 2


def test_files_that_another_database_needs_are_kept(here: Path) -> None:
    with open_database("sqlite:///runs/hpo.db") as database:
        database.close()
    shutil.copy(here / "runs/hpo.db", here / "runs/copy.db")
    deleted = delete_study("toy", confirm=lambda _: True)
    assert deleted is not None
    (problem,) = deleted.problems
    assert problem.startswith(f"kept: {RunsDir().root}/checkpoints/toy-")
    assert problem.endswith("copy.db has, too, or may have")
    assert len(list((here / "runs/checkpoints").glob("toy-*"))) == 1


def test_the_copy_of_a_deleted_study_keeps_its_files(here: Path) -> None:
    copy_study("toy", "new")
    expected = [path.read_bytes() for path in sorted((here / "runs/checkpoints").glob("toy-*/*/*.pt"))]
    assert isinstance(delete_study("toy", confirm=lambda _: True), DeletedStudy)
    assert [path.read_bytes() for path in sorted((here / "runs/checkpoints").glob("new-*/*/*.pt"))] == expected != []


@pytest.mark.parametrize(
    "change", [lambda: rename_study("toy", "new"), lambda: delete_study("toy", confirm=lambda _: True)]
)
def test_a_running_study_is_neither_renamed_nor_deleted(here: Path, change: Callable[[], object]) -> None:
    with open_database("sqlite:///runs/hpo.db") as database:
        later = database.now_seconds() + 60
        with database.engine.begin() as connection:
            connection.execute(runs_table.update().values(ended=None, lease_until=later, host="elsewhere/boot"))
    before = everything(here)
    with pytest.raises(StorageError, match=r"'toy' is running \(process \d+ on elsewhere\): stop the search first"):
        change()
    assert (names(), everything(here)) == (["toy", "wide", "wide@2"], before)
    assert copy_study("toy", "new").counts == {"COMPLETE": 2}, "a copy is possible"


def test_an_edited_copy_takes_over_the_trials_of_the_copy(here: Path) -> None:
    """Its file has another fingerprint: it is a revision of the copy, and the copied results stand."""
    from hpo.search.earlier.warm_start import find_trials, take_over_trials

    copy_study("toy", "new")
    space = toy_space(here, "new", parameters={"x": [2, 3]})
    with open_database("sqlite:///runs/hpo.db") as database:
        study = open_study(database, **space.study_options)
        assert study.name == "new@2"
        take_over_trials(space, study, find_trials(space, study, database))
        _, listener = search_without_ray(space, database, here / "runs")
        assert [event[1] for event in listener.events if event[0] == "started"] == [1]
        assert [trial.params["x"] for trial in study.trained_trials()] == [2, 3]
