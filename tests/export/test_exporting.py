"""The exported folder: it computes what the trial's network computed, without this project."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
import torch
from click.testing import CliRunner
from optuna.trial import FrozenTrial, TrialState
from PIL import Image
from safetensors.torch import load_file

from hpo.errors import SettingError
from hpo.export import exporting
from hpo.export.exporting import FILES, ExportedModel, export_model
from hpo.export.program import Classifier
from hpo.paths import RunsDir
from hpo.run import cli
from hpo.search.checkpoints.bucket import BucketStudy, upload_left
from hpo.search.checkpoints.files import Checkpoint, claim_folder, load_checkpoint
from hpo.search.worker import run_trial
from hpo.space.model import Space
from hpo.train.data import load
from hpo.train.network import build_model
from storage.database import open_database
from storage.imports import ImportedTrial, Origin, import_trials
from storage.optuna_internals import DraftStorage, study_id, trial_id
from storage.optuna_tables import write_attrs
from storage.run import Run
from storage.studies import find_study, open_study
from storage.study import Study
from tests.factories import toy_space, trial_spec

DATA: dict[str, Any] = {"dataset": "fashion_mnist_sample", "train_samples": 32, "val_samples": 50}
VERSIONS = {"code": "now", "packages": {"torch": torch.__version__}}
# Packages that the user of an export may not have installed.
BLOCKED = "hpo", "storage", "torchvision", "safetensors", "optuna"


pytestmark = pytest.mark.usefixtures("one_thread", "few_test_images")


def grid_space(folder: Path, **changes: Any) -> Space:
    """A grid of three trials of the default trainable."""
    written: dict[str, Any] = {
        "trainable": "hpo.train:train",
        "metric": "val_accuracy",
        "max_epochs": 2,
        "seed": 3,
        "data": DATA,
        "parameters": {"batch_size": [16, 32, 8], "lr": 0.003, "precision": "bf16"},
    }
    return toy_space(folder, **(written | changes))


@pytest.fixture(scope="module")
def searched(one_thread: None, few_test_images: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a search, see `search_in`."""
    folder = tmp_path_factory.mktemp("export")
    search_in(folder, grid_space(folder))
    return folder


def search_in(folder: Path, space: Space) -> None:
    """Store a search: trial 0 COMPLETE with its checkpoint, 1 COMPLETE and worse without a checkpoint, 2 FAIL."""
    provenance = {"machine": "node-7", "code": "then", "data_sha256": load(**space.data.model_dump()).sha256}
    with open_database(f"sqlite:///{folder}/hpo.db") as database:
        study = open_study(database, **space.study_options)
        with Run(study, config_key=space.config_key, provenance=provenance) as run:
            run.enqueue(space.grid_points(), space.distributions())
            best, worse, failed = run.claim(), run.claim(), run.claim()
            assert best is not None
            assert worse is not None
            assert failed is not None
            spec = trial_spec(
                folder,
                trainable=space.trainable,
                key=space.config_key(best.params),
                params=best.params,
                data=space.trainable_data(folder),
                seed=space.seed,
                max_epochs=space.max_epochs,
                checkpoint_every=2,  # only the last epoch: a checkpoint is 134 MB
                replicates=space.replicates,
            )
            spec = replace(spec, folder=str(RunsDir(folder).trial(study.unique_name, 0)))
            for report in itertools.islice(run_trial(spec), 2):
                assert not report.failure
                if report.provenance is not None:
                    run.record(best, {}, report.provenance)
                run.report(best, report.epoch, report.metrics, report.metrics[space.metric])
            run.complete(best, report.metrics[space.metric])
            run.complete(worse, 0.0)
            run.fail(failed, "its reason")


def open_copy(folder: Path) -> Study:
    study = find_study(open_database(f"sqlite:///{folder}/hpo.db"), "toy")
    assert study is not None
    return study


@pytest.fixture
def study(searched: Path, tmp_path: Path) -> Iterator[Study]:
    """A copy of the study that a test may change, with its checkpoints in `tmp_path`."""
    shutil.copytree(searched / "checkpoints", tmp_path / "checkpoints", copy_function=os.link)
    shutil.copy(searched / "hpo.db", tmp_path)
    study = open_copy(tmp_path)
    yield study
    study.database.close()


def export(study: Study, runs_dir: Path, number: int | None = None, output: Path | None = None) -> ExportedModel:
    return export_model(study, number, runs_dir=RunsDir(runs_dir), data_dir=runs_dir, output=output, versions=VERSIONS)


@pytest.fixture
def without_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export takes seconds: leave it out where the test is about something else."""

    def write_nothing(classifier: Classifier, path: Path, examples: torch.Tensor) -> Classifier:
        path.touch()
        return classifier.eval()

    monkeypatch.setattr(exporting, "write_program", write_nothing)


@pytest.fixture(scope="module")
def folder(searched: Path) -> Path:
    """An export of the best trial, for tests that do not change it."""
    study = open_copy(searched)
    exported = export(study, searched)
    study.database.close()
    assert exported.remarks == []
    return exported.folder


@pytest.fixture(scope="module")
def network(searched: Path) -> torch.nn.Module:
    """The network of the best trial, from its checkpoint."""
    (checkpoints,) = searched.glob("checkpoints/toy-*/0")
    checkpoint = load_checkpoint(checkpoints, json.loads((checkpoints / "configuration.json").read_bytes())["key"])
    assert checkpoint is not None
    model = build_model()
    model.load_state_dict(checkpoint.state["model"])
    return model.eval()


def as_floats(images: torch.Tensor) -> torch.Tensor:
    return images.unsqueeze(1).float() / 255


# --- what is exported ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_folder_has_its_files_and_no_leftovers(folder: Path) -> None:
    assert folder.name == "toy-0"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["toy-0"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_the_program_computes_what_the_network_computes(folder: Path, network: torch.nn.Module, count: int) -> None:
    images = load(**DATA).test.images[:count]
    program = torch.export.load(folder / "model.pt2").module()
    with torch.no_grad():
        logits = program(images)
        torch.testing.assert_close(logits, network(as_floats(images)), rtol=1e-5, atol=1e-5)
    assert logits.shape == (count, 10)


@pytest.mark.slow
def test_the_code_of_the_card_loads_the_program_and_the_weights(
    folder: Path, network: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    program_code, weights_code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(weights_code, names)
    images = load(**DATA).test.images[:20]
    with torch.no_grad():
        torch.testing.assert_close(names["model"](as_floats(images)), network(as_floats(images)))
    names = {}
    exec(program_code, names)
    assert names["logits"].shape == (5, 10)


@pytest.mark.slow
def test_the_script_classifies_an_image_where_the_project_is_not_installed(
    folder: Path, network: torch.nn.Module, tmp_path: Path
) -> None:
    images = load(**DATA).test.images[:1]
    Image.fromarray(images[0].numpy()).save(tmp_path / "garment.png")
    block = "".join(f"sys.modules[{name!r}] = None; " for name in BLOCKED)
    code = f"import runpy, sys; {block}sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(moved / "classify.py"), "garment.png"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        scores = network(as_floats(images)).softmax(1)[0]
    classes = json.loads((folder / "classes.json").read_text())
    expected = [f"{score:.4f} {classes[i]}" for score, i in zip(*scores.topk(3), strict=True)]
    assert done.stdout.splitlines() == expected


@pytest.mark.slow
def test_the_card_has_the_scores_the_confusions_and_the_training(folder: Path, network: torch.nn.Module) -> None:
    facts, card = json.loads((folder / "export.json").read_text()), (folder / "README.md").read_text()
    dataset = load(**DATA)
    with torch.no_grad():
        answers = network(as_floats(dataset.test.images)).argmax(1)
    labels = dataset.test.labels
    confusion = [[int(((labels == label) & (answers == answer)).sum()) for answer in range(10)] for label in range(10)]
    assert facts["confusion"] == confusion
    right = sum(confusion[i][i] for i in range(10))
    assert facts["accuracy"]["test_accuracy"] == right / len(labels)
    # Trained and scored in bf16: the same model gets the same scores.
    assert facts["as_trained"] == {"how": "in bf16 on the CPU", **facts["stored"]}
    assert "Scored in bf16 on the CPU, as in training, they are " in card
    assert f"| test accuracy | {right / len(labels):.4f} of 100 images" in card
    for name, row in zip(facts["classes"], confusion, strict=True):
        own = row[facts["classes"].index(name)]
        assert f"| {name} | {own / sum(row):.4f} | {' | '.join(map(str, row))} |" in card
    for part in (dataset.sha256, "| batch_size | 16 |", "hpo then", "hpo replay toy 0", "2 epochs on 32 images"):
        assert part in card
    assert "**Note**" not in card
    assert "None" not in card


# --- what differs from storage ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_differences_from_storage_are_remarks(study: Study, tmp_path: Path, without_program: None) -> None:
    stored = study.metrics()[0][2]["test_accuracy"]
    with study.database.engine.begin() as connection:
        change = "UPDATE hpo_metrics SET value = value - 0.02 WHERE name = 'test_accuracy'"
        connection.exec_driver_sql(change)
        connection.exec_driver_sql('UPDATE hpo_runs SET provenance = \'{"data_sha256": "other"}\'')
    exported = export(study, tmp_path)
    of_data, of_score = exported.remarks
    assert of_data.endswith("differs from the training data (other)")
    assert of_score.startswith(
        f"test_accuracy is {stored:.4f} here, in bf16 on the CPU, and was {stored - 0.02:.4f} on "
    )
    assert of_score.endswith(": 2 images differ")
    card = (exported.folder / "README.md").read_text()
    assert all(f"\n\n**Note**: {remark}.\n" in card for remark in exported.remarks)


@pytest.mark.slow
def test_of_several_seeds_the_model_of_the_first_is_exported(tmp_path: Path, without_program: None) -> None:
    parameters = {"batch_size": [16, 32, 8], "lr": 0.003, "width": 0.125, "precision": "fp32"}
    search_in(tmp_path, grid_space(tmp_path, parameters=parameters, replicates=2))
    study = open_copy(tmp_path)
    with study.database:
        exported = export(study, tmp_path)
        mean = study.metrics()[0][2]["test_accuracy"]
        first, second = (each["metrics"]["test_accuracy"] for each in study.provenance(0)["seeds"])
    assert exported.remarks == ["it is the model of seed 3, the first of 2 that were trained"]
    facts = json.loads((exported.folder / "export.json").read_text())
    assert facts["seed"] == 3
    assert facts["stored"]["test_accuracy"] == pytest.approx(first)
    assert mean == pytest.approx((first + second) / 2)
    assert first != second, "otherwise this test shows nothing"


# --- what cannot be exported --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (2, "trial 2 of study toy is FAIL; these are COMPLETE: 0, 1"),
        (9, "trial 9 of study toy does not exist; these are COMPLETE: 0, 1"),
        (1, r"no checkpoint of trial 1 in .*/1\. It was trained on node-7: export it there"),
    ],
)
def test_a_trial_that_cannot_be_exported_is_an_error(study: Study, tmp_path: Path, number: int, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        export(study, tmp_path, number)
    assert not (tmp_path / "exports").exists()


@pytest.mark.slow
def test_a_result_of_an_earlier_study_is_not_exported(study: Study, tmp_path: Path) -> None:
    with study.database.transaction() as connection:
        write_attrs(connection, [(2, {"reused_from": {"study": "grid", "trial": 3, "id": "0123456789ab"}})])
    with pytest.raises(SettingError, match=r"trained as trial 3 of study grid.*trial.*itself: 0$"):
        export(find_study(study.database, "toy") or study, tmp_path, 1)


@pytest.mark.slow
def test_a_trial_from_which_the_sampler_alone_learns_is_not_the_best_one(
    study: Study, tmp_path: Path, without_program: None
) -> None:
    origin = Origin("grid", "0123456789ab", 3)
    first = study.trials()[0]
    learned = ImportedTrial(origin, first.params, first.distributions, TrialState.COMPLETE, 2.0)
    import_trials(study, [learned])
    assert study.optuna_study.best_trial.number == 3
    assert export(study, tmp_path).folder.name == "toy-0"
    with pytest.raises(SettingError, match=r"trained as trial 3 of study grid"):
        export(study, tmp_path, 3)


def test_a_study_with_nothing_but_trials_of_others_has_no_model(tmp_path: Path) -> None:
    space = grid_space(tmp_path)
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        study = open_study(database, **space.study_options)
        params = next(iter(space.grid_points()))
        origin = Origin("grid", "0123456789ab", 3)
        import_trials(study, [ImportedTrial(origin, params, space.distributions(), TrialState.COMPLETE, 0.5)])
        with pytest.raises(SettingError, match="no COMPLETE trial to export"):
            export(study, tmp_path)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_read_is_an_error(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(
        SettingError, match=r"cannot read the checkpoint of trial 0 in .*: \[Errno 5\] Input/output error"
    ):
        export(study, tmp_path)


@pytest.mark.slow
def test_the_checkpoint_of_another_configuration_is_not_exported(study: Study, tmp_path: Path) -> None:
    claim_folder(RunsDir(tmp_path).trial(study.unique_name, 1), "another key")
    with pytest.raises(SettingError, match=r"the files in .*/1 are of another configuration than trial 1"):
        export(study, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.slow
def test_a_checkpoint_that_only_the_bucket_has_is_exported(
    study: Study, tmp_path: Path, bucket_url: str, without_program: None
) -> None:
    folder = RunsDir(tmp_path).checkpoints(study.unique_name)
    in_bucket = BucketStudy(f"{bucket_url}/{study.unique_name}")
    assert upload_left(folder, in_bucket, interval=0, wait_seconds=0.0) == []
    shutil.rmtree(folder)
    runs_dir = RunsDir(tmp_path, bucket_url=bucket_url)

    exported = export_model(study, None, runs_dir=runs_dir, data_dir=tmp_path, output=None, versions=VERSIONS)

    assert exported.remarks == []
    assert (exported.folder / "model.safetensors").exists()


def test_a_checkpoint_that_was_not_kept_is_an_error_that_says_so(study: Study, tmp_path: Path) -> None:
    key = grid_space(tmp_path).config_key(study.trials()[1].params)
    claim_folder(RunsDir(tmp_path).trial(study.unique_name, 1), key)
    with pytest.raises(SettingError) as error:
        export(study, tmp_path, 1)
    assert str(error.value) == (
        "trial 1 has no checkpoint any more: this search keeps those of the best 3 trials (checkpoints.keep is best 3). "
        "With `checkpoints: {keep: all}` in the search space, trials keep theirs from then on. Trials with a checkpoint: 0"
    )


@pytest.mark.slow
def test_a_trial_that_becomes_the_best_while_the_former_loses_its_checkpoint_is_exported(
    study: Study, tmp_path: Path, without_program: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def set_value(trial: FrozenTrial, value: float) -> None:
        with study.database.engine.begin() as connection:
            connection.execute(sa.text(f"UPDATE trial_values SET value = {value} WHERE trial_id = {trial_id(trial)}"))

    first, second, *_ = study.trials()
    set_value(first, -1.0)
    claim_folder(RunsDir(tmp_path).trial(study.unique_name, 1), grid_space(tmp_path).config_key(second.params))
    with pytest.raises(SettingError, match="trial 1 has no checkpoint any more"):
        export(study, tmp_path)
    load_checkpoint = exporting._load_checkpoint

    def load(*arguments: Any) -> Checkpoint:
        set_value(first, 1.0)
        return load_checkpoint(*arguments)

    monkeypatch.setattr(exporting, "_load_checkpoint", load)
    assert json.loads((export(study, tmp_path).folder / "export.json").read_text())["trial"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainable": "mine:train"}, r"was trained by mine:train: .* What it saved is in .*/0$"),
        ({"command": "python mine.py --lr {lr}"}, r"was trained by python mine\.py --lr \{lr\}: "),
    ],
)
def test_another_trainable_is_an_error(study: Study, tmp_path: Path, change: dict[str, str], message: str) -> None:
    study.optuna_study.set_user_attr("hpo:settings", study.settings | change)
    with pytest.raises(SettingError, match=message):
        export(study, tmp_path)
    assert not (tmp_path / "exports").exists()


def test_a_study_without_a_completed_trial_is_an_error(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        study = open_study(database, **grid_space(tmp_path).study_options)
        with pytest.raises(SettingError, match="no COMPLETE trial to export"):
            export(study, tmp_path)


def test_a_study_of_another_program_is_an_error(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        one, two = (
            Study(database, study.study_name, study_id(study), study, DraftStorage(database.optuna_storage))
            for study in (
                optuna.create_study(storage=database.optuna_storage, study_name="one", direction="maximize"),
                optuna.create_study(
                    storage=database.optuna_storage, study_name="two", directions=["maximize", "minimize"]
                ),
            )
        )
        one.optuna_study.add_trial(optuna.trial.create_trial(value=1.0))
        for values in ([1.0, 1.0], [0.5, 0.5], [0.2, 0.9]):
            two.optuna_study.add_trial(optuna.trial.create_trial(values=values))
        with pytest.raises(SettingError, match="study one was not created by hpo"):
            export(one, tmp_path)
        with pytest.raises(SettingError) as error:
            export(two, tmp_path)
        assert str(error.value).splitlines() == [
            "study two has several objectives, so no single trial is the best: choose one of the Pareto front",
            "  --trial 0: objective 0 1, objective 1 1",
            "  --trial 1: objective 0 0.5, objective 1 0.5",
        ]


# --- the output folder --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_folder_with_other_files_is_never_replaced(study: Study, tmp_path: Path) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(SettingError, match=r"mine is not an earlier export \(thesis\.tex\)"):
        export(study, tmp_path, output=output)
    for name in FILES:
        (output / name).touch()
    with pytest.raises(SettingError, match=r"\(thesis\.tex\)"):
        export(study, tmp_path, output=output)
    (output / "thesis.tex").rename(tmp_path / "file")
    (output / "export.json").unlink()
    with pytest.raises(SettingError, match=r"\(no export\.json\)"):
        export(study, tmp_path, output=output)
    with pytest.raises(SettingError, match=r"\(file\)"):
        export(study, tmp_path, output=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "years of work"


@pytest.mark.slow
def test_an_earlier_export_is_replaced_whole_or_not_at_all(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_program: None
) -> None:
    output = tmp_path / "out" / "model"
    output.mkdir(parents=True)
    (output / "export.json").touch()
    (output / "README.md").write_text("the earlier one")

    def fail(_facts: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "render_card", fail)
        with pytest.raises(SettingError, match=r"cannot write the export to .*/model: No space left on device"):
            export(study, tmp_path, output=output)
    assert (output / "README.md").read_text() == "the earlier one"
    assert [path.name for path in output.parent.iterdir()] == ["model"]
    export(study, tmp_path, output=output)
    assert (
        (output / "README.md").read_text().startswith("# ResNet-18 on fashion_mnist_sample: trial 0 of the search toy")
    )
    assert sorted(path.name for path in output.iterdir()) == sorted(FILES)
    assert [path.name for path in output.parent.iterdir()] == ["model"]


@pytest.mark.slow
def test_the_command_line_exports_the_best_trial(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_program: None
) -> None:
    (tmp_path / "runs").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    storage = f"sqlite:///{tmp_path}/hpo.db"
    arguments = ["export", "toy", "--storage", storage, "--output", "model", "--data-dir", "none"]
    result = CliRunner().invoke(cli, arguments, standalone_mode=False, catch_exceptions=False)
    assert result.return_value == 0
    assert f"{tmp_path}/model: README.md describes it" in result.output
    assert json.loads((tmp_path / "model" / "export.json").read_text())["trial"] == 0


@pytest.mark.slow
def test_a_recipe_is_exported_as_it_was_scored(tmp_path: Path, without_program: None) -> None:
    """Averaged weights, mirrored images, another width, no validation images."""
    recipe = {"ema": 0.5, "tta": True, "width": 0.25, "precision": "fp32"}
    space = grid_space(
        tmp_path,
        metric="train_accuracy",
        data={**DATA, "val_samples": 0},
        parameters={"batch_size": [16, 32, 8], "lr": 0.003, **recipe},
    )
    search_in(tmp_path, space)
    study = open_copy(tmp_path)
    exported = export(study, tmp_path)
    study.database.close()
    facts = json.loads((exported.folder / "export.json").read_text())
    assert exported.remarks == []  # among others: the scores are the stored ones
    assert set(facts["stored"]) == {"test_accuracy"}
    assert facts["accuracy"] == facts["stored"]
    weights = load_file(exported.folder / "model.safetensors")
    build_model(width=0.25).load_state_dict(weights)
    (checkpoints,) = tmp_path.glob("checkpoints/toy-*/0")
    checkpoint = load_checkpoint(checkpoints, json.loads((checkpoints / "configuration.json").read_bytes())["key"])
    assert checkpoint is not None
    assert not torch.equal(weights["fc.weight"], checkpoint.state["model"]["fc.weight"])
