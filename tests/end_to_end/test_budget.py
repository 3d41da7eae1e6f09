"""A budget of device time holds over kill -9, two drivers and a resumption with a larger one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.toy import hold_epochs
from tests.end_to_end.processes import (
    MAX_EPOCHS,
    ONE_AT_A_TIME,
    POINTS,
    Driver,
    chains,
    check_chains,
    count_states,
    hpo,
    last_epochs,
    rows,
)

EPOCH_SECONDS = 0.5
LEAST_SECONDS = 0.9 * EPOCH_SECONDS  # the driver hears a moment later that a worker has started
SOME_SECONDS = 4.0  # a third of what all trials take
SECONDS_OF_POINTS = """
    SELECT CAST(param_value AS INTEGER), sum(seconds) FROM hpo_usage JOIN trial_params ON trial_id = trial
    WHERE param_name = 'x' GROUP BY 1
"""  # {index in POINTS: seconds}
RUNNING_POINT = """
    SELECT CAST(param_value AS INTEGER) FROM trials JOIN trial_params USING (trial_id)
    WHERE state = 'RUNNING' AND param_name = 'x'
"""


def device_seconds(database: Path) -> float:
    ((seconds,),) = rows(database, "SELECT sum(seconds * devices) FROM hpo_usage")
    return float(seconds)


def with_budget(seconds: float) -> tuple[str, str]:
    return "--set", f"budget.gpu_hours={seconds / 3600}"


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.ray(starts=4)
def test_a_budget_of_device_time_survives_kill_9_and_is_shared_by_two_drivers(
    tmp_path: Path, start_driver: Callable[..., Driver]
) -> None:
    """One study, four drivers: each start of Ray is expensive, and each driver finds what the one before it left."""
    database, hold, log = tmp_path / "runs/hpo.db", tmp_path / "hold", tmp_path / "epochs.log"
    path = chains(tmp_path, ONE_AT_A_TIME, hold=str(hold), log=str(log), epoch_seconds=EPOCH_SECONDS)

    # kill -9, in the third epoch: what was used for the first two is stored with them.
    hold_epochs(hold, 3)
    driver = start_driver(path, *with_budget(3600.0))
    driver.wait_until(lambda: bool(last_epochs(database)) and set(last_epochs(database).values()) == {2})
    (killed,) = rows(database, RUNNING_POINT)
    driver.kill()
    hold.unlink()
    used = dict(rows(database, "SELECT number, seconds FROM hpo_usage JOIN trials ON trial_id = trial"))
    assert all(used[number] >= epoch * LEAST_SECONDS for number, epoch in last_epochs(database).items())

    # Two drivers share the rest of a small budget, and stop after their epochs.
    limit = device_seconds(database) + SOME_SECONDS
    drivers = [start_driver(path, *with_budget(limit)) for _ in range(2)]
    for driver in drivers:
        assert driver.wait() in {0, 1}, driver.output  # 1: no trial has completed
        assert "Stopped: budget.gpu_hours is spent: the trials have used" in driver.output
        assert "With a larger budget.gpu_hours, the same command resumes it" in driver.output
    assert device_seconds(database) >= limit
    states = count_states(database)
    assert "RUNNING" not in states
    assert states["WAITING"] >= 1
    computed = len(log.read_text().splitlines())
    assert computed < len(POINTS) * MAX_EPOCHS

    # It is spent already: one message, and nothing is trained.
    spent = hpo(tmp_path, "run", path, *with_budget(limit))
    assert spent.stdout.count("budget.gpu_hours is spent") == 1
    assert spent.stderr == ""
    assert len(log.read_text().splitlines()) == computed

    # With a larger budget, the search continues.
    assert start_driver(path, *with_budget(3600.0)).wait() == 0
    check_chains(database)
    trained = Counter(line.split()[0] for line in log.read_text().splitlines())  # with the epochs that the kill lost
    trained[str(POINTS[killed[0]])] -= 1  # its worker may have finished the epoch in flight, whose time nobody stored
    used = dict(rows(database, SECONDS_OF_POINTS))
    assert all(used[index] >= trained[str(x)] * LEAST_SECONDS for index, x in enumerate(POINTS)), (used, trained)
