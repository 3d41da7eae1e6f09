"""The error tree. Every error here is something the user can fix.

    HpoError                 exit code 2, one message, no traceback
    ├── SpaceError           the search-space file or a --set override
    ├── DataError            a data set
    ├── TrainableError       the trainable, or a parameter that it does not accept
    └── SettingError         a flag, an environment variable, a folder, a name on the command line

`storage.errors.StorageError` is the same kind of error. storage imports nothing of hpo, so it is not in this tree;
`hpo.run` handles both in the same way.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Sequence

# All but tab and line feed, which only move on. C1 holds another escape; the rest is not visible, ends a line, or reverses
# the order of what follows.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff]")
MAX_ALLOWED = 30  # names in a message; a database may have thousands of studies


class HpoError(Exception):
    """Something the user must change. The message says what is wrong, where, and what is allowed."""


class SpaceError(HpoError):
    """One or more problems in a search space; the message has one line for each."""


class DataError(HpoError):
    """A data set cannot be read or downloaded."""


class TrainableError(HpoError):
    """A trainable cannot be imported or called, or does not accept a parameter."""


class SettingError(HpoError):
    """A flag, an environment variable, a folder or a name on the command line is wrong."""


class TrainedElsewhereError(SettingError):
    """A result that was taken over is asked for what the study that trained it has. The message says which study that is.

    Attributes:
        study: what names that study.
        trial: the number of the trial there.
        storage: the URL of its database, without a password; empty for that of the result.
    """

    def __init__(self, message: str, study: str, trial: int, storage: str = "") -> None:
        super().__init__(message)
        self.study = study
        self.trial = trial
        self.storage = storage


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean X?` with the nearest known name, or `allowed: A, B, C` if none is near, at most `MAX_ALLOWED`."""
    names = list(known)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {matches[0]}?" if matches else f"allowed: {list_names(names)}"


def list_names(names: Sequence[str]) -> str:
    """Return names for a message, at most `MAX_ALLOWED`."""
    more = f" and {len(names) - MAX_ALLOWED:,} more" if len(names) > MAX_ALLOWED else ""
    return ", ".join(names[:MAX_ALLOWED]) + more


def printable(text: str) -> str:
    """Return a text without control characters and invisible ones.

    A terminal would obey them, a name with them would look like another one, and names in a database may contain any.
    """
    return _CONTROL.sub("", text)


def was_interrupted(error: BaseException) -> bool:
    """Return whether Ctrl-C led to an error, as in a library that was cleaning up when it came."""
    context = error.__context__
    while context is not None and not isinstance(context, KeyboardInterrupt):
        context = context.__context__
    return context is not None


def is_fixable(error: BaseException) -> bool:
    """Return whether the user can fix the cause of an error, which its message says: `HpoError` or `StorageError`."""
    # The module is imported late. If it was never imported, this cannot be a StorageError.
    module = sys.modules.get("storage.errors")
    return isinstance(error, HpoError) or (module is not None and isinstance(error, module.StorageError))


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a command that an exception ends."""
    if isinstance(error, KeyboardInterrupt) or was_interrupted(error):
        return 130
    return 2 if is_fixable(error) else 1
