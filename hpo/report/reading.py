"""Read a study once: its trials with every metric, its runs, and their cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hpo.errors import SpaceError
from hpo.paths import RunsDir
from hpo.report.results import Results
from hpo.report.trials import TrialResult
from hpo.search.earlier.continuation import lacks_points
from hpo.space.model import Space
from storage.lease import is_run_alive
from storage.optuna_internals import trial_id
from storage.records import RETRIED
from storage.study import without_garbage_collection
from storage.summaries import state_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from storage.records import Metrics
    from storage.study import Study


def read_results(study: Study, *, epochs: bool = True) -> Results:
    """Read all trials of a study, with every metric of every epoch.

    Args:
        study: the study to read.
        epochs: whether to read the epochs, the bulk of a large study. If False, `TrialResult.epochs` is empty for all
            trials; `read_epochs` reads those of some.

    Raises:
        StorageError: the database cannot be reached.
    """
    # Before the trials: a search that ends meanwhile counts as running, never as finished without its last trial.
    attrs, runs = study.attrs, study.runs()
    is_running = any(map(is_run_alive, runs))
    with without_garbage_collection():
        trials = study.trained_trials()
        metrics: dict[int, Metrics | None] = dict.fromkeys(trial.number for trial in trials)
        if epochs:
            metrics |= study.metrics(trials)
        provenances, used = study.provenances(trials), study.device_seconds_by_trial()
    space = _stored_space(attrs)
    objectives = _objectives(study, space)
    return Results(
        study,
        objectives,
        [
            _trial_result(
                trial,
                metrics[trial.number],
                provenances[trial.number],
                used.get(trial_id(trial), {}),
                objectives[0][0],
                1 if space is None else space.replicates,
            )
            for trial in trials
        ],
        attrs,
        runs,
        space,
        study.reference,
        _state_of(study, attrs, trials, is_running=is_running),
    )


def read_epochs(results: Results, numbers: Container[int]) -> Results:
    """Return the same results with the epochs of the trials with these numbers, and no others.

    Raises:
        StorageError: the database cannot be reached.
    """
    wanted = [trial.trial_id for trial in results.trials if trial.number in numbers]
    found = results.study.metrics_of(wanted)
    return replace(results, trials=[replace(trial, epochs=found.get(trial.trial_id, {})) for trial in results.trials])


def _state_of(study: Study, attrs: Mapping[str, Any], trials: Sequence[FrozenTrial], *, is_running: bool) -> str:
    counts = Counter(trial.state.name for trial in trials)
    retried = sum(trial.state.name in {"WAITING", "RUNNING"} and RETRIED in trial.user_attrs for trial in trials)
    state = state_of(attrs, counts, is_running=is_running, ended=study.count_ended_keys(), retried=retried)
    return "resumable" if state == "finished" and lacks_points(study, RunsDir()) else state


def _stored_space(attrs: Mapping[str, Any]) -> Space | None:
    try:
        return Space.from_settings(attrs["hpo:settings"])
    except (SpaceError, LookupError, TypeError, AttributeError):  # another program's study, or another version's
        return None


def _objectives(study: Study, space: Space | None) -> list[tuple[str, bool]]:
    directions = study.optuna_study.directions
    names = study.optuna_study.metric_names
    if space is not None and len(directions) == len(space.all_objectives):
        names = [each.metric for each in space.all_objectives]
    elif not names:
        names = ["value"] if len(directions) == 1 else [f"objective {i}" for i in range(len(directions))]
    return [(name, direction.name == "MAXIMIZE") for name, direction in zip(names, directions, strict=True)]


def _trial_result(
    trial: FrozenTrial,
    epochs: Metrics | None,
    provenance: Mapping[str, Any],
    device_seconds: Mapping[str, float],
    metric: str,
    replicates: int,
) -> TrialResult:
    if epochs == {}:  # a trial that another program added through Optuna has intermediate values only
        epochs = {step: {metric: value} for step, value in sorted(trial.intermediate_values.items())}
    failed = trial.state.name == "FAIL"
    return TrialResult(
        trial.number,
        trial.params,
        trial.state.name,
        tuple(trial.values or ()),
        epochs or {},
        str(trial.user_attrs.get("fail_reason", "for an unknown reason")) if failed else "",
        str(trial.user_attrs.get("traceback", "")),
        provenance,
        trial.duration.total_seconds() if trial.duration else 0.0,
        trial.user_attrs,
        device_seconds,
        trial_id(trial),
        trial.datetime_complete,
        replicates,
    )
