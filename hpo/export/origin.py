"""Where a result was trained that a study has from an earlier one: that study has the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpo.errors import SettingError, TrainedElsewhereError
from storage.errors import MissingDatabaseError, StorageError
from storage.imports import Origin, TakenOver, read_sources

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from storage.database import Database
    from storage.study import Study

MAX_LISTED = 20  # trials in one message


def refuse_taken_over(study: Study, trial: FrozenTrial, password: str | None) -> None:
    """Raise an error for a trial that its study did not train.

    The study that did is looked for by its `hpo:id`, so it is found under its present name: first in the same database, then
    in those that trials were taken over from. They are only read.

    Args:
        study: the study of the trial.
        trial: the trial.
        password: the PostgreSQL password of other databases.

    Raises:
        TrainedElsewhereError: another study trained it.
        SettingError: that study is not found.
        StorageError: the study's own database cannot be used.
    """
    origin = Origin.of(trial.user_attrs)
    if origin is None:
        return
    if name := _find(study.database, origin):
        raise TrainedElsewhereError(_describe(trial, origin, name), name, origin.number)
    looked_at = [study.database.url]
    for url in dict.fromkeys(each.storage for each in map(TakenOver.read, read_sources(study.attrs)) if each.storage):
        try:
            name = _look_into(url, origin, password)
        except StorageError as error:
            is_missing = isinstance(error, MissingDatabaseError)
            looked_at.append(f"{url} ({'which does not exist' if is_missing else f'which cannot be read: {error}'})")
            continue
        if name:
            raise TrainedElsewhereError(_describe(trial, origin, f"{name} in {url}"), name, origin.number, url)
        looked_at.append(url)
    complete = [trial for trial in study.trained_trials() if trial.state.name == "COMPLETE"]
    own = [each for each in complete if Origin.of(each.user_attrs) is None]
    raise SettingError(
        f"trial {trial.number} was trained as trial {origin.number} of study {origin.study}, which had its checkpoint, and "
        f"is not in {' or '.join(looked_at)} any more. COMPLETE trials that {study.reference} trained itself: "
        f"{list_numbers(own)}"
    )


def list_numbers(trials: Sequence[FrozenTrial]) -> str:
    """Return the numbers of some trials for a message, at most `MAX_LISTED`."""
    numbers = ", ".join(str(trial.number) for trial in trials[:MAX_LISTED])
    return f"{numbers}, ..." if len(trials) > MAX_LISTED else numbers or "none"


def _describe(trial: FrozenTrial, origin: Origin, where: str) -> str:
    return f"trial {trial.number} was trained as trial {origin.number} of study {where}, which has its checkpoint"


def _find(database: Database, origin: Origin) -> str:
    """Return what names the study in a database; empty if it is not there."""
    from storage.studies import all_studies

    return next((each.reference for each in all_studies(database) if each.identity == origin.identity), "")


def _look_into(url: str, origin: Origin, password: str | None) -> str:
    from storage.database import open_for_reading

    database = open_for_reading(url, password)
    if database is None:
        return ""
    with database:
        return _find(database, origin)
