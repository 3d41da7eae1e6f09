"""A larger max_epochs, run as a user runs it: trials continue from their checkpoints, also after kill -9."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.toy import expected_value, hold_epochs
from tests.end_to_end.processes import ONE_AT_A_TIME, Driver, hpo, rows, write_space

XS = [1, 2, 3]
SHORT, LONG = 3, 6
OF_LONG = (
    "FROM studies JOIN trials USING (study_id) JOIN hpo_metrics ON trial = trial_id "
    "WHERE study_name = 'chains@2' AND name = 'value'"
)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.ray(starts=3)
def test_finished_trials_go_on_from_their_checkpoints_also_after_kill_9(
    tmp_path: Path, start_driver: Callable[..., Driver]
) -> None:
    database, hold, log = tmp_path / "runs/hpo.db", tmp_path / "hold", tmp_path / "epochs.log"
    parameters = {"x": XS, "epoch_seconds": 0.05, "hold": str(hold), "log": str(log)}
    space = {"sampler": "grid", "trainable": "benchmarks.toy:chain", "metric": "value", "parameters": parameters}
    path = write_space(tmp_path, "chains", space | ONE_AT_A_TIME | {"max_epochs": LONG, "checkpoint_every": 1})
    driver = start_driver(path, "--set", f"max_epochs={SHORT}")
    assert driver.wait() == 0, driver.output
    planned = hpo(tmp_path, "plan", path)
    assert f"continues 3 trials to epoch {LONG} from their checkpoints: chains@1 #" in planned.stdout + planned.stderr

    hold_epochs(hold, LONG - 1)  # one epoch after the parent's last
    driver = start_driver(path)
    driver.wait_until(
        lambda: driver.is_held(hold) and bool(rows(database, f"SELECT 1 {OF_LONG} AND epoch = {SHORT + 1}"))
    )
    assert "resumes after epoch 3" in driver.output
    driver.kill()
    hold.unlink()

    driver = start_driver(path)
    assert driver.wait() == 0, driver.output
    stored = rows(
        database,
        "SELECT param_value, epoch, hpo_metrics.value FROM studies JOIN trials USING (study_id) "
        "JOIN trial_params ON trial_params.trial_id = trials.trial_id AND param_name = 'x' "
        "JOIN hpo_metrics ON trial = trials.trial_id WHERE study_name = 'chains@2' AND name = 'value'",
    )
    assert len(stored) == len(XS) * LONG
    for index, epoch, value in stored:
        assert value == expected_value({"x": XS[int(index)]}, 0, epoch)
    trained = Counter(tuple(map(int, line.split())) for line in log.read_text().splitlines())
    assert {count for (_, epoch), count in trained.items() if epoch <= SHORT} == {1}, (
        "the parents' epochs are not trained"
    )
    page = (tmp_path / "runs/reports/chains@2/index.html").read_text()
    assert "continued from" in page
    assert "chains@1 #0" in page
