"""The Python API: one function for each verb of the command line that works on a study or a search.

    from hpo import load_space, run_search

    result = run_search(load_space("quick"), storage="sqlite:///runs/hpo.db")
    print(result.best.params, result.best.values)

Every function raises `HpoError` or `storage.errors.StorageError` for what the caller can change: a wrong name, a missing
file, an unreachable database. Storage URLs are SQLAlchemy URLs: `sqlite:///runs/hpo.db`, `postgresql://user@host:5432/name`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.bucket import locate
from hpo.errors import SettingError
from hpo.paths import DEFAULT_STORAGE, RunsDir
from hpo.planning import PlannedSearch, plan_search
from hpo.search.environment import describe_environment
from hpo.service import SearchResult, run_search
from hpo.studies.management import (
    CopiedStudy,
    DeletedStudy,
    compare_studies,
    copy_study,
    delete_study,
    opened_study,
    rename_study,
    require_ours,
    write_comparison,
)

if TYPE_CHECKING:
    from hpo.export.exporting import ExportedModel
    from hpo.report.results import Results
    from hpo.studies.cleaning import Cleaning
    from storage.summaries import Summary

__all__ = [
    "CopiedStudy",
    "DeletedStudy",
    "PlannedSearch",
    "SearchResult",
    "clean_runs",
    "compare_studies",
    "copy_study",
    "delete_study",
    "export_model",
    "list_studies",
    "migrate_database",
    "plan_search",
    "read_results",
    "rename_study",
    "replay_trial",
    "retry_trials",
    "run_search",
    "serve_dashboard",
    "write_comparison",
    "write_report",
]


def list_studies(
    *,
    storage: str = DEFAULT_STORAGE,
    password: str | None = None,
    runs_dir: Path | str = "runs",
    checkpoints: Path | str | None = None,
) -> list[Summary]:
    """Return a summary of each study in a database, oldest first, without reading its trials.

    Args:
        storage: the database. It is only read: not created, migrated or changed.
        password: the PostgreSQL password, used if the URL has none.
        runs_dir: the folder with the checkpoints, for the size of each study's files.
        checkpoints: the folder with the checkpoints, if it is another one. The size is that on this machine.

    Returns:
        One summary per study.

    Raises:
        StorageError: there is no such database, or it cannot be used.
    """
    from hpo.search.earlier.continuation import lacks_points
    from hpo.studies.folders import count_bytes
    from storage.database import open_for_reading
    from storage.ownership import StudyDeletedError
    from storage.studies import find_study
    from storage.summaries import summarize

    runs = replace(locate(runs_dir, checkpoints), bucket_url="")
    with open_for_reading(storage, password) or nullcontext() as database:
        summaries = [] if database is None else summarize(database)
        for index, each in enumerate(summaries):
            study = find_study(database, each.name) if database is not None and each.state == "finished" else None
            with suppress(StudyDeletedError):  # meanwhile
                if study is not None and lacks_points(study, runs):
                    summaries[index] = replace(each, state="resumable")
    return [
        replace(each, disk_bytes=count_bytes(runs.checkpoints(each.unique_name))) if each.unique_name else each
        for each in summaries
    ]


def migrate_database(*, storage: str = DEFAULT_STORAGE, password: str | None = None) -> None:
    """Create the tables of a database, or migrate those of an older version, as every function that writes does.

    Args:
        storage: the database; it is created if it does not exist.
        password: the PostgreSQL password, used if the URL has none.

    Raises:
        StorageError: the database cannot be used.
    """
    from storage.database import open_database

    open_database(storage, password).close()


def clean_runs(
    *,
    storage: str = DEFAULT_STORAGE,
    password: str | None = None,
    runs_dir: Path | str = "runs",
    checkpoints: Path | str | None = None,
    delete: bool = False,
) -> Cleaning:
    """Find files that no search needs any more: checkpoints, files of deleted studies, damaged files, leftovers.

    Args:
        storage: the database; it is not created. Files of studies that it does not know are kept.
        password: the PostgreSQL password, used if the URL has none.
        runs_dir: the folder to clean.
        checkpoints: where checkpoints are: a folder, or a URL in a bucket, see `hpo.bucket.locate`; None for `runs_dir`.
        delete: whether to delete them.

    Returns:
        What can be deleted, or was; what is kept, and why.

    Raises:
        SettingError: the URL of the bucket cannot be used.
        StorageError: there is no such database, or it cannot be used.
    """
    from hpo.studies.cleaning import delete_garbage, find_garbage
    from storage.database import open_existing

    with open_existing(storage, password) as database:
        found = find_garbage(database, locate(runs_dir, checkpoints))
    return delete_garbage(found) if delete else found


def read_results(study: str, *, storage: str = DEFAULT_STORAGE, password: str | None = None) -> Results:
    """Read a study: all trials, every metric of every epoch.

    Args:
        study: its name; without a revision (`@1`, `@2`, ...), the latest revision.
        storage: the database; it is not created.
        password: the PostgreSQL password, used if the URL has none.

    Returns:
        The study as plain data.

    Raises:
        SettingError: there is no such study; the message suggests the nearest name.
        StorageError: the database cannot be used.
    """
    from hpo.report import reading

    with opened_study(study, storage, password) as opened:
        return reading.read_results(opened)


def write_report(results: Results, *, runs_dir: Path | str = "runs") -> Path:
    """Write a study's report: one HTML file that needs no network, and a Markdown file with PNG figures.

    Args:
        results: the study, with its epochs.
        runs_dir: the report is written to a folder below it. An earlier report is replaced.

    Returns:
        The path of the HTML file.

    Raises:
        SettingError: the folder cannot be written.
    """
    from hpo.report.page import write_report

    with results.study.database:  # it reads more of the study
        return write_report(results, RunsDir(Path(runs_dir)))


def retry_trials(
    study: str,
    numbers: Collection[int] = (),
    *,
    resume: bool = False,
    storage: str = DEFAULT_STORAGE,
    password: str | None = None,
) -> list[int]:
    """Let failed trials run again: the next search of the study restarts them from the first epoch.

    Args:
        study: the study's name, as for `read_results`.
        numbers: the trials; empty for all that failed.
        resume: whether they resume from their last checkpoint. Otherwise their stored epochs are deleted.
        storage: the database; it is not created.
        password: the PostgreSQL password, used if the URL has none.

    Returns:
        The numbers of the trials that wait now, ascending; empty if none has failed.

    Raises:
        SettingError: the study does not exist, or one of the trials has not failed.
        StorageError: the database cannot be used.
    """
    from storage import retry

    with opened_study(study, storage, password, is_written=True) as opened:
        require_ours(opened)
        failed = retry.failed_trials(opened)
        for number in sorted(numbers):
            if number not in failed:
                listed = ", ".join(map(str, failed)) or "none"
                raise SettingError(f"trial {number} of study {opened.name} has not failed; failed trials: {listed}")
        return retry.retry_trials(opened, set(numbers) or failed, resume=resume)


def replay_trial(
    study: str,
    number: int,
    *,
    storage: str = DEFAULT_STORAGE,
    password: str | None = None,
    data_dir: Path | str = "data",
    show: Callable[[str], None] = lambda _: None,
    run_stored_code: bool = False,
) -> bool:
    """Run a trial again as it was recorded, and compare every metric of every epoch.

    Args:
        study: the study's name, as for `read_results`.
        number: the trial's number.
        storage: the database; it is not created.
        password: the PostgreSQL password, used if the URL has none.
        data_dir: where the data sets are stored.
        show: receives one line per epoch, and one per version that differs.
        run_stored_code: whether to run a command, or a trainable from outside of hpo, that only the database names.

    Returns:
        Whether every metric is equal to the last digit.

    Raises:
        SettingError: the study or trial does not exist, its code must be confirmed, or the trial fails this time.
        SpaceError: this version of hpo cannot read the settings of the study.
        StorageError: the database cannot be used.
    """
    from hpo.search.replay import check_stored_code, read_trial, replay

    with opened_study(study, storage, password) as opened:
        require_ours(opened)
        trial = read_trial(opened, number)
    if not run_stored_code:
        check_stored_code(trial)
    return replay(trial, show, data_dir=Path(data_dir).resolve(), environment=describe_environment())


def export_model(
    study: str,
    number: int | None = None,
    *,
    storage: str = DEFAULT_STORAGE,
    password: str | None = None,
    data_dir: Path | str = "data",
    runs_dir: Path | str = "runs",
    checkpoints: Path | str | None = None,
    output: Path | None = None,
) -> ExportedModel:
    """Write a trial's model as files that load without this project.

    Args:
        study: the study's name, as for `read_results`.
        number: the trial; None for the best one.
        storage: the database; it is not created.
        password: the PostgreSQL password, used if the URL has none.
        data_dir: where the data sets are stored: the model is scored again.
        runs_dir: where the checkpoints are stored.
        checkpoints: where checkpoints are: a folder, or a URL in a bucket, see `hpo.bucket.locate`; None for `runs_dir`.
        output: the folder to write; None for one under `runs_dir`. An earlier export there is replaced.

    Returns:
        The folder, and remarks on differences from what storage holds.

    Raises:
        TrainedElsewhereError: another study trained it, and has its checkpoint.
        SettingError: the study or trial does not exist, its checkpoint is not on this machine, or the output folder
            contains other files or cannot be written.
        SpaceError: this version of hpo cannot read the settings of the study.
        DataError: the data set is not there and cannot be downloaded.
        StorageError: the database cannot be used.
    """
    with opened_study(study, storage, password) as opened:
        from hpo.export import exporting

        return exporting.export_model(
            opened,
            number,
            runs_dir=locate(Path(runs_dir).resolve(), checkpoints),
            data_dir=Path(data_dir).resolve(),
            output=output,
            versions=describe_environment(),
            password=password,
        )


def serve_dashboard(
    *,
    storage: str = DEFAULT_STORAGE,
    password: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    dashboard_password: str | None = None,
    reader_password: str | None = None,
    read_only: bool = False,
    certfile: Path | None = None,
    keyfile: Path | None = None,
    runs_dir: Path | str = "runs",
    checkpoints: Path | str | None = None,
) -> None:
    """Serve optuna-dashboard until interrupted.

    Args:
        storage: the database; it is created if it does not exist.
        password: the PostgreSQL password, used if the URL has none.
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one.
        dashboard_password: required by HTTP Basic authentication. Without one, the printed link contains a new token, and
            only loopback addresses are allowed.
        reader_password: of those who may look at everything and change nothing.
        read_only: whether all changes are refused.
        certfile: a certificate for HTTPS, in PEM format; None serves plain HTTP.
        keyfile: its private key, in PEM format; None if `certfile` contains it.
        runs_dir: where artifacts and checkpoints are stored.
        checkpoints: the folder with the checkpoints, if it is another one. Those in a bucket are not offered.

    Raises:
        SettingError: other machines can reach the address and there is no password, the address cannot be listened on, or
            the certificate cannot be used.
        StorageError: the database cannot be used.
    """
    from hpo.dashboard.access import Access
    from hpo.dashboard.server import Certificate, serve
    from storage.database import open_database

    certificate = None if certfile is None else Certificate(certfile, keyfile)
    access = Access(dashboard_password, reader_password, read_only=read_only)
    with open_database(storage, password) as database:
        runs = locate(runs_dir, checkpoints).make()
        serve(database, host, port, access=access, runs_dir=runs, certificate=certificate)
