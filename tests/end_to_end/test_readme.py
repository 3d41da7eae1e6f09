"""What the README shows is run as it is written there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from tests.driving import drive

from hpo.space.model import Space, load_space, load_trainable
from storage.database import open_database

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def block(start: str) -> str:
    found = [text for _, text in BLOCKS if text.startswith(start)]
    assert len(found) == 1, f"README has {len(found)} blocks that start with {start!r}"
    return found[0]


def test_the_annotated_space_loads_and_has_every_key_that_is_built(tmp_path: Path) -> None:
    path = tmp_path / "annotated.yaml"
    path.write_text(block("# yaml-language-server"))
    space = load_space(str(path))
    missing = set(Space.model_fields) - space.model_fields_set
    assert missing == {"trainable", "command", "objectives", "warm_start", "replicates"}
    assert space.parameters["momentum"].when == {"optimizer": "sgd"}


def test_the_documented_grid_in_the_readme_is_the_one_that_ships(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(block("description: The documented grid"))
    assert load_space(str(path)).fingerprint == load_space(str(ROOT / "search_spaces/grid.yaml")).fingerprint


def test_the_trainable_of_the_readme_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("# digits.py")
    (tmp_path / "digits.py").write_text(code)
    path = tmp_path / "digits.yaml"
    path.write_text(block("# search_spaces/digits.yaml"))
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "digits", raising=False)
    space = load_space(str(path))
    assert load_trainable(space.trainable).__module__ == "digits"
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        study, _ = drive(space, database, tmp_path)
        trials = study.trials()
        assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
        for trial in trials:
            assert list(trial.intermediate_values) == [1, 2, 3, 4, 5]
        assert max(trial.value for trial in trials if trial.value is not None) > 0.9, "it learns"
        assert {name for epochs in study.metrics().values() for m in epochs.values() for name in m} == {
            "accuracy",
            "epoch_seconds",
        }
