"""The figures of a report, each twice: by plotly for the page, by matplotlib as PNG.

Curves of a few trials are all drawn in colours. Of many, the best are in colours, a sample of the others, evenly spread
over the ranks, in grey, and a band holds the middle of all: the page of 5,000 trials is read as fast as that of five.
"""

from __future__ import annotations

import html
import io
import logging
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hpo.report.published import Published
from hpo.report.results import Results, TrialResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure
    from optuna import Study
    from plotly.graph_objects import Figure as PlotlyFigure

MAX_COLOURED = 10  # more colours are not told apart
MAX_GREY = 90
MAX_FAMILIES = 8  # figures of curves; a trainable may report hundreds of metrics
MAX_POINTS = 400  # of one curve: more than there are pixels for
MAX_PARALLEL = 300  # Optuna draws a trace for each trial
MIN_IMPORTANCE_TRIALS = 20  # the importance compares the best tenth with all: two trials with twenty
# TrialUpdate apart on white and on black, and by the colour-blind as far as ten colours can.
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#ef4444", "#8b5cf6", "#06b6d4", "#ca8a04", "#ec4899", "#84cc16", "#64748b")
GREY = "#94a3b8"
RANKS = ("#94a3b8", "#7aa5c9", "#22a6c9", "#e0912f", "#f2661f")  # from the worst to the best, on white and on black
DASHES: dict[str, Literal["solid", "dash", "dot"]] = {"train": "dash", "published": "dot"}

Curve = tuple[list[int], list[float | None]]


@dataclass(frozen=True)
class Selection:
    """Which trials are drawn, and how.

    Attributes:
        coloured: a colour for each of the best.
        grey: a sample of the others.
        total: how many trials have curves.
    """

    coloured: list[tuple[TrialResult, str]]
    grey: list[TrialResult]
    total: int

    @property
    def has_band(self) -> bool:
        """Whether trials are left that only the band shows."""
        return self.total > len(self.coloured) + len(self.grey)

    @property
    def text(self) -> str:
        """Say which trials are drawn; empty where all are drawn in colours."""
        others = self.total - len(self.coloured)
        if not others:
            return ""
        text = f"The best {len(self.coloured)} of {self.total:,} trials are in colours, "
        if not self.has_band:
            return text + f"the other {others:,} in grey."
        return text + (
            f"{len(self.grey)} of the other {others:,}, evenly spread over the ranks, in grey; the band holds the middle "
            "80 % of all trials."
        )


@dataclass(frozen=True)
class Family:
    """Metrics that are drawn together.

    Attributes:
        name: for a file or an HTML id.
        metrics: validation first.
    """

    name: str
    title: str
    metrics: list[str]


def name_families(results: Results) -> list[Family]:
    """Return the figures of curves to draw: of very many metrics, the first."""
    families: dict[str, Family] = {}
    for family, metrics in list(results.curve_families.items())[:MAX_FAMILIES]:
        # The same name each time, whatever else is drawn then: what was written before is written over.
        name = family if family in {"accuracy", "loss"} else f"curves_{re.sub(r'[^A-Za-z0-9_.-]', '_', family)[:60]}"
        while name in families:  # a metric may have any name, and two that differ in nothing but signs
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


def plot_curves(
    results: Results, metrics: Sequence[str], selection: Selection, published: Mapping[int, Published]
) -> PlotlyFigure:
    """Return the curves of some metrics over epochs, for the page."""
    import plotly.graph_objects as go

    x_axis: dict[str, Any] = {"title": {"text": "epoch"}}
    last = max(trial.last_epoch for trial in results.trials)
    if last <= 12:
        x_axis["dtick"] = 1  # there is no epoch 1.5
    figure = go.Figure(layout={"template": "none", "meta": "curves", "xaxis": x_axis, "yaxis": {}})
    drawn: list[float | None] = []
    if selection.has_band:
        epochs, low, high = _band(results, metrics[0])
        figure.add_scatter(x=epochs, y=low, mode="lines", line={"width": 0}, showlegend=False, hoverinfo="skip")
        band = f"middle 80 % of all, {html.escape(metrics[0])}"
        fill = {"fill": "tonexty", "fillcolor": "rgba(148, 163, 184, 0.25)", "line": {"width": 0}}
        figure.add_scatter(x=epochs, y=high, mode="lines", hoverinfo="skip", name=band, **fill)
    if selection.grey:
        # One trace for all of them: a trace each would make the browser slow.
        all_x, all_y = _joined([_curve(trial, metrics[0]) for trial in selection.grey])
        drawn += all_y
        line = {"color": GREY, "width": 0.6}
        name = f"{len(selection.grey)} others, {html.escape(metrics[0])}"
        figure.add_scatter(x=all_x, y=all_y, mode="lines", line=line, name=name, opacity=0.55, hoverinfo="skip")
    for trial, colour in selection.coloured:
        label = html.escape(shorten(results.label(trial)))
        for metric in metrics:
            x, y = _curve(trial, metric)
            drawn += y
            figure.add_scatter(
                x=x,
                y=y,
                mode="lines" if len(x) > 1 else "markers",
                name=label,
                legendgroup=str(trial.number),
                showlegend=metric == metrics[0],
                line={"color": colour, "width": 2 if metric == metrics[0] else 1.4, "dash": _dash(metric)},
                marker={"color": colour, "symbol": "circle-open" if metric.startswith("train_") else "circle"},
                hovertemplate=f"{label}<br>{html.escape(metric)} %{{y:.4f}}, epoch %{{x}}<extra></extra>",
            )
        for metric in _published_metrics(metrics, published.get(trial.number)):
            x, y = _published_curve(published[trial.number], metric, last)
            drawn += y
            figure.add_scatter(
                x=x,
                y=y,
                mode="lines",
                name="published",
                legendgroup=str(trial.number),
                showlegend=False,
                line={"color": colour, "width": 1.4, "dash": _dash("published")},
                hovertemplate=f"published, {label}<br>{metric} %{{y:.4f}}, epoch %{{x}}<extra></extra>",
            )
    if _wants_log(drawn):
        figure.update_yaxes(type="log", dtick=1)
    return figure


def draw_families(
    results: Results, families: Sequence[Family], selection: Selection, published: Mapping[int, Published]
) -> MatplotlibFigure:
    """Return the same curves as `plot_curves`, of some families one below the other, for a PNG."""
    _quiet_matplotlib()
    from matplotlib.figure import Figure

    beside = len(selection.coloured) > 5  # the legend; of fewer trials there is room among the curves
    figure = Figure(figsize=(10.5 if beside else 7.2, 4.4 * len(families)), dpi=120, layout="constrained")
    for i, family in enumerate(families, start=1):
        axes = figure.add_subplot(len(families), 1, i, xlabel="epoch")
        _draw_curves(axes, results, family.title, family.metrics, selection, published, beside=beside)
    return figure


def to_png(figure: MatplotlibFigure) -> bytes:
    """Return a figure as a PNG file."""
    from matplotlib.text import Text

    file = io.BytesIO()
    try:
        figure.savefig(file, format="png", bbox_inches="tight")
    except ValueError:  # a name with dollar signs, which are no mathematics
        for text in figure.findobj(Text):
            text.set_parse_math(False)
        file = io.BytesIO()
        figure.savefig(file, format="png", bbox_inches="tight")
    return file.getvalue()


def _quiet_matplotlib() -> None:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # that it builds a cache of fonts is no news to the user


def _draw_curves(
    axes: Axes,
    results: Results,
    title: str,
    metrics: Sequence[str],
    selection: Selection,
    published: Mapping[int, Published],
    *,
    beside: bool,
) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, parse_math=False)
    drawn: list[float | None] = []
    last = max(trial.last_epoch for trial in results.trials)
    if selection.has_band:
        epochs, low, high = _band(results, metrics[0])
        axes.fill_between(epochs, low, high, color=GREY, alpha=0.3, linewidth=0, label="middle 80 % of all")
    for i, trial in enumerate(selection.grey):
        x, y = _curve(trial, metrics[0])
        drawn += y
        label = f"{len(selection.grey)} others" if i == 0 else None
        axes.plot(x, _floats(y), color=GREY, linewidth=0.5, alpha=0.6, label=label)
    for trial, colour in selection.coloured:
        for metric in metrics:
            x, y = _curve(trial, metric)
            drawn += y
            style = {"solid": "-", "dash": "--", "dot": ":"}[_dash(metric)]
            label = shorten(results.label(trial)) if metric == metrics[0] else None
            marker = "o" if len(x) == 1 else None
            axes.plot(x, _floats(y), style, color=colour, linewidth=1.4, marker=marker, label=label)
        for metric in _published_metrics(metrics, published.get(trial.number)):
            x, y = _published_curve(published[trial.number], metric, last)
            drawn += y
            axes.plot(x, _floats(y), ":", color=colour, linewidth=1.2)
    if _wants_log(drawn):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    anchor = (1.0, 1.0) if beside else None
    legend = axes.legend(fontsize="small", frameon=False, loc="upper left" if beside else "best", bbox_to_anchor=anchor)
    for text in legend.get_texts():
        text.set_parse_math(False)


def describe_styles(metrics: Sequence[str], published: Mapping[int, Published]) -> str:
    """Say which line is which metric; empty where there is one."""
    names = {"solid": "Solid", "dash": "Dashed", "dot": "Dotted"}
    texts = [f"{names[_dash(metric)]}: {_in_words(metric)}." for metric in metrics]
    if any(_published_metrics(metrics, each) for each in published.values()):
        texts.append("Dotted: published, training.")
    return " ".join(texts) if len(texts) > 1 else ""


# --- Optuna's own plots -----------------------------------------------------------------------------------------------


def optuna_plots(results: Results) -> dict[str, str]:
    """Return {function of optuna.visualization: why it would mean nothing here, or nothing}, in their order on the page."""
    finite = [t for t in results.trials if t.state == "COMPLETE" and t.values and all(map(math.isfinite, t.values))]
    varying = len(results.varying)
    have = f"completed trials here: {len(finite):,}, varying parameters: {varying}"
    parallel = "" if len(finite) > 1 and varying else f"needs two completed trials and a parameter that varies; {have}"
    importances = f"needs {MIN_IMPORTANCE_TRIALS} completed trials and two parameters that vary; {have}"
    if len(finite) >= MIN_IMPORTANCE_TRIALS and varying > 1:
        same = len({trial.values for trial in finite}) == 1
        importances = "all trials have the same value: no parameter matters" if same else ""
    plots = {"plot_parallel_coordinate": parallel, "plot_param_importances": importances}
    if len(results.objectives) > 1:
        plots["plot_pareto_front"] = "" if finite else "needs a completed trial"
    return plots


def plot_optuna(results: Results, function: str) -> PlotlyFigure:
    """Return one of Optuna's plots for the page.

    Raises:
        ValueError, RuntimeError: Optuna cannot draw these trials.
    """
    from optuna import visualization

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure: PlotlyFigure = getattr(visualization, function)(
            _study(results, function), **_options(results, function)
        )
    figure.update_layout(template="none", title=None)
    if function == "plot_parallel_coordinate":
        _recolour(figure)
    elif function == "plot_pareto_front":
        # Optuna colours by the trials' numbers, with two scales; what counts is who is on the front.
        for trace in figure.data:
            best = str(trace.marker.colorbar.title.text).startswith("Best")
            trace.marker = {"color": RANKS[-1] if best else GREY, "size": 9 if best else 6}
    else:
        for trace, colour in zip(figure.data, COLOURS, strict=False):
            trace.marker.color = colour
    return figure


def draw_optuna(results: Results, function: str) -> MatplotlibFigure:
    """Return the same plot as `plot_optuna`, for a PNG."""
    _quiet_matplotlib()
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as visualization

    with warnings.catch_warnings(), pyplot.style.context("default"):
        warnings.simplefilter("ignore")
        axes = getattr(visualization, function)(_study(results, function), **_options(results, function))
        figure: MatplotlibFigure = axes.figure
        figure.set_size_inches(7.2, 4.4)
        figure.set_dpi(120)
        axes.set_title("")
        pyplot.close(figure)
    return figure


def parallel_trials(results: Results) -> list[TrialResult]:
    """Return the completed trials that are drawn in parallel coordinates: of many the best, and a sample of the others."""
    ranked = [trial for trial in results.ranked if trial.state == "COMPLETE"]
    if len(ranked) <= MAX_PARALLEL:
        return ranked
    best, others = ranked[: MAX_PARALLEL // 3], ranked[MAX_PARALLEL // 3 :]
    count = MAX_PARALLEL - len(best)
    return best + [others[int(i * len(others) / count)] for i in range(count)]


def _study(results: Results, function: str) -> Study:
    """Return the study for Optuna to draw, or one in memory with some of its trials."""
    import optuna

    whole = results.study.optuna_study
    if function != "plot_parallel_coordinate" or len(results.trials) <= MAX_PARALLEL:
        return whole
    drawn = {trial.number for trial in parallel_trials(results)}
    study = optuna.create_study(directions=whole.directions)
    study.add_trials([trial for trial in whole.get_trials(deepcopy=False) if trial.number in drawn])
    study.set_metric_names([name for name, _ in results.objectives])
    return study


def _recolour(figure: PlotlyFigure) -> None:
    """Take colours that are seen on white and on black in the place of Optuna's, which go from white to dark blue."""
    from plotly.colors import find_intermediate_color, hex_to_rgb, unlabel_rgb

    white, blue = 247.0, 8.0  # the red in them
    steps = len(RANKS) - 1
    for trace in figure.data:
        if trace.mode == "lines" and str(trace.line.color).startswith("rgb("):
            at = min(1.0, max(0.0, (white - unlabel_rgb(trace.line.color)[0]) / (white - blue))) * steps
            low = min(steps - 1, int(at))
            ends = [tuple(map(float, hex_to_rgb(RANKS[i]))) for i in (low, low + 1)]
            red, green, blue_part = find_intermediate_color(*ends, at - low)
            trace.line.color = f"rgb({red:.0f},{green:.0f},{blue_part:.0f})"
        elif trace.mode == "markers" and trace.marker.colorscale:
            trace.marker.colorscale = [[i / steps, colour] for i, colour in enumerate(RANKS)]
    for annotation in figure.layout.annotations:
        annotation.font.color = None  # the page's own


def _options(results: Results, function: str) -> dict[str, Any]:
    if function == "plot_pareto_front":
        return {"target_names": [name for name, _ in results.objectives]}
    options: dict[str, Any] = {"params": results.varying}
    if len(results.objectives) == 1:
        options["target_name"] = results.metric
    return options


# --- points -------------------------------------------------------------------------------------------------------


def _curve(trial: TrialResult, metric: str) -> Curve:
    return _clean(list(zip(*trial.curve(metric), strict=True)))


def _clean(points: list[tuple[int, float]]) -> Curve:
    """Thin out what no screen can show; what is not finite is a gap."""
    if len(points) > MAX_POINTS:
        step = (len(points) - 1) / (MAX_POINTS - 1)
        points = [points[round(i * step)] for i in range(MAX_POINTS)]
    return [epoch for epoch, _ in points], [value if math.isfinite(value) else None for _, value in points]


def _joined(curves: list[Curve]) -> tuple[list[int | None], list[float | None]]:
    """Put curves one after the other, with gaps between."""
    x: list[int | None] = []
    y: list[float | None] = []
    for epochs, values in curves:
        x += [*epochs, None]
        y += [*values, None]
    return x, y


def _band(results: Results, metric: str) -> tuple[list[int], list[float], list[float]]:
    """Return epochs, and the 10th and 90th percentile of a metric over all trials that have it there."""
    import numpy as np

    last = max(trial.last_epoch for trial in results.trials)
    wanted = set(range(1, last + 1, max(1, last // 100)))
    values: dict[int, list[float]] = {}
    for trial in results.trials:
        for epoch in wanted & trial.epochs.keys():
            value = trial.epochs[epoch].get(metric, math.nan)
            if math.isfinite(value):
                values.setdefault(epoch, []).append(value)
    epochs = sorted(values)
    quantiles = [np.quantile(values[epoch], [0.1, 0.9]) for epoch in epochs]
    return epochs, [float(low) for low, _ in quantiles], [float(high) for _, high in quantiles]


def _wants_log(values: list[float | None]) -> bool:
    """Tell whether a few large values, as of a training that went astray, would press all others flat."""
    known = sorted(value for value in values if value is not None)
    return bool(known) and known[0] > 0 and known[-1] > 30 * known[len(known) // 2]


def _published_metrics(metrics: Sequence[str], published: Published | None) -> list[str]:
    first = next(iter(published.epochs.values())) if published else {}
    return [metric for metric in metrics if metric in first]


def _published_curve(published: Published, metric: str, last: int) -> Curve:
    return _clean([(epoch, values[metric]) for epoch, values in published.epochs.items() if epoch <= last])


def _dash(metric: str) -> Literal["solid", "dash", "dot"]:
    return DASHES.get(metric.partition("_")[0], "solid")


def _in_words(metric: str) -> str:
    prefix = metric.partition("_")[0]
    return {"train": "training", "val": "validation"}.get(prefix, metric)


def _floats(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def shorten(text: str, length: int = 64) -> str:
    """Return a text that fits a legend."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
