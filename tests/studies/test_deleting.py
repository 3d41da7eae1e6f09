"""What is deleted and what stays: after a deletion that was killed, and where other trials continue those of the study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from benchmarks.toy import expected_value
from hpo.api import DeletedStudy, delete_study, rename_study
from hpo.paths import DELETED_FILE, RunsDir
from hpo.search.checkpoints.files import list_checkpoints
from hpo.search.earlier.continuation import open_continued, plan_continuation
from hpo.search.runs import open_run
from hpo.space.model import Space
from hpo.studies import cleaning, deleting
from hpo.studies.cleaning import Garbage, delete_garbage, find_garbage
from hpo.studies.copying import copy_with_files
from storage.database import Database, open_database
from storage.errors import StorageError
from storage.records import CONTINUED_FROM
from storage.retry import retry_trials
from storage.studies import find_study, open_study
from storage.study import Study, study_names
from tests.factories import HpoHere, run_of, search_without_ray, toy_space


def found(database: Database, name: str) -> Study:
    study = find_study(database, name)
    assert study is not None
    return study


def space_of(folder: Path, max_epochs: int) -> Space:
    return toy_space(folder, max_epochs=max_epochs, checkpoints={"keep": "all"})


@dataclass
class Deletions:
    """Calls of `delete_study`, which are confirmed."""

    database: Database
    runs: RunsDir

    def __call__(self, name: str) -> DeletedStudy:
        url = f"sqlite:///{self.database.file}"
        deleted = delete_study(name, confirm=lambda _: True, storage=url, runs_dir=self.runs.root)
        assert deleted is not None
        return deleted

    def kill(self, name: str) -> None:
        """Kill one after its commit, before it deletes files."""

        class Killed(BaseException):
            pass

        def die(*_: Any) -> None:
            raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deleting, "files_of", die)
            with pytest.raises(Killed):
                self(name)


@pytest.fixture
def runs(tmp_path: Path) -> RunsDir:
    return RunsDir(tmp_path)


@pytest.fixture
def delete(database: Database, runs: RunsDir) -> Deletions:
    return Deletions(database, runs)


# --- a deletion that was killed ---------------------------------------------------------------------------------------


@pytest.fixture
def folders(database: Database, runs: RunsDir) -> dict[str, Path]:
    """{study: its folder} of two revisions."""
    studies = [search_without_ray(space_of(runs.root, epochs), database, runs.root)[0] for epochs in (3, 4)]
    return {study.name: runs.checkpoints(study.unique_name) for study in studies}


@pytest.mark.parametrize(
    ("name", "deleted", "remaining"),
    [("toy", "toy@2", "toy@1"), ("toy@2", "toy@2", ""), ("toy@1", "toy", "")],
)
def test_a_deletion_that_was_killed_is_finished_and_no_other_study_is_deleted(
    database: Database, delete: Deletions, folders: dict[str, Path], name: str, deleted: str, remaining: str
) -> None:
    (other,) = folders.keys() - {deleted}
    delete.kill(name)
    assert study_names(database) == [other]
    done = delete(name)
    assert (done.has_rows, done.problems, done.remaining) == (False, [], remaining)
    assert done.name == ("toy@1" if deleted == "toy" else deleted), "as a user names it"
    assert done.disk_bytes > 0
    assert study_names(database) == [other]
    assert {each: folder.exists() for each, folder in folders.items()} == {deleted: False, other: True}


def test_a_deletion_under_a_new_name_is_finished_under_that_name(
    database: Database, delete: Deletions, folders: dict[str, Path]
) -> None:
    rename_study("toy@2", "new", storage=f"sqlite:///{database.file}")
    delete.kill("new")
    assert (delete("new").name, folders["toy@2"].exists()) == ("new", False)
    assert study_names(database) == ["toy"]


def test_a_study_that_was_created_after_it_is_deleted_by_the_next_call(
    database: Database, runs: RunsDir, delete: Deletions, folders: dict[str, Path]
) -> None:
    optuna.delete_study(study_name="toy@2", storage=database.optuna_storage)  # as the dashboard does
    search_without_ray(space_of(runs.root, 4), database, runs.root)
    again = found(database, "toy@2")
    assert (delete("toy@2").remaining, folders["toy@2"].exists()) == ("toy@2", False)
    assert runs.checkpoints(again.unique_name).exists()
    assert (delete("toy@2").has_rows, study_names(database)) == (True, ["toy"])
    assert not runs.checkpoints(again.unique_name).exists()


def test_a_refused_deletion_leaves_no_note(database: Database, delete: Deletions, folders: dict[str, Path]) -> None:
    study = found(database, "toy@2")
    continuation = plan_continuation(space_of(delete.runs.root, 4), study, database, delete.runs)
    with open_run(continuation, study, {}), pytest.raises(StorageError, match="'toy@2' is running"):
        delete("toy@2")
    assert not (folders["toy@2"] / DELETED_FILE).exists()


# --- trials that others continue ----------------------------------------------------------------------------------------


@dataclass
class Family:
    """A study `toy` with two completed trials, and `toy@2`: one of its trials waits to continue trial 1 of `toy`."""

    parent: Study
    child: Study
    folder: Path

    @property
    def checkpoints(self) -> dict[int, int]:
        """{number: number of checkpoints} of the parent."""
        return {number: len(list_checkpoints(self.folder / str(number))) for number in (0, 1)}


@pytest.fixture
def family(database: Database, runs: RunsDir) -> Family:
    parent, _ = search_without_ray(space_of(runs.root, 3), database, runs.root)
    continuation = plan_continuation(space_of(runs.root, 5), None, database, runs)
    child = open_study(database, **continuation.space.study_options)
    with open_run(continuation, child, {}) as run:
        claims = {claim.params["x"]: claim for claim in (run.claim(), run.claim()) if claim is not None}
        run.complete(claims[1], 0.5)
        run.fail(claims[2], "a bug")  # `hpo retry` starts from its parent again
        run.flush()
    return Family(parent, child, runs.checkpoints(parent.unique_name))


def test_a_study_is_deleted_without_the_trials_that_others_continue(
    database: Database, runs: RunsDir, delete: Deletions, family: Family
) -> None:
    kept = family.folder / "1"
    deleted = delete("toy@1")
    reason = "from which a trial of toy@2 may still start; `hpo clean` deletes it when none does any more"
    assert deleted.problems == [f"kept: {kept}, {reason}"]
    assert (study_names(database), family.checkpoints) == (["toy@2"], {0: 0, 1: 1})
    assert find_garbage(database, runs).garbage == []
    assert delete("toy@2").has_rows, "what is kept does not keep the next one from being deleted"
    assert delete_garbage(find_garbage(database, runs)).problems == []
    assert not family.folder.exists()


def test_a_study_is_deleted_without_the_trials_that_a_search_has_chosen_to_continue(
    database: Database, runs: RunsDir, delete: Deletions
) -> None:
    parent, _ = search_without_ray(space_of(runs.root, 3), database, runs.root)
    child, continuation = open_continued(
        database, plan_continuation(space_of(runs.root, 5), None, database, runs), runs
    )
    assert len(delete("toy@1").problems) == 2
    folder = runs.checkpoints(parent.unique_name)
    assert [len(list_checkpoints(folder / str(number))) for number in (0, 1)] == [1, 1]
    with open_run(continuation, child, {}) as run:
        for claim in (run.claim(), run.claim()):
            assert claim is not None
            run.complete(claim, 0.5)
    delete_garbage(find_garbage(database, runs))
    assert not folder.exists()


def test_clean_keeps_what_a_search_has_chosen_to_continue_while_it_looked(
    database: Database, runs: RunsDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, _ = search_without_ray(space_of(runs.root, 3), database, runs.root)
    settings = parent.settings | {"checkpoints": {"keep": "best 1"}}
    parent.optuna_study.set_user_attr("hpo:settings", settings)  # the other one is garbage
    measure = cleaning._measured

    def choose_then_measure(garbage: list[Garbage]) -> list[Garbage]:
        open_continued(database, plan_continuation(space_of(runs.root, 5), None, database, runs), runs)
        return measure(garbage)

    monkeypatch.setattr(cleaning, "_measured", choose_then_measure)
    assert find_garbage(database, runs).garbage == []


def test_what_a_trial_continues_while_the_user_is_asked_is_not_deleted(
    database: Database, runs: RunsDir, delete: Deletions, family: Family
) -> None:
    delete.kill("toy@1")
    ended = next(trial for trial in family.child.trials() if trial.state is TrialState.COMPLETE)

    def continue_again(_: DeletedStudy) -> bool:
        attrs = {CONTINUED_FROM: ended.user_attrs[CONTINUED_FROM]}
        family.child.optuna_study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=attrs))
        return True

    url = f"sqlite:///{database.file}"
    deleted = delete_study("toy@1", confirm=continue_again, storage=url, runs_dir=runs.root)
    assert deleted is not None
    assert len(deleted.problems) == 2
    assert family.checkpoints == {0: 1, 1: 1}


def test_clean_keeps_the_trials_of_a_deleted_study_that_others_continue(
    database: Database, runs: RunsDir, family: Family
) -> None:
    optuna.delete_study(study_name="toy", storage=database.optuna_storage)
    cleaning = find_garbage(database, runs)
    assert cleaning.continued == {family.folder / "1": "toy@2"}
    delete_garbage(cleaning)
    assert family.checkpoints == {0: 0, 1: 1}
    optuna.delete_study(study_name="toy@2", storage=database.optuna_storage)
    delete_garbage(find_garbage(database, runs))
    assert not family.folder.exists()


def test_clean_says_what_it_keeps_for_others(
    database: Database, runs: RunsDir, family: Family, tmp_path: Path, hpo_here: HpoHere
) -> None:
    optuna.delete_study(study_name="toy", storage=database.optuna_storage)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "runs").symlink_to(runs.root)
    done = hpo_here(tmp_path / "here", "clean", "--storage", f"sqlite:///{database.file}")
    folder = f"runs/checkpoints/{family.folder.name}/1"
    assert done.returncode == 0, done.stderr
    said = f"kept: {folder}, of a study that was deleted, but from which a trial of toy@2 may still start"
    assert said in done.stdout.splitlines()


def test_the_parents_of_trials_in_another_database_are_kept(database: Database, runs: RunsDir, family: Family) -> None:
    """It is a copy of this one, from which the parents were deleted first."""
    file = runs.root / "other.db"
    assert database.file is not None
    with database.engine.connect() as connection:
        connection.exec_driver_sql(f"VACUUM INTO '{file}'")
    with open_database(f"sqlite:///{file}") as other:
        optuna.delete_study(study_name="toy", storage=other.optuna_storage)
    for name in ("toy", "toy@2"):
        optuna.delete_study(study_name=name, storage=database.optuna_storage)
    assert find_garbage(database, runs).shared[family.folder] == str(file)


@pytest.mark.parametrize("place", ["other", "same"])
def test_a_copy_has_what_its_unfinished_trials_continue(
    database: Database, runs: RunsDir, family: Family, tmp_path: Path, place: str
) -> None:
    """In another database, the files of the parents are copied, too: nothing there protects the parents' own."""
    with open_database(f"sqlite:///{tmp_path}/other.db") as other:
        target = other if place == "other" else database
        copy_with_files(family.child, target, "copy", runs)
        copied = found(target, "copy")
        folder = runs.checkpoints(copied.unique_name)
        failed = next(trial.number for trial in copied.trials() if trial.params["x"] == 2)
        expected = {f"{failed}.parent"} if place == "other" else set()
        assert {path.name for path in folder.glob("*.parent")} == expected
        if place == "other":
            for path in sorted(family.folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        retry_trials(copied, [failed])
        space = space_of(runs.root, 5).model_copy(update={"name": "copy"})
        _, listener = search_without_ray(space, target, runs.root)
        assert [event for event in listener.events if event[0] == "started"] == [("started", failed, 3)]
        again = found(target, "copy")
        assert again.trials()[failed].value == expected_value({"x": 2}, 0, 5)
        cleaning = find_garbage(target, runs)
        assert {path.name for each in cleaning.garbage for path in each.paths} == expected


def test_trials_that_nobody_was_asked_about_are_not_deleted(database: Database, runs: RunsDir) -> None:
    space = toy_space(runs.root)
    study, _ = search_without_ray(space, database, runs.root)
    folder = runs.checkpoints(study.unique_name)
    before = sorted(folder.rglob("*"))

    def search_and_confirm(asked: DeletedStudy) -> bool:
        assert asked.counts == {"COMPLETE": 2}
        with run_of(study, space) as run:
            run.enqueue([{"x": 3}], {"x": CategoricalDistribution([1, 2, 3])})
            claim = run.claim()
            assert claim is not None
            run.complete(claim, 0.5)
        return True

    message = r"other trials now \(3 COMPLETE\) than when its deletion was confirmed \(2 COMPLETE\)"
    with pytest.raises(StorageError, match=message):
        delete_study("toy", confirm=search_and_confirm, storage=f"sqlite:///{database.file}", runs_dir=runs.root)
    assert study.counts() == {"COMPLETE": 3}
    assert sorted(folder.rglob("*")) == before
    assert delete_study("toy", confirm=lambda _: True, storage=f"sqlite:///{database.file}", runs_dir=runs.root)
    assert study_names(database) == []
