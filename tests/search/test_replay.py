"""Replaying a trial. tests/end_to_end replays trained trials."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from hpo.errors import SettingError
from hpo.search.replay import _explain, read_trial, replay
from storage.database import Database
from storage.study import Study
from tests.factories import search_without_ray, shipped_space, toy_space

NOW = {"code": "1", "packages": {"torch": "2"}, "python": "3"}


@pytest.fixture
def searched(database: Database, tmp_path: Path) -> Study:
    """Two toy trials of three epochs. Their run recorded no versions."""
    return search_without_ray(toy_space(tmp_path), database, tmp_path)[0]


def replayed(study: Study, number: int, folder: Path, **environment: Any) -> tuple[bool, list[str]]:
    lines: list[str] = []
    recorded: dict[str, Any] = dict.fromkeys(NOW)
    trial = read_trial(study, number)
    is_equal = replay(trial, lines.append, data_dir=folder, environment=recorded | environment)
    return is_equal, lines


def test_a_replay_compares_every_epoch_and_leaves_the_study_unchanged(searched: Study, tmp_path: Path) -> None:
    before = searched.trials()
    assert replayed(searched, 1, tmp_path) == (True, [f"epoch {epoch}: 1 metrics equal" for epoch in (1, 2, 3)])
    assert searched.trials() == before


def test_a_trial_with_several_seeds_is_replayed_with_all_of_them(database: Database, tmp_path: Path) -> None:
    study, _ = search_without_ray(toy_space(tmp_path, replicates=2), database, tmp_path)
    assert replayed(study, 1, tmp_path) == (True, [f"epoch {epoch}: 2 metrics equal" for epoch in (1, 2, 3)])


def test_each_version_that_differs_is_shown_first(searched: Study, tmp_path: Path) -> None:
    is_equal, lines = replayed(searched, 0, tmp_path, **NOW)
    assert is_equal
    assert lines[:3] == [f"{name}: None then, {version} now" for name, version in NOW.items()]


def test_a_difference_in_the_last_digit_is_shown(searched: Study, tmp_path: Path) -> None:
    stored = math.nextafter(searched.metrics()[0][2]["value"], 1.0)
    with searched.database.engine.begin() as connection:
        change = sa.text("UPDATE hpo_metrics SET value = :value WHERE trial = 1 AND epoch = 2 AND name = 'value'")
        connection.execute(change, {"value": stored})
    is_equal, lines = replayed(searched, 0, tmp_path)
    assert not is_equal
    assert lines[0] == "epoch 1: 1 metrics equal"
    assert lines[1] == f"epoch 2: value {stored!r} then, {math.nextafter(stored, 0.0)!r} now"


def record_device(study: Study, monkeypatch: pytest.MonkeyPatch, **device: Any) -> None:
    """Let the study say that its trials ran on some device; they are replayed on the CPU."""
    before = study.provenance
    monkeypatch.setattr(type(study), "provenance", lambda _, number: {**before(number), **device})
    monkeypatch.setattr("hpo.search.worker._describe_device", lambda _: {"device_name": "GPU 2"})


@pytest.mark.parametrize(
    "recorded",
    [
        {"device": "../evil.py"},
        {"device": ["cpu"]},
        {"threads": 10**7},
        {"threads": 0},
        {"threads": True},
        {"threads": "2"},
    ],
)
def test_a_device_that_hpo_does_not_write_reaches_no_script(
    searched: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recorded: dict[str, Any]
) -> None:
    record_device(searched, monkeypatch, **recorded)
    with pytest.raises(SettingError, match="which hpo does not write: it cannot be replayed"):
        replayed(searched, 0, tmp_path)


def change_value(study: Study, factor: float) -> None:
    with study.database.engine.begin() as connection:
        change = "UPDATE hpo_metrics SET value = value * :factor WHERE trial = 1 AND epoch = 2 AND name = 'value'"
        connection.execute(sa.text(change), {"factor": factor})


EXPECTED = "the trial ran on a GPU without `deterministic: true`: differences in the last digits are expected"


def test_a_trial_of_a_gpu_says_what_to_expect_and_why_it_differs(
    searched: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_value(searched, 1.001)
    record_device(searched, monkeypatch, device="cuda", device_name="GPU 1")
    is_equal, lines = replayed(searched, 0, tmp_path)
    assert not is_equal
    assert lines[:2] == [EXPECTED, "device_name: GPU 1 then, GPU 2 now"]
    assert lines[-1].startswith("the metrics differ by up to 1.0e-03 of their size. Some kernels of a GPU add")
    assert lines[-1].endswith("Its trainable decides which kernels it uses"), "this is not hpo.train:train"


def test_the_remedy_for_the_built_in_training_is_a_parameter(tmp_path: Path) -> None:
    assert "set `parameters.deterministic: true`" in _explain(0.1, shipped_space("quick"))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_an_equal_trial_needs_no_explanation(
    device: str, searched: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_device(searched, monkeypatch, device=device, device_name="GPU 2")
    epochs = [f"epoch {epoch}: 1 metrics equal" for epoch in (1, 2, 3)]
    assert replayed(searched, 0, tmp_path) == (True, [EXPECTED, *epochs] if device == "cuda" else epochs)


def test_a_deterministic_trial_of_a_gpu_is_expected_to_be_equal(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = toy_space(tmp_path, parameters={"x": [1], "deterministic": True})
    study, _ = search_without_ray(space, database, tmp_path)
    change_value(study, 1.001)
    record_device(study, monkeypatch, device="cuda", device_name="GPU 2")
    is_equal, lines = replayed(study, 0, tmp_path)
    assert not is_equal
    assert len(lines) == 3, "no line says that this is expected"


def test_timings_are_not_compared(searched: Study, tmp_path: Path) -> None:
    with searched.database.engine.begin() as connection:
        connection.execute(sa.text("UPDATE hpo_metrics SET value = 1000 WHERE name = 'epoch_seconds'"))
    assert replayed(searched, 0, tmp_path)[0]


def test_nan_equals_nan(database: Database, tmp_path: Path) -> None:
    space = toy_space(tmp_path, trainable="benchmarks.toy:failing", parameters={"how": ["nan"]})
    study, _ = search_without_ray(space, database, tmp_path)
    assert replayed(study, 0, tmp_path) == (True, ["epoch 1: 1 metrics equal", "epoch 2: 1 metrics equal"])


def test_a_trial_that_fails_this_time_is_an_error_with_its_reason(searched: Study, tmp_path: Path) -> None:
    changed = {"trainable": "benchmarks.toy:no_such_function"}
    searched.optuna_study.set_user_attr("hpo:settings", searched.settings | changed)
    with pytest.raises(SettingError, match=r"the trial failed this time: .*no_such_function(.|\n)*Traceback"):
        replayed(searched, 0, tmp_path)


def test_a_trial_without_epochs_is_an_error_that_lists_the_others(searched: Study, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"study toy has no trial 5 with epochs; trials with epochs: 0, 1$"):
        replayed(searched, 5, tmp_path)
