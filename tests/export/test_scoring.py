"""The scores of an exported model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hpo.export.scoring import FP32_ON_CPU, Scores, compare_scores, count_confusions, score_as_trained
from hpo.train.data import Dataset, Images
from hpo.train.params import TrainParams


@pytest.mark.parametrize(("precision", "device"), [("fp32", "cpu"), ("bf16", "cuda")])
def test_a_trial_in_fp32_or_on_a_gpu_that_is_not_here_is_not_scored_a_second_time(
    precision: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data = {"dataset": "fashion_mnist_sample", "data_dir": str(tmp_path)}
    assert score_as_trained(TrainParams(precision=precision), {}, device, data) is None


def images_of(labels: list[int]) -> Images:
    """Images whose pixels have the number of the label."""
    tensor = torch.tensor(labels)
    return Images(tensor.to(torch.uint8)[:, None, None].expand(-1, 28, 28), tensor)


def test_scores_that_differ_from_the_stored_ones_are_remarks_with_the_number_of_images() -> None:
    dataset = Dataset(images_of([0]), images_of([0] * 50), images_of([0] * 500))
    scores = Scores(FP32_ON_CPU, {"val_accuracy": 0.5, "test_accuracy": 0.75})
    assert compare_scores(scores, {}, dataset, "a GPU") == []
    assert compare_scores(scores, {"val_accuracy": 0.5, "test_accuracy": 0.75}, dataset, "a GPU") == []
    assert compare_scores(scores, {"val_accuracy": 0.48, "test_accuracy": 0.754}, dataset, "a GPU") == [
        "val_accuracy is 0.5000 here, in fp32 on the CPU, and was 0.4800 on a GPU: 1 images differ",
        "test_accuracy is 0.7500 here, in fp32 on the CPU, and was 0.7540 on a GPU: 2 images differ",
    ]


class NextClass(nn.Module):
    """Takes every image for the class after its own, and the last class for itself."""

    def forward(self, images: Tensor) -> Tensor:
        answers = (images[:, 0, 0].long() + 1).clamp(max=9)
        return nn.functional.one_hot(answers, 10).float()


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_confusions_are_counted_by_true_class_and_answer(batch_size: int) -> None:
    rows = count_confusions(NextClass(), images_of([0, 0, 3, 9, 9, 9]), batch_size)
    expected = [[0] * 10 for _ in range(10)]
    expected[0][1], expected[3][4], expected[9][9] = 2, 1, 3
    assert rows == expected
