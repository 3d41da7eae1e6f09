"""The events of a search, and the listeners that receive them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from hpo.search.estimate import SearchEstimate
    from hpo.search.slots import Slots
    from hpo.space.model import Space


class ProgressListener(Protocol):
    """Receives the events of a search. Called from the thread that runs the search; it must return quickly."""

    def search_starting(self, space: Space) -> None:
        """A search starts. Nothing has been opened yet."""

    def preparing(self, what: str) -> None:
        """A slow step starts before trials run, such as measuring training steps."""

    def study_opened(
        self, space: Space, study_name: str, storage_url: str, counts: Mapping[str, int], left: int | None
    ) -> None:
        """The study is open.

        Args:
            space: the search.
            study_name: the study's name; `name@2` for a revision of a changed space.
            storage_url: without the password.
            counts: {state: trials} of what storage holds already.
            left: how many trials have not ended; None where only time or money ends the search.
        """

    def search_planned(self, space: Space, slots: Slots, estimate: SearchEstimate | None) -> None:
        """The number of trials at a time is decided; `estimate` is None where nothing was measured."""

    def slots_changed(self, count: int, before: int) -> None:
        """The number of trials that the cluster has room for has changed: nodes have joined or left."""

    def device_time_used(self, seconds: float) -> None:
        """The device-seconds of all runs of the study have changed. Called only if the budget limits or prices them."""

    def trial_started(self, number: int, params: Mapping[str, Any], epoch: int, max_epochs: int) -> None:
        """A trial starts, or is resumed after `epoch`."""

    def epoch_ended(self, number: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """A trial finished an epoch. The database may not contain the epoch yet."""

    def trial_ended(self, number: int, state: str, text: str) -> None:
        """A trial is COMPLETE, PRUNED or FAIL, or WAITING to be resumed; `text` is the reason.

        It need not have started: one that waited may end.
        """

    def search_lost(self, text: str, exit_code: int) -> None:
        """Ray has died, and this process ends at once: `search_ended` does not follow. Called from another thread."""

    def note(self, text: str) -> None:
        """A remark for the user."""


class NullListener:
    """Ignores every event."""

    def search_starting(self, space: Space) -> None:
        """Ignore it."""

    def preparing(self, what: str) -> None:
        """Ignore it."""

    def study_opened(
        self, space: Space, study_name: str, storage_url: str, counts: Mapping[str, int], left: int | None
    ) -> None:
        """Ignore it."""

    def search_planned(self, space: Space, slots: Slots, estimate: SearchEstimate | None) -> None:
        """Ignore it."""

    def slots_changed(self, count: int, before: int) -> None:
        """Ignore it."""

    def device_time_used(self, seconds: float) -> None:
        """Ignore it."""

    def trial_started(self, number: int, params: Mapping[str, Any], epoch: int, max_epochs: int) -> None:
        """Ignore it."""

    def epoch_ended(self, number: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Ignore it."""

    def trial_ended(self, number: int, state: str, text: str) -> None:
        """Ignore it."""

    def search_lost(self, text: str, exit_code: int) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""


class CombinedListener:
    """Passes every event to several listeners, in order."""

    def __init__(self, *listeners: ProgressListener) -> None:
        self._listeners = listeners

    def search_starting(self, space: Space) -> None:
        """Pass it on."""
        for listener in self._listeners:
            listener.search_starting(space)

    def preparing(self, what: str) -> None:
        """Pass it on."""
        for listener in self._listeners:
            listener.preparing(what)

    def study_opened(
        self, space: Space, study_name: str, storage_url: str, counts: Mapping[str, int], left: int | None
    ) -> None:
        """Pass it on."""
        for listener in self._listeners:
            listener.study_opened(space, study_name, storage_url, counts, left)

    def search_planned(self, space: Space, slots: Slots, estimate: SearchEstimate | None) -> None:
        """Pass it on."""
        for listener in self._listeners:
            listener.search_planned(space, slots, estimate)

    def slots_changed(self, count: int, before: int) -> None:
        """Pass it on."""
        for listener in self._listeners:
            listener.slots_changed(count, before)

    def device_time_used(self, seconds: float) -> None:
        """Pass it on."""
        for listener in self._listeners:
            listener.device_time_used(seconds)

    def trial_started(self, number: int, params: Mapping[str, Any], epoch: int, max_epochs: int) -> None:
        """Pass it on."""
        for listener in self._listeners:
            listener.trial_started(number, params, epoch, max_epochs)

    def epoch_ended(self, number: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Pass it on."""
        for listener in self._listeners:
            listener.epoch_ended(number, epoch, metrics)

    def trial_ended(self, number: int, state: str, text: str) -> None:
        """Pass it on."""
        for listener in self._listeners:
            listener.trial_ended(number, state, text)

    def search_lost(self, text: str, exit_code: int) -> None:
        """Pass it on."""
        for listener in self._listeners:
            listener.search_lost(text, exit_code)

    def note(self, text: str) -> None:
        """Pass it on."""
        for listener in self._listeners:
            listener.note(text)
