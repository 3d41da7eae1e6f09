"""The command line's own parts, without a process for each."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState, create_trial
from rich.console import Console

from hpo import run
from hpo.errors import TrainableError
from hpo.search import SearchOutcome
from hpo.space.model import load_space
from storage.database import open_database
from storage.studies import Study, open_study

ROOT = Path(__file__).parent.parent
ARGUMENTS = argparse.Namespace(storage=run.DEFAULT_STORAGE)


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        yield open_study(database, "s", direction="maximize", fingerprint="f", settings={"metric": "m"})


@pytest.mark.parametrize(
    ("states", "outcome", "code"),
    [
        (["COMPLETE", "FAIL"], SearchOutcome("", interrupted=False), 0),
        (["COMPLETE"], None, 0),
        (["FAIL", "FAIL"], SearchOutcome("", interrupted=False), 1),
        (["PRUNED"], SearchOutcome("", interrupted=False), 1),
        (["COMPLETE", "WAITING"], SearchOutcome("interrupted", interrupted=True), 130),
        (["COMPLETE", "WAITING"], SearchOutcome("the time budget is spent", interrupted=False), 0),
    ],
)
def test_exit_codes(study: Study, states: list[str], outcome: SearchOutcome | None, code: int) -> None:
    for state in states:
        value = 0.5 if state == "COMPLETE" else None
        attrs = {"fail_reason": "its reason"} if state == "FAIL" else {}
        study.optuna_study.add_trial(create_trial(state=TrialState[state], value=value, user_attrs=attrs))
    shown = io.StringIO()
    assert run._conclude(Console(file=shown, width=140), study, ARGUMENTS, outcome) == code
    assert shown.getvalue().count("failed: its reason") == states.count("FAIL")
    assert ("goes on where it stopped" in shown.getvalue()) == bool(outcome and outcome.stopped)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("parameters.optimizer=adm", "no optimizer 'adm', did you mean adam"),
        ("parameters.learning_rate=0.1", "has no parameter 'learning_rate'"),
        ("parameters.optimizer=[adam, sdg]", "no optimizer 'sdg', did you mean sgd"),
        ("parameters.lr=[0.1, -1]", "lr must be above 0"),
        ("parameters.batch_size=big", "batch_size must be of type int"),
    ],
)
def test_what_the_trainable_cannot_take_is_refused_before_anything_is_spent(
    tmp_path: Path, override: str, said: str
) -> None:
    space = load_space(str(ROOT / "search_spaces/quick.yaml"), [override])
    with pytest.raises(TrainableError, match=said):
        run._check_trainable(space, tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trainable: no_such_module:train", "1:1: trainable: no module 'no_such_module'"),
        ("trainable: hpo.train:trian", "1:1: trainable: hpo.train has no function 'trian', did you mean train?"),
        (
            "trainable: hpo.train:evaluate",
            "1:1: trainable: hpo.train:evaluate must be a generator function (params, *, data",
        ),
        ("command: pyhton train.py", "1:1: command: there is no program 'pyhton' on the PATH"),
        ("derived: {warmup: 2 * lr}", "1:11: parameters.warmup: hpo.train:train has no parameter 'warmup'"),
    ],
)
def test_a_trainable_that_will_not_do_is_told_with_its_place(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(f"{line}\nsampler: grid\nmax_epochs: 2\nparameters: {{lr: 0.1}}\n")
    with pytest.raises(TrainableError) as caught:
        run._check_trainable(load_space(str(path)), tmp_path)
    assert str(caught.value).startswith(f"{path}:{said}")


def test_all_parameters_that_the_trainable_cannot_take_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("sampler: grid\nmax_epochs: 2\nparameters:\n  batchsize: 64\n  lr: [0.1, -1]\n  stem: cifr\n")
    with pytest.raises(TrainableError) as caught:
        run._check_trainable(load_space(str(path)), tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    expected = {4: "did you mean batch_size?", 5: "above 0, got -1", 6: "did you mean cifar?"}
    for line, (number, said) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"{path}:{number}:3: parameters.")
        assert said in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--storage", "postgresql://me:secret@host/db"],
        ["--storage=postgresql://me:secret@host/db"],
    ],
)
def test_a_password_on_the_command_line_moves_into_the_environment(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    called: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "hpo.run", "grid", *arguments, "--data-dir", "d"])
    monkeypatch.setattr(run.os, "execve", lambda _, argv, env: called.append((argv, env)))
    run._hide_password("postgresql://me:secret@host/db")
    ((argv, environment),) = called
    assert argv[1:] == ["-m", "hpo.run", "grid", "--data-dir", "d"]
    assert environment["HPO_STORAGE"] == "postgresql://me:secret@host/db"


@pytest.mark.parametrize("url", ["sqlite:///runs/hpo.db", "postgresql://me@host/db", "postgresql://host:5432/db"])
def test_a_command_line_without_a_password_is_left_alone(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "hpo.run", "grid", "--storage", url])
    monkeypatch.setattr(run.os, "execve", lambda *_: pytest.fail("started again"))
    run._hide_password(url)
