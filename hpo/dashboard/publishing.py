"""Adds plots, notes and artifacts to optuna-dashboard.

    plots      training and validation curves over epochs
    notes      a text for each trial: params, machine, duration, reason of a failure
    artifacts  the checkpoint of the best trial, the log of each failed trial, the curves as an image

Everything is derived from storage and from the files under runs/. Publishing again creates no duplicates, and keeps what the
user has edited or deleted.
"""

from __future__ import annotations

import contextlib
import html
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.dashboard.attributes import CHECKPOINT, CURVES, Artifact, DashboardAttributes, derived_name
from hpo.dashboard.notes import describe_trial
from hpo.paths import LOG_FILE, RunsDir, link_or_copy, logs_of, study_id_of, write_atomically
from hpo.report.published import match_published
from hpo.report.reading import read_epochs, read_results
from hpo.report.results import Results
from hpo.report.trials import TrialResult
from hpo.search.checkpoints.files import belongs_to, list_checkpoints
from hpo.search.checkpoints.retention import is_deleted
from hpo.search.population import owner_of

if TYPE_CHECKING:
    from storage.study import Study

MAX_CURVES = 50  # trials in a plot: plots are stored in SQL
# For each trial, optuna-dashboard searches all notes: 1,000 notes on 5,000 trials double its response time.
MAX_NOTES = 200
ALWAYS_NOTED = 10  # the best trials that have a note even if MAX_NOTES is reached
MAX_LOG_BYTES = 1_000_000  # of a longer log, only the end is published
PUBLISHED = "hpo:published"  # system attribute of a study: how many trials had ended when it was last published

logger = logging.getLogger("hpo.dashboard")


def publish(study: Study, runs_dir: RunsDir, *, always: bool = False) -> None:
    """Update the plots, notes and artifacts of a study, if a trial has ended since they were last updated.

    Best effort: an error is logged and not raised, because a search must not fail over its notes. A study that another
    program created is not changed.

    Args:
        study: the study.
        runs_dir: the folder of the artifacts and checkpoints.
        always: update even if no trial has ended since. The last update may have run on a machine without the checkpoints.
    """
    try:
        ended = study.count_ended()
        if study.is_ours and ended and (always or study.system_attrs().get(PUBLISHED) != ended):
            _publish(study, runs_dir)
            study.set_system_attrs({PUBLISHED: ended})  # last, so that an error before it means another attempt
    except Exception as error:  # noqa: BLE001 # best effort, see above
        logger.warning("could not update the plots, notes and artifacts of %s in the dashboard: %r", study.name, error)


def _publish(study: Study, runs_dir: RunsDir) -> None:
    results = read_results(study, epochs=False)
    ranked = [trial for trial in results.ranked if trial.has_ended]
    attributes = DashboardAttributes(study.system_attrs())
    runs_dir.artifacts.mkdir(parents=True, exist_ok=True)
    _publish_curves(results, ranked, attributes, runs_dir)
    _publish_notes_and_logs(results, ranked, attributes, runs_dir)
    _publish_best_checkpoint(results, ranked, attributes, runs_dir)
    study.change_system_attrs(attributes.changes_to)  # drawing takes seconds, in which a user may have written a note


def _publish_curves(
    results: Results, ranked: Sequence[TrialResult], attributes: DashboardAttributes, runs_dir: RunsDir
) -> None:
    from hpo.report import curves, plotly_figures, png_figures  # late: they import plotting libraries

    drawn = read_epochs(results, {trial.number for trial in ranked[:MAX_CURVES]})
    selection, published = curves.select_trials(drawn), match_published(drawn)
    drawings = []
    for family in curves.name_families(drawn):
        drawing = curves.build_figure(drawn, family, selection, published)
        drawings.append(drawing)
        figure = plotly_figures.to_graph_object(drawing)
        styles = curves.describe_styles(family.metrics, published)
        title = f"{html.escape(family.title)}<br><sub>{html.escape(styles)}</sub>"
        # A card of the dashboard is half a page wide: a legend next to the plot would leave no room for the curves.
        figure.update_layout(title={"text": title}, legend={"orientation": "h", "yanchor": "top", "y": -0.2})
        attributes.save_plot(family.name, figure)
    if drawings:
        image = png_figures.to_png(png_figures.draw_curves(drawings))
        artifact = _artifact(results.study, attributes, CURVES)
        _publish_file(artifact, attributes, runs_dir, partial(write_atomically, content=image), replace=True)


def _publish_notes_and_logs(
    results: Results, ranked: Sequence[TrialResult], attributes: DashboardAttributes, runs_dir: RunsDir
) -> None:
    study, space = results.study, results.space
    selected = {trial.number for trial in select_trials_to_note(attributes, ranked)}
    noted = read_epochs(results, selected)
    for trial in noted.trials:
        if trial.number not in selected:
            continue
        attributes.add_note(trial.trial_id, describe_trial(noted, trial, space))
        if trial.state == "FAIL":
            log = _failure_log(trial, runs_dir.trial(study.unique_name, trial.number))
            artifact = _artifact(study, attributes, LOG_FILE, trial.trial_id)
            _publish_file(artifact, attributes, runs_dir, partial(write_atomically, content=log))


def _publish_best_checkpoint(
    results: Results, ranked: Sequence[TrialResult], attributes: DashboardAttributes, runs_dir: RunsDir
) -> None:
    study, space, best = results.study, results.space, results.best
    if best is None:
        return
    folder = runs_dir.trial(study.unique_name, best.number)
    if space is None or belongs_to(folder, owner_of(space, best.params, best.attrs)):
        for newest in list_checkpoints(folder)[:1]:
            artifact = _artifact(study, attributes, newest.name, best.trial_id, role=CHECKPOINT)
            with contextlib.suppress(FileNotFoundError):  # a better one has completed: the next update publishes that
                _publish_file(artifact, attributes, runs_dir, partial(link_or_copy, newest))
        if space is not None and space.saves_checkpoints and is_deleted(folder):
            now_best = read_results(study, epochs=False).best
            if now_best is not None and now_best.number == best.number:  # else a better one has completed meanwhile
                logger.warning(
                    "the dashboard of %s has no checkpoint of the best trial: checkpoints.keep is %s",
                    study.name,
                    space.checkpoints.keep,
                )
    for trial in ranked:
        former = _artifact(study, attributes, "", trial.trial_id, role=CHECKPOINT)
        if trial is not best and attributes.lists(former):
            attributes.delete(former)
            (runs_dir.artifacts / former.artifact_id).unlink(missing_ok=True)


def select_trials_to_note(attributes: DashboardAttributes, ranked: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the trials that have no note yet and get one.

    The best `ALWAYS_NOTED` trials and the failed ones come first, and get a note even beyond `MAX_NOTES`. The next best
    trials follow, as long as `MAX_NOTES` allows.

    Args:
        attributes: the study's, with the notes so far.
        ranked: the trials that have ended, best first.
    """
    failed = [trial for trial in ranked if trial.state == "FAIL"][: MAX_NOTES // 2]
    important = {trial.trial_id: trial for trial in (*ranked[:ALWAYS_NOTED], *failed)}
    by_importance = important | {trial.trial_id: trial for trial in ranked}
    without_note = [trial for trial in by_importance.values() if not attributes.has_note(trial.trial_id)]
    notes = len(ranked) - len(without_note)
    return without_note[: max(MAX_NOTES - notes, sum(trial.trial_id in important for trial in without_note))]


def _failure_log(trial: TrialResult, trial_dir: Path) -> bytes:
    """Return why a trial failed: the reason, the traceback, and the output of its script."""
    parts = [f"trial {trial.number} failed: {trial.fail_reason}", *filter(None, [trial.traceback])]
    log = "\n\n".join(parts).encode()
    outputs = logs_of(trial_dir)
    for output in outputs:
        what = "Its output" if len(outputs) == 1 else f"Its output in {output.name}"
        with contextlib.suppress(OSError), output.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_LOG_BYTES // len(outputs)))
            log += f"\n\n{what}:\n\n".encode() + file.read()
    return log + b"\n"


def _artifact(
    study: Study, attributes: DashboardAttributes, filename: str, trial_id: int | None = None, *, role: str = ""
) -> Artifact:
    """Return an artifact whose id is the same each time it is published.

    The id starts with that of the study, so that `hpo clean` knows which study a file belongs to.

    Args:
        study: the study; its unique name, which is random, makes the id hard to guess.
        attributes: the study's. An artifact that an older version published keeps its id.
        filename: the file's name in the browser.
        trial_id: the trial that it belongs to; None for the study itself.
        role: replaces the file name in the id, where the file name may change.
    """
    unique_name = study.unique_name
    name = derived_name(unique_name, trial_id, role or filename)
    former = Artifact(name, filename, trial_id)
    if attributes.lists(former) or attributes.is_deleted(former):
        return former
    return Artifact(f"{study_id_of(unique_name)}-{name}", filename, trial_id)


def _publish_file(
    artifact: Artifact,
    attributes: DashboardAttributes,
    runs_dir: RunsDir,
    write: Callable[[Path], None],
    *,
    replace: bool = False,
) -> None:
    """Write an artifact's file and list it, unless the dashboard lists it already or the user has deleted it.

    Args:
        artifact: the artifact.
        attributes: the study's.
        runs_dir: the folder of the artifacts.
        write: writes the file to a path.
        replace: write the file even if the dashboard lists it already.
    """
    if attributes.is_deleted(artifact) or (attributes.lists(artifact) and not replace):
        return
    write(runs_dir.artifacts / artifact.artifact_id)
    attributes.add(artifact)
