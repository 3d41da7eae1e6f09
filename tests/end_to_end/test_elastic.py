"""A cluster that changes under a running search: nodes join, are drained, lose power, and are added by Ray's autoscaler."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.toy import held_processes, hold_epochs
from tests.end_to_end.processes import (
    MAX_EPOCHS,
    Driver,
    chains,
    check_chains,
    last_epochs,
    rows,
)
from tests.end_to_end.ray_nodes import RayNodes
from tests.factories import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.ray]


def test_trials_follow_the_nodes_of_a_cluster(tmp_path: Path) -> None:
    database, hold = tmp_path / "runs/hpo.db", tmp_path / "hold"
    hold_epochs(hold, 3)
    space = chains(tmp_path, hold=str(hold))
    with RayNodes() as nodes:
        nodes.add("stays")
        driver = Driver(tmp_path, 0, space, "--set", "max_failures=0", **nodes.variables)
        for count, name in enumerate(("drained", "lost", ""), 1):
            driver.wait_until(lambda count=count: len(held_processes(hold)) == count)  # type: ignore[misc]
            if name:
                nodes.add(name)
        assert "room for 3 trials at a time now, before for 2" in driver.output
        nodes.kill("lost")
        nodes.terminate("drained")
        driver.wait_until(lambda: "room for 1 trial at a time now" in driver.output)
        hold.unlink()
        wait_until(lambda: nodes.has_ended("drained"), 25)  # its trial ends after its epoch; Ray would wait for 30 s
        assert driver.wait() == 0, driver.output
    check_chains(database)
    assert re.search(r"trial \d WAITING: its machine will leave the cluster, saved after epoch 3", driver.output)
    assert re.search(r"trial \d WAITING: its machine has left the cluster", driver.output)
    assert rows(database, "SELECT count(*) FROM hpo_trials WHERE crashes > 0") == [(0,)], "no trial is to blame"


def test_the_last_pod_that_kubernetes_deletes_saves_its_trial_and_ends_within_seconds(tmp_path: Path) -> None:
    """As KubeRay starts it; bash becomes `ray start`, so the kubelet's SIGTERM reaches it."""
    space = chains(tmp_path, epoch_seconds=1.0)
    with RayNodes() as nodes:
        nodes.add("pod", shell=["/bin/bash", "-c", "--"])
        driver = Driver(tmp_path, 0, space, "--set", "max_failures=0", **nodes.variables)
        driver.wait_until(lambda: "epoch 1/" in driver.output)
        nodes.terminate("pod")
        wait_until(lambda: nodes.has_ended("pod"), 20)  # Ray would wait for 30 s, and the kubelet for 60 s
        driver.press_ctrl_c()
        assert driver.wait() == 130, driver.output
    assert re.search(r"trial 0 WAITING: its machine will leave the cluster, saved after epoch \d", driver.output)


def test_a_search_asks_an_empty_cluster_for_nodes(tmp_path: Path) -> None:
    space = chains(tmp_path, epoch_seconds=1.0)
    with RayNodes(most=2) as nodes:
        driver = Driver(tmp_path, 0, space, "--set", "parameters.x=[1, 2]", **nodes.variables)
        driver.wait_until(lambda: "waiting for one to join" in driver.output)
        assert driver.wait() == 0, driver.output
    assert "the cluster has room for 2 trials at a time now" in driver.output
    assert last_epochs(tmp_path / "runs/hpo.db") == {0: MAX_EPOCHS, 1: MAX_EPOCHS}
