"""One finished grid for tests that only read."""

from __future__ import annotations

import pytest

from hpo.report.results import Results
from tests.report.studies import finish_grid_in


@pytest.fixture(scope="session")
def grid_results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of a finished grid. Its database is not to be changed."""
    return finish_grid_in(tmp_path_factory.mktemp("grid"))


@pytest.fixture
def undrawn_png(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the slowest part of a report, for tests that do not look at the PNG files."""
    monkeypatch.setattr("hpo.report.png_figures.to_png", lambda _: b"")
