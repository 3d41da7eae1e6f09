"""The training loop: a generator that yields an EpochReport after each epoch.

`train` is the default trainable. Any generator function with its signature can be another, see `hpo.trainable`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import torch

from hpo.errors import TrainableError
from hpo.train.data import load
from hpo.train.determinism import deterministic_kernels
from hpo.train.evaluation import evaluate
from hpo.train.learner import Learner
from hpo.train.params import read_params
from hpo.train.precision import choose_precision, describe_precision
from hpo.trainable import EpochReport


def train(
    params: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    seed: int,
    max_epochs: int,
    device: str,
    checkpoint: Mapping[str, Any] | None = None,
) -> Iterator[EpochReport]:
    """Train ResNet-18 on Fashion-MNIST and yield a report after each epoch.

    The documented recipe, which is the default: images in [0, 1] without augmentation, cross-entropy, Adam with a constant
    learning rate. An epoch trains on every image once; the order, and how each image is changed if there is augmentation,
    depend only on the seed and the epoch. The last batch may be smaller.

    Args:
        params: hyperparameters, see `hpo.train.params.TrainParams`.
        data: the arguments of `hpo.train.data.load`, without the device.
        seed: of the initial weights, of the order of the images and of their augmentation.
        max_epochs: the last epoch. Some schedules of the learning rate depend on it, see `TrainParams.depends_on_horizon`.
        device: `cpu` or `cuda`.
        checkpoint: the state of an earlier report. Training resumes after its epoch, with the same numbers as without an
            interruption.

    Yields:
        Reports with these metrics: train_loss and train_accuracy, averages over the steps of the epoch, of the augmented
        images; val_loss and val_accuracy, of the weights after it, if there are validation images; train_seconds;
        images_per_second. The report of the last epoch also has test_loss and test_accuracy.

    Raises:
        TrainableError: a parameter is unknown or out of range, or the checkpoint is of a training to another last epoch and
            the schedule depends on it.
        DataError: the data set is missing or too small.
    """
    train_params = read_params(params)
    precision = choose_precision(train_params.precision, device)
    dataset = load(**data, device=device)
    provenance = {} if device == "cpu" else {"precision": describe_precision(precision, dataset.train.device)}
    torch.manual_seed(seed)
    learner = Learner(train_params, precision, dataset.train, max_epochs)
    with closing(learner):
        last_epoch = 0
        horizon = {"max_epochs": max_epochs} if train_params.depends_on_horizon else {}
        if checkpoint is not None:
            trained_to = checkpoint.get("max_epochs", max_epochs)
            if trained_to != max_epochs:
                raise TrainableError(
                    f"the checkpoint is of a training to epoch {trained_to}, with a schedule of the learning rate that ends "
                    f"there: it cannot be continued to epoch {max_epochs}. Train from the start, or with schedule constant"
                )
            learner.restore(checkpoint)
            last_epoch = checkpoint["epoch"]

        for epoch in range(last_epoch + 1, max_epochs + 1):
            with deterministic_kernels(train_params.deterministic):
                started = time.perf_counter()
                loss, accuracy = learner.train_epoch(epoch_seed(seed, epoch), epoch)
                seconds = time.perf_counter() - started
                metrics = {"train_loss": loss, "train_accuracy": accuracy}
                model = learner.model_to_score()
                if len(dataset.validation) > 0:
                    metrics["val_loss"], metrics["val_accuracy"] = evaluate(model, dataset.validation, precision)
                metrics |= {"train_seconds": seconds, "images_per_second": len(dataset.train) / seconds}
                if epoch == max_epochs:
                    # The test images are scored once, when no decision can depend on the score.
                    metrics["test_loss"], metrics["test_accuracy"] = evaluate(model, dataset.test, precision)

            def state(epoch: int = epoch) -> dict[str, Any]:
                return {"epoch": epoch, **horizon, **learner.state()}

            failure = learner.graph_failure
            yield EpochReport(
                epoch,
                metrics,
                state,
                provenance=provenance | ({} if learner.is_graphed is None else {"cuda_graph": learner.is_graphed}),
                warning=f"steps run eagerly: they cannot be captured as a CUDA graph: {failure}" if failure else "",
                # torch keeps the memory pool of a failed capture, even after `reset` (before its pull request 190348).
                needs_new_process=bool(failure),
            )


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of one epoch's order. It depends on no earlier epoch, so a checkpoint needs no generator state."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:8], "big") >> 1
