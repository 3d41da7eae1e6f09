"""Torch, where a process needs it only if something else has imported it."""

from __future__ import annotations

import sys
from types import ModuleType


def imported_torch() -> ModuleType | None:
    """Return torch if this process has imported it, else None. While another thread imports it, wait for that."""
    if sys.modules.get("torch") is None:
        return None
    import torch

    return torch
