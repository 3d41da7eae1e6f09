"""How the dashboard shows the trials of earlier studies from which a sampler alone learns: apart from the study's results.

To Optuna, such a trial is a completed one, so optuna-dashboard would take it for the best trial, or put it on the Pareto
front. Here it is shown as pruned, in grey, and says from which trial it is. The database stays as it is.
"""

from __future__ import annotations

import copy

from optuna.trial import FrozenTrial, TrialState

from hpo.dashboard.attributes import DRAWN_IN_GREY
from storage.imports import Origin
from storage.records import LEARNED_FROM


def show_trial(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial as the dashboard shows it; one that is a result of its study as it is."""
    origin = Origin.of(trial.user_attrs) if LEARNED_FROM in trial.user_attrs else None
    if origin is None:
        return trial
    shown = copy.copy(trial)
    text = f"{origin.study} #{origin.number}: no result of this study, its sampler alone learns from it"
    shown.user_attrs = trial.user_attrs | {LEARNED_FROM: text}
    shown.system_attrs = trial.system_attrs | DRAWN_IN_GREY
    if trial.state == TrialState.COMPLETE:
        shown.state = TrialState.PRUNED
    return shown
