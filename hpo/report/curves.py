"""Figures of training curves as plain data. `plotly_figures` and `png_figures` draw them.

All curves of a small study are coloured. For a large study, only the best trials are coloured; an even sample of the
others is grey, and a band shows the middle 80 % of all trials.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hpo.report.formatting import shorten
from hpo.report.published import Published
from hpo.report.results import Results
from hpo.report.trials import TrialResult

MAX_COLOURED = 10  # more colours cannot be distinguished
MAX_GREY = 90
MAX_FAMILIES = 8  # figures; a trainable may report hundreds of metrics
MAX_POINTS = 400  # per curve, about one per pixel
# Distinguishable on white and on black, also by colour-blind readers as far as ten colours allow.
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#ef4444", "#8b5cf6", "#06b6d4", "#ca8a04", "#ec4899", "#84cc16", "#64748b")
GREY = "#94a3b8"

Dash = Literal["solid", "dash", "dot"]
Marker = Literal["circle", "circle-open"]
Points = tuple[list[float | None], list[float | None]]
DASHES: dict[str, Dash] = {"train": "dash", "published": "dot"}


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of a figure.

    Attributes:
        x: epochs, or what `CurveFigure.x_title` says; None starts a new segment.
        y: as many values as `x`; None is a gap.
        colour: #rrggbb.
        label: the name in the legend.
        in_legend: whether the legend lists it.
        width: in pixels of the page.
        opacity: from 0 to 1.
        dash: the style of the line.
        marker: what is drawn if there is only one point.
        group: lines of the same group are shown and hidden together; empty for a line on its own.
        hover: the lines of text shown above the value at the cursor; without any, nothing is shown.
    """

    x: list[float | None]
    y: list[float | None]
    colour: str
    label: str
    in_legend: bool = True
    width: float = 2.0
    opacity: float = 1.0
    dash: Dash = "solid"
    marker: Marker = "circle"
    group: str = ""
    hover: tuple[str, ...] = ()


@dataclass(frozen=True)
class Band:
    """The area between two curves: `x`, `low` and `high` have the same length."""

    x: list[int]
    low: list[float]
    high: list[float]
    label: str
    colour: str = GREY


@dataclass(frozen=True)
class CurveFigure:
    """Curves over epochs, trials or time.

    Attributes:
        title: shown above the figure.
        lines: drawn in this order, on top of the bands.
        bands: areas.
        last_epoch: the end of the x axis, rounded up.
        is_log: whether the y axis is logarithmic.
        x_title: what the x axis shows.
        has_whole_x: whether only whole numbers make sense on the x axis.
    """

    title: str
    lines: list[Line]
    bands: list[Band]
    last_epoch: int
    is_log: bool
    x_title: str = "epoch"
    has_whole_x: bool = True


# --- from results to the model ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Metrics that one figure shows.

    Attributes:
        name: for file names and HTML ids.
        title: of the figure.
        metrics: validation first.
    """

    name: str
    title: str
    metrics: list[str]


@dataclass(frozen=True)
class Selection:
    """The trials to draw.

    Attributes:
        coloured: the best trials, with a colour each.
        grey: a sample of the others.
        total: the number of trials that have curves.
    """

    coloured: list[tuple[TrialResult, str]]
    grey: list[TrialResult]
    total: int

    @property
    def has_band(self) -> bool:
        """Whether some trials are not drawn as lines, so that only the band shows them."""
        return self.total > len(self.coloured) + len(self.grey)

    @property
    def text(self) -> str:
        """A caption that says which trials are drawn; empty if all trials are coloured."""
        others = self.total - len(self.coloured)
        if not others:
            return ""
        text = f"The best {len(self.coloured)} of {self.total:,} trials are coloured, "
        if not self.has_band:
            return text + f"the other {others:,} are grey."
        return text + (
            f"{len(self.grey)} of the other {others:,}, an even sample by rank, are grey. The band shows the middle 80 % "
            "of all trials."
        )


def name_families(results: Results) -> list[Family]:
    """Return the figures to draw, at most `MAX_FAMILIES`."""
    families: dict[str, Family] = {}
    for family, metrics in list(results.curve_families.items())[:MAX_FAMILIES]:
        # The name depends only on the metric, so that a later report overwrites the same files.
        name = family if family in {"accuracy", "loss"} else f"curves_{re.sub(r'[^A-Za-z0-9_.-]', '_', family)[:60]}"
        while name in families:  # two metrics may differ in special characters only
            name += "_"
        families[name] = Family(name, f"{family[:1].upper()}{family[1:]} over epochs", metrics)
    return list(families.values())


def select_trials(results: Results) -> Selection:
    """Choose the trials to draw."""
    ranked = [trial for trial in results.ranked if trial.epochs]
    best, others = ranked[:MAX_COLOURED], ranked[MAX_COLOURED:]
    if not others:
        best = sorted(best, key=lambda trial: trial.number)
    step = max(1.0, len(others) / MAX_GREY)
    grey = [others[int(i * step)] for i in range(min(MAX_GREY, len(others)))]
    return Selection(list(zip(best, COLOURS, strict=False)), grey, len(ranked))


def build_figure(
    results: Results, family: Family, selection: Selection, published: Mapping[int, Published]
) -> CurveFigure:
    """Return the figure of some metrics: the selected trials, and the published results where there are some.

    Args:
        results: the study, with its epochs; at least one trial.
        family: the metrics to draw. The first one decides the band and the grey lines.
        selection: the trials to draw.
        published: {trial number: published results}; empty if there are none.
    """
    first = family.metrics[0]
    last_epoch = max(trial.last_epoch for trial in results.trials)
    lines = []
    if selection.grey:
        # One line for all of them: one line each would slow the browser down.
        x, y = _join([_points(trial, first) for trial in selection.grey])
        lines.append(Line(x, y, GREY, f"{len(selection.grey)} others, {first}", width=0.6, opacity=0.55))
    for trial, colour in selection.coloured:
        label = shorten(results.label(trial))
        lines += _trial_lines(trial, label, colour, family.metrics)
        if trial.number in published:
            lines += _published_lines(published[trial.number], trial, label, colour, family.metrics, last_epoch)
    bands = [_band(results, first, last_epoch)] if selection.has_band else []
    return CurveFigure(family.title, lines, bands, last_epoch, _needs_log([line.y for line in lines]))


def _trial_lines(trial: TrialResult, label: str, colour: str, metrics: Sequence[str]) -> Iterator[Line]:
    for metric in metrics:
        x, y = _points(trial, metric)
        is_first = metric == metrics[0]
        yield Line(
            x,
            y,
            colour,
            label,
            in_legend=is_first,
            width=2.0 if is_first else 1.4,
            dash=_dash(metric),
            marker="circle-open" if metric.startswith("train_") else "circle",
            group=str(trial.number),
            hover=(label, metric),
        )


def _published_lines(
    published: Published, trial: TrialResult, label: str, colour: str, metrics: Sequence[str], last_epoch: int
) -> Iterator[Line]:
    for metric in _published_metrics(metrics, published):
        x, y = _clean([(epoch, each[metric]) for epoch, each in published.epochs.items() if epoch <= last_epoch])
        yield Line(
            x,
            y,
            colour,
            "published",
            in_legend=False,
            width=1.4,
            dash=_dash("published"),
            group=str(trial.number),
            hover=(f"published, {label}", metric),
        )


def describe_styles(metrics: Sequence[str], published: Mapping[int, Published]) -> str:
    """Return a caption that names the metric of each line style; empty if there is only one."""
    names = {"solid": "Solid", "dash": "Dashed", "dot": "Dotted"}
    texts = [f"{names[_dash(metric)]}: {_describe(metric)}." for metric in metrics]
    if any(_published_metrics(metrics, each) for each in published.values()):
        texts.append("Dotted: published, training.")
    return " ".join(texts) if len(texts) > 1 else ""


def _points(trial: TrialResult, metric: str) -> Points:
    return _clean(list(zip(*trial.curve(metric), strict=True)))


def _clean(points: list[tuple[int, float]]) -> Points:
    """Return at most `MAX_POINTS` points, evenly chosen. NaN and infinity become gaps."""
    if len(points) > MAX_POINTS:
        step = (len(points) - 1) / (MAX_POINTS - 1)
        points = [points[round(i * step)] for i in range(MAX_POINTS)]
    return [epoch for epoch, _ in points], [value if math.isfinite(value) else None for _, value in points]


def _join(curves: Sequence[Points]) -> Points:
    """Return one line with a gap after each curve."""
    x: list[float | None] = []
    y: list[float | None] = []
    for epochs, values in curves:
        x += [*epochs, None]
        y += [*values, None]
    return x, y


def _band(results: Results, metric: str, last_epoch: int) -> Band:
    """Return the 10th to 90th percentile of a metric over all trials, at no more than about 100 epochs."""
    import numpy as np

    wanted = set(range(1, last_epoch + 1, max(1, last_epoch // 100)))
    values: dict[int, list[float]] = {}
    for trial in results.trials:
        for epoch in wanted & trial.epochs.keys():
            value = trial.epochs[epoch].get(metric, math.nan)
            if math.isfinite(value):
                values.setdefault(epoch, []).append(value)
    epochs = sorted(values)
    quantiles = [np.quantile(values[epoch], [0.1, 0.9]) for epoch in epochs]
    label = f"middle 80 % of all, {metric}"
    return Band(epochs, [float(low) for low, _ in quantiles], [float(high) for _, high in quantiles], label)


def _needs_log(curves: Sequence[Sequence[float | None]]) -> bool:
    """Return whether a few large values, such as those of a diverged training, would flatten all other curves."""
    known = sorted(value for curve in curves for value in curve if value is not None)
    return bool(known) and known[0] > 0 and known[-1] > 30 * known[len(known) // 2]


def _published_metrics(metrics: Sequence[str], published: Published) -> list[str]:
    first = next(iter(published.epochs.values()))
    return [metric for metric in metrics if metric in first]


def _dash(metric: str) -> Dash:
    return DASHES.get(metric.partition("_")[0], "solid")


def _describe(metric: str) -> str:
    return {"train": "training", "val": "validation"}.get(metric.partition("_")[0], metric)
