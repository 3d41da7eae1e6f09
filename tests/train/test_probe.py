"""The description of a data set, and the probe of a configuration's speed and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpo.errors import TrainableError
from hpo.train import probe as probe_module
from hpo.train.data import Dataset, load
from hpo.train.learner import Learner
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "last"),
    [(20, 4), (18, 2), (17, 5)],  # of batches of 4; a single last image joins the batch before
)
def test_the_memory_on_a_gpu_is_that_of_every_batch_of_a_trial_measured_from_zero(
    images: int, last: int, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    done: list[Any] = []
    take_step = Learner.take_step

    def load_on_cpu(*, device: str, **data: Any) -> Dataset:
        done.append("load")
        return load(**data)

    def observed_step(learner: Learner, indices: torch.Tensor) -> None:
        done.append(len(indices))
        take_step(learner, indices)

    monkeypatch.setattr(probe_module, "load", load_on_cpu)
    monkeypatch.setattr(probe_module, "choose_precision", lambda *_: "fp32")
    monkeypatch.setattr(probe_module, "free_memory", lambda: done.append("free"))
    monkeypatch.setattr(probe_module, "GPU_BATCH", 30)
    monkeypatch.setattr(probe_module, "evaluate", lambda _, batch, precision: done.append(("evaluate", len(batch))))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("reset"))
    monkeypatch.setattr(Learner, "take_step", observed_step)
    Probe({"batch_size": 4}, data={**DATA, "train_samples": images}, device="cuda").close()
    assert done[:3] == ["free", "reset", "load"]
    assert done[-2:] == [last, ("evaluate", 30)]
    assert done.count(4) >= 3
