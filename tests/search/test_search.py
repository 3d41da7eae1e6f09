"""The bridge between Tune and storage, and the worker's side of a trial, without a cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution
from tests.driving import Notes, drive

from benchmarks.toy import expected_value
from hpo.report import failures
from hpo.report.results import read_results
from hpo.search import TrialCoordinator, build_pruner, build_sampler
from hpo.search.estimate import Slots
from hpo.search.worker import TrialReport, TrialSpec, run_trial
from hpo.space.model import Space, load_space
from storage.database import StorageError, open_database
from storage.run import Run
from storage.studies import Study, open_study

ROOT = Path(__file__).parent.parent


def space_of(folder: Path, **changes: Any) -> Space:
    path = folder / "toy.yaml"
    default = {
        "sampler": "grid",
        "trainable": "benchmarks.toy:chain",
        "metric": "value",
        "max_epochs": 3,
        "parameters": {"x": [1, 2]},
    }
    path.write_text(json.dumps(default | changes))
    return load_space(str(path))


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        yield open_study(database, "toy", direction="maximize", fingerprint="f", settings={"metric": "value"})


def run_of(study: Study, space: Space) -> Run:
    return Run(study, config_key=space.config_key, provenance={})


def bridge_of(space: Space, run: Run, folder: Path, view: Notes) -> TrialCoordinator:
    run.enqueue(space.grid_points(), space.distributions())
    return TrialCoordinator(
        space, run, Slots(1, 1.0, 0.0), data_dir=folder, checkpoints=folder / "checkpoints", view=view
    )


def states(study: Study) -> list[str]:
    return [trial.state.name for trial in study.trials()]


# --- the worker's side


def assignment_of(folder: Path, **changes: Any) -> TrialSpec:
    defaults = {
        "trainable": "benchmarks.toy:chain",
        "command": None,
        "params": {"x": 1},
        "data": {},
        "seed": 0,
        "max_epochs": 4,
        "stored_epoch": 0,
        "folder": str(folder / "trial"),
        "checkpoint_every": 1,
        "device": "cpu",
        "threads": 1,
        "timeout": None,
    }
    return TrialSpec(**(defaults | changes))


def take(assignment: TrialSpec, count: int) -> list[TrialReport]:
    messages = run_trial(assignment)
    return [next(messages) for _ in range(count)]


def test_a_trial_reports_each_epoch_once_with_its_provenance_first(tmp_path: Path) -> None:
    messages = take(assignment_of(tmp_path), 4)
    assert [message.epoch for message in messages] == [1, 2, 3, 4]
    assert [message.metrics["value"] for message in messages] == [expected_value({"x": 1}, 0, e) for e in (1, 2, 3, 4)]
    assert all(message.metrics["epoch_seconds"] >= 0 for message in messages)
    assert [message.provenance is not None for message in messages] == [True, False, False, False]


def test_a_trial_goes_on_from_its_checkpoint_with_the_same_numbers(tmp_path: Path) -> None:
    take(assignment_of(tmp_path), 2)
    rest = take(assignment_of(tmp_path, stored_epoch=2), 3)
    assert [(message.epoch, message.recalled) for message in rest] == [(2, True), (3, False), (4, False)]
    assert [message.metrics["value"] for message in rest] == [expected_value({"x": 1}, 0, e) for e in (2, 3, 4)]


def test_epochs_that_storage_never_heard_of_are_told_from_the_checkpoint(tmp_path: Path) -> None:
    take(assignment_of(tmp_path), 3)  # the driver died before it stored epochs 2 and 3
    rest = take(assignment_of(tmp_path, stored_epoch=1), 4)
    assert [(message.epoch, message.recalled) for message in rest] == [(1, True), (2, True), (3, True), (4, False)]


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_computes_again(tmp_path: Path) -> None:
    take(assignment_of(tmp_path), 3)
    newest = max((tmp_path / "trial").glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:50])
    rest = take(assignment_of(tmp_path, stored_epoch=3), 2)
    assert [(message.epoch, message.recalled) for message in rest] == [(3, False), (4, False)]
    assert rest[-1].metrics["value"] == expected_value({"x": 1}, 0, 4)


def test_a_checkpoint_that_cannot_be_written_is_a_warning_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "trial").touch()  # a file where the folder should be
    messages = take(assignment_of(tmp_path), 4)
    assert [message.epoch for message in messages] == [1, 2, 3, 4]
    assert all("no checkpoint after epoch" in message.warning for message in messages)


def test_checkpoints_are_written_as_often_as_the_space_says_and_at_the_end(tmp_path: Path) -> None:
    written = []
    for message in run_trial(assignment_of(tmp_path, checkpoint_every=3, max_epochs=4)):
        if message.failure:
            break
        written.append(sorted(path.name for path in (tmp_path / "trial").glob("*.pt")))
    assert [len(names) for names in written] == [0, 0, 1, 2]


# --- what a message means


def test_the_last_epoch_stored_but_not_acted_on_still_completes_the_trial(study: Study, tmp_path: Path) -> None:
    space, view = space_of(tmp_path), Notes()
    with run_of(study, space) as run:
        bridge = bridge_of(space, run, tmp_path, view)
        assignment = bridge.next_trial("a")
        assert assignment is not None
        for message in take(assignment, 2):
            assert not bridge.on_report("a", message)
        claim = bridge._claims["a"]
        last = take(assignment, 3)[-1]
        run.report(claim, 3, last.metrics, last.metrics["value"])  # kill -9 here
        run.release(claim)
    with run_of(study, space) as run:
        bridge = bridge_of(space, run, tmp_path, view)
        assignment = bridge.next_trial("b")
        assert assignment is not None
        assert assignment.stored_epoch == 3
        assert bridge.on_report("b", take(assignment, 1)[0])
    assert states(study) == ["COMPLETE"]
    assert study.trials()[0].value == expected_value({"x": 1}, 0, 3)


def test_a_stop_gives_the_trial_back_after_its_epoch_and_asks_for_no_more(study: Study, tmp_path: Path) -> None:
    space, view = space_of(tmp_path), Notes()
    with run_of(study, space) as run:
        bridge = bridge_of(space, run, tmp_path, view)
        assignment = bridge.next_trial("a")
        assert assignment is not None
        bridge.stop("interrupted")
        assert bridge.on_report("a", take(assignment, 1)[0])
        assert bridge.next_trial("b") is None
        assert bridge.is_done
    assert states(study) == ["WAITING"]
    assert study.trials()[0].intermediate_values == {1: expected_value({"x": 1}, 0, 1)}


def test_the_end_of_the_time_budget_gives_trials_back(study: Study, tmp_path: Path) -> None:
    space, view = space_of(tmp_path), Notes()
    with run_of(study, space) as run:
        bridge = bridge_of(space, run, tmp_path, view)
        assignment = bridge.next_trial("a")
        assert assignment is not None
        bridge.set_deadline(0.0)
        assert bridge.on_report("a", take(assignment, 1)[0])
    assert bridge.stopping == "the time budget is spent"
    assert states(study) == ["WAITING"]


def test_a_trial_that_another_run_took_is_dropped_without_a_word_to_storage(study: Study, tmp_path: Path) -> None:
    space, view = space_of(tmp_path), Notes()
    with run_of(study, space) as run, run_of(study, space) as thief:
        bridge = bridge_of(space, run, tmp_path, view)
        assignment = bridge.next_trial("a")
        assert assignment is not None
        run._give_back(bridge._claims["a"].trial, run.run_id)
        taken = thief.claim()
        assert taken is not None
        assert taken.number == 0
        first, second = take(assignment, 2)
        assert not bridge.on_report("a", first), "not known yet"
        run.flush()
        assert bridge.on_report("a", second)
        assert bridge.error is None
        assert states(study)[0] == "RUNNING"
        assert not study.trials()[0].intermediate_values
        assert ("note", "trial 0 was taken over by another run") in view.told


def test_a_storage_that_fails_ends_the_run_in_order(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, view = space_of(tmp_path), Notes()

    def fail(*_: object) -> None:
        raise StorageError("the disk is full")

    with run_of(study, space) as run:
        bridge = bridge_of(space, run, tmp_path, view)
        assignment = bridge.next_trial("a")
        assert assignment is not None
        monkeypatch.setattr(run, "report", fail)
        assert bridge.on_report("a", take(assignment, 1)[0]), "Tune hears that the trial is over, not of an error"
        assert isinstance(bridge.error, StorageError)
        assert bridge.is_done


# --- samplers, pruners


@pytest.mark.parametrize("name", ["random", "qmc", "tpe", "gp", "cmaes", "nsga2"])
def test_two_runs_draw_different_points_and_the_same_run_the_same(study: Study, tmp_path: Path, name: str) -> None:
    space = space_of(
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
        ({"name": "gp", "n_startup_trials": 4, "deterministic_objective": True}, MIXED),
        ({"name": "cmaes", "popsize": 5, "with_margin": True}, MIXED),
        ({"name": "cmaes", "consider_pruned_trials": True}, {"x": CONDITIONAL["x"]}),
        ("grid", {"x": [0.5, 0.25, 0.75, 1.0], "kind": ["a", "b"], "m": {"choices": [1, 2, 3], "when": {"kind": "a"}}}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_every_sampler_draws_what_the_space_allows_and_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], sampler: Any, parameters: Any
) -> None:
    """Conditions, constraints and derived values hold in every trial, as storage tells it and as the trainable sees it."""
    is_grid = sampler == "grid"
    space = space_of(
        tmp_path,
        sampler=sampler,
        max_epochs=1,
        budget={} if is_grid else {"trials": 12},
        parameters=parameters,
        constraints=["x > 0.2", "x != m - 1.5"] if "m" in parameters else ["x > 0.2"],
        derived={"epoch_seconds": "0 * x", "twice": "2 * m"} if "m" in parameters else {"epoch_seconds": "0 * x"},
    )
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        study, view = drive(space, database, tmp_path, side_by_side=2)
        trials = study.run_trials()
        assert [trial.state.name for trial in trials] == ["COMPLETE"] * (4 * (3 + 1) - 1 if is_grid else 12)
        for trial in trials:
            params = trial.params
            active = {name for name in parameters if name != "m" or params["kind"] == "a"}
            assert set(params) == active
            assert params["x"] > 0.2
            derived = {"epoch_seconds": 0.0} | ({"twice": 2 * params["m"]} if "m" in params else {})
            assert trial.user_attrs["derived"] == derived
            assert trial.value == expected_value(params, 0, 1)
        assert len(study.trials()) == len(trials) or not is_grid, "of a grid nothing is drawn in vain"
        assert not [told for told in view.told if told[0] == "FAIL"]
        assert failures(read_results(study)) == []
    captured = capfd.readouterr()
    assert captured.out + captured.err == "", "Optuna has nothing to warn of"


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_every_scheduler_leaves_exact_states_and_every_value(tmp_path: Path, name: str) -> None:
    space = space_of(
        tmp_path,
        sampler={"name": "random", "seed": 5},
        scheduler={"name": name, "grace_period": 2},
        max_epochs=9,
        budget={"trials": 20},
        parameters={"x": {"type": "float", "low": 0.0, "high": 1.0}},
    )
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        study, view = drive(space, database, tmp_path, side_by_side=3)
        metrics = study.metrics()
        states = {trial.number: trial.state.name for trial in study.trials()}
        assert set(states.values()) == {"COMPLETE", "PRUNED"}
        for trial in study.trials():
            values = {epoch: expected_value(trial.params, 0, epoch) for epoch in range(1, 10)}
            last = max(trial.intermediate_values)
            assert trial.intermediate_values == {epoch: values[epoch] for epoch in range(1, last + 1)}
            assert {epoch: told["value"] for epoch, told in metrics[trial.number].items()} == trial.intermediate_values
            assert last == 9 if trial.state.name == "COMPLETE" else 2 <= last < 9
            assert trial.value == values[last]
        told = {number: state for state, number, *_ in view.told if state in {"COMPLETE", "PRUNED"}}
        assert told == states


def test_a_space_without_a_configuration_left_says_so_and_ends(tmp_path: Path) -> None:
    space = space_of(
        tmp_path, sampler="random", budget={"trials": 9}, parameters={"x": [1, 2, 3]}, constraints=["x != 2"]
    )
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        study, view = drive(space, database, tmp_path)
        assert sorted(trial.params["x"] for trial in study.run_trials()) == [1, 3]
        assert [told[1] for told in view.told if told[0] == "note"] == [
            "no new trials: 20 draws in a row were all tried before"
        ]


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "search_spaces").glob("*.yaml")))
def test_every_space_that_ships_runs_in_short(tmp_path: Path, name: str) -> None:
    short = ["data.dataset=fashion_mnist_sample", "data.train_samples=128", "data.val_samples=50", "max_epochs=2"]
    space = load_space(str(ROOT / f"search_spaces/{name}.yaml"))
    if space.scheduler.name != "none":
        short.append("scheduler.grace_period=1")
    if space.sampler.name != "grid":
        short.append("budget.trials=3")
    space = load_space(str(ROOT / f"search_spaces/{name}.yaml"), short)
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        study, _ = drive(space, database, tmp_path)
        trials = study.run_trials()
        assert len(trials) == 3
        assert "COMPLETE" in {trial.state.name for trial in trials} <= {"COMPLETE", "PRUNED"}
        assert all(0 <= value <= 1 for trial in trials for value in trial.intermediate_values.values())


def test_pruners_take_the_schedulers_numbers(tmp_path: Path) -> None:
    def pruner_of(scheduler: dict[str, Any]) -> Any:
        return build_pruner(space_of(tmp_path, scheduler=scheduler, max_epochs=27))

    asha = pruner_of({"name": "asha", "grace_period": 2, "reduction_factor": 4})
    assert (asha._min_resource, asha._reduction_factor) == (2, 4)
    hyperband = pruner_of({"name": "hyperband", "grace_period": 1, "reduction_factor": 3})
    assert (hyperband._min_resource, hyperband._max_resource, hyperband._reduction_factor) == (1, 27, 3)
    assert type(pruner_of({"name": "none"})).__name__ == "NopPruner"


def test_a_resumed_search_prunes_as_one_that_was_never_stopped(study: Study, tmp_path: Path) -> None:
    """Decisions come from what storage holds: a run that is new for every trial decides like a single one."""
    space = space_of(
        tmp_path,
        scheduler={"name": "asha", "grace_period": 1, "reduction_factor": 2},
        max_epochs=8,
        parameters={"x": list(range(1, 13))},
    )

    def decide(study: Study, runs: int) -> dict[int, tuple[str, int]]:
        study.optuna_study.pruner = build_pruner(space)
        left = 12
        for _ in range(runs):
            with run_of(study, space) as run:
                run.enqueue(space.grid_points(), {"x": CategoricalDistribution(list(range(1, 13)))})
                for _ in range(12 // runs):
                    claim = run.claim()
                    assert claim is not None
                    for epoch in range(1, 9):
                        value = expected_value(claim.params, 0, epoch)
                        run.report(claim, epoch, {"value": value}, value)
                        if epoch == 8:
                            run.complete(claim, value)
                        elif run.should_prune(claim):
                            run.prune(claim)
                            break
                    left -= 1
        assert left == 0
        return {trial.number: (trial.state.name, trial.last_step) for trial in study.trials()}  # type: ignore[misc]

    with open_database(f"sqlite:///{tmp_path}/other.db") as database:
        other = open_study(database, "toy", direction="maximize", fingerprint="f", settings={"metric": "value"})
        decisions = decide(study, 1)
        assert decide(other, 12) == decisions
    assert {state for state, _ in decisions.values()} == {"COMPLETE", "PRUNED"}


def test_workers_import_no_database() -> None:
    code = "import sys, hpo.search; print(*[m for m in ('optuna', 'sqlalchemy', 'storage') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
