"""Training steps as CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from hpo.train.cuda_graph import GraphedStep
from hpo.train.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_replayed_steps_give_the_losses_of_eager_steps(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"dataset": "fashion_mnist_sample", "train_samples": 200, "val_samples": 100}
    params = {"batch_size": 16, "optimizer": optimizer, "lr": 1e-3}

    def losses() -> list[float]:
        reports = train(params, data=data, seed=0, max_epochs=3, device="cuda")
        return [report.metrics["train_loss"] for report in reports]

    replayed = losses()
    monkeypatch.setattr(GraphedStep, "WARM_UP", 10**9)
    assert replayed == pytest.approx(losses(), rel=0.02)
