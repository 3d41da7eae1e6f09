"""The scores of an exported model, and how they compare with those that storage holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpo.train.data import Dataset, Images, load
from hpo.train.evaluation import evaluate
from hpo.train.fashion_mnist import CLASS_NAMES
from hpo.train.fast_conv import use_fast_convolutions
from hpo.train.network import MirrorAverage, build_model
from hpo.train.params import TrainParams
from hpo.train.precision import choose_precision

FP32_ON_CPU = "in fp32 on the CPU"


@dataclass(frozen=True)
class Scores:
    """Accuracies, and how they were computed.

    Attributes:
        how: precision and device, such as `in bf16 on the CPU`.
        accuracy: {"val_accuracy": ..., "test_accuracy": ...}.
    """

    how: str
    accuracy: dict[str, float]


def held_out_images(dataset: Dataset) -> dict[str, Images]:
    """Return the images that the model was not trained on: {"val": ..., "test": ...}, without the parts that are empty."""
    parts = {"val": dataset.validation, "test": dataset.test}
    return {name: part for name, part in parts.items() if len(part) > 0}


def score(model: nn.Module, dataset: Dataset, precision: str = "fp32") -> dict[str, float]:
    """Return {"val_accuracy": ..., "test_accuracy": ...} of a model on the data set's device, where there are images."""
    return {f"{name}_accuracy": evaluate(model, part, precision)[1] for name, part in held_out_images(dataset).items()}


def score_as_trained(
    params: TrainParams, weights: Mapping[str, Tensor], trained_on: str, data: Mapping[str, Any]
) -> Scores | None:
    """Return the scores in the precision and on the kind of device that the trial was trained with.

    The same model then gets the same score. In another precision, some images get another class.

    Args:
        params: the hyperparameters of the trial.
        weights: the state dict of its network, as it is scored.
        trained_on: `cpu` or `cuda`.
        data: the arguments of `hpo.train.data.load`, without the device.

    Returns:
        The scores; None if they would be fp32 on the CPU, or if there is no such device here.
    """
    if trained_on == "cuda" and not torch.cuda.is_available():
        return None
    precision = choose_precision(params.precision, trained_on)
    if trained_on == "cpu" and precision == "fp32":
        return None
    # As in training: the memory format and the convolution kernels decide how sums are rounded.
    model = build_model(stem=params.stem, width=params.width).to(trained_on).to(memory_format=torch.channels_last)
    if precision == "bf16":
        use_fast_convolutions(model)
    model.load_state_dict(weights)
    device_name = "the CPU" if trained_on == "cpu" else torch.cuda.get_device_name()
    scored = MirrorAverage(model) if params.tta else model
    return Scores(f"in {precision} on {device_name}", score(scored, load(**data, device=trained_on), precision))


def compare_scores(scores: Scores, stored: Mapping[str, float], dataset: Dataset, device_name: str) -> list[str]:
    """Return a remark for each score that differs from the stored one.

    Args:
        scores: computed now.
        stored: the trial's metrics.
        dataset: the data set of the scores.
        device_name: the device that the stored metrics were computed on.
    """
    remarks = []
    for name, value in scores.accuracy.items():
        if name in stored and stored[name] != value:
            part = held_out_images(dataset)[name.removesuffix("_accuracy")]
            images = round(abs(stored[name] - value) * len(part))
            then = f"was {stored[name]:.4f} on {device_name}: {images} images differ"
            remarks.append(f"{name} is {value:.4f} here, {scores.how}, and {then}")
    return remarks


@torch.no_grad()
def count_confusions(program: nn.Module, images: Images, batch_size: int) -> list[list[int]]:
    """Return how many images of each class (row) the program assigns to each class (column).

    Args:
        program: from uint8 images of shape (N, 28, 28) to logits.
        images: on the program's device.
        batch_size: the number of images at a time.
    """
    classes = len(CLASS_NAMES)
    counts = torch.zeros(classes * classes, dtype=torch.int64)
    for batch in images.split(batch_size):
        cells = batch.labels * classes + program(batch.images).argmax(1)
        counts += cells.bincount(minlength=classes * classes)
    rows: list[list[int]] = counts.reshape(classes, classes).tolist()
    return rows
