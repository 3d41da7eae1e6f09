"""Tells the recipient of `on_finish` how a search has ended: as a command's input, or as JSON that is sent to a URL."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hpo.errors import HpoError, exit_code_of, is_fixable, printable, was_interrupted
from hpo.search.listener import NullListener, ProgressListener
from hpo.search.stop import EXIT_CODES, Stop, StopCause
from hpo.space.recipient import Recipient, show_recipient

if TYPE_CHECKING:
    from hpo.report.results import Results
    from hpo.report.trials import TrialResult
    from hpo.space.model import Space

ANNOUNCED = "hpo:announced"  # system attribute of a study: the last end that one driver announced for all

_FAILED = {StopCause.BROKEN, StopCause.STORAGE_FAILED}
_OF_ONE_DRIVER = {StopCause.INTERRUPTED, StopCause.EXIT_TIME, *_FAILED}


class Announcer(NullListener):
    """Announces how a search has ended, at most once. Use it as a context manager: it announces an exception, too.

    It is a listener, from which it knows the study.

    Args:
        recipient: who is notified; None for nobody.
        space: the search.
        storage: the URL of the database.
        listener: receives a note if the recipient was not notified.
    """

    def __init__(self, recipient: Recipient | None, space: Space, storage: str, listener: ProgressListener) -> None:
        self._recipient = recipient
        self._study = space.name
        self._storage = storage
        self._listener = listener

    def __enter__(self) -> Announcer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._announce(lambda: describe_error(self._study, self._storage, error))

    def study_opened(
        self, space: Space, study_name: str, storage_url: str, counts: Mapping[str, int], left: int | None
    ) -> None:
        """Keep what names the study."""
        self._study, self._storage = study_name, storage_url

    def search_ended(self, results: Results, stopped: Stop | None, exit_code: int, report: Path | None) -> None:
        """Announce the end of a search, unless another driver of the study has done so; see `describe_end`."""

        def describe() -> dict[str, Any] | None:
            if not is_to_be_announced(results, stopped):
                return None
            return describe_end(results, stopped, exit_code, report)

        self._announce(describe)

    def search_lost(self, text: str, exit_code: int) -> None:
        """Announce that this process ends at once."""
        error = KeyboardInterrupt() if exit_code == EXIT_CODES[StopCause.INTERRUPTED] else HpoError(text)
        ending = describe_error(self._study, self._storage, error) | {"exit_code": exit_code}
        self._announce(lambda: ending)

    def _announce(self, describe: Callable[[], dict[str, Any] | None]) -> None:
        recipient, self._recipient = self._recipient, None
        if recipient is None:
            return
        from hpo.delivery import deliver

        try:
            ending = describe()
            problem = "" if ending is None else deliver(recipient, ending)
        except KeyboardInterrupt:
            problem = "interrupted"
        except Exception as error:  # noqa: BLE001 # an error here does not change how the search has ended
            problem = type(error).__name__
        if problem:
            text = f"on_finish: {show_recipient(recipient)}: {printable(problem)}. The search itself is not affected"
            self._listener.note(text)


def describe_end(results: Results, stopped: Stop | None, exit_code: int, report: Path | None) -> dict[str, Any]:
    """Return what the recipient of `on_finish` gets about a search that has ended with results.

    Args:
        results: every trial of the study.
        stopped: why the search ended before its work was done; None if it was done.
        exit_code: of the command line.
        report: the HTML file; None if it could not be written.
    """
    state = "finished" if stopped is None else "failed" if stopped.cause in _FAILED else "stopped"
    name, storage = results.study.name, results.study.database.url
    best = None if results.best is None else _describe_trial(results, results.best)
    counts = {name: count for name, count in sorted(results.counts.items()) if count}
    return _describe(name, storage, state, "" if stopped is None else str(stopped), exit_code) | {
        "study_state": results.state,
        "trials": counts,
        "best": best,
        "device_hours": results.device_seconds / 3600,
        "report": None if report is None else str(report.resolve()),
        "text": _summarize(name, state, stopped, counts, best),
    }


def describe_error(name: str, storage: str, error: BaseException) -> dict[str, Any]:
    """Return what the recipient of `on_finish` gets about a search that an exception ended. Its trials are not read.

    Args:
        name: of the study, as far as it is known.
        storage: the URL of the database. It may contain a password.
        error: the exception. The text of one that hpo does not foresee is left out: it may quote anything.
    """
    from storage.errors import StorageError
    from storage.urls import without_password

    shown = ""
    with suppress(StorageError):  # it may be the error
        shown = without_password(storage)
    interrupted = isinstance(error, KeyboardInterrupt) or was_interrupted(error)
    state = "stopped" if interrupted else "failed"
    cause = "interrupted" if interrupted else str(error) if is_fixable(error) else type(error).__name__
    unknown = dict.fromkeys(("study_state", "trials", "best", "device_hours", "report"))
    return _describe(name, shown, state, cause, exit_code_of(error)) | unknown | {"text": f"{name} {state}: {cause}"}


def _describe(name: str, storage: str, state: str, cause: str, exit_code: int) -> dict[str, Any]:
    study, _, revision = name.partition("@")
    return {
        "study": study,
        "revision": int(revision) if revision.isdecimal() else 1,
        "storage": storage.replace(":***@", "@"),  # where messages show that there is a password
        "state": state,
        "cause": cause,
        "exit_code": exit_code,
        "host": socket.gethostname(),
    }


def _describe_trial(results: Results, trial: TrialResult) -> dict[str, Any]:
    values = [value if math.isfinite(value) else None for value in trial.values]  # JSON has no other numbers
    metrics = [metric for metric, _ in results.objectives]
    params = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in trial.params.items()
    }
    return {
        "trial": trial.number,
        "value": values[0],
        "values": dict(zip(metrics, values, strict=False)),
        "params": params,
    }


def _summarize(
    name: str, state: str, stopped: Stop | None, counts: Mapping[str, int], best: Mapping[str, Any] | None
) -> str:
    """Return one line, which chat services show."""
    parts = [", ".join(f"{count} {each}" for each, count in counts.items()) or "no trials"]
    if best is not None:
        values = ", ".join(f"{metric} {value}" for metric, value in best["values"].items())
        parts.insert(0, f"best {values} (trial {best['trial']})")
    return f"{name} {state}: {'; '.join([*([] if stopped is None else [str(stopped)]), *parts])}"


def is_to_be_announced(results: Results, stopped: Stop | None) -> bool:
    """Return whether this driver announces the end of a search: of one that several share, the first one does so.

    An end that is a driver's own, such as Ctrl-C, is announced by each.
    """
    if stopped is not None and stopped.cause in _OF_ONE_DRIVER:
        return True
    if stopped is None or stopped.cause is StopCause.NO_IMPROVEMENT:  # no trial was running
        ended = [trial.completed for trial in results.trials if trial.completed is not None]
        name = "finished" if stopped is None else stopped.cause.name
        end = f"{name}: {len(ended)} {max(ended).isoformat() if ended else ''}"
    else:  # the same budget ends a search once; trials in flight may end after it
        budget = None if results.space is None else results.space.budget.model_dump(mode="json")
        end = f"{stopped.cause.name}: {json.dumps(budget)}"
    from storage.errors import StorageError

    try:
        return results.study.is_first(ANNOUNCED, end)
    except StorageError:  # notified twice is better than not at all
        return True
