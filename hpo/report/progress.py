"""The view in the terminal: a live table, or plain lines where there is no terminal."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.status import Status
from rich.table import Table
from rich.text import Text

from hpo.report.formatting import ENDED, format_seconds
from hpo.report.plan import plan_lines

if TYPE_CHECKING:
    from hpo.search.estimate import SearchPlan
    from hpo.search.slots import Slots
    from hpo.space.model import Space

BAR = ""  # the heading of the column with the bars
BAR_WIDTH = 12
GAP = 2  # between columns
MIN_PARAMS_WIDTH = 12  # of a narrow terminal, the parameters get at least so much
RECENT_EPOCHS = 20  # that the time left is guessed from
LINES_BURST = 30  # plain lines at once,
LINES_PER_SECOND = 5.0  # and then so many; epochs beyond are counted, not printed


@dataclass
class _Row:
    """A running trial."""

    params: Mapping[str, Any]
    epoch: int
    max_epochs: int
    started: float = field(default_factory=time.monotonic)
    recent_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_EPOCHS))
    seconds_left: float | None = None
    value: float | None = None
    best: float | None = None
    speed: float | None = None

    def add_epoch(self, epoch: int, seconds: float) -> None:
        self.epoch = epoch
        self.recent_seconds.append(seconds)
        # Here, once an epoch, and not in each frame: a thousand trials are asked four times a second.
        self.seconds_left = statistics.median(self.recent_seconds) * (self.max_epochs - epoch)


class TerminalProgress:
    """Shows a search in the terminal: a live table, or plain lines where the output is no terminal.

    A `ProgressListener` and a context manager: the live table ends with the `with`.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._metric = ""
        self._better: Callable[[float, float], float] = max
        self._total: int | None = None
        self._slots = 1
        self._counts: Counter[str] = Counter()
        self._running: dict[int, _Row] = {}
        self._best: tuple[float, int] | None = None
        self._started = time.monotonic()
        self._trial_seconds: list[float] = []
        self._lines_left = float(LINES_BURST)
        self._lines_at = self._started
        self._epochs_unprinted = 0
        self._status: Status | None = None
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> TerminalProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_status()
        self._live.stop()
        if self._epochs_unprinted:
            self._print(f"(and {_epochs(self._epochs_unprinted)} more)")

    def search_starting(self, space: Space) -> None:
        """Print what is searched, before anything slow is done."""
        self._print(Text.assemble((space.name, "bold"), f": {space.description or space.command or space.trainable}"))

    def preparing(self, what: str) -> None:
        """Show on a terminal what takes time."""
        if self._console.is_terminal:
            if self._status is None:
                self._status = self._console.status(what)
                self._status.start()
            self._status.update(what)

    def study_opened(self, space: Space, study_name: str, storage_url: str, counts: Mapping[str, int]) -> None:
        """Print where results go, and what is there already."""
        self._metric = space.metric
        self._better = max if space.direction == "maximize" else min
        self._total = space.total_trials
        self._counts = Counter(counts)
        self._print(f"Storage: {storage_url}")
        if study_name != space.name:
            self._print(f"The space differs from that of study {space.name}: results go to the revision {study_name}.")
        states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        if states and self._total is not None and sum(counts.get(state, 0) for state in ENDED) >= self._total:
            self._print(f"Nothing is left to do: storage holds {states}.")
        elif states:
            self._print(f"Resuming: storage holds {states}.")

    def search_planned(self, space: Space, slots: Slots, plan: SearchPlan | None) -> None:
        """Print how many trials run at a time and how long they take; show the live table from here on."""
        self._slots = slots.count
        self._end_status()
        for line in plan_lines(space, slots, plan):
            self._print(line)
        if self._console.is_terminal:
            self._live.start()

    def _end_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def trial_started(self, number: int, params: Mapping[str, Any], epoch: int, max_epochs: int) -> None:
        """Show a trial that starts, or goes on after an epoch."""
        self._running[number] = _Row(params, epoch, max_epochs)
        verb = f"goes on after epoch {epoch}" if epoch else "starts"
        if self._console.is_terminal:
            if epoch:
                self._print(f"trial {number} {verb}: {_format_params(params)}")
        elif self._may_print():
            self._print(f"trial {number} {verb}: {_format_params(params)}")

    def epoch_ended(self, number: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Show an epoch's metrics."""
        row = self._running[number]
        value = metrics[self._metric]
        row.add_epoch(epoch, metrics["epoch_seconds"])
        row.value = value
        row.speed = metrics.get("images_per_second")
        if math.isfinite(value):
            row.best = value if row.best is None else self._better(row.best, value)
            if self._best is None or self._better(self._best[0], value) != self._best[0]:
                self._best = (value, number)
        if self._console.is_terminal:
            return
        if not self._may_print():
            self._epochs_unprinted += 1
            return
        best = "" if row.best is None else f" (best {row.best:.4f})"
        speed = f", {row.speed:,.0f} images/s" if row.speed else ""
        left = f", {format_seconds(row.seconds_left)} left" if row.seconds_left else ""
        more = f" (and {_epochs(self._epochs_unprinted)} more before it)" if self._epochs_unprinted else ""
        self._epochs_unprinted = 0
        self._print(
            f"trial {number} epoch {epoch}/{row.max_epochs}: {self._metric} {value:.4f}{best}{speed}{left}{more}"
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

    def _may_print(self) -> bool:
        """Take a line out of the allowance, which grows with time: a log of very short epochs is not flooded."""
        now = time.monotonic()
        self._lines_left = min(LINES_BURST, self._lines_left + (now - self._lines_at) * LINES_PER_SECOND)
        self._lines_at = now
        if self._lines_left < 1:
            return False
        self._lines_left -= 1
        return True

    def _render(self) -> RenderableType:
        width, height = self._console.size
        study = Text(self._study_line(), style="bold")
        # The head of the table, the study's line, and the line that the cursor stands on.
        room = max(1, height - len(study.wrap(self._console, width)) - 2)
        running = list(self._running.items())
        shown = running if len(running) <= room else running[: max(0, room - 1)]
        table = Table(box=None, pad_edge=False, header_style="bold")
        columns = self._columns([row for _, row in shown])
        columns["trial"] = [str(number) for number, _ in shown]
        # Too narrow a terminal takes from the parameters, then whole columns: the numbers that are there stay whole.
        widths = {name: max(map(len, [name, *cells])) for name, cells in columns.items()} | {BAR: BAR_WIDTH}
        names = ["trial", "parameters", "epoch", BAR, self._metric, "best", "images/s", "left"]
        widths["parameters"] = MIN_PARAMS_WIDTH
        for name in (BAR, "images/s", "best"):
            if sum(widths[name] + GAP for name in names) - GAP > width:
                names.remove(name)
        others = sum(widths[name] + GAP for name in names if name != "parameters")
        for name in names:
            limit = max(MIN_PARAMS_WIDTH, width - others) if name == "parameters" else None
            table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=limit)
        for i, (_, row) in enumerate(shown):
            bar = ProgressBar(total=row.max_epochs, completed=row.epoch, width=BAR_WIDTH)
            table.add_row(*(bar if name == BAR else Text(columns[name][i]) for name in names))
        if len(shown) < len(running):
            return Group(table, Text(f"... and {len(running) - len(shown)} more"), study)
        return Group(table, study)

    def _columns(self, rows: list[_Row]) -> dict[str, list[str]]:
        return {
            "parameters": [_format_params(row.params) for row in rows],
            "epoch": [f"{row.epoch}/{row.max_epochs}" for row in rows],
            self._metric: ["" if row.value is None else f"{row.value:.4f}" for row in rows],
            "best": ["" if row.best is None else f"{row.best:.4f}" for row in rows],
            "images/s": ["" if row.speed is None else f"{row.speed:,.0f}" for row in rows],
            "left": [format_seconds(row.seconds_left) for row in rows],
        }

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
        rows = list(self._running.values())  # at once: this runs in the thread that draws, while the driver adds rows
        known = [row.seconds_left for row in rows if row.seconds_left is not None]
        if self._total is None or not known:
            return None
        waiting = max(0, self._total - ended - len(rows))
        typical = (
            statistics.fmean(itertools.islice(reversed(self._trial_seconds), 1000))
            if self._trial_seconds
            else max(known) + time.monotonic() - min(row.started for row in rows)
        )
        return max(known) + -(-waiting // max(1, self._slots)) * typical


def _epochs(count: int) -> str:
    return f"{count} epoch" if count == 1 else f"{count} epochs"


def _format_params(params: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
    )
