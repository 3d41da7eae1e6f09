"""The examples of storage/README.md run, and its list of columns is complete."""

from __future__ import annotations

import re
from pathlib import Path

import sqlalchemy as sa

from storage import tables
from storage.database import Database, open_database
from storage.studies import open_study
from storage.tables import metadata
from tests.storage.builders import GRID, POINTS, claim_one, grid_run, prune, sql

README = (Path(__file__).parent.parent.parent / "storage/README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_queries_return_what_the_text_says(database: Database) -> None:
    study = open_study(database, "grid", direction="maximize", fingerprint="f", settings={"metric": "m"})
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        for value in (0.5, 0.75):
            claim = claim_one(run)
            run.report(claim, 1, {"m": value, "loss": 1.0}, value)
            run.complete(claim, value, {"test_accuracy": value - 0.25})
        better = claim_one(run)
        run.report(better, 1, {"m": 0.9}, 0.9)
        prune(run, better)
    best, metrics = blocks("sql")
    assert sql(database, best) == [(1, 0.75, "0.5")]
    assert sql(database, metrics) == [(1, "loss", 1.0), (1, "m", 0.5)]


def test_every_column_of_our_tables_is_listed() -> None:
    listed: dict[str, list[str]] = {}
    table = ""
    for first, columns in re.findall(r"^\| (?:`(hpo_\w+)` )?\| ((?:`\w+`(?:, )?)+) \|", README, re.MULTILINE):
        table = first or table
        listed.setdefault(table, []).extend(re.findall(r"\w+", columns))
    assert {name: set(columns) for name, columns in listed.items()} == {
        name: set(table.columns.keys()) for name, table in metadata.tables.items() if name.startswith("hpo_")
    }


def test_the_table_of_the_example_is_created(tmp_path: Path) -> None:
    (example,) = blocks("python")
    names = dict(vars(tables))
    exec(compile(example, "storage/README.md", "exec"), names)
    try:
        with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
            columns = sa.inspect(database.engine).get_columns("hpo_notes")
    finally:
        metadata.remove(names["notes"])
    assert [column["name"] for column in columns] == ["trial", "text"]
