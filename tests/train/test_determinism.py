"""Deterministic kernels of cuDNN: the setting, which can be seen without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hpo.train.determinism import deterministic_kernels
from hpo.train.learner import Learner
from hpo.train.loop import train
from hpo.train.probe import Probe

DATA = {"dataset": "fashion_mnist_sample", "train_samples": 10, "val_samples": 10}
Flags = tuple[bool, bool]  # deterministic, benchmark


def flags() -> Flags:
    return torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark


@pytest.fixture
def as_set_by_the_user() -> Iterator[Flags]:
    before = flags()
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    yield flags()
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Flags]:
    """The flags in each step and in each evaluation."""
    found: list[Flags] = []

    def observe(*_: object) -> tuple[float, float]:
        found.append(flags())
        return 0.0, 0.0

    monkeypatch.setattr(Learner, "take_step", observe)
    monkeypatch.setattr("hpo.train.loop.evaluate", observe)
    return found


def test_outside_of_the_block_nothing_changes_even_after_an_error(as_set_by_the_user: Flags) -> None:
    def fail() -> None:
        with deterministic_kernels(True):
            assert flags() == (True, False)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert flags() == as_set_by_the_user
    with deterministic_kernels(False):
        assert flags() == as_set_by_the_user


@pytest.mark.parametrize("is_wanted", [True, False])
def test_a_trial_has_the_kernels_while_it_trains_and_scores(
    is_wanted: bool, as_set_by_the_user: Flags, seen: list[Flags]
) -> None:
    params = {"batch_size": 5, "deterministic": is_wanted}
    for _ in train(params, data=DATA, seed=0, max_epochs=2, device="cpu"):
        assert flags() == as_set_by_the_user, "a suspended trial changes nothing for others in the process"
    assert seen == [(True, False) if is_wanted else as_set_by_the_user] * 7  # four steps, three evaluations
    assert flags() == as_set_by_the_user


def test_a_probe_measures_with_the_kernels_of_the_trial(as_set_by_the_user: Flags, seen: list[Flags]) -> None:
    probe = Probe({"batch_size": 5, "deterministic": True}, data=DATA, device="cpu")
    assert flags() == as_set_by_the_user
    probe.measure(seconds=0.01)
    assert len(seen) > 1
    assert set(seen) == {(True, False)}
    assert flags() == as_set_by_the_user


@pytest.mark.slow
def test_on_a_cpu_no_number_changes() -> None:
    (one,), (other,) = (
        train({"batch_size": 5, "deterministic": is_wanted}, data=DATA, seed=0, max_epochs=1, device="cpu")
        for is_wanted in (True, False)
    )
    assert one.metrics["train_loss"] == other.metrics["train_loss"]
