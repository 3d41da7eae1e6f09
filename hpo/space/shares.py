"""A share of a study's trials, as it is written in a search space: `all`, `none` or `best N`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from hpo.errors import nearest

BestN = Annotated[str, Field(pattern=r"^best [1-9]\d{0,8}$")]  # for the JSON Schema; `check_share` checks files

_BEST = re.compile(r"best ([1-9]\d{0,8})", re.ASCII)


def check_share(raw: object, words: Sequence[str], example: str, allowed: str) -> object:
    """Return a share as it is.

    Args:
        raw: as in the file.
        words: what is allowed in addition to `best N`.
        example: of `best N`.
        allowed: what the message says is allowed.

    Raises:
        ValueError: it is not one of the words or `best N`; the message suggests the nearest one.
    """
    if raw in words or (isinstance(raw, str) and _BEST.fullmatch(raw)):
        return raw
    text = f"write {allowed}, got {repr(raw)[:40]}"
    hint = nearest(raw, [*words, example]) if isinstance(raw, str) else ""
    raise ValueError(f"{text}, {hint}" if hint.startswith("did you mean") else text)


def count_share(share: str) -> int | None:
    """Return how many trials a valid share has at most; None for all."""
    best = _BEST.fullmatch(share)
    return int(best[1]) if best else {"all": None, "none": 0}[share]
