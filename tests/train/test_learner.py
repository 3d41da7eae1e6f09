"""A network in training. tests/train/test_loop.py checks what it learns."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from hpo.train.data import Images
from hpo.train.fast_conv import in_memory_order, use_fast_convolutions
from hpo.train.learner import Learner
from hpo.train.network import MirrorAverage, build_model
from hpo.train.params import TrainParams

pytestmark = pytest.mark.usefixtures("one_thread")


def images_of(count: int) -> Images:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count) % 10)


def learner_of(count: int, batch_size: int, **params: Any) -> Learner:
    torch.manual_seed(0)
    return Learner(TrainParams(batch_size=batch_size, **params), "fp32", images_of(count), max_epochs=3)


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


TINY = 1e-12  # a learning rate with which weights stay as they are


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"lr": 0.1}, {"lr": TINY}),
        ({"lr": 0.1}, {"lr": TINY, "schedule": "cosine"}),
        ({"lr": 0.1, "schedule": "one_cycle"}, {"lr": TINY, "warmup_epochs": 1.0}),
        ({"lr": 0.1, "beta1": 0.5, "weight_decay": 0.1}, {"lr": TINY, "beta1": 0.9}),
        ({"lr": 0.1, "no_decay_norm": True}, {"lr": TINY}),
        ({"lr": 0.1}, {"lr": TINY, "no_decay_norm": True}),
        ({"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}, {"optimizer": "sgd", "lr": TINY}),
        ({"optimizer": "sgd", "lr": 0.1}, {"optimizer": "sgd", "lr": TINY, "momentum": 0.9, "nesterov": True}),
    ],
)
def test_a_restored_learner_uses_its_own_hyperparameters(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Not those with which the state was made: a member of a population continues with others."""
    learner = learner_of(6, 3, **before)
    learner.train_epoch(seed=1)
    restored = learner_of(8, 2, **after)  # with another batch size, too
    initial = [weight.detach().clone() for weight in restored._weights]
    restored.restore(learner.state())
    trained = [weight.detach().clone() for weight in learner._weights]
    restored.train_epoch(seed=2, epoch=2)
    assert not any(torch.allclose(one, other) for one, other in zip(initial, trained, strict=True) if one.dim() > 1)
    for weight, expected in zip(restored._weights, trained, strict=True):
        assert torch.allclose(weight, expected, atol=1e-7)
    learner.train_epoch(seed=2, epoch=2)  # the other learning rate moves them
    assert not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(learner._weights, trained, strict=True))


def test_weight_decay_and_momentum_of_a_restored_learner_are_its_own() -> None:
    def step_of(**params: Any) -> list[torch.Tensor]:
        """The difference that a step makes, after a state that another learner has made."""
        learner = learner_of(6, 6, optimizer="sgd", lr=0.1, **params)
        learner.restore(state)
        before = [weight.detach().clone() for weight in learner._weights]
        learner.train_epoch(seed=2)
        return [weight.detach() - old for weight, old in zip(learner._weights, before, strict=True)]

    first = learner_of(6, 6, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.5)
    first.train_epoch(seed=1)
    state = {name: _clone(part) for name, part in first.state().items()}
    velocities = [each["momentum_buffer"] for _, each in sorted(state["optimizer"]["state"].items())]
    weights = [state["model"][name] for name, _ in first.model.named_parameters()]
    plain, decayed, moved = step_of(), step_of(weight_decay=0.2), step_of(momentum=0.7)
    for i, weight in enumerate(weights):
        assert torch.allclose(decayed[i], plain[i] - 0.1 * 0.2 * weight, atol=1e-6)
        if weight.dim() == 1:  # the velocities of others have another order in memory
            assert torch.allclose(moved[i], plain[i] - 0.1 * 0.7 * velocities[i], atol=1e-6)


def _clone(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clone(each) for key, each in value.items()}
    return value.clone()


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # imports torch._dynamo
def test_the_defaults_train_like_a_plain_loop_bit_by_bit() -> None:
    """The documented recipe: no parameter that was added since changes a bit of it."""
    images = images_of(10)
    torch.manual_seed(0)
    model = use_fast_convolutions(build_model()).to(memory_format=torch.channels_last).train()
    # torch's fused kernel takes contiguous weights.
    views = [torch.nn.Parameter(in_memory_order(weight.detach())) for weight in model.parameters()]
    optimizer = torch.optim.Adam(views, lr=0.01, fused=True)
    losses = []
    for seed in (1, 2):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
        total = torch.zeros(())
        for indices in order.split(4):
            inputs = (images.images[indices, None].float() / 255).contiguous(memory_format=torch.channels_last)
            model.zero_grad()
            loss = F.cross_entropy(model(inputs), images.labels[indices])
            loss.backward()
            for view, weight in zip(views, model.parameters(), strict=True):
                assert weight.grad is not None
                view.grad = in_memory_order(weight.grad)
            optimizer.step()
            total += loss.detach() * len(indices)
        losses.append(float(total) / 10)

    learner = learner_of(10, 4)
    assert [learner.train_epoch(seed)[0] for seed in (1, 2)] == losses
    weights = learner.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert set(learner.state()) == {"model", "optimizer"}
    assert learner.model_to_score() is learner.model


def test_the_labels_are_smoothed() -> None:
    # In a single batch, all images are scored by the initial weights.
    images = images_of(10)
    torch.manual_seed(0)
    logits = build_model().train()(images.images[:, None] / 255)
    targets = 0.7 * F.one_hot(images.labels, 10) + 0.3 / 10
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    loss, _ = learner_of(10, 10, label_smoothing=0.3).train_epoch(seed=1)
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert loss != pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-3)


def test_the_network_sees_changed_images(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(6, 6, flip=True)
    seen: list[torch.Tensor] = []
    learner.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, 0]))
    learner.train_epoch(seed=1)
    (found,) = seen
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(6, generator=generator)
    flips = (torch.rand(6, generator=generator) < 0.5)[order]
    assert len(set(flips.tolist())) == 2
    plain = images_of(6).images[order] / 255
    assert torch.equal(found, torch.where(flips[:, None, None], plain.flip(2), plain))


def test_each_step_of_each_epoch_has_its_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(6, 2, lr=0.5, schedule="cosine", warmup_epochs=1)
    assert learner._lr is not None
    place, rates = learner._lr.data_ptr(), []
    monkeypatch.setattr(learner, "take_step", lambda indices: rates.append(float(learner._lr)))
    for epoch in (1, 2, 3):
        learner.train_epoch(seed=1, epoch=epoch)
    wave = [0.25 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert rates == pytest.approx([0.5 / 3, 1 / 3, 0.5, *wave])
    assert learner._lr.data_ptr() == place


def test_the_scored_network_has_averaged_weights_and_mirrored_images() -> None:
    learner = learner_of(6, 3, ema=0.5, tta=True)
    learner.train_epoch(seed=1)
    first = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    scored = learner.model_to_score()
    assert isinstance(scored, MirrorAverage)
    weights = scored.model.state_dict()
    assert not torch.equal(weights["fc.weight"], first["fc.weight"])
    assert all(torch.equal(first[name], tensor) for name, tensor in learner.model.state_dict().items())
    assert isinstance(learner_of(6, 3, tta=True).model_to_score(), MirrorAverage)


class OperationNames(TorchDispatchMode):
    """Keeps the name of every operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


FULL: dict[str, Any] = {
    "flip": True, "translate": 2, "erase": 0.5, "ema": 0.9, "label_smoothing": 0.1, "no_decay_norm": True,
    "schedule": "one_cycle", "weight_decay": 0.1, "width": 0.25,
}  # fmt: skip


def test_a_step_draws_no_random_numbers_and_reads_nothing_from_the_device() -> None:
    """A CUDA graph could capture neither."""
    learner = learner_of(6, 6, **FULL)
    learner.train_epoch(seed=1)
    with OperationNames() as recorded:
        learner._train_batch(torch.arange(6))
    assert {"aten::gather", "aten::masked_fill.Scalar", "aten::_foreach_lerp_.Scalar"} <= set(recorded.names)
    forbidden = ("local_scalar", "nonzero", "item", "rand", "bernoulli", "uniform", "normal_", "masked_select")
    assert [name for name in recorded.names if any(text in name for text in forbidden)] == []
