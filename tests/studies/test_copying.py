"""The files of a copy: complete when the copy is visible, not copied twice, and gone with a copy that nobody continues."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from optuna.trial import TrialState

from benchmarks.postgres import Postgres
from hpo.errors import SettingError
from hpo.paths import COPYING_FILE, DATABASES_FILE, SCRIPT_DIR, RunsDir
from hpo.search.checkpoints.files import list_checkpoints
from hpo.search.checkpoints.retention import checkpoint_files, delete_files
from hpo.studies import copying
from hpo.studies.cleaning import KILLED_COPY, delete_garbage, find_garbage
from hpo.studies.copying import copy_files, copy_with_files
from storage import optuna_tables
from storage.copying import NameTakenError
from storage.database import Database, open_database
from storage.management import delete_study, rename_study
from storage.studies import find_study
from storage.study import Study, study_names
from tests.factories import after_statement, search_without_ray, toy_space
from tests.storage.studies import content, kill_at


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """A folder with a finished search and its database."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "runs").mkdir()
    shutil.copy(empty_database, folder / "runs")
    with open_database(f"sqlite:///{folder}/runs/hpo.db") as database:
        search_without_ray(toy_space(folder), database, folder / "runs")
    return folder / "runs"


@pytest.fixture
def runs(tmp_path: Path, searched: Path) -> RunsDir:
    shutil.copytree(searched, tmp_path / "runs")
    return RunsDir(tmp_path / "runs")


@pytest.fixture
def source(runs: RunsDir) -> Iterator[Database]:
    with open_database(f"sqlite:///{runs.root}/hpo.db") as database:
        yield database


@pytest.fixture(params=["same", "sqlite", pytest.param("postgresql", marks=[pytest.mark.postgres, pytest.mark.slow])])
def target(request: pytest.FixtureRequest, source: Database, tmp_path: Path) -> Iterator[Database]:
    """The database of the copy: that of the study, or another one."""
    if request.param == "same":
        yield source
        return
    url = f"sqlite:///{tmp_path}/other.db"
    if request.param == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        url = server.create_database(f"files_{abs(hash(tmp_path))}")
    with open_database(url) as database:
        yield database


def found(database: Database, name: str) -> Study:
    study = find_study(database, name)
    assert study is not None
    return study


def files(folder: Path) -> dict[str, bytes]:
    """Return {path: content} of the files of a study that its copy has, too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != DATABASES_FILE
    }


def files_of(runs: RunsDir, study: Study) -> dict[str, bytes]:
    return files(runs.checkpoints(study.unique_name))


def url_of(database: Database) -> str:
    return database.engine.url.render_as_string(hide_password=False)


def test_a_copy_has_the_files_of_the_study(source: Database, target: Database, runs: RunsDir) -> None:
    study = found(source, "toy")
    assert copy_with_files(study, target, "new", runs) == 0
    copied = found(target, "new")
    assert copied.identity != study.identity
    assert files_of(runs, copied) == files_of(runs, study) != {}
    folder = runs.checkpoints(copied.unique_name)
    assert [path.name for path in folder.iterdir() if not path.is_dir()] == [DATABASES_FILE]
    (former, *_), (new, *_) = (list_checkpoints(runs.trial(each.unique_name, 0)) for each in (study, copied))
    assert former.samefile(new), "checkpoints do not change, so a hard link is a copy"
    configuration = [runs.trial(each.unique_name, 0) / "configuration.json" for each in (study, copied)]
    assert not configuration[0].samefile(configuration[1]), "others do"


def test_files_that_are_there_are_not_copied_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = tmp_path / "a" / "0"
    (trial / "script" / "inner").mkdir(parents=True)
    for name in ("epoch-000001.pt", "log.txt", "script/inner/state", "epoch-000001.damaged", ".log.txt.1-0.tmp", "x"):
        (trial / name).write_text(name)
    (trial / "script" / "link").symlink_to("/etc/passwd")
    (tmp_path / "a" / "1.other-1").mkdir()
    (tmp_path / "b").mkdir()
    copy_files(tmp_path / "a", tmp_path / "b")
    names = {"0/epoch-000001.pt", "0/log.txt", "0/script/inner/state"}
    assert set(files(tmp_path / "b")) == names
    before = {name: (tmp_path / "b" / name).stat().st_ino for name in names}
    (trial / "log.txt").write_text("more")
    copy_files(tmp_path / "a", tmp_path / "b")
    assert {name for name in names if (tmp_path / "b" / name).stat().st_ino != before[name]} == {"0/log.txt"}
    # A running search has written another checkpoint, and deleted this one.
    (trial / "epoch-000001.pt").rename(trial / "epoch-000002.pt")
    copy_files(tmp_path / "a", tmp_path / "b")
    assert set(files(tmp_path / "b")) == names - {"0/epoch-000001.pt"} | {"0/epoch-000002.pt"}


def test_a_trial_that_ends_while_it_is_copied_keeps_its_checkpoint_in_the_copy(
    source: Database, target: Database, runs: RunsDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is RUNNING in the snapshot. It ends, and `checkpoints.keep` deletes its files, before they are copied again."""
    study = found(source, "toy")
    with source.transaction() as connection:
        trial = optuna_tables.trials
        connection.execute(trial.update().where(trial.c.number == 0).values(state=TrialState.RUNNING))
    folder = runs.trial(study.unique_name, 0)
    (folder / SCRIPT_DIR).mkdir()
    (folder / SCRIPT_DIR / "state").write_text("3")
    before, times = files(folder), list[int]()

    def copy_again(former: Path, new: Path) -> None:
        times.append(1)
        if len(times) == 2:
            delete_files(checkpoint_files(folder))
        copy_files(former, new)

    monkeypatch.setattr(copying, "copy_files", copy_again)
    copy_with_files(study, target, "new", runs)
    copied = found(target, "new")
    assert (len(times), checkpoint_files(folder)) == (2, [])
    assert copied.trials()[0].state == TrialState.WAITING
    assert files(runs.trial(copied.unique_name, 0)) == before


def test_where_there_are_no_hard_links_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    (tmp_path / "a" / "0").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "0" / "epoch-000001.pt").write_bytes(b"state")
    for _ in range(2):
        copy_files(tmp_path / "a", tmp_path / "b")
        assert files(tmp_path / "b") == {"0/epoch-000001.pt": b"state"}


@pytest.mark.slow
@pytest.mark.exhaustive(on="postgresql")
def test_a_kill_at_any_change_leaves_none_or_all_and_the_same_call_goes_on(
    source: Database, target: Database, runs: RunsDir, tmp_path: Path
) -> None:
    """Each kill continues what the one before has left, or starts again."""
    study, urls = found(source, "toy"), [url_of(source), url_of(target)]

    def copy(opened: Database, other: Database) -> None:
        copy_with_files(found(opened, "toy"), other, "new", runs)

    before = set(study_names(target))
    for step in itertools.count(1):
        was_killed = kill_at(step, urls, copy)
        if set(study_names(target)) != before:
            copied = found(target, "new")
            assert files_of(runs, copied).items() >= files_of(runs, study).items(), "visible, so complete"
            copy_with_files(study, target, "new", runs)
            cleaning = find_garbage(target, runs)
            assert {each.what for each in cleaning.garbage} <= {KILLED_COPY, "unfinished files"}
            assert delete_garbage(cleaning).problems == []
            assert found(target, "new").identity == copied.identity
            assert files_of(runs, copied) == files_of(runs, study)
            assert content(target, "new")["hpo_metrics"] == content(source, "toy")["hpo_metrics"]
            break
        assert was_killed
    assert step > 5
    folders = {path.name for path in (runs.root / "checkpoints").iterdir() if any(path.iterdir())}
    assert folders == {study.unique_name, copied.unique_name}, "one folder, continued"


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("target", ["sqlite"], indirect=True)  # the files are the same with each
def test_a_kill_of_a_copy_that_starts_anew_leaves_what_clean_deletes(
    source: Database, target: Database, runs: RunsDir
) -> None:
    study, urls = found(source, "toy"), [url_of(source), url_of(target)]

    def copy(opened: Database, other: Database) -> None:
        copy_with_files(found(opened, "toy"), other, "new", runs)

    for step in itertools.count(1):
        if not kill_at(step, urls, copy) or "new" in study_names(target):
            break
        cleaning = find_garbage(target, runs)
        assert [each.what for each in cleaning.garbage] in ([KILLED_COPY], [])
        assert delete_garbage(cleaning).problems == []
        left = {path.name for path in (runs.root / "checkpoints").iterdir()} - {study.unique_name}
        assert [each for name in left for each in (runs.root / "checkpoints" / name).iterdir()] == [], "empty at most"
    else:
        pytest.fail("it always ends")
    assert step > 20, "killed before each change"


def test_clean_keeps_what_a_living_process_copies(
    source: Database, runs: RunsDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, seen = found(source, "toy"), []
    monkeypatch.setattr(copying, "note_database", lambda *_: seen.append(find_garbage(source, runs)))
    copy_with_files(study, source, "new", runs)
    (cleaning,) = seen
    assert cleaning.garbage == []
    assert [folder.name for folder in cleaning.unknown] == [found(source, "new").unique_name]


def test_clean_keeps_a_copy_to_another_database(source: Database, runs: RunsDir, tmp_path: Path) -> None:
    """This database does not know whether it is complete."""
    with open_database(f"sqlite:///{tmp_path}/other.db") as other:
        kill_at(9, [url_of(source), url_of(other)], lambda a, b: copy_with_files(found(a, "toy"), b, "new", runs))
        assert find_garbage(source, runs).garbage == []
        assert [each.what for each in find_garbage(other, runs).garbage] == [KILLED_COPY]


def test_two_processes_do_not_make_the_same_copy_at_once(source: Database, runs: RunsDir) -> None:
    study = found(source, "toy")
    kill_at(9, [url_of(source)], lambda opened: copy_with_files(found(opened, "toy"), opened, "new", runs))
    (marker,) = runs.root.glob(f"checkpoints/*/{COPYING_FILE}")
    with FileLock(f"{marker}.lock"), pytest.raises(SettingError, match="another process makes the copy 'new'"):
        copy_with_files(study, source, "new", runs)
    copy_with_files(study, source, "new", runs)


@pytest.mark.parametrize("change", ["renamed", "deleted"])
def test_a_copy_that_was_killed_at_its_end_is_not_continued_if_it_was_changed_since(
    source: Database, runs: RunsDir, change: str
) -> None:
    study = found(source, "toy")
    copy_with_files(study, source, "new", runs)
    copied = found(source, "new")
    folder = runs.checkpoints(copied.unique_name)
    # As if it had been killed after it was stored:
    from dataclasses import asdict
    from json import dumps

    from hpo.studies.staging import CopyOrder
    from storage.database import identify

    (folder / COPYING_FILE).write_text(dumps(asdict(CopyOrder(str(study.identity), identify(source), "new"))))
    delete_study(copied) if change == "deleted" else rename_study(copied, "other")
    copy_with_files(study, source, "new", runs)
    assert found(source, "new").identity != copied.identity


def test_a_name_that_is_taken_leaves_nothing(source: Database, runs: RunsDir) -> None:
    study = found(source, "toy")
    before = set(runs.root.rglob("*"))
    with pytest.raises(NameTakenError):
        copy_with_files(study, source, "toy", runs)
    assert set(runs.root.rglob("*")) == before


def test_a_full_disk_is_one_message_and_the_same_call_goes_on(
    source: Database, runs: RunsDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = found(source, "toy")

    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(copying, "sync_folder", fail)
        with pytest.raises(SettingError, match=r"cannot copy the files of toy in .*: No space left on device"):
            copy_with_files(study, source, "new", runs)
    assert study_names(source) == ["toy"]
    copy_with_files(study, source, "new", runs)
    assert files_of(runs, found(source, "new")) == files_of(runs, study)


def resume_copy(database: Database, runs: RunsDir) -> None:
    with open_database(url_of(database)) as other:
        copy_with_files(found(other, "toy"), other, "new", runs)


@pytest.mark.parametrize("times", [1, 99])
def test_a_checkpoint_that_is_deleted_before_it_is_copied_is_one_of_older_rows(
    source: Database, runs: RunsDir, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """In these rows, its trial may be the best one: they are read again. A search may do that each time."""
    study = found(source, "toy")
    late = runs.trial(study.unique_name, 7)
    copy, copied = copying.copy_files, itertools.count()

    def copy_while_a_trial_ends(source: Path, target: Path) -> None:
        number = next(copied)
        if 0 < number <= times:  # in the snapshot
            delete_files(checkpoint_files(late))
        copy(source, target)
        if number < times:
            late.mkdir(exist_ok=True)
            (late / "epoch-000003.pt").write_bytes(b"its last one")

    monkeypatch.setattr(copying, "copy_files", copy_while_a_trial_ends)
    copy_with_files(study, source, "copied", runs)
    assert next(copied) == 1 + min(times + 1, copying.MAX_SNAPSHOTS + 1)
    assert found(source, "copied").counts() == study.counts()


def test_a_copy_that_another_process_ends_meanwhile_keeps_its_files(source: Database, runs: RunsDir) -> None:
    study = found(source, "toy")
    kill_at(9, [url_of(source)], lambda opened: copy_with_files(found(opened, "toy"), opened, "new", runs))

    def copy_and_train() -> None:
        resume_copy(source, runs)
        (runs.trial(found(source, "new").unique_name, 0) / "epoch-000009.pt").touch()

    again = pytest.raises(SettingError, match="has just ended the copy 'new'")
    with after_statement(source, "hpo_deleted_studies", copy_and_train), again:
        copy_with_files(study, source, "new", runs)
    assert (runs.trial(found(source, "new").unique_name, 0) / "epoch-000009.pt").exists()
    assert find_garbage(source, runs).garbage == [], "not even a lock is left"
    with pytest.raises(NameTakenError):
        copy_with_files(study, source, "new", runs)


def test_clean_keeps_a_copy_that_ends_before_it_deletes(source: Database, runs: RunsDir) -> None:
    kill_at(9, [url_of(source)], lambda opened: copy_with_files(found(opened, "toy"), opened, "new", runs))
    cleaning = find_garbage(source, runs)
    resume_copy(source, runs)
    copied = found(source, "new")
    before = files_of(runs, copied)
    done = delete_garbage(cleaning)
    assert done.problems == [f"kept: {runs.checkpoints(copied.unique_name)}, a copy that has been continued meanwhile"]
    assert done.disk_bytes == 0
    assert files_of(runs, copied) == before != {}
