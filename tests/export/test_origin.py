"""A result of an earlier study cannot be exported: the message names a command that exports it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from hpo.api import delete_study, rename_study
from hpo.search.earlier.warm_start import find_trials, take_over_trials
from storage.database import open_database
from storage.studies import open_study
from tests.factories import HpoHere
from tests.report.studies import finish_grid, grid_space

HERE = "sqlite:///runs/hpo.db"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reuse(earlier: str, *, of: str, into: str) -> None:
    """Finish a grid as the study `of` of one database, and reuse its results in the study `later` of another one."""
    with open_database(earlier) as database:
        finish_grid(database, name=of)
    storage = {"storage": earlier} if earlier != into else {}
    space = grid_space(name="later", warm_start=[{"study": of, **storage}])
    with open_database(into) as database:
        study = open_study(database, **space.study_options)
        take_over_trials(space, study, find_trials(space, study, database))


@pytest.mark.parametrize(
    ("earlier", "into", "options"),
    [
        (HERE, HERE, ""),
        ("sqlite:///mine.db", "sqlite:///mine.db", " --storage sqlite:///mine.db"),
        ("sqlite:///old.db", HERE, " --storage sqlite:///old.db"),
        (HERE, "sqlite:///mine.db", f" --storage {HERE}"),
    ],
)
@pytest.mark.parametrize("is_renamed", [False, True])
def test_the_message_names_a_command_that_works(
    here: Path, hpo_here: HpoHere, earlier: str, into: str, options: str, is_renamed: bool
) -> None:
    reuse(earlier, of="it's", into=into)
    name = "it's"
    if is_renamed:
        rename_study(name, name := "first", storage=earlier)
    done = hpo_here(here, "export", "later", "--trial", "1", "--storage", into, "--data-dir", "images")
    assert done.returncode == 2
    where = f" in {earlier}" if earlier != into else ""
    what = f"hpo: trial 1 was trained as trial 1 of study {name}{where}, which has its checkpoint. This exports it: "
    assert done.stderr.startswith(what)
    command = done.stderr.removeprefix(what).strip()
    assert command.endswith(f"hpo export {shlex.quote(name)} --trial 1 --data-dir images{options}")
    again = hpo_here(here, *shlex.split(command.partition(" hpo ")[2]))
    assert "there is no checkpoint of trial 1 in " in again.stderr, "it has found the trial, which was not trained here"


@pytest.mark.parametrize("earlier", [HERE, "sqlite:///old.db"])
def test_a_study_that_was_deleted_has_no_checkpoint(here: Path, hpo_here: HpoHere, earlier: str) -> None:
    reuse(earlier, of="old", into=HERE)
    delete_study("old", confirm=lambda _: True, storage=earlier)
    done = hpo_here(here, "export", "later", "--trial", "0")
    assert done.returncode == 2
    databases = HERE if earlier == HERE else f"{HERE} or {earlier}"
    assert done.stderr == (
        f"hpo: trial 0 was trained as trial 0 of study old, which had its checkpoint, and is not in {databases} any more. "
        "COMPLETE trials that later trained itself: none\n"
    )


def test_a_database_that_is_gone_is_named(here: Path, hpo_here: HpoHere) -> None:
    reuse("sqlite:///old.db", of="old", into=HERE)
    (here / "old.db").unlink()
    done = hpo_here(here, "export", "later")
    assert done.returncode == 2
    assert "sqlite:///old.db (which does not exist)" in done.stderr
