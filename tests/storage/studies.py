"""A study with a row in every table, what a database holds of a study, and processes that are killed while they write."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState

from storage import optuna_tables, tables
from storage.database import Database, open_database
from storage.imports import ImportedTrial, Origin, TakenOver, import_trials
from storage.pruners import SuccessiveHalving
from storage.run import Run
from storage.studies import open_study
from storage.study import Study
from tests.storage.builders import GRID, POINTS, claim_one, config_key, grid_run, kill

FILE_EVENTS = {"os.link", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.utime"}


def full_study(database: Database, name: str = "s") -> Study:
    """Create a study with trials in every state. A driver that was killed has left one; one is of an earlier study."""
    study = open_study(
        database,
        name,
        direction="maximize",
        fingerprint="f",
        settings={"name": name, "metric": "m"},
        total_trials=4,
    )
    origin = Origin("old", "abc", 7)
    metrics = {1: {"m": 0.25, "loss": float("nan")}}
    reused = ImportedTrial(
        origin, {"a": 2, "b": "y"}, GRID, TrialState.COMPLETE, 0.25, config_key(POINTS[3]), {1: 0.25}, metrics
    )
    import_trials(study, [reused], sources=[TakenOver("old", reused=1)])
    run = grid_run(study, pruner=SuccessiveHalving(True, "s", 1, 2))
    run.__enter__()
    finish_some(run)
    kill(run)
    waiting: dict[str, BaseDistribution] = {"c": CategoricalDistribution([None, 1])}
    study.optuna_study.enqueue_trial({"c": None})
    study.optuna_study.ask(waiting)  # takes the enqueued one: a RUNNING trial of another program
    trial = study.trials()[1]
    system = {f"dashboard:{trial._trial_id}:note_ver": 1, "NSGAIISampler:parent:1": [trial._trial_id]}
    study.set_system_attrs(system | {"plain": 1})
    return study


def finish_some(run: Run) -> None:
    """Complete a trial, let one fail after an epoch, and leave one RUNNING after an epoch."""
    run.enqueue(POINTS, GRID)
    for number in range(3):
        claim = claim_one(run)
        run.record(claim, {"derived": {"d": number}}, {"device": "cpu"})
        run.decide(claim, 1, {"m": 0.5 + number, "loss": 1.0}, 0.5 + number)
        if number == 0:
            run.complete(claim, float("inf"))
        elif number == 1:
            run.fail(claim, "ValueError: no", "Traceback ...")
    run.flush()


def content(database: Database, name: str) -> dict[str, Any]:
    """Return all that a database holds of a study: for each table, its rows with numbers instead of primary keys.

    Left out is what differs between a study and its copy: tokens and `hpo:id`.
    """
    with database.engine.connect() as connection:
        studies, trials, runs = optuna_tables.studies, optuna_tables.trials, tables.runs
        study_id = connection.scalar(sa.select(studies.c.study_id).where(studies.c.study_name == name))
        rows = connection.execute(sa.select(trials.c.trial_id, trials.c.number).where(trials.c.study_id == study_id))
        numbers: dict[int | None, int] = {row.trial_id: row.number for row in rows}
        keys = connection.scalars(sa.select(runs.c.run).where(runs.c.study == study_id).order_by(runs.c.run)).all()
        run_numbers: dict[int | None, int] = {key: number for number, key in enumerate(keys)}
        found: dict[str, list[dict[str, Any]]] = {}
        for table in (*optuna_tables.metadata.sorted_tables, *tables.metadata.sorted_tables):
            column = next((each for each in ("study_id", "study", "trial_id", "trial") if each in table.c), None)
            if column is None or table is studies:
                continue
            where = table.c[column] == study_id if column.startswith("study") else table.c[column].in_(numbers)
            read = connection.execute(sa.select(table).where(where)).mappings()
            found[table.name] = sorted((_plain(table, row, numbers, run_numbers) for row in read), key=repr)
    return {table: rows for table, rows in found.items() if rows}


def _plain(
    table: sa.Table, row: Mapping[Any, Any], numbers: Mapping[int | None, int], runs: Mapping[int | None, int]
) -> dict[str, Any]:
    is_numbered = table.metadata is optuna_tables.metadata
    left_out = {"study_id", "study", "token"} | {key.name for key in table.primary_key if is_numbered}
    plain = {key: value for key, value in row.items() if key not in left_out}
    plain |= {key: numbers[row[key]] for key in ("trial_id", "trial") if key in row}
    if "run" in row:
        plain["run"] = runs.get(row["run"])
    if plain.get("key") == "hpo:id":
        del plain["value_json"]
    if str(plain.get("key")).startswith("NSGAIISampler:parent"):
        plain["value_json"] = [numbers[each] for each in json.loads(row["value_json"])]
    return plain


def kill_at(step: int, urls: Sequence[str], operation: Callable[..., object]) -> bool:
    """Run an operation in a new process, and kill it before it changes something for the nth time.

    Args:
        step: counts statements that write, commits, and changes of files.
        urls: the databases that the operation gets, open.
        operation: what to run.

    Returns:
        Whether it was killed. Otherwise it has ended before, and counts as tested.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # since Python 3.12, of forks with threads: this one ends soon
        pid = os.fork()
    if not pid:
        try:
            databases = [open_database(url) for url in urls]
            _die_at(step)
            operation(*databases)
        except BaseException:  # noqa: BLE001
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status in {0, signal.SIGKILL}, status
    return status == signal.SIGKILL


def _die_at(step: int) -> None:
    left = [step]

    def count(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def count_statement(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith(("INSERT", "UPDATE", "DELETE")):
            count()

    def count_file(event: str, _: Any) -> None:
        if event in FILE_EVENTS:
            count()

    sa.event.listen(sa.Engine, "before_cursor_execute", count_statement)
    sa.event.listen(sa.Engine, "commit", count)
    sys.addaudithook(count_file)
