"""What a user is notified of before and while a search runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from hpo.errors import SpaceError
from hpo.search.listener import ProgressListener
from hpo.space.model import Space

if TYPE_CHECKING:
    from hpo.search.earlier.continuation import ContinuationPlan
    from hpo.search.earlier.warm_start import Found
    from storage.study import Study


def note_sources(
    found: Sequence[Found], continuation: ContinuationPlan, known: Collection[str], listener: ProgressListener
) -> None:
    """Say what is taken over from earlier studies, and what is continued.

    Each source that the search space names is listed. Of several revisions, some may have nothing that others do not have.
    Of one whose trials are continued, it is not said that their results are left out.

    Args:
        found: what is taken over.
        continuation: what is continued.
        known: keys of the configurations that the study has.
        listener: receives the notes.
    """
    for number, each in enumerate(found):
        if each.is_worth_a_note or (number == 0 and each.study not in continuation.sources):
            listener.note(str(each))
    for note in continuation.notes(known):
        listener.note(note)


def note_points(space: Space, known: Collection[str], left: int | None, listener: ProgressListener) -> None:
    """Say how many of `points_to_evaluate` are next, and if the budget has no room for them.

    Args:
        space: the search.
        known: keys of the configurations that the study has.
        left: how many trials are left; None if only time ends the search.
        listener: receives the note.
    """
    count = sum(key not in known for key in space.named_keys)
    if not count or space.is_grid:
        return
    named = f"points_to_evaluate: {count} configuration{' is' if count == 1 else 's are'}"
    if left == 0:
        listener.note(f"{named} left out, because the budget is spent")
    else:
        room = "" if left is None or left >= count else f", and the budget has room for {left}"
        listener.note(f"{named} next{room}")


def note_changes(space: Space, study: Study | None, listener: ProgressListener) -> None:
    """Notify the listener if the study was last searched with another sampler or scheduler, or kept other checkpoints."""
    if study is None:
        return
    if space.saves_checkpoints and "checkpoints" not in study.settings:
        listener.note(
            "trials of earlier versions of hpo keep all of their checkpoints; `hpo clean` shows which ones to delete"
        )
    with suppress(SpaceError):  # settings of another version
        before = Space.from_settings(study.settings)
        for key in ("sampler", "scheduler"):
            was, now = getattr(before, key).model_dump(), getattr(space, key).model_dump()
            changed = [name for name in now if was.get(name) != now[name]]
            for name in ["name"] if "name" in changed else changed:
                what = key if name == "name" else f"{key}'s {name}"
                listener.note(f"the {what} was {was.get(name)} and is now {now[name]}; the trials so far are kept")
        was_kept, kept = before.checkpoints, space.checkpoints
        if was_kept.keep != kept.keep:
            listener.note(
                f"checkpoints.keep was {was_kept.keep} and is now {kept.keep}; this counts for the trials so far, too"
            )


@contextmanager
def warnings_noted(listener: ProgressListener) -> Iterator[None]:
    """Pass the warnings of hpo's and storage's loggers to the listener."""
    handler = _NoteHandler(listener.note)
    logger = logging.getLogger("hpo")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _NoteHandler(logging.Handler):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        self._note(record.getMessage())
