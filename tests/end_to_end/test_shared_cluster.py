"""Two drivers of one study share a Ray cluster: neither keeps cores that a trial of the other one waits for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.toy import held_processes, hold_epochs
from tests.end_to_end.processes import Driver, chains, count_states, write_space
from tests.end_to_end.ray_nodes import RayNodes

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.ray]


@pytest.mark.parametrize("ends", ["when its grid is trained", "when its patience is spent"])
def test_a_driver_that_waits_for_the_trial_of_another_one_frees_its_core(
    tmp_path: Path, start_driver: Callable[..., Driver], ends: str
) -> None:
    hold = tmp_path / "hold"
    hold_epochs(hold, 2)
    keys: dict[str, Any] = {"max_epochs": 2, "resources": {"cpu": 1}}
    space = chains(tmp_path, keys, x=[1, 2], hold=str(hold))
    if "patience" in ends:
        parameters = {"x": {"type": "int", "low": 1, "high": 1000}, "hold": str(hold), "epoch_seconds": 0.1}
        keys |= {"sampler": "random", "budget": {"patience": 2}}
        common = {"trainable": "benchmarks.toy:chain", "metric": "value", "parameters": parameters}
        space = write_space(tmp_path, "patience", common | keys)
    with RayNodes() as nodes:
        nodes.add("one")
        first = start_driver(space, **nodes.variables)
        first.wait_until(lambda: bool(held_processes(hold)))
        second = start_driver(space, **nodes.variables)
        second.wait_until(lambda: "trial 1 starts" in second.output)  # it waits for the core
        hold.unlink()
        assert first.wait() == 0, first.output
        assert second.wait() == 0, second.output
    states = count_states(tmp_path / "runs/hpo.db")
    assert set(states) == {"COMPLETE"}, states
