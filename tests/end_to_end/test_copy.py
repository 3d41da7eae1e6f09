"""A running search is copied to another database; the copy continues under its new name, where the search was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.toy import hold_epochs
from tests.end_to_end.processes import (
    MAX_EPOCHS,
    POINTS,
    Driver,
    chains,
    check_chains,
    count_epochs,
    count_states,
    hpo,
    last_epochs,
    write_space,
)

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.ray(starts=2)]


def test_a_copy_of_a_running_search_goes_on_where_the_search_was(
    tmp_path: Path, start_driver: Callable[..., Driver]
) -> None:
    hold, database, other = tmp_path / "hold", tmp_path / "runs/hpo.db", tmp_path / "other.db"
    url = f"sqlite:///{other}"
    hold_epochs(hold, 3)
    space = chains(tmp_path, hold=str(hold))
    driver = start_driver(space)
    driver.wait_until(lambda: count_epochs(database) >= 4 and driver.is_held(hold))

    copied = hpo(tmp_path, "copy", "chains", "copied", "--to", url)
    assert copied.returncode == 0, copied.stderr
    assert "chains is copied to copied in sqlite:///" in copied.stdout
    epochs, states = last_epochs(other), count_states(other)
    assert set(states) <= {"COMPLETE", "WAITING"}
    assert states["WAITING"] > 0
    refused = hpo(tmp_path, "rename", "chains", "other")
    assert refused.returncode == 2
    assert "the study 'chains' is running" in refused.stderr
    assert hpo(tmp_path, "delete", "chains", "--yes").returncode == 2
    driver.kill()

    hold.unlink()
    write_space(tmp_path, "copied", json.loads(space.read_text()))
    resumed = hpo(tmp_path, "run", "copied.yaml", "--storage", url)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    check_chains(other)
    assert last_epochs(other) == dict.fromkeys(range(len(POINTS)), MAX_EPOCHS)
    for number in (each for each, epoch in epochs.items() if epoch > 1):  # the last checkpoint may be one epoch behind
        assert f"trial {number} epoch 1/{MAX_EPOCHS}" not in resumed.stdout, "it resumes from the copied checkpoint"
    compared = hpo(tmp_path, "compare", "chains", "--other", "copied", url, "--json")
    assert [each["trials"] for each in json.loads(compared.stdout)["studies"]][1] == len(POINTS)
