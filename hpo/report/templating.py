"""The templates of pages, and what they show of a figure."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpo.errors import printable
from hpo.report import plotly_figures, png_figures
from hpo.report.curves import CurveFigure
from hpo.report.formatting import format_number

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True)
class PageFigure:
    """A figure as the templates show it.

    Attributes:
        name: the HTML id, and the PNG file's name without its ending.
        plotly: for the page, as JSON that is safe inside a <script> element.
        png: the PNG file's content.
        is_curve: whether it shows metrics over epochs.
        min_width: in pixels; a narrower window scrolls.
    """

    name: str
    title: str
    caption: str
    plotly: str
    png: bytes
    is_curve: bool = False
    min_width: int = 0


def curve_page_figure(name: str, figure: CurveFigure, caption: str) -> PageFigure:
    """Return a figure of curves for the templates."""
    png = png_figures.to_png(png_figures.draw_curves([figure]))
    return PageFigure(name, figure.title, caption, plotly_figures.to_json(figure), png, is_curve=True)


def environment() -> jinja2.Environment:
    """Return the environment of the templates. Texts are escaped in HTML, and shown without control characters."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("hpo.report"),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    made.filters |= {"cell": _markdown_cell, "number": format_number, "quoted": shlex.quote}
    return made


def _markdown_cell(text: object) -> str:
    """Return a text that stays in its cell of a Markdown table, with every special character escaped."""
    escaped = re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", str(text))
    return " ".join(escaped.split())
