"""The same command resumes a study after its driver was stopped or killed, and no epoch is lost that has a checkpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks.toy import held_processes, hold_epochs
from tests.end_to_end.processes import (
    MAX_EPOCHS,
    ONE_AT_A_TIME,
    POINTS,
    Driver,
    chains,
    check_chains,
    count_epochs,
    count_states,
    last_epochs,
    rows,
    write_space,
)


def check_private(driver: Driver) -> None:
    """Check that other machines reach none of a driver's processes, and that other users reach none of Ray's files."""
    processes = [psutil.Process(driver.pid), *driver.children()]
    listening = [
        (process.name(), connection.laddr.ip.removeprefix("::ffff:"))
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {name for name, _ in listening} >= {"raylet", "gcs_server"}
    assert {address for _, address in listening} == {"127.0.0.1"}, listening
    lines = " ".join(word for process in processes for word in process.cmdline())
    folders = {Path(found) for found in re.findall(r"/[^ =:]*?/hpo-ray-\w+", lines)}
    assert folders
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}
    of_ray = [process for process in processes if process.name() in {"raylet", "gcs_server"}]
    tokens = {Path(process.environ()["RAY_AUTH_TOKEN_PATH"]) for process in of_ray}
    assert {token.parent for token in tokens} <= folders
    assert {token.stat().st_mode & 0o777 for token in tokens} == {0o600}


@pytest.mark.slow
@pytest.mark.ray(starts=5)
def test_a_study_survives_signals_kill_9_and_two_drivers(tmp_path: Path, start_driver: Callable[..., Driver]) -> None:
    """One study, five drivers: each start of Ray is expensive, and each driver finds what the one before it left."""
    database, hold, log = tmp_path / "runs/hpo.db", tmp_path / "hold", tmp_path / "epochs.log"
    path = chains(tmp_path, hold=str(hold), log=str(log))

    # Two signals stop a driver at once, in the middle of an epoch.
    hold_epochs(hold, 1)
    (tmp_path / "home").mkdir()
    driver = start_driver(path, HOME=str(tmp_path / "home"))
    at_a_time = min(len(POINTS), len(os.sched_getaffinity(0)))
    driver.wait_until(lambda: len(held_processes(hold)) == at_a_time)  # a worker that starts has no trial yet
    commands = [" ".join(child.cmdline()) for child in driver.children()]
    assert any("gcs_server" in command for command in commands)
    assert not any("ray::IDLE" in command for command in commands), "a worker was started that no trial needs"
    assert not any("/autoscaler/" in command for command in commands), "ray.shutdown would wait a second for it"
    check_private(driver)
    assert not (tmp_path / "home/.ray").exists(), "others may be able to read what Ray writes there"
    driver.terminate_group()
    driver.wait_until(lambda: "Ctrl-C again" in driver.output)
    assert driver.is_running, "the first signal waits for the epoch in flight"
    driver.terminate()
    assert driver.wait() == 130, driver.output
    assert set(count_states(database)) == {"WAITING"}
    assert count_epochs(database) == 0

    # kill -9, at no particular moment.
    hold_epochs(hold, 4)
    driver = start_driver(path)
    driver.wait_until(lambda: count_epochs(database) >= 3)
    driver.kill()
    in_flight = count_states(database)["RUNNING"]
    assert in_flight >= 1

    # One signal stops a driver after the epoch in flight.
    hold_epochs(hold, 4)
    driver = start_driver(path)
    driver.wait_until(lambda: driver.is_held(hold))
    assert "after epoch" in driver.output, "it resumes the trials of the killed driver"
    stored = last_epochs(database)
    driver.press_ctrl_c()
    driver.wait_until(lambda: "Ctrl-C again" in driver.output)
    hold.unlink()
    assert driver.wait() == 130, driver.output
    assert "chains: " in driver.output, "the summary is printed"
    assert "The same command resumes it" in driver.output
    states = count_states(database)
    assert set(states) <= {"WAITING", "COMPLETE"}
    assert states["WAITING"] >= 1
    # A trial whose worker was still starting has trained nothing; it may have no checkpoint.
    interrupted = {number: epoch for number, epoch in last_epochs(database).items() if epoch > stored.get(number, 0)}
    assert interrupted, "the epoch in flight is stored"
    for number, epoch in interrupted.items():
        kept = list((tmp_path / "runs/checkpoints").glob(f"*/{number}/epoch-{epoch:06d}.pt"))
        assert kept, f"trial {number} keeps the checkpoint of epoch {epoch}"

    # Two drivers share the rest.
    hold_epochs(hold, MAX_EPOCHS)
    drivers = [start_driver(path) for _ in range(2)]
    owners = (
        "SELECT count(DISTINCT run), count(*) FROM hpo_trials JOIN trials ON trial_id = trial WHERE state = 'RUNNING'"
    )

    def all_is_claimed() -> bool:
        ((runs, trials),) = rows(database, owners)
        return bool(runs == 2 or trials == len(POINTS))  # with many cores, the first driver may claim all

    drivers[0].wait_until(all_is_claimed)
    hold.unlink()
    assert [driver.wait() for driver in drivers] == [0, 0], drivers[0].output + drivers[1].output
    assert "Resuming: storage holds" in drivers[0].output
    check_chains(database)
    assert rows(database, "SELECT count(*) FROM hpo_runs WHERE ended IS NULL") == [(1,)], "the killed one"
    assert rows(database, "SELECT count(*) FROM hpo_runs") == [(5,)]
    # The best 3 of the 4 trials keep their checkpoints: one file each.
    (folder,) = (tmp_path / "runs/checkpoints").iterdir()
    best = rows(
        database,
        "SELECT number FROM trials JOIN trial_values USING (trial_id) ORDER BY value DESC LIMIT 3",
    )
    assert {(int(path.parent.name), path.name) for path in folder.glob("*/epoch-*")} == {
        (number, f"epoch-{MAX_EPOCHS:06d}.pt") for (number,) in best
    }
    computed, needed = len(log.read_text().splitlines()), len(POINTS) * MAX_EPOCHS
    # kill -9 costs each trial the epoch in flight, and the one before if its checkpoint was being written.
    assert needed <= computed <= needed + 2 * in_flight


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.ray(starts=3)
def test_ctrl_c_saves_epochs_that_no_checkpoint_was_due_for(
    tmp_path: Path, start_driver: Callable[..., Driver]
) -> None:
    database, hold, log = tmp_path / "runs/hpo.db", tmp_path / "hold", tmp_path / "epochs.log"
    parameters = {"x": POINTS[:2], "epoch_seconds": 0.1, "hold": str(hold), "log": str(log)}
    space = {"sampler": "grid", "trainable": "benchmarks.toy:chain", "metric": "value", "parameters": parameters}
    path = write_space(tmp_path, "chains", space | ONE_AT_A_TIME | {"max_epochs": MAX_EPOCHS, "checkpoint_every": 100})
    hold_epochs(hold, 4)
    driver = start_driver(path)
    driver.wait_until(lambda: count_epochs(database) >= 3 and driver.is_held(hold))
    assert not list((tmp_path / "runs/checkpoints").glob("*/*/epoch-*"))
    driver.press_ctrl_c()
    driver.wait_until(lambda: "Ctrl-C again" in driver.output)
    hold.unlink()
    assert driver.wait() == 130, driver.output
    saved = {path.name for path in (tmp_path / "runs/checkpoints").glob("*/*/epoch-*")}
    assert "epoch-000004.pt" in saved
    told = tmp_path / "told.jsonl"
    variables = {"HPO_ON_FINISH": f"sh -c '(cat; echo) >> {told}; exit 3'"}
    hurried = start_driver(path, "--exit-after", "1s", **variables)  # it is over before Ray has started
    assert hurried.wait() == 130, hurried.output
    assert "Stopped: --exit-after is over. The same command resumes it." in hurried.output
    for _ in range(2):  # the second one finds nothing to do, and tells nobody
        last = start_driver(path, **variables)
        assert last.wait() == 0, last.output
    endings = [json.loads(line) for line in told.read_text().splitlines()]
    assert [(each["study"], each["state"], each["exit_code"]) for each in endings] == [
        ("chains", "stopped", 130),
        ("chains", "finished", 0),
    ]
    assert (endings[1]["study_state"], endings[1]["trials"]) == ("finished", {"COMPLETE": 2})
    assert "on_finish: sh: exit code 3. The search itself is not affected" in hurried.output
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 2 * MAX_EPOCHS, "no epoch is trained twice"
