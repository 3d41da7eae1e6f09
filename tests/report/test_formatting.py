"""Numbers and durations as text."""

from __future__ import annotations

import math

import pytest

from hpo.report.formatting import format_bytes, format_number, format_params, format_seconds, shorten


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


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9_940, "9.9 kB"),
        (9_960, "10 kB"),
        (134_217_728, "134 MB"),
        (999_600_000, "1.0 GB"),
        (123_400_000_000, "123 GB"),
        (1_234_000_000_000_000, "1,234.0 TB"),
    ],
)
def test_bytes_have_two_or_three_digits_and_a_unit(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_parameters_are_listed_with_short_floats() -> None:
    assert format_params({"lr": 0.0123456, "batch_size": 64, "nesterov": True}) == (
        "lr 0.01235, batch_size 64, nesterov True"
    )


def test_a_long_text_is_shortened_to_one_line() -> None:
    assert shorten("a\n  b") == "a b"
    assert shorten("x" * 70) == "x" * 63 + "…"
