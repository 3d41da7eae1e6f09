"""Figures: their content, and how plotly and matplotlib draw it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from hpo.report import curves, optuna_plots, plotly_figures, png_figures
from hpo.report.curves import CurveFigure, Family, Line
from hpo.report.published import match_published
from hpo.report.results import Results
from hpo.report.trials import TrialResult
from storage.database import Database
from tests.report.studies import HOSTILE, add_trial, optuna_study, read


def build(results: Results, *metrics: str) -> CurveFigure:
    selection = curves.select_trials(results)
    return curves.build_figure(results, Family("f", "F", list(metrics)), selection, match_published(results))


def many_trials(results: Results, count: int) -> Results:
    """Return results of made-up trials: the higher the number, the higher every value."""
    trials = [
        TrialResult(n, {"x": n}, "COMPLETE", (n / count,), {e: {"value": n * e / count} for e in range(1, 4)})
        for n in range(count)
    ]
    return replace(results, objectives=[("value", True)], trials=trials)


# --- which trials and metrics are drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "coloured", "grey", "text"),
    [
        (3, 3, 0, ""),
        (40, 10, 30, "The best 10 of 40 trials are coloured, the other 30 are grey."),
        (
            1000,
            10,
            90,
            "The best 10 of 1,000 trials are coloured, 90 of the other 990, an even sample by rank, are grey. "
            "The band shows the middle 80 % of all trials.",
        ),
    ],
)
def test_only_the_best_trials_of_a_large_study_are_coloured(
    grid_results: Results, count: int, coloured: int, grey: int, text: str
) -> None:
    selection = curves.select_trials(many_trials(grid_results, count))
    assert (len(selection.coloured), len(selection.grey), selection.total) == (coloured, grey, count)
    assert selection.text == text
    assert len({colour for _, colour in selection.coloured}) == coloured


def test_a_large_study_has_one_grey_line_and_a_band(grid_results: Results) -> None:
    figure = build(many_trials(grid_results, 1000), "value")
    (band,) = figure.bands
    assert band.x == [1, 2, 3]
    assert [band.low[2], band.high[2]] == pytest.approx([0.3, 2.7], abs=0.01)
    grey, *coloured = figure.lines
    assert (grey.label, grey.x.count(None), len(grey.x)) == ("90 others, value", 90, 90 * 4)
    assert [line.label for line in coloured][:2] == ["#999 x 999", "#998 x 998"]


def test_the_lines_of_a_trial_share_colour_and_group(grid_results: Results) -> None:
    figure = build(grid_results, "val_accuracy", "train_accuracy")
    assert [(line.label, line.dash, line.in_legend) for line in figure.lines[:3]] == [
        ("#0 batch_size 64", "solid", True),
        ("#0 batch_size 64", "dash", False),
        ("published", "dot", False),
    ]
    for line in figure.lines[:3]:
        assert (line.colour, line.group) == (curves.COLOURS[0], "0")
    assert [len(line.x) for line in figure.lines] == [4] * 9, "published curves end where the study's end"
    assert (figure.last_epoch, figure.bands, figure.is_log) == (4, [], False)


def test_captions_name_the_line_styles(grid_results: Results) -> None:
    published = match_published(grid_results)
    assert curves.describe_styles(["val_loss", "train_loss"], published) == (
        "Solid: validation. Dashed: training. Dotted: published, training."
    )
    assert curves.describe_styles(["val_loss"], {}) == ""


def test_values_that_are_not_finite_are_gaps(database: Database) -> None:
    study = optuna_study(database)
    add_trial(study, "COMPLETE", [1.0], intermediate_values={1: 0.5, 2: math.nan, 3: math.inf, 4: 1.0})
    (line,) = build(read(database), "value").lines
    assert line.y == [0.5, None, None, 1.0]


def test_a_long_curve_is_thinned_out_to_its_ends(grid_results: Results) -> None:
    trial = TrialResult(0, {}, "COMPLETE", (1.0,), {epoch: {"value": 1.0} for epoch in range(1, 5001)})
    (line,) = build(replace(grid_results, objectives=[("value", True)], trials=[trial]), "value").lines
    assert (len(line.x), line.x[0], line.x[-1]) == (curves.MAX_POINTS, 1, 5000)


def test_a_diverged_curve_makes_the_axis_logarithmic(database: Database) -> None:
    study = optuna_study(database)
    add_trial(study, "COMPLETE", [1.0], intermediate_values={epoch: 1 / epoch for epoch in range(1, 20)})
    add_trial(study, "COMPLETE", [1e6], intermediate_values={epoch: 10.0**epoch for epoch in range(1, 7)})
    figure = build(read(database), "value")
    assert figure.is_log
    assert plotly_figures.to_plotly(figure)["layout"]["yaxis"]["type"] == "log"
    assert png_figures.draw_curves([figure]).axes[0].get_yscale() == "log"


# --- by plotly and by matplotlib --------------------------------------------------------------------------------------


def test_both_renderers_draw_every_line_and_band(grid_results: Results) -> None:
    figure = build(many_trials(grid_results, 200), "value")
    traces = plotly_figures.to_plotly(figure)["data"][2:]  # after the two edges of the band
    axes = png_figures.draw_curves([figure]).axes[0]
    assert len(axes.collections) == len(figure.bands) == 1
    assert len(traces) == len(axes.lines) == len(figure.lines) == 11
    for line, trace, drawn in zip(figure.lines, traces, axes.lines, strict=True):
        assert (trace["x"], trace["y"], trace["name"]) == (line.x, line.y, line.label)
        assert [None if math.isnan(y) else y for y in np.asarray(drawn.get_ydata()).tolist()] == line.y
        assert trace["line"]["color"] == to_hex(drawn.get_color()) == line.colour
        assert drawn.get_label() == line.label


def test_a_single_epoch_is_drawn_as_a_marker(database: Database) -> None:
    line = Line([1], [0.5], "#ff0000", "one", marker="circle-open")
    figure = CurveFigure("title", [line], [], 1, is_log=False)
    (trace,) = plotly_figures.to_plotly(figure)["data"]
    assert (trace["mode"], trace["marker"]["symbol"]) == ("markers", "circle-open")
    assert png_figures.draw_curves([figure]).axes[0].lines[0].get_marker() == "o"


def test_names_are_escaped_in_the_page() -> None:
    line = Line([1, 2], [0.5, 0.6], "#ff0000", HOSTILE, hover=(HOSTILE, "metric"))
    figure = CurveFigure(HOSTILE, [line], [], 2, is_log=False)
    text = plotly_figures.to_json(figure)
    assert "<" not in text
    assert "/script" not in text
    (trace,) = json.loads(text)["data"]
    assert trace["name"].startswith("&lt;script&gt;")
    assert trace["hovertemplate"].startswith("&lt;script&gt;")


def test_plotly_accepts_every_attribute(grid_results: Results) -> None:
    figure = build(grid_results, "val_loss", "train_loss")
    drawn = plotly_figures.to_graph_object(figure)
    assert [dict(trace.to_plotly_json()) for trace in drawn.data] == plotly_figures.to_plotly(figure)["data"]
    assert drawn.layout.template.layout.colorway is None, "no theme of plotly"


def test_figures_in_one_png_are_one_below_the_other(grid_results: Results) -> None:
    figure = build(grid_results, "val_loss")
    drawn = png_figures.draw_curves([figure, figure])
    upper, lower = (axes.get_position() for axes in drawn.axes)
    assert lower.y1 < upper.y0
    assert png_figures.to_png(drawn).startswith(b"\x89PNG")


def test_dollar_signs_in_names_are_no_mathematics() -> None:
    line = Line([1, 2], [0.5, 0.6], "#ff0000", "$\\frac$")
    figure = CurveFigure("$x", [line, replace(line, label="other")], [], 2, is_log=False)
    assert png_figures.to_png(png_figures.draw_curves([figure])).startswith(b"\x89PNG")


# --- Optuna's own plots -----------------------------------------------------------------------------------------------


def test_a_plot_that_would_mean_nothing_is_left_out_with_a_reason(grid_results: Results) -> None:
    plots = optuna_plots.choose_plots(grid_results)
    assert plots["plot_parallel_coordinate"] == ""
    assert plots["plot_param_importances"].startswith("needs 20 completed trials and two varying parameters")


@pytest.mark.parametrize("is_constant", [False, True])
def test_importances_need_results_that_differ(grid_results: Results, is_constant: bool) -> None:
    results = many_trials(grid_results, 20)
    trials = [
        replace(trial, params={"x": trial.number, "y": -trial.number}, values=(1.0,) if is_constant else trial.values)
        for trial in results.trials
    ]
    reason = optuna_plots.choose_plots(replace(results, trials=trials))["plot_param_importances"]
    assert reason == ("all trials have the same value, so no parameter matters" if is_constant else "")


def test_parallel_coordinates_of_a_large_study_show_the_best_and_a_sample(grid_results: Results) -> None:
    drawn = optuna_plots.parallel_trials(many_trials(grid_results, 1000))
    assert len({trial.number for trial in drawn}) == optuna_plots.MAX_PARALLEL
    assert [trial.number for trial in drawn[:100]] == list(range(999, 899, -1))


def test_the_pareto_front_is_coloured(database: Database) -> None:
    study = optuna_study(database, directions=("maximize", "minimize"))
    for accuracy, seconds in ((0.9, 10.0), (0.8, 5.0), (0.7, 7.0)):
        add_trial(study, "COMPLETE", [accuracy, seconds])
    figure = optuna_plots.plot(read(database), "plot_pareto_front")
    colours: dict[str, Any] = {trace.marker.color: list(trace.x) for trace in figure.data}
    assert colours == {curves.GREY: [0.7], optuna_plots.RANK_COLOURS[-1]: [0.9, 0.8]}
