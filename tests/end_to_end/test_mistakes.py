"""User errors give one message and exit code 2, and leave nothing behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.end_to_end.processes import hpo, python, rows
from tests.factories import ROOT, HpoHere


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gird"], "there is no search space 'gird' in search_spaces/: did you mean grid?"),
        (["grid", "--set", "max_epoch=1"], "max_epoch: unknown key, did you mean max_epochs?"),
        (["grid", "--set", "max_epochs=two"], "max_epochs: input should be a valid integer, got 'two'"),
        pytest.param(
            ["quick", "--set", "trainable=hpo.train:trian"],
            "--set trainable=hpo.train:trian: trainable: hpo.train has no",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    tmp_path: Path, hpo_here: HpoHere, arguments: list[str], message: str
) -> None:
    (tmp_path / "search_spaces").symlink_to(ROOT / "search_spaces")
    finished = hpo_here(tmp_path, "run", *arguments)
    assert finished.returncode == 2
    assert finished.stderr.startswith("hpo: ")
    assert message in finished.stderr


@pytest.mark.slow
def test_a_process_that_refuses_a_storage_url_shows_no_traceback_and_no_password(tmp_path: Path) -> None:
    (tmp_path / "search_spaces").symlink_to(ROOT / "search_spaces")
    finished = hpo(tmp_path, "run", "quick", HPO_STORAGE="mysql://me:do-not-show-me@host/db")
    assert finished.returncode == 2, finished.stdout + finished.stderr
    assert finished.stderr.startswith("hpo: ")
    assert "mysql is not supported" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert "do-not-show-me" not in finished.stdout + finished.stderr


def test_a_mistake_leaves_no_study_behind(tmp_path: Path, hpo_here: HpoHere) -> None:
    space = str(ROOT / "search_spaces/quick.yaml")
    finished = hpo_here(tmp_path, "run", space, "--set", "parameters.learning_rate=0.1")
    assert finished.returncode == 2
    assert "has no parameter 'learning_rate'" in finished.stderr
    assert rows(tmp_path / "runs/hpo.db", "SELECT count(*) FROM studies") in ([(0,)], [])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["run", "gird"], ["completion", "bash"]])
def test_the_command_line_starts_without_heavy_imports(tmp_path: Path, arguments: list[str]) -> None:
    finished = python(tmp_path, "-X", "importtime", "-m", "hpo", *arguments)
    loaded = set(re.findall(r"\| +(\w+)$", finished.stderr, re.MULTILINE))
    assert "click" in loaded
    assert not loaded & {"torch", "ray", "optuna", "sqlalchemy", "pandas", "matplotlib", "plotly"}


def test_an_unknown_earlier_study_leaves_no_study_behind(tmp_path: Path, hpo_here: HpoHere) -> None:
    space = str(ROOT / "search_spaces/quick.yaml")
    hpo_here(tmp_path, "migrate")
    finished = hpo_here(tmp_path, "run", space, "--set", "warm_start=[gird]")
    assert finished.returncode == 2
    assert finished.stderr == (
        "hpo: --set warm_start=[gird]: warm_start: there is no study 'gird' in sqlite:///runs/hpo.db: it has none\n"
    )
    assert rows(tmp_path / "runs/hpo.db", "SELECT count(*) FROM studies") == [(0,)]
