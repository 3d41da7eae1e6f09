"""The best model of a study as a folder that loads without this project.

model.pt2          a torch.export program: uint8 images (N, 28, 28) in, logits (N, classes) out; the scaling is inside
model.safetensors  the weights alone, under torchvision's names
classify.py        loads the program and classifies an image file
classes.json       the names of the classes
README.md          the model card
export.json        what the card says, for programs
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.datasets import FashionMNIST

from hpo.errors import SettingError
from hpo.paths import RunsDir
from hpo.search.checkpoints import load_checkpoint
from hpo.train.data import Dataset, Images, load
from hpo.train.fast_conv import use_fast_convolutions
from hpo.train.loop import choose_precision, evaluate
from hpo.train.network import build_model
from hpo.train.params import TrainParams, read_params
from hpo.trainable import DEFAULT_TRAINABLE

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from storage.studies import Study

FILES = ("README.md", "classes.json", "classify.py", "export.json", "model.pt2", "model.safetensors")
FP32_ON_CPU = "in fp32 on the CPU"
BATCH = 100  # images: as many as `evaluate` takes at a time on the CPU, so the sums are the same to the last digit

CLASSIFY = '''\
"""Say what is on an image: python classify.py IMAGE. Needs torch and pillow; the model is beside this file."""
import json, sys
from pathlib import Path
import torch
from PIL import Image

here = Path(__file__).resolve().parent
model = torch.export.load(here / "model.pt2").module()
image = Image.open(sys.argv[1]).convert("L").resize((28, 28))  # the garment light, the ground black
pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(1, 28, 28)
scores = model(pixels).softmax(dim=1)[0].tolist()
for score, name in sorted(zip(scores, json.loads((here / "classes.json").read_text())), reverse=True)[:3]:
    print(f"{score:.4f} {name}")
'''

FIRST_LAYERS = {
    "imagenet": "model.conv1 = torch.nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)",
    "cifar": "model.conv1 = torch.nn.Conv2d(1, 64, kernel_size=3, stride=1, padding=1, bias=False)\n"
    "model.maxpool = torch.nn.Identity()",
}


def export(
    study: Study,
    number: int | None,
    *,
    runs_dir: RunsDir,
    data_dir: Path,
    output: Path | None,
    versions: Mapping[str, Any],
) -> tuple[Path, list[str]]:
    """Write a trial's model into a folder, whole or not at all.

    Args:
        study: whose trial.
        number: the trial; None for the best one.
        runs_dir: where the checkpoints lie.
        data_dir: where the data set lies: the model is scored again.
        output: the folder; None for one under `runs_dir`. An earlier export there is replaced.
        versions: of what runs now.

    Returns:
        The folder, and what the user should know of it.

    Raises:
        SettingError: no such trial, no checkpoint of it here, or a folder that is not ours to replace.
        DataError: the data set is not there.
    """
    trial = _choose(study, number)
    folder = runs_dir.trial(study.unique_name, trial.number)
    settings = study.settings
    trained_by = settings.get("command") or settings.get("trainable")
    if trained_by != DEFAULT_TRAINABLE:
        raise SettingError(
            f"study {study.name} was trained by {trained_by}: only the network of {DEFAULT_TRAINABLE} is known here. What "
            f"it saved is in {folder}"
        )
    output = (output or runs_dir.export(study.name, trial.number)).absolute()
    _check_replaceable(output)

    recorded = study.provenance(trial.number)
    checkpoint = load_checkpoint(folder)
    if checkpoint is None:
        raise SettingError(
            f"there is no checkpoint of trial {trial.number} in {folder}. It was trained on "
            f"{recorded.get('machine', 'another machine')}: run this there, in the folder that the search was started in, "
            "or copy that folder here"
        )
    params = read_params({**trial.params, **trial.user_attrs.get("derived", {})})
    model = build_model(stem=params.stem)
    model.load_state_dict(checkpoint.state["model"])
    dataset = load(**settings["data"], data_dir=str(data_dir))

    stored = study.metrics_of([trial._trial_id])[trial._trial_id].get(checkpoint.epoch, {})
    scores = _score(model, dataset)
    how, own_scores = _score_as_trained(params, checkpoint.state["model"], recorded, settings["data"], data_dir)
    if how == FP32_ON_CPU:
        own_scores = scores
    remarks = _compare(checkpoint.epoch, settings, stored, own_scores, how, recorded, dataset)
    draft = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        program = _export_program(_Classifier(model), draft / "model.pt2", dataset.test)
        confusion = _confusion(program, dataset.test)
        facts = {
            "study": study.name,
            "study_id": study.unique_name,
            "trial": trial.number,
            "params": asdict(params),
            "seed": settings["seed"],
            "epochs": checkpoint.epoch,
            "data": settings["data"],
            "data_sha256": dataset.sha256,
            "images": {name: len(part) for name, part in {"train": dataset.train, **_scored(dataset)}.items()},
            "accuracy": scores,
            "as_trained": {"how": how, **own_scores},
            "stored": {name: stored[name] for name in scores if name in stored},
            "classes": list(FashionMNIST.classes),
            "confusion": confusion.tolist(),
            "trained": recorded,
            "exported": dict(versions),
            "remarks": remarks,
        }
        _write_files(draft, facts, model)
        _put_in_place(draft, output)
    except OSError as error:
        raise SettingError(
            f"cannot write the export to {output}: {error.strerror or error}; name a writable folder by --output"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return output, remarks


def _choose(study: Study, number: int | None) -> FrozenTrial:
    trials = study.trials()
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if not complete:
        raise SettingError(f"study {study.name} has no COMPLETE trial to export; `hpo run` makes some")
    if number is None:
        if len(study.optuna_study.directions) == 1:
            return study.optuna_study.best_trial
        front = ", ".join(str(trial.number) for trial in study.optuna_study.best_trials)
        raise SettingError(f"study {study.name} has several objectives: choose by --trial among the best, {front}")
    for trial in complete:
        if trial.number == number:
            return trial
    state = next((f"is {trial.state.name}" for trial in trials if trial.number == number), "is not there")
    shown = ", ".join(str(trial.number) for trial in complete[:20]) + (", ..." if len(complete) > 20 else "")
    raise SettingError(f"trial {number} of study {study.name} {state}; COMPLETE are {shown}")


def _check_replaceable(output: Path) -> None:
    """Refuse to replace what is not an earlier export, and nothing but that."""
    if not output.exists():
        return
    found = {path.name for path in output.iterdir()} if output.is_dir() else {output.name}
    others = sorted(found - set(FILES))
    if others or (found and "export.json" not in found):
        raise SettingError(
            f"{output} holds something else than an earlier export ({', '.join(others[:3]) or 'no export.json'}): name "
            "another folder by --output, or move it away"
        )


def _scored(dataset: Dataset) -> dict[str, Images]:
    return {"val": dataset.validation, "test": dataset.test}


def _score(model: nn.Module, dataset: Dataset, precision: str = "fp32") -> dict[str, float]:
    return {f"{name}_accuracy": evaluate(model, part, precision)[1] for name, part in _scored(dataset).items()}


def _score_as_trained(
    params: TrainParams,
    weights: Mapping[str, Tensor],
    recorded: Mapping[str, Any],
    data: Mapping[str, Any],
    data_dir: Path,
) -> tuple[str, dict[str, float]]:
    """Return how the trial itself was scored, as far as its kind of device is here, and what that gives.

    An equal model then gives an equal number: in bf16, some images fall on the other side than in fp32. The scores are
    empty where it is fp32 on the CPU, which is how everything here is scored anyway.
    """
    device = recorded.get("device", "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        return FP32_ON_CPU, {}
    precision = choose_precision(params.precision, device)
    if device == "cpu" and precision == "fp32":
        return FP32_ON_CPU, {}
    # As in training: the order of memory and the convolutions decide how sums are rounded.
    model = build_model(stem=params.stem).to(device).to(memory_format=torch.channels_last)
    if precision == "bf16":
        use_fast_convolutions(model)
    model.load_state_dict(weights)
    where = "the CPU" if device == "cpu" else torch.cuda.get_device_name()
    return f"in {precision} on {where}", _score(model, load(**data, data_dir=str(data_dir), device=device), precision)


def _compare(
    epoch: int,
    settings: Mapping[str, Any],
    stored: Mapping[str, float],
    scores: Mapping[str, float],
    how: str,
    recorded: Mapping[str, Any],
    dataset: Dataset,
) -> list[str]:
    """Return what is not as storage has it."""
    remarks = []
    if epoch != settings["max_epochs"]:
        remarks.append(f"the newest checkpoint is of epoch {epoch} of {settings['max_epochs']}")
    sha256 = recorded.get("data_sha256", dataset.sha256)
    if sha256 != dataset.sha256:
        remarks.append(f"the data here (sha256 {dataset.sha256}) are not those of the training ({sha256})")
    where = recorded.get("device_name", "an unknown device")
    for name, score in scores.items():
        if name in stored and stored[name] != score:
            images = round(abs(stored[name] - score) * len(_scored(dataset)[name.removesuffix("_accuracy")]))
            then = f"was {stored[name]:.4f} on {where}: {images} images differ"
            remarks.append(f"{name} is {score:.4f} here, {how}, and {then}")
    return remarks


class _Classifier(nn.Module):
    """The network with the scaling of its images inside, so that nobody can forget it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, 28, 28) -> float (N, 1, 28, 28) in [0, 1] -> logits (N, classes)."""
        logits: Tensor = self.network(images.unsqueeze(1).float() / 255)
        return logits


def _export_program(classifier: nn.Module, path: Path, images: Images) -> nn.Module:
    """Write the program, and return what loading it gives; it is refused if it does not compute the same."""
    classifier.eval()
    batch = images.images[:BATCH]
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    torch.export.save(torch.export.export(classifier, (batch,), dynamic_shapes=shapes), path)
    program: nn.Module = torch.export.load(path).module()
    with torch.no_grad():
        for count in (1, len(batch)):
            torch.testing.assert_close(program(batch[:count]), classifier(batch[:count]))
    return program


def _confusion(program: nn.Module, images: Images) -> Tensor:
    """Return how many images of each class (row) the program took for each class (column)."""
    classes = len(FashionMNIST.classes)
    counts = torch.zeros(classes * classes, dtype=torch.int64)
    with torch.no_grad():
        for pixels, labels in zip(images.images.split(BATCH), images.labels.split(BATCH), strict=True):
            places = labels * classes + program(pixels).argmax(1)
            counts += places.bincount(minlength=classes * classes)
    return counts.reshape(classes, classes)


def _write_files(folder: Path, facts: Mapping[str, Any], model: nn.Module) -> None:
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(weights, {"format": "pt", "study": facts["study"]}))
    (folder / "classes.json").write_text(json.dumps(facts["classes"]) + "\n")
    (folder / "classify.py").write_text(CLASSIFY)
    (folder / "export.json").write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "README.md").write_text(_card(facts))


def _put_in_place(draft: Path, output: Path) -> None:
    if not output.exists():
        draft.rename(output)
        return
    _check_replaceable(output)
    old = draft.with_name(f"{draft.name}.old")
    output.rename(old)
    draft.rename(output)
    shutil.rmtree(old)


def _card(facts: Mapping[str, Any]) -> str:
    """Return the model card."""
    classes, confusion, images = facts["classes"], facts["confusion"], facts["images"]
    trained, exported = facts["trained"], facts["exported"]
    rows = "\n".join(
        f"| {name} | {row[i] / max(1, sum(row)):.4f} | {' | '.join(map(str, row))} |"
        for i, (name, row) in enumerate(zip(classes, confusion, strict=True))
    )
    sizes = f"{images['train']:,} training, {images['val']:,} validation, {images['test']:,} test images"
    packages = ", ".join(f"{name} {version}" for name, version in trained.get("packages", {}).items())
    remarks = "".join(f"\n**Note**: {remark}.\n" for remark in facts["remarks"])
    params = "\n".join(f"| {name} | {value} |" for name, value in facts["params"].items())
    own = facts["as_trained"]
    as_trained = ""
    if own["how"] != FP32_ON_CPU:
        as_trained = (
            f" Scored {own['how']}, as in training, they are {own['test_accuracy']:.4f} and {own['val_accuracy']:.4f}."
        )
    data = facts["data"]
    return f"""# ResNet-18 on {data["dataset"]}: trial {facts["trial"]} of the search {facts["study"]}

Tells apart ten kinds of garments on images of 28x28 grey pixels: {", ".join(classes)}.

| | |
|---|---|
| test accuracy | {facts["accuracy"]["test_accuracy"]:.4f} of {images["test"]:,} images, scored once |
| validation accuracy | {facts["accuracy"]["val_accuracy"]:.4f} of {images["val"]:,} images, by which it was chosen |
{remarks}
Both were measured again for this card, {FP32_ON_CPU}.{as_trained}

## Use

`python classify.py IMAGE` needs torch and pillow. In a program:

```python
import torch

model = torch.export.load("model.pt2").module()
logits = model(torch.zeros(5, 28, 28, dtype=torch.uint8))  # (5, 10)
```

The program takes uint8 pixels, any number of images at a time, and scales them itself. The garment is light on a black
ground, as in the data set; invert photographs on white. The program was written by torch {exported["packages"]["torch"]}.
Where another version cannot read it, load the weights, which take floats in [0, 1] of shape (N, 1, 28, 28):

```python
import torch
from safetensors.torch import load_file
from torchvision.models import resnet18

model = resnet18(num_classes=10)
{FIRST_LAYERS[facts["params"]["stem"]]}
model.load_state_dict(load_file("model.safetensors"))
model.eval()
```

## Where it errs

The program in this folder on the test images: a row for each true class, a column for each answer.

| | accuracy | {" | ".join(classes)} |
|---|---|{"---|" * len(classes)}
{rows}

It knows nothing but centred single garments, drawn like those of the data set; anything else it takes for one of them.

## How it was trained

{facts["epochs"]} epochs over {images["train"]:,} images, without augmentation; cross-entropy; seed {facts["seed"]}.

| parameter | value |
|---|---|
{params}

| | |
|---|---|
| data | {data["dataset"]}, split into {sizes} |
| sha256 of the data | `{facts["data_sha256"]}` |
| device | {trained.get("device_name", "?")} ({trained.get("device", "?")}) |
| code | hpo {trained.get("code", "?")} |
| Python | {trained.get("python", "?")} on {trained.get("platform", "?")} |
| packages | {packages or "?"} |
| again | `hpo replay {facts["study"]} {facts["trial"]}` |
| exported by | hpo {exported["code"]}, torch {exported["packages"]["torch"]} |
"""
