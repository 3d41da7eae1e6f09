"""The page of studies side by side, and the section of a report that compares a study with its earlier studies."""

from __future__ import annotations

import dataclasses
import datetime
import secrets
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.errors import SettingError
from hpo.paths import DEFAULT_STORAGE, RunsDir, write_atomically
from hpo.report.comparison import Comparison, compare, comparison_remarks, comparison_rows, progress_figures
from hpo.report.results import Results
from hpo.report.templating import PageFigure, curve_page_figure, environment

if TYPE_CHECKING:
    from storage.study import Study

CAPTION = (
    "Each line is the best value so far. It starts with results of earlier studies, where a study has some. Device time is "
    "the time that trials were trained; of a trial on a quarter of a GPU, a quarter."
)


@dataclass(frozen=True)
class ComparisonSection:
    """A comparison as the templates show it.

    Attributes:
        studies: how many there are.
        columns: headings of the table.
        rows: its texts.
        figures: the curves.
        remarks: what a reader must know, one line each.
    """

    studies: int
    columns: list[str]
    rows: list[list[str]]
    figures: list[PageFigure]
    remarks: list[str]


def write_comparison(comparison: Comparison, runs_dir: RunsDir) -> Path:
    """Write the page of a comparison; return its path. It needs no network and no other file.

    Raises:
        SettingError: the folder cannot be written.
    """
    from plotly.offline import get_plotlyjs

    names = [study.name for study in comparison.studies]
    folder = runs_dir.comparison(names)
    page = (
        environment()
        .get_template("comparison.html")
        .render(
            title=", ".join(names),
            comparison=build_section(comparison),
            made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            plotlyjs=get_plotlyjs(),
            nonce=secrets.token_urlsafe(16),  # only our own scripts run, even if a text got into the page as HTML
        )
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "index.html", page.encode())
    except OSError as error:
        raise SettingError(f"cannot write the comparison to {folder}: {error.strerror}") from None
    return folder / "index.html"


def compare_with_ancestors(results: Results) -> ComparisonSection | None:
    """Return a study next to the earlier studies that it took over trials from; None if it has none.

    Those in other databases are not opened, which may need a password: the section says how to compare with them.

    Raises:
        StorageError: the database cannot be used.
    """
    if not results.sources:
        return None
    remarks: list[str] = []
    ancestors: dict[int, Study] = {}  # one that was renamed may have been taken over under both names
    with results.study.database:
        for source in results.sources:
            if source.storage:
                own = results.study.database.url
                named = [] if own == DEFAULT_STORAGE else ["--storage", own]
                command = shlex.join(["hpo", "compare", results.name, "--other", source.study, source.storage, *named])
                remarks.append(f"{source.study} is in another database: {command}")
            elif found := _find(results, source.study):
                ancestors.update({study.study_id: study for study in found})
            else:
                remarks.append(f"{source.study} is not in the database any more")
        section = build_section(compare([results.study, *ancestors.values()]))
    return dataclasses.replace(section, remarks=[*section.remarks, *remarks])


def build_section(comparison: Comparison) -> ComparisonSection:
    """Return a comparison as the templates show it."""
    columns, rows = comparison_rows(comparison)
    drawn = enumerate(progress_figures(comparison))
    figures = [curve_page_figure(_figure_name(place), figure, CAPTION) for place, figure in drawn]
    return ComparisonSection(len(comparison.studies), columns, rows, figures, comparison_remarks(comparison))


def _figure_name(place: int) -> str:
    """Return the name of a figure: of each objective, there is one over trials, and then one over device time."""
    objective, axis = divmod(place, 2)
    name = ("best_over_trials", "best_over_time")[axis]
    return f"{name}_{objective + 1}" if objective else name


def _find(results: Results, name: str) -> list[Study]:
    """Return an earlier study of the same database, or those that it was renamed to."""
    from storage.studies import find_study, renamed_from

    database = results.study.database
    found = find_study(database, name)
    studies = [found] if found is not None else [find_study(database, each) for each in renamed_from(database, name)]
    return [study for study in studies if study is not None and study.name != results.study.name]
