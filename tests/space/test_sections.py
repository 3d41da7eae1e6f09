"""Samplers, durations and other sections."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest
from optuna import samplers

from hpo.space.sections import Sampler
from tests.space.conftest import Load
from tests.space.examples import SAMPLED

SAMPLERS = {get_args(cls.model_fields["name"].annotation)[0]: cls for cls in get_args(get_args(Sampler)[0])}


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("90s", 90),
        ("30m", 30 * 60),
        ("4h", 4 * 60 * 60),
        ("1d12h", 36 * 60 * 60),
        ("1h1m1s", 60 * 60 + 60 + 1),
        ("2.5", 2.5),
    ],
)
def test_a_duration_has_units_and_a_number_is_seconds(load: Load, written: str, seconds: float) -> None:
    assert load(SAMPLED + "  lr: 1\n", f"budget={{time: {written}}}").budget.time == seconds


def test_a_name_stands_for_a_sampler_with_default_options(load: Load) -> None:
    space = SAMPLED + "  lr: 1\n"
    assert load(space, "sampler=tpe").sampler == load(space, "sampler={name: tpe, n_startup_trials: 10}").sampler


def test_the_options_of_a_sampler_are_the_arguments_of_optunas_sampler(load: Load) -> None:
    sampler = load(
        SAMPLED + "  lr: 1\n", "sampler={name: tpe, seed: 3, n_startup_trials: 5, multivariate: true}"
    ).sampler
    assert sampler.options == {
        "n_startup_trials": 5,
        "n_ei_candidates": 24,
        "multivariate": True,
        "constant_liar": True,
    }


def test_each_sampler_declares_what_it_does() -> None:
    assert {name for name, cls in SAMPLERS.items() if cls.is_grid} == {"grid"}
    assert {name for name, cls in SAMPLERS.items() if cls.learns} == {"tpe", "gp", "cmaes", "nsga2"}
    assert {name for name, cls in SAMPLERS.items() if not cls.allows_conditions} == {"qmc", "gp", "cmaes"}
    assert {name for name, cls in SAMPLERS.items() if cls.needs_range} == {"cmaes"}


def test_the_options_of_a_sampler_have_optunas_defaults_except_for_scramble() -> None:
    optuna_samplers = {
        "qmc": samplers.QMCSampler,
        "tpe": samplers.TPESampler,
        "gp": samplers.GPSampler,
        "cmaes": samplers.CmaEsSampler,
        "nsga2": samplers.NSGAIISampler,
    }
    different = set()
    for name, optuna_sampler in optuna_samplers.items():
        arguments = inspect.signature(optuna_sampler).parameters
        for key, field in SAMPLERS[name].model_fields.items():
            if key not in {"name", "seed"} and field.default is not None and field.default != arguments[key].default:
                different.add(f"{name}.{key}")
    assert different == {"qmc.scramble"}
