"""Every private part of Optuna that this project uses.

Optuna keeps its database ids private and writes each value in its own transaction. Each definition below says what it
replaces and why. pyproject.toml bounds Optuna to one minor version; review this module before raising that bound.
"""

from __future__ import annotations

import optuna
import sqlalchemy as sa
from optuna.storages._rdb.models import TrialIntermediateValueModel, TrialModel, TrialUserAttributeModel
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial

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


# --- tables -----------------------------------------------------------------------------------------------------------

# `Trial.report` writes one value in one transaction; we write a batch of epochs together with their metrics.
intermediate_values: sa.Table = sa.inspect(TrialIntermediateValueModel).local_table


def encode_intermediate_value(value: float) -> tuple[float | None, str]:
    """Return the columns (intermediate_value, intermediate_value_type) for a value, which may be NaN or infinite."""
    stored, kind = TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)
    return stored, kind.name


studies = sa.table("studies", sa.column("study_id", sa.Integer))

# Counting the trials of a large study through `Study.get_trials` reads all of them, which takes many seconds. Optuna
# cannot change the state of a failed trial.
trials: sa.Table = sa.inspect(TrialModel).local_table
trial_user_attributes: sa.Table = sa.inspect(TrialUserAttributeModel).local_table

# `set_study_system_attr` writes one attribute in one transaction; a plot of a hundred parts could be read half-written.
study_system_attributes = sa.table(
    "study_system_attributes", sa.column("study_id", sa.Integer), sa.column("key", sa.String), sa.column("value_json")
)
