"""ResNet-18 (He et al., "Deep Residual Learning for Image Recognition", 2015) for small grey images.

It equals torchvision's `resnet18`: the same names, the same numbers, and the same initial weights from the same seed; a
test compares the two. It is defined here because importing any part of torchvision imports torch._dynamo, which takes
longer than importing torch (measured: 3.5 s and 2.7 s) and would be paid by each worker.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from hpo.train.params import STEMS

WIDTHS = (64, 128, 256, 512)  # channels of the four layers, as published
BLOCKS = 2  # of each layer


def build_model(*, stem: str = "imagenet", width: float = 1.0, classes: int = 10) -> nn.Module:
    """Return a ResNet-18 for images with one channel. Its initial weights come from torch's global generator.

    Args:
        stem: `imagenet` is the published network: a 7x7 convolution of stride 2, then max-pooling, which turn a 28x28
            image into 7x7 maps. `cifar` is a 3x3 convolution of stride 1 without max-pooling: the stronger network, at
            about 14 times the arithmetic.
        width: the number of channels of each layer, relative to the published network. They are rounded to a multiple of 8,
            as tensor cores prefer.
        classes: the number of outputs.

    Returns:
        A module from float images of shape (N, 1, 28, 28) to logits of shape (N, classes).

    Raises:
        ValueError: there is no such stem.
    """
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
    widths = [max(8, 8 * round(each * width / 8)) for each in WIDTHS]
    model = ResNet18(widths, classes)
    # The published first convolution, for three channels, is drawn and then replaced. Without its draw, all other weights
    # would differ from those of earlier trials with the same seed.
    if stem == "imagenet":
        model.conv1 = nn.Conv2d(1, widths[0], kernel_size=7, stride=2, padding=3, bias=False)
    else:
        model.conv1 = nn.Conv2d(1, widths[0], kernel_size=3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    _initialize(model.conv1)
    return model


class ResNet18(nn.Module):
    """The published network, for images with three channels."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool: nn.Module = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _build_layer(widths[0], widths[0], stride=1)
        self.layer2 = _build_layer(widths[0], widths[1], stride=2)
        self.layer3 = _build_layer(widths[1], widths[2], stride=2)
        self.layer4 = _build_layer(widths[2], widths[3], stride=2)
        self.fc = nn.Linear(widths[3], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _initialize(module)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape (N, classes)."""
        maps = F.relu_(self.bn1(self.conv1(images)))
        maps = self.layer1(self.maxpool(maps))
        maps = self.layer4(self.layer3(self.layer2(maps)))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(maps, 1).flatten(1))
        return logits


class MirrorAverage(nn.Module):
    """A network whose logits are the means over each image and its mirror image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape (N, classes)."""
        logits: Tensor = (self.model(images) + self.model(images.flip(3))) / 2
        return logits


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, to whose output the block's input is added."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:  # bring the input to the shape of the output
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of shape (N, channels, H / stride, W / stride)."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        maps = F.relu_(self.bn1(self.conv1(maps)))
        maps = self.bn2(self.conv2(maps))
        return F.relu_(maps.add_(shortcut))


def _build_layer(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(channels_in, channels, stride)
    return nn.Sequential(first, *(ResidualBlock(channels, channels, 1) for _ in range(BLOCKS - 1)))


def _initialize(conv: nn.Conv2d) -> None:
    """Draw weights as in He et al., 2015 ("Delving Deep into Rectifiers")."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
