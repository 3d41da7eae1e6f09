"""Data sets: the sample that ships, the split, and what the user reads when the files are missing."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import shutil
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.datasets import FashionMNIST

from hpo.errors import DataError
from hpo.train.data import SAMPLE_DIR, Dataset, Images, load, stratified_order

FILES = [
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
]
CLASSES = 10


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing listens on the discard port: an attempt to download fails at once, with a network or without."""
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "*")
    load.cache_clear()
    yield
    load.cache_clear()


@pytest.fixture
def sample_is_official(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the files of the sample the checksums that torchvision asks the official ones for."""
    sums = [(name, hashlib.md5((SAMPLE_DIR / name).read_bytes()).hexdigest()) for name in FILES]
    monkeypatch.setattr(FashionMNIST, "resources", sums)


def load_sample(train_samples: int | None = None, val_samples: int = 400) -> Dataset:
    return load(dataset="fashion_mnist_sample", train_samples=train_samples, val_samples=val_samples)


def counted(*parts: Images) -> Counter[tuple[bytes, int]]:
    """How often each (image, label) occurs."""
    return Counter(
        (image.numpy().tobytes(), int(label))
        for part in parts
        for image, label in zip(part.images, part.labels, strict=True)
    )


def class_counts(labels: Tensor) -> Tensor:
    return torch.bincount(labels, minlength=CLASSES)


def official(kind: str) -> Counter[tuple[bytes, int]]:
    """Read the two idx files of the sample by the letter of their format: big-endian magic, sizes, then bytes."""
    pixels = gzip.decompress((SAMPLE_DIR / f"{kind}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((SAMPLE_DIR / f"{kind}-labels-idx1-ubyte.gz").read_bytes())
    magic, count, rows, columns = struct.unpack(">4i", pixels[:16])
    assert (magic, *struct.unpack(">2i", labels[:8])) == (0x0803, 0x0801, count)
    size = rows * columns
    return Counter((pixels[16 + i * size : 16 + (i + 1) * size], labels[8 + i]) for i in range(count))


# --- the sample and the split -------------------------------------------------------------------------------------


def test_the_sample_has_2000_and_500_images_of_28_by_28_the_classes_in_balance() -> None:
    dataset = load_sample(val_samples=400)
    parts = (dataset.train, dataset.validation, dataset.test)
    assert [tuple(part.images.shape) for part in parts] == [(1600, 28, 28), (400, 28, 28), (500, 28, 28)]
    assert {part.images.dtype for part in parts} == {torch.uint8}
    assert {part.labels.dtype for part in parts} == {torch.int64}
    for part in parts:
        assert class_counts(part.labels).tolist() == [len(part) // CLASSES] * CLASSES


def test_training_and_validation_images_are_the_official_training_images_each_once() -> None:
    dataset = load_sample()
    assert counted(dataset.train, dataset.validation) == official("train")
    assert counted(dataset.test) == official("t10k")


def test_training_and_validation_images_do_not_overlap() -> None:
    # The sample has no image twice, so equal images would be the same image.
    assert max(official("train").values()) == 1
    dataset = load_sample()
    assert not counted(dataset.train) & counted(dataset.validation)


def test_every_prefix_of_the_order_has_the_classes_in_balance_within_one_image() -> None:
    labels = torch.arange(CLASSES).repeat(60)[torch.randperm(600, generator=torch.Generator().manual_seed(1))]
    order = stratified_order(labels)
    assert sorted(order.tolist()) == list(range(600))
    so_far = torch.nn.functional.one_hot(labels[order], CLASSES).cumsum(0)
    assert int((so_far.max(1).values - so_far.min(1).values).max()) <= 1


def test_every_prefix_of_the_order_has_unequal_classes_in_their_proportions_within_one_image() -> None:
    labels = torch.tensor([0] * 30 + [1] * 70)
    so_far = (labels[stratified_order(labels)] == 0).cumsum(0)
    share = 0.3 * torch.arange(1, 101)
    assert float((so_far - share).abs().max()) <= 1


def test_the_order_within_a_class_is_shuffled() -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    assert stratified_order(labels).tolist() != list(range(100))


@pytest.mark.parametrize("val_samples", [1, 95, 333])
def test_any_size_of_validation_is_stratified_within_one_image(val_samples: int) -> None:
    dataset = load_sample(val_samples=val_samples)
    assert len(dataset.validation) == val_samples
    assert len(dataset.train) == 2000 - val_samples
    for part in (dataset.train, dataset.validation):
        counts = class_counts(part.labels)
        assert int(counts.max() - counts.min()) <= 1


def test_train_samples_takes_that_many_of_the_same_images_stratified() -> None:
    whole, part = load_sample(), load_sample(train_samples=255)
    assert len(part.train) == 255
    assert torch.equal(part.train.images, whole.train.images[:255])
    assert torch.equal(part.validation.images, whole.validation.images)
    counts = class_counts(part.train.labels)
    assert int(counts.max() - counts.min()) <= 1


def test_the_split_is_the_same_every_time() -> None:
    torch.manual_seed(1)
    first = load_sample().sha256
    load.cache_clear()
    torch.manual_seed(2)
    assert load_sample().sha256 == first


def test_a_data_set_is_read_once_and_kept() -> None:
    assert load_sample() is load_sample()


def test_the_whole_can_be_split_and_not_one_image_more() -> None:
    assert len(load_sample(train_samples=1600, val_samples=400).train) == 1600
    assert len(load_sample(val_samples=1999).train) == 1


@pytest.mark.parametrize(("train_samples", "val_samples"), [(1601, 400), (None, 2000), (1, 2000), (None, 5000)])
def test_sizes_that_do_not_fit_are_named_with_what_there_is(train_samples: int | None, val_samples: int) -> None:
    with pytest.raises(DataError) as caught:
        load_sample(train_samples, val_samples)
    text = str(caught.value)
    for fragment in ("fashion_mnist_sample", "2000", "data.val_samples", str(val_samples), "data.train_samples"):
        assert fragment in text
    assert str(train_samples or "at least 1") in text


def test_an_unknown_data_set_gets_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'fashion_mnst'.*did you mean fashion_mnist\?"):
        load(dataset="fashion_mnst")
    with pytest.raises(DataError, match=r"'cifar10'.*fashion_mnist, fashion_mnist_sample"):
        load(dataset="cifar10")


# --- the hash -----------------------------------------------------------------------------------------------------


def changed(images: Images, *, pixel: int = 0, label: int = 0) -> Images:
    """The same images but for the first one's first pixel or label."""
    copy = Images(images.images.clone(), images.labels.clone())
    copy.images[0, 0, 0] += pixel
    copy.labels[0] = (copy.labels[0] + label) % CLASSES
    return copy


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("change", [{"pixel": 1}, {"label": 1}])
def test_the_hash_changes_with_a_single_pixel_or_label(part: str, change: dict[str, int]) -> None:
    dataset = load_sample()
    assert replace(dataset, **{part: changed(getattr(dataset, part))}).sha256 == dataset.sha256
    assert replace(dataset, **{part: changed(getattr(dataset, part), **change)}).sha256 != dataset.sha256


def test_the_hash_tells_apart_where_the_images_are_and_in_which_order() -> None:
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


# --- Fashion-MNIST itself -----------------------------------------------------------------------------------------


def test_missing_files_and_no_network_are_one_error_with_folder_files_and_the_sample(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(data_dir=str(tmp_path / "data"))
    text = str(caught.value)
    assert str(tmp_path / "data" / "FashionMNIST" / "raw") in text
    for name in FILES:
        assert name in text
    assert "--data-dir" in text
    assert "hpo.run quick" in text
    # `from None`: the user sees this text, not torchvision's and urllib's below it.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_data_folder_that_cannot_be_made_is_the_same_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(DataError, match="--data-dir"):
        load(data_dir=str(blocked))


def test_a_failed_attempt_is_not_remembered(tmp_path: Path, sample_is_official: None) -> None:
    with pytest.raises(DataError):
        load(data_dir=str(tmp_path), val_samples=400)
    shutil.copytree(SAMPLE_DIR, tmp_path / "FashionMNIST" / "raw", dirs_exist_ok=True)
    assert load(data_dir=str(tmp_path), val_samples=400).sha256 == load_sample().sha256


def test_the_four_files_put_in_the_folder_are_read_without_a_network(tmp_path: Path, sample_is_official: None) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FILES:
        shutil.copy(SAMPLE_DIR / name, raw)
    assert load(data_dir=str(tmp_path), val_samples=400).sha256 == load_sample().sha256


def test_a_file_that_is_not_the_official_one_is_not_taken_for_it(tmp_path: Path, sample_is_official: None) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FILES:
        shutil.copy(SAMPLE_DIR / name, raw)
    (raw / FILES[2]).write_bytes(gzip.compress(b"<html>please log in</html>"))
    with pytest.raises(DataError, match="could not be fetched"):
        load(data_dir=str(tmp_path), val_samples=400)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the terminal for the test."""


def test_missing_files_are_downloaded_without_a_word_on_the_terminal(
    tmp_path: Path,
    sample_is_official: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    handler = functools.partial(_Quiet, directory=str(SAMPLE_DIR))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_address[1]}/"])
            dataset = load(data_dir=str(tmp_path), val_samples=400)
        finally:
            server.shutdown()
            thread.join()
    assert dataset.sha256 == load_sample().sha256
    assert capsys.readouterr() == ("", "")
