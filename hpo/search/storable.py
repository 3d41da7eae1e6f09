"""What a database can store of the reports of a trainable. A report with anything else fails its trial, and no other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

MAX_NAME_LENGTH = 500  # of a metric: PostgreSQL limits the size of a key


def storable_name(name: object) -> str:
    """Return the name of a metric.

    Raises:
        ValueError: a database cannot store it. Each resume would fail at the same epoch.
    """
    text = str(name)
    if len(text) > MAX_NAME_LENGTH or storable_text(text) != text:
        raise ValueError(
            f"the name of a metric is Unicode text of at most {MAX_NAME_LENGTH} characters without NUL, not {text[:50]!r}"
        )
    return text


def storable_provenance(provenance: Any) -> dict[str, Any]:
    """Return what a trainable records with a trial, as plain values.

    Raises:
        ValueError: a database cannot store it. Only this trial must fail.
    """
    try:
        plain = dict(provenance)
        text = json.dumps(plain, allow_nan=False)
        for key in _keys(plain):
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is no text")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the provenance of an epoch cannot be stored as JSON: {error}") from None
    return dict(json.loads(text))


def _keys(value: object) -> Iterator[object]:
    """Yield the keys of a value that JSON can hold, at any depth. JSON would turn numbers into texts."""
    if isinstance(value, dict):
        yield from value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for item in items:
        yield from _keys(item)


def storable_text(text: str) -> str:
    """Return a text as databases and web pages can hold it: file names in errors may not be Unicode."""
    return text.replace("\0", "\\x00").encode(errors="backslashreplace").decode()
