"""What to do if an earlier study that a search names in `warm_start` does not exist."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.errors import HpoError, SettingError, nearest
from hpo.space.model import SPACES_DIR, Space, load_space
from hpo.space.sections import Source

if TYPE_CHECKING:
    from storage.database import Database


def missing_source(space: Space, source: Source, database: Database | None) -> SettingError:
    """Return the error for a source that is not in its database.

    Args:
        space: the search.
        source: of the search.
        database: of the source; None if it does not exist yet, or has no tables.
    """
    name = source.study
    if database is None and source.storage is not None:
        text = f"warm_start: there is no study {name!r} in its storage, which is empty"
    elif database is None:
        text = f"warm_start: there is no study {name!r}: the database does not exist yet"
    else:
        from storage.studies import renamed_from
        from storage.study import study_names

        known, text = study_names(database), f"warm_start: there is no study {name!r} in {database.url}: "
        if renamed := renamed_from(database, name):
            return SettingError(f"{text}it was renamed to {' or '.join(renamed)}: name that in warm_start")
        text += nearest(name, known) if known else "it has none"
    return SettingError(text if source.storage is not None else text + _remedy(space, name))


def _remedy(space: Space, name: str) -> str:
    """Return what trains the study; nothing without a search space of this name next to that of the search."""
    folder = SPACES_DIR if space.file is None else space.file.parent
    path = folder / f"{name}.yaml"
    if not path.is_file():
        return ""
    cycle = _find_cycle(space.name, name, folder)
    if cycle:
        names = " -> ".join([space.name, *cycle])
        return f". Neither can start: the files learn from each other ({names}). Start one with --set 'warm_start=[]'"
    command = name if folder == SPACES_DIR else str(path)
    return f". `hpo run {shlex.quote(command)}` trains it; --set 'warm_start=[]' searches without it"


def _find_cycle(start: str, name: str, folder: Path, seen: tuple[str, ...] = ()) -> list[str]:
    """Return the names from one that is learned from back to `start`, by the files in a folder; none if there is no way."""
    if name == start:
        return [name]
    if name in seen:
        return []
    try:
        sources = load_space(str(folder / f"{name}.yaml")).warm_start
    except HpoError:  # it has no file, or a wrong one
        return []
    for source in sources:
        rest = [] if source.storage is not None else _find_cycle(start, source.study, folder, (*seen, name))
        if rest:
            return [name, *rest]
    return []
