"""A trial's model as a folder that loads without this project.

model.pt2          a torch.export program: uint8 images (N, 28, 28) in, logits (N, classes) out; it scales the images
model.safetensors  the weights, with torchvision's names
classify.py        loads the program and classifies an image file
classes.json       the names of the classes
README.md          the model card
export.json        the facts of the card, for programs
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save
from torch import nn

from hpo.errors import SettingError
from hpo.export.card import classify_script, render_card
from hpo.export.origin import MAX_LISTED, list_numbers, refuse_taken_over
from hpo.export.program import Classifier, write_program
from hpo.export.scoring import (
    FP32_ON_CPU,
    Scores,
    compare_scores,
    count_confusions,
    held_out_images,
    score,
    score_as_trained,
)
from hpo.paths import RunsDir
from hpo.search.checkpoints.bucket import BucketTrial, fetch_newest, newest_of
from hpo.search.checkpoints.files import Checkpoint, belongs_to, load_checkpoint
from hpo.search.checkpoints.retention import is_deleted, trials_with_checkpoints
from hpo.search.population import owner_of
from hpo.search.replicates import STATES
from hpo.space.model import Space
from hpo.train.data import Dataset, load
from hpo.train.ema import averaged_weights
from hpo.train.evaluation import CPU_BATCH
from hpo.train.fashion_mnist import CLASS_NAMES
from hpo.train.network import MirrorAverage, build_model
from hpo.train.params import read_params
from hpo.trainable import DEFAULT_TRAINABLE
from storage.optuna_internals import trial_id
from storage.pareto import direction_of, find_front, rank_best

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from storage.study import Study

FILES = ("README.md", "classes.json", "classify.py", "export.json", "model.pt2", "model.safetensors")


@dataclass(frozen=True)
class ExportedModel:
    """An export.

    Attributes:
        folder: its absolute path.
        remarks: how the model differs from what storage holds, one sentence each, without a full stop.
    """

    folder: Path
    remarks: list[str]


def export_model(
    study: Study,
    number: int | None,
    *,
    runs_dir: RunsDir,
    data_dir: Path,
    output: Path | None,
    versions: Mapping[str, Any],
    password: str | None = None,
) -> ExportedModel:
    """Write a trial's model into a folder, which is replaced only when all new files are written.

    Args:
        study: the study of the trial.
        number: the trial; None for the best one.
        runs_dir: the folder with the checkpoints.
        data_dir: the folder with the data sets, to score the model again.
        output: the folder to write; None for one under `runs_dir`. An earlier export there is replaced.
        versions: of the code and the packages that run now.
        password: the PostgreSQL password of other databases, which may have the study that trained a result.

    Raises:
        TrainedElsewhereError: another study trained it.
        SettingError: there is no such trial, its checkpoint is not on this machine, or the folder contains other files.
        DataError: the data set is missing.
    """
    if output is not None:
        _check_replaceable(output.absolute())
    trial, space, checkpoint = _choose_checkpoint(study, number, runs_dir, password)
    output = (output or runs_dir.export(study.name, trial.number)).absolute()
    _check_replaceable(output)
    provenance = study.provenance(trial.number)
    params = read_params({**trial.params, **trial.user_attrs.get("derived", {})})
    state, own_metrics = _first_training(checkpoint) if space.replicates > 1 else (checkpoint.state, None)
    weights = state["model"]
    if params.ema:
        weights = averaged_weights(weights, state["average"])
    network = build_model(stem=params.stem, width=params.width)
    network.load_state_dict(weights)
    scored = MirrorAverage(network) if params.tta else network
    data = space.trainable_data(data_dir)
    dataset = load(**data)

    metrics = own_metrics or study.metrics_of([trial_id(trial)])[trial_id(trial)].get(checkpoint.epoch, {})
    scores = Scores(FP32_ON_CPU, score(scored, dataset))
    own_scores = score_as_trained(params, weights, provenance.get("device", "cpu"), data) or scores
    remarks = []
    if space.replicates > 1:
        remarks.append(f"it is the model of seed {space.seed}, the first of {space.replicates} that were trained")
    remarks += _compare_training(space, checkpoint, provenance, dataset)
    remarks += compare_scores(own_scores, metrics, dataset, provenance.get("device_name", "an unknown device"))
    facts = {
        "study": study.reference,
        "study_id": study.unique_name,
        "trial": trial.number,
        "params": asdict(params),
        "seed": space.seed,
        "epochs": checkpoint.epoch,
        "data": space.data.model_dump(mode="json"),
        "data_sha256": dataset.sha256,
        "images": {
            "train": len(dataset.train),
            **{name: len(part) for name, part in held_out_images(dataset).items()},
        },
        "accuracy": scores.accuracy,
        "as_trained": {"how": own_scores.how, **own_scores.accuracy},
        "stored": {name: metrics[name] for name in scores.accuracy if name in metrics},
        "classes": list(CLASS_NAMES),
        "trained": provenance,
        "exported": dict(versions),
        "remarks": remarks,
    }
    _write_folder(output, facts, network, scored, dataset)
    return ExportedModel(output, remarks)


def _first_training(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the state and the last metrics of the training with the first seed: choosing the best would be luck."""
    first = checkpoint.state[STATES][0]
    return first["state"], first["metrics"]


# --- the trial --------------------------------------------------------------------------------------------------------


def _choose_checkpoint(
    study: Study, number: int | None, runs_dir: RunsDir, password: str | None
) -> tuple[FrozenTrial, Space, Checkpoint]:
    """Return a trial, its search space and its newest checkpoint; see `export_model`."""
    while True:
        trial = _choose_trial(study, number)
        space = _space_of(study, runs_dir, trial, password)
        try:
            return trial, space, _load_checkpoint(study, trial, space, runs_dir)
        except SettingError:
            # A trial that has become the best meanwhile: its search may keep the checkpoint of that one only.
            if number is not None or _best_trial(study).number == trial.number:
                raise


def _choose_trial(study: Study, number: int | None) -> FrozenTrial:
    if number is None:
        return _best_trial(study)
    trials = study.trials()
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    for trial in complete:
        if trial.number == number:
            return trial
    state = next((f"is {trial.state.name}" for trial in trials if trial.number == number), "does not exist")
    raise SettingError(
        f"trial {number} of study {study.reference} {state}; these are COMPLETE: {list_numbers(complete)}"
    )


def _best_trial(study: Study) -> FrozenTrial:
    # Optuna's best trial may be one of an earlier study from which the sampler alone learns: that is no result.
    complete = [trial for trial in study.trained_trials() if trial.state.name == "COMPLETE"]
    if not complete:
        raise SettingError(f"study {study.reference} has no COMPLETE trial to export; start one with `hpo run`")
    directions = [direction_of(each) for each in study.optuna_study.directions]
    if len(directions) > 1:
        raise SettingError(_list_front(study))
    (best,) = rank_best([trial.values for trial in complete], directions, 1)
    return complete[best]


def _list_front(study: Study) -> str:
    """Return a message that asks for one of the trials on the Pareto front, best first by the first objective."""
    directions = [direction_of(each) for each in study.optuna_study.directions]
    trials = {
        trial.number: trial.values
        for trial in study.trained_trials()
        if trial.state.name == "COMPLETE" and len(trial.values) == len(directions)
    }
    values, numbers = list(trials.values()), list(trials)
    best = rank_best(values, directions, len(find_front(values, directions)))  # the front comes first
    names = study.optuna_study.metric_names or [f"objective {i}" for i in range(len(directions))]
    lines = []
    for i in best[:MAX_LISTED]:
        shown = ", ".join(f"{name} {value:.6g}" for name, value in zip(names, values[i], strict=True))
        lines.append(f"  --trial {numbers[i]}: {shown}")
    more = [f"  and {len(best) - MAX_LISTED:,} more, see `hpo report`"] if len(best) > MAX_LISTED else []
    text = f"study {study.reference} has several objectives, so no single trial is the best: choose one of the Pareto front"
    return "\n".join([text, *lines, *more])


def _space_of(study: Study, runs_dir: RunsDir, trial: FrozenTrial, password: str | None) -> Space:
    """Return the space that the study was opened with.

    Raises:
        TrainedElsewhereError: another study trained it.
        SettingError: the study is of another trainable or another program.
    """
    if not study.settings:
        raise SettingError(f"study {study.reference} was not created by hpo, so its networks are unknown")
    space = Space.from_settings(study.settings)
    refuse_taken_over(study, trial, password)
    if not space.is_default_trainable:
        raise SettingError(
            f"study {study.reference} was trained by {space.command or space.trainable}: only the network of "
            f"{DEFAULT_TRAINABLE} can be exported. What it saved is in {runs_dir.trial(study.unique_name, trial.number)}"
        )
    return space


def _load_checkpoint(study: Study, trial: FrozenTrial, space: Space, runs_dir: RunsDir) -> Checkpoint:
    folder = runs_dir.trial(study.unique_name, trial.number)
    key = owner_of(space, trial.params, trial.user_attrs)
    url = runs_dir.bucket_trial(study.unique_name, trial.number)
    kept = space.checkpoints
    if not belongs_to(folder, key):
        raise SettingError(
            f"the files in {folder} are of another configuration than trial {trial.number}, as after restoring an older "
            "copy of the database. Use the database that they belong to"
        )
    try:
        if url:
            fetch_newest(folder, BucketTrial(url, key), newest_of(folder, key))
        checkpoint = load_checkpoint(folder, key)
    except (OSError, MemoryError, RuntimeError) as error:
        raise SettingError(f"cannot read the checkpoint of trial {trial.number} in {folder}: {error}") from None
    if checkpoint is None and is_deleted(folder):
        left = ", ".join(map(str, trials_with_checkpoints(folder.parent))) or "none"
        raise SettingError(
            f"trial {trial.number} has no checkpoint any more: this search keeps those of {kept.description} "
            f"(checkpoints.keep is {kept.keep}). With `checkpoints: {{keep: all}}` in the search space, trials keep theirs "
            f"from then on. Trials with a checkpoint: {left}"
        )
    if checkpoint is None:
        machine = study.provenance(trial.number).get("machine", "another machine")
        raise SettingError(
            f"there is no checkpoint of trial {trial.number} in {folder}. It was trained on {machine}: export it there, in "
            "the folder that the search was started in, or copy that folder here. If its checkpoints are elsewhere, name "
            "that with --checkpoints or HPO_CHECKPOINTS"
        )
    return checkpoint


def _compare_training(
    space: Space, checkpoint: Checkpoint, provenance: Mapping[str, Any], dataset: Dataset
) -> list[str]:
    """Return a remark if the checkpoint is not of the last epoch, and one if the data has changed."""
    remarks = []
    if checkpoint.epoch != space.max_epochs:
        remarks.append(f"the newest checkpoint is of epoch {checkpoint.epoch} of {space.max_epochs}")
    sha256 = provenance.get("data_sha256", dataset.sha256)
    if sha256 != dataset.sha256:
        remarks.append(f"the data here (SHA-256 {dataset.sha256}) differs from the training data ({sha256})")
    return remarks


# --- the folder -------------------------------------------------------------------------------------------------------


def _check_replaceable(output: Path) -> None:
    """Raise SettingError unless a folder is missing, empty or an earlier export without other files."""
    if not output.exists():
        return
    found = {path.name for path in output.iterdir()} if output.is_dir() else {output.name}
    others = sorted(found - set(FILES))
    if others or (found and "export.json" not in found):
        raise SettingError(
            f"{output} is not an earlier export ({', '.join(others[:3]) or 'no export.json'}): pass another folder with "
            "--output, or move it away"
        )


def _write_folder(
    output: Path, facts: Mapping[str, Any], network: nn.Module, scored: nn.Module, dataset: Dataset
) -> None:
    """Write an export next to its folder, then put it in place. `scored` is the network, or averages its logits."""
    draft = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        program = write_program(Classifier(scored), draft / "model.pt2", dataset.test.images[:CPU_BATCH])
        # The program scores the images, so that the card describes the file that users load.
        facts = {**facts, "confusion": count_confusions(program, dataset.test, CPU_BATCH)}
        weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        (draft / "model.safetensors").write_bytes(save(weights, {"format": "pt", "study": facts["study"]}))
        (draft / "classes.json").write_text(json.dumps(facts["classes"]) + "\n")
        (draft / "classify.py").write_text(classify_script())
        (draft / "export.json").write_text(json.dumps(facts, indent=1) + "\n")
        (draft / "README.md").write_text(render_card(facts))
        _put_in_place(draft, output)
    except OSError as error:
        raise SettingError(
            f"cannot write the export to {output}: {error.strerror or error}; pass a writable folder with --output"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _put_in_place(draft: Path, output: Path) -> None:
    if not output.exists():
        draft.rename(output)
        return
    _check_replaceable(output)  # again: the export took a while
    old = draft.with_name(f"{draft.name}.old")
    output.rename(old)
    draft.rename(output)
    shutil.rmtree(old)
