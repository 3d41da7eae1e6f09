"""Patterns that read metrics from what a script prints."""

from __future__ import annotations

import time

import pytest

from hpo.space.patterns import MAX_LINE, OutputReader, PatternError, compile_pattern

MNIST = {"epoch": r"Train Epoch: (\d+)", "accuracy": r"Accuracy: (\d+/\d+)", "loss": "Average loss: ([0-9.]+)"}


def read(patterns: dict[str, str], *lines: str) -> list[dict[str, float]]:
    reader = OutputReader(patterns)
    return [metrics for line in lines if (metrics := reader.read(line)) is not None]


def test_an_epoch_ends_when_every_pattern_has_found_a_number() -> None:
    lines = [
        "Train Epoch: 1 [0/60000 (0%)]\tLoss: 2.305400",
        "Train Epoch: 1 [640/60000 (1%)]\tLoss: 1.359776",
        "",
        "Test set: Average loss: 0.0474, Accuracy: 9846/10000 (98%)",
        "Train Epoch: 2 [0/60000 (0%)]\tLoss: 0.030739",
        "Test set: Average loss: 0.0336, Accuracy: 9889/10000 (99%)",
    ]
    assert read(MNIST, *lines) == [
        {"epoch": 1, "loss": 0.0474, "accuracy": 0.9846},
        {"epoch": 2, "loss": 0.0336, "accuracy": 0.9889},
    ]


def test_metrics_may_be_on_several_lines_and_the_last_number_counts() -> None:
    lines = ["val acc 0.1", "val acc 0.5", "val loss 1e-3", "val loss 2", "val acc -inf"]
    assert read({"a": r"acc (\S+)", "l": r"loss (\S+)"}, *lines) == [
        {"a": 0.5, "l": 0.001},
        {"a": float("-inf"), "l": 2.0},
    ]


@pytest.mark.parametrize(
    "lines",
    [
        ["acc 0.1", "Epoch 1 acc 0.5", "acc 0.6", "Epoch 2", "acc 0.7", "best acc 0.99"],
        ["Epoch 1", "Epoch 1", "acc 0.5", "Epoch 1", "acc 0.6", "Epoch 2 acc 0.7", "Epoch 2 acc 0.8"],
    ],
)
def test_with_the_number_of_the_epoch_what_belongs_to_none_is_no_epoch(lines: list[str]) -> None:
    patterns = {"epoch": r"Epoch (\d+)", "acc": r"acc ([\d.]+)"}
    assert read(patterns, *lines) == [{"epoch": 1, "acc": 0.5}, {"epoch": 2, "acc": 0.7}]


def test_a_number_at_the_end_of_what_is_searched_may_go_on() -> None:
    line = "x" * (MAX_LINE - 6) + "0.98765"
    assert read({"a": r"([\d.]+)"}, line) == []
    assert read({"a": r"([\d.]+)"}, "x" + line[2:]) == [{"a": 0.98765}]


@pytest.mark.parametrize("text", ["Accuracy: (%)", "Accuracy: (9846/0)", "Accuracy: (1/2/3)"])
def test_what_is_no_number_is_an_error_that_shows_it(text: str) -> None:
    found = text.removeprefix("Accuracy: (").removesuffix(")")
    with pytest.raises(PatternError) as error:
        read({"accuracy": r"Accuracy: \((.*)\)"}, text)
    assert str(error.value) == f"report.accuracy found {found!r}, which is no number"


def test_a_group_that_took_no_part_is_no_number() -> None:
    with pytest.raises(PatternError, match=r"report\.a found None"):
        read({"a": r"none|(\d)"}, "none")


def test_a_pattern_whose_time_grows_exponentially_is_stopped() -> None:
    started = time.monotonic()
    with pytest.raises(PatternError, match=r"report\.a took over 0\.1 s on a line of 61 characters: simplify it"):
        read({"a": r"^((?:a|aa)+)$"}, "a" * 60 + "b")
    assert time.monotonic() - started < 5


def test_a_line_without_an_end_is_searched_in_part() -> None:
    started = time.monotonic()
    assert read({"a": r"(\d+)$"}, "x" * 50_000_000) == []
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(", "is not a regular expression: missing )"),
        (r"Accuracy: \d+", "must have one group, parentheses around the number, and has 0"),
        (r"(\d+)/(\d+)", "and has 2; (?:...) is no group"),
        ("(?:(?:x{60}){60}){1,60}(y)", "repeats too often: its counts in braces multiply to more than 10,000"),
        ("(x)" + "x" * 500, "a pattern has at most 500 characters, this one has 503"),
    ],
)
def test_a_wrong_pattern_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(PatternError) as error:
        compile_pattern(text)
    assert message in str(error.value)
