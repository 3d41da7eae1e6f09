"""The versions that a run records, and the note about schedules."""

from __future__ import annotations

import pytest

from hpo.search.environment import PACKAGES, describe_environment, note_horizon
from tests.factories import shipped_space


def test_the_environment_is_described() -> None:
    described = describe_environment()
    assert set(described) == {"code", "packages", "python", "platform", "machine"}
    assert set(described["packages"]) == set(PACKAGES)


# --- schedules that depend on the horizon -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "schedules"),
    [
        (["scheduler=asha", "parameters.schedule=cosine"], "schedule cosine is"),
        (["scheduler=median", "parameters.schedule=[constant, one_cycle, cosine]"], "schedule one_cycle and cosine is"),
    ],
)
def test_a_scheduler_and_a_schedule_that_depends_on_the_last_epoch_are_noted(
    overrides: list[str], schedules: str
) -> None:
    note = note_horizon(shipped_space("quick", *overrides))
    assert note is not None
    assert schedules in note
    assert "before epoch 5" in note
    assert "grace_period" in note


@pytest.mark.parametrize(
    "overrides",
    [
        ["parameters.schedule=cosine"],
        ["scheduler=asha"],
        ["scheduler=asha", "parameters.schedule=constant", "parameters.warmup_epochs=1"],
        ["scheduler=asha", "parameters.schedule=cosine", "trainable=mine:train"],
    ],
)
def test_other_searches_have_no_such_note(overrides: list[str]) -> None:
    assert note_horizon(shipped_space("quick", *overrides)) is None
