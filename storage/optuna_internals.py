"""Every private part of Optuna that this project uses.

Optuna keeps its database ids private and writes each value in its own transaction. Each definition below says what it
replaces and why. pyproject.toml bounds Optuna to one minor version; review this module before raising that bound.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.samplers._tpe.sampler import _RELATIVE_PARAMS_KEY, default_gamma
from optuna.storages import BaseStorage
from optuna.storages._rdb.models import (
    TrialIntermediateValueModel,
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
)
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

# --- ids and objects --------------------------------------------------------------------------------------------------


def trial_id(trial: FrozenTrial | optuna.Trial) -> int:
    """Return a trial's primary key. Our tables refer to it; the public `number` is unique in its study only."""
    return trial._trial_id


def study_id(study: optuna.Study | FrozenStudy) -> int:
    """Return a study's primary key. Our tables refer to it, and so do the methods of Optuna's storage.

    Args:
        study: a study, or an element of `BaseStorage.get_all_studies()`.
    """
    return study._study_id


def new_trial(study: optuna.Study) -> optuna.Trial:
    """Return a new RUNNING trial without parameters.

    The public `Study.ask` first looks for WAITING trials, which reads the whole study.
    """
    return optuna.Trial(study, study._storage.create_new_trial(study._study_id))


def forget_finished(study: optuna.Study, trial_id: int) -> None:
    """Let a study read a trial again that Optuna keeps in memory as finished. `hpo retry` makes failed ones unfinished."""
    if study._storage.get_trial(trial_id).state.is_finished():
        study._storage = optuna.storages.get_storage(study._storage._backend)  # type: ignore[attr-defined]


# --- TPE --------------------------------------------------------------------------------------------------------------

# Of a large study, TPE counts so many trials as the best. They and the others are shown by `storage.history`.
BEST_TRIALS = default_gamma(sys.maxsize)

# TPE draws all params of a trial at once. Until they are stored one by one, they are in system attributes with this prefix.
RELATIVE_PARAMS = _RELATIVE_PARAMS_KEY

GetTrials = Callable[[Container[TrialState] | None], list[FrozenTrial]]


class _PartialStorage:
    """A storage that returns other trials than all of a study. Everything else is that of the storage behind it."""

    def __init__(self, storage: BaseStorage, get_trials: GetTrials) -> None:
        self._storage = storage
        self._get_trials = get_trials

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return self._get_trials(states)


def show_trials(study: optuna.Study, get_trials: GetTrials) -> None:
    """Let the sampler of a study see other trials than all of its storage.

    Args:
        study: the study. Its other methods that read trials return these, too.
        get_trials: returns the trials in these states, ordered by number; of all states for None.
    """
    study._storage = _PartialStorage(study._storage, get_trials)  # type: ignore[assignment]


# --- tables -----------------------------------------------------------------------------------------------------------

# `Trial.report` writes one value in one transaction; we write a batch of epochs together with their metrics.
intermediate_values: sa.Table = sa.inspect(TrialIntermediateValueModel).local_table


def encode_intermediate_value(value: float) -> tuple[float | None, str]:
    """Return the columns (intermediate_value, intermediate_value_type) for a value, which may be NaN or infinite."""
    stored, kind = TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)
    return stored, kind.name


def decode_intermediate_value(
    stored: float | None, kind: TrialIntermediateValueModel.TrialIntermediateValueType
) -> float:
    """Return the value of the columns (intermediate_value, intermediate_value_type)."""
    return TrialIntermediateValueModel.stored_repr_to_intermediate_value(stored, kind)


# `get_all_trials` reads all values and attributes of all trials; TPE needs few of them.
trial_values: sa.Table = sa.inspect(TrialValueModel).local_table
trial_params: sa.Table = sa.inspect(TrialParamModel).local_table
trial_system_attributes: sa.Table = sa.inspect(TrialSystemAttributeModel).local_table


def decode_value(stored: float | None, kind: TrialValueModel.TrialValueType) -> float:
    """Return the value of the columns (value, value_type)."""
    return TrialValueModel.stored_repr_to_value(stored, kind)


studies = sa.table("studies", sa.column("study_id", sa.Integer))

# Counting the trials of a large study through `Study.get_trials` reads all of them, which takes many seconds. Optuna
# cannot change the state of a failed trial.
trials: sa.Table = sa.inspect(TrialModel).local_table
trial_user_attributes: sa.Table = sa.inspect(TrialUserAttributeModel).local_table

# `set_study_system_attr` writes one attribute in one transaction; a plot of a hundred parts could be read half-written.
study_system_attributes = sa.table(
    "study_system_attributes", sa.column("study_id", sa.Integer), sa.column("key", sa.String), sa.column("value_json")
)
