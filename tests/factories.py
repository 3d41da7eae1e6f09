"""Builders that several test packages share: spaces, trials, whole searches without Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from hpo.paths import RunsDir
from hpo.search.coordinator import TrialCoordinator
from hpo.search.earlier.continuation import open_continued, plan_continuation
from hpo.search.listener import NullListener
from hpo.search.messages import TrialReport, TrialSpec
from hpo.search.runs import build_run, open_run
from hpo.search.slots import Slots
from hpo.search.trainable_check import check_values
from hpo.search.worker import end_trial, run_trial
from hpo.space.model import Space, load_space
from storage.database import Database
from storage.ownership import ClaimedTrial
from storage.run import Run
from storage.studies import find_revision, open_study
from storage.study import Study

ROOT = Path(__file__).parent.parent

TOY = {
    "sampler": "grid",
    "trainable": "benchmarks.toy:chain",
    "metric": "value",
    "max_epochs": 3,
    "checkpoint_every": 1,
    "parameters": {"x": [1, 2]},
}


@dataclass(frozen=True)
class Finished:
    """A command that has ended: its exit code and what it printed."""

    returncode: int
    stdout: str
    stderr: str


HpoHere = Callable[..., Finished]  # the fixture `hpo_here`


@dataclass
class Clock:
    """Stands in for the module `time`: a test sets the seconds."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 60.0) -> None:
    """Wait for a condition; fail the test if it does not become true in time."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        started = time.monotonic()
        if condition():
            return
        now = time.monotonic()
        assert now < deadline, f"the condition did not become true within {timeout_seconds:g} s"
        # What the test waits for needs the CPU more: an expensive condition is checked less often.
        time.sleep(min(0.5, max(0.02, 10 * (now - started))))


def is_running(pid: int) -> bool:
    """Return whether a process runs. A zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def shipped_space(name: str, *overrides: str) -> Space:
    """Load a space of search_spaces/."""
    return load_space(str(ROOT / f"search_spaces/{name}.yaml"), overrides)


def toy_space(folder: Path, name: str = "toy", **changes: Any) -> Space:
    """Write and load a grid of two toy trials, with changed keys."""
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(TOY | changes))  # JSON is YAML
    return load_space(str(path))


class Attack:
    """Pickled, it is a call that creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def trial_spec(folder: Path, **changes: Any) -> TrialSpec:
    """Build a toy trial of four epochs, with changed fields."""
    values: dict[str, Any] = {
        "trainable": "benchmarks.toy:chain",
        "command": None,
        "patterns": {},
        "key": "k",
        "params": {"x": 1},
        "data": {},
        "seed": 0,
        "max_epochs": 4,
        "stored_epoch": 0,
        "token": 1,
        "folder": str(folder / "trial"),
        "checkpoint_every": 1,
        "device": "cpu",
        "threads": 1,
        "timeout": None,
        "code_folder": str(folder),
    }
    return TrialSpec(**(values | changes))


def trial_states(study: Study) -> list[str]:
    """Return the state of each trial of a study."""
    return [trial.state.name for trial in study.trials()]


def take_reports(spec: TrialSpec, count: int) -> list[TrialReport]:
    """Start a trial and return its first reports."""
    reports = run_trial(spec)
    return [next(reports) for _ in range(count)]


class RecordingListener(NullListener):
    """Keeps the events of trials."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def trial_started(self, number: int, params: Mapping[str, Any], epoch: int, max_epochs: int) -> None:
        self.events.append(("started", number, epoch))

    def epoch_ended(self, number: int, epoch: int, metrics: Mapping[str, float]) -> None:
        self.events.append(("epoch", number, epoch))

    def trial_ended(self, number: int, state: str, text: str) -> None:
        self.events.append((state, number, text))

    def device_time_used(self, seconds: float) -> None:
        self.events.append(("used", seconds))

    def slots_changed(self, count: int, before: int) -> None:
        self.events.append(("slots", count, before))

    def note(self, text: str) -> None:
        self.events.append(("note", text))


@contextmanager
def after_statement(database: Database, part: str, act: Callable[[], object]) -> Iterator[None]:
    """Let something happen right after the first statement of the block that contains a text, as if others did it."""
    happened: list[str] = []

    def listen(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if part in statement and not happened:
            happened.append(statement)
            act()

    sa.event.listen(database.engine, "after_cursor_execute", listen)
    yield
    sa.event.remove(database.engine, "after_cursor_execute", listen)
    assert happened, f"no statement contains {part}"


def run_of(study: Study, space: Space) -> Run:
    """Build a driver's run on a study, as `run_trials` does."""
    return build_run(space, study, {})


def finish_study(
    database: Database,
    space: Space,
    points: Iterable[dict[str, Any]],
    *,
    provenance: Mapping[str, Any],
    device: Mapping[str, Any],
    epochs_of: Callable[[ClaimedTrial], list[dict[str, float]]],
    end: Callable[..., None] = Run.complete,
) -> Study:
    """Create a study as a run leaves it, without training.

    Args:
        database: where the study is stored.
        space: the search.
        points: the configurations.
        provenance: of the run.
        device: the provenance of each trial.
        epochs_of: returns the metrics of each epoch of a trial.
        end: ends a trial, given its last value; of several objectives, also `other_values`.
    """
    study = open_study(database, **space.study_options)
    with Run(study, config_key=space.config_key, provenance=provenance) as run:
        run.enqueue(list(points), space.distributions())
        while claim := run.claim():
            run.record(claim, {}, device)
            for epoch, metrics in enumerate(epochs_of(claim), start=1):
                run.report(claim, epoch, metrics, metrics[space.metric])
            value, *others = (metrics[each.metric] for each in space.all_objectives)
            end(run, claim, value, **({"other_values": tuple(others)} if others else {}))
    return study


def search_without_ray(
    space: Space, database: Database, folder: Path, *, at_a_time: int = 1, bucket_url: str = ""
) -> tuple[Study, RecordingListener]:
    """Run a search to its end in this process: one epoch of each running trial in turn."""
    check_values(space)
    listener, runs_dir = RecordingListener(), RunsDir(folder, bucket_url=bucket_url)
    before = find_revision(database, space.name, space.fingerprint)
    continuation = plan_continuation(space, before, database, runs_dir)
    study, continuation = open_continued(database, continuation, runs_dir)
    space = continuation.space
    for note in continuation.notes(study.keys()):
        listener.note(note)
    with open_run(continuation, study, {}) as run:
        coordinator = TrialCoordinator(
            space,
            run,
            Slots(at_a_time, 1.0, 0.0),
            data=space.trainable_data(folder),
            runs_dir=runs_dir,
            listener=listener,
        )
        running: dict[str, Any] = {}
        while running or not coordinator.is_done:
            while len(running) < at_a_time:
                tune_id = f"t{len(listener.events)}"
                spec = coordinator.next_trial(tune_id)
                if spec is None:
                    break
                coordinator.on_started(tune_id)
                running[tune_id] = run_trial(spec), spec
            for tune_id, (reports, spec) in list(running.items()):
                ending = coordinator.on_report(tune_id, next(reports))
                if ending is not None:
                    coordinator.on_saved(tune_id, end_trial(reports, ending, spec))
                    del running[tune_id]
        coordinator.release_all()
        assert coordinator.error is None
    return study, listener
