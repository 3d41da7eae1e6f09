"""An open database and a study in it, on each backend in turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from storage.database import Database, open_database
from storage.studies import Study
from tests.storage.builders import open_s


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    with open_database(url) as opened:
        yield opened


@pytest.fixture
def study(database: Database) -> Study:
    return open_s(database)
