from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from benchmarks.postgres import Postgres
from hpo.dashboard import publishing
from hpo.dashboard.attributes import DashboardAttributes
from hpo.dashboard.publishing import PUBLISHED, publish
from hpo.paths import RunsDir
from hpo.report import curves, plotly_figures
from hpo.report.reading import read_results
from hpo.search.checkpoints.files import claim_folder, list_checkpoints
from hpo.space.model import Space
from storage.database import Database, open_database
from storage.optuna_internals import trial_id
from storage.records import DUPLICATE
from storage.run import Run
from storage.studies import find_study, open_study
from storage.study import Study
from tests.dashboard.builders import CHECKPOINT, REASON, listed_artifacts, make_study, space_settings


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the plots: importing plotly and matplotlib takes seconds."""
    monkeypatch.setattr(publishing, "_publish_curves", lambda *_: None)


def noted_trial_ids(study: Study) -> set[int]:
    return {int(key.split(":")[1]) for key in study.system_attrs() if key.endswith(":note_ver")}


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- curves -----------------------------------------------------------------------------------------------------------


def published_plots(study: Study) -> dict[str, Any]:
    """{name of a plot: its plotly JSON}."""
    parts: dict[str, dict[int, str]] = {}
    for key, value in study.system_attrs().items():
        if key.startswith("dashboard:plot_data:"):
            _, _, name, part = key.split(":")
            parts.setdefault(name, {})[int(part)] = value
    return {name: json.loads("".join(found[i] for i in sorted(found))) for name, found in parts.items()}


@pytest.mark.slow
def test_the_plots_have_the_curves_of_the_report_and_are_an_image_too(study: Study, runs_dir: RunsDir) -> None:
    publish(study, runs_dir)
    plots, results = published_plots(study), read_results(study)
    assert set(plots) == {"accuracy", "loss"}
    selection, families = (
        curves.select_trials(results),
        {family.name: family for family in curves.name_families(results)},
    )
    for name, plot in plots.items():
        in_report = plotly_figures.to_graph_object(curves.build_figure(results, families[name], selection, {}))
        assert plot["data"] == json.loads(in_report.to_json())["data"]
        assert plot["layout"]["title"]["text"].endswith("<sub>Solid: validation. Dashed: training.</sub>")
    key, artifact_id = listed_artifacts(study)["curves.png"]
    assert key == f"artifacts:{artifact_id}"
    assert (runs_dir.artifacts / artifact_id).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_metric_of_a_trainable_is_plotted(database: Database, runs_dir: RunsDir) -> None:
    settings = space_settings(metric="f1 <b>", trainable="mine:train", max_epochs=2)
    study = open_study(database, "theirs", direction="maximize", fingerprint="f", settings=settings)
    with Run(study, config_key=str, provenance={}) as run:
        run.enqueue([{"x": 0.5}], {"x": optuna.distributions.FloatDistribution(0.0, 1.0)})
        claim = run.claim()
        assert claim is not None
        for epoch in (1, 2):
            run.report(claim, epoch, {"f1 <b>": epoch / 4, "f1 [b]": 1.0, "rmse": 2.0 / epoch}, epoch / 4)
        run.complete(claim, 0.5)
    publish(study, runs_dir)
    plots = published_plots(study)
    assert [plot["data"][0]["y"] for plot in plots.values()] == [[0.25, 0.5], [1.0, 1.0], [2.0, 1.0]]
    assert list(plots) == ["curves_f1__b_", "curves_f1__b__", "curves_rmse"]
    assert plots["curves_f1__b_"]["layout"]["title"]["text"].startswith("F1 &lt;b&gt; over epochs")
    assert set(listed_artifacts(study)) == {"curves.png"}


@pytest.mark.slow
def test_only_the_best_trials_of_a_large_study_are_plotted_and_only_their_epochs_are_read(
    study: Study, runs_dir: RunsDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "MAX_CURVES", 2)
    monkeypatch.setattr(Study, "metrics", lambda *_: pytest.fail("read all epochs"))
    publish(study, runs_dir)
    assert {line["name"] for line in published_plots(study)["accuracy"]["data"]} == {"#1 lr 0.2", "#2 lr 0.3"}


@pytest.mark.slow
def test_a_study_with_only_failures_has_notes_and_logs_but_no_curves(database: Database, runs_dir: RunsDir) -> None:
    study = open_study(database, "failed", direction="minimize", fingerprint="f", settings={})
    for reason in ("it broke", DUPLICATE):
        failed = optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"fail_reason": reason})
        study.optuna_study.add_trial(failed)
    publish(study, runs_dir)
    assert set(listed_artifacts(study)) == {"log.txt"}
    assert noted_trial_ids(study) == {1}
    assert published_plots(study) == {}


@pytest.mark.slow
def test_publishing_again_changes_nothing(study: Study, runs_dir: RunsDir) -> None:
    publish(study, runs_dir)
    attrs, names = study.system_attrs(), file_names(runs_dir.artifacts)
    publish(study, runs_dir, always=True)
    assert study.system_attrs() == attrs
    assert file_names(runs_dir.artifacts) == names


@pytest.mark.slow
def test_edits_and_deletions_of_the_user_are_kept(study: Study, runs_dir: RunsDir) -> None:
    publish(study, runs_dir)
    removed = {key: json.dumps(None) for key, _ in listed_artifacts(study).values()}
    edited = {"dashboard:1:note_str:0": "an edited note", "dashboard:1:note_ver": 2}
    assert len(removed) == 3
    study.set_system_attrs(removed | edited)
    publish(study, runs_dir, always=True)
    attrs = study.system_attrs()
    assert {key: attrs[key] for key in removed | edited} == removed | edited


def test_a_note_that_the_user_writes_while_plots_are_drawn_is_kept(
    study: Study, runs_dir: RunsDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {"dashboard:1:note_ver": 1, "dashboard:1:note_str:0": "by the user"}
    monkeypatch.setattr(publishing, "_publish_curves", lambda *_: study.set_system_attrs(written))
    publish(study, runs_dir)
    attrs = study.system_attrs()
    assert {key: value for key, value in attrs.items() if key.startswith("dashboard:1:note")} == written
    assert noted_trial_ids(study) == {1, 2, 3, 4, 5}


@pytest.mark.slow
@pytest.mark.postgres
def test_publishing_works_on_postgresql(postgres: Postgres, runs_dir: RunsDir) -> None:
    with open_database(postgres.create_database("dashboard")) as database:
        study = make_study(database, runs_dir)
        publish(study, runs_dir)
        publish(study, runs_dir, always=True)
        assert set(listed_artifacts(study)) == {"curves.png", "epoch-000005.pt", "log.txt"}
        assert study.system_attrs()[PUBLISHED] == 5


# --- checkpoints and logs ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_curves")
def test_the_best_checkpoint_and_the_log_of_a_failed_trial_are_artifacts(study: Study, runs_dir: RunsDir) -> None:
    publish(study, runs_dir)
    artifacts = listed_artifacts(study)
    assert set(artifacts) == {"epoch-000005.pt", "log.txt"}
    assert file_names(runs_dir.artifacts) == sorted(artifact_id for _, artifact_id in artifacts.values())
    key, artifact_id = artifacts["epoch-000005.pt"]
    assert key.startswith("dashboard:artifacts:3:"), "the trial_id of trial 2"
    assert (runs_dir.artifacts / artifact_id).read_bytes() == CHECKPOINT
    original = runs_dir.trial(study.unique_name, 2) / "epoch-000005.pt"
    assert (runs_dir.artifacts / artifact_id).samefile(original), "a link, not a copy"
    key, artifact_id = artifacts["log.txt"]
    assert key.startswith("dashboard:artifacts:5:")
    log = (runs_dir.artifacts / artifact_id).read_text()
    for part in (REASON, "Traceback (most recent call last)", "printed by the script"):
        assert part in log


@pytest.mark.usefixtures("no_curves")
def test_the_checkpoint_of_another_configuration_is_not_published(study: Study, runs_dir: RunsDir) -> None:
    claim_folder(runs_dir.trial(study.unique_name, 2), "another key")
    publish(study, runs_dir)
    assert set(listed_artifacts(study)) == {"log.txt"}


@pytest.mark.usefixtures("no_curves")
def test_a_checkpoint_is_copied_where_the_file_system_has_no_hard_links(
    study: Study, runs_dir: RunsDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", fail)
    publish(study, runs_dir)
    _, artifact_id = listed_artifacts(study)["epoch-000005.pt"]
    assert (runs_dir.artifacts / artifact_id).read_bytes() == CHECKPOINT
    assert (runs_dir.artifacts / artifact_id).stat().st_nlink == 1


@pytest.mark.usefixtures("no_curves")
def test_a_file_that_an_interrupted_attempt_left_is_replaced(study: Study, runs_dir: RunsDir) -> None:
    artifact = publishing._artifact(study, DashboardAttributes({}), "epoch-000005.pt", 3, role="checkpoint")
    runs_dir.artifacts.mkdir()
    (runs_dir.artifacts / artifact.artifact_id).write_bytes(b"left over")
    publish(study, runs_dir)
    assert (runs_dir.artifacts / artifact.artifact_id).read_bytes() == CHECKPOINT


@pytest.mark.usefixtures("no_curves")
def test_the_end_of_a_long_log_is_published(study: Study, runs_dir: RunsDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "MAX_LOG_BYTES", 10)
    publish(study, runs_dir)
    _, artifact_id = listed_artifacts(study)["log.txt"]
    assert (runs_dir.artifacts / artifact_id).read_text().endswith("Its output:\n\nthe script\n")


@pytest.mark.usefixtures("no_curves")
def test_the_checkpoint_of_a_better_trial_replaces_the_former_best(study: Study, runs_dir: RunsDir) -> None:
    publish(study, runs_dir)
    _, former_id = listed_artifacts(study)["epoch-000005.pt"]
    study.optuna_study.add_trial(optuna.trial.create_trial(value=0.99, user_attrs={"fail_reason": ""}))
    folder = runs_dir.trial(study.unique_name, 5)
    folder.mkdir()
    (folder / "epoch-000007.pt").write_bytes(b"better")
    publish(study, runs_dir)
    artifacts = listed_artifacts(study)
    assert "epoch-000005.pt" not in artifacts
    assert not (runs_dir.artifacts / former_id).exists()
    assert (runs_dir.artifacts / artifacts["epoch-000007.pt"][1]).read_bytes() == b"better"
    original = runs_dir.trial(study.unique_name, 2) / "epoch-000005.pt"
    assert original.read_bytes() == CHECKPOINT, "only the link is deleted"


@pytest.mark.usefixtures("no_curves")
def test_a_best_checkpoint_that_was_not_kept_is_a_warning(
    study: Study, runs_dir: RunsDir, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.optuna_study.set_user_attr("hpo:settings", study.settings | {"checkpoints": {"keep": "none"}})
    folder = runs_dir.trial(study.unique_name, 2)
    (folder / "epoch-000005.pt").unlink()
    with caplog.at_level(logging.WARNING, "hpo.dashboard"):
        publish(study, runs_dir, always=True)
        assert caplog.messages == [], "it was trained on another machine"
        claim_folder(folder, Space.from_settings(study.settings).config_key(study.optuna_study.best_params))
        publish(study, runs_dir, always=True)
        expected = "the dashboard of search has no checkpoint of the best trial: checkpoints.keep is none"
        assert caplog.messages == [expected]
        better = optuna.trial.create_trial(value=0.99)
        monkeypatch.setattr(publishing, "_publish_curves", lambda *_: study.optuna_study.add_trial(better))
        publish(study, runs_dir, always=True)
    assert caplog.messages == [expected], "another trial has become the best meanwhile"


@pytest.mark.usefixtures("no_curves")
def test_a_best_checkpoint_that_is_deleted_before_it_is_linked_does_not_prevent_notes(
    study: Study, runs_dir: RunsDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def list_then_delete(folder: Path) -> list[Path]:
        checkpoints = list_checkpoints(folder)
        for path in checkpoints:
            path.unlink()
        return checkpoints

    monkeypatch.setattr(publishing, "list_checkpoints", list_then_delete)
    publish(study, runs_dir)
    assert set(listed_artifacts(study)) == {"log.txt"}
    assert noted_trial_ids(study) == {1, 2, 3, 4, 5}


@pytest.mark.usefixtures("no_curves")
def test_a_script_that_saves_no_checkpoints_is_no_reason_for_a_warning(
    study: Study, runs_dir: RunsDir, caplog: pytest.LogCaptureFixture
) -> None:
    settings = study.settings | {"command": "python train.py --lr {lr}"}
    study.optuna_study.set_user_attr("hpo:settings", settings)
    folder = runs_dir.trial(study.unique_name, 2)
    (folder / "epoch-000005.pt").unlink()
    claim_folder(folder, Space.from_settings(settings).config_key(study.optuna_study.best_params))
    with caplog.at_level(logging.WARNING, "hpo.dashboard"):
        publish(study, runs_dir, always=True)
    assert caplog.messages == []


@pytest.mark.usefixtures("no_curves")
def test_an_artifact_is_named_after_its_study_and_one_of_an_older_version_keeps_its_name(
    study: Study, runs_dir: RunsDir
) -> None:
    publish(study, runs_dir)
    listed = listed_artifacts(study)
    for key, artifact_id in listed.values():
        assert artifact_id.startswith(f"{study.attrs['hpo:id']}-")
        metadata = json.loads(study.system_attrs()[key])
        older = artifact_id.partition("-")[2]  # the id that it had
        study.set_system_attrs(
            {
                key.replace(artifact_id, older): json.dumps(metadata | {"artifact_id": older}),
                key: json.dumps(None),
            }
        )
    with study.database.engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM study_system_attributes WHERE value_json = '\"null\"'"))
    publish(study, runs_dir, always=True)
    assert {name: artifact_id for name, (_, artifact_id) in listed_artifacts(study).items()} == {
        name: artifact_id.partition("-")[2] for name, (_, artifact_id) in listed.items()
    }


# --- notes ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_curves")
def test_every_trial_of_a_small_study_has_a_note_with_the_settings_of_the_study(
    study: Study, runs_dir: RunsDir
) -> None:
    publish(study, runs_dir)
    assert noted_trial_ids(study) == {1, 2, 3, 4, 5}
    note = study.system_attrs()["dashboard:3:note_str:0"]
    assert "**COMPLETE** after 5 of 5 epochs" in note
    assert "`hpo.train:train`, seed 7" in note


@pytest.mark.usefixtures("no_curves")
def test_settings_of_another_version_do_not_prevent_notes(study: Study, runs_dir: RunsDir) -> None:
    study.optuna_study.set_user_attr("hpo:settings", study.settings | {"key_of_a_later_version": 1})
    publish(study, runs_dir)
    assert "**COMPLETE** after 5 of ? epochs" in study.system_attrs()["dashboard:3:note_str:0"]


@pytest.mark.usefixtures("no_curves")
def test_only_the_best_and_the_failed_trials_of_a_large_study_have_notes(
    study: Study, runs_dir: RunsDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "MAX_NOTES", 12)
    for i in range(20):
        study.optuna_study.add_trial(optuna.trial.create_trial(value=i / 1000))
    publish(study, runs_dir)
    noted = noted_trial_ids(study)
    complete = [trial for trial in study.trials() if trial.state == TrialState.COMPLETE]
    best = sorted(complete, key=lambda trial: -(trial.value or 0))[:11]
    assert noted == {5} | {trial_id(trial) for trial in best}
    study.optuna_study.add_trial(optuna.trial.create_trial(value=0.9999))
    study.optuna_study.add_trial(optuna.trial.create_trial(value=0.0001))
    publish(study, runs_dir)
    new_best = trial_id(study.trials()[25])
    assert noted_trial_ids(study) - noted == {new_best}, "the best trial has a note even beyond MAX_NOTES"


# --- when -------------------------------------------------------------------------------------------------------------


def test_nothing_is_published_until_another_trial_ends(
    study: Study, runs_dir: RunsDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[str] = []
    monkeypatch.setattr(publishing, "_publish", lambda study, _: published.append(study.name))
    publish(study, runs_dir)
    publish(study, runs_dir)
    assert len(published) == 1
    publish(study, runs_dir, always=True)
    assert len(published) == 2
    study.optuna_study.add_trial(optuna.trial.create_trial(value=0.5))
    publish(study, runs_dir)
    assert len(published) == 3


@pytest.mark.usefixtures("no_curves")
def test_an_error_is_logged_and_the_next_attempt_succeeds(
    study: Study, runs_dir: RunsDir, caplog: pytest.LogCaptureFixture
) -> None:
    runs_dir.artifacts.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "hpo"):
        publish(study, runs_dir)
    assert "could not update the plots, notes and artifacts of search in the dashboard: FileExistsError" in caplog.text
    runs_dir.artifacts.unlink()
    publish(study, runs_dir)
    assert len(listed_artifacts(study)) == 2


def test_a_study_of_another_program_is_left_alone(database: Database, runs_dir: RunsDir) -> None:
    theirs = optuna.create_study(storage=database.optuna_storage, study_name="theirs")
    theirs.add_trial(optuna.trial.create_trial(value=1.0))
    study = find_study(database, "theirs")
    assert study is not None
    before = study.system_attrs()
    publish(study, runs_dir, always=True)
    assert study.system_attrs() == before
    assert not runs_dir.artifacts.exists()
