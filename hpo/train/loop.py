"""The training loop: a generator that yields one EpochReport an epoch. Knows torch, nothing else.

`train` is the default trainable. Any generator function with its signature is one too.
"""

from __future__ import annotations

import ctypes
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from hpo.train.data import Images, load
from hpo.train.fast_conv import use_fast_convolutions
from hpo.train.network import build_model
from hpo.train.params import TrainParams, read_params
from hpo.trainable import EpochReport

OPTIMIZER_CLASSES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
EVAL_BATCH_CPU = 100  # measured fastest on two cores: the activations stay in the cache
EVAL_BATCH_GPU = 2500  # divides 5,000 and 10,000: no odd shape for the kernels to be chosen for again


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
        data: what `hpo.train.data.load` takes, but for the device.
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
    precision = choose_precision(settings.precision, device)
    dataset = load(**data, device=device)
    if device == "cpu":
        keep_freed_memory()
    torch.manual_seed(seed)
    learner = Learner(settings, precision, dataset.train)
    done = 0
    if checkpoint is not None:
        learner.restore(checkpoint)
        done = checkpoint["epoch"]

    for epoch in range(done + 1, max_epochs + 1):
        started = time.perf_counter()
        loss, accuracy = learner.train_epoch(_epoch_seed(seed, epoch))
        seconds = time.perf_counter() - started
        val_loss, val_accuracy = evaluate(learner.model, dataset.validation, precision)
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
            metrics["test_loss"], metrics["test_accuracy"] = evaluate(learner.model, dataset.test, precision)

        def state(epoch: int = epoch) -> dict[str, Any]:
            return {"epoch": epoch, **learner.state()}

        yield EpochReport(epoch, metrics, state)


def _epoch_seed(seed: int, epoch: int) -> int:
    """Return a seed for one epoch's order: a resumed trial needs no generator state, only the epoch's number."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:8], "big") >> 1


def choose_precision(precision: str, device: str) -> str:
    """Return what `auto` stands for on a device: bf16 where the hardware multiplies in it, else fp32.

    That is a GPU of compute capability 8.0 (Ampere) or later, or a CPU with AVX512-BF16 or AMX.
    """
    if precision != "auto":
        return precision
    if device == "cpu":
        capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        capable = torch.cuda.get_device_capability() >= (8, 0)
    return "bf16" if capable else "fp32"


@cache
def keep_freed_memory() -> None:
    """Let glibc keep what this process frees: each step wants the same buffers again, and fresh pages cost faults.

    Measured on two cores at batch 512: 18 % more images/s with the cifar stem, 8 % with the imagenet stem.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    with suppress(OSError, AttributeError):  # another C library
        glibc = ctypes.CDLL(None)
        glibc.mallopt(m_mmap_max, 0)
        glibc.mallopt(m_trim_threshold, -1)


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    # No cache: each weight is cast once a step anyway, and a CUDA graph must not find casts of an earlier step.
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def _as_input(images: Tensor) -> Tensor:
    """Turn uint8 (N, 28, 28) into float (N, 1, 28, 28) in [0, 1], in the memory order of the network's weights."""
    return images.unsqueeze(1).float().div_(255).contiguous(memory_format=torch.channels_last)


def _channels_last(parameter: Tensor) -> Tensor:
    """Return a weight of shape (D, C, H, W), which lies in memory as (D, H, W, C), in just this order; others as is."""
    return parameter.permute(0, 2, 3, 1) if parameter.dim() == 4 else parameter


class Learner:
    """A network with its optimizer and its data, on one device.

    Weights are fp32; under bf16 the multiplications of a step, not its sums, are in bf16 (autocast). The optimizer sees
    each weight in the order of memory: the fused kernel of the CPU would copy any other one there and back, each step.
    """

    def __init__(self, settings: TrainParams, precision: str, images: Images) -> None:
        self._images = images
        self._device = images.labels.device
        self._precision = precision
        self._batch_size = min(settings.batch_size, len(images))
        self.model = build_model(stem=settings.stem).to(self._device).to(memory_format=torch.channels_last)
        if precision == "bf16":
            use_fast_convolutions(self.model)
        self._weights = list(self.model.parameters())
        self._views = [nn.Parameter(_channels_last(weight.detach())) for weight in self._weights]
        options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": True}
        if settings.optimizer == "sgd":
            options["momentum"] = settings.momentum
        elif self._device.type == "cuda":
            options["capturable"] = True
        self.optimizer = OPTIMIZER_CLASSES[settings.optimizer](self._views, **options)
        # Summed on the device, read once an epoch: reading each step would make the device wait for Python.
        self._loss_sum = torch.zeros((), device=self._device)
        self._correct = torch.zeros((), dtype=torch.int64, device=self._device)
        self._step = GraphedStep(self._train_batch, self._batch_size) if images.labels.is_cuda else self._train_batch

    def state(self) -> dict[str, Any]:
        """Return weights and the optimizer's memory."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned, here or on another device."""
        self.model.load_state_dict(state["model"])
        options = self.optimizer.state_dict()["param_groups"]  # this device's, not those of the device that saved
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": options})

    def train_epoch(self, seed: int) -> tuple[float, float]:
        """Train every image once, in an order drawn from the seed; return the mean loss and the accuracy."""
        self.model.train()
        order = torch.randperm(len(self._images), generator=torch.Generator().manual_seed(seed)).to(self._device)
        batches = list(order.split(self._batch_size))
        if len(batches) > 1 and len(batches[-1]) == 1:
            # Batch norm cannot train on one image whose maps are 1x1: the last image joins the batch before it.
            batches[-2:] = [torch.cat(batches[-2:])]
        self._loss_sum.zero_()
        self._correct.zero_()
        for indices in batches:
            self._step(indices)
        return float(self._loss_sum) / len(order), float(self._correct) / len(order)

    def _train_batch(self, indices: Tensor) -> None:
        """Take one step on the images at some positions, int64 of shape (B,)."""
        batch = self._images.take(indices)
        with _autocast(self._device, self._precision):
            logits = self.model(_as_input(batch.images))
            loss = F.cross_entropy(logits, batch.labels)
        for weight in self._weights:
            weight.grad = None
        loss.backward()
        for weight, view in zip(self._weights, self._views, strict=True):
            view.grad = None if weight.grad is None else _channels_last(weight.grad)
        self.optimizer.step()
        self._loss_sum += loss.detach() * len(indices)
        self._correct += (logits.detach().argmax(1) == batch.labels).sum()


class GraphedStep:
    """Replays a step as one CUDA graph: launching its some 300 kernels one by one takes longer than running them.

    The first steps run as they are, which is the warm-up that a capture wants; so does any batch of another size. Where
    the capture fails, all do.
    """

    WARM_UP = 3

    def __init__(self, step: Callable[[Tensor], None], batch_size: int) -> None:
        self._step = step
        self._indices = torch.zeros(batch_size, dtype=torch.int64, device="cuda")
        self._stream = torch.cuda.Stream()
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, indices: Tensor) -> None:
        """Take one step."""
        if len(indices) != len(self._indices):
            self._step(indices)
            return
        self._steps += 1
        if self._steps == self.WARM_UP + 1:
            self._graph = self._capture()
        if self._graph is not None:
            self._indices.copy_(indices)
            self._graph.replay()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True.*")  # not captured yet
            self._step(indices)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._step(self._indices)
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph of the training step, it runs eagerly: {error}", stacklevel=2)
            return None
        return graph


@torch.no_grad()
def evaluate(model: nn.Module, images: Images, precision: str = "fp32") -> tuple[float, float]:
    """Return the mean loss and the accuracy of a model over all images.

    Args:
        model: from float images of shape (N, 1, 28, 28) to logits of shape (N, classes).
        images: on the model's device.
        precision: fp32 or bf16, of the multiplications.
    """
    model.eval()
    device = images.labels.device
    batch_size = EVAL_BATCH_CPU if device.type == "cpu" else EVAL_BATCH_GPU
    loss_sum = torch.zeros((), device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for pixels, labels in zip(images.images.split(batch_size), images.labels.split(batch_size), strict=True):
        with _autocast(device, precision):
            logits = model(_as_input(pixels))
            loss_sum += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return float(loss_sum) / len(images), float(correct) / len(images)
