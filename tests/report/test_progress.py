"""The view in the terminal, on a terminal and off it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from hpo.report.progress import TerminalProgress, format_seconds

PARAMS = {"batch_size": 64, "lr": 0.01}
EPOCH_SECONDS = 30.0


def metrics_of(value: float) -> dict[str, float]:
    return {"val_accuracy": value, "images_per_second": 1234.0, "epoch_seconds": EPOCH_SECONDS}


class Screen:
    """A console on paper, and a view on it."""

    def __init__(
        self,
        *,
        terminal: bool,
        width: int = 120,
        height: int = 100,
        direction: str = "maximize",
        total: int | None = None,
        slots: int = 1,
        before: Mapping[str, int] | None = None,
    ) -> None:
        self.paper = StringIO()
        console = Console(
            file=self.paper, force_terminal=terminal, width=width, height=height, _environ={"TERM": "xterm"}
        )
        self.view = TerminalProgress(
            console, metric="val_accuracy", direction=direction, total=total, slots=slots, before=before or {}
        )

    @property
    def lines(self) -> list[str]:
        """Everything that was printed, without the codes that move the cursor and set colours."""
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.paper.getvalue())
        return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]

    @property
    def last_frame(self) -> list[str]:
        """What stood on the terminal last; to be asked after the `with`, which draws once more as it ends."""
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


# --- without a terminal -------------------------------------------------------------------------------------------


def test_without_a_terminal_there_is_a_plain_line_for_each_start_epoch_and_end() -> None:
    screen = Screen(terminal=False)
    with screen.view as view:
        view.trial_started(7, PARAMS, epoch=0, max_epochs=3)
        for epoch, value in enumerate((0.7, 0.9, 0.8), start=1):
            view.epoch_ended(7, epoch, metrics_of(value))
        view.trial_ended(7, "COMPLETE", "")
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


def test_the_best_of_a_metric_to_be_minimized_is_the_lowest() -> None:
    screen = Screen(terminal=False, direction="minimize")
    with screen.view as view:
        view.trial_started(0, PARAMS, epoch=0, max_epochs=3)
        for epoch, value in enumerate((0.7, 0.5, 0.8), start=1):
            view.epoch_ended(0, epoch, metrics_of(value))
    assert re.findall(r"best (0\.\d{4})", screen.paper.getvalue()) == ["0.7000", "0.5000", "0.5000"]


def test_a_line_is_never_broken_however_narrow_the_console() -> None:
    screen = Screen(terminal=False, width=20)
    with screen.view as view:
        view.trial_started(0, {f"parameter_{i}": i for i in range(30)}, epoch=0, max_epochs=2)
        view.epoch_ended(0, 1, metrics_of(0.5))
        view.note("a note that is longer than the console is wide")
    assert len(screen.paper.getvalue().splitlines()) == 3


def test_words_in_brackets_are_printed_as_they_are() -> None:
    screen = Screen(terminal=False)
    with screen.view as view:
        view.trial_started(0, {"layers": "[red]"}, epoch=0, max_epochs=2)
        view.trial_ended(0, "FAIL", "KeyError: [/bold]")
        view.note("see [/docs]")
    text = screen.paper.getvalue()
    assert text.count("[red]") == 2  # as it starts and as it ends
    assert "trial 0 FAIL: KeyError: [/bold]" in text
    assert "see [/docs]" in text


def test_the_time_left_of_a_trial_is_what_its_epochs_took_times_those_to_come() -> None:
    screen = Screen(terminal=False)
    with screen.view as view:
        view.trial_started(0, PARAMS, epoch=0, max_epochs=3)
        for epoch in (1, 2, 3):
            view.epoch_ended(0, epoch, metrics_of(0.5))
    left = re.findall(r"([\dhms]+) left", screen.paper.getvalue())
    assert left == [format_seconds(2 * EPOCH_SECONDS), format_seconds(1 * EPOCH_SECONDS)]


def test_a_trial_that_goes_on_says_so_and_guesses_from_the_epochs_of_now() -> None:
    screen = Screen(terminal=False)
    with screen.view as view:
        view.trial_started(0, PARAMS, epoch=40, max_epochs=50)
        view.epoch_ended(0, 41, metrics_of(0.5))
    start, epoch = screen.paper.getvalue().splitlines()
    assert "goes on after epoch 40" in start
    assert epoch.endswith(f"{format_seconds(9 * EPOCH_SECONDS)} left")


def test_a_value_that_is_not_finite_is_never_the_best() -> None:
    screen = Screen(terminal=True)
    with screen.view as view:
        view.trial_started(0, PARAMS, epoch=0, max_epochs=9)
        for epoch, value in enumerate((math.nan, 0.7, math.inf, math.nan), start=1):
            view.epoch_ended(0, epoch, metrics_of(value))
    assert "best 0.7000 (trial 0)" in screen.last_frame[-1]
    assert "nan" in screen.last_frame[1]
    assert "0.7000" in screen.last_frame[1]


def test_thousands_of_short_epochs_do_not_flood_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("hpo.report.progress.time", SimpleNamespace(monotonic=lambda: now))
    screen = Screen(terminal=False)
    with screen.view as view:
        for number in range(100):
            view.trial_started(number, PARAMS, epoch=0, max_epochs=100)
            for epoch in range(1, 101):
                now += 0.001
                view.epoch_ended(number, epoch, metrics_of(0.5))
            view.trial_ended(number, "COMPLETE", "")
    lines = screen.paper.getvalue().splitlines()
    assert [line for line in lines if "COMPLETE" in line] == [
        f"trial {number} COMPLETE: val_accuracy 0.5000  (batch_size 64, lr 0.01)" for number in range(100)
    ]
    others = [line for line in lines if "COMPLETE" not in line]
    # Ten seconds long, at five lines a second, after what is printed at once.
    assert 60 <= len(others) <= 90
    epochs = [line for line in others if " epoch " in line]
    unprinted = [int(count) for line in others for count in re.findall(r"\(and (\d+) epochs? more", line)]
    assert len(epochs) + sum(unprinted) == 10_000, "each epoch is printed or counted"


def test_a_slow_search_prints_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("hpo.report.progress.time", SimpleNamespace(monotonic=lambda: now))
    screen = Screen(terminal=False)
    with screen.view as view:
        view.trial_started(0, PARAMS, epoch=0, max_epochs=200)
        for epoch in range(1, 201):
            now += 0.25
            view.epoch_ended(0, epoch, metrics_of(0.5))
    assert len(screen.paper.getvalue().splitlines()) == 201
    assert "more" not in screen.paper.getvalue()


# --- on a terminal ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 50), (60, 10), (200, 5)])
def test_a_thousand_running_trials_fit_on_the_screen_there_is(width: int, height: int) -> None:
    screen = Screen(terminal=True, width=width, height=height, total=2000, slots=1000)
    params = {"batch_size": 512, "lr": 0.012345678, "optimizer": "adamw", "weight_decay": 0.0001}
    with screen.view as view:
        for number in range(1000):
            view.trial_started(number, params, epoch=0, max_epochs=50)
        for number in range(1000):
            view.epoch_ended(number, 1, metrics_of(0.5))
    frame = screen.last_frame
    assert len(frame) < height, "the last line is the cursor's"
    assert max(map(len, frame)) <= width
    rows = [line for line in frame if re.match(r"\d+ .*\b1/50\b", line)]
    assert len(rows) >= height - 6, "the room is used"
    assert f"... and {1000 - len(rows)} more" in frame
    assert "2000 left" in " ".join(frame)
    for row in rows:
        assert re.search(r"0\.5000 .*24m30s$", row), "what does not fit is the parameters, never a number"


def test_at_80_columns_a_row_has_its_bar_and_all_numbers() -> None:
    screen = Screen(terminal=True, width=80)
    with screen.view as view:
        view.trial_started(0, {"batch_size": 512, "lr": 0.0123, "optimizer": "adamw"}, epoch=0, max_epochs=50)
        view.epoch_ended(0, 25, metrics_of(0.9))
        view.epoch_ended(0, 26, metrics_of(0.8))
    head, row = screen.last_frame[:2]
    assert re.findall(r"\S+", head) == ["trial", "parameters", "epoch", "val_accuracy", "best", "images/s", "left"]
    assert re.search(r"batch_size.*… +26/50 +━+[╺╸]?━+ +0\.8000 +0\.9000 +1,234 +12m00s$", row)


def test_a_thousand_running_trials_do_not_slow_the_driver() -> None:
    """The driver and the drawing share a process: a frame, four times a second, and an epoch's end must be cheap."""
    screen = Screen(terminal=True, width=80, height=24, total=5000, slots=1000)
    with screen.view as view:
        for number in range(1000):
            view.trial_started(number, PARAMS, epoch=0, max_epochs=1000)
        started = time.process_time()
        for epoch in range(1, 31):
            for number in range(1000):
                view.epoch_ended(number, epoch, metrics_of(0.5))
        epoch_seconds = (time.process_time() - started) / 30_000
        started = time.process_time()
        for _ in range(20):
            view._live.refresh()
        frame_seconds = (time.process_time() - started) / 20
    assert epoch_seconds < 0.001
    assert frame_seconds < 0.05


def test_a_few_trials_are_all_shown_with_epoch_value_and_best() -> None:
    screen = Screen(terminal=True)
    with screen.view as view:
        for number in range(3):
            view.trial_started(number, PARAMS, epoch=0, max_epochs=50)
        view.epoch_ended(1, 1, metrics_of(0.9))
        view.epoch_ended(1, 2, metrics_of(0.8))
    rows = screen.last_frame[1:-1]
    assert [row.split()[0] for row in rows] == ["0", "1", "2"]
    assert ["0/50" in rows[0], "2/50" in rows[1], "0/50" in rows[2]] == [True] * 3
    assert re.findall(r"0\.\d{4}", rows[1]) == ["0.8000", "0.9000"]
    assert "more" not in screen.last_frame[-1]


def test_ended_trials_leave_the_table_and_are_counted_with_those_of_earlier_runs() -> None:
    screen = Screen(terminal=True, total=10, before={"COMPLETE": 2, "PRUNED": 1})
    with screen.view as view:
        for number, state in enumerate(["COMPLETE", "PRUNED", "FAIL", "COMPLETE"]):
            view.trial_started(number, PARAMS, epoch=0, max_epochs=2)
            view.epoch_ended(number, 1, metrics_of(number / 10))
            view.trial_ended(number, state, "out of memory" if state == "FAIL" else "")
    assert len(screen.last_frame) == 2  # the head of the table, and the line of the study
    assert "4 done, 2 pruned, 1 failed" in screen.last_frame[-1]
    assert "3 left" in screen.last_frame[-1]
    assert "best 0.3000 (trial 3)" in screen.last_frame[-1]
    assert any("trial 2 FAIL: out of memory" in line for line in screen.lines)


def test_the_time_remaining_is_that_of_the_running_trials_and_of_those_waiting_for_a_slot() -> None:
    screen = Screen(terminal=True, total=8, slots=2)
    with screen.view as view:
        for number in range(2):
            view.trial_started(number, PARAMS, epoch=0, max_epochs=10)
            view.epoch_ended(number, 1, metrics_of(0.5))
    # Two run for nine more epochs, then six wait for two slots: three rounds of ten epochs.
    expected = 9 * EPOCH_SECONDS + 3 * 10 * EPOCH_SECONDS
    assert screen.seconds_remaining == pytest.approx(expected, rel=0.25)


def test_the_time_remaining_learns_from_the_trials_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = 0.0
    monkeypatch.setattr("hpo.report.progress.time", SimpleNamespace(monotonic=lambda: time.monotonic() + skipped))
    screen = Screen(terminal=True, total=4, slots=1)
    with screen.view as view:
        view.trial_started(0, PARAMS, epoch=0, max_epochs=10)
        skipped = 600.0
        view.trial_ended(0, "COMPLETE", "")
        view.trial_started(1, PARAMS, epoch=0, max_epochs=10)
        view.epoch_ended(1, 5, metrics_of(0.5))
    # Trial 1 has five epochs before it, trials 2 and 3 will take what trial 0 took.
    assert screen.seconds_remaining == pytest.approx(5 * EPOCH_SECONDS + 2 * 600, rel=0.05)


@pytest.mark.parametrize(("total", "epochs"), [(None, 1), (8, 0)], ids=["no total", "no epoch yet"])
def test_there_is_no_guess_where_there_is_nothing_to_guess_from(total: int | None, epochs: int) -> None:
    screen = Screen(terminal=True, total=total)
    with screen.view as view:
        view.trial_started(0, PARAMS, epoch=0, max_epochs=10)
        for epoch in range(1, epochs + 1):
            view.epoch_ended(0, epoch, metrics_of(0.5))
    assert screen.seconds_remaining is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0, "0s"),
        (42, "42s"),
        (59.7, "1m00s"),
        (7 * 60 + 5, "7m05s"),
        (59 * 60 + 59.6, "1h00m"),
        (3 * 3600 + 20 * 60, "3h20m"),
        (30 * 3600, "30h00m"),
    ],
)
def test_a_duration_is_written_for_people(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text
