"""The parts of benchmarks/ that tests rely on: the toy trainable, and the check of a study of it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from benchmarks.chaos import violations
from benchmarks.toy import chain, expected_value, held_processes, hold_epochs
from storage.database import open_database
from tests.factories import search_without_ray, toy_space, wait_until


def values(max_epochs: int, checkpoint: dict[str, object] | None = None, **params: object) -> list[float]:
    reports = chain({"x": 1, **params}, data={}, seed=0, max_epochs=max_epochs, device="cpu", checkpoint=checkpoint)
    return [report.metrics["value"] for report in reports]


def test_a_chain_depends_on_every_epoch_before_it() -> None:
    whole = values(4)
    assert whole == [expected_value({"x": 1}, 0, epoch) for epoch in (1, 2, 3, 4)]
    *_, second = chain({"x": 1}, data={}, seed=0, max_epochs=2, device="cpu")
    assert values(4, second.state()) == whole[2:]
    assert values(4, second.state() | {"link": "another"}) != whole[2:]


def test_a_held_chain_waits_until_the_file_is_removed(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold_epochs(hold, 2)
    thread = threading.Thread(target=values, args=(3,), kwargs={"hold": str(hold)})
    thread.start()
    wait_until(lambda: bool(held_processes(hold)))
    assert thread.is_alive()
    hold.unlink()
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM hpo_metrics WHERE trial = 1 AND epoch = 2 AND name = 'value'",
        "UPDATE hpo_metrics SET value = value + 1e-9 WHERE trial = 2 AND epoch = 1 AND name = 'value'",
        "UPDATE trials SET state = 'RUNNING' WHERE trial_id = 2",
        "DELETE FROM trial_intermediate_values WHERE trial_id = 1 AND step = 3",
        "UPDATE trial_values SET value = 0.5 WHERE trial_id = 1",
        "DELETE FROM hpo_trials WHERE trial = 1",
    ],
)
def test_the_check_of_a_study_finds_each_kind_of_damage(tmp_path: Path, damage: str) -> None:
    url = f"sqlite:///{tmp_path}/hpo.db"
    with open_database(url) as database:
        search_without_ray(toy_space(tmp_path), database, tmp_path)
        assert violations(url, [1, 2], 3) == []
        with database.engine.begin() as connection:
            connection.execute(sa.text(damage))
    assert len(violations(url, [1, 2], 3)) == 1
