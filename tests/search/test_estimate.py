"""From measured speeds to a plan: how trials share the device, and how long the search takes."""

from __future__ import annotations

from typing import Any, cast

import pytest

from hpo.errors import SettingError
from hpo.search import estimate
from hpo.search.estimate import Probes, Speed, measure_plan
from hpo.search.slots import Slots
from tests.factories import shipped_space

IMAGES = (1600, 400, 500)  # training, validation, test
PROBES = cast("Probes", type("NoProcesses", (), {"start_seconds": 0.0, "measure": None})())


class Machine:
    """Takes the place of the probes: a device with a known speed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, speed: Any, memory: int = 10**9, whole: int = 10**11) -> None:
        self.asked: list[tuple[dict[str, Any], Slots]] = []
        self._speed, self._memory = speed, memory
        monkeypatch.setattr(estimate.Probes, "measure", lambda probes, shape, slots: self.measure(shape, slots))
        monkeypatch.setattr(
            estimate, "_fits", lambda speed, slots: slots.trials_per_device * speed.memory_bytes <= whole
        )

    def measure(self, shape: dict[str, Any], slots: Slots) -> Speed:
        self.asked.append((shape, slots))
        return Speed(self._speed(shape, slots), self._memory, 0.0)


def test_the_estimate_is_the_end_of_the_last_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, lambda shape, _: 1000.0 / shape["batch_size"])
    found = {
        count: measure_plan(
            shipped_space("quick", "resources={cpu: 1}"), Slots(count, 1.0, 0.0), 3, PROBES, IMAGES, (2.0, 0.0)
        )
        for count in (1, 2, 3)
    }
    images = 5 * (1600 + 400 / 3) + 500 / 3
    one, two, three = (images * size / 1000.0 for size in (64, 256, 512))
    assert found[1].seconds == pytest.approx(one + two + three)
    assert found[2].seconds == pytest.approx(max(two, one + three)), "the third starts where the first has ended"
    assert found[3].seconds == pytest.approx(three)
    assert [each.trial_seconds for each in found.values()] == [pytest.approx(one + two + three)] * 3
    assert found[1].gpu_hours == 0
    assert list(found[1].speeds) == ["batch_size 64", "batch_size 256", "batch_size 512"]


def test_a_batch_size_that_was_not_measured_counts_as_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [2**k for k in range(2, 12)]
    machine = Machine(monkeypatch, lambda shape, _: float(shape["batch_size"]))
    made = measure_plan(
        shipped_space("quick", f"parameters.batch_size={sizes}", "resources={cpu: 1}"),
        Slots(1, 1.0, 0.0),
        len(sizes),
        PROBES,
        IMAGES,
        (1.0, 0.0),
    )
    assert len(machine.asked) == len(made.speeds) <= estimate.MAX_SHAPES
    assert made.seconds > 0


@pytest.mark.parametrize(
    ("speed", "whole", "count", "tried"),
    [
        # Each has the machine's speed for itself: as many as are allowed.
        (lambda _, slots: 10.0, 10**11, 8, [1, 2, 3, 4, 5, 6, 7, 8]),
        # The GPU is full with three: the fourth gains nothing, and the fifth is not tried.
        (lambda _, slots: 10.0 * min(1.0, 3 / slots.count), 10**11, 3, [1, 2, 3, 4]),
        # One trial fills it.
        (lambda _, slots: 10.0 / slots.count, 10**11, 1, [1, 2]),
        # Memory for two.
        (lambda _, slots: 10.0, 2 * 10**9, 2, [1, 2]),
    ],
)
def test_a_gpu_is_packed_while_its_memory_suffices_and_throughput_grows(
    monkeypatch: pytest.MonkeyPatch, speed: Any, whole: int, count: int, tried: list[int]
) -> None:
    Machine(monkeypatch, speed, whole=whole)
    made = measure_plan(shipped_space("quick"), Slots(1, 16.0, 1.0), 30, PROBES, IMAGES, (16.0, 1.0))
    assert made.slots == Slots(count, float(16 // count), 1 / count)
    assert list(made.tried) == tried
    assert made.gpu_hours == pytest.approx(made.trial_seconds / count / 3600)


def test_two_gpus_are_packed_alike_and_a_share_that_was_given_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda _, slots: 10.0)
    made = measure_plan(shipped_space("quick"), Slots(2, 8.0, 1.0), 6, PROBES, IMAGES, (16.0, 2.0))
    assert made.slots == Slots(6, 2.0, 1 / 3), "six trials are there: three a GPU"
    kept = measure_plan(
        shipped_space("quick", "resources.gpu=0.5"), Slots(4, 4.0, 0.5), 30, PROBES, IMAGES, (16.0, 2.0)
    )
    assert kept.slots == Slots(4, 4.0, 0.5)
    assert {slots.trials_per_device for _, slots in machine.asked} == {1, 2, 3}


@pytest.mark.parametrize(
    ("speed", "expected"),
    [
        (lambda _, slots: 1.0 * slots.threads**0.5, Slots(8, 1.0, 0.0)),
        (lambda _, slots: 1.0 * slots.threads**2, Slots(1, 8.0, 0.0)),
    ],
)
def test_on_the_cpu_trials_and_threads_are_weighed(
    monkeypatch: pytest.MonkeyPatch, speed: Any, expected: Slots
) -> None:
    Machine(monkeypatch, speed)
    made = measure_plan(shipped_space("quick"), Slots(8, 1.0, 0.0), 30, PROBES, IMAGES, (8.0, 0.0))
    assert made.slots == expected
    given = measure_plan(
        shipped_space("quick", "resources={cpu: 1}"), Slots(8, 1.0, 0.0), 30, PROBES, IMAGES, (8.0, 0.0)
    )
    assert given.slots == Slots(8, 1.0, 0.0), "what the user says is kept"


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate.Probes, "measure", lambda *_: None)
    with pytest.raises(SettingError, match="batch_size 64 does not fit"):
        measure_plan(shipped_space("quick"), Slots(1, 1.0, 0.0), 3, PROBES, IMAGES, (1.0, 0.0))
