"""The published results of the documented grid, and the studies that are compared with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hpo.report.published import match_published, read_published
from hpo.report.results import Results
from hpo.report.trials import TrialResult
from tests.report.studies import grid_space


def test_the_published_numbers_are_the_documented_ones() -> None:
    published = read_published()
    found = {key: (round(trial.test_accuracy, 4), round(trial.seconds)) for key, trial in published.items()}
    assert found == {(64, 0.01): (0.9231, 1719), (256, 0.01): (0.9090, 1129), (512, 0.01): (0.9147, 1083)}
    for trial in published.values():
        assert list(trial.epochs) == list(range(1, 51))
        assert 0.7 < trial.epochs[1]["train_accuracy"] < trial.epochs[50]["train_accuracy"] < 1


def test_a_repetition_of_the_documented_grid_matches(grid_results: Results) -> None:
    published = read_published()
    assert match_published(grid_results) == {
        0: published[(64, 0.01)],
        1: published[(256, 0.01)],
        2: published[(512, 0.01)],
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"dataset": "fashion_mnist_sample"}},
        {"data": {"train_samples": 2048}},
        {"trainable": "mine:train"},
        {"command": "python train.py {batch_size} {lr}"},
        {"derived": {"warmup_epochs": "0.05 * max_epochs"}},
        {"parameters": {"batch_size": [64], "lr": 0.01, "optimizer": "sgd"}},
    ],
)
def test_another_search_does_not_match(grid_results: Results, changes: dict[str, Any]) -> None:
    assert match_published(replace(grid_results, space=grid_space(**changes))) == {}


def test_a_trial_with_other_parameters_prevents_the_comparison(grid_results: Results) -> None:
    params = {"batch_size": 64, "lr": 0.01, "optimizer": "sgd"}
    other = TrialResult(3, params, "FAIL")
    assert match_published(replace(grid_results, trials=[*grid_results.trials, other])) == {}


def test_a_study_of_another_program_does_not_match(grid_results: Results) -> None:
    assert match_published(replace(grid_results, space=None)) == {}
