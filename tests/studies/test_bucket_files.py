"""Whole studies whose checkpoints are in a bucket: what is kept, deleted, copied, continued. On moto's S3 server."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.toy import expected_value
from hpo.api import clean_runs, copy_study, delete_study
from hpo.bucket import Bucket, locate
from hpo.errors import SettingError
from hpo.paths import RunsDir
from hpo.search import trial_specs
from hpo.search.checkpoints.bucket import BucketStudy
from hpo.search.checkpoints.retention import trials_with_checkpoints
from hpo.search.coordinator import TrialCoordinator
from hpo.search.slots import Slots
from hpo.space.model import Space, load_space
from hpo.studies import copying
from storage.database import Database
from storage.studies import find_study, open_study
from storage.study import Study
from tests.factories import HpoHere, RecordingListener, run_of, search_without_ray, toy_space
from tests.s3 import S3Server

pytestmark = pytest.mark.slow

XS = [1, 2, 3, 4]
VALUES = {number: expected_value({"x": x}, 0, 3) for number, x in enumerate(XS)}
BEST_FIRST = sorted(VALUES, key=lambda number: -VALUES[number])


def space_of(folder: Path, **changes: Any) -> Space:
    values: dict[str, Any] = {"parameters": {"x": XS}, "max_epochs": 3, "checkpoints": {"keep": "all"}}
    return toy_space(folder, **(values | changes))


def held(study: Study, bucket_url: str) -> dict[int, list[int]]:
    """Return {trial: epochs of its checkpoints in the bucket}."""
    found = BucketStudy(f"{bucket_url}/{study.unique_name}").read()
    return {number: [each.epoch for each in checkpoints] for (number, _), checkpoints in sorted(found.items())}


def where(database: Database, folder: Path, bucket_url: str) -> dict[str, Any]:
    return {"storage": f"sqlite:///{database.file}", "runs_dir": folder, "checkpoints": bucket_url}


def test_checkpoints_that_a_search_does_not_keep_are_deleted_in_the_bucket(
    database: Database, tmp_path: Path, bucket_url: str
) -> None:
    space = space_of(tmp_path, checkpoints={"keep": "best 2"})

    study, _ = search_without_ray(space, database, tmp_path, bucket_url=bucket_url)

    assert held(study, bucket_url) == {number: [3] for number in sorted(BEST_FIRST[:2])}


def test_trials_with_more_epochs_start_from_checkpoints_that_only_the_bucket_has(
    database: Database, tmp_path: Path, bucket_url: str
) -> None:
    search_without_ray(space_of(tmp_path), database, tmp_path / "a", bucket_url=bucket_url)

    study, listener = search_without_ray(
        space_of(tmp_path, max_epochs=5), database, tmp_path / "b", bucket_url=bucket_url
    )

    assert any("continues 4 trials to epoch 5 from their checkpoints" in str(event[1]) for event in listener.events)
    values = {trial.params["x"]: trial.value for trial in study.trials()}
    assert values == {x: expected_value({"x": x}, 0, 5) for x in XS}
    assert {event[2] for event in listener.events if event[0] == "started"} == {3}


def test_members_of_a_population_are_copied_from_checkpoints_that_only_the_bucket_has(
    database: Database, tmp_path: Path, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = toy_space(
        tmp_path,
        scheduler={"name": "pbt", "population": 4, "interval": 2},
        sampler="random",
        max_epochs=6,
        parameters={"x": {"type": "float", "low": 0.0, "high": 1.0}},
        budget={"time": "1h"},
    )
    monkeypatch.setattr(trial_specs, "parent_folder", lambda *_: tmp_path / "on another machine")

    study, listener = search_without_ray(space, database, tmp_path, at_a_time=4, bucket_url=bucket_url)

    children = [trial for trial in study.trials() if "continued_from" in trial.user_attrs]
    assert children
    assert all(trial.user_attrs["continued_from"]["epoch"] > 0 for trial in children)
    assert not any("is gone" in str(event[1]) for event in listener.events)


def test_clean_deletes_what_no_search_needs_in_the_bucket_and_nothing_else(
    database: Database, tmp_path: Path, bucket_url: str
) -> None:
    study, _ = search_without_ray(space_of(tmp_path), database, tmp_path / "runs", bucket_url=bucket_url)
    other, _ = search_without_ray(
        toy_space(tmp_path, "other", checkpoints={"keep": "best 1"}, parameters={"x": XS}, max_epochs=3),
        database,
        tmp_path / "runs",
    )
    bucket, (stray, mine) = Bucket(bucket_url), (tmp_path / "stray", study.unique_name)
    stray.write_bytes(b"12345")
    first = BucketStudy(f"{bucket_url}/{mine}").bucket.list_objects()[0].name
    key, name = first.split("/")[1], "epoch-000003.1-1.5.pt"
    superfluous = f"{other.unique_name}/{BEST_FIRST[-1]}/{other_key(other, BEST_FIRST[-1])}/{name}"
    kept = {f"unknown-0123456789ab/0/{key}/{name}", f"{mine}/{first}"}
    garbage = {f"{mine}/0/earlier/{name}", superfluous}
    for each in (kept | garbage) - {f"{mine}/{first}"}:
        bucket.upload(stray, each)
    before = {each.name for each in bucket.list_objects()}

    found = clean_runs(**where(database, tmp_path / "runs", bucket_url), delete=True)

    assert found.problems == []
    assert before - {each.name for each in bucket.list_objects()} == garbage
    assert {str(each.folder) for each in found.garbage if each.objects} == {
        f"{bucket_url}/{each.unique_name}" for each in (study, other)
    }


def other_key(study: Study, number: int) -> str:
    return Space.from_settings(study.settings).config_key(study.trials()[number].params)


def test_a_deleted_study_is_gone_from_the_bucket_or_clean_deletes_it_later(
    database: Database, tmp_path: Path, bucket_url: str, s3_server: S3Server
) -> None:
    files = where(database, tmp_path / "runs", bucket_url)
    for name in ("one", "two"):
        search_without_ray(toy_space(tmp_path, name), database, tmp_path / "runs", bucket_url=bucket_url)

    deleted = delete_study("one", confirm=lambda found: found.disk_bytes > 0, **files)
    assert deleted is not None
    assert deleted.problems == []
    assert [each.partition("-")[0] for each in Bucket(bucket_url).list_folders()] == ["two"]

    def go_away(_: object) -> bool:
        s3_server.stop()
        return True

    try:
        deleted = delete_study("two", confirm=go_away, **files)
    finally:
        s3_server.start()
    assert deleted is not None
    assert "`hpo clean` deletes it when the bucket answers" in deleted.problems[0]
    clean_runs(**files, delete=True)
    assert Bucket(bucket_url).list_objects() == []


def test_a_study_is_not_deleted_while_the_bucket_cannot_be_read(
    database: Database, tmp_path: Path, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    search_without_ray(toy_space(tmp_path), database, tmp_path / "runs", bucket_url=bucket_url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")

    with pytest.raises(SettingError, match=r"nothing is deleted: .* cannot be read"):
        delete_study("toy", confirm=lambda _: True, **where(database, tmp_path / "runs", bucket_url))

    assert find_study(database, "toy") is not None


def test_a_copy_has_the_checkpoints_that_only_the_bucket_has(
    database: Database, tmp_path: Path, bucket_url: str
) -> None:
    study, _ = search_without_ray(space_of(tmp_path), database, tmp_path / "a", bucket_url=bucket_url)

    copy_study("toy", "new", **where(database, tmp_path / "b", bucket_url))

    copied = find_study(database, "new")
    assert copied is not None
    assert held(copied, bucket_url) == held(study, bucket_url) != {}


def test_clean_deletes_what_a_copy_that_was_killed_has_in_the_bucket(
    database: Database, tmp_path: Path, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, _ = search_without_ray(space_of(tmp_path), database, tmp_path, bucket_url=bucket_url)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(copying, "note_database", die)
        with pytest.raises(KeyboardInterrupt):
            copy_study("toy", "new", **where(database, tmp_path, bucket_url))
    assert len(Bucket(bucket_url).list_folders()) == 2

    clean_runs(**where(database, tmp_path, bucket_url), delete=True)

    assert Bucket(bucket_url).list_folders() == [study.unique_name]


def test_nothing_of_a_script_is_uploaded(database: Database, tmp_path: Path) -> None:
    file = tmp_path / "script.yaml"
    file.write_text(
        "{command: 'true {x} {checkpoint_dir}', metric: m, sampler: grid, max_epochs: 1, parameters: {x: [1]}}"
    )
    space = load_space(str(file))
    with run_of(open_study(database, **space.study_options), space) as run:
        run.enqueue(space.grid_points(), space.distributions())
        spec = TrialCoordinator(
            space,
            run,
            Slots(1, 1.0, 0.0),
            data={},
            runs_dir=RunsDir(tmp_path, bucket_url="s3://bucket"),
            listener=RecordingListener(),
        ).next_trial("t")
    assert spec is not None
    assert spec.bucket == ""


def test_a_missing_bucket_stops_the_command_before_anything_is_stored_or_trained(
    tmp_path: Path, hpo_here: HpoHere, bucket_url: str
) -> None:
    toy_space(tmp_path)

    done = hpo_here(tmp_path, "run", "toy.yaml", HPO_CHECKPOINTS="s3://missing/runs")

    assert done.returncode == 2
    assert done.stderr.startswith("hpo: --checkpoints s3://missing/runs: no bucket 'missing'. Create it")
    assert not (tmp_path / "runs/hpo.db").exists()
    assert not list(tmp_path.glob("runs/checkpoints/*"))


def test_a_plain_path_moves_the_checkpoints_of_a_search(database: Database, tmp_path: Path) -> None:
    study, _ = search_without_ray(space_of(tmp_path), database, tmp_path / "runs")
    shutil.move(tmp_path / "runs/checkpoints", tmp_path / "disk")
    moved = locate(tmp_path / "runs", tmp_path / "disk")

    assert trials_with_checkpoints(moved.checkpoints(study.unique_name)) == [0, 1, 2, 3]
    deleted = delete_study(
        "toy",
        confirm=lambda _: True,
        storage=f"sqlite:///{database.file}",
        runs_dir=tmp_path / "runs",
        checkpoints=tmp_path / "disk",
    )
    assert deleted is not None
    assert list((tmp_path / "disk").iterdir()) == []
