"""The harness of benchmarks/chaos.py, for one short round."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos import Fault, Plan, Round
from benchmarks.postgres import Postgres


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.ray(starts=2)
@pytest.mark.postgres
def test_a_short_chaos_leaves_the_study_whole(tmp_path: Path, postgres: Postgres) -> None:
    """PostgreSQL crashes, and a driver is killed. The long one is `python -m benchmarks.chaos --rounds 100`."""
    plan = Plan(
        sampler="random",
        scheduler="asha",
        reduction_factor=2,
        points=1000,
        budget=12,
        max_epochs=6,
        epoch_seconds=0.3,
        drivers=1,
        slots=1,
        lease_seconds=3.0,
        faults=(Fault("database", 0.5, False, 1.0, 0, 0.0), Fault("driver", 3.0, False, 0.0, 0, 0.0)),
        checkpoint_every=1,
        mode="promote",
    )
    current = Round(tmp_path, postgres.create_database("short_chaos"), plan, postgres, "0")
    try:
        assert current.run() == []
    finally:
        current.close()
    assert [event["kind"] for event in current.events] == ["database", "driver"]
    assert current.starts == 2
