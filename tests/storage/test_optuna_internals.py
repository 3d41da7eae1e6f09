"""Optuna's private parts, and that no other module uses them."""

from __future__ import annotations

import math
import re

import pytest
from optuna.trial import TrialState

from storage import optuna_internals, optuna_tables
from storage.database import Database
from storage.study import Study
from tests.factories import ROOT

PRIVATE = re.compile(r"(?<!\bself)\._(trial_id|study_id|storage|suggest)\b|\b_rdb\b|\boptuna(\.\w+)*\._")


def test_other_modules_use_no_private_parts_of_optuna() -> None:
    files = [file for package in ("hpo", "storage", "benchmarks") for file in (ROOT / package).rglob("*.py")]
    files.remove(ROOT / "storage/optuna_internals.py")
    files.remove(ROOT / "storage/optuna_tables.py")
    used = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if PRIVATE.search(line)
    ]
    assert used == []


def test_ids_are_those_of_the_tables(study: Study, database: Database) -> None:
    trial = study.optuna_study.ask()
    trial.suggest_float("x", 0, 1)
    (frozen,) = study.trials()
    assert optuna_internals.trial_id(trial) == optuna_internals.trial_id(frozen)
    assert database.optuna_storage.get_trial(optuna_internals.trial_id(trial)).params == frozen.params
    assert frozen.state == TrialState.RUNNING
    (listed,) = database.optuna_storage.get_all_studies()
    assert optuna_internals.study_id(study.optuna_study) == optuna_internals.study_id(listed) == study.study_id


@pytest.mark.parametrize("value", [0.25, math.inf, -math.inf, math.nan])
def test_intermediate_values_are_encoded_in_two_columns(value: float) -> None:
    kind = {"0.25": "FINITE", "inf": "INF_POS", "-inf": "INF_NEG", "nan": "NAN"}[repr(value)]
    assert optuna_tables.encode_intermediate_value(value) == (value if kind == "FINITE" else None, kind)
