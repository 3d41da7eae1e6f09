"""Optuna's own plots: parallel coordinates, parameter importances, the Pareto front. Drawn with plotly and matplotlib."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

from hpo.report.curves import COLOURS, GREY
from hpo.report.results import Results
from hpo.report.trials import TrialResult
from storage.optuna_internals import show_trials

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure
    from optuna import Study
    from plotly.graph_objects import Figure as PlotlyFigure

MAX_PARALLEL = 300  # Optuna draws one trace per trial
MAX_AXES = 3  # of the Pareto front
MAX_FRONT = 1000  # trials in it; the page holds the parameters of each
MIN_IMPORTANCE_TRIALS = 20  # PED-ANOVA compares the best tenth with all trials: two with twenty
RANK_COLOURS = ("#94a3b8", "#7aa5c9", "#22a6c9", "#e0912f", "#f2661f")  # worst to best, on white and on black


def choose_plots(results: Results) -> dict[str, str]:
    """Return {function of optuna.visualization: why it cannot be drawn, or empty}, in their order on the page."""
    finite = [t for t in results.trials if t.state == "COMPLETE" and t.values and all(map(math.isfinite, t.values))]
    varying = len(results.varying_params)
    have = f"this study has {len(finite):,} completed trials and {varying} varying parameters"
    parallel = "" if len(finite) > 1 and varying else f"needs two completed trials and a varying parameter; {have}"
    importances = f"needs {MIN_IMPORTANCE_TRIALS} completed trials and two varying parameters; {have}"
    if len(finite) >= MIN_IMPORTANCE_TRIALS and varying > 1:
        same = len({trial.values for trial in finite}) == 1
        importances = "all trials have the same value, so no parameter matters" if same else ""
    plots = {"plot_parallel_coordinate": parallel, "plot_param_importances": importances}
    if len(results.objectives) > 1:
        is_drawn = len(results.objectives) <= MAX_AXES
        reason = "" if finite else "needs a completed trial"
        plots["plot_pareto_front"] = reason if is_drawn else f"Optuna draws at most {MAX_AXES} objectives"
    return plots


def plot(results: Results, function: str) -> PlotlyFigure:
    """Return one of Optuna's plots for the page.

    Args:
        results: the study.
        function: a function of `optuna.visualization`, see `choose_plots`.

    Raises:
        ValueError, RuntimeError, TypeError: Optuna cannot draw these trials.
    """
    from optuna import visualization

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study, options = _study(results, function), _options(results, function)
        figure: PlotlyFigure = getattr(visualization, function)(study, **options)
    figure.update_layout(template="none", title=None)
    if function == "plot_parallel_coordinate":
        _recolour(figure)
    elif function == "plot_pareto_front":
        # Optuna colours by trial number, on two scales. Colour by membership of the front instead.
        for trace in figure.data:
            best = str(trace.marker.colorbar.title.text).startswith("Best")
            trace.marker = {"color": RANK_COLOURS[-1] if best else GREY, "size": 9 if best else 6}
    else:
        for trace, colour in zip(figure.data, COLOURS, strict=False):
            trace.marker.color = colour
    return figure


def draw(results: Results, function: str) -> MatplotlibFigure:
    """Return the same plot as `plot`, for a PNG file."""
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
        if function == "plot_pareto_front":  # the colours of the page
            for points in axes.collections:
                points.set_color(RANK_COLOURS[-1] if str(points.get_label()).startswith("Best") else GREY)
            axes.legend()
        pyplot.close(figure)
    return figure


def parallel_trials(results: Results) -> list[TrialResult]:
    """Return the completed trials to draw as parallel coordinates: of a large study, the best and a sample of the others."""
    return _sample(results, MAX_PARALLEL)


def front_trials(results: Results) -> list[TrialResult]:
    """Return the completed trials to draw with the Pareto front: of a large study, the best and a sample of the others."""
    return _sample(results, MAX_FRONT)


def _sample(results: Results, most: int) -> list[TrialResult]:
    ranked = [trial for trial in results.ranked if trial.state == "COMPLETE"]
    if len(ranked) <= most:
        return ranked
    best, others = ranked[: most // 3], ranked[most // 3 :]
    count = most - len(best)
    return best + [others[int(i * len(others) / count)] for i in range(count)]


def _study(results: Results, function: str) -> Study:
    """Return the study; or one in memory, with a sample of the trials of a large study for parallel coordinates, and
    without the trials of earlier studies that only the sampler knows for the Pareto front.
    """
    import optuna

    whole = results.study.optuna_study
    if function == "plot_pareto_front":
        drawn = {trial.number for trial in front_trials(results)}
    elif function == "plot_parallel_coordinate" and len(results.trials) > MAX_PARALLEL:
        drawn = {trial.number for trial in parallel_trials(results)}
    else:
        return whole
    study = optuna.create_study(directions=whole.directions)
    study.set_metric_names([name for name, _ in results.objectives])
    # Not added, for they would get other numbers. And not of `whole`: after a search, it shows what the sampler sees.
    trials = [trial for trial in results.study.trials() if trial.number in drawn]
    show_trials(study, lambda states: [trial for trial in trials if states is None or trial.state in states])
    return study


def _options(results: Results, function: str) -> dict[str, Any]:
    if function == "plot_pareto_front":
        return {"target_names": [name for name, _ in results.objectives]}
    options: dict[str, Any] = {"params": results.varying_params}
    options["target_name"] = results.metric
    if len(results.objectives) > 1:  # Optuna draws one
        options["target"] = lambda trial: trial.values[0]
    return options


def _recolour(figure: PlotlyFigure) -> None:
    """Replace Optuna's colours, from white to dark blue, by colours that are visible on white and on black."""
    from plotly.colors import find_intermediate_color, hex_to_rgb, unlabel_rgb

    white, blue = 247.0, 8.0  # their red components
    steps = len(RANK_COLOURS) - 1
    for trace in figure.data:
        if trace.mode == "lines" and str(trace.line.color).startswith("rgb("):
            at = min(1.0, max(0.0, (white - unlabel_rgb(trace.line.color)[0]) / (white - blue))) * steps
            low = min(steps - 1, int(at))
            ends = [tuple(map(float, hex_to_rgb(RANK_COLOURS[i]))) for i in (low, low + 1)]
            red, green, blue_part = find_intermediate_color(*ends, at - low)
            trace.line.color = f"rgb({red:.0f},{green:.0f},{blue_part:.0f})"
        elif trace.mode == "markers" and trace.marker.colorscale:
            trace.marker.colorscale = [[i / steps, colour] for i, colour in enumerate(RANK_COLOURS)]
    for annotation in figure.layout.annotations:
        annotation.font.color = None  # inherited from the page
