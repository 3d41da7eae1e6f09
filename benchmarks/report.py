"""How long a report of a large study takes, how large its page is, and how long a browser needs to open it.

    uv run python -m benchmarks.report --trials 5000 --epochs 50

The study is made up and written in bulk, past Optuna's own way in, which would take minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, distribution_to_json

from storage.database import Database, open_database
from storage.studies import Study, find_study, open_study

DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "batch_size": CategoricalDistribution([64, 128, 256, 512]),
    "lr": FloatDistribution(1e-4, 1.0, log=True),
    "optimizer": CategoricalDistribution(["sgd", "adam", "adamw"]),
}


def fill(database: Database, name: str, *, trials: int, epochs: int, seed: int = 0) -> Study:
    """Return a study of trials that look like trained ones; two in a hundred have failed."""
    study = open_study(
        database,
        name,
        direction="maximize",
        fingerprint="made-up",
        settings={"metric": "val_accuracy", "max_epochs": epochs, "seed": seed, "data": {"dataset": "made_up"}},
    )
    generator = np.random.default_rng(seed)
    tables = sa.MetaData()
    tables.reflect(database.engine)
    now = datetime.datetime(2026, 1, 1)
    rows: dict[str, list[dict[str, Any]]] = {}
    for number in range(trials):
        trial = number + 1
        lr = 10 ** generator.uniform(-4, 0)
        params = {
            "batch_size": generator.integers(4),
            "lr": lr,
            "optimizer": generator.integers(3),
        }
        failed = number % 50 == 49
        ends = now + datetime.timedelta(seconds=60 * (number + 1))
        rows.setdefault("trials", []).append(
            {
                "trial_id": trial,
                "number": number,
                "study_id": study.study_id,
                "state": "FAIL" if failed else "COMPLETE",
                "datetime_start": now + datetime.timedelta(seconds=60 * number),
                "datetime_complete": ends,
            }
        )
        for key, value in params.items():
            rows.setdefault("trial_params", []).append(
                {
                    "trial_id": trial,
                    "param_name": key,
                    "param_value": float(value),
                    "distribution_json": distribution_to_json(DISTRIBUTIONS[key]),
                }
            )
        rows.setdefault("hpo_trials", []).append(
            {
                "trial": trial,
                "study": study.study_id,
                "key": str(number),
                "run": 1,
                "crashes": 0,
                "provenance": {"device": "cuda"},
            }
        )
        ceiling = 0.93 - 0.05 * abs(np.log10(lr) + 2.5) + 0.005 * generator.standard_normal()
        epoch = np.arange(1, (epochs // 2 if failed else epochs) + 1)
        noise = generator.standard_normal((4, len(epoch)))
        train = ceiling + 0.05 - 0.35 * np.exp(-epoch / 6) + 0.002 * noise[0]
        val = ceiling - 0.3 * np.exp(-epoch / 5) + 0.01 * noise[1]
        curves = {
            "train_accuracy": train,
            "val_accuracy": val,
            "train_loss": 2.2 * (1.02 - train) + 0.004 * noise[2] ** 2,
            "val_loss": 2.4 * (1.02 - val) + 0.01 * noise[3] ** 2,
            "train_seconds": np.full(len(epoch), 1.0),
            "epoch_seconds": np.full(len(epoch), 1.1),
            "images_per_second": np.full(len(epoch), 55000.0),
        }
        for key, curve in curves.items():
            rows.setdefault("hpo_metrics", []).extend(
                {"trial": trial, "epoch": int(at), "name": key, "value": float(value)}
                for at, value in zip(epoch, curve, strict=True)
            )
        rows.setdefault("trial_intermediate_values", []).extend(
            {
                "trial_id": trial,
                "step": int(at),
                "intermediate_value": float(value),
                "intermediate_value_type": "FINITE",
            }
            for at, value in zip(epoch, val, strict=True)
        )
        if failed:
            reason = {
                "trial_id": trial,
                "key": "fail_reason",
                "value_json": json.dumps("train_loss is nan after epoch 25"),
            }
            rows.setdefault("trial_user_attributes", []).append(reason)
        else:
            rows.setdefault("trial_values", []).append(
                {"trial_id": trial, "objective": 0, "value": float(val[-1]), "value_type": "FINITE"}
            )
    seconds = now.replace(tzinfo=datetime.UTC).timestamp()
    run = {"run": 1, "study": study.study_id, "host": "made-up", "pid": 1, "process_started": 0.0, "started": seconds}
    run |= {"last_heard": seconds + 60 * trials, "lease_until": seconds, "ended": seconds + 60 * trials}
    with database.engine.begin() as connection:
        connection.execute(tables.runs.insert(), run | {"provenance": {"command": "hpo run made_up", "code": "0"}})
        connection.execute(tables.trials.insert(), rows.pop("hpo_trials"))
        for table, values in sorted(rows.items(), key=lambda item: item[0] != "trials"):
            connection.execute(tables.tables[table].insert(), values)
    return study


def measure(trials: int, epochs: int, folder: Path) -> dict[str, float]:
    """Return seconds and bytes: reading, writing, the page's size, and a browser's time to draw it."""
    from playwright.sync_api import sync_playwright

    from hpo.report import write_report
    from hpo.report.results import read_results

    url = f"sqlite:///{folder}/hpo.db"
    with open_database(url) as database:
        fill(database, "large", trials=trials, epochs=epochs)
    with open_database(url) as database:
        started = time.perf_counter()
        study = find_study(database, "large")
        assert study is not None
        results = read_results(study)
        read = time.perf_counter()
        page = write_report(results, folder / "reports")
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name, value in measure(arguments.trials, arguments.epochs, Path(temporary)).items():
            print(f"{name}: {value:.1f}")
