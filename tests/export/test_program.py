"""The program of a network. tests/export/test_exporting.py exports a trained one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hpo.export.program import Classifier, write_program

IMAGES = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Identity(nn.Module):
    """Returns the images that the network would get."""

    def forward(self, images: Tensor) -> Tensor:
        return images


class OtherInTheProgram(nn.Module):
    """Computes something else when it is exported."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((1, 2)) + (1.0 if torch.compiler.is_exporting() else 0.0)


def test_a_classifier_scales_its_images_to_one_channel_from_0_to_1() -> None:
    scaled = Classifier(Identity())(IMAGES)
    assert scaled.shape == (3, 1, 28, 28)
    assert torch.equal(scaled[:, 0], IMAGES / 255)


@pytest.mark.slow  # imports torch.export
def test_a_program_takes_any_number_of_images(tmp_path: Path) -> None:
    classifier = Classifier(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(28 * 28, 10)))
    write_program(classifier, tmp_path / "model.pt2", IMAGES)
    program = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        for images in (IMAGES[:1], IMAGES, IMAGES.repeat(7, 1, 1)):
            torch.testing.assert_close(program(images), classifier(images))


@pytest.mark.slow
def test_a_program_that_computes_other_logits_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not close"):
        write_program(OtherInTheProgram(), tmp_path / "model.pt2", IMAGES)
