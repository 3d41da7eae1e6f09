r"""Patterns that read metrics from what a script prints: `report: {accuracy: 'Accuracy: (\d+/\d+)'}`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import regex

EPOCH = "epoch"
MAX_LENGTH = 500  # of a pattern
MAX_REPEATS = 10_000  # of counted repetitions, {m} and {m,n}, multiplied: the library writes them out
MAX_LINE = 10_000  # characters of a line that are searched
SECONDS_PER_LINE = 0.1  # for one pattern: some need time that grows exponentially with the line


class PatternError(ValueError):
    """A pattern is invalid, took too long, or found what is no number."""


def compile_pattern(text: str) -> regex.Pattern[str]:
    """Compile a pattern.

    Messages show it as it is in the file: `repr` would double each backslash.

    Raises:
        PatternError: it is not a valid pattern with one group.
    """
    import regex  # bounds the time of a search, unlike re

    if len(text) > MAX_LENGTH:
        raise PatternError(f"a pattern has at most {MAX_LENGTH} characters, this one has {len(text)}")
    if math.prod(max(1, int(count)) for count in re.findall(r"\{[\d,\s]*?(\d{1,9})\s*\}", text)) > MAX_REPEATS:
        raise PatternError(f"'{text}' repeats too often: its counts in braces multiply to more than {MAX_REPEATS:,}")
    try:
        pattern = regex.compile(text)
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        raise PatternError(f"'{text}' is not a regular expression: {error}") from None
    if pattern.groups != 1:
        raise PatternError(
            f"'{text}' must have one group, parentheses around the number, and has {pattern.groups}; (?:...) is no group"
        )
    return pattern


class OutputReader:
    """Reads the metrics of a script from its lines, one after another.

    An epoch has ended when each pattern has found a number since the epoch before. With a pattern for the epoch, numbers
    count from the line with its number on, and only once for each: what is printed before the first epoch, or after the last
    one, belongs to none.

    Args:
        patterns: {metric: pattern with one group}, at least one that is not `epoch`.

    Raises:
        PatternError: see `compile_pattern`.
    """

    def __init__(self, patterns: Mapping[str, str]) -> None:
        self._patterns = {name: compile_pattern(text) for name, text in patterns.items()}
        self._epoch = self._patterns.pop(EPOCH, None)
        self._number: float | None = None  # of the epoch that has begun
        self._ended: float | None = None  # of the last one that ended
        self._found: dict[str, float] = {}

    def read(self, line: str) -> dict[str, float] | None:
        """Return the metrics of an epoch, with `epoch` if it has a pattern; None if the line does not end one.

        Raises:
            PatternError: a pattern takes too long, or its group is no number.
        """
        if self._epoch is not None and (number := _search(EPOCH, self._epoch, line)) not in {None, self._number}:
            self._number = number
            self._found.clear()
        for name, pattern in self._patterns.items():
            value = _search(name, pattern, line)
            if value is not None:
                self._found[name] = value
        is_counted = self._epoch is None
        if self._found.keys() != self._patterns.keys() or not (is_counted or self._number not in {None, self._ended}):
            return None
        metrics, self._found, self._ended = self._found, {}, self._number
        return metrics if self._number is None else metrics | {EPOCH: self._number}


def _search(name: str, pattern: regex.Pattern[str], line: str) -> float | None:
    """Return the number that a pattern finds in a line; None if it finds none."""
    try:
        match = pattern.search(line[:MAX_LINE], timeout=SECONDS_PER_LINE)
    except TimeoutError:
        raise PatternError(
            f"report.{name} took over {SECONDS_PER_LINE:g} s on a line of {len(line)} characters: simplify it"
        ) from None
    if match is None or (len(line) > MAX_LINE and match.end(1) == MAX_LINE):  # the number may continue
        return None
    return _as_number(name, match[1])


def _as_number(name: str, text: str | None) -> float:
    """Return a number, such as `0.98`, `1e-3` or the fraction `9846/10000`."""
    numerator, slash, denominator = (text or "").partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        raise PatternError(f"report.{name} found {text!r}, which is no number") from None
