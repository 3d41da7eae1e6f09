"""optuna-dashboard on the storage of this service, with what it does not show by itself.

    plots      the trials' training and validation curves over epochs
    notes      a text on each trial: what, where, how long
    artifacts  the checkpoint of the best trial, the log of each failed one, the curves as an image

All of it is written from storage and from the files of the runs, again and again: nothing is added twice, what the user
has edited or deleted stays so.
"""

from __future__ import annotations

import contextlib
import html
import json
import logging
import os
import shutil
import textwrap
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hpo.paths import RunsDir
from hpo.report.formatting import format_value
from hpo.report.published import match_published
from hpo.report.results import Results, TrialResult, read_epochs, read_results
from hpo.search.script import LOG_FILE

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from storage.studies import Study

MAX_CURVES = 50  # trials of a plot, the best: what is drawn is kept in SQL
# The dashboard looks through every note for every trial: a thousand notes on 5,000 trials double the time of an answer.
MAX_NOTES = 200
MAX_LOG_BYTES = 1_000_000  # the end of a longer log
PUBLISHED = "hpo:published"  # the study's system attribute: how many trials had ended when it was last published
# optuna-dashboard's key for an artifact of a trial that has ended, whose own attributes nobody may change any more.
TRIAL_ARTIFACTS = "dashboard:artifacts:"
STUDY_ARTIFACTS = "artifacts:"

logger = logging.getLogger("hpo.dashboard")


def publish(study: Study, runs_dir: RunsDir, *, always: bool = False) -> None:
    """Bring the plots, notes and artifacts of a study up to date, if a trial has ended since the last time.

    An error is logged and not raised: no run fails for want of a note.

    Args:
        study: the study.
        runs_dir: where the artifacts and checkpoints of the runs lie.
        always: also if no trial has ended: what published it last may not have seen these checkpoints.
    """
    try:
        ended = study.count_ended()
        if "hpo:id" in study.attrs and ended and (always or study.system_attrs().get(PUBLISHED) != ended):
            _publish(study, runs_dir)
            study.set_system_attrs({PUBLISHED: ended})  # last: with it, everything is there
    except Exception as error:  # noqa: BLE001 # see above
        logger.warning(
            "the plots, notes and artifacts of %s in the dashboard are not up to date: %r", study.name, error
        )


def _publish(study: Study, runs_dir: RunsDir) -> None:
    from hpo.report import figures

    results = read_results(study, epochs=False)
    ranked = [trial for trial in results.ranked if trial.has_ended]
    page = _Page(study.study_id, study.system_attrs())
    folder = runs_dir.artifacts
    folder.mkdir(parents=True, exist_ok=True)

    drawn = read_epochs(results, {trial.number for trial in ranked[:MAX_CURVES]})
    families, selection, published = figures.name_families(drawn), figures.select_trials(drawn), match_published(drawn)
    for family in families:
        figure = figures.plot_curves(drawn, family.metrics, selection, published)
        styles = figures.describe_styles(family.metrics, published)
        page.plot(family.name, f"{html.escape(family.title)}<br><sub>{html.escape(styles)}</sub>", figure)
    if families:
        image = figures.to_png(figures.draw_families(drawn, families, selection, published))
        page.attach(_Artifact(study, "curves.png"), partial(_write, image), folder, replace=True)

    chosen = {trial.number for trial in _choose(page, ranked)}
    noted = read_epochs(results, chosen)
    for trial in noted.trials:
        if trial.number in chosen:
            page.note(trial, note(noted, trial))
            if trial.state == "FAIL":
                log = _log(trial, runs_dir.trial(study.unique_name, trial.number))
                page.attach(_Artifact(study, LOG_FILE, trial.trial_id), partial(_write, log), folder)

    best = results.best
    if best is not None:
        saved = sorted(runs_dir.trial(study.unique_name, best.number).glob("epoch-*.pt"))
        if saved:
            artifact = _Artifact(study, saved[-1].name, best.trial_id, role="checkpoint")
            page.attach(artifact, partial(_link, saved[-1]), folder)
        others = (trial.trial_id for trial in ranked if trial is not best)
        page.detach((_Artifact(study, "", trial, role="checkpoint") for trial in others), folder)
    study.set_system_attrs(page.changes)


def _choose(page: _Page, ranked: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the trials that lack a note and get one: the best ten, failed ones, and the next best while there is room."""
    first = [*ranked[:10], *[trial for trial in ranked if trial.state == "FAIL"][: MAX_NOTES // 2]]
    ordered = {trial.trial_id: trial for trial in (*first, *ranked)}.values()
    lacking = [trial for trial in ordered if not page.has_note(trial.trial_id)]
    wanted = {trial.trial_id for trial in first}
    room = max(MAX_NOTES - (len(ranked) - len(lacking)), sum(trial.trial_id in wanted for trial in lacking))
    return lacking[:room]


def note(results: Results, trial: TrialResult) -> str:
    """Return, in Markdown, what a trial was, where it ran, how long it took, and why it failed if it did."""
    from storage.database import retry_while_down
    from storage.tables import read_provenance

    study, settings, epochs = results.study, results.settings, len(trial.epochs)
    where = retry_while_down(study.database, lambda: read_provenance(study.database, trial.trial_id))
    scores = [f"{name} {trial.last[name]:.4f}" for name in (results.metric, "test_accuracy") if name in trial.last]
    params = trial.params | trial.attrs.get("derived", {})
    shown = ", ".join(f"{name} {format_value(value)}" for name, value in params.items())
    lines = [
        f"**{trial.state}** after {epochs} of {settings.get('max_epochs', '?')} epochs"
        + (f": {', '.join(scores)}" if scores else ""),
        "**What**: " + _code(shown or "no parameters"),
        f"**How**: {_code(settings.get('command') or settings.get('trainable', '?'))}, seed {settings.get('seed', '?')}, "
        f"code {_code(where.get('code', '?'))}",
    ]
    if where:
        device = f"{where.get('device_name', '?')} ({where.get('device', '?')})"
        lines.append(
            f"**Where**: {_code(where.get('machine', '?'))}, {_code(device)}, Python {where.get('python', '?')}"
        )
    if trial.seconds:
        an_epoch = f", {trial.seconds / epochs:,.2f} s an epoch" if epochs else ""
        lines.append(f"**How long**: {trial.seconds:,.1f} s{an_epoch}")
    parent = trial.attrs.get("parent")
    if parent is not None:
        lines.append(f"**Parent**: [trial {parent}](/dashboard/studies/{study.study_id}/trials?numbers={parent})")
    lines.append(f"**Again**: {_code(f'hpo replay {study.name} {trial.number}')}")
    text = "\n".join(f"- {line}" for line in lines)
    if trial.fail_reason:
        reason = textwrap.wrap(trial.fail_reason, 80)  # the dashboard does not fold such a block
        text += "\n\nFailed:\n\n" + _code("\n".join(reason), block=True)
    return text


def _code(value: object, *, block: bool = False) -> str:
    """Return a text that Markdown shows as it is, whatever it holds."""
    text = str(value)
    fence = "```" if block else "`"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}" if block else f"{fence}{' ' * ('`' in text)}{text}{' ' * ('`' in text)}{fence}"


def _log(trial: TrialResult, folder: Path) -> bytes:
    """Return all that is known of why a trial failed."""
    parts = [f"trial {trial.number} failed: {trial.fail_reason}", *filter(None, [trial.traceback])]
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

    def plot(self, name: str, title: str, figure: Figure) -> None:
        from optuna_dashboard import save_plotly_graph_object

        # A card of the dashboard is half a page wide: beside the legend there would be no room for the curves.
        legend = {"orientation": "h", "yanchor": "top", "y": -0.2}
        figure.update_layout(title={"text": title}, legend=legend)
        study = SimpleNamespace(_storage=self, _study_id=self.study)
        save_plotly_graph_object(study, figure, graph_object_id=name)

    def has_note(self, trial: int) -> bool:
        return f"dashboard:{trial}:note_ver" in self.attrs

    def note(self, trial: TrialResult, text: str) -> None:
        from optuna_dashboard import save_note

        study = SimpleNamespace(_study_id=self.study)
        save_note(SimpleNamespace(storage=self, study=study, _trial_id=trial.trial_id), text)

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
