"""The Python API. tests/end_to_end/test_script_search.py runs a search through it, with Ray."""

from __future__ import annotations

import inspect
import io
import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import optuna
import psutil
import psycopg
import pytest
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution

import hpo
from hpo import api, notes, service
from hpo.errors import SettingError
from hpo.paths import RunsDir
from hpo.search.checkpoints.retention import trials_with_checkpoints
from hpo.search.environment import note_horizon
from storage import tables
from storage.database import open_database
from storage.errors import StorageError
from storage.studies import all_studies, find_revision, open_study
from tests.factories import RecordingListener, run_of, search_without_ray, shipped_space, toy_space, wait_until


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search: two toy trials of three epochs, in `hpo.db`."""
    folder = tmp_path_factory.mktemp("api")
    with open_database(f"sqlite:///{folder}/hpo.db") as database:
        search_without_ray(toy_space(folder), database, folder)
    return folder


@pytest.fixture
def storage(finished: Path) -> str:
    return f"sqlite:///{finished}/hpo.db"


# --- what the package offers ------------------------------------------------------------------------------------------


def test_the_package_offers_the_api() -> None:
    assert {"load_space", "plan_search", "run_search", "read_results", "list_studies"} <= set(hpo.__all__)
    for name in hpo.__all__:
        assert getattr(hpo, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'run_serach'"):
        _ = hpo.run_serach


@pytest.mark.parametrize("name", [name for name in hpo.__all__ if name.islower()])
def test_each_function_documents_its_arguments(name: str) -> None:
    function = getattr(hpo, name)
    text = inspect.getdoc(function) or ""
    _, _, arguments = text.partition("\nArgs:\n")
    documented = re.findall(r"^    (\w+): ", re.split(r"\n(?=\w)", arguments)[0], re.MULTILINE)
    assert documented == list(inspect.signature(function).parameters)
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty


# --- a cluster --------------------------------------------------------------------------------------------------------


def test_only_what_a_search_needs_is_sent_to_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("mine.py", "url", "results", "runs/hpo", "checkpoints/1", "sets/raw")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.setenv("HPO_STORAGE_FILE", "url")
    runs, data = RunsDir(tmp_path / "runs", tmp_path / "checkpoints"), {"data_dir": "sets"}
    package = service._pack_code(toy_space(tmp_path), "sqlite:///results", runs, data)
    assert package is not None
    with ZipFile(io.BytesIO(package)) as opened:
        found = {name.partition("/")[2] for name in opened.namelist()}
    assert found == {"", "mine.py", "toy.yaml"}
    assert service._pack_code(shipped_space("grid"), "sqlite:///results", runs, data) is None, "hpo is installed there"


# --- what hpo does not write ------------------------------------------------------------------------------------------

ESCAPE = "char(27) || ']0;title' || char(7)"
STRANGE_CONTENT = {
    "a text instead of a value": f"UPDATE trial_values SET value = {ESCAPE}",
    "an unknown type of value": f"UPDATE trial_values SET value_type = {ESCAPE}",
    "a text instead of a metric": f"UPDATE hpo_metrics SET value = {ESCAPE}",
    "a text instead of an epoch": f"UPDATE hpo_metrics SET epoch = {ESCAPE} WHERE epoch = 1",
    "a fraction instead of an epoch": "UPDATE hpo_metrics SET epoch = 1.5 WHERE epoch = 1",
    "bytes instead of a metric's name": "UPDATE hpo_metrics SET name = x'00ff' WHERE rowid = 1",
    "a text instead of a trial's number": f"UPDATE trials SET number = {ESCAPE} WHERE number = 1",
    "an unknown state": f"UPDATE trials SET state = {ESCAPE}",
    "a time that is none": f"UPDATE trials SET datetime_start = {ESCAPE}",
    "a distribution that is no JSON": f"UPDATE trial_params SET distribution_json = {ESCAPE}",
    "a distribution that is a list": "UPDATE trial_params SET distribution_json = '[]'",
    "a distribution without a name": "UPDATE trial_params SET distribution_json = '{}'",
    "an unknown distribution": """UPDATE trial_params SET distribution_json = '{"name": "x", "attributes": {}}'""",
    "the provenance of a run that is a list": "UPDATE hpo_runs SET provenance = '[1]'",
    "the provenance of a trial that is a list": "UPDATE hpo_trials SET provenance = '[1]'",
    "a provenance that is no JSON": "UPDATE hpo_trials SET provenance = '{'",
    "the time of a run that is a text": "UPDATE hpo_runs SET started = 'x', last_heard = 'x', lease_until = 'x'",
    "settings that are no JSON": "UPDATE study_user_attributes SET value_json = '{' WHERE key = 'hpo:settings'",
    "settings without an end": "UPDATE study_user_attributes SET value_json = replace(hex(zeroblob(50000)), '00', '[')",
    "a number with too many digits": "UPDATE study_user_attributes SET value_json = hex(zeroblob(5000)) || 1",
    "an unknown direction": "UPDATE study_directions SET direction = 'x'",
    "no direction": "DELETE FROM study_directions",
}


@pytest.mark.parametrize("what", STRANGE_CONTENT)
def test_what_hpo_does_not_write_is_one_message(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    storage = f"sqlite:///{shutil.copy(finished / 'hpo.db', tmp_path)}"
    with sqlite3.connect(tmp_path / "hpo.db") as connection:
        connection.execute(STRANGE_CONTENT[what])
    connection.close()
    monkeypatch.setattr("hpo.search.replay.run_trial", lambda _: iter(()))
    verbs: dict[str, Callable[[], object]] = {
        "list": lambda: api.list_studies(storage=storage),
        "report": lambda: api.write_report(api.read_results("toy", storage=storage), runs_dir=tmp_path),
        "clean": lambda: api.clean_runs(storage=storage, runs_dir=tmp_path),
        "retry": lambda: api.retry_trials("toy", storage=storage),
        "replay": lambda: api.replay_trial("toy", 0, storage=storage, run_stored_code=True),
    }
    errors: dict[str, StorageError] = {}
    for verb, call in verbs.items():
        try:
            call()
        except StorageError as error:
            errors[verb] = error
    assert "report" in errors
    for each in errors.values():
        assert re.search(r"holds what hpo does not write \(\w+: .+\); restore a copy, or delete the study", str(each))
        assert each.__cause__ is not None


def test_attributes_of_another_shape_do_not_stop_a_report(finished: Path, tmp_path: Path) -> None:
    storage = f"sqlite:///{shutil.copy(finished / 'hpo.db', tmp_path)}"
    with sqlite3.connect(tmp_path / "hpo.db") as connection:
        connection.execute("UPDATE hpo_runs SET provenance = '{\"packages\": [1]}'")
        connection.execute("UPDATE hpo_metrics SET value = 9e999")
        connection.execute("UPDATE study_user_attributes SET value_json = 'null'")
    connection.close()
    assert api.write_report(api.read_results("toy", storage=storage), runs_dir=tmp_path).exists()


# --- a search ---------------------------------------------------------------------------------------------------------


def test_a_finished_search_is_read_back_without_running_it(finished: Path, storage: str) -> None:
    heard: list[Any] = []
    result = api.run_search(toy_space(finished), storage=storage, runs_dir=finished / "runs", on_results=heard.append)
    assert [(trial.number, trial.params, trial.state) for trial in result.trials] == [
        (0, {"x": 1}, "COMPLETE"),
        (1, {"x": 2}, "COMPLETE"),
    ]
    for trial in result.trials:
        assert list(trial.epochs) == [1, 2, 3]
        assert trial.values == (trial.epochs[3]["value"],)
    assert result.best is not None
    assert result.best.values[0] == max(trial.values[0] for trial in result.trials)
    assert (result.stop_reason, result.interrupted) == ("", False)
    assert heard == [result.results]
    assert result.report is not None
    assert result.report.is_relative_to(finished / "runs")


def test_a_finished_search_stores_what_has_changed(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/hpo.db"
    drawn: dict[str, Any] = {"parameters": {"x": {"type": "int", "low": 1, "high": 9}}, "sampler": "random"}
    with open_database(storage) as database:
        study, _ = search_without_ray(toy_space(tmp_path, **drawn, budget={"trials": 3}), database, tmp_path)
    folder = RunsDir(tmp_path).checkpoints(study.unique_name)
    assert len(trials_with_checkpoints(folder)) == 3
    space = toy_space(tmp_path, **drawn, budget={"trials": 2}, checkpoints={"keep": "best 1"})
    listener = RecordingListener()
    result = api.run_search(space, storage=storage, runs_dir=tmp_path, listener=listener)
    assert result.best is not None
    assert trials_with_checkpoints(folder) == [result.best.number]
    assert any("is now best 1" in text for _, text in listener.events)
    assert [each.state for each in api.list_studies(storage=storage)] == ["finished"]
    with open_database(storage) as database:
        (study,) = all_studies(database)
        assert study.attrs["hpo:total"] == 2
        assert study.settings["checkpoints"] == {"keep": "best 1"}


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ({"gpu_hours": 1.5}, "budget.gpu_hours is spent: the trials have used 2 of 1.5 device-hours"),
        ({"cost": {"gpu_hour": 5, "limit": 10}}, "budget.cost.limit is spent: the trials have cost 10 of 10"),
        ({"time": 1e-9}, "the time budget is spent"),
    ],
)
def test_a_budget_that_is_spent_already_is_one_message_without_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: dict[str, Any], reason: str
) -> None:
    storage, space = f"sqlite:///{tmp_path}/hpo.db", toy_space(tmp_path)
    with open_database(storage) as database, run_of(open_study(database, **space.study_options), space) as run:
        run.enqueue(space.grid_points(), space.distributions())
        claim = run.claim()
        assert claim is not None
        run.release(claim)
        with database.engine.begin() as connection:
            connection.execute(sa.text("UPDATE hpo_usage SET seconds = 7200.0"))
    monkeypatch.setattr("hpo.search.cluster.connection.RayCluster.start", lambda _: pytest.fail("Ray was started"))
    less = toy_space(tmp_path, budget=budget)
    result = api.run_search(less, storage=storage, runs_dir=tmp_path)
    assert (result.stop_reason, result.interrupted) == (reason, False)
    assert [trial.state for trial in result.trials] == ["WAITING"]
    (summary,) = api.list_studies(storage=storage, runs_dir=tmp_path)
    assert (summary.state, summary.device_seconds) == ("resumable", 7200.0)
    planned = api.plan_search(less, storage=storage)
    assert (planned.device_seconds, planned.spent) == (7200.0, reason)
    assert api.plan_search(toy_space(tmp_path), storage=storage).spent == ""
    with open_database(storage) as database:
        assert all_studies(database)[0].settings["budget"] == less.budget.model_dump(), "the new budget is stored"


def test_results_become_a_dataframe(storage: str) -> None:
    results = api.read_results("toy", storage=storage)
    frame = results.to_dataframe()
    assert frame["number"].tolist() == [0, 1]
    assert frame["params_x"].tolist() == [1, 2]
    assert frame["state"].tolist() == ["COMPLETE", "COMPLETE"]
    assert frame["value"].tolist() == [trial.values[0] for trial in results.trials]
    assert results.best is not None
    assert frame["value"].max() == results.best.values[0]
    assert api.SearchResult(results).to_dataframe().equals(frame)


def test_a_study_without_a_completed_trial_has_no_best_one(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        search_without_ray(toy_space(tmp_path, metric="no_such_metric"), database, tmp_path)
    results = api.read_results("toy", storage=f"sqlite:///{tmp_path}/hpo.db")
    assert [trial.state for trial in results.trials] == ["FAIL", "FAIL"]
    assert api.SearchResult(results).best is None


def test_a_search_needs_a_runs_folder_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(SettingError, match="cannot write to"):
        api.run_search(toy_space(tmp_path), storage=f"sqlite:///{tmp_path}/hpo.db", runs_dir=tmp_path / "runs")
    assert not (tmp_path / "hpo.db").exists()


def test_a_schedule_that_a_scheduler_misjudges_is_noted_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise SettingError("far enough")

    monkeypatch.setattr(service, "start_probes", fail)
    listener = RecordingListener()
    space = shipped_space("quick", "scheduler=asha", "parameters.schedule=cosine")
    with pytest.raises(SettingError, match="far enough"):
        api.run_search(space, storage=f"sqlite:///{tmp_path}/hpo.db", runs_dir=tmp_path / "runs", listener=listener)
    assert listener.events == [("note", note_horizon(space))]


# --- a plan -----------------------------------------------------------------------------------------------------------


def test_what_is_kept_from_now_on_is_noted(tmp_path: Path) -> None:
    listener = RecordingListener()
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        for keep in ("best 3", "best 3", "none"):
            space = toy_space(tmp_path, checkpoints={"keep": keep})
            notes.note_changes(space, find_revision(database, space.name, space.fingerprint), listener)
            study = open_study(database, **space.study_options)
        settings = study.settings
        settings.pop("checkpoints")
        study.optuna_study.set_user_attr("hpo:settings", settings)
        space = toy_space(tmp_path)
        notes.note_changes(space, find_revision(database, space.name, space.fingerprint), listener)
    assert [text for _, text in listener.events] == [
        "checkpoints.keep was best 3 and is now none; this counts for the trials so far, too",
        "trials of earlier versions of hpo keep all of their checkpoints; `hpo clean` shows which ones to delete",
    ]


def test_another_sampler_or_scheduler_is_noted(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"sampler": "random", "scheduler": {"name": "asha", "grace_period": 2}},
        {"sampler": "random", "scheduler": {"name": "asha", "grace_period": 2}},
        {"sampler": "random", "scheduler": {"name": "asha", "grace_period": 1}},
        {"sampler": {"name": "qmc", "scramble": True}},
    ]
    listener = RecordingListener()
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        for change in changes:
            space = toy_space(tmp_path, budget={"trials": 4}, **change)
            notes.note_changes(space, find_revision(database, space.name, space.fingerprint), listener)
            open_study(database, **space.study_options)
    assert [text for _, text in listener.events] == [
        "the scheduler's grace_period was 2 and is now 1; the trials so far are kept",
        "the sampler was random and is now qmc; the trials so far are kept",
        "the scheduler was asha and is now none; the trials so far are kept",
    ]


def test_a_plan_counts_what_storage_holds(finished: Path, storage: str) -> None:
    more = api.plan_search(toy_space(finished, parameters={"x": [1, 2, 3]}), storage=storage)
    assert more.trials_left == 1, "a changed space is a new revision, which takes over two results"
    assert sorted(more.states.values()) == ["COMPLETE", "COMPLETE"]
    longer = api.plan_search(toy_space(finished, max_epochs=9), storage=storage)
    assert (longer.trials_left, longer.states) == (2, {})
    same = api.plan_search(toy_space(finished), storage=storage)
    assert (same.trials_left, same.estimate) == (0, None)
    assert sorted(same.states.values()) == ["COMPLETE", "COMPLETE"]


def test_a_plan_in_a_new_database_knows_earlier_studies_elsewhere(finished: Path, storage: str) -> None:
    source = {"warm_start": [{"study": "toy", "storage": storage}]}
    space = toy_space(finished, "later", parameters={"x": [1, 2, 3]}, **source)
    planned = api.plan_search(space, storage=f"sqlite:///{finished}/new.db")
    assert planned.trials_left == 1
    assert not (finished / "new.db").exists()
    with pytest.raises(SettingError, match="there is no study 'nope': the database does not exist yet"):
        api.plan_search(toy_space(finished, "other", warm_start=["nope"]), storage=f"sqlite:///{finished}/new.db")


def test_trials_of_another_program_do_not_use_up_a_search(tmp_path: Path) -> None:
    url, space = f"sqlite:///{tmp_path}/hpo.db", toy_space(tmp_path)
    with open_database(url) as database:
        study = open_study(database, **space.study_options)
        for _ in range(2):
            study.optuna_study.add_trial(optuna.trial.create_trial(value=0.5))
        assert api.plan_search(space, storage=url).trials_left == 2
        # A trial that is no point of the grid ends first.
        by_hand = optuna.trial.create_trial(
            state=optuna.trial.TrialState.WAITING,
            params={"x": 99},
            distributions={"x": optuna.distributions.CategoricalDistribution([99])},
        )
        study.optuna_study.add_trial(by_hand)
        with run_of(study, space) as run:
            run.enqueue(space.grid_points(), space.distributions())
            for _ in range(2):
                claim = run.claim()
                assert claim is not None
                run.complete(claim, 0.5)
        assert [trial.params.get("x") for trial in study.trials() if trial.state.name == "COMPLETE"][2:] == [99, 1]
        assert api.plan_search(space, storage=url).trials_left == 1
        search_without_ray(space, database, tmp_path)
        assert api.plan_search(space, storage=url).trials_left == 0


def test_a_plan_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = toy_space(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = list(tmp_path.rglob("*"))
    planned = api.plan_search(space)
    assert (planned.trials_left, planned.states, planned.estimate) == (2, {}, None)
    assert planned.slots.count >= 1
    assert list(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("study", ["mine", "toy"])
def test_a_plan_and_a_list_do_not_change_a_database_of_optuna(tmp_path: Path, study: str) -> None:
    """Even where a study of another program has the name of the search."""
    url, space = f"sqlite:///{tmp_path}/hpo.db", toy_space(tmp_path)
    optuna.create_study(study_name=study, storage=url)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    planned = api.plan_search(space, storage=url)
    assert (planned.trials_left, planned.states) == (2, {})
    assert [(summary.name, summary.state) for summary in api.list_studies(storage=url)] == [(study, "")]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_plan_and_a_list_do_not_change_a_database_without_tables(tmp_path: Path) -> None:
    file, space = tmp_path / "hpo.db", toy_space(tmp_path)
    file.touch()
    before = sorted(tmp_path.iterdir())
    assert api.plan_search(space, storage=f"sqlite:///{file}").trials_left == 2
    assert api.list_studies(storage=f"sqlite:///{file}") == []
    assert sorted(tmp_path.iterdir()) == before
    assert file.read_bytes() == b""


def test_a_plan_and_a_list_see_a_running_search(tmp_path: Path) -> None:
    """Its results are in the WAL, not in the file."""
    url, space = f"sqlite:///{tmp_path}/hpo.db", toy_space(tmp_path)
    with open_database(url) as database, run_of(open_study(database, **space.study_options), space) as run:
        run.enqueue(space.grid_points(), space.distributions())
        claim = run.claim()
        assert claim is not None
        run.complete(claim, 0.5)
        run.flush()
        files = [tmp_path / "hpo.db", tmp_path / "hpo.db-wal"]
        before = [path.read_bytes() for path in files]
        assert api.plan_search(space, storage=url).trials_left == 1
        (summary,) = api.list_studies(storage=url)
        assert (summary.state, summary.counts) == ("running", {"COMPLETE": 1})
        assert [path.read_bytes() for path in files] == before


# --- studies ----------------------------------------------------------------------------------------------------------


def test_studies_are_listed_from_an_existing_database_only(tmp_path: Path, storage: str) -> None:
    (summary,) = api.list_studies(storage=storage)
    assert summary.name == "toy"
    with pytest.raises(StorageError, match="there is no database"):
        api.list_studies(storage=f"sqlite:///{tmp_path}/missing.db")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_study_is_answered_with_the_nearest_name(tmp_path: Path, storage: str) -> None:
    with pytest.raises(SettingError, match=r"there is no study 'tyo' in sqlite:///.*: did you mean toy\?"):
        api.read_results("tyo", storage=storage)
    open_database(f"sqlite:///{tmp_path}/empty.db").close()
    with pytest.raises(SettingError, match=r"there is no study 'toy' in .*: it has none yet"):
        api.read_results("toy", storage=f"sqlite:///{tmp_path}/empty.db")


@pytest.mark.parametrize("resume", [False, True])
def test_a_failed_trial_is_retried_from_its_start_or_its_checkpoint(tmp_path: Path, *, resume: bool) -> None:
    """With `raise_once`, the second attempt works. Its checkpoint of epoch 1 is used only with `resume`."""
    url = f"sqlite:///{tmp_path}/hpo.db"
    space = toy_space(
        tmp_path,
        trainable="benchmarks.toy:failing",
        max_epochs=2,
        parameters={"how": ["raise_once", "raise"], "folder": str(tmp_path)},
    )
    with open_database(url) as database:
        study, _ = search_without_ray(space, database, tmp_path)
        assert [trial.state.name for trial in study.trials()] == ["FAIL", "FAIL"]
        assert api.retry_trials("toy", resume=resume, storage=url) == [0, 1]
        _, listener = search_without_ray(space, database, tmp_path)
        assert [trial.state.name for trial in study.trials()] == ["COMPLETE", "FAIL"]
    assert [event for event in listener.events if event[0] in {"epoch", "note"} and event[1] == 0] == [
        ("epoch", 0, epoch) for epoch in ([2] if resume else [1, 2])
    ]
    with pytest.raises(SettingError, match="trial 0 of study toy has not failed; failed trials: 1"):
        api.retry_trials("toy", [0, 1], storage=url)


def test_a_retried_trial_uses_no_checkpoint_that_an_older_copy_of_the_database_does_not_know(tmp_path: Path) -> None:
    url, parameters = f"sqlite:///{tmp_path}/hpo.db", {"how": ["raise"], "folder": str(tmp_path)}
    space = toy_space(tmp_path, trainable="benchmarks.toy:failing", max_epochs=2, parameters=parameters)

    def retry_and_search() -> list[str]:
        """Return the folders of earlier attempts after a retry from the first epoch."""
        if (tmp_path / "copy.db").exists():
            assert api.retry_trials("toy", storage=url) == [0]
        with open_database(url) as database:
            study, _ = search_without_ray(space, database, tmp_path)
            assert [trial.state.name for trial in study.trials()] == ["FAIL"]
        folder = RunsDir(tmp_path).checkpoints(study.unique_name)
        assert trials_with_checkpoints(folder) == [0]
        return sorted(path.name for path in folder.glob("0.other-*"))

    assert retry_and_search() == []
    shutil.copy(tmp_path / "hpo.db", tmp_path / "copy.db")
    assert retry_and_search() == ["0.other-1"]
    shutil.copy(tmp_path / "copy.db", tmp_path / "hpo.db")
    assert retry_and_search() == ["0.other-1", "0.other-2"]


@pytest.mark.parametrize(("sampler", "parameters"), [("random", {"low": 1, "high": 9}), ("grid", [1, 2, 3])])
def test_retried_trials_are_left_whatever_the_budget_says(tmp_path: Path, sampler: str, parameters: Any) -> None:
    url = f"sqlite:///{tmp_path}/hpo.db"
    x = {"type": "int"} | parameters if isinstance(parameters, dict) else parameters
    options: dict[str, Any] = {"sampler": sampler, "parameters": {"x": x}}
    space = toy_space(tmp_path, budget={"trials": 3}, **options)
    with open_database(url) as database, run_of(open_study(database, **space.study_options), space) as run:
        run.enqueue(space.grid_points() if space.is_grid else [], space.distributions())
        for number in range(3):
            claim = run.claim()
            assert claim is not None
            (run.complete(claim, 0.5) if number == 0 else run.fail(claim, "a bug"))
    smaller = toy_space(tmp_path, budget={"trials": 1}, **options)
    assert api.plan_search(smaller, storage=url).trials_left == 0
    assert api.retry_trials("toy", storage=url) == [1, 2]
    assert api.plan_search(smaller, storage=url).trials_left == 2
    with open_database(url) as database:
        study, _ = search_without_ray(smaller, database, tmp_path)
        assert [trial.state.name for trial in study.trials()] == ["COMPLETE"] * 3
    assert api.plan_search(smaller, storage=url).trials_left == 0


def test_only_failed_trials_of_hpo_are_retried(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/hpo.db"
    with open_database(url) as database:
        search_without_ray(toy_space(tmp_path, max_epochs=1, parameters={"x": [1]}), database, tmp_path)
        optuna.create_study(storage=database.optuna_storage, study_name="theirs")
    assert api.retry_trials("toy", storage=url) == []
    with pytest.raises(SettingError, match="study theirs was not created by hpo"):
        api.retry_trials("theirs", storage=url)


def test_a_trial_is_replayed(storage: str) -> None:
    lines: list[str] = []
    assert api.replay_trial("toy", 1, storage=storage, show=lines.append, run_stored_code=True)
    assert lines[-3:] == [f"epoch {epoch}: 1 metrics equal" for epoch in (1, 2, 3)]
    with pytest.raises(SettingError, match=r"study toy has no trial 7 with epochs.*: 0, 1"):
        api.replay_trial("toy", 7, storage=storage, run_stored_code=True)


@pytest.mark.parametrize(
    "change",
    ["nothing", "command", "command and hpo:id", "command and no hpo:id", "command and name", "value", "derived"],
)
def test_code_that_only_the_database_names_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Whoever can write to the database must not thereby run programs."""
    monkeypatch.chdir(tmp_path)
    storage = f"sqlite:///{tmp_path}/hpo.db"
    harmless, attack = "echo {x}", f"touch {tmp_path}/ran"
    keys: dict[str, Any] = {"command": harmless, "trainable": "hpo.train:train", "metric": "value"}
    (tmp_path / "elsewhere").mkdir()
    spaces = {"ours": keys, "theirs": keys | {"command": attack}}
    (tmp_path / "search_spaces").mkdir()
    for folder, name in (("search_spaces", "ours"), ("elsewhere", "theirs")):
        space = {"sampler": "grid", "max_epochs": 1, "parameters": {"x": [1, 2]}, **spaces[name]}
        del space["trainable"]
        (tmp_path / folder / "toy.yaml").write_text(json.dumps(space))
    with open_database(storage) as database:
        study = open_study(database, **hpo.load_space("toy").study_options)
        settings, optuna_study = study.settings, study.optuna_study
        optuna_study.add_trial(
            optuna.create_trial(
                params={"x": f"; {attack}" if change == "value" else 1},
                distributions={"x": CategoricalDistribution([1, 2, f"; {attack}"])},
                intermediate_values={1: 0.5},
                value=0.5,
                user_attrs={"derived": {"x": attack}} if change == "derived" else {},
            )
        )
        with database.engine.begin() as connection:
            connection.execute(tables.trials.insert(), [{"trial": 1, "study": study.study_id, "key": "k"}])
            connection.execute(tables.metrics.insert(), [{"trial": 1, "epoch": 1, "name": "value", "value": 0.5}])
        if change.startswith("command"):
            name = str(tmp_path / "elsewhere/toy.yaml") if change.endswith("name") else "toy"
            optuna_study.set_user_attr("hpo:settings", {**settings, "command": attack, "name": name})
        if change.endswith(" hpo:id"):
            value = "x" if change.endswith("and hpo:id") else None
            optuna_study.set_user_attr("hpo:id", value)
    reason = {
        "nothing": "the trial failed this time",  # `echo` reports nothing
        "derived": "the trial failed this time",
        "command and hpo:id": "was not created by hpo",
        "command and no hpo:id": "was not created by hpo",
    }.get(change, "Only the database says so")
    with pytest.raises(SettingError, match=reason):
        api.replay_trial("toy", 0, storage=storage)
    assert not (tmp_path / "ran").exists()


def test_what_is_replayed_is_what_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database changes between the check and the training."""
    monkeypatch.chdir(tmp_path)
    storage = f"sqlite:///{tmp_path}/hpo.db"
    (tmp_path / "search_spaces").mkdir()
    space = toy_space(tmp_path / "search_spaces")
    with open_database(storage) as database:
        study, _ = search_without_ray(space, database, tmp_path)
        settings = study.settings

        def change_settings() -> dict[str, Any]:
            study.optuna_study.set_user_attr("hpo:settings", settings | {"command": f"touch {tmp_path}/ran"})
            return {"code": "", "packages": {}, "python": ""}

        monkeypatch.setattr(api, "describe_environment", change_settings)
        assert api.replay_trial("toy", 0, storage=storage)
    assert not (tmp_path / "ran").exists()


def count_connections(url: str) -> int:
    if url.startswith("sqlite:"):
        return sum(file.path == url.removeprefix("sqlite:///") for file in psutil.Process().open_files())
    with psycopg.connect(url) as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        return int(connection.execute(query).fetchone()[0])  # type: ignore[index]


def test_what_the_api_returns_holds_no_connection(url: str, tmp_path: Path) -> None:
    with open_database(url) as database:
        space = toy_space(tmp_path)
        search_without_ray(space, database, tmp_path)
        theirs = optuna.create_study(
            storage=database.optuna_storage, study_name="theirs", directions=["maximize", "minimize"]
        )
        for values in ([1.0, 2.0], [0.0, 3.0]):
            theirs.add_trial(optuna.create_trial(values=values))

    def read_and_write() -> tuple[Any, ...]:
        results = api.read_results("theirs", storage=url)
        assert [trial.number for trial in results.ranked] == [0, 1]
        api.write_report(results, runs_dir=tmp_path / "runs")
        return results, api.read_results("toy", storage=url)

    kept: list[Any] = [
        read_and_write(),
        api.run_search(space, storage=url, runs_dir=tmp_path / "runs"),
        api.retry_trials("toy", storage=url),
        api.replay_trial("toy", 1, storage=url, run_stored_code=True),
        api.list_studies(storage=url),
    ]
    with pytest.raises(SettingError, match="only the network of"):
        api.export_model("toy", storage=url)
    with pytest.raises(SettingError, match="there is no study"):
        api.read_results("missing", storage=url)
    wait_until(lambda: count_connections(url) == 0)  # the server notices a moment later
    results = kept[0][1]
    with results.study.database:
        assert [trial.number for trial in results.study.trials()] == [0, 1], "it connects again"


def test_a_report_is_written_again(finished: Path, storage: str) -> None:
    page = api.write_report(api.read_results("toy", storage=storage), runs_dir=finished / "again")
    assert page.is_relative_to(finished / "again")
    assert "toy" in page.read_text()
