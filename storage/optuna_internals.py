"""Private parts of Optuna's Python code that this project uses.

Optuna keeps its database ids private, and can only draw the params of a trial that is stored already. pyproject.toml bounds
Optuna to one minor version: review this module and `optuna_tables` before raising that bound.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers._tpe.sampler import _RELATIVE_PARAMS_KEY, default_gamma
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._rdb.models import NOT_FOUND_MSG
from optuna.study._frozen import FrozenStudy
from optuna.study._multi_objective import _fast_non_domination_rank
from optuna.trial import FrozenTrial, TrialState

FIXED_PARAMS = "fixed_params"  # the system attribute of an enqueued trial's params
DRAFT_ID = -1  # the trial_id of a trial that is not stored yet

# TPE counts at most this many trials of a large study as the best. They and the others are shown by `storage.history`.
BEST_TRIALS = default_gamma(sys.maxsize)

# TPE draws all params of a trial at once. Until they are stored one by one, they are in system attributes with this prefix.
RELATIVE_PARAMS = _RELATIVE_PARAMS_KEY

# System attributes of a study: the parents of a generation, of a subclass of `BaseGASampler`.
_PARENTS = re.compile(r"\w+:parent:[0-9]+")


GetTrials = Callable[[Container[TrialState] | None], list[FrozenTrial]]


def trial_id(trial: FrozenTrial | optuna.Trial) -> int:
    """Return a trial's primary key. Our tables refer to it; the public `number` is unique in its study only."""
    return trial._trial_id


def study_id(study: optuna.Study | FrozenStudy) -> int:
    """Return a study's primary key. Our tables refer to it, and so do the methods of Optuna's storage.

    Args:
        study: a study, or an element of `BaseStorage.get_all_studies()`.
    """
    return study._study_id


def says_missing(error: BaseException) -> bool:
    """Return whether an error of Optuna says that there is no such study or trial, or none that completed."""
    text = str(error.args[0]) if error.args else ""
    return isinstance(error, KeyError | ValueError) and (
        text in {NOT_FOUND_MSG, "No trials are completed yet."} or text.startswith("No trial with ")
    )


class DraftStorage(_CachedStorage):
    """Optuna's storage, and one trial in memory that a sampler draws before it is stored.

    A trial that Optuna's `ask` creates is in the database before it has params: other runs see it, and if its creator dies,
    it stays. A draft becomes a row with all of its params in one transaction, or never. Samplers read the study's other
    trials as usual.

    Args:
        backend: the database. Finished trials are kept in memory.
        reading: a context in which trials are read: it translates errors.
    """

    def __init__(self, backend: RDBStorage, reading: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        super().__init__(backend)
        self._reading = reading
        self._draft: FrozenTrial | None = None

    def start_draft(self, draft: FrozenTrial) -> None:
        """Replace the draft."""
        self._draft = draft

    def forget_finished(self, study_id: int, trial_id: int) -> None:
        """Read a study again if an unfinished trial is kept in memory as finished: `hpo retry` changes failed ones."""
        with self._lock:
            if self._get_cached_trial(trial_id) is not None:
                del self._studies[study_id]
                self._trial_id_to_study_id_and_number.clear()

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return a trial, or the draft."""
        if trial_id == DRAFT_ID and self._draft is not None:
            return self._draft
        return super().get_trial(trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials of a study, without the draft."""
        with self._reading():
            return super().get_all_trials(study_id, deepcopy, states)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """Set a param of a trial. Nothing is stored for the draft: `optuna.Trial` writes it into the object."""
        if trial_id != DRAFT_ID:
            super().set_trial_param(trial_id, param_name, param_value_internal, distribution)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set what a sampler notes about a trial."""
        if trial_id == DRAFT_ID:
            if not key.startswith(RELATIVE_PARAMS):  # all params are stored at once
                self.get_trial(trial_id).system_attrs[key] = value
        else:
            super().set_trial_system_attr(trial_id, key, value)


class ShownStorage(_CachedStorage):
    """Optuna's storage, for programs that display it: trials are as a function shows them. The database stays as it is.

    Args:
        backend: the database. Finished trials are kept in memory.
        show: returns a trial as it is to be shown. It must not change its argument.
    """

    def __init__(self, backend: RDBStorage, show: Callable[[FrozenTrial], FrozenTrial]) -> None:
        super().__init__(backend)
        self._show = show

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return a trial as it is shown."""
        return self._show(super().get_trial(trial_id))

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials of a study as they are shown, those that are shown in these states."""
        shown = [self._show(trial) for trial in super().get_all_trials(study_id, deepcopy)]
        return [trial for trial in shown if states is None or trial.state in states]

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """Return the best one of the trials that are shown as completed."""
        return BaseStorage.get_best_trial(self, study_id)  # that of the cache asks the database


def draft_trial(
    study: optuna.Study, number: int, partial: FrozenTrial | None = None
) -> tuple[optuna.Trial, FrozenTrial]:
    """Return a trial whose `suggest_*` methods ask the study's sampler and store nothing, and what they fill.

    Args:
        study: a study whose storage is a `DraftStorage`.
        number: the number that the trial will probably get. Hyperband derives the trial's bracket from it.
        partial: a stored trial, such as an enqueued one, whose missing params are drawn.
    """
    draft = FrozenTrial(
        number=number,
        trial_id=DRAFT_ID,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=None,
        datetime_complete=None,
        params={} if partial is None else dict(partial.params),
        distributions={} if partial is None else dict(partial.distributions),
        user_attrs={},
        system_attrs={} if partial is None else dict(partial.system_attrs),
        intermediate_values={},
    )
    study._thread_local.cached_all_trials = None  # as `Study.ask` does
    study._storage.start_draft(draft)  # type: ignore[attr-defined]
    return optuna.Trial(study, DRAFT_ID), draft


def is_enqueued(trial: FrozenTrial) -> bool:
    """Return whether `Study.enqueue_trial` created a trial: its params are not set yet, only noted."""
    return FIXED_PARAMS in trial.system_attrs


def as_point(trial: FrozenTrial, distributions: Mapping[str, BaseDistribution]) -> FrozenTrial:
    """Return an enqueued trial with its params set. A trial that has params is returned as it is.

    Args:
        trial: of `Study.enqueue_trial`.
        distributions: {name: distribution} of all params of a point.

    Raises:
        ValueError: it has other params, or one with a value that the distribution does not contain.
    """
    if trial.params:
        return trial
    params = trial.system_attrs[FIXED_PARAMS]
    if set(params) != set(distributions):
        raise ValueError(f"its parameters are {', '.join(params) or 'none'} instead of {', '.join(distributions)}")
    point = copy.copy(trial)
    point.distributions = dict(distributions)
    point.params = {name: params[name] for name in distributions}
    check_params(point)
    return point


def check_params(trial: FrozenTrial) -> None:
    """Check the params of an enqueued trial, and replace each by the value that the database returns, such as 2.0 by 2.

    Optuna only warns of a number outside of its range, and stores a rounded one.

    Raises:
        ValueError: a distribution does not contain its value.
    """
    for name, distribution in trial.distributions.items():
        value = trial.params[name]
        internal = distribution.to_internal_repr(value)
        if not distribution._contains(internal) or distribution.to_external_repr(internal) != value:
            raise ValueError(f"{name} cannot be {value!r}")
        trial.params[name] = distribution.to_external_repr(internal)


def renumber_parents(key: str, value: str, trial_ids: Mapping[int, int]) -> str:
    """Return a system attribute of a study for its copy: genetic samplers cache parents there, by their primary keys.

    Args:
        key: its name.
        value: as JSON.
        trial_ids: {key of a trial: its key in a copy of the study}.
    """
    if not _PARENTS.fullmatch(key):
        return value
    parents = json.loads(value)
    is_list = isinstance(parents, list)  # any program may change it
    return json.dumps([trial_ids[each] for each in parents if each in trial_ids]) if is_list else value


def non_domination_ranks(losses: np.ndarray, count: int) -> np.ndarray:
    """Return the rank of each trial: 0 for the Pareto front, 1 for the front of the others, and so on.

    Args:
        losses: of shape (trials, objectives), lower is better, without NaN.
        count: for how many of the best trials the ranks must be right, above 0; all others have a common, higher one.
    """
    return _fast_non_domination_rank(losses, n_below=count)


# --- TPE --------------------------------------------------------------------------------------------------------------


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
