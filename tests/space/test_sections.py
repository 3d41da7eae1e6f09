"""Samplers, durations and other sections."""

from __future__ import annotations

import inspect
import math
from typing import get_args

import pytest
from optuna import samplers

from hpo.errors import SpaceError
from hpo.space.sections import Sampler
from tests.space.conftest import Load
from tests.space.examples import SAMPLED, VALID

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
    assert load(space, "sampler=tpe").sampler == load(space, "sampler={name: tpe, n_ei_candidates: 24}").sampler


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


# --- budgets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "hours"),
    [
        ("{gpu_hours: 8}", 8.0),
        ("{gpu_hours: 8, cost: {gpu_hour: 2.5, limit: 20}}", 8.0),
        ("{gpu_hours: 9, cost: {gpu_hour: 2.5, limit: 20}}", 8.0),
        ("{gpu_hours: 7, cost: {gpu_hour: 2.5, limit: 20}}", 7.0),
        ("{cost: {gpu_hour: 2.5, limit: 20}}", 8.0),
        ("{cost: {gpu_hour: 2.5}}", math.inf),
        ("{trials: 3}", math.inf),
    ],
)
def test_the_smaller_limit_of_device_time_counts(load: Load, budget: str, hours: float) -> None:
    found = load(VALID, f"budget={budget}").budget
    assert found.device_seconds == 3600 * hours
    assert found.limits_device_time == (hours < math.inf)
    assert found.shows_device_time == ("trials" not in budget)


def test_device_time_has_a_price(load: Load) -> None:
    cost = load(VALID, "budget.cost={gpu_hour: 2.5}").budget.cost
    assert cost is not None
    assert cost.of(7200.0) == 5.0


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("gpu_hours: 0", ":6:10: budget.gpu_hours: "),
        ("gpu_hours: -1", ":6:10: budget.gpu_hours: "),
        ("gpu_hours: 8h", ":6:10: budget.gpu_hours: "),
        ("gpu_hours: .inf", ":6:10: budget.gpu_hours: "),
        ("gpuhours: 8", ":6:10: budget.gpuhours: unknown key"),
        ("cost: 20", ":6:10: budget.cost: "),
        ("cost: {limit: 20}", ":6:10: budget.cost"),
        ("cost: {gpu_hour: 2.5, limit: 0}", "budget.cost.limit: "),
        ("cost: {gpu_hour: 0, limit: 1}", "budget.cost.gpu_hour: "),
        ("cost: {gpu_hours: 2.5}", "did you mean gpu_hour?"),
    ],
)
def test_a_wrong_budget_is_answered_with_its_position(load: Load, written: str, text: str) -> None:
    with pytest.raises(SpaceError) as error:
        load(VALID + f"budget: {{{written}}}\n")
    assert text in str(error.value)


def test_a_budget_changes_no_identity(load: Load) -> None:
    one, other = load(VALID), load(VALID, "budget={gpu_hours: 8, cost: {gpu_hour: 2.5, limit: 20}}")
    assert one.fingerprint == other.fingerprint
    assert one.config_key({"lr": 0.01}) == other.config_key({"lr": 0.01})


# --- checkpoints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "count", "keeps_best", "description"),
    [
        ("best 3", 3, True, "the best 3 trials"),
        ("best 1", 1, True, "the best trial"),
        ("5", 5, False, "the last 5 trials"),
        ("none", 0, True, "no trial that has completed"),
        ("all", None, True, "all trials"),
    ],
)
def test_what_a_search_keeps(load: Load, written: str, count: int | None, keeps_best: bool, description: str) -> None:
    kept = load(VALID, f"checkpoints.keep={written}").checkpoints
    assert (kept.count, kept.keeps_best, kept.description) == (count, keeps_best, description)


def test_by_default_the_best_3_keep_their_checkpoints(load: Load) -> None:
    assert load(VALID).checkpoints.keep == "best 3"


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("bset 3", "got 'bset 3', did you mean best 3?"),
        ("best", "got 'best', did you mean best 3?"),
        ("best 0", "got 'best 0', did you mean best 3?"),
        ("al", "got 'al', did you mean all?"),
        ("the good ones", "got 'the good ones'"),
        ("0", "got 0"),
        ("-1", "got -1"),
        ("1.5", "got 1.5"),
        ("true", "got True"),
        ("[3]", "got [3]"),
    ],
)
def test_a_wrong_value_is_answered_with_what_is_allowed(load: Load, written: str, text: str) -> None:
    with pytest.raises(SpaceError) as error:
        load(VALID + f"checkpoints: {{keep: {written}}}\n")
    allowed = "checkpoints.keep: write all, none, best N (such as best 3) or a number above 0, "
    assert str(error.value).endswith(f":6:15: {allowed}{text}")


def test_what_is_kept_changes_no_identity(load: Load) -> None:
    one, other = load(VALID), load(VALID, "checkpoints.keep=all")
    assert one.fingerprint == other.fingerprint
    assert one.config_key({"lr": 0.01}) == other.config_key({"lr": 0.01})


@pytest.mark.parametrize(
    ("command", "saves"), [("train.py {lr}", False), ("train.py {lr} {checkpoint_dir}", True), ("null", True)]
)
def test_a_script_has_checkpoints_if_it_uses_the_folder_for_them(load: Load, command: str, saves: bool) -> None:
    assert load(VALID + "command: " + (command if command == "null" else repr(command))).saves_checkpoints == saves


@pytest.mark.parametrize(
    ("scheduler", "last"),
    [
        ("none", 0),
        ("{name: median, grace_period: 2}", 0),
        ("{name: asha, grace_period: 2}", 2),
        ("{name: asha, grace_period: 2, mode: promote}", 9),
        ("{name: hyperband, grace_period: 2}", 9),
    ],
)
def test_until_when_a_trial_may_wait_depends_on_the_scheduler(load: Load, scheduler: str, last: int) -> None:
    changes = ["max_epochs=9", f"scheduler={scheduler}"]
    assert load(VALID, *changes).last_wait == last
    if "promote" not in scheduler:
        assert load(VALID + "command: train.py {lr}\n", *changes).last_wait == 0, (
            "it has no checkpoint to train on from"
        )


# --- earlier studies ----------------------------------------------------------------------------------------------------


def test_an_earlier_study_is_a_name_or_a_mapping(load: Load) -> None:
    short, long = load(
        VALID
        + "warm_start:\n- grid\n- {study: old, storage: 'sqlite:///old.db', trials: best 20, despite: [data, metric]}\n"
    ).warm_start
    assert (short.study, short.storage, short.count, short.despite) == ("grid", None, None, [])
    assert (long.study, long.storage, long.count, long.despite) == ("old", "sqlite:///old.db", 20, ["data", "metric"])


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("trials: best 0", "trials: write all or best N (such as best 20), got 'best 0', did you mean best 20?"),
        ("trials: 20", "trials: write all or best N (such as best 20), got 20"),
        ("despite: [epochs]", "despite.0: "),
        ("studies: grid", "studies: unknown key"),
    ],
)
def test_wrong_options_of_an_earlier_study_are_answered_with_what_is_allowed(
    load: Load, written: str, text: str
) -> None:
    with pytest.raises(SpaceError) as error:
        load(VALID + f"warm_start: [{{study: grid, {written}}}]\n")
    assert text in str(error.value)


def test_what_a_search_learns_from_changes_no_identity(load: Load) -> None:
    one, other = load(VALID), load(VALID, "warm_start=[grid]")
    assert one.fingerprint == other.fingerprint
    assert one.config_key({"lr": 0.01}) == other.config_key({"lr": 0.01})
