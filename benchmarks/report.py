"""Measure the report of a large study: seconds to write it, the size of the page, seconds until a browser has drawn it.

    uv run python -m benchmarks.report --trials 5000 --epochs 50
    uv run python -m benchmarks.report --picture runs/reports/quick/index.html      write .readme/report.png

The study is synthetic. Its rows are inserted in bulk, because writing them through Optuna would take minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from optuna.distributions import distribution_to_json

from hpo.paths import RunsDir
from hpo.space.model import Space
from storage.database import Database, open_database
from storage.studies import find_study, open_study
from storage.study import Study

START = datetime.datetime(2026, 1, 1)
TRIAL_SECONDS = 60
FAIL_EVERY = 50  # two trials in a hundred fail, half way through

Row = dict[str, Any]


def fill(database: Database, name: str, *, trials: int, epochs: int, seed: int = 0) -> Study:
    """Create a study of trials with plausible curves. Two in a hundred have failed.

    Args:
        database: the study must be its first one.
        name: the study's name.
        trials: the number of trials.
        epochs: of each trial.
        seed: of the random numbers.
    """
    space = Space.model_validate(
        {
            "name": name,
            "trainable": "made_up:train",
            "sampler": {"name": "random"},
            "max_epochs": epochs,
            "budget": {"trials": trials},
            "parameters": {
                "batch_size": [64, 128, 256, 512],
                "lr": {"type": "float", "low": 1e-4, "high": 1.0, "log": True},
                "optimizer": ["sgd", "adam", "adamw"],
            },
        }
    )
    study = open_study(database, **space.study_options)
    distributions = {name: distribution_to_json(each) for name, each in space.distributions().items()}
    generator = np.random.default_rng(seed)
    rows: dict[str, list[Row]] = {}
    for number in range(trials):
        is_failed = number % FAIL_EVERY == FAIL_EVERY - 1
        params = {
            "batch_size": float(generator.integers(4)),
            "lr": float(10 ** generator.uniform(-4, 0)),
            "optimizer": float(generator.integers(3)),
        }
        curves = _make_curves(params["lr"], epochs // 2 if is_failed else epochs, generator)
        for table, added in _trial_rows(study, number, params, distributions, curves, is_failed=is_failed).items():
            rows.setdefault(table, []).extend(added)
    rows["hpo_runs"] = [_run_row(study, trials)]
    tables = sa.MetaData()
    tables.reflect(database.engine)
    with database.engine.begin() as connection:
        for table, values in sorted(rows.items(), key=lambda item: item[0] != "trials"):  # others refer to trials
            connection.execute(tables.tables[table].insert(), values)
    return study


def _make_curves(lr: float, epochs: int, generator: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    ceiling = 0.93 - 0.05 * abs(np.log10(lr) + 2.5) + 0.005 * generator.standard_normal()
    epoch = np.arange(1, epochs + 1)
    noise = generator.standard_normal((4, epochs))
    train = ceiling + 0.05 - 0.35 * np.exp(-epoch / 6) + 0.002 * noise[0]
    val = ceiling - 0.3 * np.exp(-epoch / 5) + 0.01 * noise[1]
    return {
        "train_accuracy": train,
        "val_accuracy": val,
        "train_loss": 2.2 * (1.02 - train) + 0.004 * noise[2] ** 2,
        "val_loss": 2.4 * (1.02 - val) + 0.01 * noise[3] ** 2,
        "train_seconds": np.full(epochs, 1.0),
        "epoch_seconds": np.full(epochs, 1.1),
        "images_per_second": np.full(epochs, 55000.0),
    }


def _trial_rows(
    study: Study,
    number: int,
    params: Mapping[str, float],
    distributions: Mapping[str, str],
    curves: Mapping[str, np.ndarray[Any, Any]],
    *,
    is_failed: bool,
) -> dict[str, list[Row]]:
    """Return {table: rows} of one trial."""
    trial_id, started = number + 1, START + datetime.timedelta(seconds=TRIAL_SECONDS * number)
    values = [float(value) for value in curves["val_accuracy"]]
    reason = json.dumps("train_loss is nan after epoch 25")
    ending = (
        {"trial_user_attributes": [{"trial_id": trial_id, "key": "fail_reason", "value_json": reason}]}
        if is_failed
        else {"trial_values": [{"trial_id": trial_id, "objective": 0, "value": values[-1], "value_type": "FINITE"}]}
    )
    return ending | {
        "trials": [
            {
                "trial_id": trial_id,
                "number": number,
                "study_id": study.study_id,
                "state": "FAIL" if is_failed else "COMPLETE",
                "datetime_start": started,
                "datetime_complete": started + datetime.timedelta(seconds=TRIAL_SECONDS),
            }
        ],
        "trial_params": [
            {"trial_id": trial_id, "param_name": name, "param_value": value, "distribution_json": distributions[name]}
            for name, value in params.items()
        ],
        "trial_intermediate_values": [
            {"trial_id": trial_id, "step": epoch, "intermediate_value": value, "intermediate_value_type": "FINITE"}
            for epoch, value in enumerate(values, start=1)
        ],
        "hpo_trials": [
            {
                "trial": trial_id,
                "study": study.study_id,
                "key": str(number),
                "run": 1,
                "crashes": 0,
                "provenance": {"device": "cuda"},
            }
        ],
        "hpo_metrics": [
            {"trial": trial_id, "epoch": epoch, "name": name, "value": float(value)}
            for name, curve in curves.items()
            for epoch, value in enumerate(curve, start=1)
        ],
    }


def _run_row(study: Study, trials: int) -> Row:
    started = START.replace(tzinfo=datetime.UTC).timestamp()
    ended = started + TRIAL_SECONDS * trials
    return {
        "run": 1,
        "study": study.study_id,
        "host": "made-up",
        "pid": 1,
        "process_started": 0.0,
        "started": started,
        "last_heard": ended,
        "lease_until": started,
        "ended": ended,
        "provenance": {"command": f"hpo run {study.name}", "code": "0"},
    }


def measure(trials: int, epochs: int, folder: Path) -> dict[str, float]:
    """Return the seconds to read the study and to write its report, the size of the page, and the browser's seconds."""
    from playwright.sync_api import sync_playwright

    from hpo.report.page import write_report
    from hpo.report.reading import read_results

    url = f"sqlite:///{folder}/hpo.db"
    with open_database(url) as database:
        fill(database, "large", trials=trials, epochs=epochs)
    with open_database(url) as database:
        started = time.perf_counter()
        study = find_study(database, "large")
        assert study is not None
        results = read_results(study)
        read = time.perf_counter()
        page = write_report(results, RunsDir(folder))
        written = time.perf_counter()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page()
        opened = time.perf_counter()
        tab.goto(page.as_uri())
        tab.wait_for_function("document.body.dataset.drawn")
        drawn = time.perf_counter()
        browser.close()
    return {
        "read_seconds": read - started,
        "write_seconds": written - read,
        "report_seconds": written - started,
        "page_megabytes": page.stat().st_size / 1e6,
        "browser_seconds": drawn - opened,
    }


def take_picture(page: Path, picture: Path) -> None:
    """Write a PNG of the top of a report, as the README shows it."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light")
        tab.goto(page.absolute().as_uri())
        tab.wait_for_function("document.body.dataset.drawn")
        tab.screenshot(path=picture)
        browser.close()
    Image.open(picture).quantize(64).save(picture, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--picture", type=Path, metavar="PAGE")
    arguments = parser.parse_args()
    if arguments.picture is not None:
        take_picture(arguments.picture, Path(".readme/report.png"))
        sys.exit()
    with tempfile.TemporaryDirectory() as temporary:
        for name, value in measure(arguments.trials, arguments.epochs, Path(temporary)).items():
            print(f"{name}: {value:.1f}")
