"""The events of a search, and several listeners at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from hpo.search.listener import CombinedListener, NullListener, ProgressListener

EVENTS = [name for name in vars(ProgressListener) if not name.startswith("_")]


def arguments_of(event: str) -> list[object]:
    """Return a different object for each argument of an event."""
    return [object() for name in inspect.signature(getattr(ProgressListener, event)).parameters if name != "self"]


class Recorder:
    """A listener that keeps every event under its own name."""

    def __init__(self, name: str, received: list[tuple[str, str, list[object]]]) -> None:
        self._name, self._received = name, received

    def __getattr__(self, event: str) -> Callable[..., None]:
        return lambda *arguments: self._received.append((self._name, event, list(arguments)))


@pytest.mark.parametrize("event", EVENTS)
def test_each_listener_receives_an_event_in_order(event: str) -> None:
    received: list[tuple[str, str, list[object]]] = []
    listeners: list[Any] = [Recorder("first", received), Recorder("second", received)]
    arguments = arguments_of(event)
    getattr(CombinedListener(*listeners), event)(*arguments)
    assert received == [("first", event, arguments), ("second", event, arguments)]


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_can_be_ignored(event: str) -> None:
    assert getattr(NullListener(), event)(*arguments_of(event)) is None
