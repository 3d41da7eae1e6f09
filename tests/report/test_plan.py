"""The plan of a search as text."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import RenderableType

from hpo.report.plan import configuration_table, plan_lines, speed_table
from hpo.report.terminal import Terminal
from hpo.search.estimate import SearchEstimate
from hpo.search.probes import Speed
from hpo.search.slots import Slots
from hpo.space.model import Space
from tests.report.studies import grid_space

KEEPS = "Keeps the checkpoints of the best 3 trials."


def shown(text: RenderableType) -> str:
    file = io.StringIO()
    Terminal(file=file, width=140).print(text)
    return file.getvalue()


def made_plan(slots: Slots = Slots(2, 1.0, 0.0), seconds: float = 120.0, trials: int | None = 3) -> SearchEstimate:  # noqa: B008
    speeds = {"batch_size 64": Speed(100.0, 2**30, 0.25)}
    return SearchEstimate(slots, speeds, {slots.count: 200.0}, trials, seconds, 1.5 * seconds)


def test_a_grid_is_listed_with_the_state_of_each_configuration() -> None:
    space = grid_space()
    key = space.config_key({"batch_size": 256, "lr": 0.01})
    text = shown(configuration_table(space, {key: "COMPLETE"}))
    assert "3 configurations; storage has 1 COMPLETE." in text
    assert re.findall(r"(\d+) +0\.01 +(COMPLETE|to be run)", text) == [
        ("64", "to be run"),
        ("256", "COMPLETE"),
        ("512", "to be run"),
    ]


def test_a_sampler_that_the_file_leaves_out_is_said_with_its_reason() -> None:
    space = Space.model_validate(
        grid_space().model_dump(exclude={"sampler"}) | {"parameters": {"batch_size": [64, 256]}}
    )
    assert plan_lines(space, Slots(2, 1.0, 0.0), None)[1:] == ["Sampler grid: 2 configurations.", KEEPS]


def test_a_large_grid_is_listed_in_part() -> None:
    space = grid_space(parameters={"batch_size": list(range(1, 61)), "lr": 0.01})
    text = shown(configuration_table(space, {}))
    assert "60 configurations; storage has none of them." in text
    assert text.count("to be run") == 50
    assert "and 10 more" in text


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ({"trials": 30}, "30 trials, drawn by random"),
        ({"time": "4h"}, "as many trials as the budget allows, drawn by"),
    ],
)
def test_a_sampled_search_is_described_by_its_budget(budget: dict[str, object], text: str) -> None:
    space = grid_space(sampler={"name": "random"}, budget=budget)
    assert text in shown(configuration_table(space, {}))


@pytest.mark.parametrize(
    ("slots", "text"),
    [
        (Slots(1, 1.0, 0.0), "1 trial at a time, 1 CPU thread each."),
        (Slots(0, 2.0, 0.0), "No machine of the cluster has 2 CPU for a trial: waiting for one to join."),
        (Slots(0, 1.0, 0.5), "No machine of the cluster has 1 CPU and 0.5 GPU for a trial: waiting for one to join."),
        (Slots(2, 4.0, 0.0), "2 trials at a time, 4 CPU threads each."),
        (Slots(3, 1.0, 0.25), "3 trials at a time, 0.25 GPU each."),
    ],
)
def test_the_share_of_each_trial_is_described(slots: Slots, text: str) -> None:
    assert plan_lines(grid_space(), slots, None) == [text, KEEPS]


def test_a_plan_says_how_often_each_configuration_is_trained() -> None:
    lines = plan_lines(grid_space(replicates=3, seed=7), Slots(1, 1.0, 0.0), None)
    assert lines[1:] == ["Trains each configuration 3 times, seeds 7 to 9: its value is their mean.", KEEPS]


def test_a_plan_says_which_checkpoints_are_kept_if_there_are_any() -> None:
    slots = Slots(1, 1.0, 0.0)
    assert (
        plan_lines(grid_space(checkpoints={"keep": 5}), slots, None)[1] == "Keeps the checkpoints of the last 5 trials."
    )
    assert len(plan_lines(grid_space(command="train.py {lr}"), slots, None)) == 1


def test_a_measured_plan_says_how_long_the_search_takes() -> None:
    _, line, kept = plan_lines(grid_space(), Slots(2, 1.0, 0.0), made_plan())
    assert kept == KEEPS
    assert line == (
        "No GPU: this search takes about 2m00s on this CPU (measured, images/s of one trial: 100 at batch_size 64)."
    )
    gpu = Slots(2, 1.0, 0.5)
    _, line, _ = plan_lines(grid_space(), gpu, made_plan(gpu, trials=None, seconds=7200.0))
    assert line.startswith("A trial takes about 3h00m and 1.50 GPU-hours (measured")


BUDGET = {"gpu_hours": 8, "cost": {"gpu_hour": 2.5, "limit": 30}}
CPU = "Trials run on the CPU: for budget.gpu_hours and budget.cost, each of them counts as one GPU."


@pytest.mark.parametrize(
    ("budget", "trials", "used_hours", "expected"),
    [  # a trial takes 2 hours of half a GPU
        (
            BUDGET,
            12,
            1.5,
            [
                "All trials that are left together take about 12.00 device-hours, a cost of 30.00.",
                "Used so far: 1.50 of 8 device-hours, cost 3.75 of 30; about 6 of the 12 trials that are left fit into the "
                "rest.",
            ],
        ),
        (
            {"gpu_hours": 12},
            12,
            0.0,
            [
                "All trials that are left together take about 12.00 device-hours.",
                "Used so far: 0 of 12 device-hours; all trials that are left fit into the rest.",
            ],
        ),
        ({"gpu_hours": 8}, None, 9.0, ["Used so far: 9.00 of 8 device-hours; about 0 trials fit into the rest."]),
        (
            {"cost": {"gpu_hour": 2, "limit": 6}},
            None,
            0.5,
            ["Used so far: 0.50 device-hours, cost 1.00 of 6; about 2 trials fit into the rest."],
        ),
        (
            {"cost": {"gpu_hour": 2}},
            3,
            0.5,
            [
                "All trials that are left together take about 3.00 device-hours, a cost of 6.00.",
                "Used so far: 0.50 device-hours, cost 1.00.",
            ],
        ),
    ],
)
def test_a_plan_says_what_fits_into_a_budget_of_device_time(
    budget: dict[str, object], trials: int | None, used_hours: float, expected: list[str]
) -> None:
    slots = Slots(2, 1.0, 0.5)
    estimate = replace(made_plan(slots, trials=trials), trial_seconds=7200.0 * (trials or 1))
    lines = plan_lines(grid_space(budget=budget), slots, estimate, 3600 * used_hours)
    assert lines[2:-1] == expected


def test_a_plan_says_that_trials_on_the_cpu_count_and_that_a_scheduler_makes_room() -> None:
    space, slots = grid_space(budget={"gpu_hours": 8}, scheduler={"name": "asha"}), Slots(2, 1.0, 0.0)
    estimate = replace(made_plan(slots, trials=9), trial_seconds=9 * 3600.0)
    assert CPU in plan_lines(space, slots, estimate)
    assert any("at least 8 of the 9 trials" in line for line in plan_lines(space, slots, estimate))
    assert plan_lines(space, slots, None)[1:-1] == [CPU, "Used so far: 0 of 8 device-hours."]


@pytest.mark.parametrize("uv", ["", "uv run "])
def test_a_long_search_on_the_cpu_gets_advice_that_can_be_copied(monkeypatch: pytest.MonkeyPatch, uv: str) -> None:
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    if uv:
        monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    text = "\n".join(plan_lines(grid_space(), Slots(2, 1.0, 0.0), made_plan(seconds=7200.0)))
    assert "this search takes about 2h00m on this CPU" in text
    assert f"`{uv}python -m hpo.run quick`" in text
    assert f"  {uv}python -m hpo.run grid --set max_epochs=2 --set data.train_samples=2048" in text


def test_the_measured_speeds_are_listed() -> None:
    text = shown(speed_table(made_plan(), grid_space(scheduler={"name": "asha"})))
    assert re.search(r"batch_size 64 +100 +1\.00 GiB +0\.25 s", text)
    assert "4 epochs per trial; the scheduler stops some trials earlier" in " ".join(text.split())
