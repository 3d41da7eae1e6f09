"""What a search will take: how the machine is shared, what is measured, how it adds up, what is shown."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import create_trial
from rich.console import Console

import hpo.train
import hpo.train.data
from hpo import plan, run
from hpo.errors import SettingError
from hpo.search.estimate import Plan, Slots, Speed, measure_plan, plan_slots
from hpo.space.model import Space, load_space
from storage.database import open_database
from storage.studies import open_study

ROOT = Path(__file__).parent.parent
DATA = {"dataset": "fashion_mnist_sample", "train_samples": 1600, "val_samples": 400}


def space_of(*overrides: str, name: str = "quick") -> Space:
    return load_space(str(ROOT / f"search_spaces/{name}.yaml"), overrides)


# --- without measuring


@pytest.mark.parametrize(
    ("cores", "gpus", "resources", "trials", "expected"),
    [
        (2, 0, "{}", 3, Slots(2, 1, 0)),
        (8, 0, "{}", 3, Slots(3, 2, 0)),
        (8, 0, "{}", None, Slots(8, 1, 0)),
        (16, 2, "{}", 3, Slots(2, 8, 1)),
        (64, 8, "{gpu: 0.15}", 1000, Slots(48, 1, 0.15)),
        (64, 8, "{gpu: 0.5, cpu: 2}", 1000, Slots(16, 2, 0.5)),
        (64, 8, "{gpu: 2}", 1000, Slots(4, 16, 2)),
        (4, 0, "{cpu: 2}", 10, Slots(2, 2, 0)),
        (1, 0, "{}", 1, Slots(1, 1, 0)),
    ],
)
def test_the_machine_is_divided_among_trials(
    cores: int, gpus: int, resources: str, trials: int | None, expected: Slots
) -> None:
    assert plan_slots(space_of(f"resources={resources}"), trials, float(cores), float(gpus)) == expected


@pytest.mark.parametrize(
    ("resources", "said"), [("{gpu: 1}", "resources.gpu is 1"), ("{cpu: 4}", "resources.cpu is 4")]
)
def test_more_than_the_machine_has_is_refused(resources: str, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        plan_slots(space_of(f"resources={resources}"), None, 2.0, 0.0)


# --- from measurements to a plan


class Machine:
    """Takes the place of the probes: a device with a known speed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, speed: Any, memory: int = 10**9, whole: int = 10**11) -> None:
        self.asked: list[tuple[dict[str, Any], Slots]] = []
        self._speed, self._memory = speed, memory
        monkeypatch.setattr(plan.Probes, "measure", lambda probes, shape, slots: self.measure(shape, slots))
        monkeypatch.setattr(
            plan, "_fits", lambda speed, slots: plan._trials_per_device(slots) * speed.memory_bytes <= whole
        )
        real = hpo.train.data.load
        monkeypatch.setattr(hpo.train.data, "load", lambda **data: real(**{**data, "device": "cpu"}))

    def measure(self, shape: dict[str, Any], slots: Slots) -> Speed:
        self.asked.append((shape, slots))
        return Speed(self._speed(shape, slots), self._memory, 0.0)


def test_the_estimate_is_the_end_of_the_last_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, lambda shape, _: 1000.0 / shape["batch_size"])
    found = {
        count: measure_plan(space_of("resources={cpu: 1}"), Slots(count, 1.0, 0.0), 3, DATA, (2.0, 0.0))
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
        space_of(f"parameters.batch_size={sizes}", "resources={cpu: 1}"),
        Slots(1, 1.0, 0.0),
        len(sizes),
        DATA,
        (1.0, 0.0),
    )
    assert len(machine.asked) == len(made.speeds) <= plan.MAX_SHAPES
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
    made = measure_plan(space_of(), Slots(1, 16.0, 1.0), 30, DATA, (16.0, 1.0))
    assert made.slots == Slots(count, float(16 // count), 1 / count)
    assert list(made.tried) == tried
    assert made.gpu_hours == pytest.approx(made.trial_seconds / count / 3600)


def test_two_gpus_are_packed_alike_and_a_share_that_was_given_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda _, slots: 10.0)
    made = measure_plan(space_of(), Slots(2, 8.0, 1.0), 6, DATA, (16.0, 2.0))
    assert made.slots == Slots(6, 2.0, 1 / 3), "six trials are there: three a GPU"
    kept = measure_plan(space_of("resources.gpu=0.5"), Slots(4, 4.0, 0.5), 30, DATA, (16.0, 2.0))
    assert kept.slots == Slots(4, 4.0, 0.5)
    assert {plan._trials_per_device(slots) for _, slots in machine.asked} == {1, 2, 3}


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
    made = measure_plan(space_of(), Slots(8, 1.0, 0.0), 30, DATA, (8.0, 0.0))
    assert made.slots == expected
    given = measure_plan(space_of("resources={cpu: 1}"), Slots(8, 1.0, 0.0), 30, DATA, (8.0, 0.0))
    assert given.slots == Slots(8, 1.0, 0.0), "what the user says is kept"


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.Probes, "measure", lambda *_: None)
    with pytest.raises(SettingError, match="batch_size 64 does not fit"):
        measure_plan(space_of(), Slots(1, 1.0, 0.0), 3, DATA, (1.0, 0.0))


# --- the real thing


def test_a_plan_is_measured_shown_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "PROBE_SECONDS", 0.1)
    shown = io.StringIO()
    monkeypatch.setattr(run, "_console", lambda: Console(file=shown, width=200))
    arguments = argparse.Namespace(
        space=str(ROOT / "search_spaces/quick.yaml"),
        overrides=["data.train_samples=600", "parameters.batch_size=[16, 32]", "max_epochs=1"],
        storage="sqlite:///hpo.db",
        password=None,
        data_dir=str(tmp_path),
    )
    assert run._plan(arguments) == 0
    text = shown.getvalue()
    assert "2 configurations; storage has none of them." in text
    assert text.count("to be run") == 2
    assert "No GPU: this search takes about" in text
    assert "at batch_size 16" in text
    assert "GiB" in text
    assert list(tmp_path.iterdir()) == []


def test_a_plan_knows_what_storage_has(tmp_path: Path) -> None:
    space = space_of()
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        study = open_study(database, "quick", direction="maximize", fingerprint=space.fingerprint, settings={})
        study.optuna_study.add_trial(
            create_trial(params={"batch_size": 256, "lr": 0.01}, distributions=space.distributions(), value=0.9)
        )
        shown = io.StringIO()
        Console(file=shown, width=100).print(plan.configurations(space, 3, study))
    assert "3 configurations; storage has 1 COMPLETE." in shown.getvalue()
    assert [line.split()[0] for line in shown.getvalue().splitlines() if "COMPLETE" in line][1:] == ["256"]
    assert shown.getvalue().count("to be run") == 2


def test_a_long_search_on_the_cpu_gets_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Plan(Slots(2, 1.0, 0.0), {"the defaults": Speed(100.0, 10**9, 0.1)}, {2: 200.0}, 3, 7200.0, 9000.0)
    shown = io.StringIO()
    run._announce_plan(Console(file=shown, width=200), space_of(), made.slots, made)
    assert "this search takes about 2h00m on this CPU" in shown.getvalue()
    assert "python -m hpo.run quick" in shown.getvalue()
    assert "--set data.train_samples=" in shown.getvalue()


def test_run_with_plan_is_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_plan", lambda arguments: 7)
    monkeypatch.setattr(sys, "argv", ["hpo", "run", "quick", "--plan"])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 7
