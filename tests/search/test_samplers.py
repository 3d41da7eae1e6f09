"""Samplers and pruners: whole searches without Ray."""

from __future__ import annotations

import json
import math
import os
import pickle
import sqlite3
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import HyperbandPruner
from optuna.samplers import BaseSampler, CmaEsSampler
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from benchmarks.toy import expected_value
from hpo.report.reading import read_results
from hpo.report.tables import failures
from hpo.search.cmaes_sampler import StoredCmaEsSampler
from hpo.search.samplers import TPE_HISTORY, build_optuna_pruner, build_pruner, build_sampler, history_limit
from hpo.space.model import Space
from storage import optuna_tables
from storage.database import Database, open_database
from storage.errors import StorageError
from storage.history import MIN_LIMIT
from storage.optuna_internals import trial_id
from storage.promotion import PromotingHalving, StoppingHalving
from storage.pruners import Decision, Median, SuccessiveHalving
from storage.studies import find_study, open_study
from storage.study import Study
from tests.factories import ROOT, run_of, search_without_ray, shipped_space, toy_space


@pytest.mark.parametrize("name", ["random", "qmc", "tpe", "gp", "cmaes", "nsga2"])
def test_runs_draw_different_points_and_a_run_is_reproducible(study: Study, tmp_path: Path, name: str) -> None:
    space = toy_space(
        tmp_path,
        sampler={"name": name, "seed": 3},
        budget={"trials": 9},
        parameters={"x": {"type": "float", "low": 0.0, "high": 1.0}},
    )

    def draw(run: int) -> list[float]:
        study.optuna_study.sampler = build_sampler(space, run)
        asked = []
        for _ in range(3):
            trial = study.optuna_study.ask()
            assert not space.draw(trial)
            study.optuna_study.tell(trial, 0.5)
            asked.append(trial.params["x"])
        return asked

    first = draw(1)
    assert not set(first) & set(draw(2))
    with open_database(f"sqlite:///{tmp_path}/same.db") as database:
        study = open_study(database, "toy", direction="maximize", fingerprint="f", settings={"metric": "value"})
        assert draw(1) == first


CMAES_OPTIONS = [{}, {"with_margin": True}]


def _cmaes_space(folder: Path, options: dict[str, Any]) -> Space:
    return toy_space(
        folder,
        sampler={"name": "cmaes", "popsize": 5, **options},
        budget={"trials": 40},
        parameters={"x": {"type": "float", "low": 0.0, "high": 1.0}, "n": {"type": "int", "low": 1, "high": 9}},
    )


def _draw(study: Study, space: Space, count: int, sampler: BaseSampler | None = None) -> list[dict[str, Any]]:
    """Return the params of new trials, as a resumed search draws them, in a process that has read nothing yet."""
    drawn = []
    with open_database(study.database.engine.url.render_as_string(hide_password=False)) as database:
        resumed = find_study(database, study.name)
        assert resumed is not None
        resumed.optuna_study.sampler = sampler or build_sampler(space, 1)
        for _ in range(count):
            trial = resumed.optuna_study.ask()
            space.draw(trial)
            resumed.optuna_study.tell(trial, trial.params["x"] + trial.params["n"])
            drawn.append(trial.params)
    return drawn


def _newest_state(study: Study) -> tuple[int, dict[str, str]]:
    """Return the id of the last trial that holds a state of cmaes, and the attributes that hold it."""
    held = {
        trial_id(trial): {key: value for key, value in trial.system_attrs.items() if ":state" in key}
        for trial in study.trials()
    }
    return [(holder, parts) for holder, parts in held.items() if parts][-1]


def _replace_attributes(study: Study, holder: int, old: Iterable[str], new: dict[str, Any]) -> None:
    values = optuna_tables.trial_system_attributes
    rows = [{"trial_id": holder, "key": key, "value_json": json.dumps(value)} for key, value in new.items()]
    with study.database.engine.begin() as connection:
        connection.execute(values.delete().where(values.c.trial_id == holder, values.c.key.in_(list(old))))
        connection.execute(values.insert(), rows)


@pytest.mark.parametrize("options", CMAES_OPTIONS)
def test_cmaes_draws_what_optunas_sampler_draws_also_after_a_resume(tmp_path: Path, options: dict[str, Any]) -> None:
    space = _cmaes_space(tmp_path, options)
    seed = (space.seed * 1_000_003 + 1) % 2**32

    def draw(name: str, counts: list[int], sampler: Callable[[], BaseSampler] | None) -> list[dict[str, Any]]:
        with open_database(f"sqlite:///{tmp_path}/{name}.db") as database:
            study = open_study(database, "toy", direction="minimize", fingerprint="f", settings={"metric": "value"})
            return [each for n in counts for each in _draw(study, space, n, None if sampler is None else sampler())]

    def of_optuna() -> BaseSampler:
        return CmaEsSampler(seed=seed, warn_independent_sampling=False, popsize=5, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        assert draw("ours", [14], None) == draw("optuna", [14], of_optuna)
        assert draw("ours-resumed", [7, 7], None) == draw("optuna-resumed", [7, 7], of_optuna)


class _Attack:
    """A pickle of it runs a command when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("options", CMAES_OPTIONS)
def test_cmaes_loads_no_pickle_of_the_database_and_goes_on_without_it(
    study: Study, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Neither one instead of its state, nor the one that an earlier version has stored."""
    space = _cmaes_space(tmp_path, options)
    _draw(study, space, 12)
    holder, parts = _newest_state(study)
    assert json.loads("".join(parts.values()))["generation"] > 1, "the state is JSON"
    pickled = pickle.dumps(_Attack(tmp_path / "ran")).hex()
    prefix = next(iter(parts)).partition(":")[0]
    _replace_attributes(study, holder, parts, {f"{prefix}:state:0": pickled, f"{prefix}:optimizer:0": pickled})
    _draw(study, space, 8)
    assert not (tmp_path / "ran").exists()
    newest, parts = _newest_state(study)
    assert newest != holder
    assert json.loads("".join(parts.values()))["generation"] > 1, "it has learned from the stored results"


STRANGE_STATES: dict[str, Any] = {
    "generation": [0, -1, 2**31, 10**400, 1.5, True, "1", None],
    "sigma": [0.0, -1.0, 1e-300, 1e300, [1.0], "1", None, math.inf],
    "mean": [[0.5], [0.5, 0.5, 0.5], [[0.5, 0.5]], [0.5, math.nan], [0.5, 1e300], [0.5, 10**400], "xy", {}, [0.5, "x"]],
    "p_sigma": [[0.5], [0.5, math.inf]],
    "pc": [None, [0.5, [0.5]]],
    "C": [[0.0, 0.0, 0.0], [1.0, 2.0, 1.0], [1.0, 0.0], [1e300, 0.0, 1e300], [[1.0, 0.0], [0.0, 1.0]]],
    "A": [[0.0, 1.0], [1.0], [-1.0, 1.0]],
}


def test_cmaes_starts_anew_where_its_stored_state_cannot_be_one(study: Study, tmp_path: Path) -> None:
    space = _cmaes_space(tmp_path, {"with_margin": True})
    _draw(study, space, 8)
    holder, parts = _newest_state(study)
    good = json.loads("".join(parts.values()))
    sampler = build_sampler(space, 1)
    assert isinstance(sampler, StoredCmaEsSampler)
    search_space = sampler.infer_relative_search_space(study.optuna_study, study.trials()[0])
    transform = _SearchSpaceTransform(search_space, transform_step=False, transform_0_1=True)

    def restore(text: str) -> Any:
        _replace_attributes(study, holder, parts, {"cmawm:state:0": text})
        sampler._restore_optimizer(study.trials())
        return sampler._init_optimizer(transform, StudyDirection.MINIMIZE)

    assert restore(json.dumps(good)).generation == good["generation"]
    strange = [json.dumps(good | {name: value}) for name, values in STRANGE_STATES.items() for value in values]
    for text in [*strange, "", "[]", "null", "[" * 100_000, "1" * 10_000, json.dumps({"generation": 1})]:
        assert restore(text).generation == 0, text[:200]
    extreme = {
        "sigma": 1e31,
        "mean": [1e31, -1e31],
        "C": [1e-31, 0.0, 1e31],
        "A": [1e-31, 1e31],
        "generation": 2**31 - 1,
    }
    for name, value in extreme.items():
        optimizer = restore(json.dumps(good | {name: value}))
        assert optimizer.generation == (value if name == "generation" else good["generation"]), "it can be a state"
        with np.errstate(all="ignore"):
            optimizer.tell([(np.array([0.1 * i, 0.2 * i]), float(i)) for i in range(5)])
            assert np.all(np.isfinite(optimizer.ask())), f"{name}: it draws points"


@pytest.mark.parametrize(
    ("sampler", "scheduler", "taken_over", "startup"),
    [
        ("tpe", "none", 0, 10),
        ("tpe", "asha", 9, 14),
        ("tpe", "none", 10_000, TPE_HISTORY),
        ("tpe", "hyperband", 9, 10),
        ({"name": "tpe", "n_startup_trials": 3}, "none", 9, 3),
    ],
)
def test_tpe_draws_some_trials_at_random_in_addition_to_those_of_earlier_searches(
    tmp_path: Path, sampler: object, scheduler: str, taken_over: int, startup: int
) -> None:
    space = toy_space(tmp_path, sampler=sampler, scheduler=scheduler, budget={"trials": 9}, max_epochs=9)
    assert build_sampler(space, 1, taken_over=taken_over)._n_startup_trials == startup  # type: ignore[attr-defined]


def test_cmaes_learns_nothing_from_a_point_that_is_none(study: Study, tmp_path: Path) -> None:
    space = _cmaes_space(tmp_path, {"with_margin": True})
    _draw(study, space, 6)
    strange = [[0.5], "xy", None, [0.5, math.nan], [[0.5, 0.5]]]
    holders = [trial_id(trial) for trial in study.trials() if "x_for_tell" in trial.system_attrs]
    for holder, value in zip(holders, strange, strict=True):
        _replace_attributes(study, holder, ["x_for_tell"], {"x_for_tell": value})
    assert len(_draw(study, space, 2)) == 2


@pytest.mark.parametrize(
    ("sampler", "limit"),
    [
        ("tpe", TPE_HISTORY),
        ({"name": "tpe", "n_startup_trials": TPE_HISTORY + 7}, TPE_HISTORY + 7),
        ("cmaes", None),
        ("gp", None),
        ("nsga2", None),
        ("random", None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_only_tpe_sees_a_part_of_a_large_study_and_always_enough_to_start(
    tmp_path: Path, sampler: Any, limit: int | None
) -> None:
    parameters = {"x": {"type": "float", "low": 0.0, "high": 1.0}}
    assert history_limit(toy_space(tmp_path, sampler=sampler, budget={"trials": 9}, parameters=parameters)) == limit
    assert limit is None or limit >= MIN_LIMIT


@pytest.mark.parametrize("qmc_type", ["sobol", "halton"])
def test_qmc_covers_the_space_evenly_from_the_first_trial_of_a_search(tmp_path: Path, qmc_type: str) -> None:
    """Each eighth of the range gets one of the first eight points. Random points do so with a probability of 0.0024."""
    for seed in range(3):
        space = toy_space(
            tmp_path,
            sampler={"name": "qmc", "qmc_type": qmc_type, "seed": seed},
            budget={"trials": 8},
            parameters={"x": {"type": "float", "low": 0.0, "high": 1.0}},
        )
        with open_database(f"sqlite:///{tmp_path}/{seed}.db") as database:
            study, _ = search_without_ray(space, database, tmp_path)
            assert {int(8 * trial.params["x"]) for trial in study.trials()} == set(range(8))


CONDITIONAL = {
    "x": {"type": "float", "low": 0.0, "high": 1.0},
    "kind": ["a", "b"],
    "m": {"type": "int", "low": 1, "high": 100, "log": True, "when": {"kind": "a"}},
    "fixed": 0.5,
}
MIXED = {name: CONDITIONAL[name] for name in ("x", "kind", "fixed")} | {"n": {"type": "int", "low": 1, "high": 9}}


@pytest.mark.parametrize(
    ("sampler", "parameters"),
    [
        ({"name": "random", "seed": 1}, CONDITIONAL),
        ({"name": "tpe", "n_startup_trials": 4, "n_ei_candidates": 8}, CONDITIONAL),
        ({"name": "tpe", "n_startup_trials": 4, "multivariate": False, "constant_liar": False}, CONDITIONAL),
        ({"name": "nsga2", "population_size": 5, "mutation_prob": 0.5}, CONDITIONAL),
        ({"name": "qmc", "qmc_type": "halton"}, MIXED),
        ("qmc", MIXED),
        pytest.param(
            {"name": "gp", "n_startup_trials": 4, "deterministic_objective": True}, MIXED, marks=pytest.mark.slow
        ),
        ({"name": "cmaes", "popsize": 5, "with_margin": True}, MIXED),
        ({"name": "cmaes", "consider_pruned_trials": True}, {"x": CONDITIONAL["x"]}),
        ("grid", {"x": [0.5, 0.25, 0.75, 1.0], "kind": ["a", "b"], "m": {"choices": [1, 2, 3], "when": {"kind": "a"}}}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_every_sampler_draws_only_what_the_space_allows(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], sampler: Any, parameters: Any
) -> None:
    """Conditions, constraints and derived values hold in every trial, both in storage and in what the trainable gets."""
    is_grid = sampler == "grid"
    space = toy_space(
        tmp_path,
        sampler=sampler,
        max_epochs=1,
        budget={} if is_grid else {"trials": 12},
        parameters=parameters,
        constraints=["x > 0.2", "x != m - 1.5"] if "m" in parameters else ["x > 0.2"],
        derived={"epoch_seconds": "0 * x", "twice": "2 * m"} if "m" in parameters else {"epoch_seconds": "0 * x"},
    )
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        study, listener = search_without_ray(space, database, tmp_path, at_a_time=2)
        trials = study.trained_trials()
        assert [trial.state.name for trial in trials] == ["COMPLETE"] * (4 * (3 + 1) - 1 if is_grid else 12)
        for trial in trials:
            params = trial.params
            active = {name for name in parameters if name != "m" or params["kind"] == "a"}
            assert set(params) == active
            assert params["x"] > 0.2
            derived = {"epoch_seconds": 0.0} | ({"twice": 2 * params["m"]} if "m" in params else {})
            assert trial.user_attrs["derived"] == derived
            assert trial.value == expected_value(params, 0, 1)
        assert len(study.trials()) == len(trials) or not is_grid, "a grid draws nothing that it does not run"
        assert not [event for event in listener.events if event[0] == "FAIL"]
        assert failures(read_results(study)) == []
    captured = capfd.readouterr()
    assert captured.out + captured.err == "", "Optuna prints no warning"


def count_refused(folder: Path, sampler: dict[str, Any], trials: int) -> int:
    """Return how many draws break a constraint until so many more trials have completed; the first 10 do not count.

    The best value without the constraints is where they refuse it, and `one` has one value.
    """
    names = ("x", "y", "n")
    space = toy_space(
        folder,
        sampler=sampler,
        budget={"trials": 100},
        parameters={
            "x": {"type": "float", "low": 0.0, "high": 1.0},
            "y": {"type": "float", "low": 1e-3, "high": 1.0, "log": True},
            "n": {"type": "int", "low": 0, "high": 9},
            "one": 1,
        },
        constraints=["x + y <= 0.5 * one", "n < 6 * one"],
    )
    study, refused, completed = optuna.create_study(direction="maximize", sampler=build_sampler(space, 1)), 0, 0
    while completed < 10 + trials:
        trial = study.ask()
        if space.draw(trial):
            refused += completed >= 10
            study.tell(trial, state=TrialState.FAIL)
            assert refused < 500
        else:
            study.tell(trial, sum(trial.params[name] for name in names))
            completed += 1
    return refused


def test_gp_draws_nothing_that_breaks_a_constraint(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert count_refused(tmp_path, {"name": "gp"}, trials=5) == 0
    assert not [each for each in recwarn if each.category is RuntimeWarning]


def test_nsga2_draws_less_that_breaks_a_constraint_than_random(tmp_path: Path) -> None:
    random = count_refused(tmp_path, {"name": "random"}, trials=40)
    assert count_refused(tmp_path, {"name": "nsga2", "population_size": 10}, trials=40) < random / 2


@pytest.mark.parametrize("name", ["tpe", "cmaes", "nsga2"])
def test_a_sampler_that_cannot_read_a_trial_says_so(tmp_path: Path, name: str) -> None:
    parameters = {"x": {"type": "float", "low": 0.0, "high": 1.0}}
    space = toy_space(tmp_path, sampler=name, budget={"trials": 3}, parameters=parameters)
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        search_without_ray(space, database, tmp_path)
        with database.engine.begin() as connection:
            connection.execute(optuna_tables.trial_params.update().values(distribution_json="[]"))
        space = toy_space(tmp_path, sampler=name, budget={"trials": 4}, parameters=parameters)
        study = open_study(database, **space.study_options)
        with run_of(study, space) as run:
            study.optuna_study.sampler = build_sampler(space, run.run_id)
            with pytest.raises(StorageError, match=r"holds what hpo does not write \(TypeError: list"):
                run.claim()


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_every_scheduler_stores_exact_states_and_every_value(tmp_path: Path, name: str) -> None:
    space = toy_space(
        tmp_path,
        sampler={"name": "random", "seed": 5},
        scheduler={"name": name, "grace_period": 2},
        max_epochs=9,
        budget={"trials": 20},
        parameters={"x": {"type": "float", "low": 0.0, "high": 1.0}},
    )
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        study, listener = search_without_ray(space, database, tmp_path, at_a_time=3)
        metrics = study.metrics()
        states = {trial.number: trial.state.name for trial in study.trials()}
        assert set(states.values()) == {"COMPLETE", "PRUNED"}
        for trial in study.trials():
            values = {epoch: expected_value(trial.params, 0, epoch) for epoch in range(1, 10)}
            last = max(trial.intermediate_values)
            assert trial.intermediate_values == {epoch: values[epoch] for epoch in range(1, last + 1)}
            assert {
                epoch: stored["value"] for epoch, stored in metrics[trial.number].items()
            } == trial.intermediate_values
            assert last == 9 if trial.state.name == "COMPLETE" else 2 <= last < 9
            assert trial.value == values[last]
        reported = {number: state for state, number, *_ in listener.events if state in {"COMPLETE", "PRUNED"}}
        assert reported == states


def test_search_ends_when_every_configuration_was_tried(tmp_path: Path) -> None:
    space = toy_space(
        tmp_path, sampler="random", budget={"trials": 9}, parameters={"x": [1, 2, 3]}, constraints=["x != 2"]
    )
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        study, listener = search_without_ray(space, database, tmp_path)
        assert sorted(trial.params["x"] for trial in study.trained_trials()) == [1, 3]
        assert [event[1] for event in listener.events if event[0] == "note"] == [
            "no new trials: all 2 configurations of the space have a trial"
        ]


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp"])
def test_a_budget_near_the_number_of_configurations_is_used_up(tmp_path: Path, sampler: str) -> None:
    parameters = {"x": list(range(6)), "y": {"type": "int", "low": 1, "high": 5}}
    space = toy_space(
        tmp_path, sampler=sampler, budget={"trials": 27}, parameters=parameters, constraints=["x != 2 or y > 2"]
    )
    assert len(space.list_points(100) or []) == 28
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        study, _ = search_without_ray(space, database, tmp_path)
        found = {(trial.params["x"], trial.params["y"]) for trial in study.trained_trials()}
        assert len(found) == len(study.trained_trials()) == 27


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "search_spaces").glob("*.yaml")))
def test_every_shipped_space_runs(tmp_path: Path, name: str) -> None:
    short = ["data.dataset=fashion_mnist_sample", "data.train_samples=64", "data.val_samples=20", "max_epochs=2"]
    space = shipped_space(name)
    if "width" not in space.parameters:
        short.append("parameters.width=0.25")
    if space.stops_trials_early:
        short.append("scheduler.grace_period=1")
    if not space.is_grid:
        short.append("budget.trials=3")
    space = shipped_space(name, *short)
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        study, _ = search_without_ray(space, database, tmp_path)
        trials = study.trained_trials()
        assert len(trials) == 3
        assert "COMPLETE" in {trial.state.name for trial in trials} <= {"COMPLETE", "PRUNED"}
        assert all(0 <= value <= 1 for trial in trials for value in trial.intermediate_values.values())


def test_pruners_use_the_options_of_the_scheduler(tmp_path: Path, database: Database) -> None:
    study = open_study(database, **toy_space(tmp_path).study_options)

    def pruner_of(scheduler: dict[str, Any]) -> Any:
        return build_pruner(toy_space(tmp_path, scheduler=scheduler, max_epochs=27), study)

    asha = pruner_of({"name": "asha", "grace_period": 2, "reduction_factor": 4})
    assert asha == StoppingHalving(True, "toy", 2, 4)
    hyperband = pruner_of({"name": "hyperband", "grace_period": 1, "reduction_factor": 3})
    assert hyperband == StoppingHalving(True, "toy", 1, 3, brackets=4)
    promoting = pruner_of({"name": "asha", "grace_period": 2, "reduction_factor": 4, "mode": "promote"})
    assert promoting == PromotingHalving(True, "toy", 2, 4)
    brackets = pruner_of({"name": "hyperband", "grace_period": 1, "mode": "promote"})
    assert brackets == PromotingHalving(True, "toy", 1, 3, brackets=4)
    assert pruner_of({"name": "median", "grace_period": 5}) == Median(True, 5)
    assert pruner_of({"name": "none"}) is None
    script: dict[str, Any] = {"command": "python train.py {x}", "scheduler": {"name": "asha", "grace_period": 2}}
    without_checkpoints = build_pruner(toy_space(tmp_path, trainable=None, **script), study)
    assert without_checkpoints == SuccessiveHalving(True, "toy", 2, 3), "its trials cannot train on, so none waits"


@pytest.mark.parametrize(
    ("max_epochs", "reduction_factor", "expected"),
    [(2, 3, 1), (6, 3, 1), (9, 3, 1), (10, 3, 2), (27, 3, 3), (28, 3, 4), (50, 3, 6), (50, 4, 4)],
)
def test_by_default_trials_are_compared_twice(
    tmp_path: Path, database: Database, max_epochs: int, reduction_factor: int, expected: int
) -> None:
    scheduler = {"name": "asha", "reduction_factor": reduction_factor}
    space = toy_space(tmp_path, scheduler=scheduler, max_epochs=max_epochs)
    pruner = build_pruner(space, open_study(database, **space.study_options))
    assert pruner == StoppingHalving(True, "toy", expected, reduction_factor)
    assert Space.from_settings(space.study_options["settings"]).scheduler == space.scheduler


def test_a_database_that_goes_away_does_not_end_a_search_by_hyperband(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reads = []
    read = database.optuna_storage.get_study_id_from_name

    def fails_once(name: str) -> int:
        reads.append(name)
        if len(reads) == 1:
            raise StorageInternalError from OperationalError(
                "SELECT", {}, sqlite3.OperationalError("database is locked")
            )
        return read(name)

    monkeypatch.setattr(database.optuna_storage, "get_study_id_from_name", fails_once)
    assert isinstance(build_optuna_pruner(toy_space(tmp_path, scheduler="hyperband"), study), HyperbandPruner)
    assert len(reads) > 1


def test_resumed_search_prunes_like_an_uninterrupted_one(study: Study, tmp_path: Path) -> None:
    """Decisions come from storage: twelve runs of one trial each decide like one run of twelve trials."""
    space = toy_space(
        tmp_path,
        scheduler={"name": "asha", "grace_period": 1, "reduction_factor": 2},
        max_epochs=8,
        parameters={"x": list(range(1, 13))},
    )

    def decide(study: Study, runs: int) -> dict[int, tuple[str, int]]:
        left = 12
        for _ in range(runs):
            with run_of(study, space) as run:
                run.enqueue(space.grid_points(), {"x": CategoricalDistribution(list(range(1, 13)))})
                for _ in range(12 // runs):
                    claim = run.claim()
                    assert claim is not None
                    for epoch in range(1, 9):
                        value = expected_value(claim.params, 0, epoch)
                        if epoch == 8:
                            run.report(claim, epoch, {"value": value}, value)
                            run.complete(claim, value)
                        elif run.decide(claim, epoch, {"value": value}, value) is Decision.END:
                            break
                    left -= 1
        assert left == 0
        return {trial.number: (trial.state.name, trial.last_step) for trial in study.trials()}  # type: ignore[misc]

    with open_database(f"sqlite:///{tmp_path}/other.db") as database:
        other = open_study(database, "toy", direction="maximize", fingerprint="f", settings={"metric": "value"})
        decisions = decide(study, 1)
        assert decide(other, 12) == decisions
    assert {state for state, _ in decisions.values()} == {"COMPLETE", "PRUNED"}
