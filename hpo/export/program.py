"""A network as a torch.export program, which loads without the code of the network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """A network with the scaling of its images, so that users of the program cannot forget it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape (N, classes) for uint8 images of shape (N, 28, 28)."""
        logits: Tensor = self.network(images.unsqueeze(1).float() / 255)
        return logits


def write_program(classifier: nn.Module, path: Path, examples: Tensor) -> nn.Module:
    """Write a classifier as a program that takes any number of images, and check that it computes the same logits.

    Args:
        classifier: from uint8 images of shape (N, 28, 28) to logits.
        path: the file to write.
        examples: at least two images.

    Returns:
        The program, loaded from the file.

    Raises:
        AssertionError: the program computes other logits.
    """
    classifier.eval()
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    torch.export.save(torch.export.export(classifier, (examples,), dynamic_shapes=shapes), path)
    program: nn.Module = torch.export.load(path).module()
    with torch.no_grad():
        for count in (1, len(examples)):
            torch.testing.assert_close(program(examples[:count]), classifier(examples[:count]))
    return program
