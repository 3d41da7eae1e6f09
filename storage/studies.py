"""Open and resume studies; read them.

What writes into a study is a `storage.run.Run`.
"""

from __future__ import annotations

import contextlib
import gc
import math
import platform
import uuid
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import psutil
from optuna.trial import FrozenTrial

from storage import tables
from storage.database import Database, StorageError, retry_while_down

DUPLICATE = "duplicate of an earlier trial"
REJECTED = "breaks a constraint"
NEVER_RUN = {DUPLICATE, REJECTED}  # what a sampler drew, and no one was given

Params = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A study in a database, for reading and for starting runs on.

    Attributes:
        name: the study's name; a later revision of a changed space is `name@2`.
        study_id: its key in the database.
        optuna_study: Optuna's view of it.
    """

    database: Database
    name: str
    study_id: int
    optuna_study: optuna.Study

    @property
    def attrs(self) -> dict[str, Any]:
        """The attributes that the study was made with."""
        return retry_while_down(self.database, lambda: self.optuna_study.user_attrs)

    def trials(self) -> list[FrozenTrial]:
        """Return all trials by number."""
        with without_garbage_collection():
            return retry_while_down(self.database, lambda: self.optuna_study.get_trials(deepcopy=False))

    def run_trials(self) -> list[FrozenTrial]:
        """Return the trials that were run or are to be: without draws that were duplicates or broke a constraint."""
        return [trial for trial in self.trials() if trial.user_attrs.get("fail_reason") not in NEVER_RUN]

    def counts(self) -> Counter[str]:
        """Return {state: trials} of the `run_trials`, without reading them."""
        rows = retry_while_down(
            self.database, lambda: tables.count_trials(self.database, without=NEVER_RUN, study=self.study_id)
        )
        return Counter({row.state: row.trials for row in rows})

    def count_ended(self) -> int:
        """Return how many trials have ended."""
        counts = self.counts()
        return counts["COMPLETE"] + counts["PRUNED"] + counts["FAIL"]

    def metrics(self, trials: Iterable[FrozenTrial] | None = None) -> dict[int, tables.Metrics]:
        """Return {trial number: {epoch: {name: value}}} of all trials, or of these, which are then not read again."""
        by_trial = retry_while_down(self.database, lambda: tables.read_metrics(self.database, self.study_id))
        trials = self.trials() if trials is None else trials
        return {trial.number: by_trial.get(trial._trial_id, {}) for trial in trials}

    def provenances(self, trials: Iterable[FrozenTrial]) -> dict[int, dict[str, Any]]:
        """Return {trial number: where and on what it ran} of these trials."""
        by_trial = retry_while_down(self.database, lambda: tables.read_provenances(self.database, self.study_id))
        return {trial.number: by_trial.get(trial._trial_id, {}) for trial in trials}

    def runs(self) -> list[Any]:
        """Return the rows of all runs on the study, oldest first."""
        return retry_while_down(self.database, lambda: tables.read_runs(self.database, self.study_id))

    def provenance(self, number: int) -> dict[str, Any]:
        """Return what is needed to run a trial again."""
        trial = self.trials()[number]._trial_id
        return retry_while_down(self.database, lambda: tables.read_provenance(self.database, trial))

    def metrics_of(self, trials: Collection[int]) -> dict[int, tables.Metrics]:
        """Return {trial_id: {epoch: {name: value}}} of some trials, without reading the others'."""
        found = retry_while_down(self.database, lambda: tables.read_metrics(self.database, self.study_id, trials))
        return {trial: found.get(trial, {}) for trial in trials}

    def system_attrs(self) -> dict[str, Any]:
        """Return what Optuna and its dashboard keep with the study."""
        return retry_while_down(
            self.database, lambda: self.database.optuna_storage.get_study_system_attrs(self.study_id)
        )

    def set_system_attrs(self, attrs: Mapping[str, Any]) -> None:
        """Set some of the `system_attrs`, all at once."""
        retry_while_down(self.database, lambda: tables.write_study_attrs(self.database, self.study_id, attrs))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the study was opened with."""
        settings: dict[str, Any] = self.attrs.get("hpo:settings", {})
        return settings

    @property
    def unique_name(self) -> str:
        """A name that no other study has, in this database or any other: what lies on disk is kept under it."""
        return f"{self.name}-{self.attrs['hpo:id']}"

    @property
    def metric(self) -> str:
        """The name of the metric that the study optimizes."""
        return str(self.settings.get("metric", "value"))


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Let no collector look over and over through the millions of objects that a large study is read into."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def study_names(database: Database) -> list[str]:
    """Return the names of all studies, oldest first."""
    summaries = retry_while_down(database, lambda: database.optuna_storage.get_all_studies())
    return [summary.study_name for summary in summaries]


@dataclass(frozen=True)
class Summary:
    """A study in a line.

    Attributes:
        state: see `state_of`.
        counts: {state: trials}, what was never run left out.
        metric: the objective's name.
        best: the best value of a completed trial; None without one, if it is infinite, and with several objectives.
        last_activity: when anything last happened, in seconds since 1970; None if nothing ever has.
    """

    name: str
    state: str
    counts: dict[str, int]
    metric: str
    best: float | None
    last_activity: float | None


def summarize(database: Database) -> list[Summary]:
    """Return a line on each study, oldest first, without reading their trials."""
    counts: dict[int, dict[str, int]] = {}
    last: dict[int, float] = {}
    for row in retry_while_down(database, lambda: tables.count_trials(database, without=NEVER_RUN)):
        counts.setdefault(row.study, {})[row.state] = row.trials
        if row.last is not None:  # Optuna writes the local time, without saying so
            last[row.study] = max(last.get(row.study, 0.0), row.last.timestamp())
    known = retry_while_down(database, lambda: database.optuna_storage.get_all_studies())
    return [_summary(database, each, counts.get(each._study_id, {}), last.get(each._study_id)) for each in known]


def _summary(database: Database, known: Any, counts: dict[str, int], last: float | None) -> Summary:
    storage, study_id = database.optuna_storage, known._study_id
    best = None
    if len(known.directions) == 1 and "COMPLETE" in counts:
        value = retry_while_down(database, lambda: storage.get_best_trial(study_id)).value
        best = value if value is not None and math.isfinite(value) else None
    runs = retry_while_down(database, lambda: tables.read_runs(database, study_id))
    settings = known.user_attrs.get("hpo:settings", {})
    heard = [run.last_heard for run in runs]
    return Summary(
        known.study_name,
        state_of(known.user_attrs, counts, runs),
        {state: count for state, count in counts.items() if count},
        str(settings.get("metric", "value")),
        best,
        max([*heard, *([] if last is None else [last])], default=None),
    )


def state_of(attrs: Mapping[str, Any], counts: Mapping[str, int], runs: Iterable[Any]) -> str:
    """Return what a study is: `running` while a run is alive, `finished`, or `resumable`; empty for another program's.

    Args:
        attrs: the study's, see `Study.attrs`.
        counts: {state: trials}.
        runs: rows of `tables.read_runs`.
    """
    if "hpo:settings" not in attrs:
        return ""
    here = host()
    for run in runs:
        if run.ended is None and run.lease_until >= run.now and not (run.host == here and is_process_dead(run)):
            return "running"
    ended = sum(counts.get(state, 0) for state in ("COMPLETE", "PRUNED", "FAIL"))
    # Of a grid the points that are there, of a search by a sampler its budget.
    wanted = attrs.get("hpo:points", attrs["hpo:settings"].get("budget", {}).get("trials"))
    left = counts.get("WAITING", 0) + counts.get("RUNNING", 0)
    return "finished" if ended and not left and ended >= (wanted or 0) else "resumable"


def all_studies(database: Database) -> list[Study]:
    """Return all studies, every revision, oldest first."""
    return [_load(database, name) for name in study_names(database)]


def find_study(database: Database, name: str) -> Study | None:
    """Return a study by name, or None. A name without a revision means the latest one."""
    revisions = _revisions(database, name.partition("@")[0])
    if "@" in name:
        return _load(database, name) if name in revisions else None
    return _load(database, revisions[-1]) if revisions else None


def find_revision(database: Database, name: str, fingerprint: str) -> Study | None:
    """Return the revision of a study that has this fingerprint, or None.

    Raises:
        StorageError: the name is taken by a study of another program.
    """
    for known in _revisions(database, name):
        study = _load(database, known)
        found = study.attrs.get("hpo:fingerprint")
        if found is None and study.trials():
            raise StorageError(
                f"the study {known!r} in {database.url} was made by another program; rename the search space, or name "
                "another database by --storage"
            )
        if found in {None, fingerprint}:
            return study
    return None


def open_study(
    database: Database,
    name: str,
    *,
    direction: Literal["maximize", "minimize"],
    fingerprint: str,
    settings: Mapping[str, Any],
) -> Study:
    """Return the revision of a study that has this fingerprint; create it where there is none.

    Args:
        name: the first revision's name; later ones are `name@2`, `name@3`, ...
        direction: maximize or minimize.
        fingerprint: the identity of the search; results of different fingerprints never mix.
        settings: plain values to keep with the study.
    """

    def open_or_create() -> Study:
        with database.lock(f"study {name}"):
            study = find_revision(database, name, fingerprint)
            if study is None:
                revisions = _revisions(database, name)
                new = f"{name}@{_revision(revisions[-1]) + 1}" if revisions else name
                optuna.create_study(storage=database.optuna_storage, study_name=new, direction=direction)
                study = _load(database, new)
            # New, or its creator died before it had said what it is.
            if "hpo:fingerprint" not in study.attrs:
                study.optuna_study.set_user_attr("hpo:settings", dict(settings))
                study.optuna_study.set_user_attr("hpo:id", uuid.uuid4().hex[:12])
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    # The axis of the dashboard's plots.
                    study.optuna_study.set_metric_names([str(settings.get("metric", "value"))])
                study.optuna_study.set_user_attr("hpo:fingerprint", fingerprint)  # last: with it, the study is complete
            return study

    return retry_while_down(database, open_or_create)


def _load(database: Database, name: str) -> Study:
    study = retry_while_down(database, lambda: optuna.load_study(study_name=name, storage=database.optuna_storage))
    return Study(database, name, study._study_id, study)


def _revisions(database: Database, name: str) -> list[str]:
    return sorted((known for known in study_names(database) if known.partition("@")[0] == name), key=_revision)


def _revision(name: str) -> int:
    return int(name.partition("@")[2] or 1)


# --- runs, as far as they concern a reader ---------------------------------------------------------------------------


def elapsed_seconds(runs: Iterable[Any]) -> float:
    """Return for how much time any of these runs, oldest first, has been at work; runs side by side count once."""
    spent, covered = 0.0, 0.0
    for run in runs:
        spent += max(0.0, run.last_heard - max(run.started, covered))
        covered = max(covered, run.last_heard)
    return spent


def is_process_dead(row: Any) -> bool:
    """Tell whether a run of this machine has no process any more."""
    try:
        process = psutil.Process(row.pid)
        is_other = abs(process.create_time() - row.process_started) > 1.0  # the number was given out again
        return is_other or bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def host() -> str:
    """Return this machine's identity: host name, boot, and the space in which its process numbers hold."""
    parts = [platform.node()]
    for source in (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")):
        with contextlib.suppress(OSError):
            parts.append(source.readlink().name if source.is_symlink() else source.read_text().strip())
    return "/".join(parts)
