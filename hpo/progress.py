"""The view in the terminal: a live table, or plain lines where there is no terminal."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

MAX_ROWS = 18  # of running trials: with heading and study line they fit a screen of 24 lines


@dataclass
class _Row:
    """A running trial."""

    params: Mapping[str, Any]
    epoch: int
    max_epochs: int
    started: float = field(default_factory=time.monotonic)
    epoch_seconds: list[float] = field(default_factory=list)
    value: float | None = None
    best: float | None = None
    speed: float | None = None

    @property
    def seconds_left(self) -> float | None:
        if not self.epoch_seconds:
            return None
        return statistics.median(self.epoch_seconds) * (self.max_epochs - self.epoch)


class Progress:
    """What `hpo.search` tells, shown. A context manager; on a terminal the table lives inside the `with`.

    Args:
        total: the number of trials to be, None if not known.
        slots: how many run at a time.
        before: {state: count} of what earlier runs left.
    """

    def __init__(
        self, console: Console, *, metric: str, direction: str, total: int | None, slots: int, before: Mapping[str, int]
    ) -> None:
        self._console = console
        self._metric = metric
        self._better = max if direction == "maximize" else min
        self._total = total
        self._slots = slots
        self._counts = Counter(before)
        self._running: dict[int, _Row] = {}
        self._best: tuple[float, int] | None = None
        self._started = time.monotonic()
        self._trial_seconds: list[float] = []
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def trial_started(self, number: int, params: Mapping[str, Any], epoch: int, max_epochs: int) -> None:
        """Show a trial that starts, or goes on after an epoch."""
        self._running[number] = _Row(params, epoch, max_epochs)
        if epoch or not self._console.is_terminal:
            verb = f"goes on after epoch {epoch}" if epoch else "starts"
            self._print(f"trial {number} {verb}: {_format_params(params)}")

    def epoch_ended(self, number: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Show an epoch's metrics."""
        row = self._running[number]
        value = metrics[self._metric]
        row.epoch, row.value = epoch, value
        row.best = value if row.best is None else self._better(row.best, value)
        row.speed = metrics.get("images_per_second")
        row.epoch_seconds.append(metrics["epoch_seconds"])
        if self._best is None or self._better(self._best[0], value) != self._best[0]:
            self._best = (value, number)
        if not self._console.is_terminal:
            speed = f", {row.speed:,.0f} images/s" if row.speed else ""
            left = f", {format_seconds(row.seconds_left)} left" if row.seconds_left else ""
            self._print(
                f"trial {number} epoch {epoch}/{row.max_epochs}: {self._metric} {value:.4f} (best {row.best:.4f})"
                f"{speed}{left}"
            )

    def trial_ended(self, number: int, state: str, text: str) -> None:
        """Count a trial that ended; print why, where it is not simply done."""
        row = self._running.pop(number)
        self._trial_seconds.append(time.monotonic() - row.started)
        self._counts[state] += 1
        style = {"FAIL": "red", "COMPLETE": "green"}.get(state, "yellow")
        value = f"{self._metric} {row.value:.4f}" if row.value is not None and not text else text
        self._print(Text.assemble(f"trial {number} ", (state, style), f": {value}  ({_format_params(row.params)})"))

    def note(self, text: str) -> None:
        """Print something that the user should know."""
        self._print(Text(text, style="yellow"))

    def _print(self, text: str | Text) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _render(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("trial", "parameters", "epoch", "", self._metric, "best", "images/s", "left"):
            table.add_column(name, no_wrap=True, overflow="ellipsis")
        rows = list(self._running.items())
        for number, row in rows[:MAX_ROWS]:
            table.add_row(
                str(number),
                _format_params(row.params),
                f"{row.epoch}/{row.max_epochs}",
                ProgressBar(total=row.max_epochs, completed=row.epoch, width=12),
                "" if row.value is None else f"{row.value:.4f}",
                "" if row.best is None else f"{row.best:.4f}",
                "" if row.speed is None else f"{row.speed:,.0f}",
                format_seconds(row.seconds_left),
            )
        if len(rows) > MAX_ROWS:
            table.add_row("", f"... and {len(rows) - MAX_ROWS} more")
        return Group(table, Text(self._study_line(), style="bold"))

    def _study_line(self) -> str:
        counts = self._counts
        ended = counts["COMPLETE"] + counts["PRUNED"] + counts["FAIL"]
        parts = [f"{counts['COMPLETE']} done, {counts['PRUNED']} pruned, {counts['FAIL']} failed"]
        if self._total is not None:
            parts.append(f"{max(0, self._total - ended)} left")
        if self._best is not None:
            parts.append(f"best {self._best[0]:.4f} (trial {self._best[1]})")
        parts.append(f"{format_seconds(time.monotonic() - self._started)} elapsed")
        remaining = self._seconds_left(ended)
        if remaining is not None:
            parts.append(f"about {format_seconds(remaining)} remaining")
        return ", ".join(parts)

    def _seconds_left(self, ended: int) -> float | None:
        """Guess from the running trials and from how long the ended ones took."""
        running = [row.seconds_left for row in self._running.values()]
        known = [seconds for seconds in running if seconds is not None]
        if self._total is None or not known:
            return None
        waiting = max(0, self._total - ended - len(running))
        typical = (
            sum(self._trial_seconds) / len(self._trial_seconds)
            if self._trial_seconds
            else max(known) + time.monotonic() - min(row.started for row in self._running.values())
        )
        return max(known) + -(-waiting // max(1, self._slots)) * typical


def _format_params(params: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
    )


def format_seconds(seconds: float | None) -> str:
    """Return a duration for people, like 42s, 7m05s or 3h20m; empty for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
