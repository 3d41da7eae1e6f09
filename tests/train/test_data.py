"""Data sets: the sample, the split, the hash."""

from __future__ import annotations

import gzip
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hpo.errors import DataError
from hpo.train import fashion_mnist
from hpo.train.data import Dataset, Images, load, stratified_order
from hpo.train.fashion_mnist import SAMPLE_DIR

CLASSES = 10


@pytest.fixture(autouse=True)
def uncached() -> Iterator[None]:
    """Each test reads the data set again."""
    load.cache_clear()
    yield
    load.cache_clear()


def load_sample(train_samples: int | None = None, val_samples: int = 400) -> Dataset:
    return load(dataset="fashion_mnist_sample", train_samples=train_samples, val_samples=val_samples)


def count(*parts: Images) -> Counter[tuple[bytes, int]]:
    """How often each (image, label) occurs."""
    return Counter(
        (image.numpy().tobytes(), int(label))
        for part in parts
        for image, label in zip(part.images, part.labels, strict=True)
    )


def class_counts(labels: Tensor) -> Tensor:
    return torch.bincount(labels, minlength=CLASSES)


def official(kind: str) -> Counter[tuple[bytes, int]]:
    """How often each (image, label) occurs in the files of the sample: big-endian magic number, sizes, then bytes."""
    pixels = gzip.decompress((SAMPLE_DIR / f"{kind}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((SAMPLE_DIR / f"{kind}-labels-idx1-ubyte.gz").read_bytes())
    magic, length, rows, columns = struct.unpack(">4i", pixels[:16])
    assert (magic, *struct.unpack(">2i", labels[:8])) == (0x0803, 0x0801, length)
    size = rows * columns
    return Counter((pixels[16 + i * size : 16 + (i + 1) * size], labels[8 + i]) for i in range(length))


# --- the sample and the split -------------------------------------------------------------------------------------


def test_the_sample_has_2000_training_and_500_test_images_with_balanced_classes() -> None:
    dataset = load_sample(val_samples=400)
    parts = (dataset.train, dataset.validation, dataset.test)
    assert [tuple(part.images.shape) for part in parts] == [(1600, 28, 28), (400, 28, 28), (500, 28, 28)]
    assert {part.images.dtype for part in parts} == {torch.uint8}
    assert {part.labels.dtype for part in parts} == {torch.int64}
    for part in parts:
        assert class_counts(part.labels).tolist() == [len(part) // CLASSES] * CLASSES


def test_training_and_validation_images_are_the_official_training_images_once_each() -> None:
    dataset = load_sample()
    assert count(dataset.train, dataset.validation) == official("train")
    assert count(dataset.test) == official("t10k")


def test_training_and_validation_images_do_not_overlap() -> None:
    # No image occurs twice in the sample, so equal images would be the same image.
    assert max(official("train").values()) == 1
    dataset = load_sample()
    assert not count(dataset.train) & count(dataset.validation)


def test_every_prefix_of_the_order_has_balanced_classes_within_one_image() -> None:
    labels = torch.arange(CLASSES).repeat(60)[torch.randperm(600, generator=torch.Generator().manual_seed(1))]
    order = stratified_order(labels)
    assert sorted(order.tolist()) == list(range(600))
    so_far = torch.nn.functional.one_hot(labels[order], CLASSES).cumsum(0)
    assert int((so_far.max(1).values - so_far.min(1).values).max()) <= 1


def test_every_prefix_of_the_order_has_unequal_classes_in_proportion_within_one_image() -> None:
    labels = torch.tensor([0] * 30 + [1] * 70)
    so_far = (labels[stratified_order(labels)] == 0).cumsum(0)
    share = 0.3 * torch.arange(1, 101)
    assert float((so_far - share).abs().max()) <= 1


def test_the_order_within_a_class_is_shuffled() -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    assert stratified_order(labels).tolist() != list(range(100))


@pytest.mark.parametrize("val_samples", [1, 95, 333])
def test_a_validation_set_of_any_size_is_stratified_within_one_image(val_samples: int) -> None:
    dataset = load_sample(val_samples=val_samples)
    assert len(dataset.validation) == val_samples
    assert len(dataset.train) == 2000 - val_samples
    for part in (dataset.train, dataset.validation):
        counts = class_counts(part.labels)
        assert int(counts.max() - counts.min()) <= 1


def test_train_samples_takes_a_stratified_prefix_of_the_training_images() -> None:
    whole, part = load_sample(), load_sample(train_samples=255)
    assert len(part.train) == 255
    assert torch.equal(part.train.images, whole.train.images[:255])
    assert torch.equal(part.validation.images, whole.validation.images)
    counts = class_counts(part.train.labels)
    assert int(counts.max() - counts.min()) <= 1


def test_the_split_does_not_depend_on_the_global_seed() -> None:
    torch.manual_seed(1)
    first = load_sample().sha256
    load.cache_clear()
    torch.manual_seed(2)
    assert load_sample().sha256 == first


def test_a_data_set_is_read_once_in_a_process() -> None:
    assert load_sample() is load_sample()


def test_every_image_can_be_used() -> None:
    assert len(load_sample(train_samples=1600, val_samples=400).train) == 1600
    assert len(load_sample(val_samples=1999).train) == 1


def test_no_image_needs_to_be_held_out() -> None:
    dataset = load_sample(val_samples=0)
    assert (len(dataset.train), len(dataset.validation)) == (2000, 0)
    assert count(dataset.train) == official("train")
    assert dataset.sha256 != load_sample(val_samples=1).sha256


@pytest.mark.parametrize(("train_samples", "val_samples"), [(1601, 400), (None, 2000), (1, 2000), (None, 5000)])
def test_too_few_images_are_an_error_with_the_sizes(train_samples: int | None, val_samples: int) -> None:
    with pytest.raises(DataError) as caught:
        load_sample(train_samples, val_samples)
    text = str(caught.value)
    for fragment in ("fashion_mnist_sample", "2000", "data.val_samples", str(val_samples), "data.train_samples"):
        assert fragment in text
    assert str(train_samples or "at least 1") in text


def test_the_full_data_set_is_read_from_the_data_folder_and_a_failure_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(fashion_mnist, "_download", fail)
    with pytest.raises(DataError, match=r"could not be downloaded \(no network\)"):
        load(data_dir=str(tmp_path), val_samples=400)
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name in fashion_mnist.FILES:
        (folder / name).write_bytes(gzip.decompress((SAMPLE_DIR / f"{name}.gz").read_bytes()))
    assert load(data_dir=str(tmp_path), val_samples=400).sha256 == load_sample().sha256


def test_an_unknown_data_set_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(DataError, match=r"'fashion_mnst'.*did you mean fashion_mnist\?"):
        load(dataset="fashion_mnst")
    with pytest.raises(DataError, match=r"'cifar10'.*fashion_mnist, fashion_mnist_sample"):
        load(dataset="cifar10")


# --- positions in mapped images -----------------------------------------------------------------------------------


def test_the_parts_of_the_split_share_the_images_of_the_file() -> None:
    dataset = load_sample()
    assert dataset.train.pixels.data_ptr() == dataset.validation.pixels.data_ptr()
    assert len(dataset.train.pixels) == 2000


def test_selected_images_are_the_same_as_those_that_are_taken() -> None:
    pixels = torch.arange(6, dtype=torch.uint8)[:, None, None].expand(-1, 28, 28)
    images = Images(pixels, torch.arange(6))
    indices = torch.tensor([4, 0, 5, 1, 2])
    taken, selected = images.take(indices), images.select(indices)
    assert taken.positions is None
    assert selected.pixels is images.pixels
    again = torch.tensor([3, 1])
    for one, other in (
        (taken, selected),
        (taken.take(again), selected.take(again)),
        (taken.take(again), selected.select(again)),
        *zip(taken.split(2), selected.split(2), strict=True),
        (taken.to("meta"), selected.to("meta")),
    ):
        assert len(one) == len(other)
        assert one.images.shape == other.images.shape
        if one.device.type == "cpu":
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
            assert torch.equal(one.as_input(), other.as_input())
    assert selected.to("cpu") is selected, "on a CPU, nothing is copied"
    assert selected.to("meta").positions is None, "a GPU gets the images, in their order"


# --- the hash -----------------------------------------------------------------------------------------------------


def change_first(images: Images, *, pixel: int = 0, label: int = 0) -> Images:
    """The same images, with another first pixel or label of the first image."""
    copy = Images(images.images.clone(), images.labels.clone())
    copy.images[0, 0, 0] += pixel
    copy.labels[0] = (copy.labels[0] + label) % CLASSES
    return copy


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("change", [{"pixel": 1}, {"label": 1}])
def test_the_hash_depends_on_every_pixel_and_label(part: str, change: dict[str, int]) -> None:
    dataset = load_sample()
    assert replace(dataset, **{part: change_first(getattr(dataset, part))}).sha256 == dataset.sha256
    assert replace(dataset, **{part: change_first(getattr(dataset, part), **change)}).sha256 != dataset.sha256


def test_the_hash_depends_on_the_order_and_the_split() -> None:
    dataset = load_sample()
    backwards = dataset.train.take(torch.arange(len(dataset.train)).flip(0))
    hashes = {
        dataset.sha256,
        replace(dataset, train=backwards).sha256,
        replace(dataset, train=dataset.validation, validation=dataset.train).sha256,
        load_sample(val_samples=399).sha256,
        load_sample(train_samples=1599).sha256,
    }
    assert len(hashes) == 5
