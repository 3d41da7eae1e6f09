"""The note of a trial in the dashboard: Markdown that says what the trial was, where it ran, and how it ended."""

from __future__ import annotations

import shlex
import textwrap
from typing import TYPE_CHECKING

from hpo.report.formatting import describe_seeds, format_mean, format_value
from hpo.report.results import Results
from hpo.report.tables import describe_schedule
from hpo.report.trials import TrialResult

if TYPE_CHECKING:
    from hpo.space.model import Space


def describe_trial(results: Results, trial: TrialResult, space: Space | None) -> str:
    """Return the note of a trial, in Markdown.

    Args:
        results: the study's results, with the epochs of this trial.
        trial: the trial.
        space: the study's search space; None if this version of hpo cannot read it.
    """
    from storage.errors import retry_while_down
    from storage.records import REPLACED_BY, REPLACES, read_provenance

    study, epochs = results.study, len(trial.epochs)
    # Unlike `trial.provenance`, this also has what was recorded of the run: machine, code, Python.
    provenance = retry_while_down(study.database, lambda: read_provenance(study.database, trial.trial_id))
    named = [*(name for name, _ in results.objectives), "test_accuracy"]
    scores = [
        f"{name} {format_mean(trial.last[name], trial.standard_error(name))}" for name in named if name in trial.last
    ]
    params = trial.params | trial.attrs.get("derived", {})
    shown_params = ", ".join(f"{name} {format_value(value)}" for name, value in params.items())
    max_epochs, trained_by, seeds = (
        (space.max_epochs, space.command or space.trainable, describe_seeds(space)) if space else ("?", "?", "seed ?")
    )
    lines = [
        f"**{trial.state}** after {epochs} of {max_epochs} epochs" + (f": {', '.join(scores)}" if scores else ""),
        f"**Params**: {code(shown_params or 'none')}",
        f"**Training**: {code(trained_by)}, {seeds}, version {code(provenance.get('code', '?'))}",
    ]
    if provenance:
        device = f"{provenance.get('device_name', '?')} ({provenance.get('device', '?')})"
        lines.append(
            f"**Machine**: {code(provenance.get('machine', '?'))}, {code(device)}, Python {provenance.get('python', '?')}"
        )
    if trial.seconds:
        trained = epochs - trial.continued_epochs
        per_epoch = f", {trial.seconds / trained:,.2f} s per epoch" if trained else ""
        lines.append(f"**Duration**: {trial.seconds:,.1f} s{per_epoch}")
    if trial.reused_from:
        lines.append(f"**Reused from**: {code(trial.reused_from)}, which trained it")
    if trial.continued_from:
        lines.append(f"**Continued from**: {code(trial.continued_from)}, after epoch {trial.continued_epochs}")
    if schedule := describe_schedule(results, trial):
        lines.append(f"**Schedule**: {code(schedule)}")
    replaced_by = trial.attrs.get(REPLACED_BY)
    if isinstance(replaced_by, dict):
        lines.append(f"**Replaced by**: trial {code(replaced_by.get('trial'))}")
    parent = trial.attrs.get("parent")
    if parent is not None:
        lines.append(f"**Parent**: [trial {parent}](/dashboard/studies/{study.study_id}/trials?numbers={parent})")
    if REPLACES not in trial.attrs:  # else its hyperparameters changed while it was trained
        lines.append(f"**Replay**: {code(f'hpo replay {shlex.quote(results.name)} {trial.number}')}")
    note = "\n".join(f"- {line}" for line in lines)
    if trial.fail_reason:
        reason = textwrap.wrap(trial.fail_reason, 80)  # the dashboard does not wrap the lines of a code block
        note += "\n\nReason of the failure:\n\n" + code("\n".join(reason), block=True)
    return note


def code(value: object, *, block: bool = False) -> str:
    """Return a value as Markdown code, inline or as a block. Backticks and markup in it are shown, not interpreted."""
    text = str(value)
    fence = "```" if block else "`"
    while fence in text:
        fence += "`"
    if block:
        return f"{fence}\n{text}\n{fence}"
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"
