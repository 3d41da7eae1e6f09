"""optuna-dashboard on the storage of this service, with what it does not show by itself.

    plots      the trials' training and validation curves over epochs
    notes      a text on each trial: what, where, how long
    artifacts  the checkpoint of the best trial, the log of each failed one, the curves as an image

All of it is written from storage and from the files of the runs, again and again: nothing is added twice, what the user
has edited or deleted stays so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hpo.command import LOG_FILE
from hpo.curves import curve_figures, curve_image

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial
    from plotly.graph_objects import Figure
    from starlette.applications import Starlette

    from storage.database import Database
    from storage.records import Metrics
    from storage.studies import Study

MAX_CURVES = 50  # lines of a plot; of more trials, the best
MAX_LEGEND = 20  # a longer legend would leave no room for the curves; the mouse shows which is which
# The dashboard looks through every note for every trial: a thousand notes on 5,000 trials double the time of an answer.
MAX_NOTES = 200
MAX_LOG_BYTES = 1_000_000  # the end of a longer log
PUBLISH_SECONDS = 60.0  # between looks, while the dashboard is served, for studies in which a trial has ended
PUBLISHED = "hpo:published"  # the study's system attribute: how many trials had ended when it was last published
# optuna-dashboard's key for an artifact of a trial that has ended, whose own attributes nobody may change any more.
TRIAL_ARTIFACTS = "dashboard:artifacts:"
STUDY_ARTIFACTS = "artifacts:"

logger = logging.getLogger("hpo.dashboard")


def serve(database: Database, host: str, port: int, *, password: str | None, runs_dir: Path) -> None:
    """Serve the dashboard until interrupted, and keep what it shows of our own up to date.

    Args:
        database: whose studies.
        host: the address to listen on.
        port: the port to listen on.
        password: asked for by HTTP Basic; None asks for none.
        runs_dir: where the artifacts and checkpoints of the runs lie.

    Raises:
        SettingError: an address beyond this machine without a password, or one that cannot be listened on.
    """
    from hpo import front
    from hpo.errors import SettingError

    if password is None and not front.is_loopback(host):
        raise SettingError(
            f"whoever reaches {host}:{port} could delete studies: set HPO_DASHBOARD_PASSWORD to the password that it is to "
            "ask for, or keep --host 127.0.0.1"
        )
    app = build_app(database, password=password, runs_dir=runs_dir)
    stopped = threading.Event()
    publisher = threading.Thread(target=_keep_published, args=(database, runs_dir, stopped), daemon=True)
    with front.listen(host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{port}/ shows {database.url}; Ctrl-C ends it", flush=True)
        publisher.start()
        with contextlib.suppress(KeyboardInterrupt):
            front.build_server(app).run(sockets=[listening])
        stopped.set()


def build_app(database: Database, *, password: str | None, runs_dir: Path) -> Starlette:
    """Return the dashboard behind its guards, as an ASGI application."""
    from optuna.artifacts import FileSystemArtifactStore
    from optuna.storages import get_storage
    from optuna_dashboard import wsgi

    from hpo import front

    artifacts = artifacts_folder(runs_dir)
    artifacts.mkdir(parents=True, exist_ok=True)
    # Optuna's cache: of 5,000 trials that have ended, an answer takes 2 s with it and 10 s without.
    dashboard = wsgi(get_storage(database.optuna), artifact_store=FileSystemArtifactStore(artifacts))
    # Another name that leads to this machine is another site's, unless the password shows that it is the user's own.
    hosts = front.LOOPBACK_NAMES if password is None else ("*",)
    return front.build_app(dashboard, password=password, hosts=hosts)


def artifacts_folder(runs_dir: Path) -> Path:
    """Return where the dashboard's artifacts lie."""
    return runs_dir / "artifacts"


def _keep_published(database: Database, runs_dir: Path, stopped: threading.Event) -> None:
    from storage.studies import all_studies

    while not stopped.is_set():
        started = time.monotonic()
        with contextlib.suppress(Exception):  # the database is away, say; there is a next time
            for study in all_studies(database):
                publish(study, runs_dir)
        # A large study is read in seconds; that must not slow the answers of the dashboard.
        stopped.wait(max(PUBLISH_SECONDS, 20 * (time.monotonic() - started)))


# --- what is published ----------------------------------------------------------------------------------------------


def publish(study: Study, runs_dir: Path, *, always: bool = False) -> None:
    """Bring the plots, notes and artifacts of a study up to date, if a trial has ended since the last time.

    An error is logged and not raised: no run fails for want of a note.

    Args:
        study: the study.
        runs_dir: where the artifacts and checkpoints of the runs lie.
        always: also if no trial has ended: what published it last may not have seen these checkpoints.
    """
    from storage.database import patiently
    from storage.records import count_ended

    try:
        ended = patiently(study.database, lambda: count_ended(study.database, study.study))
        if "hpo:id" in study.attrs and ended and (always or study.system_attrs().get(PUBLISHED) != ended):
            _publish(study, runs_dir)
            study.set_system_attrs({PUBLISHED: ended})  # last: with it, everything is there
    except Exception as error:  # noqa: BLE001 # see above
        logger.warning(
            "the plots, notes and artifacts of %s in the dashboard are not up to date: %r", study.name, error
        )


def _publish(study: Study, runs_dir: Path) -> None:
    ranked = _rank(study)
    page = _Page(study.study, study.system_attrs())
    folder = artifacts_folder(runs_dir)
    folder.mkdir(parents=True, exist_ok=True)

    drawn = ranked[:MAX_CURVES]
    metrics = study.metrics_of(drawn)
    labels = _labels(trial for trial in drawn if metrics[trial.number])
    figures = curve_figures(labels, metrics)
    for name, figure in figures.items():
        page.plot(name, figure)
    if figures:
        image = curve_image(labels, metrics)
        page.attach(_Artifact(study, "curves.png"), partial(_write, image), folder, replace=True)

    noted = _choose(page, ranked)
    metrics = study.metrics_of(noted)
    for trial in noted:
        page.note(trial, note(study, trial, metrics[trial.number]))
        if trial.state.name == "FAIL":
            log = _log(trial, _trial_folder(study, trial, runs_dir))
            page.attach(_Artifact(study, LOG_FILE, trial._trial_id), partial(_write, log), folder)

    best = ranked[0] if ranked and ranked[0].state.name == "COMPLETE" else None
    if best is not None:
        checkpoints = sorted(_trial_folder(study, best, runs_dir).glob("epoch-*.pt"))
        if checkpoints:
            artifact = _Artifact(study, checkpoints[-1].name, best._trial_id, role="checkpoint")
            page.attach(artifact, partial(_link, checkpoints[-1]), folder)
        page.detach(
            (_Artifact(study, "", trial._trial_id, role="checkpoint") for trial in ranked if trial is not best), folder
        )
    study.set_system_attrs(page.changes)


def _rank(study: Study) -> list[FrozenTrial]:
    """Return the trials that were run to some end: completed ones first, among them the best (by the first objective)."""
    sign = -1 if study.optuna.directions[0].name == "MAXIMIZE" else 1

    def place(trial: FrozenTrial) -> tuple[Any, ...]:
        value = trial.values[0] if trial.values else None
        return trial.state.name != "COMPLETE", value is None, sign * (value or 0.0), trial.number

    return sorted((trial for trial in study.run_trials() if trial.state.is_finished()), key=place)


def _choose(page: _Page, ranked: list[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that lack a note and get one: the best ten, failed ones, and the next best while there is room."""
    first = [*ranked[:10], *[trial for trial in ranked if trial.state.name == "FAIL"][: MAX_NOTES // 2]]
    ordered = {trial._trial_id: trial for trial in (*first, *ranked)}.values()
    lacking = [trial for trial in ordered if not page.has_note(trial._trial_id)]
    wanted = {trial._trial_id for trial in first}
    room = max(MAX_NOTES - (len(ranked) - len(lacking)), sum(trial._trial_id in wanted for trial in lacking))
    return lacking[:room]


def _labels(trials: Iterable[FrozenTrial]) -> dict[int, str]:
    """Return each trial's number and what tells it from the others."""
    params = {trial.number: {name: _short(value) for name, value in trial.params.items()} for trial in trials}
    names = dict.fromkeys(name for values in params.values() for name in values)
    varying = [name for name in names if len({values.get(name) for values in params.values()}) > 1]
    return {
        number: " ".join(
            [f"#{number}", ", ".join(f"{name} {values[name]}" for name in varying if name in values)]
        ).strip()
        for number, values in params.items()
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _trial_folder(study: Study, trial: FrozenTrial, runs_dir: Path) -> Path:
    return runs_dir / "checkpoints" / study.unique_name / str(trial.number)


def note(study: Study, trial: FrozenTrial, metrics: Metrics) -> str:
    """Return, in Markdown, what a trial was, where it ran, how long it took, and why it failed if it did."""
    from storage.database import patiently
    from storage.records import read_provenance

    where = patiently(study.database, lambda: read_provenance(study.database, trial._trial_id))
    last = metrics[max(metrics)] if metrics else {}
    seconds = sum(values.get("epoch_seconds", 0.0) for values in metrics.values())
    scores = [f"{name} {last[name]:.4f}" for name in (study.metric, "test_accuracy") if name in last]
    settings = study.settings
    params = trial.params | trial.user_attrs.get("derived", {})
    lines = [
        f"**{trial.state.name}** after {len(metrics)} of {settings.get('max_epochs', '?')} epochs"
        + (f": {', '.join(scores)}" if scores else ""),
        "**What**: " + _code(", ".join(f"{name} {_short(value)}" for name, value in params.items()) or "no parameters"),
        f"**How**: {_code(settings.get('command') or settings.get('trainable', '?'))}, seed {settings.get('seed', '?')}, "
        f"code {_code(where.get('code', '?'))}",
    ]
    if where:
        device = f"{where.get('device_name', '?')} ({where.get('device', '?')})"
        lines.append(
            f"**Where**: {_code(where.get('machine', '?'))}, {_code(device)}, Python {where.get('python', '?')}"
        )
    if seconds:
        lines.append(f"**How long**: {seconds:,.1f} s, {seconds / len(metrics):,.2f} s an epoch")
    parent = trial.user_attrs.get("parent")
    if parent is not None:
        lines.append(f"**Parent**: [trial {parent}](/dashboard/studies/{study.study}/trials?numbers={parent})")
    lines.append(f"**Again**: {_code(f'hpo replay {study.name} {trial.number}')}")
    text = "\n".join(f"- {line}" for line in lines)
    if "fail_reason" in trial.user_attrs:
        reason = textwrap.wrap(str(trial.user_attrs["fail_reason"]), 80)  # the dashboard does not fold such a block
        text += "\n\nFailed:\n\n" + _code("\n".join(reason), block=True)
    return text


def _code(value: object, *, block: bool = False) -> str:
    """Return a text that Markdown shows as it is, whatever it holds."""
    text = str(value)
    fence = "```" if block else "`"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}" if block else f"{fence}{' ' * ('`' in text)}{text}{' ' * ('`' in text)}{fence}"


def _log(trial: FrozenTrial, folder: Path) -> bytes:
    """Return all that is known of why a trial failed."""
    attrs = trial.user_attrs
    parts = [f"trial {trial.number} failed: {attrs.get('fail_reason', 'for an unknown reason')}"]
    parts += [str(attrs["traceback"])] if "traceback" in attrs else []
    text = "\n\n".join(parts).encode()
    with contextlib.suppress(OSError), (folder / LOG_FILE).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_LOG_BYTES))
        text += b"\n\nIts output:\n\n" + file.read()
    return text + b"\n"


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _link(source: Path, path: Path) -> None:
    """Give a checkpoint, which nobody changes once it is written, a second name: no byte is copied."""
    try:
        path.hardlink_to(source)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, path)


# --- how optuna-dashboard keeps it ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Artifact:
    """A file for the dashboard, under an identifier that is the same each time it is published.

    Attributes:
        trial: its trial_id; None for the study's own.
        role: what makes the identifier, if the file name changes.
    """

    study: Study
    filename: str
    trial: int | None = None
    role: str = ""

    @property
    def id(self) -> str:
        """The identifier; nobody guesses it who does not know the study's own."""
        return str(
            uuid.uuid5(uuid.NAMESPACE_OID, f"{self.study.unique_name}/{self.trial}/{self.role or self.filename}")
        )

    @property
    def key(self) -> str:
        """The study's system attribute that names it."""
        return f"{STUDY_ARTIFACTS if self.trial is None else f'{TRIAL_ARTIFACTS}{self.trial}:'}{self.id}"


@dataclass
class _Page:
    """The system attributes of a study, and the changes to them, which are written all at once at the end.

    optuna-dashboard's own functions write notes and plots into it: it is the part of a storage that they use.
    """

    study: int
    attrs: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)

    def get_study_system_attrs(self, _study: int) -> dict[str, Any]:
        return self.attrs

    def set_study_system_attr(self, _study: int, key: str, value: Any) -> None:
        if self.attrs.get(key) != value:
            self.attrs[key] = self.changes[key] = value

    def plot(self, name: str, figure: Figure) -> None:
        from optuna_dashboard import save_plotly_graph_object

        # A card of the dashboard is half a page wide: beside the legend there would be no room for the curves.
        legend = {"orientation": "h", "yanchor": "top", "y": -0.2}
        title = {"text": f"{name[:1].upper()}{name[1:]} over epochs"}
        figure.update_layout(title=title, legend=legend, showlegend=len(figure.data) <= MAX_LEGEND)
        study = SimpleNamespace(_storage=self, _study_id=self.study)
        save_plotly_graph_object(study, figure, graph_object_id=re.sub(r"[^\w.-]", "_", name, flags=re.ASCII))

    def has_note(self, trial: int) -> bool:
        return f"dashboard:{trial}:note_ver" in self.attrs

    def note(self, trial: FrozenTrial, text: str) -> None:
        from optuna_dashboard import save_note

        study = SimpleNamespace(_study_id=self.study)
        save_note(SimpleNamespace(storage=self, study=study, _trial_id=trial._trial_id), text)

    def attach(self, artifact: _Artifact, make: Callable[[Path], None], folder: Path, *, replace: bool = False) -> None:
        """Put a file into the dashboard, unless it has been there before: what the user deleted stays deleted."""
        if artifact.key in self.attrs and (not replace or self.attrs[artifact.key] == json.dumps(None)):
            return
        draft = folder / f".{artifact.id}.{os.getpid()}"
        draft.unlink(missing_ok=True)
        make(draft)
        draft.replace(folder / artifact.id)
        kind = {".png": "image/png", ".txt": "text/plain"}.get(
            Path(artifact.filename).suffix, "application/octet-stream"
        )
        meta = {"artifact_id": artifact.id, "filename": artifact.filename, "mimetype": kind, "encoding": None}
        self.set_study_system_attr(self.study, artifact.key, json.dumps(meta))

    def detach(self, artifacts: Iterable[_Artifact], folder: Path) -> None:
        """Take files out of the dashboard that no longer belong there."""
        for artifact in artifacts:
            if self.attrs.get(artifact.key, json.dumps(None)) != json.dumps(None):
                self.set_study_system_attr(self.study, artifact.key, json.dumps(None))
                (folder / artifact.id).unlink(missing_ok=True)


if __name__ == "__main__":
    from hpo.run import main

    main(["dashboard"])
