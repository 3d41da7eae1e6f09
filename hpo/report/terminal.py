"""The terminal, on which texts from files and databases are shown as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from hpo.errors import printable


class Terminal(Console):
    """A console without markup, without emoji codes, and without control characters, except those of rich itself.

    Whoever can write a search space or a database chooses the names and descriptions that are shown. They must not move the
    cursor, change colors, or end the program because they look like markup.

    Args:
        options: see `rich.console.Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of a renderable; only rich's own control segments contain control characters."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)
