"""Numbers and durations as text."""

from __future__ import annotations

import math
from typing import Any

ENDED = ("COMPLETE", "PRUNED", "FAIL")  # the states that a trial never leaves


def format_seconds(seconds: float | None) -> str:
    """Return a duration for people, like 42s, 7m05s or 3h20m; empty for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def format_number(value: float | None) -> str:
    """Return a metric's value with four decimals, or four digits where it is very large or small; empty for None."""
    if value is None:
        return ""
    is_plain = value == 0 or 1e-3 <= abs(value) < 1e6 or not math.isfinite(value)
    return f"{value:.4f}" if is_plain else f"{value:.4g}"


def format_value(value: Any) -> str:
    """Return a parameter's value."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
