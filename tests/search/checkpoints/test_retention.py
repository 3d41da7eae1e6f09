"""Which checkpoints are on disk while trials end, and after a search."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.toy import expected_value
from hpo.paths import CONFIGURATION_FILE, RunsDir
from hpo.search.checkpoints.files import claim_folder
from hpo.search.checkpoints.retention import Retention, checkpoint_files, is_deleted, trials_with_checkpoints
from hpo.search.coordinator import TrialCoordinator
from hpo.search.messages import TrialReport
from hpo.search.slots import Slots
from hpo.space.model import Space, load_space
from storage.database import Database
from storage.errors import StorageError
from storage.run import Run
from storage.studies import open_study
from storage.study import Study
from tests.factories import RecordingListener, run_of, search_without_ray, take_reports, toy_space, trial_states

XS = list(range(1, 8))
VALUES = {number: expected_value({"x": x}, 0, 3) for number, x in enumerate(XS)}
BEST_FIRST = sorted(VALUES, key=lambda number: -VALUES[number])


def seven_trials(folder: Path, keep: Any, **changes: Any) -> Space:
    return toy_space(folder, parameters={"x": XS}, checkpoints={"keep": keep}, **changes)


def folder_of(study: Study, folder: Path) -> Path:
    return RunsDir(folder).checkpoints(study.unique_name)


def held(study: Study, folder: Path) -> list[int]:
    return trials_with_checkpoints(folder_of(study, folder))


def coordinator_of(space: Space, run: Run, folder: Path) -> TrialCoordinator:
    run.enqueue(space.grid_points(), space.distributions())
    return TrialCoordinator(
        space, run, Slots(1, 1.0, 0.0), data={}, runs_dir=RunsDir(folder), listener=RecordingListener()
    )


def train(coordinator: TrialCoordinator, run: Run, epochs: int = 3) -> None:
    """Claim a trial and report its first epochs; the result is in the database after that."""
    spec = coordinator.next_trial("t")
    assert spec is not None
    for report in take_reports(spec, epochs):
        coordinator.on_report("t", report)
    run.flush()


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("best 1", BEST_FIRST[:1]),
        ("best 3", BEST_FIRST[:3]),
        ("best 9", list(VALUES)),
        (2, [5, 6]),
        ("none", []),
        ("all", list(VALUES)),
    ],
)
def test_after_a_search_the_disk_holds_exactly_what_the_search_space_keeps(
    database: Database, tmp_path: Path, keep: Any, expected: list[int]
) -> None:
    study, _ = search_without_ray(seven_trials(tmp_path, keep), database, tmp_path, at_a_time=2)
    assert trial_states(study) == ["COMPLETE"] * 7
    assert held(study, tmp_path) == sorted(expected)
    for number in VALUES:
        files = {path.name for path in (folder_of(study, tmp_path) / str(number)).iterdir()}
        assert files == {CONFIGURATION_FILE} | ({"epoch-000003.pt"} if number in expected else set())


def test_with_minimize_the_lowest_values_are_the_best(database: Database, tmp_path: Path) -> None:
    study, _ = search_without_ray(seven_trials(tmp_path, "best 2", direction="minimize"), database, tmp_path)
    assert held(study, tmp_path) == sorted(BEST_FIRST[-2:])


@pytest.mark.parametrize("keep", ["best 7", "all"])
def test_pruned_trials_keep_checkpoints_only_with_all(database: Database, tmp_path: Path, keep: str) -> None:
    space = seven_trials(tmp_path, keep, scheduler="median")
    study, _ = search_without_ray(space, database, tmp_path, at_a_time=2)
    states = trial_states(study)
    assert set(states) == {"PRUNED", "COMPLETE"}
    complete = [number for number, state in enumerate(states) if state == "COMPLETE"]
    assert held(study, tmp_path) == (list(VALUES) if keep == "all" else complete)


def test_checkpoints_go_as_trials_end_and_not_only_after_the_search(study: Study, tmp_path: Path) -> None:
    space = seven_trials(tmp_path, "best 2")
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path)
        for number in VALUES:
            coordinator._retention._next_time = 0.0
            train(coordinator, run)
            before, after = (set(sorted(range(ended), key=lambda n: -VALUES[n])[:2]) for ended in (number, number + 1))
            assert set(held(study, tmp_path)) in (before | {number}, after), (
                "the end of the last one may be stored or not"
            )
        coordinator.release_all()
    assert held(study, tmp_path) == sorted(BEST_FIRST[:2])


def test_the_database_is_asked_rarely(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[int]] = []
    retention = Retention(seven_trials(tmp_path, "none"), study, RunsDir(tmp_path))

    def delete(numbers: set[int]) -> set[int]:
        asked.append(set(numbers))
        return set()

    monkeypatch.setattr(retention, "_delete", delete)
    monkeypatch.setattr("hpo.search.checkpoints.retention.IDLE_SHARE", 1e12)
    for number in range(5):
        retention.trial_ended(number)
    assert asked == [{0}]
    retention._next_time = 0.0
    retention.trial_ended(5)
    assert asked[1:] == [set(range(6))]


def test_unfinished_and_failed_trials_keep_what_a_resume_needs(study: Study, tmp_path: Path) -> None:
    space = seven_trials(tmp_path, "none")
    with run_of(study, space) as run, run_of(study, space) as other:
        coordinator = coordinator_of(space, run, tmp_path)
        train(coordinator, run)
        train(coordinator, run, epochs=2)
        coordinator.on_report("t", TrialReport(failure="its reason"))
        train(coordinator, run, epochs=1)
        other_coordinator = coordinator_of(space, other, tmp_path)
        train(other_coordinator, other, epochs=2)
        coordinator.release_all()
        assert trial_states(study) == ["COMPLETE", "FAIL", "WAITING", "RUNNING"]
        assert held(study, tmp_path) == [1, 2, 3]
        assert len(checkpoint_files(folder_of(study, tmp_path) / "3")) == 2, "with the fallback"
        with run_of(study, space) as resumed:
            spec = coordinator_of(space, resumed, tmp_path).next_trial("again")
        assert spec is not None
        (recalled,) = take_reports(spec, 1)
        assert (spec.stored_epoch, recalled.epoch, recalled.is_recalled) == (1, 1, True)


def test_a_better_trial_of_another_driver_makes_a_kept_one_superfluous(study: Study, tmp_path: Path) -> None:
    space = seven_trials(tmp_path, "best 1")
    with run_of(study, space) as run, run_of(study, space) as other:
        coordinator, other_coordinator = coordinator_of(space, run, tmp_path), coordinator_of(space, other, tmp_path)
        for number in VALUES:
            train(*((coordinator, run) if number % 2 else (other_coordinator, other)))
        coordinator.release_all()
        assert held(study, tmp_path) == BEST_FIRST[:1], "also what the other driver's trials left"
        other_coordinator.release_all()
    assert held(study, tmp_path) == BEST_FIRST[:1]


def train_without_deleting(study: Study, space: Space, tmp_path: Path) -> None:
    """Train all trials in a run that ends without deleting checkpoints, as a killed one does."""
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path)
        coordinator._retention._next_time = float("inf")
        for _ in VALUES:
            train(coordinator, run)


def test_what_a_killed_driver_left_goes_when_the_next_run_ends(study: Study, tmp_path: Path) -> None:
    space = seven_trials(tmp_path, "best 1")
    train_without_deleting(study, space, tmp_path)
    assert held(study, tmp_path) == list(VALUES)
    with run_of(study, space) as run:
        coordinator_of(space, run, tmp_path).release_all()
    assert held(study, tmp_path) == BEST_FIRST[:1]


def test_files_of_another_configuration_and_of_older_versions_are_not_touched(study: Study, tmp_path: Path) -> None:
    space = seven_trials(tmp_path, "best 1")
    train_without_deleting(study, space, tmp_path)
    older, other, *superfluous = BEST_FIRST[1:]
    folder = folder_of(study, tmp_path)
    (folder / str(older) / CONFIGURATION_FILE).unlink()
    (folder / str(other) / CONFIGURATION_FILE).write_text(json.dumps({"key": "another"}))
    Retention(space, study, RunsDir(tmp_path)).run_ended()
    assert held(study, tmp_path) == sorted([BEST_FIRST[0], older, other])
    assert [is_deleted(folder / str(number)) for number in superfluous] == [True] * 4


def test_logs_and_other_files_of_a_trial_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "study/0"
    claim_folder(folder, "key")
    for name in ("log.txt", "hang.txt", "epoch-000001.damaged", "mine.pt", "epoch-000002.pt"):
        (folder / name).touch()
    (folder / "script").mkdir()
    assert [path.name for path in checkpoint_files(folder)] == ["epoch-000002.pt", "script"]


SCRIPT = """
import json, pathlib, sys
for epoch in (1, 2):
    pathlib.Path(sys.argv[1], "weights").write_text(sys.argv[2])
    print(json.dumps({"value": float(sys.argv[2]), "epoch": epoch}), flush=True)
"""


@pytest.mark.slow
def test_the_folder_in_which_a_script_saves_goes_with_its_checkpoints(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    keys = {"metric": "value", "max_epochs": 2, "sampler": "grid", "parameters": {"x": [1, 3, 2]}}
    keys["command"] = f"{sys.executable} train.py {{checkpoint_dir}} {{x}}"
    keys["checkpoints"] = {"keep": "best 1"}
    (tmp_path / "script.yaml").write_text(json.dumps(keys))
    study, _ = search_without_ray(load_space("script.yaml"), database, tmp_path)
    folder = folder_of(study, tmp_path)
    assert [path.parent.parent.name for path in folder.glob("*/script/weights")] == ["1"]
    assert [path.parent.name for path in sorted(folder.glob("*/log.txt"))] == ["0", "1", "2"]


def test_a_database_that_is_away_delays_nothing_and_fails_no_search(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = seven_trials(tmp_path, "none")
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path)
        waits: list[float] = []

        def fail(*_: object, timeout_seconds: float, **__: object) -> None:
            waits.append(timeout_seconds)
            raise StorageError("away")

        with monkeypatch.context() as patch:
            patch.setattr("storage.ranking.superfluous_trials", fail)
            train(coordinator, run)
            coordinator.release_all()
        assert coordinator.error is None
        assert waits == [0.0, 0.0]
        assert held(study, tmp_path) == [0]
        coordinator.release_all()
    assert held(study, tmp_path) == []


@pytest.mark.parametrize("function", ["is_of", "list_checkpoints", "trials_with_checkpoints"])
def test_a_passing_error_of_reading_ends_no_search_and_its_files_go_later(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    space = seven_trials(tmp_path, "none")

    def fail(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path)
        train(coordinator, run)
        with monkeypatch.context() as patch:
            patch.setattr(f"hpo.search.checkpoints.retention.{function}", fail)
            coordinator._retention._next_time = 0.0
            train(coordinator, run)
            coordinator.release_all()
        assert coordinator.error is None
        assert trial_states(study) == ["COMPLETE"] * 2
        assert 1 in held(study, tmp_path)
        coordinator.release_all()
        assert held(study, tmp_path) == []


def test_a_study_that_was_deleted_meanwhile_is_no_error(database: Database, tmp_path: Path) -> None:
    space = seven_trials(tmp_path, "none")
    study = open_study(database, **space.study_options)
    retention = Retention(space, study, RunsDir(tmp_path))
    (folder_of(study, tmp_path) / "0").mkdir(parents=True)
    (folder_of(study, tmp_path) / "0/epoch-000001.pt").touch()
    folder = folder_of(study, tmp_path)
    database.optuna_storage.delete_study(study.study_id)
    retention.run_ended()
    assert trials_with_checkpoints(folder) == [0], "`hpo clean` deletes it"
