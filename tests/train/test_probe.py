"""The description of a data set, and the probe of a configuration's speed and memory."""

from __future__ import annotations

from typing import Any

import pytest

from hpo.errors import TrainableError
from hpo.train.data import load
from hpo.train.probe import Probe, describe_data

DATA: dict[str, Any] = {"dataset": "fashion_mnist_sample", "train_samples": 20, "val_samples": 20}


def test_a_probe_measures_speed_and_memory_and_has_a_state_to_store(one_thread: None) -> None:
    probe = Probe({"batch_size": 4}, data=DATA, device="cpu")
    images_per_second, memory_bytes = probe.measure(seconds=0.05)
    assert 0 < images_per_second < 1e6
    assert 2**24 < memory_bytes < 2**40
    assert set(probe.state()) == {"model", "optimizer"}


def test_a_data_set_is_described_by_its_hash_and_its_numbers_of_images() -> None:
    assert describe_data(DATA) == (load(**DATA).sha256, (20, 20, 500))


def test_a_wrong_parameter_is_an_error() -> None:
    with pytest.raises(TrainableError, match="batchsize"):
        Probe({"batchsize": 4}, data=DATA, device="cpu")
