"""The meaning of a search-space file, its identity, and how a stored study becomes a Space again."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from hpo.errors import SettingError, SpaceError
from hpo.space.messages import fields_by_key
from hpo.space.model import Space, load_space
from tests.factories import ROOT, shipped_space
from tests.space.conftest import Load
from tests.space.examples import FULL, HEAD, OBJECTIVES, SAMPLED, VALID


def with_later_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """Add the keys that version 0.1.0 did not have."""
    budget = settings["budget"] | {"patience": None, "cost": None}
    later = {"checkpoints": {"keep": "best 3"}, "continue": {"trials": None, "horizon": "restart"}, "report": {}}
    later["points_to_evaluate"] = []
    scheduler = {
        "mode": "stop",
        "population": 8,
        "interval": 5,
        "quantile": 0.25,
        "resample": 0.25,
        "factor": 1.2,
        "explore": None,
    }
    return settings | later | {"budget": budget, "scheduler": settings["scheduler"] | scheduler}


# --- the meaning of a file ------------------------------------------------------------------------------------------


def test_the_documented_grid_has_exactly_three_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    space = load_space("grid")
    assert list(space.grid_points()) == [{"batch_size": size, "lr": 0.01} for size in (64, 256, 512)]
    assert (space.name, space.max_epochs, space.sampler.name, space.scheduler.name) == ("grid", 50, "grid", "none")
    assert space.data.dataset == "fashion_mnist"
    assert space.trainable == "hpo.train:train"
    assert (space.metric, space.direction) == ("val_accuracy", "maximize")


@pytest.mark.parametrize("path", sorted((ROOT / "search_spaces").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_space_loads(path: Path) -> None:
    space = load_space(str(path))
    assert space.name == path.stem
    assert space.description
    assert list(space.distributions()) == list(space.parameters)


def test_a_scalar_is_fixed_a_list_is_choices_a_mapping_is_a_range(load: Load) -> None:
    space = load(
        SAMPLED + "  stem: cifar\n"
        "  optimizer: [sgd, adam]\n"
        "  activation: {type: categorical, choices: [relu, gelu]}\n"
        "  batch_size: {type: int, low: 16, high: 1024, log: true}\n"
        "  layers: {type: int, low: 2, high: 8, step: 2}\n"
        "  lr: {type: float, low: 1e-4, high: 1, log: true}\n"
        "  momentum: {type: float, low: 0, high: 0.75, step: 0.25}\n"
    )
    assert space.distributions() == {
        "stem": CategoricalDistribution(["cifar"]),
        "optimizer": CategoricalDistribution(["sgd", "adam"]),
        "activation": CategoricalDistribution(["relu", "gelu"]),
        "batch_size": IntDistribution(16, 1024, log=True),
        "layers": IntDistribution(2, 8, step=2),
        "lr": FloatDistribution(1e-4, 1.0, log=True),
        "momentum": FloatDistribution(0.0, 0.75, step=0.25),
    }


def test_a_grid_is_a_product_and_its_last_parameter_changes_fastest(load: Load) -> None:
    space = load(
        HEAD + "  a: [x, y]\n  b: {type: int, low: 1, high: 5, step: 2}\n"
        "  c: {type: float, low: 0, high: 0.5, step: 0.25}\n  d: 7\n"
    )
    product = itertools.product(["x", "y"], [1, 3, 5], [0.0, 0.25, 0.5], [7])
    assert list(space.grid_points()) == [dict(zip("abcd", point, strict=True)) for point in product]


def test_the_grid_of_a_continuous_range_has_its_two_ends(load: Load) -> None:
    space = load(SAMPLED + "  lr: {type: float, low: 0, high: 1}\n")
    assert list(space.grid_points()) == [{"lr": 0.0}, {"lr": 1.0}]


def test_a_range_with_one_value_is_finite(load: Load) -> None:
    space = load(SAMPLED.replace("tpe", "auto") + "  x: {type: float, low: 0.5, high: 0.5}\n  y: [1, 2]\n")
    assert space.sampler.name == "grid"
    assert list(space.grid_points()) == [{"x": 0.5, "y": 1}, {"x": 0.5, "y": 2}]


@pytest.mark.parametrize(("most", "count"), [(5, None), (6, 6)])
def test_the_configurations_of_a_finite_space_are_listed(load: Load, most: int, count: int | None) -> None:
    space = load(SAMPLED + "  x: {type: int, low: 1, high: 4}\n  y: [1, 2]\nconstraints: ['x < 4']\n")
    listed = space.list_points(most)
    assert (listed and len(listed)) == count
    infinite = load(SAMPLED + "  x: {type: float, low: 0, high: 1}\n")
    assert infinite.list_points(most) is None


def test_the_grid_of_a_float_range_with_a_step_stays_in_the_range(load: Load) -> None:
    space = load(HEAD + "  x: {type: float, low: 0, high: 0.3, step: 0.1}\n")
    points = [point["x"] for point in space.grid_points()]
    assert points == pytest.approx([0.0, 0.1, 0.2, 0.3])
    distribution = space.distributions()["x"]
    assert all(distribution._contains(distribution.to_internal_repr(point)) for point in points)


def test_examples_are_every_choice_and_both_ends_of_each_range(load: Load) -> None:
    space = load(HEAD + "  a: 5\n  b: [x, y]\n  c: {type: int, low: 2, high: 9}\n")
    assert list(space.examples()) == [("a", 5), ("b", "x"), ("b", "y"), ("c", 2), ("c", 9)]


def test_a_space_is_immutable(load: Load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(VALID).max_epochs = 3


@pytest.mark.parametrize(
    ("overrides", "total"),
    [
        ([], 2),
        (["budget.trials=1"], 1),
        (["budget.trials=9"], 2),
        (["constraints=[batch_size < 100]"], 1),
        (["sampler=tpe", "budget.trials=9"], 9),
        (["sampler=tpe", "budget.time=1h"], None),
    ],
)
def test_the_total_number_of_trials(load: Load, overrides: list[str], total: int | None) -> None:
    space = load(VALID, *overrides)
    assert space.total_trials == total
    if space.is_grid:
        assert len(list(space.planned_points())) == total


@pytest.mark.parametrize(
    ("override", "is_grid", "learns", "stops_early"),
    [
        ("sampler=grid", True, False, False),
        ("sampler=random", False, False, False),
        ("sampler=qmc", False, False, False),
        ("sampler=tpe", False, True, False),
        ("sampler=gp", False, True, False),
        ("sampler=nsga2", False, True, False),
        ("scheduler=asha", True, False, True),
        ("scheduler=hyperband", True, False, True),
        ("scheduler=median", True, False, True),
    ],
)
def test_a_space_knows_what_follows_from_its_sampler_and_scheduler(
    load: Load, override: str, is_grid: bool, learns: bool, stops_early: bool
) -> None:
    space = load(VALID, "budget.trials=5", override)
    assert (space.is_grid, space.learns_from_results, space.stops_trials_early) == (is_grid, learns, stops_early)


def test_a_trainable_receives_the_data_section_and_the_data_folder(load: Load) -> None:
    assert load(VALID, "data.train_samples=100").trainable_data(Path("/data")) == {
        "dataset": "fashion_mnist",
        "train_samples": 100,
        "val_samples": 5000,
        "data_dir": "/data",
    }


# --- finding a file ---------------------------------------------------------------------------------------------------


def test_an_unknown_name_gets_the_nearest_name_or_all_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "search_spaces"
    folder.mkdir()
    for name in ("wide", "deep"):
        (folder / f"{name}.yaml").write_text(VALID)
    with pytest.raises(SettingError, match=r"'wde'.*did you mean wide\?"):
        load_space("wde")
    with pytest.raises(SettingError, match=r"'zzz'.*deep, wide"):
        load_space("zzz")


def test_a_population_is_as_many_trials_as_it_has_members(load: Load) -> None:
    text = "scheduler: {name: pbt, population: 6}\nmax_epochs: 9\nparameters: {lr: {type: float, low: 0, high: 1}}\n"
    space = load(text)
    assert (space.population, space.total_trials, space.sampler.name) == (6, 6, "random")
    assert (space.stops_trials_early, space.saves_epochs) == (True, False)
    assert load(text + "budget: {trials: 6}\n").total_trials == 6
    other = load(text, "scheduler=asha", "budget.trials=4")
    assert (other.population, other.total_trials, other.saves_epochs) == (None, 4, True)
    check_round_trip(space)


def test_an_unknown_name_in_a_folder_without_search_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match=r"'grid'.*there are none in search_spaces/"):
        load_space("grid")


# --- identity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "description=another text",
        "budget.trials=7",
        "budget.time=4h",
        "resources.cpu=2",
        "resources.gpu=0.5",
        "max_failures=0",
        "on_finish=echo done",
        "sampler=random",
    ],
)
def test_the_fingerprint_does_not_depend_on(load: Load, override: str) -> None:
    assert load(VALID, "budget.trials=5", override).fingerprint == load(VALID).fingerprint


@pytest.mark.parametrize(
    "override",
    [
        "parameters.lr=0.02",
        "parameters.batch_size=[64, 128]",
        "parameters.batch_size=64",
        "parameters.momentum=0.9",
        "parameters.batch_size={type: int, low: 64, high: 256}",
        "max_epochs=3",
        "data.dataset=fashion_mnist_sample",
        "data.train_samples=100",
        "data.val_samples=100",
        "metric=val_loss",
        "direction=minimize",
        "objectives=[{metric: val_accuracy, direction: maximize}, {metric: train_seconds, direction: minimize}]",
        "trainable=my_module:train",
        "seed=1",
    ],
)
def test_the_fingerprint_depends_on(load: Load, override: str) -> None:
    assert load(VALID, override).fingerprint != load(VALID).fingerprint


def test_a_population_is_another_search_than_independent_trials(load: Load) -> None:
    """The value of one of its trials is not that of its hyperparameters."""
    sampled = (
        "max_epochs: 9\nsampler: random\nbudget: {trials: 8}\nparameters: {lr: {type: float, low: 0.1, high: 1.0}}\n"
    )
    assert load(sampled, "scheduler=asha").fingerprint == load(sampled).fingerprint
    population = load(sampled, "scheduler=pbt").fingerprint
    assert population != load(sampled).fingerprint
    assert load(sampled, "scheduler={name: pbt, population: 4}", "budget.trials=4").fingerprint == population


def test_the_fingerprint_does_not_depend_on_spelling_and_order(load: Load) -> None:
    other = load("parameters: {lr: 1e-2, batch_size: [64, 0256]}\nmax_epochs: 2\nsampler: grid\n")
    assert other.fingerprint == load(VALID).fingerprint


# Every kind of parameter in version 0.1.0, before conditions, constraints and derived values.
WIDE = """\
sampler: {name: random, seed: 0}
scheduler: {name: asha, grace_period: 2, reduction_factor: 3}
max_epochs: 20
data: {train_samples: 10000}
parameters:
  batch_size: {type: int, low: 16, high: 1024, log: true}
  layers: {type: int, low: 2, high: 8, step: 2}
  lr: {type: float, low: 1e-4, high: 1, log: true}
  momentum: {type: float, low: 0, high: 0.75, step: 0.25}
  optimizer: {type: categorical, choices: [adam, sgd]}
  stem: [imagenet, cifar]
  weight_decay: 0
budget: {trials: 40, time: 4h}
"""


def test_identities_from_version_0_1_0_are_unchanged(load: Load) -> None:
    """With another identity, every existing study would start again."""
    grid = shipped_space("grid")
    assert grid.fingerprint == "475886d446719131"
    keys = ["99058fac81d3300c", "3ec2cfd63f40bab5", "50983ba13ed684c3"]
    assert [grid.config_key(params) for params in grid.grid_points()] == keys
    wide = load(WIDE)
    assert wide.fingerprint == "4768357b85cb7b71"
    params: dict[str, Any] = {"lr": 0.01, "batch_size": 64, "stem": "cifar", "x": None, "y": True}
    assert wide.config_key(params) == "724a0f7eae686d82"


@pytest.mark.parametrize(
    ("override", "changes_fingerprint", "changes_keys"),
    [
        ("parameters.layers.default=4", False, False),
        ("constraints=[]", False, False),
        ("derived={}", False, False),
        ("replicates=1", False, False),
        ("replicates=3", True, True),
        ("sampler=tpe", False, False),
        ("parameters.layers.when={stem: cifar}", True, False),
        ("constraints=[lr < 0.5]", True, False),
        ("derived={twice: 2 * lr}", True, True),
        ("command=python train.py {lr}", True, True),
    ],
)
def test_a_key_that_was_added_later_is_part_of_the_identity_only_where_it_is_used(
    load: Load, override: str, changes_fingerprint: bool, changes_keys: bool
) -> None:
    params = {"lr": 0.01}
    one, other = load(WIDE), load(WIDE, override)
    assert (other.fingerprint != one.fingerprint) == changes_fingerprint
    assert (other.config_key(params) != one.config_key(params)) == changes_keys


PARAMS = {"batch_size": 64, "lr": 0.01}


@pytest.mark.parametrize(
    "override",
    ["max_epochs=3", "parameters.batch_size=[64, 512]", "metric=val_loss", "budget.trials=7", "max_failures=0"],
)
def test_a_config_key_does_not_depend_on(load: Load, override: str) -> None:
    assert load(VALID, override).config_key(PARAMS) == load(VALID).config_key(PARAMS)


@pytest.mark.parametrize(
    "override", ["seed=1", "data.train_samples=100", "data.val_samples=100", "trainable=my_module:train"]
)
def test_a_config_key_depends_on(load: Load, override: str) -> None:
    assert load(VALID, override).config_key(PARAMS) != load(VALID).config_key(PARAMS)


def test_a_config_key_depends_on_the_params_but_not_on_their_order(load: Load) -> None:
    space = load(VALID)
    assert space.config_key({"lr": 0.01, "batch_size": 64}) == space.config_key(PARAMS)
    others: list[dict[str, Any]] = [PARAMS, {**PARAMS, "lr": 0.02}, {"lr": 0.01}, {**PARAMS, "stem": "cifar"}]
    assert len({space.config_key(params) for params in others}) == 4


# --- a stored study becomes a Space again -----------------------------------------------------------------------------

# Settings, fingerprints and keys that the code of version 0.1.0 wrote, before this module had its present form.
STORED: dict[str, Any] = json.loads(Path(__file__).with_name("stored_settings.json").read_text())


def check_round_trip(space: Space) -> None:
    stored = json.loads(json.dumps(space.study_options["settings"]))
    restored = Space.from_settings(stored)
    assert restored.model_dump() == space.model_dump()
    assert restored.fingerprint == space.fingerprint
    assert restored.config_key(PARAMS) == space.config_key(PARAMS)
    assert restored.distributions() == space.distributions()
    assert list(restored.distributions()) == list(space.distributions())
    assert restored.total_trials == space.total_trials


@pytest.mark.parametrize("name", STORED)
def test_settings_from_version_0_1_0_become_a_space_with_the_same_identity(name: str) -> None:
    stored = STORED[name]
    space = Space.from_settings(stored["settings"])
    assert space.fingerprint == stored["fingerprint"]
    assert space.config_key({"lr": 0.01, "batch_size": 64, "a": None, "b": True}) == stored["config_key"]
    assert space.model_dump(mode="json") == with_later_keys(stored["settings"])
    check_round_trip(space)


def test_on_finish_is_neither_stored_nor_shown(load: Load) -> None:
    """A URL may contain a secret."""
    space = load(VALID, "on_finish=https://hooks.example/token")
    assert space.on_finish == "https://hooks.example/token"
    assert "token" not in f"{space.study_options}{space!r}"
    check_round_trip(space)


def test_one_objective_is_the_same_as_metric_and_direction(load: Load) -> None:
    space = load(VALID + "objectives: [{metric: val_loss, direction: minimize}]\n")
    other = load(VALID + "metric: val_loss\ndirection: minimize\n")
    assert space.study_options == other.study_options
    assert (space.objectives, space.metric, space.direction) == (None, "val_loss", "minimize")
    assert [str(each) for each in space.all_objectives] == ["val_loss (minimize)"]


def test_metric_and_direction_are_those_of_the_first_objective(load: Load) -> None:
    space = load(VALID + OBJECTIVES)
    assert (space.metric, space.direction) == ("val_accuracy", "maximize")
    assert [str(each) for each in space.all_objectives] == ["val_accuracy (maximize)", "train_seconds (minimize)"]
    assert space.study_options["direction"] == ("maximize", "minimize")


def test_the_order_of_objectives_is_part_of_the_search(load: Load) -> None:
    """The first one ranks trials among which none dominates."""
    turned = "objectives: [{metric: train_seconds, direction: minimize}, {metric: val_accuracy, direction: maximize}]\n"
    assert load(VALID + turned).fingerprint != load(VALID + OBJECTIVES).fingerprint


def test_objectives_are_restored() -> None:
    objectives = [{"metric": "a", "direction": "minimize"}, {"metric": "b", "direction": "maximize"}]
    space = Space.from_settings(STORED["wide"]["settings"] | {"objectives": objectives})
    assert space.model_dump()["objectives"] == objectives


@pytest.mark.parametrize("text", [VALID, FULL, WIDE], ids=["valid", "full", "wide"])
def test_settings_become_an_equal_space(load: Load, text: str) -> None:
    check_round_trip(load(text))


@pytest.mark.parametrize(
    "key",
    [
        key
        for key, field in fields_by_key(Space).items()
        if not (field.is_required() or field.exclude) and key != "trainable"
    ],
)
def test_a_key_that_the_settings_lack_has_its_default(load: Load, key: str) -> None:
    space = load(VALID)
    assert space.model_dump()[key] == fields_by_key(Space)[key].get_default(call_default_factory=True) or key in {
        "data", "budget", "resources", "sampler", "scheduler", "checkpoints", "continue",
    }  # fmt: skip
    settings = {name: value for name, value in space.study_options["settings"].items() if name != key}
    assert Space.from_settings(settings).model_dump() == space.model_dump()


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("sampler", ["seed", "group", "constant_liar"]),
        ("scheduler", ["reduction_factor"]),
        ("budget", ["gpu_hours", "time", "cost"]),
        ("resources", ["gpu"]),
        ("data", ["train_samples"]),
    ],
)
def test_a_key_of_a_section_that_the_settings_lack_has_its_default(load: Load, section: str, keys: list[str]) -> None:
    space = load(SAMPLED + "  lr: [1, 2]\n")
    settings = space.study_options["settings"]
    for key in keys:
        del settings[section][key]
    assert Space.from_settings(settings).model_dump() == space.model_dump()


def test_a_parameter_without_when_and_default_is_from_an_early_version(load: Load) -> None:
    space = load(WIDE)
    settings = space.study_options["settings"]
    for parameter in settings["parameters"].values():
        parameter.pop("when", None)
        parameter.pop("default", None)
    assert Space.from_settings(settings).fingerprint == space.fingerprint


def test_settings_of_a_newer_version_are_refused_with_the_key(load: Load) -> None:
    settings = load(VALID).study_options["settings"]
    with pytest.raises(SpaceError, match="cannot read the settings of the study: precision: unknown key"):
        Space.from_settings(settings | {"precision": "fp8"})
    with pytest.raises(SpaceError, match=r"parameters\.lr: .*type"):
        Space.from_settings(settings | {"parameters": {"lr": {"type": "complex"}}})
    with pytest.raises(SpaceError, match="'max_epochs' is missing"):
        Space.from_settings({name: value for name, value in settings.items() if name != "max_epochs"})


floats = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8) | floats
choices = st.lists(scalars, min_size=1, max_size=4, unique=True)
ranges = st.builds(
    lambda kind, low, width, log: {"type": kind, "low": low, "high": low + width, "log": log, "default": low},
    st.sampled_from(["int", "float"]),
    st.integers(1, 1000),
    st.integers(0, 1000),
    st.booleans(),
)
conditional = st.builds(
    lambda values, expected, with_default: {
        "choices": values,
        "when": {"first": expected},
        **({"default": values[0]} if with_default else {}),
    },
    choices,
    st.sampled_from([None, "x", [None, "x"]]),
    st.booleans(),
)
parameters = st.dictionaries(st.sampled_from("abcdef"), scalars | choices | ranges | conditional, max_size=6)


@settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    parameters=parameters,
    sampler=st.sampled_from(["random", "tpe", "nsga2"]),
    seconds=st.integers(1, 10**6) | st.floats(0.1, 1e6),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_kind_of_parameter_survives_storage(
    make: Callable[..., Space], parameters: dict[str, Any], sampler: str, seconds: float, seed: int
) -> None:
    check_round_trip(
        make(
            {"first": [None, "x", 3], **parameters},
            sampler=sampler,
            trial_timeout=seconds,
            seed=seed,
            budget={"time": "1h"},
        )
    )


@pytest.mark.parametrize("name", ["lr@2", "lr@", "two\nlines", "not unicode \udcff"])
def test_a_file_whose_name_cannot_be_that_of_a_study_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.yaml"
    path.write_text("sampler: grid\nmax_epochs: 1\nparameters: {lr: 0.1}\n")
    with pytest.raises(SettingError, match=r"rename .*must not contain @"):
        load_space(str(path))
