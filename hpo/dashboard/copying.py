"""What the dashboard shows of a study, for its copy: notes and artifacts, whose names contain keys of the database."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpo.dashboard.attributes import CHECKPOINT, CURVES, derived_name
from hpo.paths import LOG_FILE, link_or_copy, study_id_of
from storage.copying import SystemAttr

_NOTE = re.compile(r"dashboard:(?P<trial>\d+):(?P<rest>note_(?:ver|str:\d+))")
_ARTIFACT = re.compile(r"(?:artifacts|dashboard:artifacts:(?P<trial>\d+)):(?P<id>[0-9a-fA-F-]+)")


class DashboardCopy:
    """Translates the dashboard's attributes of a study for its copy, and copies the files of its artifacts.

    Args:
        folder: of the artifacts.
        unique_name: of the study.
        new_unique_name: of the copy.

    Attributes:
        missing: how many artifacts have no file in the folder: they may be on another machine. The copy does not have them.
    """

    def __init__(self, folder: Path, unique_name: str, new_unique_name: str) -> None:
        self.missing = 0
        self._folder = folder
        self._unique_name = unique_name
        self._new_unique_name = new_unique_name

    def translate(self, attr: SystemAttr, trial_ids: Mapping[int, int]) -> SystemAttr | None:
        """Return an attribute of the copy, see `storage.copying.Translate`.

        Raises:
            OSError: the file of an artifact cannot be copied.
        """
        if (note := _NOTE.fullmatch(attr.key)) and int(note["trial"]) in trial_ids:
            return SystemAttr(f"dashboard:{trial_ids[int(note['trial'])]}:{note['rest']}", attr.value)
        artifact = _ARTIFACT.fullmatch(attr.key)
        if artifact is None:
            return attr
        owner = int(artifact["trial"]) if artifact["trial"] else None
        if owner is not None and owner not in trial_ids:
            return attr
        old, trial_id = artifact["id"], None if owner is None else trial_ids[owner]
        new = self._new_id(old, owner, trial_id)
        key = f"artifacts:{new}" if trial_id is None else f"dashboard:artifacts:{trial_id}:{new}"
        metadata = _read_metadata(attr.value)
        if metadata is None:  # the user has deleted it: it is not published again
            return SystemAttr(key, attr.value)
        file = self._folder / old
        if file.is_symlink() or not file.is_file():
            self.missing += 1
            return None
        link_or_copy(file, self._folder / new)
        return SystemAttr(key, json.dumps(json.dumps({**metadata, "artifact_id": new})))

    def _new_id(self, old: str, owner: int | None, trial_id: int | None) -> str:
        """Return the id of an artifact of the copy: for what hpo publishes, the one under which it does so again."""
        known, identity = study_id_of(self._unique_name), study_id_of(self._new_unique_name)
        for what in (CURVES, LOG_FILE, CHECKPOINT):
            name = derived_name(self._unique_name, owner, what)
            if old in {name, f"{known}-{name}"}:
                return f"{identity}-{derived_name(self._new_unique_name, trial_id, what)}"
        return f"{identity}-{derived_name(self._new_unique_name, trial_id, old)}"


def _read_metadata(value: str) -> dict[str, Any] | None:
    """Return an artifact's metadata; None if it was deleted, or if another program has made something else of it."""
    with suppress(ValueError, TypeError):
        metadata = json.loads(json.loads(value))
        return metadata if isinstance(metadata, dict) else None
    return None
