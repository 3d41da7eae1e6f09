"""A study of toy trials."""

from __future__ import annotations

import pytest

from storage.database import Database
from storage.studies import open_study
from storage.study import Study


@pytest.fixture
def study(database: Database) -> Study:
    return open_study(database, "toy", direction="maximize", fingerprint="f", settings={"metric": "value"})
