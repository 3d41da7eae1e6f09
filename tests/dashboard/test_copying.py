"""A copy of a study has the notes and artifacts of the study, under its own keys and ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpo.dashboard import publishing
from hpo.dashboard.attributes import Artifact, DashboardAttributes
from hpo.dashboard.copying import DashboardCopy
from hpo.dashboard.publishing import publish
from hpo.paths import LOG_FILE, RunsDir
from hpo.studies.copying import copy_with_files
from storage.copying import SystemAttr
from storage.optuna_internals import trial_id
from storage.studies import find_study
from storage.study import Study
from tests.dashboard.builders import CHECKPOINT as CONTENT
from tests.dashboard.builders import listed_artifacts

UPLOADED = "0a1b2c3d-0000-4000-8000-123456789abc"


@pytest.fixture
def copied(study: Study, runs_dir: RunsDir, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The copy of a published study, to which the user has added a file, a note, and from which a log was deleted."""
    monkeypatch.setattr(publishing, "_publish_curves", lambda *_: None)  # slow
    publish(study, runs_dir)
    best = trial_id(study.trials()[2])
    (runs_dir.artifacts / UPLOADED).write_bytes(b"uploaded")
    attributes = DashboardAttributes(study.system_attrs())
    attributes.add(Artifact(UPLOADED, "mine.txt", best))
    log = listed_artifacts(study)[LOG_FILE]
    attributes.delete(Artifact(log[1], LOG_FILE, trial_id(study.trials()[4])))
    note = {f"dashboard:{best}:note_ver": 2, f"dashboard:{best}:note_str:0": "by the user"}
    study.set_system_attrs(attributes.changes | note)
    assert copy_with_files(study, study.database, "copied", runs_dir) == 0
    found = find_study(study.database, "copied")
    assert found is not None
    return found


def test_notes_and_files_are_those_of_the_copied_trials(study: Study, copied: Study, runs_dir: RunsDir) -> None:
    attrs, best = copied.system_attrs(), trial_id(copied.trials()[2])
    assert best != trial_id(study.trials()[2])
    assert attrs[f"dashboard:{best}:note_str:0"] == "by the user"
    former, listed = listed_artifacts(study), listed_artifacts(copied)
    assert set(listed) == set(former) == {"epoch-000005.pt", "mine.txt"}
    for filename, (key, artifact) in listed.items():
        assert key == f"dashboard:artifacts:{best}:{artifact}"
        assert artifact.startswith(f"{copied.identity}-")
        assert artifact != former[filename][1]
    assert (runs_dir.artifacts / listed["mine.txt"][1]).read_bytes() == b"uploaded"
    assert (runs_dir.artifacts / listed["epoch-000005.pt"][1]).read_bytes() == CONTENT


def test_publishing_the_copy_adds_nothing_twice_and_nothing_that_was_deleted(copied: Study, runs_dir: RunsDir) -> None:
    before = listed_artifacts(copied)
    publish(copied, runs_dir, always=True)
    assert listed_artifacts(copied) == before
    assert copied.system_attrs()[f"dashboard:{trial_id(copied.trials()[2])}:note_str:0"] == "by the user"


def test_an_artifact_without_a_file_is_left_out_and_counted(tmp_path: Path) -> None:
    copy = DashboardCopy(tmp_path, "a-0123456789ab", "b-ba9876543210")
    artifact = Artifact(UPLOADED, "mine.txt", 1)
    attr = SystemAttr(artifact.key, json.dumps(artifact.metadata))
    assert copy.translate(attr, {1: 2}) is None
    (tmp_path / UPLOADED).symlink_to("/etc/passwd")
    assert copy.translate(attr, {1: 2}) is None, "a link leads elsewhere"
    assert copy.missing == 2
    (tmp_path / UPLOADED).unlink()
    (tmp_path / UPLOADED).touch()
    assert copy.translate(attr, {1: 2}) is not None


@pytest.mark.parametrize(
    "key",
    ["study:metric_names", "dashboard:7:note_ver", "artifacts:../../hpo.db", f"dashboard:artifacts:7:{UPLOADED}"],
)
def test_other_attributes_stay_as_they_are(tmp_path: Path, key: str) -> None:
    attr = SystemAttr(key, '"{\\"artifact_id\\": 1}"')
    assert DashboardCopy(tmp_path, "a-0123456789ab", "b-ba9876543210").translate(attr, {1: 2}) == attr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["1", '"x"', '"[1]"', "null"])
def test_what_another_program_has_changed_is_copied_as_it_is(tmp_path: Path, value: str) -> None:
    translated = DashboardCopy(tmp_path, "a-0123456789ab", "b-ba9876543210").translate(
        SystemAttr(f"artifacts:{UPLOADED}", value), {}
    )
    assert translated is not None
    assert translated.value == value
