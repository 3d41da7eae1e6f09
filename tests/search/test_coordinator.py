"""The effect of each report of a worker on the study, without Ray."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState, create_trial

from benchmarks.toy import expected_value
from hpo.paths import LOST_FILE, RunsDir
from hpo.search.checkpoints.files import load_checkpoint
from hpo.search.coordinator import TrialCoordinator
from hpo.search.messages import Ending, TrialReport, TrialSpec
from hpo.search.slots import MAX_WANTED, Node, Room, Slots
from hpo.search.stop import StopCause
from hpo.search.worker import end_trial, run_trial
from hpo.space.model import Space
from storage import run as run_module
from storage import usage
from storage.database import Database
from storage.errors import StorageError
from storage.ownership import ClaimedTrial
from storage.pruners import Decision
from storage.retry import retry_trials
from storage.run import Run
from storage.studies import open_study
from storage.study import Study
from tests.factories import (
    Clock,
    RecordingListener,
    run_of,
    search_without_ray,
    take_reports,
    toy_space,
    trial_states,
)
from tests.storage.builders import locked, sql

TWO_SLOTS = Slots(2, 1.0, 0.0)


def coordinator_of(
    space: Space,
    run: Run,
    folder: Path,
    listener: RecordingListener,
    slots: Slots = TWO_SLOTS,
    room: Callable[[], Mapping[str, Room]] | None = None,
) -> TrialCoordinator:
    run.enqueue(space.grid_points(), space.distributions())
    return TrialCoordinator(space, run, slots, data={}, runs_dir=RunsDir(folder), listener=listener, room=room)


def test_last_epoch_that_was_stored_before_a_crash_still_completes_the_trial(study: Study, tmp_path: Path) -> None:
    space, listener = toy_space(tmp_path), RecordingListener()
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, listener)
        spec = coordinator.next_trial("a")
        assert spec is not None
        for report in take_reports(spec, 2):
            assert not coordinator.on_report("a", report)
        claim = coordinator._running["a"].claim
        last = take_reports(spec, 3)[-1]
        run.report(claim, 3, last.metrics, last.metrics["value"])  # the driver is killed here
        run.release(claim)
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, listener)
        spec = coordinator.next_trial("b")
        assert spec is not None
        assert spec.stored_epoch == 3
        assert coordinator.on_report("b", take_reports(spec, 1)[0])
    assert trial_states(study) == ["COMPLETE"]
    assert study.trials()[0].value == expected_value({"x": 1}, 0, 3)


@pytest.mark.parametrize(
    ("every", "text"),
    [
        (2, "its last checkpoint is of epoch 2, so the epochs from 3 to 3 are trained again"),
        (9, "it has no checkpoint, and is trained from its first epoch"),
        (1, None),
    ],
)
def test_a_search_says_which_epochs_are_trained_again(
    study: Study, tmp_path: Path, every: int, text: str | None
) -> None:
    space, listener = toy_space(tmp_path, max_epochs=9, checkpoint_every=every), RecordingListener()
    for tune_id in ("killed", "resumed"):
        with run_of(study, space) as run:
            coordinator = coordinator_of(space, run, tmp_path, listener)
            spec = coordinator.next_trial(tune_id)
            assert spec is not None
            for report in take_reports(spec, 3):
                assert not coordinator.on_report(tune_id, report)
            coordinator.release(tune_id)
    notes = [event[1] for event in listener.events if event[0] == "note"]
    assert notes == ([] if text is None else [f"trial 0: {text}"])


def test_what_may_run_again_is_awaited_while_a_trial_runs(study: Study, tmp_path: Path) -> None:
    """Tune does not ask again after it has heard that the search is done."""
    space, listener = toy_space(tmp_path, parameters={"x": [1, 2]}), RecordingListener()
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, listener)
        spec = coordinator.next_trial("a")
        assert spec is not None
        assert coordinator.next_trial("b") is not None
        coordinator.on_report("b", TrialReport(failure="a bug"))
        assert coordinator.next_trial("c") is None
        assert not coordinator.is_done
        run.flush()
        retry_trials(study, [1])
        for report in take_reports(spec, space.max_epochs):
            coordinator.on_report("a", report)
        run._queue._next_scan = 0.0
        assert coordinator.next_trial("d") is not None, "the trial that `hpo retry` let run again"


def test_stop_releases_the_trial_after_its_epoch_and_claims_no_more(study: Study, tmp_path: Path) -> None:
    space, listener = toy_space(tmp_path), RecordingListener()
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, listener)
        spec = coordinator.next_trial("a")
        assert spec is not None
        coordinator.stop(StopCause.INTERRUPTED)
        assert coordinator.on_report("a", take_reports(spec, 1)[0]) is Ending.SAVE
        assert coordinator.next_trial("b") is None
        assert coordinator.is_done
        run.flush()
        assert trial_states(study) == ["RUNNING"], "nobody takes it while its last epoch is being saved"
        coordinator.on_saved("a", "the disk is full")
        assert trial_states(study) == ["RUNNING"], "after Ctrl-C, all are released together"
        coordinator.release_all()
    assert trial_states(study) == ["WAITING"]
    assert ("note", "trial 0: the disk is full") in listener.events
    assert study.trials()[0].intermediate_values == {1: expected_value({"x": 1}, 0, 1)}


@pytest.mark.parametrize(
    ("deadlines", "text"),
    [
        ({StopCause.TIME_SPENT: 0.0}, "the time budget is spent"),
        ({StopCause.EXIT_TIME: 0.0}, "--exit-after is over"),
        ({StopCause.TIME_SPENT: 1.0, StopCause.EXIT_TIME: 2.0}, "the time budget is spent"),
        ({StopCause.TIME_SPENT: math.inf, StopCause.EXIT_TIME: 2.0}, "--exit-after is over"),
    ],
)
def test_a_deadline_releases_trials(study: Study, tmp_path: Path, deadlines: dict[StopCause, float], text: str) -> None:
    space, listener = toy_space(tmp_path), RecordingListener()
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, listener)
        spec = coordinator.next_trial("a")
        assert spec is not None
        for cause, deadline in deadlines.items():
            coordinator.set_deadline(deadline, cause)
        assert coordinator.on_report("a", take_reports(spec, 1)[0]) is Ending.SAVE
        coordinator.on_saved("a", "")
        assert trial_states(study) == ["WAITING"]
    assert str(coordinator.stopped) == text
    assert trial_states(study) == ["WAITING"]


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ({"gpu_hours": 1.5}, "budget.gpu_hours is spent: the trials have used 1.5 of 1.5 device-hours"),
        ({"cost": {"gpu_hour": 2, "limit": 3}}, "budget.cost.limit is spent: the trials have cost 3 of 3"),
        (
            {"gpu_hours": 1.5, "cost": {"gpu_hour": 2, "limit": 4}},
            "budget.gpu_hours is spent: the trials have used 1.5 of 1.5 device-hours",
        ),
    ],
)
def test_the_end_of_a_budget_of_device_time_releases_trials(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: dict[str, Any], reason: str
) -> None:
    clock = Clock()
    monkeypatch.setattr(usage, "time", clock)
    space, listener = toy_space(tmp_path, budget=budget), RecordingListener()
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, listener)
        spec = coordinator.next_trial("a")
        assert spec is not None
        first, second = take_reports(spec, 2)
        clock.now += 3600.0  # the trial waits for a worker
        coordinator.on_started("a")
        clock.now += 3600.0
        assert coordinator.on_report("a", first) is None
        clock.now += 1800.0
        assert coordinator.on_report("a", second) is Ending.SAVE, "the epoch is stored"
        assert coordinator.next_trial("b") is None
        assert coordinator.is_done
        coordinator.on_saved("a", "")
    assert str(coordinator.stopped) == reason
    assert trial_states(study) == ["WAITING"]
    assert study.device_seconds() == 5400.0
    assert listener.events[-1] == ("WAITING", 0, "interrupted after epoch 2, resumable")
    assert 3600.0 in [event[1] for event in listener.events if event[0] == "used"]
    more = toy_space(tmp_path, budget={"gpu_hours": 2})
    with run_of(study, more) as run:
        coordinator = coordinator_of(more, run, tmp_path, listener)
        assert coordinator.next_trial("c") is not None, "with a larger budget, the search continues"
        coordinator.release_all()


def test_the_device_time_of_other_drivers_counts(study: Study, tmp_path: Path) -> None:
    space = toy_space(tmp_path, budget={"gpu_hours": 1})
    with run_of(study, space) as other, run_of(study, space) as run:
        other.enqueue(space.grid_points(), space.distributions())
        assert other.claim() is not None
        with study.database.engine.begin() as connection:
            connection.execute(sa.text("UPDATE hpo_usage SET seconds = 3600.0"))
        coordinator = coordinator_of(space, run, tmp_path, RecordingListener())
        assert coordinator.next_trial("a") is None
        assert coordinator.is_done
    assert coordinator.stopped is not None
    assert coordinator.stopped.cause is StopCause.GPU_HOURS_SPENT


@pytest.mark.parametrize("ending", ["complete", "crash", "lost"])
def test_a_trial_that_no_worker_runs_uses_no_device(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    clock = Clock()
    monkeypatch.setattr(usage, "time", clock)
    space = toy_space(tmp_path, max_epochs=1)
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, RecordingListener())
        spec = coordinator.next_trial("a")
        assert spec is not None
        coordinator.on_started("a")
        clock.now += 60.0
        report = take_reports(spec, 1)[0]
        match ending:
            case "complete":
                assert coordinator.on_report("a", report)
            case "crash":
                coordinator.on_crash("a", "", is_retried=True)
            case "lost":
                assert coordinator.on_report("a", replace(report, is_taken_over=True))
        clock.now += 60.0
        assert run.device_seconds() == 60.0
    assert study.device_seconds() == 60.0


BROKEN = TrialReport(failure="ModuleNotFoundError: No module named 'helpers'")


def test_a_search_without_a_better_value_ends_when_its_last_trial_has_ended(study: Study, tmp_path: Path) -> None:
    parameters = {"x": [1, 2, 3, 4, 5]}
    space, listener = (
        toy_space(tmp_path, parameters=parameters, budget={"patience": 2}, max_epochs=1),
        RecordingListener(),
    )
    slots = Slots(2, 1.0, 0.0)
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, listener, slots)

        def end(tune_id: str, value: float) -> None:
            claim = coordinator._running[tune_id].claim
            run.report(claim, 1, {"value": value}, value)
            run.complete(claim, value)
            coordinator._end(tune_id, "COMPLETE", "")

        for tune_id, value in (("a", 0.5), ("b", 0.5), ("c", 0.75), ("d", 0.5)):
            assert coordinator.next_trial(tune_id) is not None, "a better value starts the count again"
            if tune_id != "d":
                end(tune_id, value)
        assert coordinator.next_trial("e") is not None
        end("d", 0.5)
        run.release(coordinator._running["e"].claim)  # another run may end it
        other = run.claim()
        assert other is not None
        run.report(other, 1, {"value": 0.25}, 0.25)
        run.complete(other, 0.25)
        assert coordinator.next_trial("f") is None
        assert not coordinator.is_done, "e may end with a better value"
        coordinator._running.clear()
        coordinator._next_attempt = 0.0
        assert coordinator.next_trial("f") is None
        assert coordinator.is_done
    assert str(coordinator.stopped) == "budget.patience is spent: 2 trials in a row have not found a better value"


def end_points(run: Run, space: Space, values: tuple[float, ...]) -> ClaimedTrial:
    """Complete the first points of a grid with these values; return the next one, which runs."""
    run.enqueue(space.grid_points(), space.distributions())
    for value in values:
        claim = run.claim()
        assert claim is not None
        run.complete(claim, value)
    run.flush()
    claim = run.claim()
    assert claim is not None
    return claim


def ask(coordinator: TrialCoordinator) -> TrialSpec | None:
    """Ask for a trial, without waiting after the last time."""
    coordinator._next_attempt = 0.0
    return coordinator.next_trial("a")


def patient_space(folder: Path) -> Space:
    return toy_space(folder, parameters={"x": [1, 2, 3, 4]}, budget={"patience": 1}, max_epochs=1)


def test_after_the_patience_is_spent_trials_of_other_drivers_are_awaited(study: Study, tmp_path: Path) -> None:
    space, listener = patient_space(tmp_path), RecordingListener()
    with run_of(study, space) as run, run_of(study, space) as other:
        coordinator = coordinator_of(space, run, tmp_path, listener)
        claim = end_points(other, space, (0.5, 0.25))
        for _ in range(2):
            assert ask(coordinator) is None
            assert coordinator.stopped is None, "the third trial may have a better value"
        note = "budget.patience is spent: trials of other drivers still run, and may find a better value"
        assert listener.events == [("note", note)]
        other.complete(claim, 0.75)
        other.flush()
        spec = ask(coordinator)
        assert spec is not None, "it had a better value"
        assert spec.params == {"x": 4}


def test_a_trial_that_another_driver_is_drawing_when_the_patience_is_spent_is_awaited(
    study: Study, tmp_path: Path
) -> None:
    space = patient_space(tmp_path)
    with run_of(study, space) as run, run_of(study, space) as other:
        coordinator = coordinator_of(space, run, tmp_path, RecordingListener())
        other.complete(end_points(other, space, (0.5,)), 0.25)
        other.flush()
        assert ask(coordinator) is None
        assert coordinator.stopped is None
        claim = other.claim()  # it began to draw before
        assert claim is not None
        assert ask(coordinator) is None
        assert coordinator.stopped is None
        other.complete(claim, 0.25)
        other.flush()
        assert ask(coordinator) is None
        assert coordinator.stopped is not None


def test_a_better_value_of_another_driver_between_two_statements_does_not_end_a_search(
    study: Study, tmp_path: Path
) -> None:
    space = patient_space(tmp_path)
    with run_of(study, space) as run, run_of(study, space) as other:
        coordinator = coordinator_of(space, run, tmp_path, RecordingListener())
        better = end_points(other, space, (0.5, 0.25))
        claim_trial = run.claim

        def complete_then_claim(**arguments: Any) -> ClaimedTrial | None:
            other.complete(better, 0.75)
            other.flush()
            return claim_trial(**arguments)

        run.claim = complete_then_claim  # type: ignore[method-assign]
        assert ask(coordinator) is None
        assert coordinator.stopped is None
        run.claim = claim_trial  # type: ignore[method-assign]
        assert ask(coordinator) is not None


def test_after_the_patience_is_spent_trials_that_wait_are_still_run(study: Study, tmp_path: Path) -> None:
    space = toy_space(tmp_path, parameters={"x": [1, 2, 3, 4]}, budget={"patience": 1}, max_epochs=1)
    listener = RecordingListener()
    with run_of(study, space) as run:
        run.enqueue(space.grid_points(), space.distributions())
        claims = [run.claim() for _ in range(3)]
        for claim, value in zip(claims, (0.5, 0.25), strict=False):
            assert claim is not None
            run.complete(claim, value)
        assert claims[2] is not None
        run.release(claims[2])
        coordinator = coordinator_of(space, run, tmp_path, listener)
        spec = coordinator.next_trial("a")
        assert spec is not None
        assert spec.params == {"x": 3}, "it was interrupted"
        run.fail(coordinator._running["a"].claim, "no")
        coordinator._end("a", "FAIL", "")
        assert coordinator.next_trial("b") is None
        assert coordinator.is_done
    assert trial_states(study) == ["COMPLETE", "COMPLETE", "FAIL"], "the fourth is never created"


def waited(listener: RecordingListener) -> list[Any]:
    return [event for event in listener.events if event[0] == "WAITING"]


def test_after_the_patience_is_spent_the_best_of_those_that_wait_at_a_rung_trains_on(
    study: Study, tmp_path: Path
) -> None:
    """No other trial comes, for which it would wait."""
    changes: dict[str, Any] = {"scheduler": "asha", "max_epochs": 9, "budget": {"patience": 1}}
    space, listener = toy_space(tmp_path, parameters={"x": [1, 2, 3, 4]}, **changes), RecordingListener()
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, listener)
        coordinator._is_patience_spent = lambda: len(waited(listener)) >= 2  # type: ignore[method-assign]
        for tune_id, value in (("a", 0.5), ("b", 0.7)):
            assert coordinator.next_trial(tune_id) is not None
            assert coordinator.on_report(tune_id, TrialReport(1, {"value": value})) is Ending.SAVE_ONLY
            coordinator.on_saved(tune_id, "")
        assert waited(listener)[-1][-1] == "waits after epoch 1: there is little to compare with"
        spec = coordinator.next_trial("c")
        assert spec is not None
        assert (spec.params, spec.stored_epoch) == ({"x": 2}, 1)
        run.fail(coordinator._running["c"].claim, "no")
        coordinator._end("c", "FAIL", "")
        spec = coordinator.next_trial("d")
        assert spec is not None
        assert spec.params == {"x": 1}


def test_a_search_whose_first_trials_all_fail_stops_before_it_burns_the_rest(study: Study, tmp_path: Path) -> None:
    space = toy_space(tmp_path, parameters={"x": list(range(9))})
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, RecordingListener())
        for number in range(4):
            assert coordinator.stopped is None
            assert coordinator.next_trial(str(number)) is not None
            assert coordinator.on_report(str(number), BROKEN)
        assert str(coordinator.stopped) == (
            f"nothing can be trained: the last 4 trials on {BROKEN.node} failed before they trained an epoch"
        )
        assert coordinator.next_trial("4") is None
        assert coordinator.is_done
    assert trial_states(study) == ["FAIL"] * 4


def fail_until_stopped(coordinator: TrialCoordinator, report: TrialReport = BROKEN, most: int = 12) -> int:
    """Claim trials that fail until the search stops; return how many did."""
    for count in range(most):
        if coordinator.stopped:
            return count
        assert coordinator.next_trial(f"fails {count}") is not None
        assert coordinator.on_report(f"fails {count}", report)
    return most


def test_after_an_epoch_more_trials_may_fail_in_a_row(study: Study, tmp_path: Path) -> None:
    """Some configurations cannot be trained, on a machine that works."""
    space = toy_space(tmp_path, parameters={"x": list(range(30))})
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, RecordingListener())
        for tune_id in ("a", "b"):
            spec = coordinator.next_trial(tune_id)
            assert spec is not None
            assert not coordinator.on_report(tune_id, take_reports(spec, 1)[0])
            coordinator.release(tune_id)
            assert fail_until_stopped(coordinator, most=7) == 7, "each new epoch starts the count again"
        assert fail_until_stopped(coordinator) == 1
        assert str(coordinator.stopped).startswith("nothing can be trained: the last 8 trials")


def test_an_epoch_of_a_checkpoint_does_not_show_that_the_machine_works(study: Study, tmp_path: Path) -> None:
    space = toy_space(tmp_path, parameters={"x": list(range(9))})
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, RecordingListener())
        assert coordinator.next_trial("a") is not None
        assert not coordinator.on_report("a", TrialReport(1, {"value": 1.0}, is_recalled=True))
        assert coordinator.on_report("a", BROKEN)
        assert fail_until_stopped(coordinator) == 3


def test_a_machine_that_cannot_train_is_found_among_others(study: Study, tmp_path: Path) -> None:
    space = toy_space(tmp_path, parameters={"x": list(range(20))})
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, RecordingListener())
        for number in range(4):
            assert coordinator.stopped is None
            for tune_id, report in (
                (f"works {number}", TrialReport(1, {"value": 1.0}, node="works")),
                (f"fails {number}", replace(BROKEN, node="broken")),
            ):
                assert coordinator.next_trial(tune_id) is not None
                coordinator.on_report(tune_id, report)
                coordinator.release(tune_id)
        assert str(coordinator.stopped).endswith("the last 4 trials on broken failed before they trained an epoch")


def test_workers_that_die_and_a_metric_that_is_missing_count_too(study: Study, tmp_path: Path) -> None:
    space = toy_space(tmp_path, parameters={"x": list(range(20))})
    for way in ("die", "forget"):
        with run_of(study, space) as run:
            coordinator = coordinator_of(space, run, tmp_path, RecordingListener())
            for number in range(4):
                assert coordinator.stopped is None
                assert coordinator.next_trial(str(number)) is not None
                if way == "die":
                    coordinator.on_crash(str(number), "killed", is_retried=False)
                else:
                    assert coordinator.on_report(str(number), TrialReport(1, {"valeu": 1.0}))
            assert str(coordinator.stopped).startswith("nothing can be trained: the last 4 trials")


def test_a_trial_that_resumes_on_a_full_disk_goes_on_and_is_saved_when_there_is_room(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim of its folder cannot be written: the token of the driver before stays there."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    space, listener = toy_space(tmp_path, max_epochs=6), RecordingListener()
    for tune_id in ("before", "now"):
        with run_of(study, space) as run:
            coordinator = coordinator_of(space, run, tmp_path, listener)
            spec = coordinator.next_trial(tune_id)
            assert spec is not None
            with monkeypatch.context() as patch:
                if tune_id == "now":
                    patch.setattr(os, "fsync", full)
                reports = run_trial(spec)
                for _ in range(3):
                    assert not coordinator.on_report(tune_id, next(reports))
            ending = Ending.SAVE if tune_id == "now" else Ending.KEEP
            coordinator.on_saved(tune_id, end_trial(reports, ending, spec))
            coordinator.release(tune_id)
    assert spec is not None
    note = f"trial 0: no checkpoint after epoch 4: no room for it in {spec.folder} on {platform.node()}. Free some: "
    assert ("note", f"{note}`hpo clean` lists what no search needs") in listener.events
    found = load_checkpoint(Path(spec.folder), spec.key)
    assert found is not None
    assert found.epoch == 5
    assert trial_states(study)[0] == "WAITING"


def test_a_driver_that_lost_a_trial_deletes_no_checkpoint_of_it(study: Study, tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, RecordingListener())
        spec = coordinator.next_trial("a")
        assert spec is not None
        *_, last = take_reports(spec, 3)
        take_reports(replace(spec, token=spec.token + 1, stored_epoch=3), 1)  # the worker of another driver
        before = sorted(Path(spec.folder).iterdir())
        assert coordinator.on_report("a", last), "it does not know yet"
        assert sorted(Path(spec.folder).iterdir()) == before


def test_trial_taken_over_by_another_run_is_dropped_and_not_written(study: Study, tmp_path: Path) -> None:
    space, listener = toy_space(tmp_path), RecordingListener()
    with run_of(study, space) as run, run_of(study, space) as thief:
        coordinator = coordinator_of(space, run, tmp_path, listener)
        spec = coordinator.next_trial("a")
        assert spec is not None
        run.release(coordinator._running["a"].claim)  # as a run does with the trials of one whose lease expired
        taken = thief.claim()
        assert taken is not None
        assert taken.number == 0
        first, second = take_reports(spec, 2)
        assert not coordinator.on_report("a", first), "not known yet"
        run.flush()
        assert coordinator.on_report("a", second)
        assert coordinator.error is None
        assert trial_states(study)[0] == "RUNNING"
        assert not study.trials()[0].intermediate_values
        assert ("note", "trial 0 was taken over by another run, or ended by another program") in listener.events


def test_storage_error_stops_the_search_and_is_kept(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, listener = toy_space(tmp_path), RecordingListener()

    def fail(*_: object) -> None:
        raise StorageError("the disk is full")

    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, listener)
        spec = coordinator.next_trial("a")
        assert spec is not None
        monkeypatch.setattr(run, "report", fail)
        assert coordinator.on_report("a", take_reports(spec, 1)[0]), "Tune sees a trial that ended, not an error"
        assert isinstance(coordinator.error, StorageError)
        assert coordinator.is_done


def test_with_the_database_away_leaving_waits_for_it_once(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fail(name: str) -> Callable[..., None]:
        def raise_error(*_: object) -> None:
            calls.append(name)
            raise StorageError("still unavailable after 600 s")

        return raise_error

    space = toy_space(tmp_path, parameters={"x": [1, 2, 3]})
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, RecordingListener(), Slots(3, 1.0, 0.0))
        for tune_id in "abc":
            assert coordinator.next_trial(tune_id) is not None
        with monkeypatch.context() as patch:
            patch.setattr(run, "flush", fail("flush"))
            patch.setattr(run, "release", fail("release"))
            coordinator.release_all()
        assert calls == ["flush"]
        assert str(coordinator.error) == "still unavailable after 600 s"
        assert trial_states(study) == ["RUNNING"] * 3
        coordinator.release_all()
        assert trial_states(study) == ["WAITING"] * 3


@pytest.mark.parametrize(
    ("keep", "ending"),
    [("best 3", Ending.DISCARD), (2, Ending.DISCARD), ("none", Ending.DISCARD), ("all", Ending.SAVE_ONLY)],
)
def test_a_pruned_trial_leaves_the_checkpoints_that_the_search_keeps(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str | int, ending: Ending
) -> None:
    space = toy_space(tmp_path, scheduler="asha", checkpoints={"keep": keep})
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, RecordingListener())
        spec = coordinator.next_trial("a")
        assert spec is not None
        monkeypatch.setattr(run, "decide", lambda *_, **__: Decision.END)
        assert coordinator.on_report("a", take_reports(spec, 1)[0]) is ending


@pytest.mark.slow
def test_after_ctrl_c_leaving_waits_for_a_locked_database_a_few_seconds_in_all(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "EXIT_SECONDS", 5.0)
    space = toy_space(tmp_path, parameters={"x": [1, 2, 3]})
    with contextlib.ExitStack() as stack:
        with run_of(study, space) as run:
            coordinator = coordinator_of(space, run, tmp_path, RecordingListener())
            spec = coordinator.next_trial("a")
            assert spec is not None
            stack.enter_context(locked(Path(str(study.database.engine.url.database))))
            coordinator.on_report("a", take_reports(spec, 1)[0])
            time.sleep(1.0)  # the writer's thread now waits for the lock
            coordinator.stop(StopCause.INTERRUPTED)
            started = time.monotonic()
            coordinator.release_all()
        assert time.monotonic() - started < 5.0 + 2.0
    assert isinstance(coordinator.error, StorageError)


# --- several trials on one GPU ------------------------------------------------------------------------------------------

NO_ROOM = TrialReport(failure="out of memory: OutOfMemoryError: 2 GiB", is_out_of_memory=True)


def claim_until_none(coordinator: TrialCoordinator, names: Iterator[int]) -> dict[str, TrialSpec]:
    claimed: dict[str, TrialSpec] = {}
    while (spec := coordinator.next_trial(tune_id := f"t{next(names)}")) is not None:
        claimed[tune_id] = replace(spec, device="cpu")
    return claimed


def test_a_trial_without_room_next_to_others_is_resumed_with_fewer(study: Study, tmp_path: Path) -> None:
    space, listener, names = toy_space(tmp_path, parameters={"x": [1, 2, 3]}), RecordingListener(), itertools.count()
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, listener, Slots(3, 1.0, 1 / 3))
        first, second, third = claim_until_none(coordinator, names).items()
        for report in take_reports(first[1], 2):
            assert not coordinator.on_report(first[0], report)
        for tune_id, _ in (first, second):  # both find no room at the same time: that is one reason to run fewer
            assert coordinator.on_report(tune_id, NO_ROOM)
        assert listener.events[-1] == ("WAITING", 1, "out of memory next to other trials, it is resumed with fewer")
        ((again, spec),) = claim_until_none(coordinator, names).items()
        assert coordinator.next_trial("more") is None, "two at a time from now on"
        assert not coordinator.is_done
        resumed = take_reports(spec, 2)
        assert [(report.epoch, report.is_recalled) for report in resumed] == [(2, True), (3, False)], "its checkpoint"
        for report in resumed:
            coordinator.on_report(again, report)
        for report in take_reports(third[1], 3):
            coordinator.on_report(third[0], report)
        ((last, spec),) = claim_until_none(coordinator, names).items()
        assert coordinator.on_report(last, take_reports(spec, 3)[-1])
    assert trial_states(study) == ["COMPLETE"] * 3


def test_a_trial_that_finds_no_room_alone_fails_however_many_started(study: Study, tmp_path: Path) -> None:
    space, listener, names = toy_space(tmp_path, parameters={"x": [1, 2, 3, 4]}), RecordingListener(), itertools.count()
    failures = 0
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, listener, Slots(4, 1.0, 0.25))
        running: dict[str, TrialSpec] = {}
        while running := running | claim_until_none(coordinator, names):
            tune_id = next(iter(running))
            assert coordinator.on_report(tune_id, NO_ROOM)
            del running[tune_id]
            failures += 1
            assert failures <= 4 * 4, "each failure of a trial follows a claim with fewer others"
        assert coordinator.is_done
    assert trial_states(study) == ["FAIL"] * 4


@pytest.mark.parametrize("slots", [Slots(2, 1.0, 1.0), Slots(2, 1.0, 0.0)], ids=["a GPU each", "CPU"])
def test_without_neighbours_on_the_gpu_a_trial_without_room_fails(study: Study, tmp_path: Path, slots: Slots) -> None:
    space = toy_space(tmp_path)
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, RecordingListener(), slots)
        assert coordinator.next_trial("a") is not None
        assert coordinator.next_trial("b") is not None
        assert coordinator.on_report("a", NO_ROOM)
    assert trial_states(study) == ["FAIL", "RUNNING"]


def test_a_worker_that_lost_its_gpu_left_the_reason(study: Study, tmp_path: Path) -> None:
    space, listener = toy_space(tmp_path), RecordingListener()
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, listener)
        spec = coordinator.next_trial("a")
        assert spec is not None
        for is_retried in (True, False):
            Path(spec.folder).mkdir(parents=True, exist_ok=True)
            (Path(spec.folder) / LOST_FILE).write_text("RuntimeError: CUDA error: illegal\nmore\nTraceback\n")
            coordinator.on_crash("a", "The actor died unexpectedly", is_retried=is_retried)
        assert not (Path(spec.folder) / LOST_FILE).exists()
    reason = "the GPU could not be used any more, worker ended: RuntimeError: CUDA error: illegal"
    assert ("note", f"trial 0: {reason}; it restarts from its last checkpoint") in listener.events
    assert ("FAIL", 0, f"{reason} (max_failures {space.max_failures})") in listener.events


# --- values of the database that the search space does not allow ------------------------------------------------------


def in_database(name: str, value: Any) -> str:
    return f'{{"name": "CategoricalDistribution", "attributes": {{"choices": [{json.dumps(value)}]}}}}'


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": "/tmp/evil.py"}, "x cannot be '/tmp/evil.py'"),
        ({"checkpoint_dir": "/tmp/evil"}, "it has checkpoint_dir, which is not active"),
    ],
)
@pytest.mark.parametrize("how", ["waiting", "invented"])
def test_what_a_program_wrote_into_a_trial_that_waits_is_not_run(
    database: Database, tmp_path: Path, change: dict[str, Any], reason: str, how: str
) -> None:
    """Whoever can write to the database must not thereby choose what a script or a trainable gets."""
    space = toy_space(tmp_path)
    study = open_study(database, **space.study_options)
    if how == "waiting":
        with run_of(study, space) as run:
            run.enqueue(space.grid_points(), space.distributions())
            claim = run.claim()
            assert claim is not None
            run.release(claim)
    else:
        params = {"x": 1} | change
        distributions: dict[str, BaseDistribution] = {
            name: CategoricalDistribution([value]) for name, value in params.items()
        }
        study.optuna_study.add_trial(create_trial(params=params, distributions=distributions, state=TrialState.WAITING))
    with database.engine.begin() as connection:
        for name, value in change.items() if how == "waiting" else ():
            row = {"name": name, "text": in_database(name, value)}
            connection.execute(sa.text("DELETE FROM trial_params WHERE param_name = :name"), {"name": name})
            columns = "(trial_id, param_name, param_value, distribution_json)"
            connection.execute(sa.text(f"INSERT INTO trial_params {columns} VALUES (1, :name, 0, :text)"), row)
    _, listener = search_without_ray(space, database, tmp_path)
    trials = study.trials()
    failed = [trial for trial in trials if trial.state.name == "FAIL"]
    assert [trial.user_attrs["fail_reason"] for trial in failed] == [f"not in the search space: {reason}"]
    assert all(trial.params in ({"x": 1}, {"x": 2}) for trial in trials if trial not in failed)
    assert study.metrics()[failed[0].number] == {}
    events = [event[0] for event in listener.events if event[1] == failed[0].number]
    assert events == ["started", "FAIL"], "what prints the progress knows those that have started"


# --- a cluster that changes ---------------------------------------------------------------------------------------------


def test_as_many_trials_are_claimed_as_there_is_room_for_now(study: Study, tmp_path: Path) -> None:
    space, listener = toy_space(tmp_path, parameters={"x": [1, 2, 3, 4, 5]}), RecordingListener()
    room = {"": Room(0, 0.0)}
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, listener, room=lambda: room)
        assert coordinator.next_trial("a") is None
        assert not coordinator.is_done
        assert coordinator.follow_cluster() == 5, "the cluster is asked for all of them"
        room = {"": Room(2, 0.0)}
        assert coordinator.follow_cluster() == 0, "two have room, and are not claimed yet"
        assert [coordinator.next_trial(name) is not None for name in "abc"] == [True, True, False]
        assert coordinator.follow_cluster() == 3
        room = {"": Room(1, 0.0)}
        assert coordinator.is_surplus("a")
        coordinator.release("a")
        assert not coordinator.is_surplus("b")
        assert coordinator.follow_cluster() == 4
        assert coordinator.next_trial("d") is None
        coordinator.stop(StopCause.INTERRUPTED)
        assert coordinator.follow_cluster() == 0
    assert [event for event in listener.events if event[0] == "slots"] == [("slots", 2, 0), ("slots", 1, 2)]


@pytest.mark.parametrize(("gpu", "notes"), [("auto", 1), (0, 0)])
def test_gpus_that_join_a_search_on_cpus_are_noted_once(study: Study, tmp_path: Path, gpu: object, notes: int) -> None:
    space, listener = toy_space(tmp_path, resources={"gpu": gpu}), RecordingListener()
    joined = [Node(8, 1, id="a", name="gpu-3 (10.0.0.7, a4bc6c7c)")]
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, listener)
        for unused in ([], joined, joined):
            coordinator.follow_cluster(unused)
    found = [event[1] for event in listener.events if event[0] == "note"]
    assert len(found) == notes
    assert all("node gpu-3 (10.0.0.7, a4bc6c7c) has a GPU" in note for note in found)


def test_a_search_without_an_end_asks_for_a_few_places_at_a_time(study: Study, tmp_path: Path) -> None:
    space = toy_space(
        tmp_path, sampler="random", parameters={"x": {"type": "int", "low": 1, "high": 9}}, budget={"time": "1h"}
    )
    with run_of(study, space) as run:
        coordinator = TrialCoordinator(
            space, run, TWO_SLOTS, data={}, runs_dir=RunsDir(tmp_path), listener=RecordingListener(), room=dict
        )
        assert coordinator.follow_cluster() == MAX_WANTED


def test_a_trial_leaves_a_node_that_is_drained_and_is_resumed(study: Study, tmp_path: Path) -> None:
    space, listener = toy_space(tmp_path), RecordingListener()
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, listener)
        spec = coordinator.next_trial("a")
        assert spec is not None
        assert not coordinator.on_report("a", take_reports(spec, 1)[0])
        assert coordinator.leave_node("a") is Ending.SAVE
        assert coordinator.leave_node("unknown") is None
        coordinator.on_saved("a", "")
        again = coordinator.next_trial("b")
        assert again is not None
        assert again.stored_epoch == 1
    waits = "its machine will leave the cluster, saved after epoch 1, resumable"
    assert listener.events[2:4] == [("WAITING", 0, waits), ("started", 0, 1)]


@pytest.mark.parametrize("is_retried", [True, False])
def test_a_lost_node_counts_neither_as_a_crash_nor_as_device_time(
    study: Study, tmp_path: Path, is_retried: bool
) -> None:
    space, listener = toy_space(tmp_path, max_failures=0), RecordingListener()
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, listener)
        assert coordinator.next_trial("a") is not None
        coordinator.on_started("a")
        coordinator.on_node_lost("a", is_retried=is_retried)
        used = run.device_seconds()
        coordinator.on_node_lost("unknown", is_retried=True)
        coordinator.release_all()
        assert run.device_seconds() == used
    expected = (
        ("note", "trial 0: its machine has left the cluster; it restarts from its last checkpoint")
        if is_retried
        else ("WAITING", 0, "its machine has left the cluster, resumable")
    )
    assert listener.events[1] == expected
    assert trial_states(study) == ["WAITING"]


def test_a_trial_holds_what_its_kind_of_gpu_gives_it(study: Study, tmp_path: Path) -> None:
    space = toy_space(tmp_path, parameters={"x": [1, 2, 3]})
    room = {"T4": Room(1, 1.0), "H100": Room(1, 0.25)}
    with run_of(study, space) as run:
        coordinator = coordinator_of(space, run, tmp_path, RecordingListener(), Slots(0, 1.0, 0.25), lambda: room)
        assert [coordinator.next_trial(name) is not None for name in "abc"] == [True, True, False]
        assert [coordinator.bundle(name)["GPU"] for name in "ab"] == [1.0, 0.25]
    held = "SELECT number, device, devices FROM hpo_usage JOIN trials ON trial_id = trial ORDER BY number"
    assert sql(study.database, held) == [(0, "cuda", 1.0), (1, "cuda", 0.25)]
