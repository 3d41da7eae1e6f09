"""A network in training. tests/train/test_loop.py checks what it learns."""

from __future__ import annotations

import io

import pytest
import torch

from hpo.train.data import Images
from hpo.train.learner import Learner
from hpo.train.params import TrainParams

pytestmark = pytest.mark.usefixtures("one_thread")


def images_of(count: int) -> Images:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count) % 10)


def learner_of(count: int, batch_size: int) -> Learner:
    torch.manual_seed(0)
    return Learner(TrainParams(batch_size=batch_size), "fp32", images_of(count))


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [
        (8, 4, [4, 4]),
        (9, 4, [4, 5]),  # batch norm cannot train on one image: it joins the batch before
        (10, 4, [4, 4, 2]),
        (5, 4, [5]),
        (6, 1000, [6]),  # a batch is at most the whole data set
    ],
)
def test_an_epoch_takes_each_image_once_in_batches_of_at_least_two(
    monkeypatch: pytest.MonkeyPatch, count: int, batch_size: int, sizes: list[int]
) -> None:
    batches: list[list[int]] = []
    learner = learner_of(count, batch_size)
    monkeypatch.setattr(learner, "take_step", lambda indices: batches.append(indices.tolist()))
    learner.train_epoch(seed=1)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(index for batch in batches for index in batch) == list(range(count))


@pytest.mark.slow
def test_a_restored_learner_continues_with_the_same_numbers() -> None:
    learner = learner_of(6, 3)
    learner.train_epoch(seed=1)
    file = io.BytesIO()
    torch.save(learner.state(), file)
    file.seek(0)
    torch.manual_seed(99)  # other initial weights
    restored = Learner(TrainParams(batch_size=3), "fp32", images_of(6))
    restored.restore(torch.load(file, weights_only=True))
    assert restored.train_epoch(seed=2) == learner.train_epoch(seed=2)
