"""The published results of the documented grid, and the studies that are compared with them."""

from __future__ import annotations

from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from hpo.report.published import match_published, read_published
from hpo.report.results import read_results
from storage.database import Database
from tests.report.studies import add_trial, finish_grid, grid_space, optuna_study, read


def test_the_published_numbers_are_the_documented_ones() -> None:
    published = read_published()
    found = {key: (round(trial.test_accuracy, 4), round(trial.seconds)) for key, trial in published.items()}
    assert found == {(64, 0.01): (0.9231, 1719), (256, 0.01): (0.9090, 1129), (512, 0.01): (0.9147, 1083)}
    for trial in published.values():
        assert list(trial.epochs) == list(range(1, 51))
        assert 0.7 < trial.epochs[1]["train_accuracy"] < trial.epochs[50]["train_accuracy"] < 1


def test_a_repetition_of_the_documented_grid_matches(database: Database) -> None:
    published = read_published()
    assert match_published(read_results(finish_grid(database))) == {
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
def test_another_search_does_not_match(database: Database, changes: dict[str, Any]) -> None:
    assert match_published(read_results(finish_grid(database, **changes))) == {}


def test_a_trial_with_other_parameters_prevents_the_comparison(database: Database) -> None:
    study = finish_grid(database)
    params = {"batch_size": 64, "lr": 0.01, "optimizer": "sgd"}
    distributions = grid_space().distributions() | {"optimizer": CategoricalDistribution(["sgd"])}
    study.optuna_study.add_trial(create_trial(state=TrialState.FAIL, params=params, distributions=distributions))
    assert match_published(read_results(study)) == {}


def test_a_study_of_another_program_does_not_match(database: Database) -> None:
    add_trial(optuna_study(database), "COMPLETE", [1.0])
    assert match_published(read(database)) == {}
