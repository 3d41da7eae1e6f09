"""Runs searches: what joins the packages space, search, train, storage, report and dashboard.

Slow imports happen inside the functions, while Ray and the probes start in other processes.
"""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hpo.announcement import Announcer
from hpo.bucket import Bucket, locate
from hpo.credentials import secret_files
from hpo.errors import HpoError
from hpo.measuring import keep_mps_if_shared, measure, note_mps_failure, start_probes
from hpo.notes import note_changes, note_points, note_sources, warnings_noted
from hpo.paths import DEFAULT_STORAGE, RunsDir, is_new_database
from hpo.remaining import find_spent_budget, trials_left
from hpo.search.cluster.ray_address import read_address
from hpo.search.environment import describe_environment, note_horizon
from hpo.search.listener import CombinedListener, NullListener, ProgressListener
from hpo.search.stop import EXIT_CODES, Stop
from hpo.search.trainable_check import TrainableCheck, check_values
from hpo.search.trainable_import import refuse_while_importing
from hpo.space.model import Space
from hpo.space.recipient import Recipient, require_recipient

if TYPE_CHECKING:
    import pandas as pd

    from hpo.report.results import Results
    from hpo.report.trials import TrialResult
    from hpo.search.cluster.connection import RayCluster
    from hpo.search.earlier.continuation import ContinuationPlan
    from hpo.search.earlier.warm_start import Found
    from hpo.search.mps import Mps
    from hpo.search.probes import Probes
    from storage.database import Database
    from storage.study import Study


UPLOAD_SECONDS = 60.0  # how long a search that has ended waits for a bucket that lacks some of its checkpoints


# --- search -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        results: every trial of the study, with every metric of every epoch.
        report: the HTML file of the report; None if it could not be written.
        stopped: why the search ended before its work was done; None if it was done.
    """

    results: Results
    report: Path | None = None
    stopped: Stop | None = None

    @property
    def stop_reason(self) -> str:
        """Why the search ended before its work was done; empty if it was done."""
        return "" if self.stopped is None else str(self.stopped)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C or SIGTERM stopped it. The same search again resumes it."""
        return self.stopped is not None and self.stopped.is_interruption

    @property
    def exit_code(self) -> int:
        """The exit code of `hpo run`: 0 if a trial completed, 1 if none did, 2 if nothing can be trained, 130 if stopped."""
        if self.stopped is not None and self.stopped.cause in EXIT_CODES:
            return EXIT_CODES[self.stopped.cause]
        return 0 if self.results.counts["COMPLETE"] else 1

    @property
    def trials(self) -> list[TrialResult]:
        """All trials, by number."""
        return self.results.trials

    @property
    def best(self) -> TrialResult | None:
        """The best completed trial, or None if no trial completed."""
        return self.results.best

    @property
    def best_trials(self) -> list[TrialResult]:
        """The trials on the Pareto front of several objectives; with one objective, the best trial. Empty without one."""
        return self.results.best_trials

    def to_dataframe(self) -> pd.DataFrame:
        """Return a data frame with one row per trial, see `Results.to_dataframe`.

        Raises:
            ImportError: pandas is not installed.
        """
        return self.results.to_dataframe()


def run_search(
    space: Space,
    *,
    storage: str = DEFAULT_STORAGE,
    password: str | None = None,
    data_dir: Path | str = "data",
    runs_dir: Path | str = "runs",
    checkpoints: Path | str | None = None,
    ray_address: str | None = None,
    exit_after: float | None = None,
    on_finish: Recipient | None = None,
    listener: ProgressListener | None = None,
    on_results: Callable[[Results], None] | None = None,
    command: str = "",
) -> SearchResult:
    """Run a search, or resume it: trials that have ended are not run again.

    Args:
        space: the search.
        storage: an SQLAlchemy URL. The database and its tables are created if they do not exist.
        password: the PostgreSQL password, used if the URL has none.
        data_dir: where data sets are read from or downloaded to.
        runs_dir: where checkpoints, artifacts and reports are written.
        checkpoints: where checkpoints are: a folder, or a URL in a bucket, see `hpo.bucket.locate`; None for `runs_dir`.
        ray_address: a Ray cluster to join; None starts Ray on this machine, for this search only.
        exit_after: seconds after which the search stops as after Ctrl-C, for queues that limit its time; None for no limit.
        on_finish: who is notified of how the search has ended, instead of `on_finish` of the space: a command or a URL.
        listener: receives the events of the search.
        on_results: receives the results as soon as the last trial has ended, before the report is written.
        command: how the search was started, for the record.

    Returns:
        The results, where the report is, and why the search ended.

    Raises:
        SettingError: a folder, the bucket, a resource, `on_finish` or the Ray address cannot be used.
        TrainableError: the trainable cannot be imported, or cannot take the space's parameters.
        DataError: the data set is not there and cannot be downloaded.
        StorageError: the database cannot be used; trials in flight are resumable.
    """
    refuse_while_importing()
    require_recipient(on_finish, "on_finish")
    listener = listener or NullListener()
    with Announcer(on_finish or space.on_finish, space, storage, listener) as announcer:
        exit_at = math.inf if exit_after is None else time.monotonic() + exit_after
        address = read_address(ray_address)
        settings = _Settings(storage, password, Path(data_dir), runs_dir, checkpoints, address, exit_at, command)
        return _run_search(space, settings, announcer, CombinedListener(listener, announcer), on_results)


@dataclass(frozen=True)
class _Settings:
    """How a search is run, see `run_search`; `exit_at` is when it stops at the latest, by the monotonic clock."""

    storage: str
    password: str | None
    data_dir: Path
    runs_dir: Path | str
    checkpoints: Path | str | None
    ray_address: str | None
    exit_at: float
    command: str


def _run_search(
    space: Space,
    settings: _Settings,
    announcer: Announcer,
    listener: ProgressListener,
    on_results: Callable[[Results], None] | None,
) -> SearchResult:
    listener.search_starting(space)  # before the imports that take seconds
    from hpo.search.cluster.connection import RayCluster
    from hpo.search.mps import start_mps
    from hpo.search.slots import may_share_gpu

    runs, data = _find_files(space, settings, listener), space.trainable_data(settings.data_dir.resolve())
    check_values(space)
    if (note := note_horizon(space)) is not None:
        listener.note(note)
    is_mps_wanted = settings.ray_address is None and may_share_gpu(space)
    code = None if settings.ray_address is None else _pack_code(space, settings.storage, runs, data)
    with (
        TrainableCheck(space) as check,
        start_mps(is_wanted=is_mps_wanted) as mps,  # before Ray's workers and the probes: they inherit its environment
        RayCluster(settings.ray_address, code) as cluster,
        start_probes(space, data, runs.root) as probes,
        warnings_noted(listener),
        ExitStack() as opened,
    ):
        note_mps_failure(mps, listener)
        listener.preparing("starting Ray")
        # A new database has no finished trials, so Ray is needed. An existing one may have nothing left to run.
        if is_new_database(settings.storage):
            _start(check, cluster)
        from hpo.report.reading import read_results
        from hpo.search.checkpoints.retention import Retention
        from hpo.search.earlier.continuation import open_continued, plan_continuation
        from hpo.search.earlier.warm_start import find_trials
        from storage.database import open_database
        from storage.imports import SOURCES, set_points
        from storage.studies import find_revision

        database = opened.enter_context(open_database(settings.storage, settings.password))
        study = find_revision(database, space.name, space.fingerprint)
        continuation = plan_continuation(space, study, database, runs)
        space = continuation.space
        if study is not None and SOURCES in study.attrs:
            set_points(study, space.point_keys())
        left = space.total_trials if study is None else trials_left(space, study)
        stopped = None if study is None or left == 0 else find_spent_budget(space, study)
        is_over = left == 0 or stopped is not None
        note_changes(space, study, listener)
        if study is not None and is_over:
            study, _ = open_continued(database, continuation, runs)  # stores a changed budget or `checkpoints.keep`
            listener.study_opened(space, study.name, database.url, study.counts(), left)
            note_points(space, study.keys(), 0, listener)
            Retention(space, study, runs).run_ended()
            _upload_left(space, study, runs, listener, is_hurried=True)
        else:
            listener.preparing("reading earlier studies")
            # First: a wrong name must not leave an empty study.
            found = find_trials(space, study, database, settings.password, continuation.parents)
            _start(check, cluster)
            study, stopped = _search(
                continuation,
                database,
                found,
                _Processes(check, mps, cluster, probes),
                settings,
                data=data,
                runs_dir=runs,
                listener=listener,
            )
            is_hurried = stopped is not None and stopped.is_interruption
            _upload_left(space, study, runs, listener, is_hurried=is_hurried)
            cluster.stop()  # Ray shuts down while the results are written
        results = read_results(study)
        if on_results is not None:
            on_results(results)
        report = try_to_report(results, runs, listener)
        result = SearchResult(results, report, stopped)
        if not is_over:
            from hpo.dashboard.publishing import publish

            publish(study, runs, always=True)
            announcer.search_ended(results, stopped, result.exit_code, report)
        return result


def _find_files(space: Space, settings: _Settings, listener: ProgressListener) -> RunsDir:
    """Return the folders of a search, and check that it can write to them, and to the bucket."""
    runs = locate(settings.runs_dir, settings.checkpoints).make()
    if runs.bucket_url:
        Bucket(runs.bucket_url).check()
        if space.command is not None:
            listener.note("what a script saves stays on its machine: nothing of this search is uploaded")
    return runs


def _pack_code(space: Space, storage: str, runs: RunsDir, data: Mapping[str, Any]) -> bytes | None:
    """Return the code that the nodes of a cluster need; None if they have it, because hpo is installed there."""
    from hpo.search.cluster.code_package import pack

    if space.is_default_trainable:
        return None
    left_out = [runs.root, runs.all_checkpoints, Path(data["data_dir"]), *secret_files()]
    if storage.startswith("sqlite"):
        left_out.append(Path(storage.partition(":///")[2].partition("?")[0]))
    return pack(Path.cwd(), left_out)


def _upload_left(space: Space, study: Study, runs: RunsDir, listener: ProgressListener, *, is_hurried: bool) -> None:
    """Upload the checkpoints on this machine that the bucket lacks, or say why they are not there."""
    from hpo.search.checkpoints.bucket import BucketStudy, upload_left

    if runs.bucket_url and space.command is None:
        seconds = 0.0 if is_hurried else UPLOAD_SECONDS
        interval = space.scheduler.interval if space.population is not None else 0
        folder, bucket = runs.checkpoints(study.unique_name), BucketStudy(runs.bucket_study(study.unique_name))
        for note in upload_left(folder, bucket, interval=interval, wait_seconds=seconds):
            listener.note(note)


def _start(check: TrainableCheck, cluster: RayCluster) -> None:
    """Start to import the trainable, and Ray, unless that was done before."""
    check.start()
    cluster.import_ray()
    check.look()  # a mistake that is known by now is said without starting Ray
    cluster.start()


class _Processes(NamedTuple):
    """What runs next to this process."""

    check: TrainableCheck
    mps: Mps
    cluster: RayCluster
    probes: Probes | None


def _search(
    continuation: ContinuationPlan,
    database: Database,
    found: Sequence[Found],
    processes: _Processes,
    settings: _Settings,
    *,
    data: Mapping[str, Any],
    runs_dir: RunsDir,
    listener: ProgressListener,
) -> tuple[Study, Stop | None]:
    """Run the trials that are left. Slow imports happen here, while Ray starts in the background."""
    from hpo.search.earlier.continuation import open_continued
    from hpo.search.earlier.warm_start import take_over_trials
    from hpo.search.estimate import is_worth_measuring
    from hpo.search.slots import plan_slots
    from hpo.search.tune import run_trials
    from hpo.studies.other_databases import note_database

    check, mps, cluster, probes = processes
    estimate, images = None, None
    check.wait()
    provenance = {"command": settings.command} | describe_environment()
    if probes is not None:
        provenance["data_sha256"], images = probes.describe_data()
    cluster.wait_for_answer()
    cluster.check_nodes(runs_dir.all_checkpoints, listener.note)
    # Only now, so that a missing data set, or a cluster that cannot be used, does not leave an empty study.
    study, continuation = open_continued(database, continuation, runs_dir)
    space = continuation.space
    note_database(runs_dir.checkpoints(study.unique_name), database)
    found = take_over_trials(space, study, found, settings.password, continuation.parents)
    note_sources(found, continuation, study.keys(), listener)
    left = trials_left(space, study)  # now: another study may have been deleted meanwhile, and this one is new
    listener.study_opened(space, study.name, database.url, study.counts(), left)
    note_points(space, study.keys(), left, listener)
    if left == 0:  # earlier studies had all results
        return study, None
    if space.budget.shows_device_time:
        listener.device_time_used(study.device_seconds())
    nodes = cluster.nodes()
    slots = plan_slots(space, left, nodes, may_grow=cluster.is_shared)
    if probes is not None:
        if images is not None and is_worth_measuring(space, left, images):
            begun = continuation.begun(study.ended_keys())
            estimate = measure(space, slots, left, probes, images, nodes, listener, begun)
        probes.close()  # frees its memory and CPU for the trials
    slots = slots if estimate is None else estimate.slots
    keep_mps_if_shared(mps, slots, listener)
    listener.search_planned(space, slots, estimate)
    listener = CombinedListener(listener, _ReportPreloader())
    gc.freeze()  # excludes imported objects from the garbage collections of the search
    try:
        stopped = run_trials(
            continuation,
            cluster,
            study,
            slots,
            provenance=provenance,
            data=data,
            runs_dir=runs_dir,
            listener=listener,
            exit_at=settings.exit_at,
        )
    finally:
        gc.unfreeze()  # the caller's garbage must not live forever
    return study, stopped


class _ReportPreloader(NullListener):
    """Imports the plotting libraries on a background thread, starting at the first epoch."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def epoch_ended(self, number: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Start the imports. If they are not done in time, the report waits for them."""
        from hpo.report.page import preload

        if self._thread is None:
            self._thread = threading.Thread(target=preload, name="hpo-preload", daemon=True)
            self._thread.start()


def try_to_report(results: Results, runs_dir: RunsDir, listener: ProgressListener) -> Path | None:
    """Write the report. On failure, notify the listener and return None: the search itself succeeded.

    Args:
        results: the study, with its epochs.
        runs_dir: where the folder of the report is created.
        listener: receives a note if there is no report.

    Returns:
        The path of the HTML file; None if the report could not be written.
    """
    from hpo.report.page import write_report

    try:
        return write_report(results, runs_dir)
    except Exception as error:  # noqa: BLE001 # see the docstring
        reason = str(error) if isinstance(error, HpoError) else f"{type(error).__name__}: {error}"
        listener.note(f"no report: {reason}")
        return None
