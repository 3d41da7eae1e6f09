r"""Patterns that read metrics from what a script prints: `report: {accuracy: 'Accuracy: (\d+/\d+)'}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import regex

EPOCH = "epoch"
MAX_LENGTH = 500  # of a pattern
MAX_LINE = 10_000  # characters of a line that are searched
SECONDS_PER_LINE = 0.1  # for one pattern: some need time that grows exponentially with the line


class PatternError(ValueError):
    """A pattern is invalid, took too long, or found what is no number."""


def compile_pattern(text: str) -> regex.Pattern[str]:
    """Compile a pattern.

    Raises:
        PatternError: it is not a valid pattern with one group.
    """
    import regex  # bounds the time of a search, unlike re

    if len(text) > MAX_LENGTH:
        raise PatternError(f"a pattern has at most {MAX_LENGTH} characters, this one has {len(text)}")
    try:
        pattern = regex.compile(text)
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        raise PatternError(f"{text!r} is not a regular expression: {error}") from None
    if pattern.groups != 1:
        raise PatternError(
            f"{text!r} must have one group, parentheses around the number, and has {pattern.groups}; (?:...) is no group"
        )
    return pattern


class OutputReader:
    """Reads the metrics of a script from its lines, one after another.

    An epoch has ended when each pattern, apart from that of the epoch, has found a number since the epoch before.

    Args:
        patterns: {metric: pattern with one group}, at least one that is not `epoch`.

    Raises:
        PatternError: see `compile_pattern`.
    """

    def __init__(self, patterns: Mapping[str, str]) -> None:
        self._patterns = {name: compile_pattern(text) for name, text in patterns.items()}
        self._found: dict[str, float] = {}

    def read(self, line: str) -> dict[str, float] | None:
        """Return the metrics of an epoch, with `epoch` if it has a pattern; None if the line does not end one.

        Raises:
            PatternError: a pattern takes too long, or its group is no number.
        """
        for name, pattern in self._patterns.items():
            try:
                match = pattern.search(line[:MAX_LINE], timeout=SECONDS_PER_LINE)
            except TimeoutError:
                raise PatternError(
                    f"report.{name} took over {SECONDS_PER_LINE:g} s on a line of {len(line)} characters: simplify it"
                ) from None
            if match is not None:
                self._found[name] = _as_number(name, match[1])
        if not (self._patterns.keys() - {EPOCH}) <= self._found.keys():
            return None
        metrics, self._found = self._found, {}
        return metrics


def _as_number(name: str, text: str | None) -> float:
    """Return a number, such as `0.98`, `1e-3` or the fraction `9846/10000`."""
    numerator, slash, denominator = (text or "").partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        raise PatternError(f"report.{name} found {text!r}, which is no number") from None
