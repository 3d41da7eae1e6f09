"""The names of a study's revisions: `name`, `name@2`, `name@3`, ... Another program may give a study any name."""

from __future__ import annotations

import re
from collections.abc import Iterable

FIRST = "@1"  # a name that ends so means the first revision, whose own name has no such ending
_REVISION = re.compile(r"[2-9]|[1-9][0-9]+")


def references(names: Iterable[str]) -> dict[str, str]:
    """Return {name: what names the study} for users: `find_study` finds the study by it, not a later revision.

    It is the name itself, but `NAME@1` for the first revision of a study that has later ones. If another program has given
    a study the name `NAME@1`, nothing names the first revision: its name is returned.

    Args:
        names: of all studies of a database.
    """
    known = set(names)
    bases = {name: name.partition("@")[0] for name in known}
    revised = {base for name, base in bases.items() if name != base and is_revision(name, base)}
    return {name: name + FIRST if name in revised and name + FIRST not in known else name for name in known}


def revisions_of(names: Iterable[str], name: str) -> list[str]:
    """Return which of these names of studies are revisions of a study, the first one included; in order."""
    return sorted((known for known in names if is_revision(known, name)), key=number_of)


def is_revision(known: str, name: str) -> bool:
    """Return whether `open_study` may have named a study so. Names that other programs give may contain `@`, too."""
    return known == name or (known.startswith(f"{name}@") and _REVISION.fullmatch(known, len(name) + 1) is not None)


def number_of(name: str) -> int:
    """Return the number of a revision, by its name."""
    return int(name.partition("@")[2] or 1)
