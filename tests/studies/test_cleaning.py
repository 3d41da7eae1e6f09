"""`hpo clean` and the bytes of `hpo list`: what is deleted, and above all what is not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import optuna
import psutil
import pytest

from benchmarks.postgres import Postgres
from hpo.api import clean_runs, list_studies, read_results
from hpo.dashboard import publishing
from hpo.dashboard.publishing import publish
from hpo.errors import SettingError
from hpo.paths import CONFIGURATION_FILE, DATABASES_FILE, RunsDir
from hpo.search.checkpoints.files import list_checkpoints
from hpo.search.checkpoints.retention import trials_with_checkpoints
from hpo.studies import cleaning
from hpo.studies.cleaning import Garbage, delete_garbage, find_garbage
from hpo.studies.folders import count_bytes
from hpo.studies.other_databases import note_database
from storage import parents
from storage.database import Database, identify, open_database
from storage.errors import StorageError
from storage.studies import find_study, open_study
from storage.study import Study
from tests.factories import HpoHere, run_of, search_without_ray, toy_space

TWO_DAYS = 2 * 86_400.0


@pytest.fixture
def runs(tmp_path: Path, database: Database) -> RunsDir:
    """The folder `runs`, whose database is the fixture `database`, and two toy studies: `one` and `two`."""
    (tmp_path / "runs").mkdir()
    for name in ("one", "two"):
        space = toy_space(tmp_path, checkpoints={"keep": "all"})
        search_without_ray(space.model_copy(update={"name": name}), database, tmp_path / "runs")
    return RunsDir(tmp_path / "runs")


def study_of(database: Database, name: str) -> Study:
    study = find_study(database, name)
    assert study is not None
    return study


def folder_of(runs: RunsDir, study: Study) -> Path:
    return runs.checkpoints(study.unique_name)


def grow_old(path: Path) -> None:
    os.utime(path, (time.time() - TWO_DAYS, time.time() - TWO_DAYS), follow_symlinks=False)


def found_paths(database: Database, runs: RunsDir) -> set[Path]:
    return {path for each in find_garbage(database, runs).garbage for path in each.paths}


def every_file(runs: RunsDir) -> set[Path]:
    return set(runs.root.rglob("*"))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# --- studies ------------------------------------------------------------------------------------------------------------


def test_nothing_is_found_in_a_folder_that_only_searches_have_used(database: Database, runs: RunsDir) -> None:
    before = every_file(runs)
    found = find_garbage(database, runs)
    assert (found.garbage, found.unknown, found.running, found.disk_bytes) == ([], {}, [], 0)
    assert every_file(runs) == before


def test_the_folder_of_a_deleted_study_is_freed_and_that_of_another_database_is_kept(
    database: Database, runs: RunsDir, tmp_path: Path
) -> None:
    one, two = folder_of(runs, study_of(database, "one")), folder_of(runs, study_of(database, "two"))
    with open_database(f"sqlite:///{tmp_path}/theirs.db") as theirs:
        study, _ = search_without_ray(toy_space(tmp_path), theirs, runs.root)
        other = folder_of(runs, study)
        optuna.delete_study(study_name="one", storage=database.optuna_storage)
        theirs.optuna_storage.delete_study(study.study_id)
    found = find_garbage(database, runs)
    assert found_paths(database, runs) == {one}
    assert found.disk_bytes == count_bytes(one) > 0
    assert found.unknown == {other: count_bytes(other)}
    assert delete_garbage(found).problems == []
    assert (one.exists(), two.exists(), other.exists()) == (False, True, True)
    assert find_garbage(database, runs).garbage == []


def copy_of(database: Database, path: Path) -> str:
    assert database.file is not None
    with closing(sqlite3.connect(database.file)) as source, closing(sqlite3.connect(path)) as target:
        source.backup(target)
    return f"sqlite:///{path}"


@pytest.mark.parametrize("place", ["runs", "next to it", "noted"])
def test_what_another_copy_of_the_database_needs_is_kept(
    database: Database, runs: RunsDir, tmp_path: Path, place: str
) -> None:
    """A study was deleted from the copy. Its files, artifacts and what was set aside are still the original's."""
    study = study_of(database, "one")
    one, two = folder_of(runs, study), folder_of(runs, study_of(database, "two"))
    (two / "0.other-1").mkdir()
    (two / "0.other-1/epoch-000001.pt").touch()
    (two / "0/epoch-000001.other").touch()
    runs.artifacts.mkdir()
    (runs.artifacts / f"{study.attrs['hpo:id']}-9f0e2d7c-6a35-4c1b-8f1d-0d6c8a9b7e55").touch()
    folder = {"runs": runs.root, "next to it": tmp_path, "noted": tmp_path / "elsewhere"}[place]
    folder.mkdir(exist_ok=True)
    with open_database(copy_of(database, folder / "copy.db")) as copy:
        optuna.delete_study(study_name="one", storage=copy.optuna_storage)
        if place != "next to it":  # where the copy is next to the original, that is enough
            for each in (one, two):
                note_database(each, database)
                note_database(each, database)
                assert (each / DATABASES_FILE).read_text() == f"{database.file}\n"
        found = find_garbage(copy, runs)
        assert (found.garbage, found.unknown) == ([], {})
        assert found.shared == {one: str(database.file)}
        # When the original has deleted it, too, or is gone, the files are garbage.
        optuna.delete_study(study_name="one", storage=database.optuna_storage)
        assert one in found_paths(copy, runs)
        assert {path.parent for path in found_paths(copy, runs)} == {one.parent, runs.artifacts}


def test_a_file_that_may_not_be_written_is_only_read(database: Database, runs: RunsDir) -> None:
    assert database.file is not None
    url, file = database.url, database.file
    study_of(database, "one")
    database.close()
    for path in file.parent.glob("*.lock"):
        path.unlink()
    file.chmod(0o444)
    before = {path: path.stat().st_mtime_ns for path in file.parent.iterdir() if path.is_file()}
    assert clean_runs(storage=url, runs_dir=runs.root).garbage == []
    assert read_results("one", storage=url).study.name == "one"
    assert {path: path.stat().st_mtime_ns for path in file.parent.iterdir() if path.is_file()} == before


def test_a_link_to_the_database_is_no_other_database(database: Database, runs: RunsDir) -> None:
    assert database.file is not None
    one = folder_of(runs, study_of(database, "one"))
    aside = one / "0.other-1"
    aside.mkdir(parents=True)
    (aside / "epoch-000001.pt").write_bytes(b"x")
    link = runs.root / "link.db"
    link.symlink_to(database.file)
    (one / DATABASES_FILE).write_text(f"{link}\n{database.file}\n")
    assert aside in found_paths(database, runs)
    optuna.delete_study(study_name="one", storage=database.optuna_storage)
    assert one in found_paths(database, runs)


@pytest.mark.postgres
@pytest.mark.slow
def test_a_postgresql_database_is_no_other_under_another_url(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.create_database("aliases")
    runs, other_url = RunsDir(tmp_path), url.replace("127.0.0.1", "localhost")
    assert other_url != url
    with open_database(url) as database, open_database(other_url) as same:
        assert identify(same) == identify(database) != database.url
        name = open_study(database, "s", direction="maximize", fingerprint="f", settings={}).unique_name
        note_database(runs.checkpoints(name), database)
        with (runs.checkpoints(name) / DATABASES_FILE).open("a") as file:
            file.write(f"{database.url}\n")  # as older versions note it
        optuna.delete_study(study_name="s", storage=database.optuna_storage)
        assert runs.checkpoints(name) in found_paths(same, runs)
        with open_database(postgres.create_database("stranger")) as stranger:
            assert identify(stranger) != identify(database)
            note_database(runs.checkpoints(name), stranger)
            assert find_garbage(same, runs).shared == {runs.checkpoints(name): identify(stranger)}


def test_a_folder_whose_name_is_no_text_can_be_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    monkeypatch.chdir(folder)
    with open_database("sqlite:///hpo.db") as database:
        note_database(tmp_path, database)
        note_database(tmp_path, database)
        assert (tmp_path / DATABASES_FILE).read_bytes() == os.fsencode(folder) + b"/hpo.db\n"
        find_garbage(database, RunsDir(tmp_path))


def test_a_database_that_cannot_be_looked_at_may_need_what_it_has_trained(database: Database, runs: RunsDir) -> None:
    one = folder_of(runs, study_of(database, "one"))
    optuna.delete_study(study_name="one", storage=database.optuna_storage)
    for name, is_kept in (("postgresql://me@host/hpo", True), ("/nowhere/hpo.db", False)):
        (one / DATABASES_FILE).write_text(f"{database.file}\n{name}\n")
        assert find_garbage(database, runs).shared == ({one: name} if is_kept else {})
        assert (one in found_paths(database, runs)) != is_kept
    (runs.root / "damaged.db").write_bytes(b"SQLite format 3\0 and nothing else")
    assert find_garbage(database, runs).shared.get(one) == str(runs.root / "damaged.db")


def test_a_study_with_the_id_of_a_deleted_one_is_kept(database: Database, runs: RunsDir) -> None:
    """A copy of the database that was restored has a study that was deleted from it later."""
    one = study_of(database, "one")
    folder, attrs = folder_of(runs, one), one.attrs
    runs.artifacts.mkdir()
    (runs.artifacts / f"{attrs['hpo:id']}-9f0e2d7c-6a35-4c1b-8f1d-0d6c8a9b7e55").touch()
    optuna.delete_study(study_name="one", storage=database.optuna_storage)
    restored = optuna.create_study(study_name="one", storage=database.optuna_storage)
    for key, value in attrs.items():
        restored.set_user_attr(key, value)
    assert find_garbage(database, runs).garbage == []
    assert folder.exists()


def test_a_link_is_not_followed(database: Database, runs: RunsDir, tmp_path: Path) -> None:
    one = folder_of(runs, study_of(database, "one"))
    shutil.move(one, tmp_path / "elsewhere")
    one.symlink_to(tmp_path / "elsewhere")
    optuna.delete_study(study_name="one", storage=database.optuna_storage)
    assert find_garbage(database, runs).garbage == []


def test_what_a_running_study_has_is_kept(database: Database, runs: RunsDir, tmp_path: Path) -> None:
    study = study_of(database, "one")
    (folder_of(runs, study) / "0/epoch-000001.damaged").touch()
    space = toy_space(tmp_path)
    with run_of(study, space):
        found = find_garbage(database, runs)
        assert (found.garbage, found.running) == ([], ["one"])
    assert found_paths(database, runs) == {folder_of(runs, study) / "0/epoch-000001.damaged"}


def test_what_a_search_writes_that_starts_while_files_are_listed_is_kept(
    database: Database, runs: RunsDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(database, "one")
    run = run_of(study, toy_space(tmp_path))
    draft = folder_of(runs, study) / f"0/.epoch-000004.pt.{2**30}-aa7c7444.tmp"  # of a process on another machine

    def start(*_: object) -> dict[str, dict[int, str]]:
        if not draft.exists():
            run.__enter__()
            draft.touch()
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(parents, "continued_trials", start)  # what is read after the searches that run
        found = find_garbage(database, runs)
    assert (found.garbage, found.running) == ([], ["one"])
    run.__exit__(None, None, None)
    assert found_paths(database, runs) == {draft}


# --- checkpoints of studies that exist ----------------------------------------------------------------------------------


def set_keep(study: Study, keep: str | int | None) -> None:
    settings = study.settings
    settings.pop("checkpoints")
    study.optuna_study.set_user_attr("hpo:settings", settings | ({"checkpoints": {"keep": keep}} if keep else {}))


def test_what_a_killed_driver_should_have_deleted_is_freed_and_the_best_is_kept(
    database: Database, runs: RunsDir
) -> None:
    study = study_of(database, "one")
    set_keep(study, "best 1")
    best = study.optuna_study.best_trial.number
    (worse,) = {0, 1} - {best}
    found = find_garbage(database, runs)
    folder = folder_of(runs, study)
    assert [each.paths for each in found.garbage] == [tuple(list_checkpoints(folder / str(worse)))]
    assert found.garbage[0].what == "checkpoints of ended trials; checkpoints.keep is best 1: those of the best trial"
    delete_garbage(found)
    assert trials_with_checkpoints(folder) == [best]
    assert (folder / str(worse) / CONFIGURATION_FILE).exists()
    assert trials_with_checkpoints(folder_of(runs, study_of(database, "two"))) == [0, 1]


def test_a_study_of_an_older_version_has_the_default(database: Database, runs: RunsDir, tmp_path: Path) -> None:
    space = toy_space(tmp_path, parameters={"x": [1, 2, 3, 4, 5]}, checkpoints={"keep": "all"})
    study, _ = search_without_ray(space, database, runs.root)
    set_keep(study, None)
    for folder in folder_of(runs, study).iterdir():
        (folder / CONFIGURATION_FILE).unlink()
    found = find_garbage(database, runs)
    assert len(found.garbage) == 1
    assert len(found.garbage[0].paths) == 2


def test_settings_of_a_newer_version_keep_every_checkpoint(database: Database, runs: RunsDir) -> None:
    study = study_of(database, "one")
    study.optuna_study.set_user_attr("hpo:settings", study.settings | {"checkpoints": {"keep": "worst 3"}})
    assert find_garbage(database, runs).garbage == []


def test_files_of_another_configuration_are_kept(database: Database, runs: RunsDir) -> None:
    study = study_of(database, "one")
    set_keep(study, "none")
    (folder_of(runs, study) / "0" / CONFIGURATION_FILE).write_text(json.dumps({"key": "another"}))
    assert found_paths(database, runs) == set(list_checkpoints(folder_of(runs, study) / "1"))


# --- leftovers ----------------------------------------------------------------------------------------------------------


def test_damaged_and_unfinished_files_and_folders_that_were_set_aside_are_freed(
    database: Database, runs: RunsDir
) -> None:
    folder = folder_of(runs, study_of(database, "one"))
    trial = folder / "0"
    kept = [
        trial / "log.txt",
        trial / "hang.txt",
        trial / f".epoch-000003.pt.{os.getpid()}-0123abcd.tmp",
        folder / "0.other",
        folder / "notes.other-1",
    ]
    freed = [
        trial / "epoch-000002.damaged",
        trial / f".epoch-000003.pt.{dead_pid()}-0123abcd.tmp",
        trial / f".epoch-000004.pt.{os.getpid()}-0123abcd.tmp",
        folder / "0.other-1",
        folder / "1.other-12",
        trial / "epoch-000001.other",
    ]
    for path in [*kept, *freed]:
        path.write_bytes(b"12345678") if "other" not in path.name else path.mkdir()
    grow_old(freed[2])
    found = find_garbage(database, runs)
    assert {path for each in found.garbage for path in each.paths} == set(freed)
    assert found.disk_bytes == 3 * 8
    delete_garbage(found)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in freed)


def test_leftovers_of_killed_processes_are_freed_after_a_day(database: Database, runs: RunsDir) -> None:
    runs.artifacts.mkdir()
    (runs.reports / "one").mkdir(parents=True)
    for path in (
        runs.root / "hpo-probe-x/checkpoint.pt",
        runs.root / ".writable-1-2",
        runs.root / ".hpo.db.version-2.tmp",
        runs.artifacts / f".x.{dead_pid()}-0123abcd.tmp",
        runs.reports / "one/.index.html.1-0123abcd.tmp",
    ):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    kept = [runs.root / "hpo.db.version-2", runs.root / "exports", runs.reports / "one/index.html", runs.root / "x.tmp"]
    kept += [runs.root / ".theirs.tmp", runs.reports / "one/.~lock.x.1-2.tmp"]
    for path in kept:
        path.touch()
        grow_old(path)
    assert found_paths(database, runs) == set()
    old = {path for path in every_file(runs) - set(kept) if path.name.startswith((".", "hpo-probe"))}
    for path in old:
        grow_old(path)
    assert len(old) == 5
    assert found_paths(database, runs) == old
    delete_garbage(find_garbage(database, runs))
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in kept)


def test_a_draft_that_an_interrupted_save_left_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that `hpo.paths.atomic_file` gives to its drafts are those that are searched for."""
    from hpo.paths import atomic_file

    with atomic_file(tmp_path / "epoch-000001.pt"):
        (draft,) = tmp_path.iterdir()
        assert cleaning._drafts([draft, tmp_path], lambda _: True) == [draft]
        assert not cleaning._is_abandoned(draft)
        monkeypatch.setattr(psutil, "pid_exists", lambda pid: pid != os.getpid())
        assert cleaning._is_abandoned(draft)


# --- artifacts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(database: Database, runs: RunsDir, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Path]]:
    """{study: its artifacts}, and under "mine" a file that a user uploaded in the dashboard."""
    monkeypatch.setattr(publishing, "_publish_curves", lambda *_: None)
    files: dict[str, list[Path]] = {}
    for name in ("one", "two"):
        before = set(runs.artifacts.iterdir()) if runs.artifacts.exists() else set()
        publish(study_of(database, name), runs, always=True)
        files[name] = sorted(set(runs.artifacts.iterdir()) - before)
        assert len(files[name]) == 1, "the best checkpoint"
    files["mine"] = [runs.artifacts / "9f0e2d7c-6a35-4c1b-8f1d-0d6c8a9b7e55"]
    files["mine"][0].write_text("uploaded")
    return files


def test_artifacts_of_deleted_studies_are_freed_and_no_others(
    database: Database, runs: RunsDir, published: dict[str, list[Path]]
) -> None:
    one = study_of(database, "one")
    folder = folder_of(runs, one)
    optuna.delete_study(study_name="one", storage=database.optuna_storage)
    found = find_garbage(database, runs)
    assert found_paths(database, runs) == {folder, *published["one"]}
    assert found.disk_bytes == count_bytes(folder), "the artifact is a second name of the checkpoint"
    delete_garbage(found)
    assert set(runs.artifacts.iterdir()) == {*published["two"], *published["mine"]}


def test_a_checkpoint_that_is_an_artifact_too_frees_nothing_alone(
    database: Database, runs: RunsDir, published: dict[str, list[Path]]
) -> None:
    study = study_of(database, "one")
    set_keep(study, "none")
    garbage = find_garbage(database, runs)
    worse = 1 - study.optuna_study.best_trial.number
    assert len(found_paths(database, runs)) == 2
    assert garbage.disk_bytes == count_bytes(list_checkpoints(folder_of(runs, study) / str(worse))[0])


# --- deleting -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_deleted_is_a_problem_and_the_rest_is_deleted(
    database: Database, runs: RunsDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = folder_of(runs, study_of(database, "one")) / "0"
    stuck, easy = trial / "a.damaged", folder_of(runs, study_of(database, "two")) / "0/b.damaged"
    for path in (stuck, easy):
        path.write_bytes(b"1234")
    unlink = Path.unlink

    def fail(path: Path, missing_ok: bool = False) -> None:
        if path == stuck:
            raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", fail)
    cleaned = delete_garbage(find_garbage(database, runs))
    assert cleaned.problems == [f"cannot delete {stuck}: Permission denied"]
    assert cleaned.disk_bytes == 4
    assert (stuck.exists(), easy.exists()) == (True, False)


def test_what_cannot_be_read_is_a_problem_and_the_rest_is_cleaned(
    database: Database, runs: RunsDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        open_study(database, **toy_space(tmp_path, checkpoints={"keep": "none"}).study_options | {"name": name})
    one, two = (folder_of(runs, study_of(database, name)) for name in ("one", "two"))
    (two / "1/a.damaged").touch()
    listed, unreadable = [two / "0", runs.reports], one / "0" / CONFIGURATION_FILE
    unreadable.unlink()
    unreadable.mkdir()  # reading it is an error of the disk
    iterdir = Path.iterdir

    def fail(path: Path) -> Iterator[Path]:
        if path in listed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", fail)
    found = find_garbage(database, runs)
    problems = [f"cannot read {unreadable}: Is a directory"]
    problems += [f"cannot read {path}: Permission denied" for path in listed]
    assert found.problems == problems
    assert {path.parent for each in found.garbage for path in each.paths} == {one / "1", two / "0", two / "1"}
    assert delete_garbage(found).problems == problems
    assert trials_with_checkpoints(one) == [0]
    assert trials_with_checkpoints(two) == []


def test_files_that_another_database_may_need_are_kept_while_this_cannot_be_read(
    database: Database, runs: RunsDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(database, "one")
    one = folder_of(runs, study)
    runs.artifacts.mkdir()
    (runs.artifacts / f"{study.identity}-9f0e2d7c-6a35-4c1b-8f1d-0d6c8a9b7e55").touch()
    optuna.delete_study(study_name="one", storage=database.optuna_storage)
    (one / DATABASES_FILE).mkdir()
    found = find_garbage(database, runs)
    assert (found.garbage, found.problems) == ([], [f"cannot read {one / DATABASES_FILE}: Is a directory"])

    def fail(path: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(SettingError, match=r"cannot read .*: Permission denied: copies of the database may be there"):
        find_garbage(database, runs)


def test_two_cleanings_at_a_time_are_no_problem(database: Database, runs: RunsDir) -> None:
    (folder_of(runs, study_of(database, "one")) / "0/a.damaged").touch()
    optuna.delete_study(study_name="two", storage=database.optuna_storage)
    found = find_garbage(database, runs)
    assert len(found.garbage) == 2
    assert delete_garbage(found).problems == []
    assert delete_garbage(found).problems == []


# --- the command line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def here(database: Database, runs: RunsDir, tmp_path: Path) -> Path:
    """A folder whose runs/hpo.db has the studies `one` and `two`, and a study `one` that was deleted."""
    optuna.delete_study(study_name="one", storage=database.optuna_storage)
    (runs.checkpoints("theirs-0123456789ab") / "0").mkdir(parents=True)
    database.close()
    shutil.move(tmp_path / "hpo.db", runs.root / "hpo.db")
    return tmp_path


def test_clean_lists_and_deletes_only_with_yes(here: Path, runs: RunsDir, hpo_here: HpoHere) -> None:
    before = every_file(runs)
    listed = hpo_here(here, "clean")
    assert listed.returncode == 0
    first, kept, total = listed.stdout.splitlines()
    assert first.endswith(": of a deleted study")
    assert "  runs/checkpoints/one-" in first
    assert kept == "kept: runs/checkpoints/theirs-0123456789ab (0 B), which is of no study in sqlite:///runs/hpo.db"
    size = first.strip().partition("  ")[0]
    assert total.startswith(f"{size} can be freed: ")
    assert total.endswith("python -m hpo clean --yes")
    assert {path for path in every_file(runs) if "hpo.db" not in path.name} == {
        path for path in before if "hpo.db" not in path.name
    }
    freed = hpo_here(here, "clean", "--yes")
    assert freed.returncode == 0
    assert freed.stdout.splitlines() == [first, kept, f"Freed {size}."]
    assert not list(runs.root.glob("checkpoints/one-*"))
    assert len(list(runs.root.glob("checkpoints/two-*/*/*.pt"))) == 2
    assert hpo_here(here, "clean", "--yes").stdout.splitlines() == [kept, "Nothing to delete."]


def test_clean_reports_what_it_cannot_delete(here: Path, hpo_here: HpoHere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "delete_path", lambda path: f"cannot delete {path}: no rights")
    finished = hpo_here(here, "clean", "--yes")
    assert finished.returncode == 2
    assert finished.stdout.endswith("Freed 0 B.\n")
    assert finished.stderr.startswith("hpo: cannot delete runs/checkpoints/one-")


def test_clean_creates_no_database_and_deletes_nothing_without_one(tmp_path: Path) -> None:
    (tmp_path / "runs/checkpoints/one-0123456789ab").mkdir(parents=True)
    with pytest.raises(StorageError, match="there is no database"):
        clean_runs(storage=f"sqlite:///{tmp_path}/none.db", runs_dir=tmp_path / "runs", delete=True)
    assert {path.name for path in every_file(RunsDir(tmp_path / "runs"))} == {"checkpoints", "one-0123456789ab"}


def test_the_size_of_a_study_is_that_of_its_files(database: Database, runs: RunsDir, tmp_path: Path) -> None:
    study = study_of(database, "one")
    sizes = [path.stat().st_size for path in folder_of(runs, study).rglob("*") if path.is_file()]
    assert len(sizes) == 4
    optuna.create_study(study_name="theirs", storage=database.optuna_storage)
    summaries = list_studies(storage=f"sqlite:///{tmp_path}/hpo.db", runs_dir=runs.root)
    assert {each.name: each.disk_bytes for each in summaries} == {
        "one": sum(sizes),
        "two": count_bytes(folder_of(runs, study_of(database, "two"))),
        "theirs": 0,
    }
    assert count_bytes(tmp_path / "missing") == 0


def test_garbage_is_measured_once_per_file(tmp_path: Path) -> None:
    one, link = tmp_path / "one", tmp_path / "link"
    one.write_bytes(b"12345678")
    link.hardlink_to(one)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/small").write_bytes(b"1")
    (tmp_path / "folder/symlink").symlink_to(one)
    link_size = (tmp_path / "folder/symlink").lstat().st_size
    alone = Garbage("x", tmp_path, (one,))
    both = Garbage("x", tmp_path, (one, link))
    folder = Garbage("x", tmp_path, (tmp_path / "folder",))
    assert [each.disk_bytes for each in cleaning._measured([alone, folder])] == [0, 1 + link_size]
    assert [each.disk_bytes for each in cleaning._measured([both, folder])] == [8, 1 + link_size]
