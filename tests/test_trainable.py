"""Importing a trainable by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hpo.errors import TrainableError
from hpo.trainable import DEFAULT_TRAINABLE, is_timing, load_trainable, require_module

MODULE = """
from hpo.trainable import EpochReport

def train(params, *, data, seed, max_epochs, device, checkpoint=None):
    for epoch in range(1, max_epochs + 1):
        yield EpochReport(epoch, {"val_accuracy": params["x"] * epoch}, dict)

def evaluate(params, *, data, seed, max_epochs, device, checkpoint=None):
    return []

def train_short(params, *, data):
    yield from []

SIZE = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with trainables, in a folder of the import path."""
    name = f"trainable_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_module_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "trainable_here.py").write_text(MODULE)
    assert load_trainable("trainable_here:train").__module__ == "trainable_here"


@pytest.mark.slow  # imports torch
def test_the_default_trainable_is_the_training_loop() -> None:
    from hpo.train.loop import train

    assert load_trainable(DEFAULT_TRAINABLE) is train
    assert DEFAULT_TRAINABLE == "hpo.train:train", "it is part of fingerprints"


def test_a_trainable_can_be_any_generator_function_with_the_signature(module: str) -> None:
    train = load_trainable(f"{module}:train")
    reports = list(train({"x": 0.25}, data={}, seed=0, max_epochs=2, device="cpu"))
    assert [report.metrics["val_accuracy"] for report in reports] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:train", "no module 'no_such_module' in the current folder"),
        ("MODULE.sub:train", "no module 'MODULE.sub'"),
        ("MODULE:trian", "MODULE has no function 'trian', did you mean train?"),
        ("MODULE:evaluate", "MODULE:evaluate must be a generator function"),
        ("MODULE:train_short", "(params, *, data, seed, max_epochs, device, checkpoint=None)"),
        ("MODULE:SIZE", "MODULE:SIZE must be a generator function"),
    ],
)
def test_an_invalid_trainable_is_refused_with_the_reason(module: str, name: str, message: str) -> None:
    with pytest.raises(TrainableError) as caught:
        load_trainable(name.replace("MODULE", module))
    assert message.replace("MODULE", module) in str(caught.value)


def test_a_failing_import_inside_the_module_is_not_hidden(tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text("import a_package_that_is_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        load_trainable(f"{module}:train")


def test_a_module_is_found_without_importing_it(tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here/package_here").mkdir()
    (tmp_path / "here/package_here/__init__.py").write_text("raise RuntimeError('imported')")
    for name in (module, "package_here.part", "importlib.util", "benchmarks.toy"):
        require_module(f"{name}:train")
    assert module not in sys.modules
    for name in ("no_such_module", "no_such_module.part"):
        with pytest.raises(TrainableError, match=f"no module '{name}' in the current folder or among"):
            require_module(f"{name}:train")


@pytest.mark.parametrize(
    ("metric", "expected"), [("train_seconds", True), ("images_per_second", True), ("val_loss", False)]
)
def test_metrics_of_speed_are_recognized(metric: str, expected: bool) -> None:
    assert is_timing(metric) == expected
