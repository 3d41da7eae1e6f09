"""From measured speeds to a plan: how trials share the device, and how long the search takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpo import plan_search
from hpo.errors import SettingError, TrainableError
from hpo.search import estimate
from hpo.search.estimate import estimate_search, is_worth_measuring
from hpo.search.probes import Probes, Speed
from hpo.search.slots import Node, Slots
from hpo.space.model import Space
from storage.errors import StorageError
from tests.factories import RecordingListener, shipped_space

IMAGES = (1600, 400, 500)  # training, validation, test


def documented_space(*overrides: str) -> Space:
    """The documented grid for five epochs on the sample."""
    return shipped_space(
        "grid", "max_epochs=5", "data.dataset=fashion_mnist_sample", "data.val_samples=400", *overrides
    )


class FakeProbes(Probes):
    """A device of known speed and memory, measured without processes.

    Args:
        speed: (shape, slots) -> images per second of one trial; None if its memory does not suffice.
        device_bytes: the free memory of the device; each trial takes 1 GB and has a context of 1 GB more.
    """

    def __init__(self, speed: Any, device_bytes: int = 10**11) -> None:
        self.asked: list[tuple[dict[str, Any], Slots]] = []
        self.start_seconds = 0.0
        self._speed, self._device_bytes = speed, device_bytes

    def measure(self, shape: dict[str, Any], slots: Slots) -> Speed | None:
        self.asked.append((shape, slots))
        speed = self._speed(shape, slots)
        has_room = slots.trials_per_device * 10**9 <= self._device_bytes
        return Speed(speed, 10**9, 0.0, self._device_bytes) if speed and has_room else None


def test_estimate_is_the_end_of_the_last_trial() -> None:
    probes = FakeProbes(lambda shape, _: 1000.0 / shape["batch_size"])
    found = {
        count: estimate_search(
            documented_space("resources={cpu: 1}"), Slots(count, 1.0, 0.0), 3, probes, IMAGES, [Node(2.0, 0.0)]
        )
        for count in (1, 2, 3)
    }
    images = 5 * (1600 + 400 / 3) + 500 / 3
    one, two, three = (images * size / 1000.0 for size in (64, 256, 512))
    assert found[1].seconds == pytest.approx(one + two + three)
    assert found[2].seconds == pytest.approx(max(two, one + three)), "the third trial starts when the first has ended"
    assert found[3].seconds == pytest.approx(three)
    assert [each.trial_seconds for each in found.values()] == [pytest.approx(one + two + three)] * 3
    assert found[1].gpu_hours == 0
    assert list(found[1].speeds) == ["batch_size 64", "batch_size 256", "batch_size 512"]


@pytest.mark.parametrize("overrides", [(), ("sampler=random", "budget={trials: 3}")])
def test_a_continued_trial_counts_the_epochs_that_are_left(overrides: tuple[str, ...]) -> None:
    begun: list[tuple[dict[str, Any], int]] = [({"batch_size": 256, "lr": 0.01}, 3)]
    probes, slots = FakeProbes(lambda *_: 10.0), Slots(1, 1.0, 0.0)
    space = documented_space(*overrides)
    epoch, end = 1600 + 400 / 3, 500 / 3
    made = estimate_search(space, slots, 3, probes, IMAGES, [Node(1.0, 0.0)], begun)
    assert made.trial_seconds == pytest.approx(((2 + 5 + 5) * epoch + 3 * end) / 10)
    last = estimate_search(space, slots, 1, probes, IMAGES, [Node(1.0, 0.0)], begun)
    assert last.trial_seconds == pytest.approx((2 * epoch + end) / 10)


def test_several_seeds_take_as_many_times_as_long_and_as_much_memory() -> None:
    slots, images = Slots(1, 16.0, 1.0), 5 * (1600 + 400 / 3) + 500 / 3
    space = documented_space("parameters.batch_size=64", "replicates=3")
    made = estimate_search(space, slots, 2, FakeProbes(lambda *_: 10.0), IMAGES, [Node(16.0, 1.0)])
    assert made.trial_seconds == pytest.approx(3 * images / 10)
    # Memory for two trials of three trainings with the margin and a second context; a third would have room for one each.
    probes = FakeProbes(lambda *_: 10.0, device_bytes=int(7.5 * 10**9 + 2**30))
    assert estimate_search(space, slots, 30, probes, IMAGES, [Node(16.0, 1.0)]).slots.count == 2
    with pytest.raises(
        SettingError, match=r"batch_size 64 does not fit .* 3 times, 0\.9 GiB each of 3\.4 GiB: lower it or"
    ):
        estimate_search(space, slots, 2, FakeProbes(lambda *_: 10.0, int(3.7 * 10**9)), IMAGES, [Node(16.0, 1.0)])


def test_unmeasured_batch_size_counts_as_the_nearest_one() -> None:
    sizes = [4, 13, 16, 20, 64, 200, 256, 300, 1024, 1100]  # every second one is measured
    nearest = [4, 16, 16, 16, 64, 256, 256, 256, 1024, 1100]  # and the largest one
    probes = FakeProbes(lambda shape, _: float(shape["batch_size"]))
    made = estimate_search(
        documented_space(f"parameters.batch_size={sizes}", "resources={cpu: 1}"),
        Slots(1, 1.0, 0.0),
        len(sizes),
        probes,
        IMAGES,
        [Node(1.0)],
    )
    assert len(probes.asked) == len(made.speeds) <= estimate.MAX_SHAPES
    assert set(made.speeds) == {f"batch_size {size}" for size in nearest}
    images = 5 * (1600 + 400 / 3) + 500 / 3
    assert made.seconds == pytest.approx(sum(images / size for size in nearest))


def test_each_width_is_measured_and_an_unmeasured_one_counts_as_the_nearest() -> None:
    widths = [0.5, 0.625, 1, 1.125, 2, 2.5, 4, 5]  # every second one is measured, and the widest
    probes = FakeProbes(lambda shape, _: 1000 / shape["width"] ** 2)
    made = estimate_search(
        documented_space("parameters.batch_size=64", f"parameters.width={widths}", "resources={cpu: 1}"),
        Slots(1, 1.0, 0.0),
        len(widths),
        probes,
        IMAGES,
        [Node(1.0)],
    )
    assert [shape["width"] for shape, _ in probes.asked] == [0.5, 1, 2, 4, 5]
    images = 5 * (1600 + 400 / 3) + 500 / 3
    assert made.seconds == pytest.approx(sum(images * width**2 / 1000 for width in [0.5, 0.5, 1, 1, 2, 2, 4, 5]))


@pytest.mark.parametrize("name", ["ema", "width"])
def test_what_a_recipe_adds_to_a_step_is_measured(name: str) -> None:
    probes = FakeProbes(lambda *_: 10.0)
    space = documented_space("parameters.batch_size=64", f"parameters.{name}=0.5", "parameters.flip=true")
    estimate_search(space, Slots(1, 1.0, 0.0), 1, probes, IMAGES, [Node(1.0, 0.0)])
    assert probes.asked[0][0] == {"batch_size": 64, name: 0.5}


@pytest.mark.parametrize(
    ("speed", "device_bytes", "count", "tried"),
    [
        # Trials do not slow each other down: as many as allowed.
        (lambda _, slots: 10.0, 10**11, 8, [1, 2, 3, 4, 5, 6, 7, 8]),
        # Three saturate the GPU: the fourth gains nothing, and the fifth is not tried.
        (lambda _, slots: 10.0 * min(1.0, 3 / slots.count), 10**11, 3, [1, 2, 3, 4]),
        # One trial saturates it.
        (lambda _, slots: 10.0 / slots.count, 10**11, 1, [1, 2]),
        # Memory for two, with the margin and the context of the second process.
        (lambda _, slots: 10.0, 2.5 * 10**9 + 2**30, 2, [1, 2]),
        # Memory for two at work, but not with the margin.
        (lambda _, slots: 10.0, 3 * 10**9, 1, [1]),
        # The largest batches find no room next to others, and one trial of the search fits.
        (lambda shape, slots: 10.0 if slots.count < 3 or shape["batch_size"] < 512 else None, 10**11, 2, [1, 2, 3]),
        (lambda shape, slots: 10.0 if slots.count < 2 or shape["batch_size"] < 512 else None, 10**11, 1, [1, 2]),
    ],
)
def test_gpu_is_packed_while_memory_suffices_and_throughput_grows(
    speed: Any, device_bytes: int, count: int, tried: list[int]
) -> None:
    probes = FakeProbes(speed, device_bytes=device_bytes)
    made = estimate_search(documented_space(), Slots(1, 16.0, 1.0), 30, probes, IMAGES, [Node(16.0, 1.0)])
    assert made.slots == Slots(count, float(16 // count), 1 / count)
    assert list(made.tried) == tried
    assert made.gpu_hours == pytest.approx(made.trial_seconds / count / 3600)


def test_two_gpus_are_packed_alike_and_a_given_share_is_kept() -> None:
    probes = FakeProbes(lambda _, slots: 10.0)
    made = estimate_search(documented_space(), Slots(2, 8.0, 1.0), 6, probes, IMAGES, [Node(16.0, 2.0)])
    assert made.slots == Slots(6, 2.0, 1 / 3), "six trials: three a GPU"
    kept = estimate_search(
        documented_space("resources.gpu=0.5"), Slots(4, 4.0, 0.5), 30, probes, IMAGES, [Node(16.0, 2.0)]
    )
    assert kept.slots == Slots(4, 4.0, 0.5)
    assert {slots.trials_per_device for _, slots in probes.asked} == {1, 2, 3}


@pytest.mark.parametrize(
    ("speed", "expected"),
    [
        (lambda _, slots: 1.0 * slots.threads**0.5, Slots(8, 1.0, 0.0)),
        (lambda _, slots: 1.0 * slots.threads**2, Slots(1, 8.0, 0.0)),
    ],
)
def test_cpu_gets_trials_or_threads_by_throughput(speed: Any, expected: Slots) -> None:
    probes = FakeProbes(speed)
    made = estimate_search(documented_space(), Slots(8, 1.0, 0.0), 30, probes, IMAGES, [Node(8.0, 0.0)])
    assert made.slots == expected
    given = estimate_search(
        documented_space("resources={cpu: 1}"), Slots(8, 1.0, 0.0), 30, probes, IMAGES, [Node(8.0, 0.0)]
    )
    assert given.slots == Slots(8, 1.0, 0.0), "a given number is kept"


@pytest.mark.parametrize("error", [SettingError("a process died"), TrainableError("cuDNN failed")])
def test_a_failure_next_to_other_trials_keeps_the_last_way_that_worked(error: Exception) -> None:
    def speed(shape: dict[str, Any], slots: Slots) -> float:
        if slots.count == 3:
            raise error
        return 10.0

    made = estimate_search(documented_space(), Slots(1, 16.0, 1.0), 30, FakeProbes(speed), IMAGES, [Node(16.0, 1.0)])
    assert made.slots.count == 2
    with pytest.raises(type(error)):
        estimate_search(documented_space(), Slots(3, 5.0, 1.0), 30, FakeProbes(speed), IMAGES, [Node(16.0, 3.0)])


@pytest.mark.parametrize("order", [1, -1])
def test_the_shape_that_needs_most_memory_is_always_measured(order: int) -> None:
    parameters = ["parameters.batch_size={type: int, low: 8, high: 4096}", "parameters.stem=[cifar, imagenet]"]
    choices = [["fp32", "bf16"], ["adam", "sgd"]]
    parameters += [f"parameters.{n}={c[::order]}" for n, c in zip(("precision", "optimizer"), choices, strict=True)]
    found = list(estimate._shapes(documented_space("sampler=random", "budget.trials=9", *parameters)).values())
    assert {"batch_size": 4096, "stem": "cifar", "precision": "fp32", "optimizer": "adam"} in found
    assert len(found) <= estimate.MAX_SHAPES


def test_shape_that_does_not_fit_is_named() -> None:
    probes = FakeProbes(lambda *_: None)
    with pytest.raises(SettingError, match="batch_size 64 does not fit"):
        estimate_search(documented_space(), Slots(1, 1.0, 0.0), 3, probes, IMAGES, [Node(1.0, 0.0)])


@pytest.mark.parametrize(
    ("overrides", "trials", "expected"),
    [
        ([], 3, False),
        (["max_epochs=50"], 300, True),
        (["parameters.stem=cifar", "max_epochs=10"], 3, True),
        (["parameters.width=[1, 2]"], 3, True),
        (["parameters.width=0.5", "max_epochs=30"], 3, False),
        ([], None, True),
    ],
)
def test_short_searches_are_not_measured(overrides: list[str], trials: int | None, expected: bool) -> None:
    assert is_worth_measuring(documented_space(*overrides), trials, IMAGES) == expected


BY_MEMORY: list[dict[str, Any]] = [  # ascending
    {"batch_size": 64, "width": 0.5},
    {"batch_size": 64, "optimizer": "sgd"},
    {"batch_size": 64},
    {"batch_size": 256},
    {"batch_size": 256, "precision": "fp32"},
    {"batch_size": 256, "precision": "fp32", "ema": 0.99},
    {"batch_size": 64, "width": 2},
    {"batch_size": 64, "width": 2, "ema": 0.99},
    {"batch_size": 64, "width": 4},
    {"batch_size": 1024, "stem": "cifar", "precision": "fp32"},
]


def test_shapes_are_ordered_by_their_memory() -> None:
    """A wide network needs more for its weights than a large batch for its maps."""
    assert sorted(BY_MEMORY, key=estimate._memory_order) == BY_MEMORY
    assert estimate._memory_order({"batch_size": None}) == estimate._memory_order({})


def test_the_widest_network_with_an_average_is_measured_in_a_large_space() -> None:
    space = documented_space(
        "parameters.batch_size=[16, 64, 256]", "parameters.width=[1, 4, 2]", "parameters.ema=[0.9, 0]"
    )
    shapes = list(estimate._shapes(space).values())
    assert len(shapes) <= estimate.MAX_SHAPES
    assert {"batch_size": 256, "width": 4, "ema": 0.9} in shapes


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        (["parameters.tta=true"], [2]),
        (["parameters.tta=[false, true]"], [1, 2]),  # each point of a grid has its own
        (["parameters.tta=false"], [1]),
        (["parameters.tta=[false, true]", "sampler=random", "budget={trials: 1}"], [2]),  # at most
    ],
)
def test_mirrored_images_are_scored_too(overrides: list[str], passes: list[int]) -> None:
    space = documented_space("parameters.batch_size=64", *overrides)
    probes = FakeProbes(lambda *_: 10.0)
    made = estimate_search(space, Slots(1, 1.0, 0.0), len(passes), probes, IMAGES, [Node(1.0, 0.0)])
    assert made.trial_seconds == pytest.approx(sum(5 * (1600 + n * 400 / 3) + n * 500 / 3 for n in passes) / 10)


def test_a_plan_notes_that_a_scheduler_stops_trials_of_a_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "can_measure", lambda _: False)
    monkeypatch.setattr(Probes, "describe_data", lambda _: ("", IMAGES))
    listener = RecordingListener()
    space = documented_space("scheduler=asha", "parameters.schedule=cosine")
    plan_search(space, storage=f"sqlite:///{tmp_path}/hpo.db", data_dir=tmp_path, runs_dir=tmp_path, listener=listener)
    ((kind, text),) = listener.events
    assert (kind, text.split(" compares")[0]) == ("note", "scheduler asha")


@pytest.mark.slow
def test_plan_is_measured_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = documented_space("data.train_samples=64", "parameters.batch_size=[16, 32]", "max_epochs=1")
    planned = plan_search(space, storage="sqlite:///hpo.db", data_dir=tmp_path)
    assert planned.estimate is not None
    assert list(planned.estimate.speeds) == ["batch_size 16", "batch_size 32"]
    assert planned.estimate.seconds > 0
    assert (planned.trials_left, planned.states) == (2, {})
    assert list(tmp_path.iterdir()) == []


def test_a_plan_reads_a_database_that_exists(tmp_path: Path) -> None:
    (tmp_path / "hpo.db").write_text("no database, but a text that is longer than the header of one " * 3)
    with pytest.raises(StorageError, match="not a SQLite database"):
        plan_search(documented_space(), storage=f"sqlite:///{tmp_path}/hpo.db", data_dir=tmp_path)
