"""Runs on a study of a small grid or with a sampler, and what their tests read from the database."""

from __future__ import annotations

import contextlib
import multiprocessing
import sqlite3
from collections.abc import Iterator, Mapping
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from storage import tables
from storage.database import Database, open_database
from storage.ownership import ClaimedTrial
from storage.queue import Draw
from storage.reporting import TrialUpdate
from storage.run import Run
from storage.studies import open_study
from storage.study import Study
from storage.usage import CPU, Device

GRID = {"a": CategoricalDistribution([1, 2]), "b": CategoricalDistribution(["x", "y"])}
POINTS = [{"a": a, "b": b} for a in (1, 2) for b in ("x", "y")]


def config_key(params: Mapping[str, Any]) -> str:
    return repr(sorted(params.items()))


def open_s(database: Database, fingerprint: str = "f", total_trials: int | None = None) -> Study:
    return open_study(
        database,
        "s",
        direction="maximize",
        fingerprint=fingerprint,
        settings={"metric": "m"},
        total_trials=total_trials,
    )


def open_in_process(url: str, barrier: Barrier, answers: multiprocessing.Queue[str]) -> None:
    """Open a database and a study at the same moment as other processes; put the outcome into the queue."""
    barrier.wait(timeout=120)
    try:
        with open_database(url) as database:
            open_s(database)
            answers.put("opened")
    except BaseException as error:  # noqa: BLE001
        answers.put(f"{type(error).__name__}: {error}")


def grid_run(study: Study, **options: Any) -> Run:
    return Run(study, config_key=config_key, provenance={"code": "test"}, **options)


def draw_both(trial: optuna.Trial) -> str:
    trial.suggest_float("x", 0, 1)
    trial.suggest_int("n", 1, 3)
    return ""


def sampled_run(study: Study, draw: Draw = draw_both, **options: Any) -> Run:
    return grid_run(study, draw=draw, **options)


def claim_one(run: Run, device: Device = CPU) -> ClaimedTrial:
    """Claim a trial; fail if there is none."""
    claim = run.claim(device=device)
    assert claim is not None
    return claim


def claim_point(run: Run) -> ClaimedTrial:
    """Claim the only point of a grid."""
    run.enqueue(POINTS[:1], GRID)
    return claim_one(run)


def prune(run: Run, claim: ClaimedTrial) -> None:
    """End a trial as a pruner does after its last report."""
    run._writer.put(TrialUpdate(claim, value=claim.values[claim.epoch], final_state=TrialState.PRUNED))


def kill(run: Run) -> None:
    """Leave a run as kill -9 does: it stops without updating the database, and its PID belongs to another process."""
    run._lease.stop()
    run._writer.close()
    with run.database.engine.begin() as connection:
        connection.execute(tables.runs.update().where(tables.runs.c.run == run.run_id).values(process_started=0.0))


def expire_leases(database: Database, run_id: int | None = None) -> None:
    """Leave the leases as a long outage does, or that of one run as a long suspend does."""
    update = tables.runs.update().values(lease_until=0.0)
    with database.engine.begin() as connection:
        connection.execute(update if run_id is None else update.where(tables.runs.c.run == run_id))


def allow_takeovers(database: Database) -> None:
    """Leave the runs as after their first seconds: they take over trials of dead runs on other machines."""
    with database.engine.begin() as connection:
        connection.execute(tables.runs.update().values(takeover_after=0.0))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a SQLite file, as another program does that is suspended while it writes."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


def sql(database: Database, query: str) -> list[tuple[Any, ...]]:
    with database.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.text(query))]


def script_of(version: int) -> str:
    """Return the SQL that creates a SQLite database of an older version: a grid of six points, five of them claimed.

    data/version_N.sql was written by the code of that version; that of version 5 migrated the one before. Version 4 changed
    PostgreSQL only.
    """
    script = (Path(__file__).parent / f"data/version_{3 if version == 4 else version}.sql").read_text()
    return script.replace('INSERT INTO "hpo_schema" VALUES(3);', f'INSERT INTO "hpo_schema" VALUES({version});')
