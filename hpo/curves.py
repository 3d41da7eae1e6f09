"""The curves of a study's trials over epochs: plotly figures for the dashboard, and one image."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from storage.records import Metrics


def curve_figures(labels: Mapping[int, str], metrics: Mapping[int, Metrics]) -> dict[str, Figure]:
    """Return a figure for each family of metrics, a colour for each trial.

    Args:
        labels: {trial number: its text in the legend}.
        metrics: {trial number: {epoch: {name: value}}}.
    """
    import plotly.graph_objects as go
    from plotly.colors import qualitative

    figures = {}
    for family, names in _families(metrics).items():
        figure = go.Figure(layout={"template": "plotly_white"})
        figure.update_xaxes(title={"text": "epoch"})
        figure.update_yaxes(type="log" if family == "loss" else "linear")
        for i, (number, label) in enumerate(labels.items()):
            for name in names:
                points = [(epoch, values[name]) for epoch, values in metrics[number].items() if name in values]
                figure.add_scatter(
                    x=[epoch for epoch, _ in points],
                    y=[value for _, value in points],
                    name=f"{label} {name}",
                    line={"color": qualitative.D3[i % 10], "dash": "dot" if name.startswith("train_") else "solid"},
                )
        figures[family] = figure
    return figures


def curve_image(labels: Mapping[int, str], metrics: Mapping[int, Metrics]) -> bytes:
    """Return the same curves as one PNG."""
    from matplotlib.figure import Figure as Canvas

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # that it looks through the fonts once is no news to anyone
    families = _families(metrics)
    canvas = Canvas(figsize=(6 * max(1, len(families)), 4), layout="constrained")
    for place, (family, names) in enumerate(families.items(), start=1):
        axes = canvas.add_subplot(1, len(families), place, title=f"{family} over epochs", xlabel="epoch")
        axes.set_yscale("log" if family == "loss" else "linear")
        for i, (number, label) in enumerate(labels.items()):
            for name in names:
                points = [(epoch, values[name]) for epoch, values in metrics[number].items() if name in values]
                style = ":" if name.startswith("train_") else "-"
                axes.plot(*zip(*points, strict=True), f"C{i % 10}{style}", label=f"{label} {name}") if points else None
        if len(labels) <= 10:
            axes.legend(fontsize="x-small")
    file = io.BytesIO()
    canvas.savefig(file, format="png")
    return file.getvalue()


def _families(metrics: Mapping[int, Metrics]) -> dict[str, list[str]]:
    names = {name for epochs in metrics.values() for values in epochs.values() for name in values}
    families = {family: [f"{part}_{family}" for part in ("val", "train")] for family in ("accuracy", "loss")}
    return {family: found for family, both in families.items() if (found := [name for name in both if name in names])}
