"""The training loop: a generator that yields one EpochReport an epoch. Knows torch, nothing else.

`train` is the default trainable. Any generator function with its signature is one too.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from hpo.data import Images, load
from hpo.errors import TrainableError, nearest
from hpo.model import STEMS, build_model

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
EVAL_BATCH_CPU = 100  # measured fastest on two cores: the activations stay in the cache
EVAL_BATCH_GPU = 2500  # divides 5,000 and 10,000: no odd shape for the kernels to be chosen for again


@dataclass(frozen=True)
class EpochReport:
    """What a trainable yields after each epoch.

    Attributes:
        epoch: counted from 1.
        metrics: name to value; the space's metric must be among them.
        state: called only when a checkpoint is saved; returns a dict of tensors and plain values from which the same
            trainable goes on as if never stopped.
    """

    epoch: int
    metrics: dict[str, float]
    state: Callable[[], dict[str, Any]]


class Trainable(Protocol):
    """A generator function that trains one configuration."""

    def __call__(
        self,
        params: Mapping[str, Any],
        *,
        data: Mapping[str, Any],
        seed: int,
        max_epochs: int,
        device: str,
        checkpoint: Mapping[str, Any] | None = None,
    ) -> Iterator[EpochReport]:
        """Yield a report for each epoch after the checkpoint's, the last one for epoch `max_epochs`."""
        ...


@dataclass(frozen=True)
class TrainParams:
    """The hyperparameters that `train` knows, with the values of the documented grid as defaults."""

    batch_size: int = 64
    lr: float = 0.01
    optimizer: str = "adam"
    momentum: float = 0.0
    weight_decay: float = 0.0
    stem: str = "imagenet"

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise TrainableError(f"parameters.batch_size must be at least 2 (batch norm), got {self.batch_size}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise TrainableError(f"parameters.lr must be above 0, got {self.lr}")
        for name in ("momentum", "weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise TrainableError(f"parameters.{name} must be at least 0, got {getattr(self, name)}")
        for name, known in (("optimizer", list(OPTIMIZERS)), ("stem", list(STEMS))):
            if getattr(self, name) not in known:
                raise TrainableError(
                    f"parameters.{name}: no {name} {getattr(self, name)!r}, {nearest(str(getattr(self, name)), known)}"
                )


def read_params(params: Mapping[str, Any]) -> TrainParams:
    """Return the parameters of a trial in their types.

    Raises:
        TrainableError: a name that `train` does not know, a value of the wrong type or outside its choices.
    """
    known = {field.name: str(field.type) for field in fields(TrainParams)}
    for name, value in params.items():
        if name not in known:
            raise TrainableError(
                f"parameters.{name}: hpo.train:train has no parameter {name!r}, {nearest(name, known)}"
            )
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not {"int": isinstance(value, int) and number, "float": number, "str": isinstance(value, str)}[known[name]]:
            raise TrainableError(f"parameters.{name} must be of type {known[name]}, got {value!r}")
    return TrainParams(**params)


def train(
    params: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    seed: int,
    max_epochs: int,
    device: str,
    checkpoint: Mapping[str, Any] | None = None,
) -> Iterator[EpochReport]:
    """Train ResNet-18 on Fashion-MNIST, one report an epoch.

    The documented recipe: images in [0, 1] without augmentation, cross-entropy, Adam with a constant learning rate.
    Every image is trained once an epoch, in an order drawn from (seed, epoch) alone, the last batch as small as it comes.

    Args:
        params: hyperparameters, see TrainParams.
        data: what `hpo.data.load` takes, but for the device.
        seed: of the weights and of the order of the images.
        max_epochs: the last epoch.
        device: `cpu` or `cuda`.
        checkpoint: a state of an earlier report; training goes on after its epoch with the very same numbers.

    Yields:
        train_loss, train_accuracy (averages over the epoch, as the weights moved), val_loss, val_accuracy (of the epoch's
        last weights), train_seconds, images_per_second; with the last epoch also test_loss and test_accuracy.

    Raises:
        TrainableError: a parameter that is not known or out of range.
        DataError: the data set is not there.
    """
    settings = read_params(params)
    dataset = load(**data, device=device)
    torch.manual_seed(seed)
    model = build_model(stem=settings.stem).to(device)
    optimizer = _build_optimizer(settings, model)
    done = 0
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        done = checkpoint["epoch"]

    for epoch in range(done + 1, max_epochs + 1):
        started = time.perf_counter()
        loss, accuracy = _train_epoch(model, optimizer, dataset.train, settings.batch_size, _epoch_seed(seed, epoch))
        seconds = time.perf_counter() - started
        val_loss, val_accuracy = evaluate(model, dataset.validation)
        metrics = {
            "train_loss": loss,
            "train_accuracy": accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "train_seconds": seconds,
            "images_per_second": len(dataset.train) / seconds,
        }
        if epoch == max_epochs:
            # Scored once, when nothing can be decided by it any more.
            metrics["test_loss"], metrics["test_accuracy"] = evaluate(model, dataset.test)

        def state(epoch: int = epoch) -> dict[str, Any]:
            return {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}

        yield EpochReport(epoch, metrics, state)


def _build_optimizer(settings: TrainParams, model: nn.Module) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "sgd":
        options["momentum"] = settings.momentum
    return OPTIMIZERS[settings.optimizer](model.parameters(), **options)


def _epoch_seed(seed: int, epoch: int) -> int:
    """Return a seed for one epoch's order: a resumed trial needs no generator state, only the epoch's number."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:8], "big") >> 1


def _as_input(images: Tensor) -> Tensor:
    """Turn uint8 (N, 28, 28) into float (N, 1, 28, 28) in [0, 1]."""
    return images.unsqueeze(1).float().div_(255)


def _train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Images, batch_size: int, seed: int
) -> tuple[float, float]:
    """Train every image once; return the mean loss and the accuracy over the epoch."""
    model.train()
    device = images.labels.device
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(device)
    # Summed on the device, read once at the end: reading each step would make the device wait for Python.
    loss_sum = torch.zeros((), device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    batches = list(order.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        # Batch norm cannot train on one image whose maps are 1x1: the last image joins the batch before it.
        batches[-2:] = [torch.cat(batches[-2:])]
    for indices in batches:
        batch = images.take(indices)
        logits = model(_as_input(batch.images))
        loss = F.cross_entropy(logits, batch.labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach() * len(batch)
        correct += (logits.detach().argmax(1) == batch.labels).sum()
    return float(loss_sum) / len(images), float(correct) / len(images)


@torch.no_grad()
def evaluate(model: nn.Module, images: Images) -> tuple[float, float]:
    """Return the mean loss and the accuracy of a model over all images."""
    model.eval()
    device = images.labels.device
    batch_size = EVAL_BATCH_CPU if device.type == "cpu" else EVAL_BATCH_GPU
    loss_sum = torch.zeros((), device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for pixels, labels in zip(images.images.split(batch_size), images.labels.split(batch_size), strict=True):
        logits = model(_as_input(pixels))
        loss_sum += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return float(loss_sum) / len(images), float(correct) / len(images)


def measure_speed(params: Mapping[str, Any], *, data: Mapping[str, Any], device: str, threads: int) -> float:
    """Return the images per second of a few training steps, the first one left out.

    Args:
        params: hyperparameters, see TrainParams.
        data: what `hpo.data.load` takes, but for the device.
        device: `cpu` or `cuda`.
        threads: torch's threads on the CPU.
    """
    settings = read_params(params)
    dataset = load(**data, device=device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = build_model(stem=settings.stem).to(device)
        optimizer = _build_optimizer(settings, model)
        step = dataset.train.take(torch.arange(min(settings.batch_size, len(dataset.train))))
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            _train_epoch(model, optimizer, step, settings.batch_size, seed=0)
            seconds.append(time.perf_counter() - started)
        return len(step) / min(seconds[1:])
    finally:
        torch.set_num_threads(before)
