"""Format numbers, durations and commands as text."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.space.model import Space
    from hpo.space.sections import Budget


def format_seconds(seconds: float | None) -> str:
    """Return a duration such as 42s, 7m05s or 3h20m; empty for None."""
    if seconds is None:
        return ""
    if not math.isfinite(seconds):  # a trainable may report anything
        return f"{seconds}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def format_bytes(count: float) -> str:
    """Return a number of bytes such as 512 B, 1.5 kB, 134 MB or 2.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.1f} {unit}" if count < 9.95 and unit != "B" else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def format_device_time(budget: Budget, device_seconds: float) -> str:
    """Return device time with its limit and its price, such as `1.25 of 8 device-hours, cost 3.12 of 20`."""
    limit = "" if budget.gpu_hours is None else f" of {budget.gpu_hours:g}"
    text, cost = f"{format_amount(device_seconds / 3600)}{limit} device-hours", budget.cost
    if cost is not None:
        limit = "" if cost.limit is None else f" of {cost.limit:g}"
        text += f", cost {format_amount(cost.of(device_seconds))}{limit}"
    return text


def format_amount(amount: float) -> str:
    """Return hours or money with two decimals, or with two digits if it is small."""
    return f"{amount:,.2f}" if amount >= 0.1 else f"{amount:.2g}"


def format_number(value: float | None) -> str:
    """Return a metric with four decimals, or with four digits if it is very large or small; empty for None."""
    if value is None:
        return ""
    is_plain = value == 0 or 1e-3 <= abs(value) < 1e6 or not math.isfinite(value)
    return f"{value:.4f}" if is_plain else f"{value:.4g}"


def format_mean(value: float | None, standard_error: float | None) -> str:
    """Return a metric as `format_number` does, with its standard error if it has one: `0.9123 ± 0.0021`."""
    text = format_number(value)
    return text if standard_error is None or not text else f"{text} ± {standard_error:.2g}"


def describe_seeds(space: Space) -> str:
    """Return the seeds of the trainings of one configuration: `seed 0`, or `seeds 0 to 2`."""
    last = space.seed + space.replicates - 1
    return f"seed {space.seed}" if space.replicates == 1 else f"seeds {space.seed} to {last}"


def format_value(value: Any) -> str:
    """Return the value of a parameter; floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_params(params: Mapping[str, Any]) -> str:
    """Return parameters as `batch_size 64, lr 0.01`."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in params.items())


def format_command(verb: str, *words: str) -> str:
    """Return a command line of this program to copy and run: with `uv run` if that started the process."""
    uv = "uv run " if "UV_RUN_RECURSION_DEPTH" in os.environ else ""
    module = f"hpo.{verb}" if verb in {"run", "report", "dashboard"} else f"hpo {verb}"
    return f"{uv}python -m {module} {shlex.join(words)}".strip()


def shorten(text: str, length: int = 64) -> str:
    """Return a text in one line of at most `length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
