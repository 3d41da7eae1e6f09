"""The evaluation of a model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from hpo.train import evaluation
from hpo.train.data import Images
from hpo.train.evaluation import evaluate
from hpo.train.network import build_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_evaluation_is_the_mean_over_all_images_regardless_of_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "CPU_BATCH", 10)
    torch.manual_seed(0)
    model = build_model()
    count = 23
    images = Images(torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8), torch.randint(0, 10, (count,)))
    loss, accuracy = evaluate(model, images)
    with torch.no_grad():
        logits = model.eval()(images.images[:, None] / 255)
    assert loss == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == images.labels).float().mean().item())


def test_an_evaluation_does_not_change_the_network() -> None:
    torch.manual_seed(0)
    model = build_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, Images(torch.full((5, 28, 28), 200, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
