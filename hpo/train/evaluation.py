"""The score of a model on images that it is not trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import nn

from hpo.train.data import Images
from hpo.train.precision import autocast

CPU_BATCH = 100  # images; measured fastest on two cores: the activations fit in the cache
GPU_BATCH = 2500  # images; divides 5,000 and 10,000, so that every batch has the same shape


@torch.no_grad()
def evaluate(model: nn.Module, images: Images, precision: str = "fp32") -> tuple[float, float]:
    """Return the mean loss and the accuracy of a model over all images.

    Args:
        model: from float images of shape (N, 1, 28, 28) to logits of shape (N, classes).
        images: on the model's device.
        precision: of the multiplications, `fp32` or `bf16`.
    """
    model.eval()
    device = images.device
    loss_sum = torch.zeros((), device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for batch in images.split(CPU_BATCH if device.type == "cpu" else GPU_BATCH):
        with autocast(device, precision):
            logits = model(batch.as_input())
            loss_sum += F.cross_entropy(logits, batch.labels, reduction="sum")
        correct += (logits.argmax(1) == batch.labels).sum()
    return float(loss_sum) / len(images), float(correct) / len(images)
