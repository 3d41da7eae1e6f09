"""What `on_finish` receives, once, and from which driver. test_delivery.py has how, and test_resume.py a real search."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import create_trial

from hpo import delivery
from hpo.announcement import Announcer, describe_end
from hpo.errors import SettingError, TrainableError
from hpo.report.reading import read_results
from hpo.search.stop import Stop, StopCause
from hpo.service import run_search
from storage.database import Database
from storage.errors import StorageError
from tests.factories import ROOT, RecordingListener, toy_space
from tests.report.studies import finish_grid, grid_space

URL = "https://hooks.example/secret"
INTERRUPTED, TIME_SPENT = Stop(StopCause.INTERRUPTED), Stop(StopCause.TIME_SPENT)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What recipients receive."""
    endings: list[dict[str, Any]] = []

    def deliver(_: object, ending: dict[str, Any]) -> str:
        endings.append(json.loads(json.dumps(ending, allow_nan=False)))
        return ""

    monkeypatch.setattr(delivery, "deliver", deliver)
    return endings


def announce(database: Database, stopped: Stop | None, **changes: Any) -> None:
    """What a driver does at the end of the search `grid`."""
    space = grid_space(**changes)
    with Announcer(URL, space, database.url, RecordingListener()) as announcer:
        study = finish_grid(database, **changes)
        announcer.search_ended(read_results(study), stopped, 0, Path("/report/index.html"))


def test_a_finished_search_is_described(database: Database, told: list[dict[str, Any]]) -> None:
    announce(database, None)
    (ending,) = told
    assert {name: ending[name] for name in ("study", "revision", "state", "cause", "exit_code", "study_state")} == {
        "study": "grid",
        "revision": 1,
        "state": "finished",
        "cause": "",
        "exit_code": 0,
        "study_state": "finished",
    }
    assert (ending["storage"], ending["report"], ending["trials"]) == (
        database.url,
        "/report/index.html",
        {"COMPLETE": 3},
    )
    value = ending["best"]["value"]
    assert ending["best"] == {
        "trial": 0,
        "value": value,
        "values": {"val_accuracy": value},
        "params": {"batch_size": 64, "lr": 0.01},
    }
    assert ending["text"] == f"grid finished: best val_accuracy {value} (trial 0); 3 COMPLETE"


def test_the_documentation_names_what_is_told(database: Database) -> None:
    (block,) = re.findall(
        r"^```json\n(.*?)^```$", (ROOT / "search_spaces/README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    ending = describe_end(read_results(finish_grid(database)), None, 0, None)
    assert list(json.loads(block)) == sorted(ending, key=list(json.loads(block)).index)
    assert json.loads(block)["best"].keys() == ending["best"].keys()


def test_a_password_is_left_out_of_the_url_of_the_storage(database: Database) -> None:
    object.__setattr__(database, "url", "postgresql+psycopg://me:***@host/hpo")
    ending = describe_end(read_results(finish_grid(database)), None, 0, None)
    assert ending["storage"] == "postgresql+psycopg://me@host/hpo"


@pytest.mark.parametrize(
    ("stopped", "state"),
    [
        (INTERRUPTED, "stopped"),
        (TIME_SPENT, "stopped"),
        (Stop(StopCause.BROKEN, "the last 4 trials failed"), "failed"),
    ],
)
def test_the_cause_of_a_stop_is_told(database: Database, told: list[dict[str, Any]], stopped: Stop, state: str) -> None:
    announce(database, stopped)
    assert [(ending["state"], ending["cause"]) for ending in told] == [(state, str(stopped))]
    assert told[0]["text"].startswith(f"grid {state}: {stopped}; best val_accuracy")


def test_numbers_that_json_does_not_have_are_null(database: Database) -> None:
    results = read_results(finish_grid(database))
    results.trials[0].__dict__.update(values=(math.inf,), params={"lr": math.nan})
    ending = describe_end(results, None, 0, None)
    assert (ending["best"]["value"], ending["best"]["params"]) == (None, {"lr": "nan"})


def test_of_several_drivers_the_first_one_announces_that_the_search_has_finished(
    database: Database, told: list[dict[str, Any]]
) -> None:
    for _ in range(3):
        announce(database, None)
    assert len(told) == 1
    announce(database, None, max_epochs=5)  # another revision
    assert [ending["revision"] for ending in told] == [1, 2]


def test_of_several_drivers_one_announces_that_a_budget_is_spent_and_each_that_it_was_stopped(
    database: Database, told: list[dict[str, Any]]
) -> None:
    for _ in range(2):
        announce(database, TIME_SPENT, budget={"time": 60})
        announce(database, INTERRUPTED)
    announce(database, TIME_SPENT, budget={"time": 90})
    causes = [ending["cause"] for ending in told]
    assert causes == [str(TIME_SPENT), "interrupted", "interrupted", str(TIME_SPENT)]


def test_an_end_without_a_better_value_is_announced_once_until_another_trial_has_ended(
    database: Database, told: list[dict[str, Any]]
) -> None:
    stopped = Stop(StopCause.NO_IMPROVEMENT)
    for _ in range(2):
        announce(database, stopped)
    assert [ending["best"]["trial"] for ending in told] == [0]
    finish_grid(database).optuna_study.add_trial(create_trial(value=2.0))
    for _ in range(2):
        announce(database, stopped)
    assert [ending["best"]["trial"] for ending in told] == [0, 3]


def test_a_search_that_cannot_be_announced_once_is_announced_by_each(
    database: Database, told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bool:
        raise StorageError("the database is read-only")

    monkeypatch.setattr("storage.study.Study.is_first", fail)
    announce(database, None)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("error", "state", "cause", "code"),
    [
        (SettingError("no such folder"), "failed", "no such folder", 2),
        (StorageError("the database does not answer"), "failed", "the database does not answer", 2),
        (LookupError("any text may have a password"), "failed", "LookupError", 1),
        (KeyboardInterrupt(), "stopped", "interrupted", 130),
    ],
)
def test_an_error_is_announced_and_raised(
    tmp_path: Path, told: list[dict[str, Any]], error: BaseException, state: str, cause: str, code: int
) -> None:
    storage = "postgresql://me:secret@host/hpo"
    announcer = Announcer(["true"], toy_space(tmp_path), storage, RecordingListener())
    announcer.study_opened(toy_space(tmp_path), "toy@3", storage, {}, 2)
    with pytest.raises(type(error)), announcer:
        raise error
    (ending,) = told
    assert (ending["study"], ending["revision"], ending["storage"]) == ("toy", 3, "postgresql+psycopg://me@host/hpo")
    assert (ending["state"], ending["cause"], ending["exit_code"]) == (state, cause, code)
    assert (ending["trials"], ending["best"], ending["report"]) == (None, None, None)


@pytest.mark.parametrize(("code", "state", "cause"), [(1, "failed", "Ray has ended"), (130, "stopped", "interrupted")])
def test_a_search_that_has_lost_ray_announces_it_before_the_process_ends(
    tmp_path: Path, told: list[dict[str, Any]], code: int, state: str, cause: str
) -> None:
    storage = f"sqlite:///{tmp_path}/hpo.db"
    with Announcer(URL, toy_space(tmp_path), storage, RecordingListener()) as announcer:
        announcer.search_lost("Ray has ended", code)
        (ending,) = told
    assert (ending["state"], ending["cause"], ending["exit_code"]) == (state, cause, code)


def test_a_search_announces_that_it_cannot_start(tmp_path: Path, told: list[dict[str, Any]]) -> None:
    space = toy_space(tmp_path, trainable="no_such_module:train", on_finish=URL)
    with pytest.raises(TrainableError) as caught:
        run_search(space, storage=f"sqlite:///{tmp_path}/hpo.db", runs_dir=tmp_path)
    assert [ending["cause"] for ending in told] == [str(caught.value)]


def test_a_recipient_that_cannot_be_told_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="on_finish: a URL of file:// gets no POST"):
        run_search(toy_space(tmp_path), runs_dir=tmp_path / "runs", on_finish="file:///secret")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("error", "problem"),
    [(None, "status 500"), (KeyboardInterrupt(), "interrupted"), (LookupError("secret"), "LookupError")],
)
def test_what_goes_wrong_is_a_note_without_the_url(
    database: Database, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, problem: str
) -> None:
    def deliver(*_: object) -> str:
        if error is not None:
            raise error
        return "status 500"

    monkeypatch.setattr(delivery, "deliver", deliver)
    listener = RecordingListener()
    with Announcer(URL, grid_space(), database.url, listener) as announcer:
        announcer.search_ended(read_results(finish_grid(database)), None, 0, None)
        announcer.search_ended(read_results(finish_grid(database)), None, 0, None)
    assert listener.events == [
        ("note", f"on_finish: https://hooks.example/...: {problem}. The search itself is not affected")
    ]
