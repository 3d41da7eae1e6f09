"""Translate figures into Plotly's JSON format, for the page and the dashboard.

Plain dicts, not `plotly.graph_objects`, which takes long to import and to validate thousands of points.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hpo.report.curves import Band, CurveFigure, Line

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# As in plotly's own `to_json`: the text is safe inside a <script> element.
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "/": "\\u002f"})
_MARKUP = ("<br>", "<extra></extra>")  # what Optuna writes itself; in a name, it would be a line break at most


def to_plotly(figure: CurveFigure) -> dict[str, Any]:
    """Return {"data": traces, "layout": layout}."""
    x_axis: dict[str, Any] = {"title": {"text": html.escape(figure.x_title)}}
    if figure.has_whole_x and figure.last_epoch <= 12:
        x_axis["dtick"] = 1  # no ticks between epochs
    y_axis = {"type": "log", "dtick": 1} if figure.is_log else {}
    traces = [trace for band in figure.bands for trace in _band_traces(band)]
    traces += [_line_trace(line, html.escape(figure.x_title)) for line in figure.lines]
    return {"data": traces, "layout": {"meta": "curves", "xaxis": x_axis, "yaxis": y_axis}}


def to_json(figure: CurveFigure) -> str:
    """Return a figure as JSON that is safe inside a <script> element."""
    return dump(to_plotly(figure))


def dump(figure: Mapping[str, Any]) -> str:
    """Return {"data": traces, "layout": layout} as JSON that is safe inside a <script> element."""
    return json.dumps(figure, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)


def escape_texts(figure: Any) -> Any:
    """Return a figure of another library as plain values, in which Plotly shows every text as it is.

    Plotly takes texts for HTML: names of traces and axes, ticks, annotations, and what is shown next to the pointer.
    """
    if isinstance(figure, Mapping):
        return {key: escape_texts(value) for key, value in figure.items()}
    if isinstance(figure, list | tuple):
        return [escape_texts(value) for value in figure]
    if isinstance(figure, str):
        escaped = html.escape(figure)
        for markup in _MARKUP:
            escaped = escaped.replace(html.escape(markup), markup)
        return escaped
    return escape_texts(figure.tolist()) if hasattr(figure, "tolist") else figure


def to_graph_object(figure: CurveFigure) -> Figure:
    """Return a figure as plotly's own object, for callers that change it further."""
    import plotly.graph_objects as go

    drawn = go.Figure(to_plotly(figure))
    drawn.update_layout(template="none")
    return drawn


def _band_traces(band: Band) -> Iterator[dict[str, Any]]:
    """Yield an invisible lower edge, and an upper edge filled down to it."""
    red, green, blue = (int(band.colour[i : i + 2], 16) for i in (1, 3, 5))
    edge = {"type": "scatter", "x": band.x, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    yield edge | {"y": band.low, "showlegend": False}
    fill = {"fill": "tonexty", "fillcolor": f"rgba({red}, {green}, {blue}, 0.25)"}
    yield edge | fill | {"y": band.high, "name": html.escape(band.label)}


def _line_trace(line: Line, x_title: str) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter",
        "x": line.x,
        "y": line.y,
        "mode": "lines" if len(line.x) > 1 else "markers",
        "name": html.escape(line.label),
        "showlegend": line.in_legend,
        "opacity": line.opacity,
        "line": {"color": line.colour, "width": line.width, "dash": line.dash},
        "marker": {"color": line.colour, "symbol": line.marker},
    }
    if line.group:
        trace["legendgroup"] = line.group
    if line.hover:
        text = "<br>".join(map(html.escape, line.hover))
        return trace | {"hovertemplate": f"{text} %{{y:.4f}}, {x_title} %{{x}}<extra></extra>"}
    return trace | {"hoverinfo": "skip"}
