"""The documented grid, two short epochs on the sample: run once, checked by several tests."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.processes import hpo, rows
from tests.factories import ROOT, HpoHere

pytestmark = [pytest.mark.slow, pytest.mark.ray]

RUN = ["run", str(ROOT / "search_spaces/grid.yaml")]
for key_value in (
    "data.dataset=fashion_mnist_sample",
    "data.val_samples=200",
    "data.train_samples=512",
    "max_epochs=2",
):
    RUN += ["--set", key_value]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("grid")
    finished = hpo(folder, *RUN)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder, finished


@pytest.fixture
def folder(grid: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    return grid[0]


def test_three_trials_complete_with_every_metric_of_every_epoch(folder: Path) -> None:
    database = folder / "runs/hpo.db"
    assert rows(database, "SELECT study_name FROM studies") == [("grid",)]
    assert rows(database, "SELECT number, state FROM trials ORDER BY number") == [(n, "COMPLETE") for n in range(3)]
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        query = f"SELECT trial, epoch, value FROM hpo_metrics WHERE name = '{name}' ORDER BY trial, epoch"
        found = rows(database, query)
        assert [(trial, epoch) for trial, epoch, _ in found] == [(t, e) for t in (1, 2, 3) for e in (1, 2)]
        assert all(value >= 0 if name.endswith("loss") else 0 <= value <= 1 for _, _, value in found)
    stored = rows(database, "SELECT trial, epoch, value FROM hpo_metrics WHERE name = 'val_accuracy' ORDER BY 1, 2")
    optuna = "SELECT trial_id, step, intermediate_value FROM trial_intermediate_values ORDER BY 1, 2"
    assert rows(database, optuna) == stored
    tests = rows(database, "SELECT trial, epoch FROM hpo_metrics WHERE name = 'test_accuracy' ORDER BY trial")
    assert tests == [(trial, 2) for trial in (1, 2, 3)], "the test images are scored once, at the end"
    assert rows(database, "SELECT count(*) FROM hpo_runs WHERE ended IS NOT NULL") == [(1,)]


def test_the_dashboard_has_its_notes_and_artifacts_when_the_run_ends(folder: Path) -> None:
    query = "SELECT count(*) FROM study_system_attributes WHERE key LIKE 'dashboard%note_ver'"
    assert rows(folder / "runs/hpo.db", query) == [(3,)]
    assert len(list((folder / "runs/artifacts").iterdir())) == 2


def test_the_output_is_progress_and_a_table_without_noise(grid: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, finished = grid
    assert finished.stderr == ""
    lines = finished.stdout.splitlines()
    assert lines[0].startswith("grid: The documented grid")
    assert sum("epoch 1/2" in line for line in lines) == 3
    assert any(" at a time, " in line for line in lines)
    table = lines[lines.index(next(line for line in lines if line.startswith("grid: 3 trials"))) :]
    for word in ("batch_size", "lr", "last", "best", "val_accuracy", "test_accuracy", "seconds", "images/s"):
        assert any(word in line for line in table), word
    assert not any("ray" in line.lower() or "Warning" in line for line in lines if "Storage:" not in line)
    hints = [line.partition(": ")[2] for line in lines if line.startswith(("Dashboard: ", "Report again: "))]
    uv = "uv run " if hints[0].startswith("uv run ") else ""
    assert hints == [f"{uv}python -m hpo.dashboard", f"{uv}python -m hpo.report grid"]


def test_a_finished_grid_is_not_run_again(folder: Path, hpo_here: HpoHere) -> None:
    before = (folder / "runs/hpo.db").read_bytes()
    again = hpo_here(folder, *RUN)
    assert again.returncode == 0
    assert "Nothing is left to do: storage holds 3 COMPLETE." in again.stdout
    assert (folder / "runs/hpo.db").read_bytes() == before


def test_a_trial_is_replayed_to_the_last_digit_and_a_difference_is_found(folder: Path, hpo_here: HpoHere) -> None:
    database = folder / "runs/hpo.db"
    recorded = json.loads(rows(database, "SELECT provenance FROM hpo_runs")[0][0])
    assert {"code", "packages", "python", "platform", "command", "data_sha256"} <= set(recorded)
    assert {"torch", "optuna", "ray"} <= set(recorded["packages"])
    trial = json.loads(rows(database, "SELECT provenance FROM hpo_trials WHERE trial = 2")[0][0])
    assert trial["device"] == "cpu"
    assert trial["threads"] >= 1
    same = hpo_here(folder, "replay", "grid", "1")
    assert same.returncode == 0, same.stdout + same.stderr
    assert same.stdout.endswith("epoch 1: 4 metrics equal\nepoch 2: 6 metrics equal\n")
    with sqlite3.connect(database) as connection:
        connection.execute(
            "UPDATE hpo_metrics SET value = value + 1e-9 WHERE trial = 2 AND name = 'val_loss' AND epoch = 2"
        )
    connection.close()
    other = hpo_here(folder, "replay", "grid", "1")
    assert other.returncode == 1
    assert "epoch 2: val_loss" in other.stdout


def test_the_report_is_written_again_and_an_unknown_study_is_named(folder: Path, hpo_here: HpoHere) -> None:
    page = folder / "runs/reports/grid/index.html"
    page.unlink()  # the run wrote it
    report = hpo_here(folder, "report", "grid")
    assert report.returncode == 0
    assert "grid: 3 trials" in report.stdout
    assert "Report: runs/reports/grid/index.html" in report.stdout
    assert report.stderr == ""
    assert "<code>hpo run " in page.read_text(), "the command as the user typed it"
    unknown = hpo_here(folder, "report", "gird")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "there is no study 'gird'" in unknown.stderr
    assert "did you mean grid?" in unknown.stderr
