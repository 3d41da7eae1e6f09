"""The harness of benchmarks/chaos.py, for one short round."""

from __future__ import annotations

import pytest

from benchmarks.chaos import run_rounds


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.postgres
def test_a_short_chaos_leaves_the_study_whole() -> None:
    """A restart of PostgreSQL, then `kill -9` of a worker. The long one is `python -m benchmarks.chaos --rounds 100`."""
    found = run_rounds(1, seed=3506, storage="postgresql", kills=2)
    assert found["violations"] == []
    assert sum(found["events"].values()) >= 1
