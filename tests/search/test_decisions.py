"""What a search continues is decided once, and stored with its study. Toy trials, without Ray."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.toy import expected_value
from hpo import plan_search
from hpo.paths import RunsDir
from hpo.report.plan import configuration_table
from hpo.search.earlier.candidates import Candidate, Outlook, rank_candidates
from hpo.search.earlier.continuation import open_continued, plan_continuation
from hpo.search.earlier.warm_start import find_trials, take_over_trials
from hpo.search.listener import NullListener
from hpo.space.model import Space
from storage.continuations import CONTINUATION, settle_continuation
from storage.copying import copy_study
from storage.database import Database
from storage.management import delete_study, rename_study
from storage.parents import Parent
from storage.records import CONTINUED_FROM
from storage.studies import find_study
from storage.study import Study
from tests.factories import search_without_ray, toy_space

XS = [1, 2, 3, 4]
SHORT, LONG = 3, 5


def space_of(folder: Path, name: str = "toy", **changes: Any) -> Space:
    values: dict[str, Any] = {"parameters": {"x": XS}, "max_epochs": SHORT, "checkpoints": {"keep": "all"}}
    return toy_space(folder, name, **(values | changes))


def long_space(folder: Path, wanted: Any = "best 2", name: str = "toy", **changes: Any) -> Space:
    return space_of(folder, name, **({"max_epochs": LONG, "continue": wanted} | changes))


class Notes(NullListener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def named(database: Database, name: str) -> Study:
    study = find_study(database, name)
    assert study is not None
    return study


def parents(study: Study) -> dict[int, str]:
    """Return {x: its parent} of all trials; empty for one without a parent."""
    found = {trial.params["x"]: Parent.read(trial.user_attrs.get(CONTINUED_FROM)) for trial in study.trials()}
    return {x: "" if parent is None else str(parent) for x, parent in found.items()}


def rename_parent(database: Database) -> None:
    rename_study(named(database, "toy@1"), "first")


def delete_parent(database: Database) -> None:
    delete_study(named(database, "toy@1"))


@pytest.mark.parametrize("change", [rename_parent, delete_parent])
def test_what_is_left_stays_left_without_the_parents(database: Database, tmp_path: Path, change: Any) -> None:
    search_without_ray(space_of(tmp_path), database, tmp_path)
    study, _ = search_without_ray(long_space(tmp_path), database, tmp_path)
    before = parents(study)
    assert len(before) == 2
    change(database)
    again, listener = search_without_ray(long_space(tmp_path), database, tmp_path)
    assert (again.name, parents(again)) == ("toy@2", before)
    assert listener.events == [("note", "leaves 2 trials as they are (continue: best 2)")], "nothing is trained"
    assert again.attrs["hpo:total"] == 2


def test_a_trial_that_waits_goes_on_from_a_parent_that_was_renamed(database: Database, tmp_path: Path) -> None:
    search_without_ray(space_of(tmp_path), database, tmp_path)
    plan = plan_continuation(long_space(tmp_path), None, database, RunsDir(tmp_path))
    study, _ = open_continued(database, plan, RunsDir(tmp_path))  # then it is killed
    rename_parent(database)
    again, _ = search_without_ray(long_space(tmp_path), database, tmp_path)
    assert again.identity == study.identity
    assert [each.partition(" ")[0] for each in parents(again).values()] == ["toy@1", "toy@1"]
    assert [sorted(trial.intermediate_values) for trial in again.trials()] == [[1, 2, 3, 4, 5]] * 2


def test_a_copy_leaves_the_same_trials(database: Database, tmp_path: Path) -> None:
    search_without_ray(space_of(tmp_path), database, tmp_path)
    study, _ = search_without_ray(long_space(tmp_path), database, tmp_path)
    copy_study(study, database, "wider", "0123456789ab")
    copy, listener = search_without_ray(long_space(tmp_path, name="wider"), database, tmp_path)
    assert (copy.name, parents(copy)) == ("wider", parents(study))
    assert listener.events == [("note", "leaves 2 trials as they are (continue: best 2)")]


def test_other_options_decide_anew_also_without_the_parents(database: Database, tmp_path: Path) -> None:
    search_without_ray(space_of(tmp_path), database, tmp_path)
    study, _ = search_without_ray(long_space(tmp_path), database, tmp_path)
    rename_parent(database)
    again, listener = search_without_ray(long_space(tmp_path, "best 3"), database, tmp_path)
    assert again.identity == study.identity
    assert len(parents(again)) == 3
    assert all(parents(again).values()), "the files of a renamed study stay where they are"
    assert ("note", "leaves 1 trial as it is (continue: best 3)") in listener.events
    again, _ = search_without_ray(long_space(tmp_path, "none"), database, tmp_path)
    assert len(parents(again)) == 4, "all are trained"


def test_trials_that_complete_later_do_not_change_what_is_left(database: Database, tmp_path: Path) -> None:
    few = space_of(tmp_path, budget={"trials": 2})
    search_without_ray(few, database, tmp_path)
    study, _ = search_without_ray(long_space(tmp_path, "best 1"), database, tmp_path)
    before = parents(study)
    assert len(before) == 3
    search_without_ray(space_of(tmp_path), database, tmp_path)  # the others complete with few epochs, too
    again, listener = search_without_ray(long_space(tmp_path, "best 1"), database, tmp_path)
    assert parents(again) == before
    assert listener.events == [("note", "leaves 1 trial as it is (continue: best 1)")]


def test_trials_are_ranked_after_the_same_number_of_epochs(database: Database, tmp_path: Path) -> None:
    """After three epochs, two is better; one has five epochs, and its last value is better."""
    values = {x: [expected_value({"x": x}, 0, epoch) for epoch in (SHORT, LONG)] for x in XS}
    one, two = next((a, b) for a in XS for b in XS if values[a][0] < values[b][0] < values[a][1])
    search_without_ray(space_of(tmp_path, parameters={"x": [two]}), database, tmp_path)
    search_without_ray(long_space(tmp_path, parameters={"x": [one]}), database, tmp_path)
    longest = long_space(tmp_path, "best 1", max_epochs=7, parameters={"x": [one, two]})
    study, _ = search_without_ray(longest, database, tmp_path)
    assert parents(study) == {two: "toy@1 #0"}


def test_several_objectives_are_ranked_after_the_same_number_of_epochs() -> None:
    epochs: dict[int, dict[int, tuple[float, ...]]] = {
        1: {1: (1.0, 1.0), 2: (9.0, 0.5)},  # with two epochs, it would dominate the others
        2: {1: (3.0, 3.0)},
        3: {1: (2.0, 4.0)},
        4: {1: (math.nan, 9.0)},
    }
    parent = Parent("toy@1", 0, "0123456789ab", 1, "toy-0123456789ab", "key")
    candidates = [
        Candidate({"x": x}, str(x), found[max(found)], parent, Outlook.CONTINUED, found) for x, found in epochs.items()
    ]
    ranked = rank_candidates(candidates, ["maximize", "minimize"])
    assert [each.key for each in ranked] == ["2", "1", "3", "4"]


@pytest.mark.parametrize("stored", [3, {"options": 3}, {"options": {}, "chosen": [{"params": {"y": 1}}], "left": []}])
def test_what_another_program_has_changed_is_decided_anew(database: Database, tmp_path: Path, stored: Any) -> None:
    search_without_ray(space_of(tmp_path), database, tmp_path)
    study, _ = search_without_ray(long_space(tmp_path), database, tmp_path)
    decision = study.attrs[CONTINUATION]
    study.optuna_study.set_user_attr(CONTINUATION, stored)
    search_without_ray(long_space(tmp_path), database, tmp_path)
    assert named(database, "toy").attrs[CONTINUATION] == decision


def test_of_two_runs_that_decide_at_the_same_time_the_first_one_is_followed(database: Database, tmp_path: Path) -> None:
    runs = RunsDir(tmp_path)
    search_without_ray(space_of(tmp_path, budget={"trials": 2}), database, tmp_path)
    first = plan_continuation(long_space(tmp_path, "best 1"), None, database, runs)
    search_without_ray(space_of(tmp_path), database, tmp_path)
    second = plan_continuation(long_space(tmp_path, "best 1"), None, database, runs)
    assert (len(first.left), len(second.left)) == (1, 3)
    open_continued(database, first, runs)
    study, followed = open_continued(database, second, runs)
    assert ([each.key for each in followed.left], study.attrs["hpo:total"]) == ([first.left[0].key], 3)
    assert settle_continuation(study, None, {"options": {}}) == study.attrs[CONTINUATION], "it was not seen"


def test_what_is_continued_is_not_left_out(database: Database, tmp_path: Path) -> None:
    search_without_ray(space_of(tmp_path), database, tmp_path)
    plan = plan_continuation(long_space(tmp_path), None, database, RunsDir(tmp_path))
    study, plan = open_continued(database, plan, RunsDir(tmp_path))
    reason = f"it was trained for {SHORT} epochs, not {LONG}"
    assert [found.refused for found in find_trials(plan.space, study, database)] == [{reason: 4}]
    (found,) = find_trials(plan.space, study, database, continued=plan.parents)
    assert found.refused == {reason: 2}
    take_over_trials(plan.space, study, [found])
    again = find_trials(plan.space, study, database, continued=plan.parents)
    assert again == [replace(found, trials=())], "it is not read again"


def test_each_source_that_the_file_names_is_listed(database: Database, tmp_path: Path) -> None:
    for name in ("first", "second"):
        search_without_ray(space_of(tmp_path, name), database, tmp_path)
    space = long_space(tmp_path, warm_start=["first", "second"])
    listener = Notes()
    storage = f"sqlite:///{tmp_path}/hpo.db"
    plan_search(space, storage=storage, data_dir=tmp_path, runs_dir=tmp_path, listener=listener)
    assert [text.partition(": ")[0] for text in listener.texts] == [
        "warm start from first",
        "warm start from second",
    ]
    assert all("it was trained for 3 epochs, not 5" in text for text in listener.texts)


def test_a_plan_lists_what_is_continued_and_what_is_left(database: Database, tmp_path: Path) -> None:
    earlier, _ = search_without_ray(space_of(tmp_path), database, tmp_path)
    ranked = sorted(earlier.trials(), key=lambda trial: -(trial.value or 0.0))
    best = {trial.params["x"]: trial.number for trial in ranked[:2]}
    space = long_space(tmp_path)
    for stage in ("before", "after"):
        planned = plan_search(space, storage=f"sqlite:///{tmp_path}/hpo.db", data_dir=tmp_path, runs_dir=tmp_path)
        Console(file=(file := io.StringIO()), width=120).print(
            configuration_table(planned.space, planned.states, planned.outlooks)
        )
        text = file.getvalue()
        states = {int(x): state for x, state in re.findall(r"^ *(\d) +(\w.*\S) *$", text, re.MULTILINE)}
        in_search = {x: f"continued from toy@1 #{n}" if stage == "before" else "COMPLETE" for x, n in best.items()}
        assert states == {x: in_search.get(x, "left as it is") for x in XS}
        stored = "none of them" if stage == "before" else "2 COMPLETE"
        assert f"4 configurations, 2 of which are left as they are; storage has {stored}." in text
        search_without_ray(space, database, tmp_path)
