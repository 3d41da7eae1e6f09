"""The checks before a search, and the versions that a run records."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo.errors import TrainableError
from hpo.search.environment import PACKAGES, check_trainable, describe_environment, note_horizon
from hpo.space.model import load_space
from tests.factories import shipped_space


def test_the_environment_is_described() -> None:
    described = describe_environment()
    assert set(described) == {"code", "packages", "python", "platform", "machine"}
    assert set(described["packages"]) == set(PACKAGES)


# --- checks before a search -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parameters.optimizer=adm", "no optimizer 'adm', did you mean adam"),
        ("parameters.learning_rate=0.1", "has no parameter 'learning_rate'"),
        ("parameters.optimizer=[adam, sdg]", "no optimizer 'sdg', did you mean sgd"),
        ("parameters.lr=[0.1, -1]", "lr must be above 0"),
        ("parameters.batch_size=big", "batch_size must be of type int"),
    ],
)
def test_a_value_that_the_trainable_cannot_take_is_an_error(override: str, message: str) -> None:
    with pytest.raises(TrainableError, match=message):
        check_trainable(shipped_space("quick", override))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trainable: no_such_module:train", "1:1: trainable: no module 'no_such_module'"),
        ("trainable: hpo.train:trian", "1:1: trainable: hpo.train has no function 'trian', did you mean train?"),
        (
            "trainable: hpo.train.data:load",
            "1:1: trainable: hpo.train.data:load must be a generator function (params, *, data",
        ),
        ("command: pyhton train.py", "1:1: command: there is no program 'pyhton' on the PATH"),
        ("derived: {warmup: 2 * lr}", "1:11: parameters.warmup: hpo.train:train has no parameter 'warmup'"),
    ],
)
def test_a_trainable_that_cannot_be_used_is_named_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(f"{line}\nsampler: grid\nmax_epochs: 2\nparameters: {{lr: 0.1}}\n")
    with pytest.raises(TrainableError) as caught:
        check_trainable(load_space(str(path)))
    assert str(caught.value).startswith(f"{path}:{message}")


def test_all_mistakes_in_parameters_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("sampler: grid\nmax_epochs: 2\nparameters:\n  batchsize: 64\n  lr: [0.1, -1]\n  stem: cifr\n")
    with pytest.raises(TrainableError) as caught:
        check_trainable(load_space(str(path)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    expected = {4: "did you mean batch_size?", 5: "above 0, got -1", 6: "did you mean cifar?"}
    for line, (number, message) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"{path}:{number}:3: parameters.")
        assert message in line


# --- schedules that depend on the horizon -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "schedules"),
    [
        (["scheduler=asha", "parameters.schedule=cosine"], "schedule cosine is"),
        (["scheduler=median", "parameters.schedule=[constant, one_cycle, cosine]"], "schedule one_cycle and cosine is"),
    ],
)
def test_a_scheduler_and_a_schedule_that_depends_on_the_last_epoch_are_noted(
    overrides: list[str], schedules: str
) -> None:
    note = note_horizon(shipped_space("quick", *overrides))
    assert note is not None
    assert schedules in note
    assert "before epoch 5" in note
    assert "grace_period" in note


@pytest.mark.parametrize(
    "overrides",
    [
        ["parameters.schedule=cosine"],
        ["scheduler=asha"],
        ["scheduler=asha", "parameters.schedule=constant", "parameters.warmup_epochs=1"],
        ["scheduler=asha", "parameters.schedule=cosine", "trainable=mine:train"],
    ],
)
def test_other_searches_have_no_such_note(overrides: list[str]) -> None:
    assert note_horizon(shipped_space("quick", *overrides)) is None
