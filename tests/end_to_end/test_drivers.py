"""16 drivers, each a process, share a study on one PostgreSQL: no duplicate, exact budgets, even shares, no starvation.

They do what `hpo run` does with storage, without Ray: 16 of those would need minutes on two cores.
"""

from __future__ import annotations

import pytest

from benchmarks.drivers import Load, measure
from benchmarks.postgres import Postgres

pytestmark = [pytest.mark.slow, pytest.mark.postgres]

DRIVERS = 16


@pytest.mark.parametrize("sampler", ["random", "grid"])
def test_16_drivers_share_a_study_evenly(postgres: Postgres, sampler: str) -> None:
    trials = 6 * DRIVERS
    found = measure(postgres, Load(sampler, DRIVERS, trials, epochs=2, epoch_seconds=0.1))
    assert found["mistakes"] == []
    assert found["trials"] == trials
    least, _, most = found["shares"]
    assert least >= trials / DRIVERS / 2, found
    assert most <= trials / DRIVERS * 2, found
    assert found["locks_per_trial"] < DRIVERS / 2, found  # not once for each point and driver
    assert found["connections_median"] <= DRIVERS * 1.5, found
