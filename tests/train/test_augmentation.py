"""The changes of training images: mirrored, moved, erased; and where their random numbers come from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpo.train.augmentation import ERASED_AREA, ERASED_ASPECT, Augmentation
from hpo.train.params import SIDE, TrainParams

COUNT = 400
CPU = torch.device("cpu")


def draw_images(count: int = COUNT) -> Tensor:
    """Images without a pixel of value 0, so that every 0 was put there."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def augment(seed: int = 0, **params: Any) -> Tensor:
    augmentation = Augmentation(TrainParams(**params), COUNT, CPU)
    augmentation.draw(torch.Generator().manual_seed(seed))
    return augmentation.apply(draw_images(), torch.arange(COUNT))


def moved(image: Tensor, down: int, right: int) -> Tensor:
    """An image moved over a ground of zeros."""
    canvas = torch.zeros(3 * SIDE, 3 * SIDE, dtype=image.dtype)
    canvas[SIDE + down : 2 * SIDE + down, SIDE + right : 2 * SIDE + right] = image
    return canvas[SIDE : 2 * SIDE, SIDE : 2 * SIDE]


def test_about_half_of_the_images_are_mirrored_left_to_right() -> None:
    mirrored = 0
    for before, after in zip(draw_images(), augment(flip=True), strict=True):
        if torch.equal(after, before.flip(1)):
            mirrored += 1
        else:
            assert torch.equal(after, before)
    # Five standard deviations of a fair coin.
    assert abs(mirrored - COUNT / 2) < 5 * (COUNT / 4) ** 0.5


@pytest.mark.parametrize("most", [1, 3, SIDE - 1])
def test_an_image_is_moved_by_at_most_so_many_pixels_over_a_ground_of_zeros(most: int) -> None:
    augmentation = Augmentation(TrainParams(translate=most), COUNT, CPU)
    augmentation.draw(torch.Generator().manual_seed(0))
    after, moves = augmentation.apply(draw_images(), torch.arange(COUNT)), augmentation._moves.T.tolist()
    for before, image, (down, right) in zip(draw_images(), after, moves, strict=True):
        assert torch.equal(image, moved(before, down, right))
    seen = {each for move in moves for each in move}
    assert (min(seen), max(seen)) == (-most, most)
    assert seen == set(range(-most, most + 1))


def test_a_mirrored_image_is_moved_after_it_is_mirrored() -> None:
    augmentation = Augmentation(TrainParams(flip=True, translate=2), COUNT, CPU)
    augmentation.draw(torch.Generator().manual_seed(0))
    after, moves = augmentation.apply(draw_images(), torch.arange(COUNT)), augmentation._moves.T.tolist()
    flips = augmentation._mirrored.tolist()
    assert len(set(flips)) == 2
    for before, image, (down, right), is_mirrored in zip(draw_images(), after, moves, flips, strict=True):
        assert torch.equal(image, moved(before.flip(1) if is_mirrored else before, down, right))


@pytest.mark.parametrize("probability", [0.25, 1])
def test_a_box_of_so_many_images_is_set_to_zero(probability: float) -> None:
    before, after = draw_images(), augment(erase=probability)
    erased = after == 0
    assert torch.equal(after[~erased], before[~erased])
    count = 0
    for mask in erased:
        if not mask.any():
            continue
        count += 1
        height, width = int(mask.any(1).sum()), int(mask.any(0).sum())
        assert int(mask.sum()) == height * width  # a full box
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert int(rows[-1] - rows[0]) + 1 == height
        assert int(columns[-1] - columns[0]) + 1 == width
        # Sides are whole pixels, cut off at those of the image: half a pixel on each side.
        assert (height - 0.5) * (width - 0.5) <= ERASED_AREA[1] * SIDE**2
        assert (height + 0.5) * (width + 0.5) >= ERASED_AREA[0] * SIDE**2
        assert (height - 0.5) / (width + 0.5) <= ERASED_ASPECT[1]
        assert (height + 0.5) / (width - 0.5) >= ERASED_ASPECT[0] or width == 1
    assert abs(count - COUNT * probability) <= 5 * (COUNT * probability * (1 - probability)) ** 0.5


def test_boxes_reach_every_border_of_the_image() -> None:
    erased = (augment(erase=1) == 0).any(0)
    assert erased.all()


ALL: dict[str, Any] = {"flip": True, "translate": 2, "erase": 0.5}


def test_an_image_changes_in_the_same_way_in_any_batch() -> None:
    augmentation = Augmentation(TrainParams(**ALL), COUNT, CPU)
    augmentation.draw(torch.Generator().manual_seed(0))
    images, order = draw_images(), torch.randperm(COUNT, generator=torch.Generator().manual_seed(9))
    whole = augmentation.apply(images, torch.arange(COUNT))
    for indices in order.split(7):
        assert torch.equal(augmentation.apply(images[indices], indices), whole[indices])


def test_an_epoch_depends_on_its_seed_alone() -> None:
    assert torch.equal(augment(seed=1, **ALL), augment(seed=1, **ALL))
    assert not torch.equal(augment(seed=1, **ALL), augment(seed=2, **ALL))


def test_buffers_stay_where_they_are_and_a_step_draws_nothing() -> None:
    augmentation = Augmentation(TrainParams(**ALL), COUNT, CPU)
    buffers = [value for value in vars(augmentation).values() if isinstance(value, Tensor)]
    places = [buffer.data_ptr() for buffer in buffers]
    before = [buffer.clone() for buffer in buffers]
    generator = torch.Generator().manual_seed(0)
    augmentation.draw(generator)
    assert sum(not torch.equal(now, then) for now, then in zip(buffers, before, strict=True)) == 3
    drawn, everywhere = generator.get_state(), torch.get_rng_state()
    augmentation.apply(draw_images(), torch.arange(COUNT))
    assert torch.equal(generator.get_state(), drawn)
    assert torch.equal(torch.get_rng_state(), everywhere)
    assert [value.data_ptr() for value in vars(augmentation).values() if isinstance(value, Tensor)] == places


def test_it_is_used_if_any_image_changes() -> None:
    assert not Augmentation.is_used(TrainParams())
    for name, value in ALL.items():
        assert Augmentation.is_used(TrainParams(**{name: value}))
