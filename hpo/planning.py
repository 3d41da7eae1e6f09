"""Plans a search: what is left to train, and the time and memory that it takes on this machine. Stores nothing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hpo.bucket import locate
from hpo.measuring import keep_mps_if_shared, measure, note_mps_failure, start_probes
from hpo.notes import note_points, note_sources
from hpo.paths import DEFAULT_STORAGE, RunsDir, is_new_database
from hpo.remaining import find_spent_budget, trials_left
from hpo.search.environment import note_horizon
from hpo.search.listener import NullListener, ProgressListener
from hpo.search.trainable_check import TrainableCheck, check_values
from hpo.search.trainable_import import refuse_while_importing
from hpo.space.model import Space

if TYPE_CHECKING:
    from hpo.search.earlier.continuation import ContinuationPlan
    from hpo.search.estimate import SearchEstimate
    from hpo.search.slots import Slots


@dataclass(frozen=True)
class PlannedSearch:
    """The plan of a search, with an estimate of its time and memory.

    Attributes:
        space: the search, without the points of its grid that are left as they are in an earlier revision.
        slots: how many trials run at a time, and on what.
        estimate: seconds, GPU-hours and memory, measured; None where nothing could be measured.
        states: {`Space.config_key`: state} of the configurations that storage holds.
        trials_left: how many trials have not ended; None if only time ends the search.
        device_seconds: what the study has used already.
        spent: which budget was spent by earlier runs, so that no trial starts, and by how much; empty if some is left.
        outlooks: {`Space.config_key`: what becomes of it} of the configurations that are continued from an earlier revision,
            or left as they are there.
    """

    space: Space
    slots: Slots
    estimate: SearchEstimate | None
    states: Mapping[str, str]
    trials_left: int | None
    device_seconds: float
    spent: str = ""
    outlooks: Mapping[str, str] = field(default_factory=dict)


def plan_search(
    space: Space,
    *,
    storage: str = DEFAULT_STORAGE,
    password: str | None = None,
    data_dir: Path | str = "data",
    runs_dir: Path | str = "runs",
    checkpoints: Path | str | None = None,
    listener: ProgressListener | None = None,
) -> PlannedSearch:
    """Measure training steps on this machine and estimate the time and memory of a search.

    Nothing is stored. The database is only read: tables of an older version are not migrated.

    Args:
        space: the search.
        storage: the database that may hold some of its trials; one that does not exist is not created.
        password: the PostgreSQL password, used if the URL has none.
        data_dir: where data sets are read from or downloaded to.
        runs_dir: where a search would write checkpoints: the disk's speed is part of the estimate.
        checkpoints: where checkpoints are: a folder, or a URL in a bucket, see `hpo.bucket.locate`; None for `runs_dir`.
        listener: receives an event before each slow step.

    Returns:
        The slots, the estimate, the stored states and the number of trials left.

    Raises:
        SettingError: a resource is not available on this machine, or the measurement failed.
        TrainableError: the trainable cannot be imported, or cannot take the space's parameters.
        DataError: the data set is not there and cannot be downloaded.
        StorageError: the database exists, or should, and cannot be used.
    """
    from hpo.search.estimate import this_machine
    from hpo.search.mps import start_mps
    from hpo.search.slots import may_share_gpu, plan_slots

    listener = listener or NullListener()
    data = space.trainable_data(Path(data_dir).resolve())
    refuse_while_importing()
    check_values(space)
    if (note := note_horizon(space)) is not None:
        listener.note(note)
    with (
        TrainableCheck(space) as check,
        start_mps(is_wanted=may_share_gpu(space)) as mps,
        start_probes(space, data, Path(runs_dir)) as probes,
    ):
        check.start()
        note_mps_failure(mps, listener)
        stored = _look_up(space, storage, password, locate(runs_dir, checkpoints), listener)
        continuation, states, left = stored.continuation, stored.states, stored.trials_left
        space = continuation.space
        note_points(space, states.keys(), 0 if stored.spent else left, listener)
        nodes, estimate = [this_machine()], None
        slots = plan_slots(space, left, nodes)
        if probes is not None:
            _, images = probes.describe_data()
            ended = {key for key, state in states.items() if state in {"COMPLETE", "PRUNED", "FAIL"}}
            begun = continuation.begun(ended)
            estimate = measure(space, slots, left, probes, images, nodes, listener, begun)
        slots = slots if estimate is None else estimate.slots
        keep_mps_if_shared(mps, slots, listener)
        check.wait()
    return PlannedSearch(
        space, slots, estimate, states, left, stored.device_seconds, stored.spent, continuation.outlooks
    )


class _Stored(NamedTuple):
    """What a search continues, and the parts of a `PlannedSearch` that storage knows."""

    continuation: ContinuationPlan
    states: Mapping[str, str]
    trials_left: int | None
    device_seconds: float = 0.0
    spent: str = ""


def _look_up(
    space: Space, storage: str, password: str | None, runs_dir: RunsDir, listener: ProgressListener
) -> _Stored:
    from hpo.search.earlier.continuation import ContinuationPlan, plan_continuation

    if is_new_database(storage) and not space.warm_start:
        return _Stored(ContinuationPlan(space), {}, space.total_trials)
    from hpo.search.earlier.warm_start import find_trials
    from storage.database import open_for_reading
    from storage.studies import find_revision

    opened = None if is_new_database(storage) else open_for_reading(storage, password)
    with opened or nullcontext() as database:
        study = None if database is None else find_revision(database, space.name, space.fingerprint)
        continuation = plan_continuation(space, study, database, runs_dir)
        space = continuation.space
        states: dict[str, str] = {}
        left = space.total_trials
        if study is not None:
            states = {space.config_key(trial.params): trial.state.name for trial in study.trained_trials()}
            left = trials_left(space, study)
        if left != 0:
            found = find_trials(space, study, database, password, continuation.parents)
            trials = [trial for each in found for trial in each.trials]
            reused = {trial.key: "COMPLETE" for trial in trials if trial.key is not None}
            if space.is_grid and left is not None:
                left -= len(space.point_keys() & (reused.keys() - states.keys()))
            states = reused | states
            note_sources(found, continuation, states.keys(), listener)
        if study is None:
            return _Stored(continuation, states, left)
        spent = find_spent_budget(space, study)
        return _Stored(continuation, states, left, study.device_seconds(), "" if spent is None else str(spent))
