"""Studies side by side: what each found, how soon, and what makes them different."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from hpo.paths import RunsDir
from hpo.report.comparison import Comparison, Step, compare, comparison_remarks, comparison_rows, progress_figures
from hpo.report.comparison_page import compare_with_ancestors, write_comparison
from hpo.report.page import write_report
from hpo.report.plotly_figures import to_plotly
from hpo.report.reading import read_results
from storage import tables
from storage.database import Database, open_database
from storage.imports import ImportedTrial, Origin, TakenOver, import_trials
from storage.management import rename_study
from storage.optuna_tables import write_attrs
from storage.ownership import ClaimedTrial
from storage.parents import Parent
from storage.run import Run
from storage.study import Study
from tests.factories import finish_study
from tests.report.studies import HOSTILE, add_trial, finish_grid, grid_space, optuna_study
from tests.storage.builders import prune

OBJECTIVES = [{"metric": "val_accuracy", "direction": "maximize"}, {"metric": "loss", "direction": "minimize"}]
VALUES = {64: 0.5, 256: 0.7, 512: 0.6}  # in this order


def study_of(
    database: Database,
    name: str,
    *,
    values: Mapping[int, float] = VALUES,
    pruned: int | None = None,
    gpu: float | None = None,
    **changes: Any,
) -> Study:
    """Create a study whose trials end with these values, after four epochs of 2.5 s each."""
    space = grid_space(name=name, **changes)

    def epochs_of(claim: ClaimedTrial) -> list[dict[str, float]]:
        value = values[claim.params["batch_size"]]
        return [{space.metric: value, "epoch_seconds": 2.5, "loss": 1.0} for _ in range(space.max_epochs)]

    def end(run: Run, claim: ClaimedTrial, value: float, **others: Any) -> None:
        prune(run, claim) if claim.params["batch_size"] == pruned else run.complete(claim, value, **others)
        run.flush()

    name_and_count = ("cpu", 1.0) if gpu is None else ("cuda", gpu)
    study = finish_study(
        database,
        space,
        space.grid_points(),
        provenance={},
        device={"device": name_and_count[0]},
        epochs_of=epochs_of,
        end=end,
    )
    used = dict(zip(("device", "devices"), name_and_count, strict=True), seconds=2.5 * space.max_epochs)
    with database.engine.begin() as connection:
        connection.execute(tables.usage.update().where(tables.usage.c.study == study.study_id).values(used))
    return study


def reuse(study: Study, value: float, **changes: Any) -> None:
    """Take over a result of an earlier study, with epochs that this study did not train."""
    origin = Origin("old", "abc", 0)
    distributions = {name: found for name, found in grid_space().distributions().items() if name == "batch_size"}
    trial = ImportedTrial(
        origin,
        {"batch_size": 64},
        distributions,
        TrialState.COMPLETE,
        value,
        "key",
        metrics={1: {"epoch_seconds": 99.0}},
    )
    import_trials(study, [trial], sources=[TakenOver("old", reused=1, **changes)])


def test_the_best_so_far_over_trials_and_device_time(database: Database) -> None:
    (progress,) = compare([study_of(database, "a")]).studies
    assert progress.objectives[0].steps == [Step(1, 10.0, 0.5), Step(2, 20.0, 0.7), Step(3, 30.0, 0.7)]
    assert (progress.trials, progress.reused, progress.epochs, progress.device_seconds) == (3, 0, 12, 30.0)
    (objective,) = progress.objectives
    assert (objective.best, objective.best_trial) == (0.7, "#1 batch_size 256")


def test_epochs_of_a_trial_that_it_continues_are_not_counted(database: Database) -> None:
    study = study_of(database, "a")
    parent = Parent("a@1", 7, "0123456789ab", 3, "a-0123456789ab", "key")
    with database.engine.begin() as connection:
        write_attrs(connection, [(1, {"continued_from": parent.attribute})])
    (progress,) = compare([study]).studies
    assert (progress.epochs, progress.device_seconds) == (9, 30.0)


def test_a_metric_that_is_minimized(database: Database) -> None:
    (progress,) = compare([study_of(database, "a", metric="error", direction="minimize")]).studies
    assert [step.best for step in progress.objectives[0].steps] == [0.5, 0.5]
    assert (progress.objectives[0].best, progress.objectives[0].metric) == (0.5, "error")


def test_a_share_of_a_gpu_counts_as_a_share(database: Database) -> None:
    (progress,) = compare([study_of(database, "a", gpu=0.25)]).studies
    assert progress.device_seconds == 7.5


def test_a_pruned_trial_costs_time_and_is_never_the_best(database: Database) -> None:
    (progress,) = compare([study_of(database, "a", pruned=256)]).studies
    assert progress.objectives[0].steps == [Step(1, 10.0, 0.5), Step(3, 30.0, 0.6)]


def test_results_of_earlier_studies_are_known_from_the_start_and_cost_nothing(database: Database) -> None:
    study = study_of(database, "a")
    reuse(study, 0.65)
    (progress,) = compare([study]).studies
    assert progress.objectives[0].steps == [Step(0, 0.0, 0.65), Step(2, 20.0, 0.7), Step(3, 30.0, 0.7)]
    assert (progress.trials, progress.reused, progress.epochs, progress.device_seconds) == (3, 1, 12, 30.0)


def test_the_table_shows_where_the_best_was_found(database: Database) -> None:
    columns, rows = comparison_rows(
        compare([study_of(database, "a"), study_of(database, "b", values={**VALUES, 64: 0.9})])
    )
    expected = ["study", "state", "trials", "best val_accuracy", "best trial", "found after", "epochs", "device time"]
    assert columns == expected
    assert rows == [
        ["a", "finished", "3", "0.7000", "#1 batch_size 256", "2 of 3, 20s", "12", "30s"],
        ["b", "finished", "3", "0.9000", "#0 batch_size 64", "1 of 3, 10s", "12", "30s"],
    ]


def test_studies_of_two_databases_say_where_they_are(database: Database, tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path}/other.db") as other:
        comparison = compare([study_of(database, "a"), study_of(other, "a")])
        _, rows = comparison_rows(comparison)
        assert [row[0] for row in rows] == [f"a in {database.url}", f"a in {other.url}"]
        labels = {line.label for line in progress_figures(comparison)[0].lines}
        assert len(labels) == 2


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"max_epochs": 2}, "max_epochs differs, so values may not be comparable: 4 in a; 2 in b"),
        ({"seed": 1}, "seed differs, so values may not be comparable: 0 in a; 1 in b"),
        ({"data": {"val_samples": 7}}, "data.val_samples differs, so values may not be comparable: 5000 in a; 7 in b"),
        ({}, None),
    ],
)
def test_what_differs_is_said(database: Database, changes: dict[str, Any], difference: str | None) -> None:
    comparison = compare([study_of(database, "a"), study_of(database, "b", **changes)])
    assert comparison_remarks(comparison) == ([] if difference is None else [difference])
    assert len(progress_figures(comparison)[0].lines) == 2


def test_another_metric_is_said_and_not_drawn(database: Database) -> None:
    comparison = compare([study_of(database, "a"), study_of(database, "b", metric="error", direction="minimize")])
    assert comparison_remarks(comparison) == [
        "objective differs, so values may not be comparable: val_accuracy (maximize) in a; error (minimize) in b",
        "Not drawn, with another metric or without a completed trial: b",
    ]
    assert [line.label for line in progress_figures(comparison)[0].lines] == ["a"]
    columns, rows = comparison_rows(comparison)
    assert "best" in columns
    assert [row[3] for row in rows] == ["0.7000 val_accuracy", "0.5000 error"]


def test_a_study_of_another_program_is_compared_too(database: Database) -> None:
    plain = optuna_study(database)
    add_trial(plain, "COMPLETE", [0.25])
    comparison = compare([study_of(database, "a"), found(database, "plain")])
    assert comparison.studies[1].objectives[0].best == 0.25
    assert comparison_remarks(comparison) == [
        "objective differs, so values may not be comparable: val_accuracy (maximize) in a; value (minimize) in plain",
        "hpo cannot read the settings of plain, which may differ in data, seed or epochs",
        "Not drawn, with another metric or without a completed trial: plain",
    ]


def study_of_two(database: Database, name: str, values: list[list[float]]) -> Study:
    """Create a study of another program that maximizes `objective 0`, and minimizes `objective 1`."""
    plain = optuna_study(database, name, directions=("maximize", "minimize"))
    for each in values:
        add_trial(plain, "COMPLETE", each, params={"x": min(each[0], 1.0)})
    return found(database, name)


def test_each_of_several_objectives_is_compared(database: Database) -> None:
    a = study_of_two(database, "a", [[0.25, 1.0], [0.5, 2.0], [0.5, 3.0]])
    b = study_of_two(database, "b", [[0.125, 1.5], [0.5, 2.0], [0.75, 4.0]])
    comparison = compare([a, b])
    assert [[each.best for each in study.objectives] for study in comparison.studies] == [[0.5, 1.0], [0.75, 1.5]]
    assert [study.front for study in comparison.studies] == [
        [[0.5, 2.0], [0.25, 1.0]],
        [[0.75, 4.0], [0.5, 2.0], [0.125, 1.5]],
    ]
    columns, rows = comparison_rows(comparison)
    shown = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["study"] for row in shown] == ["a", "", "b", ""]
    assert [row["best"] for row in shown] == [
        "0.5000 objective 0",
        "1.0000 objective 1",
        "0.7500 objective 0",
        "1.5000 objective 1",
    ]
    assert [row["best trial"] for row in shown] == ["#1 x 0.5", "#0 x 0.25", "#2 x 0.75", "#0 x 0.125"]
    assert [row["found after"].split(",")[0] for row in shown] == ["2 of 3", "1 of 3", "3 of 3", "1 of 3"]
    assert [row["Pareto front"] for row in shown] == ["2", "", "3", ""]
    assert [row["of the joint one"] for row in shown] == ["2 of 4", "", "2 of 4", ""], "equal trials are both on it"
    titles = [figure.title for figure in progress_figures(comparison)]
    assert titles == [
        "Best objective 0 over trials",
        "Best objective 0 over device time",
        "Best objective 1 over trials",
        "Best objective 1 over device time",
    ]


def test_one_objective_next_to_several_ones(database: Database, tmp_path: Path) -> None:
    one, two = study_of(database, "one"), study_of(database, "two", objectives=OBJECTIVES)
    for studies in ([one, two], [two, one]):
        comparison = compare(studies)
        columns, rows = comparison_rows(comparison)
        assert "of the joint one" not in columns, "there is one front"
        assert {row[columns.index("Pareto front")] for row in rows} == {"1", ""}
        figures = progress_figures(comparison)
        assert [line.label for line in figures[0].lines] == [study.name for study in studies]
        assert all([line.label for line in figure.lines] == ["two"] for figure in figures[2:])
        html = write_comparison(comparison, RunsDir(tmp_path)).read_text()
        assert "2 studies side by side" in html
        assert html.count('class="plot"') == len({*re.findall('class="plot" id="([^"]+)"', html)}) == len(figures)


def test_values_that_a_trial_lacks_or_that_are_infinite_are_never_the_best(database: Database) -> None:
    study = study_of_two(database, "a", [[math.inf, 1.0], [0.5, -math.inf]])
    (progress,) = compare([study]).studies
    assert [each.best for each in progress.objectives] == [0.5, 1.0]


def found(database: Database, name: str) -> Study:
    from storage.studies import find_study

    study = find_study(database, name)
    assert study is not None
    return study


def test_studies_without_results_have_no_curves(database: Database, tmp_path: Path) -> None:
    optuna_study(database)
    comparison = compare([found(database, "plain")] * 2)
    assert progress_figures(comparison) == []
    assert write_comparison(comparison, RunsDir(tmp_path)).is_file()


def test_curves_are_steps_with_the_unit_of_the_time(database: Database) -> None:
    over_trials, over_time = progress_figures(compare([study_of(database, "a")]))
    (line,) = over_trials.lines
    assert (line.x, line.y) == ([1.0, 2.0, 2.0, 3.0], [0.5, 0.5, 0.7, 0.7])
    assert (over_trials.x_title, over_time.x_title) == ("trials that have ended", "device time, seconds")
    assert over_time.lines[0].x == [10.0, 20.0, 20.0, 30.0]
    layout = to_plotly(over_time)["layout"]
    assert layout["xaxis"] == {"title": {"text": "device time, seconds"}}, "ticks may be between whole numbers"


def test_the_page_is_one_file_that_shows_names_as_text(database: Database, tmp_path: Path, undrawn_png: None) -> None:
    comparison = compare([finish_grid(database), study_of(database, "b", metric=HOSTILE[:50])])
    page = write_comparison(comparison, RunsDir(tmp_path))
    assert page == tmp_path / "comparisons" / "grid+b" / "index.html"
    html = page.read_text()
    assert html.count('class="plot"') == 2
    assert "objective differs" in html
    assert "<script>window" not in html
    assert "https://cdn" not in html.partition("plotly.js v")[0]


# --- the report of a study with earlier studies --------------------------------------------------------------------------


def test_a_report_compares_a_study_with_its_earlier_studies(database: Database, tmp_path: Path) -> None:
    study_of(database, "old", values={64: 0.65, 256: 0.6, 512: 0.6})
    study = study_of(database, "a")
    reuse(study, 0.65)
    section = compare_with_ancestors(read_results(study))
    assert section is not None
    assert [row[0] for row in section.rows] == ["a", "old"]
    assert section.remarks == []
    page = write_report(read_results(study), RunsDir(tmp_path))
    html, markdown = page.read_text(), page.with_name("report.md").read_text()
    assert "Compared with earlier studies" in html
    assert "| old | finished | 3 | 0 | 0.6500 |" in markdown
    for name in ("best_over_trials", "best_over_time"):
        assert f'id="{name}"' in html
        assert page.with_name(f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("storage", "remark"),
    [
        (
            "sqlite:///old.db",
            "old is in another database: hpo compare a --other old sqlite:///old.db --storage DATABASE",
        ),
        ("", "old is not in the database any more"),
    ],
)
def test_earlier_studies_that_are_not_here_are_named(database: Database, storage: str, remark: str) -> None:
    study = study_of(database, "a")
    reuse(study, 0.65, storage=storage)
    section = compare_with_ancestors(read_results(study))
    assert section is not None
    remark = remark.replace("DATABASE", database.url)
    assert (section.remarks, [row[0] for row in section.rows]) == ([remark], ["a"])


def test_an_earlier_study_that_was_renamed_is_compared_once(database: Database) -> None:
    old, study = study_of(database, "old"), study_of(database, "a")
    reuse(study, 0.65)
    rename_study(old, "new")
    study.optuna_study.set_user_attr("hpo:sources", [TakenOver(name).attribute for name in ("old", "new")])
    section = compare_with_ancestors(read_results(study))
    assert section is not None
    assert ([row[0] for row in section.rows], section.remarks) == (["a", "new"], [])


def test_a_study_without_earlier_studies_has_no_such_section(database: Database) -> None:
    assert compare_with_ancestors(read_results(study_of(database, "a"))) is None


def test_a_comparison_is_plain_values_for_json(database: Database) -> None:
    comparison = compare([study_of(database, "a")])
    assert isinstance(comparison, Comparison)
    (study,) = comparison.to_json()["studies"]
    assert study["objectives"][0]["steps"][0] == {"trials": 1, "device_seconds": 10.0, "best": 0.5}
