"""Draw figures as PNG files, with matplotlib."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpo.report.curves import CurveFigure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {"solid": "-", "dash": "--", "dot": ":"}
MAX_INNER_LABELS = 5  # a longer legend is placed next to the curves
DPI = 120

# Without this, matplotlib prints a warning while it builds its font cache.
logging.getLogger("matplotlib").setLevel(logging.ERROR)


def draw_curves(figures: Sequence[CurveFigure]) -> Figure:
    """Return one matplotlib figure with the figures one below the other."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context("default"):  # not that of a file matplotlibrc in the working folder
        return _draw_curves(Figure(figsize=(7.2, 4.4 * len(figures)), dpi=DPI), figures)


def _draw_curves(drawn: Figure, figures: Sequence[CurveFigure]) -> Figure:
    is_outside = any(_count_labels(figure) > MAX_INNER_LABELS for figure in figures)
    drawn.subplots_adjust(hspace=0.35)
    for i, figure in enumerate(figures, start=1):
        axes = drawn.add_subplot(len(figures), 1, i)
        _draw(axes, figure, is_outside=is_outside)
    return drawn


def to_png(figure: Figure) -> bytes:
    """Return a matplotlib figure as a PNG file, cropped to what is drawn."""
    from matplotlib.text import Text

    try:
        return _save(figure)
    except ValueError:  # a name with dollar signs is not mathematics
        for text in figure.findobj(Text):
            text.set_parse_math(False)
        return _save(figure)


def _save(figure: Figure) -> bytes:
    # Cropping takes one pass; a layout engine would draw everything twice more.
    from matplotlib import style

    file = io.BytesIO()
    with style.context("default"):
        figure.savefig(file, format="png", bbox_inches="tight", pil_kwargs={"compress_level": 3})
    return file.getvalue()


def _draw(axes: Axes, figure: CurveFigure, *, is_outside: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(figure.title, parse_math=False)
    for band in figure.bands:
        axes.fill_between(band.x, band.low, band.high, color=band.colour, alpha=0.3, linewidth=0, label=band.label)
    for line in figure.lines:
        axes.plot(
            [math.nan if epoch is None else epoch for epoch in line.x],
            [math.nan if value is None else value for value in line.y],
            STYLES[line.dash],
            color=line.colour,
            linewidth=0.8 * line.width,
            alpha=line.opacity,
            marker="o" if len(line.x) == 1 else None,
            markerfacecolor="none" if line.marker == "circle-open" else line.colour,
            label=line.label if line.in_legend else None,
        )
    if figure.is_log:
        axes.set_yscale("log")
    axes.set_xlabel(figure.x_title, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=figure.has_whole_x))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if is_outside else {"loc": "best"}
    for text in axes.legend(fontsize="small", frameon=False, **place).get_texts():
        text.set_parse_math(False)


def _count_labels(figure: CurveFigure) -> int:
    return len(figure.bands) + sum(line.in_legend for line in figure.lines)
