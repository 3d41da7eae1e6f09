"""The error tree: everything here is something the user can change.

    HpoError                 exit code 2, one message, no traceback
    ├── SpaceError           the search-space file or a --set override
    ├── DataError            the data set is not where it was looked for
    ├── TrainableError       the trainable cannot be found, or does not know a parameter
    └── SettingError         a flag, an environment variable, a folder, a name on the command line

`storage.database.StorageError` is the same kind of error from the other side of the wall; `hpo.run` treats it alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HpoError(Exception):
    """Something the user must change; the text says what, where, and what is allowed."""


class SpaceError(HpoError):
    """One or more mistakes in a search space; the text has a line for each."""


class DataError(HpoError):
    """A data set could not be read or downloaded."""


class TrainableError(HpoError):
    """A trainable cannot be imported or called, or was given a parameter it does not know."""


class SettingError(HpoError):
    """A flag, an environment variable, a folder or a name on the command line."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean X?` for the nearest known name, else `allowed: A, B, C`."""
    names = list(known)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {matches[0]}?" if matches else f"allowed: {', '.join(names)}"
