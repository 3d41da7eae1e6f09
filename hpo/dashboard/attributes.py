"""How optuna-dashboard stores plots, notes and artifacts: as system attributes of a study.

The formats are private to optuna-dashboard, and this module is the only one that uses them. There are two reasons to write
them here. optuna-dashboard has no public function that attaches a file to a trial that has ended, or that returns whether a
trial has a note. Its functions for plots and notes write each attribute in a separate transaction, and importing them takes
seconds, because they import scikit-learn: too long at the end of each search.

The formats were read from optuna-dashboard 0.21 (`_note.py`, `_custom_plot_data.py`, `artifact/_backend.py`), and
`pyproject.toml` excludes 0.22. tests/dashboard/test_attributes.py reads them back with optuna-dashboard's own functions.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MAX_ATTR_CHARS = 2045  # a longer text is split: the column of some databases is no longer
DELETED = json.dumps(None)  # an artifact's metadata after the artifact has been deleted
MIME_TYPES = {".png": "image/png", ".txt": "text/plain"}

# System attributes of a trial that breaks a constraint: plots draw it in grey, and leave it out of the best value.
DRAWN_IN_GREY = {"constraints": [1.0]}

# What hpo publishes in addition to logs (`hpo.paths.LOG_FILE`), see `derived_name`:
CHECKPOINT = "checkpoint"  # of the best trial; the name of its file changes
CURVES = "curves.png"


def derived_name(unique_name: str, trial_id: int | None, what: str) -> str:
    """Return the part of an artifact's id that is the same each time it is published. It is hard to guess.

    Args:
        unique_name: of the study, which is random.
        trial_id: the trial that the artifact belongs to; None for the study itself.
        what: `CHECKPOINT`, or the file's name in the browser.
    """
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{unique_name}/{trial_id}/{what}"))


@dataclass(frozen=True)
class Artifact:
    """A file that the dashboard offers for download.

    Attributes:
        artifact_id: its name in the artifact store.
        filename: its name in the browser.
        trial_id: the trial that it belongs to; None for the study itself.
    """

    artifact_id: str
    filename: str
    trial_id: int | None = None

    @property
    def key(self) -> str:
        """The system attribute that holds the metadata."""
        owner = "artifacts" if self.trial_id is None else f"dashboard:artifacts:{self.trial_id}"
        return f"{owner}:{self.artifact_id}"

    @property
    def metadata(self) -> str:
        """The metadata as JSON."""
        mime_type = MIME_TYPES.get(Path(self.filename).suffix, "application/octet-stream")
        return json.dumps(
            {"artifact_id": self.artifact_id, "filename": self.filename, "mimetype": mime_type, "encoding": None}
        )


@dataclass
class DashboardAttributes:
    """The system attributes of a study. Collects changes, so that one transaction can write them all.

    Attributes:
        attrs: all system attributes, including the changes.
        changes: those that differ from what the database had.
    """

    attrs: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    _operations: list[Callable[[DashboardAttributes], None]] = field(default_factory=list)

    def changes_to(self, attrs: dict[str, Any]) -> dict[str, Any]:
        """Return the changes to the system attributes that the study has by now: a user may have edited some meanwhile."""
        now = DashboardAttributes(attrs)
        for operation in self._operations:
            operation(now)
        return now.changes

    def save_plot(self, name: str, figure: Figure) -> None:
        """Add a plot to the study, or replace the one of this name.

        Args:
            name: a valid HTML id.
            figure: the plot.
        """
        text = figure.to_json()
        self._apply(lambda each: _set_text(each, f"dashboard:plot_data:{name}:", text))

    def has_note(self, trial_id: int) -> bool:
        """Return whether a trial has a note, even one whose text the user has deleted."""
        return f"dashboard:{trial_id}:note_ver" in self.attrs

    def add_note(self, trial_id: int, markdown: str) -> None:
        """Write the note of a trial, unless it has one."""

        def add(each: DashboardAttributes) -> None:
            if not each.has_note(trial_id):
                _set(each, f"dashboard:{trial_id}:note_ver", 1)
                _set_text(each, f"dashboard:{trial_id}:note_str:", markdown)

        self._apply(add)

    def lists(self, artifact: Artifact) -> bool:
        """Return whether the dashboard lists an artifact."""
        return bool(self.attrs.get(artifact.key, DELETED) != DELETED)

    def is_deleted(self, artifact: Artifact) -> bool:
        """Return whether an artifact was listed once and has been deleted since."""
        return bool(self.attrs.get(artifact.key) == DELETED)

    def add(self, artifact: Artifact) -> None:
        """List an artifact, unless the user has deleted it. Its file must exist already."""

        def add(each: DashboardAttributes) -> None:
            if not each.is_deleted(artifact):
                _set(each, artifact.key, artifact.metadata)

        self._apply(add)

    def delete(self, artifact: Artifact) -> None:
        """Stop listing an artifact."""
        self._apply(lambda each: _set(each, artifact.key, DELETED))

    def _apply(self, operation: Callable[[DashboardAttributes], None]) -> None:
        operation(self)
        self._operations.append(operation)


def _set(attributes: DashboardAttributes, key: str, value: Any) -> None:
    if attributes.attrs.get(key) != value:
        attributes.attrs[key] = attributes.changes[key] = value


def _set_text(attributes: DashboardAttributes, prefix: str, text: str) -> None:
    """Store a text in numbered parts. Parts of an earlier, longer text are emptied."""
    parts = [text[start : start + MAX_ATTR_CHARS] for start in range(0, len(text), MAX_ATTR_CHARS)]
    stored = sum(key.startswith(prefix) for key in attributes.attrs)
    parts += [""] * (stored - len(parts))
    for i, part in enumerate(parts):
        _set(attributes, f"{prefix}{i}", part)
