"""Networks from parameters."""

from __future__ import annotations

from torch import nn
from torchvision.models import resnet18

from hpo.train.params import STEMS


def build_model(*, stem: str = "imagenet", classes: int = 10) -> nn.Module:
    """Return torchvision's ResNet-18 for images of one channel, with fresh weights from torch's global generator.

    Args:
        stem: `imagenet` is the network as published (7x7 convolution of stride 2, then max-pool: 28x28 images become
            maps of 7x7). `cifar` is a 3x3 convolution of stride 1 without max-pool: the stronger network, with about
            14 times the arithmetic.
        classes: the number of outputs.

    Returns:
        A module from float images of shape (N, 1, 28, 28) to logits of shape (N, classes).
    """
    if stem not in STEMS:
        raise ValueError(f"stem is one of {', '.join(STEMS)}, got {stem!r}")
    model: nn.Module = resnet18(num_classes=classes)
    if stem == "imagenet":
        model.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    else:
        model.conv1 = nn.Conv2d(1, 64, kernel_size=3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    # The initialisation that torchvision gives every convolution of this network (He et al., 2015).
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model
