"""Numbers and durations as text."""

from __future__ import annotations

import math

import pytest

from hpo.report.formatting import format_number, format_params, format_seconds, shorten


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
def test_a_duration_has_its_two_largest_units(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0.0000"), (0.12345, "0.1235"), (1e-9, "1e-09"), (2.5e7, "2.5e+07"), (math.inf, "inf")],
)
def test_a_metric_has_four_decimals_unless_it_is_very_large_or_small(value: float | None, text: str) -> None:
    assert format_number(value) == text


def test_parameters_are_listed_with_short_floats() -> None:
    assert format_params({"lr": 0.0123456, "batch_size": 64, "nesterov": True}) == (
        "lr 0.01235, batch_size 64, nesterov True"
    )


def test_a_long_text_is_shortened_to_one_line() -> None:
    assert shorten("a\n  b") == "a b"
    assert shorten("x" * 70) == "x" * 63 + "…"
