"""With a larger max_epochs, a search continues from the checkpoints of its earlier revisions. Toy trials, without Ray."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.toy import expected_value
from hpo.api import list_studies
from hpo.paths import RunsDir
from hpo.report.reading import read_results
from hpo.search import adoption
from hpo.search.checkpoints.files import (
    Checkpoint,
    TakenOverError,
    claim_folder,
    list_checkpoints,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from hpo.search.checkpoints.retention import Retention, trials_with_checkpoints
from hpo.search.earlier.candidates import Outlook
from hpo.search.earlier.continuation import ContinuationPlan, open_continued, plan_continuation
from hpo.search.earlier.warm_start import find_trials, take_over_trials
from hpo.search.messages import TrialSpec
from hpo.search.runs import open_run
from hpo.space.model import Space, load_space
from hpo.trainable import is_timing
from storage.continuations import CONTINUATION
from storage.database import Database
from storage.parents import Parent, continued_trials
from storage.records import CONTINUED_FROM
from storage.retry import retry_trials
from storage.studies import open_study
from storage.study import Study
from tests.factories import (
    RecordingListener,
    finish_study,
    search_without_ray,
    shipped_space,
    take_reports,
    toy_space,
    trial_spec,
    trial_states,
)
from tests.report.studies import finish_grid, grid_space

XS = [1, 2, 3]  # after epoch 3, the best is 3, then 1
SHORT, LONG = 3, 5


def short_space(folder: Path, **changes: Any) -> Space:
    values: dict[str, Any] = {"parameters": {"x": XS}, "max_epochs": SHORT}
    return toy_space(folder, **(values | changes))


def long_space(folder: Path, wanted: Any = None, **changes: Any) -> Space:
    options = {} if wanted is None else {"continue": wanted}
    return short_space(folder, **({"max_epochs": LONG} | options | changes))


def plan(database: Database, space: Space, folder: Path) -> ContinuationPlan:
    return plan_continuation(space, None, database, RunsDir(folder))


def notes(listener: RecordingListener) -> list[str]:
    return [event[1] for event in listener.events if event[0] == "note"]


def parents(study: Study) -> dict[int, tuple[str, int]]:
    """Return {x: (parent, its epochs)} of the trials that continue another one."""
    found = {trial.params["x"]: Parent.read(trial.user_attrs.get(CONTINUED_FROM)) for trial in study.trials()}
    return {x: (str(parent), parent.epoch) for x, parent in found.items() if parent is not None}


def folder_of(study: Study, folder: Path, number: int) -> Path:
    return RunsDir(folder).trial(study.unique_name, number)


def check_values(study: Study, epochs: int = LONG) -> None:
    """Check that each value is that of a training that was never stopped."""
    for trial in study.trials():
        straight = {epoch: expected_value(trial.params, 0, epoch) for epoch in range(1, epochs + 1)}
        assert trial.intermediate_values == straight
        assert trial.value == straight[epochs]
    for metrics in study.metrics().values():
        assert list(metrics) == list(range(1, epochs + 1)), "with all metrics of the parent"
        assert all({"value", "epoch_seconds"} <= values.keys() for values in metrics.values())


def epochs_trained(listener: RecordingListener) -> list[tuple[int, int]]:
    """Return (number, epoch) as the user sees them: the last epoch of a parent, then those that are trained."""
    return [event[1:] for event in listener.events if event[0] == "epoch"]


# --- what is continued ------------------------------------------------------------------------------------------------


def test_a_larger_max_epochs_continues_all_trials_of_a_grid_best_first(database: Database, tmp_path: Path) -> None:
    earlier, _ = search_without_ray(short_space(tmp_path), database, tmp_path)
    before = earlier.trials()
    files = {path: path.read_bytes() for path in folder_of(earlier, tmp_path, 0).parent.rglob("*.*") if path.is_file()}
    best_first = sorted(before, key=lambda trial: -(trial.value or 0.0))

    study, listener = search_without_ray(long_space(tmp_path), database, tmp_path)
    assert study.name == "toy@2"
    check_values(study)
    assert [trial.params for trial in study.trials()] == [trial.params for trial in best_first]
    assert parents(study) == {trial.params["x"]: (f"toy@1 #{trial.number}", SHORT) for trial in before}
    named = ", ".join(f"toy@1 #{trial.number}" for trial in best_first)
    assert notes(listener) == [f"continues 3 trials to epoch {LONG} from their checkpoints: {named}"]
    assert [event[1:] for event in listener.events if event[0] == "started"] == [(0, 3), (1, 3), (2, 3)]
    assert epochs_trained(listener) == [(number, epoch) for number in range(3) for epoch in (3, 4, 5)]
    assert [trial.state for trial in earlier.trials()] == [trial.state for trial in before], "parents stay as they are"
    assert {path: path.read_bytes() for path in files} == files


def test_best_n_takes_only_those_and_trains_new_points(database: Database, tmp_path: Path) -> None:
    earlier, _ = search_without_ray(short_space(tmp_path), database, tmp_path)
    (best, *_) = sorted(earlier.trials(), key=lambda trial: -(trial.value or 0.0))
    space = long_space(tmp_path, "best 1", parameters={"x": [*XS, 4]})
    study, listener = search_without_ray(space, database, tmp_path)
    assert [trial.params["x"] for trial in study.trials()] == [best.params["x"], 4]
    assert parents(study) == {best.params["x"]: (f"toy@1 #{best.number}", SHORT)}
    assert notes(listener)[1] == "leaves 2 trials as they are (continue: best 1)"
    assert study.attrs["hpo:total"] == 2
    check_values(study)
    again, listener = search_without_ray(space, database, tmp_path)
    assert listener.events == [("note", notes(listener)[0])], "nothing is left to do"
    assert len(again.trials()) == 2


def test_what_another_driver_has_chosen_by_other_options_is_still_needed(database: Database, tmp_path: Path) -> None:
    earlier, _ = search_without_ray(short_space(tmp_path), database, tmp_path)
    needed = dict.fromkeys(range(3), "toy@2")
    study: Study | None = None
    for options in ("all", "best 1", "best 1", "all"):
        space = long_space(tmp_path, options, parameters={"x": [*XS, 4]})
        plan = plan_continuation(space, study, database, RunsDir(tmp_path))
        study, _ = open_continued(database, plan, RunsDir(tmp_path))
        assert continued_trials(database) == {earlier.identity: needed}, options
    assert study is not None
    assert "former" not in study.attrs[CONTINUATION]


def test_a_result_that_was_reused_is_continued_from_the_study_that_trained_it(
    database: Database, tmp_path: Path
) -> None:
    search_without_ray(short_space(tmp_path, name="first", parameters={"x": [3, 1]}), database, tmp_path)
    search_without_ray(short_space(tmp_path, name="unrelated"), database, tmp_path)
    space = short_space(tmp_path, warm_start=["first"])
    study = open_study(database, **space.study_options)
    take_over_trials(space, study, find_trials(space, study, database))
    search_without_ray(space, database, tmp_path)
    study, listener = search_without_ray(long_space(tmp_path, warm_start=["first"]), database, tmp_path)
    check_values(study)
    assert parents(study) == {3: ("first@1 #0", SHORT), 1: ("first@1 #1", SHORT), 2: ("toy@1 #2", SHORT)}
    best_first = "first@1 #0, toy@1 #2, first@1 #1"
    assert notes(listener) == [f"continues 3 trials to epoch {LONG} from their checkpoints: {best_first}"]


def test_trials_beyond_the_budget_of_a_sampler_are_not_announced(database: Database, tmp_path: Path) -> None:
    drawn: dict[str, Any] = {"sampler": "random", "parameters": {"x": {"type": "int", "low": 1, "high": 50}}}
    search_without_ray(short_space(tmp_path, **drawn, budget={"trials": 3}), database, tmp_path)
    study, listener = search_without_ray(long_space(tmp_path, "all", **drawn, budget={"trials": 2}), database, tmp_path)
    assert len(study.trials()) == 2
    assert notes(listener)[0].startswith(f"continues 2 trials to epoch {LONG} ")
    study, listener = search_without_ray(long_space(tmp_path, "all", **drawn, budget={"trials": 4}), database, tmp_path)
    assert notes(listener)[0].startswith(f"continues 1 trial to epoch {LONG} ")
    assert len(parents(study)) == 3
    assert len(study.trials()) == 4


def test_points_of_a_grid_beyond_the_budget_are_not_continued(database: Database, tmp_path: Path) -> None:
    search_without_ray(short_space(tmp_path), database, tmp_path)
    space = long_space(tmp_path, budget={"trials": 2})
    study, listener = search_without_ray(space, database, tmp_path)
    assert {trial.params["x"] for trial in study.trials()} == set(parents(study)) == set(XS[:2])
    assert notes(listener)[0].startswith("continues 2 trials")


def test_none_trains_every_configuration_from_its_first_epoch(database: Database, tmp_path: Path) -> None:
    search_without_ray(short_space(tmp_path), database, tmp_path)
    study, listener = search_without_ray(long_space(tmp_path, "none"), database, tmp_path)
    assert (parents(study), notes(listener)) == ({}, [])
    check_values(study)


def test_the_trial_with_the_most_epochs_is_continued(database: Database, tmp_path: Path) -> None:
    search_without_ray(short_space(tmp_path), database, tmp_path)
    search_without_ray(long_space(tmp_path), database, tmp_path)
    study, _ = search_without_ray(long_space(tmp_path, max_epochs=7), database, tmp_path)
    assert {epoch for _, epoch in parents(study).values()} == {LONG}
    check_values(study, 7)


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"replicates": 2}, {"data": {"train_samples": 9}}, {"direction": "minimize"}]
)
def test_what_would_be_trained_or_ranked_in_another_way_is_not_continued(
    database: Database, tmp_path: Path, changes: dict[str, Any]
) -> None:
    search_without_ray(short_space(tmp_path), database, tmp_path)
    assert plan(database, long_space(tmp_path, **changes), tmp_path).chosen == []


def test_a_derived_value_that_uses_max_epochs_is_another_training(database: Database, tmp_path: Path) -> None:
    derived = {"derived": {"half": "max_epochs / 2", "fixed": "min(max_epochs, 2)"}}
    search_without_ray(short_space(tmp_path, **derived), database, tmp_path)
    assert plan(database, long_space(tmp_path, **derived), tmp_path).chosen == []
    derived["derived"].pop("half")
    search_without_ray(short_space(tmp_path, **derived), database, tmp_path)
    assert len(plan(database, long_space(tmp_path, **derived), tmp_path).chosen) == 3, "the same value"


def test_a_sampler_draws_after_the_best_three_are_continued(database: Database, tmp_path: Path) -> None:
    sampled: dict[str, Any] = {
        "sampler": {"name": "tpe", "seed": 0},
        "budget": {"trials": 5},
        "parameters": {"x": {"type": "int", "low": 1, "high": 999}},
        "checkpoints": {"keep": "all"},
    }
    earlier, _ = search_without_ray(short_space(tmp_path, **sampled), database, tmp_path)
    best = [trial.params for trial in sorted(earlier.trials(), key=lambda trial: -(trial.value or 0.0))]
    study, _ = search_without_ray(long_space(tmp_path, **sampled), database, tmp_path)
    assert [trial.params for trial in study.trials()][:3] == best[:3]
    assert len(parents(study)) == 3
    assert len(study.trials()) == 5, "the budget counts them"
    check_values(study)
    sampled["budget"]["trials"] = 2
    study, _ = search_without_ray(long_space(tmp_path, "all", max_epochs=6, **sampled), database, tmp_path)
    assert len(study.trials()) == 2


def test_pruned_trials_stay_and_no_scheduler_judges_what_a_parent_trained(database: Database, tmp_path: Path) -> None:
    wide: dict[str, Any] = {"parameters": {"x": list(range(1, 8))}, "checkpoints": {"keep": "all"}}
    scheduler = {"name": "asha", "grace_period": 1, "reduction_factor": 2}
    earlier, _ = search_without_ray(short_space(tmp_path, scheduler=scheduler, **wide), database, tmp_path)
    complete = [trial.params["x"] for trial in earlier.trials() if trial.state.name == "COMPLETE"]
    assert 0 < len(complete) < 7
    study, _ = search_without_ray(long_space(tmp_path, scheduler=scheduler, **wide), database, tmp_path)
    assert set(parents(study)) == set(complete)
    for trial in study.trials():
        if trial.params["x"] in complete:
            assert trial.last_step is not None
            assert trial.last_step > SHORT


def test_halving_judges_a_continued_trial_at_the_first_rung_of_its_own(database: Database, tmp_path: Path) -> None:
    wide: dict[str, Any] = {"parameters": {"x": list(range(1, 8))}, "checkpoints": {"keep": "all"}}
    search_without_ray(short_space(tmp_path, **wide), database, tmp_path)
    scheduler = {"name": "asha", "grace_period": 1, "reduction_factor": 2}
    study, _ = search_without_ray(long_space(tmp_path, max_epochs=9, scheduler=scheduler, **wide), database, tmp_path)
    assert len(parents(study)) == 7
    pruned = [trial.last_step for trial in study.trials() if trial.state.name == "PRUNED"]
    assert pruned
    assert set(pruned) <= {4, 8}, "after 3 epochs of their parents"


# --- schedules that depend on the horizon -----------------------------------------------------------------------------


def test_a_schedule_that_depends_on_the_horizon_starts_again_or_is_left(database: Database, tmp_path: Path) -> None:
    parameters = {"batch_size": [64, 256], "lr": 0.01, "schedule": ["constant", "cosine"]}
    schedules: dict[str, Any] = {"parameters": parameters}
    finish_grid(database, **schedules)
    restart = plan(database, grid_space(max_epochs=9, **schedules), tmp_path)
    assert [each.outlook for each in restart.chosen] == [Outlook.GONE, Outlook.HORIZON] * 2
    assert restart.attrs == {}
    assert list(restart.notes(set())) == [
        "trains 2 trials from the start, because their checkpoints are gone: grid@1 #0, grid@1 #2",
        "trains 2 trials from the start, because their schedule depends on max_epochs: grid@1 #1, grid@1 #3",
    ]
    assert restart.space.total_trials == 4
    leave = plan(database, grid_space(max_epochs=9, **{"continue": {"horizon": "leave"}}, **schedules), tmp_path)
    assert {each["schedule"] for each in leave.first_points()} == {"constant"}
    assert leave.space.total_trials == 2
    assert list(leave.notes(set()))[1] == (
        "leaves 2 trials as they are, because their schedule depends on max_epochs: grid@1 #1, grid@1 #3"
    )


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_without_a_checkpoint_a_trial_is_trained_from_its_first_epoch(database: Database, tmp_path: Path) -> None:
    keep_one = {"checkpoints": {"keep": "best 1"}}
    earlier, _ = search_without_ray(short_space(tmp_path, **keep_one), database, tmp_path)
    (kept,) = trials_with_checkpoints(folder_of(earlier, tmp_path, 0).parent)
    study, listener = search_without_ray(long_space(tmp_path), database, tmp_path)
    assert list(parents(study).values()) == [(f"toy@1 #{kept}", SHORT)]
    continued, gone = notes(listener)
    assert continued == f"continues 1 trial to epoch {LONG} from its checkpoint: toy@1 #{kept}"
    assert gone.startswith("trains 2 trials from the start, because their checkpoints are gone: toy@1 #")
    check_values(study)


def test_a_checkpoint_that_cannot_be_read_is_said_and_recorded(database: Database, tmp_path: Path) -> None:
    earlier, _ = search_without_ray(short_space(tmp_path), database, tmp_path)
    for number in range(3):
        for path in list_checkpoints(folder_of(earlier, tmp_path, number)):
            path.write_bytes(b"damaged")
    study, listener = search_without_ray(long_space(tmp_path), database, tmp_path)
    number = study.trials()[0].user_attrs[CONTINUED_FROM]["trial"]
    assert f"trial 0: the checkpoint of toy@1 #{number} is gone, so it is trained from its first epoch" in notes(
        listener
    )
    assert {epoch for _, epoch in parents(study).values()} == {0}
    assert len(list_checkpoints(folder_of(earlier, tmp_path, 0))) == 1, "the folder of the parent stays as it is"
    check_values(study)


def test_a_trial_keeps_its_checkpoint_while_another_one_continues_it(database: Database, tmp_path: Path) -> None:
    earlier, _ = search_without_ray(short_space(tmp_path), database, tmp_path)
    keeps_none = short_space(tmp_path, checkpoints={"keep": "none"})
    continuation = plan(database, long_space(tmp_path), tmp_path)
    study = _open(database, continuation)
    with open_run(continuation, study, {}) as run:
        claim = run.claim()
        assert claim is not None
        parent = Parent.read(claim.continued_from)
        assert parent is not None
        Retention(keeps_none, earlier, RunsDir(tmp_path)).run_ended()
        assert trials_with_checkpoints(folder_of(earlier, tmp_path, 0).parent) == [parent.number]
        run.complete(claim, 0.5)
    Retention(keeps_none, earlier, RunsDir(tmp_path)).run_ended()
    assert trials_with_checkpoints(folder_of(earlier, tmp_path, 0).parent) == []


def _open(database: Database, continuation: ContinuationPlan) -> Study:
    return open_study(database, **continuation.space.study_options)


def test_a_trial_that_was_killed_goes_on_from_its_own_checkpoint(database: Database, tmp_path: Path) -> None:
    earlier, _ = search_without_ray(short_space(tmp_path), database, tmp_path)
    continuation = plan(database, long_space(tmp_path), tmp_path)
    study = _open(database, continuation)
    with open_run(continuation, study, {}) as run:  # created and owned, and nothing else
        assert run.claim() is not None
    study, _ = search_without_ray(long_space(tmp_path, "none"), database, tmp_path)
    assert len(parents(study)) == 1, "storage knows the parent, even if the file says something else now"
    check_values(study)
    assert trial_states(earlier) == ["COMPLETE"] * 3


def test_a_trial_that_is_retried_starts_from_its_parent_again(database: Database, tmp_path: Path) -> None:
    search_without_ray(short_space(tmp_path), database, tmp_path)
    continuation = plan(database, long_space(tmp_path), tmp_path)
    study = _open(database, continuation)
    with open_run(continuation, study, {}) as run:
        claim = run.claim()
        assert claim is not None
        run.fail(claim, "its reason")
    retry_trials(study, [claim.number])
    study, listener = search_without_ray(long_space(tmp_path), database, tmp_path)
    assert ("started", 0, SHORT) in listener.events
    assert len(parents(study)) == 3
    check_values(study)


def trained_parent(folder: Path) -> Path:
    """Train a toy trial of two epochs; return its folder."""
    spec = replace(trial_spec(folder, max_epochs=2, key="p"), folder=str(folder / "parent"))
    take_reports(spec, 2)
    return Path(spec.folder)


def test_a_worker_copies_once_and_its_successor_needs_no_parent(tmp_path: Path) -> None:
    parent = trained_parent(tmp_path)
    spec = trial_spec(tmp_path, max_epochs=4, key="k", parent_folder=str(parent), parent_key="p")
    (first,) = take_reports(spec, 1)
    assert (first.epoch, first.is_recalled, first.continued_epoch, list(first.history)) == (2, True, 2, [1])
    folder = Path(spec.folder)
    copied = load_checkpoint(folder, "k")
    assert copied is not None
    assert (copied.epoch, copied.key) == (2, "k")
    shutil.rmtree(parent)
    reports = take_reports(replace(spec, token=2), 4)
    assert [report.continued_epoch for report in reports] == [None] * 4
    assert reports[-1].metrics["value"] == expected_value({"x": 1}, 0, 4)
    (fresh,) = take_reports(replace(spec, folder=str(tmp_path / "other")), 1)
    assert (fresh.epoch, fresh.continued_epoch) == (1, 0)


def test_the_checkpoint_of_another_configuration_is_not_continued(tmp_path: Path) -> None:
    parent = trained_parent(tmp_path)
    spec = trial_spec(tmp_path, parent_folder=str(parent), parent_key="q")
    (report,) = take_reports(spec, 1)
    assert (report.epoch, report.continued_epoch) == (1, 0)
    assert read_checkpoint(parent, "p") is not None


def test_the_checkpoint_of_an_earlier_attempt_of_the_parent_is_continued(tmp_path: Path) -> None:
    """`hpo retry` let the parent start again: its worker has set the files aside."""
    parent = trained_parent(tmp_path)
    take_reports(replace(trial_spec(tmp_path, key="p-2"), folder=str(parent)), 1)
    assert parent.with_name("parent.other-1").is_dir()
    spec = trial_spec(tmp_path, parent_folder=str(parent), parent_key="p")
    (report,) = take_reports(spec, 1)
    assert (report.epoch, report.continued_epoch) == (2, 2)


def test_on_a_full_disk_the_training_goes_on_from_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = trained_parent(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("hpo.search.adoption.save_checkpoint", fail)
    spec = trial_spec(tmp_path, parent_folder=str(parent), parent_key="p")
    reports = take_reports(spec, 2)
    assert [report.epoch for report in reports] == [2, 3]
    assert reports[1].warning == "the checkpoint of its parent could not be copied: no space left"


# --- scripts ----------------------------------------------------------------------------------------------------------

TRAIN_PY = """
import json, pathlib, sys
folder, epochs = pathlib.Path(sys.argv[1]), int(sys.argv[2])
saved = folder / "saved"
done = int(saved.read_text()) if saved.exists() else 0
for epoch in range(done + 1, epochs + 1):
    saved.write_text(str(epoch))
    print(json.dumps({"epoch": epoch, "value": epoch / 10, "first": done}))
"""


def script_spec(folder: Path, **changes: Any) -> TrialSpec:
    (folder / "train.py").write_text(TRAIN_PY)
    command = f"{sys.executable} {folder}/train.py {{checkpoint_dir}} {{max_epochs}}"
    values = {"command": command, "data": {"data_dir": str(folder)}, "params": {}}
    return trial_spec(folder, **(values | changes))


@pytest.mark.slow
def test_a_script_goes_on_from_a_copy_of_its_files(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    take_reports(replace(script_spec(tmp_path, max_epochs=2, key="p"), folder=str(parent)), 2)
    spec = script_spec(tmp_path, parent_folder=str(parent), parent_key="p")
    partial = Path(spec.folder) / "script.partial-1"
    partial.mkdir(parents=True)  # of a worker that was killed while it copied
    reports = take_reports(spec, 3)
    assert [(report.epoch, report.metrics["first"]) for report in reports] == [(2, 0), (3, 2), (4, 2)]
    assert not partial.exists()
    assert ((parent / "script/saved").read_text(), (Path(spec.folder) / "script/saved").read_text()) == ("2", "4")
    shutil.rmtree(parent / "script")
    (report,) = take_reports(replace(spec, folder=str(tmp_path / "other")), 1)
    assert (report.epoch, report.continued_epoch, report.metrics["first"]) == (1, 0, 0)


@pytest.fixture
def script_files(tmp_path: Path) -> dict[str, Any]:
    """A parent with the files of a script, as arguments of `adopt_checkpoint`."""
    parent = tmp_path / "parent"
    save_checkpoint(parent, Checkpoint(3, {3: {"value": 1.0}}, {}, "p"))
    (parent / "script").mkdir()
    for name in ("a", "b", "c"):
        (parent / "script" / name).write_text("3")
    return {"parent": parent, "parent_key": "p", "is_script": True}


def script_in(folder: Path) -> dict[str, str]:
    """Return the files of the trial's script; fail if there is a draft of them."""
    assert not list(folder.glob("script.*"))
    return {path.name: path.read_text() for path in (folder / "script").iterdir()}


@pytest.mark.parametrize("moment", ["while its successor copies", "before its successor copies"])
def test_a_worker_that_has_lost_the_trial_does_not_disturb_its_successor(
    tmp_path: Path, script_files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Worker 1 is suspended: before it copies anything, or after its first file."""
    folder, copied = tmp_path / "child", list[str]()
    copy, (first, second) = adoption._copy_synced, (1, 2)

    def adopt(token: int) -> adoption.Adopted | None:
        return adoption.adopt_checkpoint(folder, "k", token, **script_files)

    def copy_file(source: str, target: str, **options: Any) -> str:
        copied.append(target)
        if len(copied) == 2:
            if moment == "while its successor copies":
                with pytest.raises(TakenOverError):
                    adopt(first)
            else:
                claim_folder(folder, "k", second)
                assert adopt(second) is not None
        return copy(source, target, **options)

    monkeypatch.setattr(adoption, "_copy_synced", copy_file)
    claim_folder(folder, "k", first)
    if moment == "while its successor copies":
        claim_folder(folder, "k", second)
        assert adopt(second) is not None
    else:
        with pytest.raises(TakenOverError):
            adopt(first)
    assert script_in(folder) == {"a": "3", "b": "3", "c": "3"}
    assert load_checkpoint(folder, "k") is not None


def test_the_copy_of_another_worker_is_as_good_as_its_own(
    tmp_path: Path, script_files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that lost the trial has renamed its draft after this one had looked."""
    folder, rename = tmp_path / "child", Path.rename

    def rename_later(path: Path, target: Path) -> Path:
        shutil.copytree(path, target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_later)
    claim_folder(folder, "k", 1)
    assert adoption.adopt_checkpoint(folder, "k", 1, **script_files) is not None
    assert script_in(folder) == {"a": "3", "b": "3", "c": "3"}


def test_a_script_whose_checkpoints_are_damaged_starts_from_the_files_of_its_parent(
    tmp_path: Path, script_files: dict[str, Any]
) -> None:
    folder = tmp_path / "child"
    claim_folder(folder, "k", 1)
    (folder / "script").mkdir()
    (folder / "script" / "a").write_text("7")
    (folder / "epoch-000007.damaged").touch()
    adopted = adoption.adopt_checkpoint(folder, "k", 1, **script_files)
    assert adopted is not None
    assert adopted.checkpoint.epoch == 3
    assert script_in(folder) == {"a": "3", "b": "3", "c": "3"}


def test_without_room_for_its_files_a_script_fails_and_does_not_start_anew(
    tmp_path: Path, script_files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adoption, "_copy_synced", fail)
    spec = script_spec(tmp_path, parent_folder=str(script_files["parent"]), parent_key="p")
    (report,) = take_reports(spec, 1)
    assert report.failure.startswith(f"the files of its parent could not be copied to {spec.folder}: ")
    assert "No space left on device" in report.failure
    assert report.failure.endswith("After you have fixed the cause, `hpo retry` continues the parent")
    assert list(Path(spec.folder).glob("script*")) == []


def test_a_script_without_a_folder_has_no_checkpoints(database: Database, tmp_path: Path) -> None:
    def script_space(max_epochs: int) -> Space:
        path = tmp_path / "script.yaml"
        parameters = {"x": [1]}
        space = {"command": f"{sys.executable} x.py {{x}}", "metric": "value", "max_epochs": max_epochs}
        path.write_text(json.dumps(space | {"parameters": parameters}))
        return load_space(str(path))

    epochs = [{"value": 0.1}] * SHORT
    finish_study(database, script_space(SHORT), [{"x": 1}], provenance={}, device={}, epochs_of=lambda _: epochs)
    assert list(plan(database, script_space(LONG), tmp_path).notes(set())) == [
        "trains 1 trial from the start, because a script without {checkpoint_dir} has no checkpoints: script@1 #0"
    ]


# --- the built-in training --------------------------------------------------------------------------------------------


def small(*overrides: str) -> Space:
    sample = ("data.train_samples=96", "data.val_samples=20", "parameters.batch_size=[32]", "parameters.optimizer=adam")
    return shipped_space("quick", *sample, "parameters.ema=0.9", "parameters.flip=true", *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("replicates=2", "parameters.width=0.125")])
def test_two_epochs_continued_to_four_equal_four_epochs_bit_for_bit(
    database: Database, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    search_without_ray(small("max_epochs=2", *overrides), database, tmp_path)
    long = small("max_epochs=4", *overrides)
    continued, listener = search_without_ray(long, database, tmp_path)
    assert notes(listener) == ["continues 1 trial to epoch 4 from its checkpoint: quick@1 #0"]
    straight, _ = search_without_ray(long.model_copy(update={"name": "straight"}), database, tmp_path)

    def metrics_of(study: Study) -> dict[int, dict[str, float]]:
        return {
            epoch: {name: value for name, value in values.items() if not is_timing(name)}
            for epoch, values in study.metrics()[0].items()
        }

    assert metrics_of(continued) == metrics_of(straight), "the score on the test images belongs to the last epoch only"
    assert {"test_accuracy", "val_accuracy"} <= metrics_of(continued)[4].keys()
    key = long.config_key(continued.trials()[0].params)
    states = [load_checkpoint(folder_of(study, tmp_path, 0), key) for study in (continued, straight)]
    assert states[0] is not None
    assert states[1] is not None
    _check_equal(*(_without_metrics(each.state) for each in states if each is not None))


def _without_metrics(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state without the metrics of each of several trainings, which have timings."""
    return {"states": [training["state"] for training in state["replicates"]]} if "replicates" in state else state


def _check_equal(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _check_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            _check_equal(left, right)
    else:
        assert one == other


def test_reading_a_parent_finds_the_newest_checkpoint_that_is_intact(tmp_path: Path) -> None:
    for epoch in (1, 2):
        save_checkpoint(tmp_path, Checkpoint(epoch, {}, {"epoch": epoch}, "p"))
    (tmp_path / "epoch-000002.pt").write_bytes(b"damaged")
    found = read_checkpoint(tmp_path, "p")
    assert found is not None
    assert found.epoch == 1
    assert read_checkpoint(tmp_path, "q") is None
    assert len(list_checkpoints(tmp_path)) == 2


# --- what is left of a grid -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("enqueued", "state"), [([3, 4], "resumable"), ([2, 1], "finished")])
def test_a_grid_is_finished_when_its_own_points_have_ended(
    database: Database, tmp_path: Path, enqueued: list[int], state: str
) -> None:
    """As many trials as its budget have ended: others than its points, in the first case."""
    space = toy_space(tmp_path, parameters={"x": [1, 2, 3, 4]}, budget={"trials": 2})
    study = open_study(database, **space.study_options)
    for x in enqueued:
        study.optuna_study.enqueue_trial({"x": x})
    with open_run(plan(database, space, tmp_path), study, {}) as run:
        for _ in enqueued:
            claim = run.claim()
            assert claim is not None
            run.report(claim, 3, {"value": 0.1}, 0.1)
            run.complete(claim, 0.1)
            run.flush()
    assert [each.state for each in list_studies(storage=f"sqlite:///{database.file}", runs_dir=tmp_path)] == [state]
    assert read_results(study).state == state


def test_a_grid_is_finished_although_points_are_left_as_they_are(database: Database, tmp_path: Path) -> None:
    search_without_ray(short_space(tmp_path), database, tmp_path)
    search_without_ray(long_space(tmp_path, "best 1", budget={"trials": 2}), database, tmp_path)
    states = [each.state for each in list_studies(storage=f"sqlite:///{database.file}", runs_dir=tmp_path)]
    assert states == ["finished", "finished"]
