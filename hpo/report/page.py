"""Write the report of a study: an HTML page, and a Markdown file with PNG figures.

It shows `Results`, and reads nothing else but the progress of earlier studies, see `comparison_page`.
"""

from __future__ import annotations

import datetime
import io
import secrets
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import SettingError
from hpo.paths import RunsDir, write_atomically
from hpo.report import curves, optuna_plots, plotly_figures, png_figures
from hpo.report.comparison_page import compare_with_ancestors
from hpo.report.formatting import describe_seeds, format_device_time, format_mean, format_params, format_seconds
from hpo.report.published import Published, describe_images, match_published
from hpo.report.results import Results
from hpo.report.tables import describe_schedule, describe_ties, trial_columns
from hpo.report.templating import PageFigure, curve_page_figure, environment
from hpo.space.sections import Budget
from storage.study import settings_of

if TYPE_CHECKING:
    pass

MAX_PAGE_ROWS = 200
MAX_FAILURES = 100
AXIS_PIXELS = 120  # per axis of the parallel coordinates
OPTUNA_TITLES = {
    "plot_parallel_coordinate": ("parallel_coordinates", "Parallel coordinates"),
    "plot_param_importances": ("importances", "Parameter importances"),
    "plot_pareto_front": ("pareto_front", "Pareto front"),
}


def preload() -> None:
    """Import the libraries that `write_report` needs. Takes a second; call it on a background thread while trials run."""
    from matplotlib.figure import Figure
    from optuna.visualization import plot_parallel_coordinate
    from optuna.visualization.matplotlib import plot_parallel_coordinate as draw_parallel_coordinate
    from plotly import graph_objects, offline

    _ = plot_parallel_coordinate, draw_parallel_coordinate, offline, environment(), _format_settings({"": 0})
    # These libraries import most of their parts on first use, and matplotlib also reads its font cache.
    png_figures.to_png(Figure(figsize=(1, 1)))
    line = {"line": {"width": 1}, "marker": {"colorbar": {"title": {"text": ""}}}, "mode": "lines"}
    axes = {"annotations": [{"font": {"size": 1}}], "shapes": [{"line": {"width": 1}}], "xaxis": {}, "yaxis": {}}
    graph_objects.Figure([{"type": "scatter", **line}], {"template": "none", **axes}).to_json()


def write_report(results: Results, runs_dir: RunsDir) -> Path:
    """Write the report of a study: `index.html`, `report.md` and its PNG figures. An earlier report is replaced.

    Args:
        results: the study, with its epochs.
        runs_dir: where the folder of the report is created.

    Returns:
        The path of the page. It needs no network and no other file.

    Raises:
        SettingError: the folder cannot be written.
    """
    from plotly.offline import get_plotlyjs

    folder, templates, content = runs_dir.report(results.study.name), environment(), _content(results)
    markdown = templates.get_template("report.md").render(content)
    # Only our own scripts run, even if a text got into the page as HTML.
    nonce = secrets.token_urlsafe(16)
    page = templates.get_template("report.html").render(content, plotlyjs=get_plotlyjs(), nonce=nonce)
    drawn = [*content["figures"], *(content["ancestors"].figures if content["ancestors"] else [])]
    files = {f"{figure.name}.png": figure.png for figure in drawn}
    files |= {"report.md": markdown.encode(), "index.html": page.encode()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomically(folder / name, text)
    except OSError as error:
        raise SettingError(
            f"cannot write the report to {folder}: {error.strerror}. Make the folder writable, then run `hpo report "
            f"{shlex.quote(results.name)}`"
        ) from None
    return folder / "index.html"


def _content(results: Results) -> dict[str, Any]:
    """Return the variables of the templates."""
    published = match_published(results)
    figures, left_out = _figures(results, published)
    failed = [trial for trial in results.trials if trial.state == "FAIL"]
    fixed = {name: _first(results, name) for name in results.param_names if name not in results.varying_params}
    columns = trial_columns(results)
    shown = results.ranked[:MAX_PAGE_ROWS]
    continued = Counter(trial.continued_from.rpartition(" #")[0] for trial in results.trials if trial.continued_from)
    return {
        "name": results.name,
        "description": results.space.description if results.space else "",
        "state": results.state,
        "made": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "facts": _facts(results),
        "figures": figures,
        "left_out": left_out,
        "columns": [name for name, _ in columns],
        "rows": [[cell(trial) for _, cell in columns] for trial in shown],
        "has_best": results.best is not None and len(results.objectives) == 1,
        "more_rows": len(results.trials) - len(shown),
        "fixed": format_params(fixed),
        "published": _published_rows(results, published),
        "published_images": describe_images(results.space) if results.space else "",
        "ancestors": compare_with_ancestors(results),
        # Trials of this database alone are continued.
        "sources": [
            (each, _reasons(each.refused), 0 if each.storage else continued[each.study]) for each in results.sources
        ],
        "has_continued": bool(continued),
        "failed": [(trial, results.label(trial)) for trial in failed[:MAX_FAILURES]],
        "more_failed": max(0, len(failed) - MAX_FAILURES),
        "cost": _cost(results),
        "reproduce": _reproduce(results),
        "settings": _format_settings(settings_of(results.attrs)),
    }


def _first(results: Results, name: str) -> Any:
    return next(trial.params[name] for trial in results.trials if name in trial.params)


def _facts(results: Results) -> list[tuple[str, str, str]]:
    """Return (what, its number, a remark) for the top of the page."""
    facts = []
    best = results.best
    if best is not None and len(results.objectives) == 1:
        shown = format_mean(best.values[0], best.standard_error(results.metric))
        remarks = [results.label(best), describe_ties(results), describe_schedule(results, best)]
        facts.append((f"best {results.metric}", shown, "; ".join(filter(None, remarks))))
        if "test_accuracy" in best.last:
            remark = "scored once, after the last epoch"
            shown = format_mean(best.last["test_accuracy"], best.standard_error("test_accuracy"))
            facts.append(("its test_accuracy", shown, remark))
    elif results.pareto_front:
        remark = "completed trials that no other one dominates: is better in one objective, and worse in none"
        facts.append(("on the Pareto front", f"{len(results.pareto_front):,}", remark))
    states = ", ".join(f"{count:,} {state}" for state, count in results.counts.most_common())
    facts.append(("trials", f"{len(results.trials):,}", states or "none yet"))
    remark = "with at least one run active" if results.runs else "sum over all trials"
    facts.append(("time", format_seconds(results.wall_seconds) or "0s", remark))
    return facts


# --- figures ----------------------------------------------------------------------------------------------------------


def _figures(results: Results, published: Mapping[int, Published]) -> tuple[list[PageFigure], list[tuple[str, str]]]:
    """Return the figures, and (title, reason) of those that are left out."""
    made, left_out = _curve_figures(results, published)
    for function, reason in optuna_plots.choose_plots(results).items():
        try:
            if not reason:
                made.append(_optuna_figure(results, function))
        except (ValueError, RuntimeError, TypeError) as error:  # another program's trials that Optuna cannot plot
            reason = f"Optuna cannot draw it: {error}"
        if reason:
            left_out.append((OPTUNA_TITLES[function][1], reason))
    return made, left_out


def _curve_figures(
    results: Results, published: Mapping[int, Published]
) -> tuple[list[PageFigure], list[tuple[str, str]]]:
    families, selection = curves.name_families(results), curves.select_trials(results)
    made: list[PageFigure] = []
    for family in families:
        texts = [curves.describe_styles(family.metrics, published), selection.text]
        figure = curves.build_figure(results, family, selection, published)
        made.append(curve_page_figure(family.name, figure, " ".join(filter(None, texts))))
    if not families:
        return made, [("Curves over epochs", "no epoch has been reported yet")]
    if len(results.curve_families) > len(families):
        return made, [("More curves", f"{len(families)} of {len(results.curve_families)} metrics are drawn")]
    return made, []


def _optuna_figure(results: Results, function: str) -> PageFigure:
    name, title = OPTUNA_TITLES[function]
    captions = {
        "plot_parallel_coordinate": _parallel_caption(results),
        "plot_param_importances": "Computed by Optuna's PED-ANOVA, which compares the best tenth of the completed trials "
        f"with all of them{'' if len(results.objectives) == 1 else f', by {results.metric}'}.",
        "plot_pareto_front": _front_caption(results),
    }
    axes = len(results.varying_params) + len(results.objectives)
    return PageFigure(
        name,
        title,
        captions[function],
        plotly_figures.dump(plotly_figures.escape_texts(optuna_plots.plot(results, function).to_plotly_json())),
        png_figures.to_png(optuna_plots.draw(results, function)),
        min_width=AXIS_PIXELS * axes if function == "plot_parallel_coordinate" else 0,
    )


def _front_caption(results: Results) -> str:
    drawn, completed = len(optuna_plots.front_trials(results)), results.counts["COMPLETE"]
    text = "Orange: the Pareto front, the completed trials that no other one dominates."
    return text if drawn == completed else f"{text} {drawn:,} of {completed:,} are drawn: the best, and an even sample."


def _parallel_caption(results: Results) -> str:
    drawn, completed = len(optuna_plots.parallel_trials(results)), results.counts["COMPLETE"]
    what = "result" if len(results.objectives) == 1 else results.metric
    text = f"Each line is a completed trial, from its {what} to its parameters."
    if drawn < completed:
        best = optuna_plots.MAX_PARALLEL // 3
        text += f" {drawn} of {completed:,} are drawn: the best {best}, and an even sample of the others by rank."
    return text


# --- tables and texts -------------------------------------------------------------------------------------------------


def _published_rows(results: Results, published: Mapping[int, Published]) -> list[dict[str, Any]]:
    """Return a row for each trial with published results, both at the trial's last epoch."""
    rows = []
    for trial in results.trials:
        twin = published.get(trial.number)
        if twin is None or trial.last_epoch not in twin.epochs:
            continue
        theirs = twin.epochs[trial.last_epoch]
        is_whole = trial.last_epoch == max(twin.epochs)
        rows.append(
            {
                "label": results.label(trial),
                "epoch": trial.last_epoch,
                "train_loss": (trial.last.get("train_loss"), theirs["train_loss"]),
                "train_accuracy": (trial.last.get("train_accuracy"), theirs["train_accuracy"]),
                "test_accuracy": (trial.last.get("test_accuracy"), twin.test_accuracy if is_whole else None),
                "seconds": (trial.seconds, twin.seconds if is_whole else None),
            }
        )
    return rows


def _reasons(refused: Mapping[str, int]) -> str:
    most_first = sorted(refused.items(), key=lambda item: -item[1])
    return "; ".join(f"{reason} ({count:,})" for reason, count in most_first)


def _cost(results: Results) -> list[tuple[str, str]]:
    images = sum(trial.images for trial in results.trained) * (results.space.replicates if results.space else 1)
    seconds = sum(trial.seconds for trial in results.trained)
    devices = ", ".join(f"{name} ({count:,} trials)" for name, count in results.devices.most_common(5))
    wall = format_seconds(results.wall_seconds if results.runs else None)
    return [
        ("wall-clock time with at least one run active", wall or "none"),
        (
            "sum over all trials"
            if len(results.trained) == len(results.trials)
            else "sum over the trials that it trained",
            f"{format_seconds(seconds)} ({seconds:,.1f} s)",
        ),
        ("GPU-hours", f"{results.gpu_hours:.2f}"),
        (
            "device-hours, of GPUs or of trials on the CPU",
            format_device_time(results.space.budget if results.space else Budget(), results.device_seconds),
        ),
        ("training images, counted once per epoch", f"{images:,.0f}" if images else "not reported by the trainable"),
        ("epochs", f"{sum(len(trial.epochs) for trial in results.trained):,}"),
        ("devices", devices or "unknown"),
    ]


def _reproduce(results: Results) -> list[tuple[str, str]]:
    """Return what is needed to run the study again: (what, its text)."""
    provenances: Sequence[Mapping[str, Any]] = [run.provenance for run in results.runs]
    last = provenances[-1] if provenances else {}
    commands = list(dict.fromkeys(str(each["command"]) for each in provenances if "command" in each))
    packages = last.get("packages")
    other_versions = len({(each.get("code"), str(each.get("packages"))) for each in provenances}) - 1
    pairs = [
        *(("command", command) for command in commands[-5:]),
        ("one trial", f"hpo replay {shlex.quote(results.name)} NUMBER" if provenances else None),
        *((name, last.get(name)) for name in ("code", "python", "platform", "data_sha256")),
        ("packages", _join(packages) if isinstance(packages, dict) else packages),
        ("seeds", describe_seeds(results.space) if results.space else None),
        ("note", f"earlier runs used {other_versions} other versions" if other_versions > 0 else None),
        ("storage", results.study.database.url),
    ]
    return [(name, str(text)) for name, text in pairs if text]


def _join(versions: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _format_settings(settings: Mapping[str, Any]) -> str:
    """Return stored settings as YAML."""
    from ruamel.yaml import YAML

    kept = {name: value for name, value in settings.items() if name != "name"}
    if not kept:
        return ""
    yaml, text = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # typed by its default, None
    yaml.dump(kept, text)
    return text.getvalue()
