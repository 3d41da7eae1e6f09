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
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from PIL import Image

from hpo import export as export_room
from hpo import run as command_line
from hpo.errors import SettingError
from hpo.export import FILES, FIRST_LAYERS, export
from hpo.search.checkpoints import load_checkpoint
from hpo.search.worker import TrialSpec, run_trial
from hpo.train.data import load
from hpo.train.loop import TrainParams
from hpo.train.network import STEMS, build_model
from storage.database import open_database
from storage.run import Run
from storage.studies import Study, open_study

DATA = {"dataset": "fashion_mnist_sample", "train_samples": 128, "val_samples": 50}
SETTINGS = {"metric": "val_accuracy", "trainable": "hpo.train:train", "seed": 3, "max_epochs": 2, "data": DATA}
VERSIONS = {"code": "now", "packages": {"torch": torch.__version__}}
# Of what the user of an export has not installed.
BLOCKED = "hpo", "storage", "torchvision", "safetensors", "optuna"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def searched(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves: trial 0 COMPLETE with its checkpoint, trial 1 COMPLETE and worse without one, trial 2 FAIL."""
    folder = tmp_path_factory.mktemp("export")
    with open_database(f"sqlite:///{folder}/hpo.db") as database:
        study = open_study(database, "search", direction="maximize", fingerprint="f", settings=SETTINGS)
        points = [{"batch_size": size, "lr": 0.003, "precision": "bf16"} for size in (32, 64, 128)]
        distributions = {
            name: optuna.distributions.CategoricalDistribution([p[name] for p in points]) for name in points[0]
        }
        provenance = {"machine": "node-7", "code": "then", "data_sha256": load(**DATA).sha256}
        with Run(study, config_key=str, provenance=provenance) as run:
            run.enqueue(points, distributions)
            claims = [run.claim() for _ in points]
            best, worse, failed = claims
            assert best is not None
            assert worse is not None
            assert failed is not None
            assignment = TrialSpec(
                trainable=SETTINGS["trainable"],
                command=None,
                params=best.params,
                data={**DATA, "data_dir": str(folder)},
                seed=3,
                max_epochs=2,
                stored_epoch=0,
                folder=str(folder / "checkpoints" / study.unique_name / "0"),
                checkpoint_every=2,  # only the last: each is 134 MB
                device="cpu",
                threads=1,
                timeout=None,
            )
            for message in itertools.islice(run_trial(assignment), 2):  # who reads them stops at the last epoch
                assert not message.failure
                run.report(best, message.epoch, message.metrics, message.metrics["val_accuracy"])
            run.complete(best, message.metrics["val_accuracy"])
            run.complete(worse, 0.0)
            run.fail(failed, "its reason")
    return folder


@pytest.fixture
def study(searched: Path, tmp_path: Path) -> Iterator[Study]:
    """The study, to be changed at will, with the runs' folder in `tmp_path`."""
    shutil.copytree(
        searched / "checkpoints", tmp_path / "checkpoints", copy_function=os.link
    )  # nobody writes into them
    shutil.copy(searched / "hpo.db", tmp_path)
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        found = optuna.load_study(study_name="search", storage=database.optuna_storage)
        yield Study(database, "search", found._study_id, found)


def exported(
    study: Study, runs_dir: Path, number: int | None = None, output: Path | None = None
) -> tuple[Path, list[str]]:
    return export(study, number, runs_dir=runs_dir, data_dir=runs_dir, output=output, versions=VERSIONS)


@pytest.fixture(scope="module")
def folder(searched: Path) -> Path:
    """An export of the best trial, for the tests that only look at it."""
    with open_database(f"sqlite:///{searched}/hpo.db") as database:
        found = optuna.load_study(study_name="search", storage=database.optuna_storage)
        path, remarks = exported(Study(database, "search", found._study_id, found), searched)
    assert remarks == []
    return path


@pytest.fixture(scope="module")
def network(searched: Path) -> torch.nn.Module:
    """The network of the best trial as the training left it."""
    (checkpoints,) = searched.glob("checkpoints/search-*/0")
    checkpoint = load_checkpoint(checkpoints)
    assert checkpoint is not None
    model = build_model()
    model.load_state_dict(checkpoint.state["model"])
    return model.eval()


def as_floats(images: torch.Tensor) -> torch.Tensor:
    return images.unsqueeze(1).float() / 255


def test_the_folder_holds_the_files_that_it_should(folder: Path) -> None:
    assert folder.name == "search-0"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["search-0"]


@pytest.mark.parametrize("count", [1, 2, 3, 64, 101])
def test_the_program_computes_what_the_network_computes(folder: Path, network: torch.nn.Module, count: int) -> None:
    images = load(**DATA).test.images[:count]
    program = torch.export.load(folder / "model.pt2").module()
    with torch.no_grad():
        logits = program(images)
        torch.testing.assert_close(logits, network(as_floats(images)), rtol=1e-5, atol=1e-5)
    assert logits.shape == (count, 10)


def test_the_card_loads_the_weights_without_this_project(
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


@pytest.mark.parametrize("stem", STEMS)
def test_the_card_builds_each_network(stem: str) -> None:
    code = (
        f"import torch\nfrom torchvision.models import resnet18\nmodel = resnet18(num_classes=10)\n{FIRST_LAYERS[stem]}"
    )
    names: dict[str, Any] = {}
    exec(code, names)
    network = build_model(stem=stem).eval()
    names["model"].load_state_dict(network.state_dict())
    images = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(images), network(images))


def test_an_image_file_is_classified_where_the_project_is_not_installed(
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


def test_the_card_says_how_good_it_is_and_where_it_errs(folder: Path, network: torch.nn.Module, searched: Path) -> None:
    facts, card = json.loads((folder / "export.json").read_text()), (folder / "README.md").read_text()
    test = load(**DATA).test
    with torch.no_grad():
        answers = network(as_floats(test.images)).argmax(1)
    confusion = [[int(((test.labels == true) & (answers == said)).sum()) for said in range(10)] for true in range(10)]
    assert facts["confusion"] == confusion
    right = sum(confusion[i][i] for i in range(10))
    assert facts["accuracy"]["test_accuracy"] == right / len(test)
    as_trained = {"how": "in bf16 on the CPU", **facts["stored"]}
    assert facts["as_trained"] == as_trained, "trained and scored in bf16, the same model gives the same number"
    assert "Scored in bf16 on the CPU, as in training, they are " in card
    assert f"| test accuracy | {right / len(test):.4f} of 500 images" in card
    for name, row in zip(facts["classes"], confusion, strict=True):
        own = row[facts["classes"].index(name)]
        assert f"| {name} | {own / sum(row):.4f} | {' | '.join(map(str, row))} |" in card
    for part in (
        load(**DATA).sha256,
        "| batch_size | 32 |",
        "hpo then",
        "hpo replay search 0",
        "2 epochs over 128 images",
    ):
        assert part in card
    assert "**Note**" not in card
    assert "None" not in card


def test_what_is_not_as_storage_has_it_is_told(study: Study, tmp_path: Path) -> None:
    stored = study.metrics()[0][2]["test_accuracy"]
    with study.database.engine.begin() as connection:
        change = "UPDATE hpo_metrics SET value = value - 0.004 WHERE name = 'test_accuracy'"
        connection.exec_driver_sql(change)
        connection.exec_driver_sql('UPDATE hpo_runs SET provenance = \'{"data_sha256": "other"}\'')
    folder, remarks = exported(study, tmp_path)
    assert len(remarks) == 2
    assert "are not those of the training (other)" in remarks[0]
    here = f"test_accuracy is {stored:.4f} here, in bf16 on the CPU, and was {stored - 0.004:.4f} on "
    assert remarks[1].startswith(here)
    assert remarks[1].endswith(": 2 images differ")
    card = (folder / "README.md").read_text()
    assert all(f"**Note**: {remark}." in card for remark in remarks)


@pytest.mark.parametrize(("precision", "device"), [("fp32", "cpu"), ("bf16", "cuda")])
def test_a_trial_of_fp32_or_of_a_gpu_that_is_not_here_is_scored_once(
    searched: Path, precision: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    params = TrainParams(precision=precision)
    found = export_room._score_as_trained(params, {}, {"device": device}, DATA, searched)
    assert found == ("in fp32 on the CPU", {})


def test_a_trial_that_cannot_be_exported_is_refused_with_what_can(study: Study, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="trial 2 of study search is FAIL; COMPLETE are 0, 1"):
        exported(study, tmp_path, 2)
    with pytest.raises(SettingError, match="trial 9 of study search is not there; COMPLETE are 0, 1"):
        exported(study, tmp_path, 9)
    with pytest.raises(
        SettingError, match=r"no checkpoint of trial 1 in .*/1\. It was trained on node-7: run this there"
    ):
        exported(study, tmp_path, 1)
    study.optuna_study.set_user_attr("hpo:settings", SETTINGS | {"trainable": "mine:train"})
    with pytest.raises(SettingError, match=r"was trained by mine:train: .* What it saved is in .*/0$"):
        exported(study, tmp_path)
    study.optuna_study.set_user_attr("hpo:settings", SETTINGS | {"command": "python mine.py"})
    with pytest.raises(SettingError, match=r"was trained by python mine\.py: "):
        exported(study, tmp_path)
    assert not (tmp_path / "exports").exists()


def test_a_study_without_a_best_trial_is_refused(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        study = open_study(database, "empty", direction="maximize", fingerprint="f", settings=SETTINGS)
        with pytest.raises(SettingError, match="no COMPLETE trial to export"):
            exported(study, tmp_path)
        several = optuna.create_study(
            storage=database.optuna_storage, study_name="two", directions=["maximize", "minimize"]
        )
        several.add_trials(
            [optuna.trial.create_trial(values=values) for values in ([1.0, 1.0], [0.5, 0.5], [0.2, 0.9])]
        )
        with pytest.raises(SettingError, match="choose by --trial among the best, 0, 1"):
            exported(Study(database, "two", several._study_id, several), tmp_path)


def test_what_is_no_earlier_export_is_never_replaced(study: Study, tmp_path: Path, folder: Path) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(SettingError, match=r"mine holds something else than an earlier export \(thesis\.tex\)"):
        exported(study, tmp_path, output=output)
    shutil.copytree(folder, output, dirs_exist_ok=True)
    with pytest.raises(SettingError, match=r"\(thesis\.tex\)"):
        exported(study, tmp_path, output=output)
    (output / "thesis.tex").rename(tmp_path / "file")
    with pytest.raises(SettingError, match=r"\(file\)"):
        exported(study, tmp_path, output=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "years of work"


def test_an_earlier_export_is_replaced_whole_or_not_at_all(
    study: Study, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shutil.copytree(folder, tmp_path / "out" / "model")
    (output / "README.md").write_text("the one before")

    def full(_facts: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export_room, "_card", full)
        with pytest.raises(SettingError, match=r"cannot write the export to .*/model: No space left on device"):
            exported(study, tmp_path, output=output)
    assert (output / "README.md").read_text() == "the one before"
    assert [path.name for path in output.parent.iterdir()] == ["model"]
    exported(study, tmp_path, output=output)
    assert (output / "README.md").read_text() == (folder / "README.md").read_text()
    assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_the_command_line_exports_the_best_trial(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ["search", "--storage", f"sqlite:///{tmp_path}/hpo.db", "--output", "model", "--data-dir", "none"]
    monkeypatch.setattr(sys, "argv", ["hpo", *arguments])
    with pytest.raises(SystemExit) as ended:
        command_line.main(["export"])
    assert ended.value.code == 0
    assert f"{tmp_path}/model: README.md says what it is" in capsys.readouterr().out
    assert json.loads((tmp_path / "model" / "export.json").read_text())["trial"] == 0
