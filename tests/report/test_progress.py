"""The progress of a search: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest

from hpo.report.formatting import format_seconds
from hpo.report.progress import TerminalProgress
from hpo.report.terminal import Terminal
from hpo.search.slots import Slots
from hpo.space.model import Space
from hpo.space.sections import Budget, Cost

PARAMS = {"batch_size": 64, "lr": 0.01}
EPOCH_SECONDS = 30.0


OBJECTIVES = [{"metric": "val_accuracy", "direction": "maximize"}, {"metric": "train_seconds", "direction": "minimize"}]


def space_of(*, direction: str = "maximize", total: int | None = None, objectives: Any = None) -> Space:
    """A search with a number of trials, or without one."""
    return Space.model_validate(
        {
            "name": "toy",
            "description": "A toy",
            "trainable": "mine:train",
            "sampler": {"name": "random"},
            "direction": direction,
            "objectives": objectives,
            "max_epochs": 9,
            "budget": {"time": "1h"} if total is None else {"trials": total},
            "parameters": {"lr": {"type": "float", "low": 0.001, "high": 0.1}},
        }
    )


def metrics_of(value: float) -> dict[str, float]:
    return {"val_accuracy": value, "images_per_second": 1234.0, "epoch_seconds": EPOCH_SECONDS}


ENDED = ("COMPLETE", "PRUNED", "FAIL")


class Screen:
    """A console that writes to a string, and the progress of a search on it."""

    def __init__(
        self,
        *,
        terminal: bool,
        width: int = 120,
        height: int = 100,
        direction: str = "maximize",
        objectives: Any = None,
        total: int | None = None,
        slots: int = 1,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        self.space = space_of(direction=direction, total=total, objectives=objectives)
        self.slots = Slots(slots, 1.0, 0.0)
        self.counts = counts or {}
        self.paper = StringIO()
        console = Terminal(
            file=self.paper, force_terminal=terminal, width=width, height=height, _environ={"TERM": "xterm"}
        )
        self.progress = TerminalProgress(console)

    @contextmanager
    def searching(self) -> Iterator[TerminalProgress]:
        """Start a search, and forget what its start has printed."""
        with self.progress as progress:
            progress.search_starting(self.space)
            total = self.space.total_trials
            left = None if total is None else total - sum(self.counts.get(each, 0) for each in ENDED)
            progress.study_opened(self.space, "toy", "sqlite:///hpo.db", self.counts, left)
            progress.search_planned(self.space, self.slots, None)
            self.paper.seek(0)
            self.paper.truncate()
            yield progress

    @property
    def lines(self) -> list[str]:
        """All printed lines, without the codes that move the cursor and set colours."""
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.paper.getvalue())
        return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]

    @property
    def last_frame(self) -> list[str]:
        """The lines of the last frame. Leaving `searching` draws it."""
        lines = self.lines
        top = max(i for i, line in enumerate(lines) if line.startswith("trial  "))
        return lines[top:]

    @property
    def seconds_remaining(self) -> float | None:
        found = re.search(r"about (?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)? remaining", " ".join(self.last_frame))
        if found is None:
            return None
        hours, minutes, seconds = (int(group or 0) for group in found.groups())
        return (hours * 60 + minutes) * 60 + seconds


# --- without a terminal -----------------------------------------------------------------------------------------------


def test_without_a_terminal_each_start_epoch_and_end_is_a_plain_line() -> None:
    screen = Screen(terminal=False)
    with screen.searching() as progress:
        progress.trial_started(7, PARAMS, epoch=0, max_epochs=3)
        for epoch, value in enumerate((0.7, 0.9, 0.8), start=1):
            progress.epoch_ended(7, epoch, metrics_of(value))
        progress.trial_ended(7, "COMPLETE", "")
    assert "\x1b" not in screen.paper.getvalue()
    start, *epochs, end = screen.paper.getvalue().splitlines()
    assert start.startswith("trial 7 starts")
    assert "batch_size 64, lr 0.01" in start
    assert [line.partition(": ")[0] for line in epochs] == [f"trial 7 epoch {epoch}/3" for epoch in (1, 2, 3)]
    assert [re.findall(r"0\.\d{4}", line) for line in epochs] == [
        ["0.7000", "0.7000"],
        ["0.9000", "0.9000"],
        ["0.8000", "0.9000"],
    ]
    assert all("1,234 images/s" in line for line in epochs)
    assert end.startswith("trial 7 COMPLETE: val_accuracy 0.8000")


def test_the_best_value_of_a_minimized_metric_is_the_lowest() -> None:
    screen = Screen(terminal=False, direction="minimize")
    with screen.searching() as progress:
        progress.trial_started(0, PARAMS, epoch=0, max_epochs=3)
        for epoch, value in enumerate((0.7, 0.5, 0.8), start=1):
            progress.epoch_ended(0, epoch, metrics_of(value))
    assert re.findall(r"best (0\.\d{4})", screen.paper.getvalue()) == ["0.7000", "0.5000", "0.5000"]


def end_trials(progress: TerminalProgress, *pairs: tuple[float, float], state: str = "COMPLETE") -> None:
    for number, (accuracy, seconds) in enumerate(pairs):
        progress.trial_started(number, PARAMS, epoch=0, max_epochs=1)
        progress.epoch_ended(number, 1, metrics_of(accuracy) | {"train_seconds": seconds})
        progress.trial_ended(number, state, "")


def test_all_of_several_objectives_are_shown_and_none_is_the_best() -> None:
    screen = Screen(terminal=False, objectives=OBJECTIVES)
    with screen.searching() as progress:
        end_trials(progress, (0.5, 12.0))
    _, epoch, end = screen.paper.getvalue().splitlines()
    assert epoch.startswith("trial 0 epoch 1/1: val_accuracy 0.5000, train_seconds 12.0000, ")
    assert end.startswith("trial 0 COMPLETE: val_accuracy 0.5000, train_seconds 12.0000")
    assert "best" not in epoch


def test_the_live_table_has_a_column_for_each_objective_and_names_the_pareto_front() -> None:
    screen = Screen(terminal=True, objectives=OBJECTIVES)
    with screen.searching() as progress:
        end_trials(progress, (0.5, 12.0), (0.6, 11.0), (0.4, 10.0))
        progress.trial_started(3, PARAMS, epoch=0, max_epochs=2)
        progress.epoch_ended(3, 1, metrics_of(0.75) | {"train_seconds": 13.5})
    head, row, study = screen.last_frame
    assert re.search(r"val_accuracy +train_seconds", head)
    assert re.search(r"0\.7500 +13\.5000", row)
    assert " best" not in head
    assert ", Pareto front of 2: trials 1, 2, " in study, "trial 3 has not completed"


@pytest.mark.parametrize(("count", "text"), [(1, "1: trial 0, "), (10, "10: trials 0, 1, 2, 3, 4, 5, 6, 7, ..., ")])
def test_a_large_front_is_shortened(count: int, text: str) -> None:
    screen = Screen(terminal=True, width=200, objectives=OBJECTIVES)
    with screen.searching() as progress:
        end_trials(progress, *((float(i), float(i)) for i in range(count)))
        progress.trial_started(99, PARAMS, epoch=0, max_epochs=2)
    assert f"Pareto front of {text}" in screen.last_frame[-1]


def test_a_trial_that_did_not_complete_is_not_on_the_front() -> None:
    screen = Screen(terminal=True, objectives=OBJECTIVES)
    with screen.searching() as progress:
        end_trials(progress, (0.5, 12.0), state="FAIL")
        progress.trial_started(99, PARAMS, epoch=0, max_epochs=2)
    assert "front" not in screen.last_frame[-1]


def test_a_line_is_never_wrapped_on_a_narrow_console() -> None:
    screen = Screen(terminal=False, width=20)
    with screen.searching() as progress:
        progress.trial_started(0, {f"parameter_{i}": i for i in range(30)}, epoch=0, max_epochs=2)
        progress.epoch_ended(0, 1, metrics_of(0.5))
        progress.note("a note that is longer than the console is wide")
    assert len(screen.paper.getvalue().splitlines()) == 3


def test_brackets_are_not_markup() -> None:
    screen = Screen(terminal=False)
    with screen.searching() as progress:
        progress.trial_started(0, {"layers": "[red]"}, epoch=0, max_epochs=2)
        progress.trial_ended(0, "FAIL", "KeyError: [/bold]")
        progress.note("see [/docs]")
    text = screen.paper.getvalue()
    assert text.count("[red]") == 2  # at the start and at the end
    assert "trial 0 FAIL: KeyError: [/bold]" in text
    assert "see [/docs]" in text


def test_the_time_left_of_a_trial_is_the_median_epoch_times_the_epochs_left() -> None:
    screen = Screen(terminal=False)
    with screen.searching() as progress:
        progress.trial_started(0, PARAMS, epoch=0, max_epochs=3)
        for epoch in (1, 2, 3):
            progress.epoch_ended(0, epoch, metrics_of(0.5))
    left = re.findall(r"([\dhms]+) left", screen.paper.getvalue())
    assert left == [format_seconds(2 * EPOCH_SECONDS), format_seconds(1 * EPOCH_SECONDS)]


def test_a_resumed_trial_estimates_its_time_from_epochs_after_the_resumption() -> None:
    screen = Screen(terminal=False)
    with screen.searching() as progress:
        progress.trial_started(0, PARAMS, epoch=40, max_epochs=50)
        progress.epoch_ended(0, 41, metrics_of(0.5))
    start, epoch = screen.paper.getvalue().splitlines()
    assert "resumes after epoch 40" in start
    assert epoch.endswith(f"{format_seconds(9 * EPOCH_SECONDS)} left")


def test_a_nonfinite_value_is_never_the_best() -> None:
    screen = Screen(terminal=True)
    with screen.searching() as progress:
        progress.trial_started(0, PARAMS, epoch=0, max_epochs=9)
        for epoch, value in enumerate((math.nan, 0.7, math.inf, math.nan), start=1):
            progress.epoch_ended(0, epoch, metrics_of(value))
    assert "best 0.7000 (trial 0)" in screen.last_frame[-1]
    assert "nan" in screen.last_frame[1]
    assert "0.7000" in screen.last_frame[1]


def test_thousands_of_short_epochs_do_not_flood_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("hpo.report.progress.time", SimpleNamespace(monotonic=lambda: now))
    screen = Screen(terminal=False)
    with screen.searching() as progress:
        for number in range(100):
            progress.trial_started(number, PARAMS, epoch=0, max_epochs=100)
            for epoch in range(1, 101):
                now += 0.001
                progress.epoch_ended(number, epoch, metrics_of(0.5))
            progress.trial_ended(number, "COMPLETE", "")
    lines = screen.paper.getvalue().splitlines()
    assert [line for line in lines if "COMPLETE" in line] == [
        f"trial {number} COMPLETE: val_accuracy 0.5000  (batch_size 64, lr 0.01)" for number in range(100)
    ]
    others = [line for line in lines if "COMPLETE" not in line]
    # Ten seconds at five lines a second, after the initial burst.
    assert 60 <= len(others) <= 90
    epochs = [line for line in others if " epoch " in line]
    unprinted = [int(count) for line in others for count in re.findall(r"\(and (\d+) epochs? more", line)]
    assert len(epochs) + sum(unprinted) == 10_000, "each epoch is printed or counted"


def test_a_slow_search_prints_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("hpo.report.progress.time", SimpleNamespace(monotonic=lambda: now))
    screen = Screen(terminal=False)
    with screen.searching() as progress:
        progress.trial_started(0, PARAMS, epoch=0, max_epochs=200)
        for epoch in range(1, 201):
            now += 0.25
            progress.epoch_ended(0, epoch, metrics_of(0.5))
    assert len(screen.paper.getvalue().splitlines()) == 201
    assert "more" not in screen.paper.getvalue()


# --- the start of a search --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("study_name", "counts", "left", "said"),
    [
        ("toy", {}, 2, []),
        ("toy", {"COMPLETE": 1, "RUNNING": 1}, 1, ["Resuming: storage holds 1 COMPLETE, 1 RUNNING."]),
        ("toy", {"COMPLETE": 1, "FAIL": 1}, 0, ["Nothing is left to do: storage holds 1 COMPLETE, 1 FAIL."]),
        ("toy", {"COMPLETE": 5}, 2, ["Resuming: storage holds 5 COMPLETE."]),  # results of earlier studies
        ("toy@2", {}, 2, ["The space differs from that of study toy: results go to the revision toy@2."]),
    ],
)
def test_the_start_says_where_results_go_and_what_is_there(
    study_name: str, counts: dict[str, int], left: int, said: list[str]
) -> None:
    screen = Screen(terminal=False)
    space = space_of(total=2)
    with screen.progress as progress:
        progress.search_starting(space)
        assert screen.lines == ["toy: A toy"], "printed before anything slow is done"
        progress.preparing("measuring training steps")
        progress.study_opened(space, study_name, "sqlite:///hpo.db", counts, left)
        progress.search_planned(space, Slots(2, 1.0, 0.0), None)
    plan = ["2 trials at a time, 1 CPU thread each.", "Keeps the checkpoints of the best 3 trials."]
    assert screen.lines[1:] == ["Storage: sqlite:///hpo.db", *said, *plan]


def test_on_a_terminal_preparations_are_shown_until_the_search_is_planned() -> None:
    screen = Screen(terminal=True)
    with screen.progress as progress:
        progress.preparing("starting Ray")
        progress.preparing("measuring training steps")
        progress.search_planned(screen.space, screen.slots, None)
        assert any("measuring training steps" in line for line in screen.lines)


# --- on a terminal ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 50), (60, 10), (200, 5)])
def test_a_thousand_running_trials_fit_on_any_screen(width: int, height: int) -> None:
    screen = Screen(terminal=True, width=width, height=height, total=2000, slots=1000)
    params = {"batch_size": 512, "lr": 0.012345678, "optimizer": "adamw", "weight_decay": 0.0001}
    with screen.searching() as progress:
        for number in range(1000):
            progress.trial_started(number, params, epoch=0, max_epochs=50)
        for number in range(1000):
            progress.epoch_ended(number, 1, metrics_of(0.5))
    frame = screen.last_frame
    assert len(frame) < height, "the last line is left to the cursor"
    assert max(map(len, frame)) <= width
    rows = [line for line in frame if re.match(r"\d+ .*\b1/50\b", line)]
    assert len(rows) >= height - 6, "the screen is filled"
    assert f"... and {1000 - len(rows)} more" in frame
    assert "2000 left" in " ".join(frame)
    for row in rows:
        assert re.search(r"0\.5000 .*24m30s$", row), "the parameters are truncated, never a number"


def test_at_80_columns_a_row_has_its_bar_and_all_numbers() -> None:
    screen = Screen(terminal=True, width=80)
    with screen.searching() as progress:
        progress.trial_started(0, {"batch_size": 512, "lr": 0.0123, "optimizer": "adamw"}, epoch=0, max_epochs=50)
        progress.epoch_ended(0, 25, metrics_of(0.9))
        progress.epoch_ended(0, 26, metrics_of(0.8))
    head, row = screen.last_frame[:2]
    assert re.findall(r"\S+", head) == ["trial", "parameters", "epoch", "val_accuracy", "best", "images/s", "left"]
    assert re.search(r"batch_size.*… +26/50 +━+[╺╸]?━+ +0\.8000 +0\.9000 +1,234 +12m00s$", row)


def test_a_thousand_running_trials_do_not_slow_the_driver_down() -> None:
    """The driver draws four frames per second, in its own process."""
    screen = Screen(terminal=True, width=80, height=24, total=5000, slots=1000)
    with screen.searching() as progress:
        for number in range(1000):
            progress.trial_started(number, PARAMS, epoch=0, max_epochs=1000)
        started = time.process_time()
        for epoch in range(1, 31):
            for number in range(1000):
                progress.epoch_ended(number, epoch, metrics_of(0.5))
        epoch_seconds = (time.process_time() - started) / 30_000
        started = time.process_time()
        for _ in range(20):
            progress._live.refresh()
        frame_seconds = (time.process_time() - started) / 20
    assert epoch_seconds < 0.001
    assert frame_seconds < 0.1


def test_a_few_trials_are_all_shown_with_epoch_value_and_best() -> None:
    screen = Screen(terminal=True)
    with screen.searching() as progress:
        for number in range(3):
            progress.trial_started(number, PARAMS, epoch=0, max_epochs=50)
        progress.epoch_ended(1, 1, metrics_of(0.9))
        progress.epoch_ended(1, 2, metrics_of(0.8))
    rows = screen.last_frame[1:-1]
    assert [row.split()[0] for row in rows] == ["0", "1", "2"]
    assert ["0/50" in rows[0], "2/50" in rows[1], "0/50" in rows[2]] == [True] * 3
    assert re.findall(r"0\.\d{4}", rows[1]) == ["0.8000", "0.9000"]
    assert "more" not in screen.last_frame[-1]


def test_ended_trials_leave_the_table_and_are_counted_with_earlier_ones() -> None:
    screen = Screen(terminal=True, total=10, counts={"COMPLETE": 2, "PRUNED": 1})
    with screen.searching() as progress:
        for number, state in enumerate(["COMPLETE", "PRUNED", "FAIL", "COMPLETE"]):
            progress.trial_started(number, PARAMS, epoch=0, max_epochs=2)
            progress.epoch_ended(number, 1, metrics_of(number / 10))
            progress.trial_ended(number, state, "out of memory" if state == "FAIL" else "")
    assert len(screen.last_frame) == 2  # the heading of the table, and the study
    assert "4 done, 2 pruned, 1 failed" in screen.last_frame[-1]
    assert "3 left" in screen.last_frame[-1]
    assert "best 0.3000 (trial 3)" in screen.last_frame[-1]
    assert any("trial 2 FAIL: out of memory" in line for line in screen.lines)


def test_trials_that_wait_are_counted_also_those_of_earlier_runs() -> None:
    screen = Screen(terminal=True, total=10, counts={"WAITING": 3})
    with screen.searching() as progress:
        progress.trial_started(7, PARAMS, epoch=0, max_epochs=9)
        progress.trial_ended(7, "WAITING", "waits after epoch 1: others are better so far")
        progress.trial_started(2, PARAMS, epoch=1, max_epochs=9)
        progress.trial_ended(3, "PRUNED", "stopped by asha after epoch 1")
    assert "0 done, 1 pruned, 0 failed" in screen.last_frame[-1]
    assert "2 waiting" in screen.last_frame[-1]
    assert not any("trial 3" in line for line in screen.lines), "a note says how many end that did not run"


def test_the_device_time_that_the_study_has_used_is_shown_if_the_budget_limits_or_prices_it() -> None:
    screen = Screen(terminal=True)
    with screen.searching() as progress:
        progress.device_time_used(5400.0)
    assert "device-hours" not in " ".join(screen.last_frame)
    screen.space = screen.space.model_copy(update={"budget": Budget(gpu_hours=8, cost=Cost(gpu_hour=2.5))})
    with screen.progress as progress:
        progress.device_time_used(1800.0)
        progress.study_opened(screen.space, "toy", "sqlite:///hpo.db", {}, None)
        progress.search_planned(screen.space, screen.slots, None)
        progress.device_time_used(5400.0)
    assert "Used so far: 0.50 of 8 device-hours, cost 1.25." in screen.lines
    assert ", 1.50 of 8 device-hours, cost 3.75, " in screen.last_frame[-1]


def test_results_of_earlier_studies_use_up_no_trials() -> None:
    screen = Screen(terminal=True, total=2)
    with screen.progress as progress:
        progress.study_opened(screen.space, "toy", "sqlite:///hpo.db", {"COMPLETE": 5}, 2)
        progress.search_planned(screen.space, screen.slots, None)
    assert "5 done, 0 pruned, 0 failed, 2 left" in screen.last_frame[-1]


def test_the_time_remaining_includes_the_trials_that_wait_for_a_slot() -> None:
    screen = Screen(terminal=True, total=8, slots=2)
    with screen.searching() as progress:
        for number in range(2):
            progress.trial_started(number, PARAMS, epoch=0, max_epochs=10)
            progress.epoch_ended(number, 1, metrics_of(0.5))
    # Nine more epochs of the two that run; then six trials on two slots take three rounds of ten epochs.
    expected = 9 * EPOCH_SECONDS + 3 * 10 * EPOCH_SECONDS
    assert screen.seconds_remaining == pytest.approx(expected, rel=0.25)


def test_the_time_remaining_uses_the_duration_of_ended_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = 0.0
    monkeypatch.setattr("hpo.report.progress.time", SimpleNamespace(monotonic=lambda: time.monotonic() + skipped))
    screen = Screen(terminal=True, total=4, slots=1)
    with screen.searching() as progress:
        progress.trial_started(0, PARAMS, epoch=0, max_epochs=10)
        skipped = 600.0
        progress.trial_ended(0, "COMPLETE", "")
        progress.trial_started(1, PARAMS, epoch=0, max_epochs=10)
        progress.epoch_ended(1, 5, metrics_of(0.5))
    # Trial 1 has five epochs left. Trials 2 and 3 are expected to take as long as trial 0.
    assert screen.seconds_remaining == pytest.approx(5 * EPOCH_SECONDS + 2 * 600, rel=0.05)


@pytest.mark.parametrize(("total", "epochs"), [(None, 1), (8, 0)], ids=["no total", "no epoch yet"])
def test_without_a_total_or_an_epoch_there_is_no_estimate(total: int | None, epochs: int) -> None:
    screen = Screen(terminal=True, total=total)
    with screen.searching() as progress:
        progress.trial_started(0, PARAMS, epoch=0, max_epochs=10)
        for epoch in range(1, epochs + 1):
            progress.epoch_ended(0, epoch, metrics_of(0.5))
    assert screen.seconds_remaining is None


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "no machine of the cluster has room for a trial: waiting for one to join"),
        (1, "the cluster has room for 1 trial at a time now, before for 4"),
        (8, "the cluster has room for 8 trials at a time now, before for 4"),
    ],
)
def test_a_cluster_that_changes_is_said(count: int, said: str) -> None:
    screen = Screen(terminal=False, slots=4)
    with screen.searching() as progress:
        progress.slots_changed(count, 4)
    assert screen.lines == [said]
