"""What the verbs print: results, hints, endings. Texts of users and databases are shown without control characters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from hpo.command_line.options import given_option, needs_storage_option
from hpo.errors import printable
from hpo.search.stop import StopCause

if TYPE_CHECKING:
    from rich.console import Console

    from hpo.api import SearchResult
    from hpo.report.results import Results
    from hpo.report.terminal import Terminal


def say(text: str, to: TextIO | None = None) -> None:
    """Print a text without control characters, by default to stdout."""
    print(printable(text), file=to)


def new_console() -> Terminal:
    """Return a console on stdout."""
    from hpo.report.terminal import Terminal

    # A log file has no width: the default of 80 columns would fold the table.
    return Terminal(width=None if sys.stdout is not None and sys.stdout.isatty() else 140)


def print_results(console: Console, results: Results) -> None:
    """Print the table of a study's trials, the device time that they used, and why some have failed."""
    from hpo.report.tables import describe_schedule, describe_ties, device_time, failures, trial_table

    console.print(trial_table(results, console))
    best = results.best
    if best is not None and (ties := describe_ties(results)):
        console.print(f"Trial {best.number} is the best, {ties}.", soft_wrap=True)
    if best is not None and (schedule := describe_schedule(results, best)):
        console.print(f"Trial {best.number}, the best one, has had {schedule}.", soft_wrap=True)
    for line in device_time(results):
        console.print(line, soft_wrap=True)
    for line in failures(results):
        console.print(line, style="red", soft_wrap=True)


def relative(path: Path) -> Path:
    """Return a path as short as it can be, from this folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def print_report(console: Console, page: Path) -> None:
    """Print where a report is."""
    console.print(f"Report: {relative(page)}  (report.md has the same figures as PNG)", soft_wrap=True)


def print_ending(console: Console, result: SearchResult, storage: str) -> None:
    """Print why a search has ended, and what can be done next."""
    if result.stopped is not None:
        remedy = {
            StopCause.INTERRUPTED: "The same command resumes it",
            StopCause.EXIT_TIME: "The same command resumes it",
            StopCause.TIME_SPENT: "With a larger budget.time, the same command resumes it",
            StopCause.NO_IMPROVEMENT: "With a larger budget.patience, the same command resumes it",
            StopCause.GPU_HOURS_SPENT: "With a larger budget.gpu_hours, the same command resumes it",
            StopCause.COST_SPENT: "With a larger budget.cost.limit, the same command resumes it",
        }.get(result.stopped.cause, "Fix the cause, retry the failed trials, and start the same command again")
        console.print(f"Stopped: {result.stopped}. {remedy}.", style="yellow", soft_wrap=True)
    name = result.results.name
    if result.report is not None:
        print_report(console, result.report)
    if result.results.counts["FAIL"]:
        console.print(f"Retry failed trials: {hint('retry', name, storage=storage)}", soft_wrap=True)
    console.print(f"Dashboard: {hint('dashboard', storage=storage)}", soft_wrap=True)
    console.print(f"Report again: {hint('report', name, storage=storage)}", soft_wrap=True)


def hint(verb: str, *words: str, storage: str, other: str = "") -> str:
    """Return a command that the user can copy and run. It contains no password.

    Args:
        verb: of the command.
        words: its arguments and options.
        storage: the database of the running command.
        other: the database of the command, if it is another one.
    """
    from hpo.report.formatting import format_command

    named = ["--storage", other or storage] if other or needs_storage_option() else []
    return format_command(verb, *words, *named, *given_option("--checkpoints"))
