"""Show a running search: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.status import Status
from rich.table import Table
from rich.text import Text

from hpo.report.formatting import format_device_time, format_params, format_seconds
from hpo.report.plan import plan_lines

if TYPE_CHECKING:
    from hpo.search.estimate import SearchEstimate
    from hpo.search.slots import Slots
    from hpo.space.model import Space
    from hpo.space.sections import Budget
    from storage.pareto import Direction

BAR_WIDTH = 12
MIN_PARAMS_WIDTH = 12
PARAMS = "parameters"
BAR = ""  # the heading of the progress bars
OPTIONAL_COLUMNS = (BAR, "images/s", "best")  # left out on a narrow terminal, in this order
ANY_WIDTH = 10**6
MAX_FRONT = 8  # trials of the Pareto front that are named
RECENT_EPOCHS = 20  # on which the time left is based
# A token bucket for plain lines: epochs beyond it are counted, not printed.
LINES_BURST = 30
LINES_PER_SECOND = 5.0


@dataclass
class _Row:
    """A running trial."""

    params: Mapping[str, Any]
    epoch: int
    max_epochs: int
    started: float = field(default_factory=time.monotonic)
    recent_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_EPOCHS))
    seconds_left: float | None = None
    values: tuple[float, ...] = ()  # of the objectives; empty before the first epoch
    best: float | None = None  # of a single objective
    speed: float | None = None

    def add_epoch(self, epoch: int, seconds: float) -> None:
        self.epoch = epoch
        self.recent_seconds.append(seconds)
        # Once per epoch, not in each frame: a frame may show a thousand trials, four times a second.
        self.seconds_left = statistics.median(self.recent_seconds) * (self.max_epochs - epoch)


class TerminalProgress:
    """A `ProgressListener` that shows a search as a live table, or as plain lines if the output is not a terminal.

    Use it as a context manager: leaving the context removes the live table.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._metrics: list[str] = []  # of the objectives
        self._directions: tuple[Direction, ...] = ()
        self._better: Callable[[float, float], float] = max
        self._front: dict[int, tuple[float, ...]] = {}  # {number: values}, with several objectives
        self._total: int | None = None
        self._is_population = False
        self._budget: Budget | None = None
        self._device_seconds = 0.0
        self._slots = 1
        self._waits_for_others = False  # whether trials stop for a while, and others train
        self._counts: Counter[str] = Counter()
        self._waiting = 0  # trials that any run has given back, as far as this one knows
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
        self.close()

    def close(self) -> None:
        """End the live table, so that other text can follow."""
        self._end_status()
        self._live.stop()
        if self._epochs_unprinted:
            self._print(f"(and {_epochs(self._epochs_unprinted)} more)")
            self._epochs_unprinted = 0

    def search_starting(self, space: Space) -> None:
        """Print the name and the description of the search."""
        self._print(Text.assemble((space.name, "bold"), f": {space.description or space.command or space.trainable}"))

    def preparing(self, what: str) -> None:
        """Show a status line on a terminal."""
        if self._console.is_terminal:
            if self._status is None:
                self._status = self._console.status(what)
                self._status.start()
            self._status.update(what)

    def study_opened(
        self, space: Space, study_name: str, storage_url: str, counts: Mapping[str, int], left: int | None
    ) -> None:
        """Print where results are stored, and the trials that storage holds already."""
        self._metrics = [each.metric for each in space.all_objectives]
        self._directions = space.directions
        self._better = max if space.direction == "maximize" else min
        self._is_population = space.population is not None
        self._waits_for_others = self._is_population or space.scheduler.promotes_trials
        # Not that of the space: the budget does not count results of earlier studies, which `counts` has.
        self._total = None if left is None else self._count_ended(counts) + left
        self._budget = space.budget
        self._counts = Counter(counts)
        self._waiting = counts.get("WAITING", 0)
        self._print(f"Storage: {storage_url}")
        if study_name != space.name:
            self._print(f"The space differs from that of study {space.name}: results go to the revision {study_name}.")
        states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        if states and left == 0:
            self._print(f"Nothing is left to do: storage holds {states}.")
        elif states:
            self._print(f"Resuming: storage holds {states}.")

    def search_planned(self, space: Space, slots: Slots, estimate: SearchEstimate | None) -> None:
        """Print the plan and start the live table."""
        self._slots = slots.count
        self._end_status()
        for line in plan_lines(space, slots, estimate, self._device_seconds):
            self._print(line)
        if self._console.is_terminal:
            self._live.start()

    def slots_changed(self, count: int, before: int) -> None:
        """Print how many trials can run at a time."""
        self._slots = count
        if count == 0:
            self.note("no machine of the cluster has room for a trial: waiting for one to join")
        else:
            trials = "1 trial" if count == 1 else f"{count} trials"
            self.note(f"the cluster has room for {trials} at a time now, before for {before}")

    def device_time_used(self, seconds: float) -> None:
        """Show what the study has used."""
        self._device_seconds = seconds

    def _end_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def trial_started(self, number: int, params: Mapping[str, Any], epoch: int, max_epochs: int) -> None:
        """Add a trial that starts, or resumes after `epoch`."""
        self._running[number] = _Row(params, epoch, max_epochs)
        self._waiting = max(0, self._waiting - bool(epoch))
        verb = f"resumes after epoch {epoch}" if epoch else "starts"
        if self._console.is_terminal:
            if epoch:
                self._print(f"trial {number} {verb}: {format_params(params)}")
        elif self._may_print():
            self._print(f"trial {number} {verb}: {format_params(params)}")

    def epoch_ended(self, number: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Update a trial with the metrics of an epoch."""
        row = self._running[number]
        value = metrics[self._metrics[0]]
        row.add_epoch(epoch, metrics["epoch_seconds"])
        row.values = tuple(metrics[name] for name in self._metrics)
        row.speed = metrics.get("images_per_second")
        if math.isfinite(value) and len(self._metrics) == 1:
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
        values = self._describe(row.values)
        self._print(f"trial {number} epoch {epoch}/{row.max_epochs}: {values}{best}{speed}{left}{more}")

    def trial_ended(self, number: int, state: str, text: str) -> None:
        """Remove a trial; print its state with its last value, or with the reason. One that did not run is counted only."""
        row = self._running.pop(number, None)
        self._counts[state] += 1
        self._waiting += state == "WAITING"
        if row is None:
            self._waiting = max(0, self._waiting - 1)
            return
        self._trial_seconds.append(time.monotonic() - row.started)
        style = {"FAIL": "red", "COMPLETE": "green"}.get(state, "yellow")
        value = self._describe(row.values) if row.values and not text else text
        if state == "COMPLETE" and len(self._metrics) > 1:
            self._add_to_front(number, row.values)
        self._print(Text.assemble(f"trial {number} ", (state, style), f": {value}  ({format_params(row.params)})"))

    def _describe(self, values: Sequence[float]) -> str:
        return ", ".join(f"{name} {value:.4f}" for name, value in zip(self._metrics, values, strict=True))

    def _add_to_front(self, number: int, values: tuple[float, ...]) -> None:
        """Note a trial that completed; drop those that it dominates, or itself."""
        from storage.pareto import find_front

        numbers = [*self._front, number]
        found = [*self._front.values(), values]
        self._front = {numbers[place]: found[place] for place in find_front(found, self._directions)}

    def search_lost(self, text: str, exit_code: int) -> None:
        """Print it."""
        self.note(text)

    def note(self, text: str) -> None:
        """Print a remark in yellow."""
        self._print(Text(text, style="yellow"))

    def _print(self, text: str | Text) -> None:
        self._console.print(text, soft_wrap=True)

    def _may_print(self) -> bool:
        """Take a line from the token bucket; return whether there was one."""
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
        # One line for the heading of the table, one for the cursor.
        room = max(1, height - len(study.wrap(self._console, width)) - 2)
        running = list(self._running.items())
        shown = running if len(running) <= room else running[: max(0, room - 1)]
        table = self._fit_table(shown, width)
        if len(shown) < len(running):
            return Group(table, Text(f"... and {len(running) - len(shown)} more"), study)
        return Group(table, study)

    def _fit_table(self, rows: list[tuple[int, _Row]], width: int) -> Table:
        """Return a table that fits into `width`: it truncates parameters and drops columns, but never cuts a number."""
        texts = self._texts(rows)
        widest = {name: [max(column, key=cell_len, default="")] for name, column in texts.items()}
        for dropped in range(len(OPTIONAL_COLUMNS) + 1):
            names = [name for name in texts if name not in OPTIONAL_COLUMNS[:dropped]]
            # rich measures one row with the widest text of each column, not every row.
            ruler = _build_table({name: widest[name] for name in names}, bars=rows[:1])
            natural_width = self._measure(ruler)
            ruler.columns[names.index(PARAMS)].max_width = MIN_PARAMS_WIDTH
            if self._measure(ruler) <= width:
                break
        table = _build_table({name: texts[name] for name in names}, bars=rows)
        # An expanded table gives the parameters exactly the width that the other columns leave.
        table.expand = natural_width > width
        return table

    def _measure(self, table: Table) -> int:
        """Return the width at which rich cuts nothing."""
        return Measurement.get(self._console, self._console.options.update(max_width=ANY_WIDTH), table).maximum

    def _texts(self, rows: list[tuple[int, _Row]]) -> dict[str, list[str]]:
        """Return {heading: a text per row}; the bars have none."""
        is_single = len(self._metrics) == 1  # with several objectives, no value is the best
        return {
            "trial": [str(number) for number, _ in rows],
            PARAMS: [format_params(row.params) for _, row in rows],
            "epoch": [f"{row.epoch}/{row.max_epochs}" for _, row in rows],
            BAR: ["" for _ in rows],
            **{
                name: [f"{row.values[i]:.4f}" if row.values else "" for _, row in rows]
                for i, name in enumerate(self._metrics)
            },
            **({"best": ["" if row.best is None else f"{row.best:.4f}" for _, row in rows]} if is_single else {}),
            "images/s": ["" if row.speed is None else f"{row.speed:,.0f}" for _, row in rows],
            "left": [format_seconds(row.seconds_left) for _, row in rows],
        }

    def _study_line(self) -> str:
        counts = self._counts
        ended = self._count_ended(counts)
        pruned = "replaced" if self._is_population else "pruned"
        parts = [f"{counts['COMPLETE']} done, {counts['PRUNED']} {pruned}, {counts['FAIL']} failed"]
        if self._total is not None:
            parts.append(f"{max(0, self._total - ended)} left")
        if self._waiting:
            parts.append(f"{self._waiting} waiting")
        if self._best is not None:
            parts.append(f"best {self._best[0]:.4f} (trial {self._best[1]})")
        if self._front:
            parts.append(f"Pareto front of {len(self._front)}: {_shorten(sorted(self._front))}")
        if self._budget is not None and self._budget.shows_device_time:
            parts.append(format_device_time(self._budget, self._device_seconds))
        parts.append(f"{format_seconds(time.monotonic() - self._started)} elapsed")
        remaining = self._seconds_left(ended)
        if remaining is not None:
            parts.append(f"about {format_seconds(remaining)} remaining")
        return ", ".join(parts)

    def _seconds_left(self, ended: int) -> float | None:
        """Estimate the time left from the running trials and from the duration of those that ended."""
        rows = list(self._running.values())  # a copy: the driver adds rows while the drawing thread is here
        known = [row.seconds_left for row in rows if row.seconds_left is not None]
        if self._total is None or not known or self._waits_for_others:  # its trials wait for each other
            return None
        waiting = max(0, self._total - ended - len(rows))
        typical = (
            statistics.fmean(itertools.islice(reversed(self._trial_seconds), 1000))
            if self._trial_seconds
            else max(known) + time.monotonic() - min(row.started for row in rows)
        )
        return max(known) + -(-waiting // max(1, self._slots)) * typical

    def _count_ended(self, counts: Mapping[str, int]) -> int:
        """Return how many trials have ended, of those that the budget counts: in a population, none that was replaced."""
        states = ("COMPLETE", "FAIL") if self._is_population else ("COMPLETE", "PRUNED", "FAIL")
        return sum(counts.get(state, 0) for state in states)


def _build_table(texts: Mapping[str, Sequence[str]], bars: Sequence[tuple[int, _Row]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in texts:
        table.add_column(name, no_wrap=True, overflow="ellipsis", ratio=1 if name == PARAMS else None)
    for i, (_, row) in enumerate(bars):
        bar = ProgressBar(total=row.max_epochs, completed=row.epoch, width=BAR_WIDTH)
        table.add_row(*(bar if name == BAR else Text(column[i]) for name, column in texts.items()))
    return table


def _shorten(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:MAX_FRONT]))
    return f"trials {shown}, ..." if len(numbers) > MAX_FRONT else f"trial{'s'[: len(numbers) - 1]} {shown}"


def _epochs(count: int) -> str:
    return f"{count} epoch" if count == 1 else f"{count} epochs"
