"""Renaming and deleting a study: each is one transaction, and refused while a run works on the study."""

from __future__ import annotations

import json
from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from storage import optuna_tables, records, tables
from storage.copying import gone, has_study, name_taken, renamed
from storage.errors import StorageError, retry_while_down
from storage.lease import is_run_alive
from storage.study import FILES, Study, describe_counts

_OF_TRIAL = (
    optuna_tables.trial_params,
    optuna_tables.trial_values,
    optuna_tables.intermediate_values,
    optuna_tables.trial_user_attributes,
    optuna_tables.trial_system_attributes,
    optuna_tables.metadata.tables["trial_heartbeats"],
)
_OF_STUDY = (
    optuna_tables.trials,
    optuna_tables.study_directions,
    optuna_tables.study_user_attributes,
    optuna_tables.study_system_attributes,
    optuna_tables.studies,
)


class StudyRunningError(StorageError):
    """Runs work on the study."""


class StudyChangedError(StorageError):
    """The study has other trials than when it was looked at."""


def rename_study(study: Study, name: str) -> None:
    """Give a study another name. It becomes a first revision; its `hpo:id` stays, and so do its files. Idempotent.

    Args:
        study: the study.
        name: the new name, without `@`.

    Raises:
        NameTakenError: the database has a study, or a revision of one, with this name.
        StudyRunningError: runs work on the study.
        StorageError: the study was deleted or renamed, or the database cannot be used (after retries).
    """

    def write() -> None:
        with study.database.transaction() as connection:
            if has_study(connection, study.database, name, study.identity):  # the answer was lost
                return
            if not optuna_tables.lock_study(connection, study.key):
                raise gone(study)
            _refuse_if_running(study)
            table, attr = optuna_tables.studies, optuna_tables.study_user_attributes
            is_study = table.c.study_id == study.study_id
            try:
                connection.execute(table.update().where(is_study).values(study_name=name))
            except IntegrityError:  # another process has created it just now
                raise name_taken(study.database.url, name) from None
            rows = connection.execute(sa.select(attr.c.key, attr.c.value_json).where(attr.c.study_id == study.study_id))
            attrs = {key: json.loads(value) for key, value in rows}
            files = {FILES: study.first_name or study.name}
            optuna_tables.write_study_attrs(connection, study.study_id, renamed(attrs, name) | files)

    retry_while_down(study.database, write)


def delete_study(study: Study, counts: Mapping[str, int] | None = None) -> None:
    """Delete a study with all of its trials: all rows, or none. Idempotent. Its `hpo:id` is kept in `hpo_deleted_studies`.

    Args:
        study: the study.
        counts: {state: number of trials} that the study must still have, see `Study.counts`; None if it may have any.

    Raises:
        StudyRunningError: runs work on the study.
        StudyChangedError: it has other trials.
        StorageError: the study was renamed, or the database cannot be used (after retries).
    """

    def write() -> None:
        with study.database.transaction() as connection:
            if not optuna_tables.lock_study(connection, study.key):
                if study.identity in connection.scalars(sa.select(tables.deleted_studies.c.id)).all():
                    return
                raise gone(study)
            _refuse_if_running(study)
            if counts is not None and (now := study.counts()) != counts:
                raise StudyChangedError(
                    f"{study.database.url}: nothing is deleted: the study {study.name!r} has other trials now "
                    f"({describe_counts(now)}) than when its deletion was confirmed ({describe_counts(counts)})"
                )
            trial = optuna_tables.trials
            ids = sa.select(trial.c.trial_id).where(trial.c.study_id == study.study_id)
            for table in _OF_TRIAL:
                connection.execute(table.delete().where(table.c.trial_id.in_(ids)))
            for table in _OF_STUDY:  # triggers delete the rows of our tables
                connection.execute(table.delete().where(table.c.study_id == study.study_id))

    retry_while_down(study.database, write)


def _refuse_if_running(study: Study) -> None:
    """Raise StudyRunningError if a run works on a study. The study is locked: no run can start meanwhile."""
    alive = [run for run in records.read_runs(study.database, study.study_id) if is_run_alive(run)]
    if alive:
        listed = ", ".join(f"process {run.pid} on {run.host.partition('/')[0]}" for run in alive)
        raise StudyRunningError(
            f"{study.database.url}: the study {study.name!r} is running ({listed}): stop the search first, with Ctrl-C. One "
            "that does not answer any more counts as running for a minute"
        )
