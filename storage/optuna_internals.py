"""The private parts of Optuna that this project leans on, all in one place.

Optuna keeps its database ids private, and offers no public way to write several values in one transaction. Each function
says what it replaces. `pyproject.toml` bounds Optuna to a minor version; read this module again before that bound moves.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Protocol

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial


class StudyAttributes(Protocol):
    """The part of an Optuna storage that optuna-dashboard's functions use to write notes and plots."""

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Return the system attributes of a study."""

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set a system attribute of a study."""


def trial_id(trial: FrozenTrial | optuna.Trial) -> int:
    """Return a trial's key in the database; the public `number` is unique in its study only."""
    return trial._trial_id


def study_id(study: optuna.Study) -> int:
    """Return a study's key in the database."""
    return study._study_id


def storage_of(study: optuna.Study) -> BaseStorage:
    """Return the storage that a study reads and writes, with Optuna's cache if it has one."""
    return study._storage


def study_view(attributes: StudyAttributes, study_id: int) -> Any:
    """Return a study for `optuna_dashboard.save_plotly_graph_object` that reads and writes `attributes` alone."""
    return SimpleNamespace(_storage=attributes, _study_id=study_id)


def trial_view(attributes: StudyAttributes, study_id: int, trial_id: int) -> Any:
    """Return a trial for `optuna_dashboard.save_note` that reads and writes `attributes` alone."""
    return SimpleNamespace(storage=attributes, study=SimpleNamespace(_study_id=study_id), _trial_id=trial_id)
