"""Population-based training of toy trials, without Ray: what replaces a member, and from where it starts."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from hpo.errors import SettingError, SpaceError
from hpo.paths import RunsDir
from hpo.search.checkpoints.files import Checkpoint, list_checkpoints, load_checkpoint, read_checkpoint, save_checkpoint
from hpo.search.coordinator import TrialCoordinator
from hpo.search.earlier.comparison import Comparison, RefusalError
from hpo.search.environment import note_horizon
from hpo.search.messages import Ending, TrialSpec
from hpo.search.population import explore_params, explored_names, owner_of, trial_key
from hpo.search.replay import read_trial
from hpo.search.slots import Slots
from hpo.search.trainable_check import check_values
from hpo.search.worker import end_trial, run_trial
from hpo.space.model import Space, load_space
from storage.copying import copy_study
from storage.database import Database
from storage.records import REPLACED_BY, REPLACES
from storage.retry import retry_trials
from storage.studies import find_study, open_study
from storage.study import Study
from tests.factories import RecordingListener, run_of, search_without_ray, take_reports, toy_space, trial_spec
from tests.populations import check_lines, parent_of, successors

SIZE, INTERVAL, LAST = 4, 2, 8
RATE = {"type": "float", "low": 0.0, "high": 10.0}


def population_space(folder: Path, **changes: Any) -> Space:
    values: dict[str, Any] = {
        "sampler": "random",
        "trainable": "benchmarks.toy:climb",
        "max_epochs": LAST,
        "checkpoint_every": "auto",
        "parameters": {"rate": RATE},
        "scheduler": {"name": "pbt", "population": SIZE, "interval": INTERVAL},
    }
    return toy_space(folder, **(values | changes))


@pytest.mark.parametrize("at_a_time", [1, 3, SIZE])
def test_members_are_replaced_by_copies_of_better_ones(database: Database, tmp_path: Path, at_a_time: int) -> None:
    study, listener = search_without_ray(population_space(tmp_path), database, tmp_path, at_a_time=at_a_time)
    check_lines(study, size=SIZE, last_epoch=LAST)
    children = successors(study)
    assert children
    assert all(trial.params["rate"] != parent.params["rate"] for trial, parent in _with_parents(study)), "explored"
    epochs = {trial.user_attrs[REPLACES]["epoch"] for trial in children}
    assert epochs <= {2, 4, 6}
    ended = [event for event in listener.events if event[0] == "PRUNED"]
    assert ("PRUNED", children[0].user_attrs[REPLACES]["trial"]) == ended[0][:2]
    epoch = children[0].user_attrs[REPLACES]["epoch"]
    assert ended[0][2] == f"replaced by trial {children[0].number} after epoch {epoch}"
    first = {event[1]: event[2] for event in reversed(listener.events) if event[0] == "started"}
    assert {trial.number: first[trial.number] for trial in children} == {
        trial.number: trial.user_attrs[REPLACES]["epoch"] for trial in children
    }, "each starts after the epoch of the decision"
    waited = [event for event in listener.events if event[0] == "WAITING"]
    assert bool(waited) == (at_a_time < SIZE)
    again, listener = search_without_ray(population_space(tmp_path), database, tmp_path)
    assert (len(again.trials()), listener.events) == (len(study.trials()), []), "nothing is left to do"


def _with_parents(study: Study) -> list[tuple[Any, Any]]:
    trials = {trial.number: trial for trial in study.trials()}
    return [(trial, trials[parent.number]) for trial in trials.values() if (parent := parent_of(trial)) is not None]


def test_members_that_have_no_slot_keep_pace(database: Database, tmp_path: Path) -> None:
    """With one slot, no member is an interval ahead of another one when it is compared."""
    _, listener = search_without_ray(population_space(tmp_path), database, tmp_path, at_a_time=1)
    epochs: dict[int, int] = {}
    for event in listener.events:
        if event[0] == "started":
            epochs.setdefault(event[1], event[2])
        elif event[0] == "epoch":
            epochs[event[1]] = event[2]
        elif event[0] in {"PRUNED", "COMPLETE"}:
            del epochs[event[1]]
        assert not epochs or max(epochs.values()) - min(epochs.values()) <= INTERVAL
    assert len([event for event in listener.events if event[0] == "started"]) > SIZE


def test_a_member_that_has_waited_is_compared_with_those_that_have_caught_up(
    database: Database, tmp_path: Path
) -> None:
    """Whoever arrives first, the worst one is replaced."""
    for name, seed in (("one", 0), ("two", 1), ("three", 2), ("four", 3)):
        space = population_space(tmp_path, name=name, seed=seed)
        study, _ = search_without_ray(space, database, tmp_path, at_a_time=1)
        check_lines(study, size=SIZE, last_epoch=LAST)
        first = [trial for trial in study.trials() if REPLACES not in trial.user_attrs]
        worst = min(first, key=lambda trial: trial.params["rate"])
        assert worst.user_attrs[REPLACED_BY]["epoch"] == INTERVAL


def test_checkpoints_that_nobody_needs_are_deleted(database: Database, tmp_path: Path) -> None:
    study, _ = search_without_ray(population_space(tmp_path), database, tmp_path, at_a_time=2)
    found = {
        trial.number: [path.name for path in list_checkpoints(RunsDir(tmp_path).trial(study.unique_name, trial.number))]
        for trial in study.trials()
    }
    completed = [trial for trial in study.trials() if trial.state.name == "COMPLETE"]
    best = sorted(completed, key=lambda trial: -(trial.value or 0.0))[:3]
    assert {number for number, names in found.items() if names} == {trial.number for trial in best}
    assert {tuple(names) for names in found.values() if names} == {(f"epoch-{LAST:06d}.pt",)}


class Population:
    """Two members in a coordinator, whose reports a test takes one by one."""

    def __init__(self, space: Space, study: Study, run: Any, folder: Path, slots: int = 4) -> None:
        self.listener = RecordingListener()
        self.coordinator = TrialCoordinator(
            space, run, Slots(slots, 1.0, 0.0), data={}, runs_dir=RunsDir(folder), listener=self.listener
        )
        self.study, self.folder = study, folder
        self.running: dict[str, tuple[TrialSpec, Any]] = {}

    def start(self, name: str) -> TrialSpec:
        spec = self.coordinator.next_trial(name)
        assert spec is not None
        self.running[name] = spec, run_trial(spec)
        return spec

    def train(self, name: str, epochs: int = 1) -> Ending | None:
        spec, reports = self.running[name]
        for _ in range(epochs):
            ending = self.coordinator.on_report(name, next(reports))
            if ending is not None:
                self.coordinator.on_saved(name, end_trial(reports, ending, spec))
                del self.running[name]
                return ending
        return None

    def better_and_worse(self) -> tuple[str, str]:
        """Start two members; return the names of the better one and of the other one."""
        rates = {name: self.start(name).params["rate"] for name in ("a", "b")}
        better, worse = sorted(rates, key=lambda name: -rates[name])
        return better, worse

    def files(self, number: int) -> list[str]:
        return [path.name for path in list_checkpoints(RunsDir(self.folder).trial(self.study.unique_name, number))]

    def notes(self) -> list[str]:
        return [event[1] for event in self.listener.events if event[0] == "note"]


def two(folder: Path, **changes: Any) -> Space:
    return population_space(folder, scheduler={"name": "pbt", "population": 2, "interval": INTERVAL}, **changes)


def test_a_child_starts_where_it_was_decided_even_if_its_parent_has_trained_on(
    database: Database, tmp_path: Path
) -> None:
    space = two(tmp_path, checkpoint_every=1)
    study = open_study(database, **space.study_options)
    with run_of(study, space) as run:
        members = Population(space, study, run, tmp_path)
        better, worse = members.better_and_worse()
        members.train(better, INTERVAL)
        assert members.train(worse, INTERVAL) is Ending.KEEP
        members.train(better, 2 * INTERVAL - 1)
        number = int(Path(members.running[better][0].folder).name)
        assert {f"epoch-{epoch:06d}.pt" for epoch in (4, 2)} <= set(members.files(number)), (
            "the last one is being written"
        )
        spec = members.start("child")
        assert (spec.parent_epoch, Path(spec.parent_folder).name) == (INTERVAL, str(number))
        first = take_reports(spec, 2)
        assert (first[0].epoch, first[0].is_recalled) == (INTERVAL, True)
        rate = study.trials()[number].params["rate"]
        assert first[1].metrics["value"] == math.fsum([rate, rate, spec.params["rate"]])
        members.coordinator.release_all()


def test_a_child_starts_where_it_was_decided_even_if_its_parent_has_completed(
    database: Database, tmp_path: Path
) -> None:
    space = two(tmp_path, checkpoints={"keep": "none"}, checkpoint_every=1)
    study = open_study(database, **space.study_options)
    with run_of(study, space) as run:
        members = Population(space, study, run, tmp_path)
        better, worse = members.better_and_worse()
        for _ in range(2):
            members.train(worse, INTERVAL)
            members.train(better, INTERVAL)
        members.train(better, INTERVAL)
        number = int(Path(members.running[better][0].folder).name)
        assert members.train(worse, INTERVAL) is Ending.KEEP
        assert members.train(better, INTERVAL) is Ending.KEEP, "it is complete"
        assert members.files(number) == [f"epoch-{epoch:06d}.pt" for epoch in (8, 7, 6)]
        members.start("child")
        members.train("child", INTERVAL + 1)
        members.coordinator.release_all()
        assert members.files(number) == [], "nobody needs them any more"
        rates = [study.trials()[each].params["rate"] for each in (number, 2)]
        assert study.trials()[2].value == math.fsum([rates[0]] * 6 + [rates[1]] * 2)


@pytest.mark.parametrize(("deleted", "epoch"), [([2], 4), ([2, 3, 4], 0)], ids=["the epoch's", "all"])
def test_a_missing_checkpoint_is_replaced_by_a_later_one_or_named(
    database: Database, tmp_path: Path, deleted: list[int], epoch: int
) -> None:
    space = two(tmp_path)
    study = open_study(database, **space.study_options)
    with run_of(study, space) as run:
        members = Population(space, study, run, tmp_path)
        better, worse = members.better_and_worse()
        members.train(better, INTERVAL)
        members.train(worse, INTERVAL)
        members.train(better, INTERVAL)
        folder = Path(members.running[better][0].folder)
        for each in deleted:
            (folder / f"epoch-{each:06d}.pt").unlink(missing_ok=True)
        members.start("child")
        members.train("child")
        run.flush()
        parent = parent_of(study.trials()[2])
        assert parent is not None
        assert parent.epoch == epoch
        gone = f"trial 2: the checkpoint of toy #{folder.name} is gone, so it is trained from its first epoch"
        assert (gone in members.notes()) == (epoch == 0)
        members.coordinator.release_all()


def test_an_epoch_is_reported_when_its_checkpoint_is_on_the_disk(tmp_path: Path) -> None:
    spec = trial_spec(tmp_path, trainable="benchmarks.toy:climb", params={"rate": 1}, checkpoint_every=9, interval=2)
    reports = run_trial(spec)
    found = []
    for _ in range(3):
        next(reports)
        found.append([path.name for path in list_checkpoints(Path(spec.folder))])
    reports.close()
    assert found == [[], ["epoch-000002.pt"], ["epoch-000002.pt"]]


def test_checkpoints_of_the_interval_stay_for_others(tmp_path: Path) -> None:
    for epoch in range(1, 10):
        save_checkpoint(tmp_path, Checkpoint(epoch, {}, {"epoch": epoch}, "k"), interval=3)
    names = [f"epoch-{epoch:06d}.pt" for epoch in (9, 8, 6)]
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    save_checkpoint(tmp_path, Checkpoint(10, {}, {"epoch": 10}, "k"), interval=3)
    found = {epoch: read_checkpoint(tmp_path, "k", epoch) for epoch in (0, 5, 6, 7, 9, 10, 11)}
    assert {epoch: each.epoch for epoch, each in found.items() if each} == {
        0: 10, 5: 6, 6: 6, 7: 9, 9: 9, 10: 10, 11: 10,
    }  # fmt: skip


def test_a_failed_child_that_is_retried_starts_from_its_parent_again(database: Database, tmp_path: Path) -> None:
    space = two(tmp_path)
    study = open_study(database, **space.study_options)
    with run_of(study, space) as run:
        members = Population(space, study, run, tmp_path)
        better, worse = members.better_and_worse()
        members.train(better, INTERVAL)
        members.train(worse, INTERVAL)
        members.start("child")
        members.train("child", 2)
        run.fail(members.coordinator._running["child"].claim, "a bug")
        run.flush()
        members.coordinator._running.pop("child")
        retry_trials(study, [2])
        spec = members.start("again")
        assert spec.key != members.running["child"][0].key, "another attempt"
        assert (spec.stored_epoch, spec.parent_epoch) == (0, INTERVAL)
        assert take_reports(spec, 1)[0].continued_epoch == INTERVAL
        members.coordinator.release_all()


# --- what changes -----------------------------------------------------------------------------------------------------


def built_in(folder: Path, parameters: dict[str, Any], **options: Any) -> Space:
    path = folder / "built.yaml"
    scheduler = {"name": "pbt", **options}
    path.write_text(json.dumps({"scheduler": scheduler, "max_epochs": 9, "parameters": parameters}))
    return load_space(str(path))


LR = {"type": "float", "low": 0.001, "high": 1.0, "log": True}


def test_the_built_in_training_changes_what_a_checkpoint_allows(tmp_path: Path) -> None:
    everything = {
        "lr": LR,
        "stem": ["cifar", "imagenet"],
        "flip": [True, False],
        "optimizer": ["sgd", "adam"],
        "tta": True,
    }
    assert explored_names(built_in(tmp_path, everything)) == ["lr", "flip"]
    assert explored_names(built_in(tmp_path, everything, explore=["flip"])) == ["flip"]
    space = built_in(tmp_path, everything, explore=["lr", "stem"])
    with pytest.raises(SpaceError) as raised:
        check_values(space)
    assert str(raised.value) == (
        f"{tmp_path}/built.yaml:1:49: stem cannot change while hpo.train:train trains; what can: flip, lr"
    )
    with pytest.raises(SpaceError, match=r"built.yaml:1:2: pbt changes hyperparameters .* none but stem: add a range"):
        check_values(built_in(tmp_path, {"stem": ["cifar", "imagenet"], "lr": 0.1}))


def test_another_trainable_changes_its_ranges(tmp_path: Path) -> None:
    parameters = {"rate": RATE, "stem": ["a", "b"], "n": {"type": "int", "low": 1, "high": 2}}
    assert explored_names(population_space(tmp_path, parameters=parameters)) == ["rate", "n"]
    scheduler = {"name": "pbt", "interval": 2, "explore": ["stem"]}
    assert explored_names(population_space(tmp_path, parameters=parameters, scheduler=scheduler)) == ["stem"]
    with pytest.raises(SpaceError, match="there is none that is a range"):
        check_values(population_space(tmp_path, parameters={"rate": [1, 2]}))


def test_explored_hyperparameters_meet_the_constraints(tmp_path: Path) -> None:
    space = population_space(tmp_path, parameters={"rate": RATE}, constraints=["rate >= 5"])
    for seed in range(50):
        found = explore_params(space, {"rate": 5.5}, random.Random(seed))
        rate = found["rate"]
        assert isinstance(rate, float)
        assert rate >= 5
        assert rate != 5.5
    scheduler = {"name": "pbt", "interval": 2, "resample": 0.0}
    tight = population_space(tmp_path, constraints=["rate < 1 or rate == 5"], scheduler=scheduler)
    assert explore_params(tight, {"rate": 5.0}, random.Random(0)) == {"rate": 5.0}, "none is found"


def test_a_derived_value_that_a_checkpoint_fixes_does_not_change(tmp_path: Path) -> None:
    path = tmp_path / "derived.yaml"
    space = {
        "scheduler": {"name": "pbt", "resample": 0.0},
        "max_epochs": 9,
        "parameters": {"lr": LR, "beta1": {"type": "float", "low": 0.5, "high": 0.9}},
        "derived": {"width": "1.0 if lr < 0.1 else 2.0"},
    }
    path.write_text(json.dumps(space))
    found = [explore_params(load_space(str(path)), {"lr": 0.099, "beta1": 0.7}, random.Random(i)) for i in range(50)]
    assert {params["lr"] for params in found} == {0.099 / 1.2}
    assert len({params["beta1"] for params in found}) == 2


def test_a_successor_has_an_identity_of_its_own(tmp_path: Path) -> None:
    space = population_space(tmp_path)
    key = space.config_key({"rate": 1.0})
    assert trial_key(space, {"rate": 1.0}, None) == key
    replaces = [{"trial": 1, "epoch": 2}, {"trial": 2, "epoch": 2}, {"trial": 1, "epoch": 4}]
    keys = [trial_key(space, {"rate": 1.0}, each) for each in replaces]
    assert len({key, *keys}) == 4
    assert trial_key(space, {"rate": 1.0}, {"epoch": 2, "trial": 1}) == keys[0]
    assert owner_of(space, {"rate": 1.0}, {REPLACES: replaces[0], "attempt": 2}) == f"{keys[0]}-2"


def test_the_note_about_schedules_names_the_interval(tmp_path: Path) -> None:
    note = note_horizon(built_in(tmp_path, {"lr": LR, "schedule": "cosine"}))
    assert note is not None
    assert "A higher scheduler.interval" in note


# --- other commands ---------------------------------------------------------------------------------------------------


def test_a_trial_whose_hyperparameters_changed_is_not_replayed_or_taken_over(
    database: Database, tmp_path: Path
) -> None:
    space = population_space(tmp_path)
    study, _ = search_without_ray(space, database, tmp_path, at_a_time=2)
    assert read_trial(study, 0).number == 0
    for trial in successors(study):
        with pytest.raises(SettingError, match=r"took the place of another one .* cannot be replayed"):
            read_trial(study, trial.number)
    comparison = Comparison(space, space, study, frozenset())
    members = {trial.number: trial for trial in study.trials()}
    first = next(number for number, each in members.items() if REPLACES not in each.user_attrs)
    assert comparison.same_configuration(members[first]) == members[first].params
    child = next(trial for trial in successors(study) if trial.state.name == "COMPLETE")
    assert comparison.same_configuration(child) is None
    with pytest.raises(RefusalError, match="its hyperparameters changed while it was trained"):
        comparison.take_over(child)


def test_a_copy_goes_on_from_its_own_files(database: Database, tmp_path: Path) -> None:
    space = two(tmp_path)
    study = open_study(database, **space.study_options)
    with run_of(study, space) as run:
        members = Population(space, study, run, tmp_path)
        better, worse = members.better_and_worse()
        members.train(better, INTERVAL)
        members.train(worse, INTERVAL)
        members.coordinator.release_all()
    copy_study(study, database, "copy", "0123456789ab")
    copied = find_study(database, "copy")
    assert copied is not None
    parent, before = parent_of(copied.trials()[2]), parent_of(study.trials()[2])
    assert parent is not None
    assert before is not None
    assert (parent.study, parent.identity, parent.files) == ("copy", copied.identity, copied.unique_name)
    assert (before.study, before.identity, before.files) == ("toy", study.identity, study.unique_name)
    assert (parent.number, parent.epoch, parent.key) == (before.number, before.epoch, before.key)


def test_a_killed_worker_of_a_child_adopts_its_parent_again(tmp_path: Path) -> None:
    spec = trial_spec(tmp_path, trainable="benchmarks.toy:climb", params={"rate": 1}, interval=2, max_epochs=9)
    take_reports(spec, 4)
    child = trial_spec(
        tmp_path / "child",
        trainable="benchmarks.toy:climb",
        params={"rate": 10},
        key="c",
        max_epochs=9,
        interval=2,
        checkpoint_every=9,
        parent_folder=spec.folder,
        parent_key="k",
        parent_epoch=2,
    )
    assert take_reports(child, 1)[0].continued_epoch == 2
    saved = load_checkpoint(Path(child.folder), "c")
    assert saved is not None
    assert saved.epoch == 2
    second = take_reports(child, 3)
    assert second[0].continued_epoch is None, "it has its own copy now"
    assert [report.metrics["value"] for report in second] == [1.0, 2.0, 12.0]
