"""Opening and finding studies. A `storage.run.Run` writes their trials."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from storage import optuna_tables, tables
from storage.database import Database
from storage.errors import StorageError, retry_while_down
from storage.ownership import StudyDeletedError
from storage.pareto import Direction
from storage.revisions import FIRST, is_revision, number_of, references, revisions_of
from storage.study import TOTAL, Study, identity_of, is_identity, load_study, metric_names, study_names


def deleted_studies(database: Database) -> set[str]:
    """Return the `hpo:id` of each study that was deleted from this database. What no study can have is left out."""

    def read() -> set[str]:
        with database.engine.connect() as connection:
            found = connection.scalars(sa.select(tables.deleted_studies.c.id))
            return {each for each in found if is_identity(each)}

    return retry_while_down(database, read)


def all_studies(database: Database) -> list[Study]:
    """Return every revision of every study, oldest first."""
    return [study for name in study_names(database) if (study := load_study(database, name)) is not None]


def find_study(database: Database, name: str) -> Study | None:
    """Return the study with this name, or None.

    A name without a revision means the latest one. `NAME@1` means the first one, unless another program has given a study
    this very name.
    """
    if "@" in name:
        names, first = study_names(database), name.removesuffix(FIRST)
        found = name if name in names or "@" in first else first
        return load_study(database, found) if found in names else None
    revisions = revisions_of(study_names(database), name)
    return load_study(database, revisions[-1]) if revisions else None


def renamed_from(database: Database, name: str) -> list[str]:
    """Return what names the studies that had this name before they were renamed first, oldest first.

    Args:
        database: the database.
        name: a name that no study has. Without a revision, it means all revisions; `NAME@1` means the first one.
    """
    is_any, first = "@" not in name, name.removesuffix(FIRST)
    renamed = [study for study in all_studies(database) if study.first_name]
    found = [
        each for each in renamed if each.first_name in {name, first} or (is_any and is_revision(each.first_name, name))
    ]
    known = references(study_names(database))
    return [known.get(each.name, each.name) for each in found]


def find_revision(database: Database, name: str, fingerprint: str) -> Study | None:
    """Return the revision of a study that has this fingerprint, or None.

    Args:
        database: the database to search.
        name: the study's name, without a revision.
        fingerprint: the identity of the search.

    Raises:
        StorageError: a study of another program has the name.
    """
    for revision in revisions_of(study_names(database), name):
        study = load_study(database, revision)
        if study is None:
            continue
        found = study.attrs.get("hpo:fingerprint")
        if found is None and study.trials():
            raise StorageError(
                f"the study {revision!r} in {database.url} was created by another program; rename the search space, or "
                "name another database with --storage"
            )
        if found in {None, fingerprint}:
            return study
    return None


def other_revisions(database: Database, name: str, study: Study | None) -> list[Study]:
    """Return the other revisions of a study that hpo created, newest first.

    Args:
        database: the database.
        name: the study's name, without a revision.
        study: the study; None for one that does not exist yet.
    """
    names = [each for each in revisions_of(study_names(database), name) if study is None or each != study.name]
    loaded = [load_study(database, each) for each in reversed(names)]
    return [each for each in loaded if each is not None and each.is_ours]


def open_study(
    database: Database,
    name: str,
    *,
    direction: Direction | Sequence[Direction],
    fingerprint: str,
    settings: Mapping[str, Any],
    total_trials: int | None = None,
) -> Study:
    """Return the revision of a study that has this fingerprint; create it if there is none.

    Args:
        database: the database of the study.
        name: the first revision's name, without `@`; later ones are `name@2`, `name@3`, ...
        direction: maximize or minimize; of several objectives, one each.
        fingerprint: the identity of the search. Studies of different fingerprints never share trials.
        settings: plain values to store with the study. They replace those of an earlier opening.
        total_trials: after how many ended trials the study is finished; None if only time ends it.

    Raises:
        StorageError: a study of another program has the name, or the database cannot be used.
    """
    directions = [direction] if isinstance(direction, str) else list(direction)
    if "@" in name:
        raise StorageError(f"a study cannot be named {name!r}: what follows @ is the number of a revision")

    # The budget, for example, may have changed since the study was last opened.
    attrs = {"hpo:settings": dict(settings), TOTAL: total_trials}

    def open_or_create() -> Study | None:
        # First: a study that appears after it makes the insertion fail.
        revisions = revisions_of(study_names(database), name)
        study = find_revision(database, name, fingerprint)
        if study is None:
            return _create(database, name, revisions, directions, fingerprint, attrs)
        return _update(study, directions, fingerprint, attrs)

    def unless_overtaken() -> Study | None:
        try:
            return open_or_create()
        except (IntegrityError, StudyDeletedError):  # another process has created the same revision, or deleted it
            return None

    while True:
        opened = retry_while_down(database, unless_overtaken)
        if opened is not None:
            return opened


def _create(
    database: Database,
    name: str,
    revisions: Sequence[str],
    directions: Sequence[Direction],
    fingerprint: str,
    attrs: Mapping[str, Any],
) -> Study | None:
    """Create the next revision of a study; return None if another process has changed them meanwhile."""
    revision = f"{name}@{number_of(revisions[-1]) + 1}" if revisions else name
    identity = _new_identity(fingerprint)
    with database.transaction() as connection:
        fingerprints = optuna_tables.read_study_attr(connection, "hpo:fingerprint")
        found = {each: value for each, value in fingerprints.items() if is_revision(each, name)}
        if set(found) != set(revisions) or fingerprint in found.values() or None in found.values():
            return None
        created = optuna_tables.insert_study(connection, revision, directions)
        optuna_tables.write_study_attrs(connection, created, attrs)
        _write_identity(connection, created, identity, attrs)
    study = load_study(database, revision)
    return study if study is not None and study.identity == identity["hpo:id"] else None


def _update(study: Study, directions: Sequence[Direction], fingerprint: str, attrs: Mapping[str, Any]) -> Study | None:
    """Store what has changed in the attributes of a study; return None if it is another study by now."""
    database, known = study.database, study.attrs
    if "hpo:id" in known and identity_of(known) is None:
        raise StorageError(
            f"the study {study.name!r} in {database.url} has an attribute hpo:id that hpo did not write, so its files "
            "cannot be distinguished from those of other studies: rename the search space, or delete the study"
        )
    if "hpo:fingerprint" not in known:
        _check_directions(study, directions)
    changed = {attr: value for attr, value in attrs.items() if attr not in known or known[attr] != value}
    identity = {attr: value for attr, value in _new_identity(fingerprint).items() if attr not in known}
    if study.identity != known.get("hpo:id") or known.get("hpo:fingerprint", fingerprint) != fingerprint:
        return None  # another process has opened it first, or another study has its id now
    if not changed and not identity:
        return study
    with database.transaction() as connection:
        if not optuna_tables.lock_study(connection, study.key):
            return None
        optuna_tables.write_study_attrs(connection, study.study_id, changed)
        if identity:
            _write_identity(connection, study.study_id, identity, attrs)
    return replace(study, identity=identity.get("hpo:id", study.identity))


def _new_identity(fingerprint: str) -> dict[str, str]:
    return {"hpo:id": uuid.uuid4().hex[:12], "hpo:fingerprint": fingerprint}


def _write_identity(
    connection: sa.Connection, study_id: int, identity: Mapping[str, str], attrs: Mapping[str, Any]
) -> None:
    optuna_tables.insert_study_attrs(connection, study_id, identity)
    # optuna-dashboard labels the axes of its plots with it.
    labels = {"study:metric_names": metric_names(attrs["hpo:settings"])}
    optuna_tables.write_study_system_attrs(connection, study_id, labels)


def _check_directions(study: Study, directions: Sequence[str]) -> None:
    """Raise StorageError if another program created a study with other directions, such as the dashboard's default."""
    found, wanted = [each.name.lower() for each in study.optuna_study.directions], " and ".join(directions)
    if found != directions:
        raise StorageError(
            f"the study {study.name!r} in {study.database.url} was created by another program, to {' and '.join(found)}, "
            f"but the search space says {wanted}: delete the study, which has no trials, or rename the search space"
        )
