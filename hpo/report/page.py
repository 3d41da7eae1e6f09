"""The report of a study: the table in the terminal, the page, and the Markdown file with its figures. Reads storage only."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpo.errors import SettingError
from hpo.paths import RunsDir, write_atomically
from hpo.report.formatting import format_number, format_seconds, format_value
from hpo.report.published import Published, match_published
from hpo.report.results import Results
from hpo.report.tables import trial_columns

MAX_PAGE_ROWS = 200
MAX_FAILURES = 100
AXIS_PIXELS = 120  # for each axis of parallel coordinates


def preload() -> None:
    """Import what `write_report` needs, at a time when nobody waits for it."""
    import jinja2  # noqa: F401
    import plotly.graph_objects  # noqa: F401


def write_report(results: Results, runs_dir: RunsDir) -> Path:
    """Write the page, `report.md` and its figures into a folder of the study's own; return the page.

    Raises:
        SettingError: the folder cannot be written.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    from hpo.report.figures import to_png

    folder = runs_dir.report(results.study.name)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hpo.report"),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"cell": _markdown_cell, "duration": format_seconds, "number": format_number}
    content = _content(results)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in content["figures"]:
            write_atomically(folder / f"{figure['name']}.png", to_png(figure.pop("drawn")))
        markdown = environment.get_template("report.md").render(content)
        write_atomically(folder / "report.md", markdown.encode())
        page = environment.get_template("report.html").render(content, plotlyjs=get_plotlyjs())
        write_atomically(folder / "index.html", page.encode())
    except OSError as error:
        raise SettingError(
            f"cannot write the report to {folder}: {error.strerror}. Make it a writable folder, then `hpo report "
            f"{results.study.name}`"
        ) from None
    return folder / "index.html"


def _content(results: Results) -> dict[str, Any]:
    """Return what the templates show: texts, tables, figures."""
    from storage.studies import state_of

    published = match_published(results)
    figures, left_out = _figures(results, published)
    failed = [trial for trial in results.trials if trial.state == "FAIL"]
    fixed = {name: _first(results, name) for name in results.params if name not in results.varying}
    columns = trial_columns(results)
    shown = results.ranked[:MAX_PAGE_ROWS]
    return {
        "name": results.study.name,
        "description": results.settings.get("description", ""),
        "state": state_of(results.attrs, results.counts, results.runs),
        "made": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "facts": _facts(results),
        "figures": figures,
        "left_out": left_out,
        "columns": [name for name, _ in columns],
        "rows": [[cell(trial) for _, cell in columns] for trial in shown],
        "has_best": results.best is not None and len(results.objectives) == 1,
        "more_rows": len(results.trials) - len(shown),
        "fixed": ", ".join(f"{name} {format_value(value)}" for name, value in fixed.items()),
        "published": _published_rows(results, published),
        "held_out": results.settings.get("data", {}).get("val_samples"),
        "failed": [(trial, results.label(trial)) for trial in failed[:MAX_FAILURES]],
        "more_failed": max(0, len(failed) - MAX_FAILURES),
        "cost": _cost(results),
        "reproduce": _reproduce(results),
        "settings": _settings_text(results.settings),
    }


def _first(results: Results, name: str) -> Any:
    return next(trial.params[name] for trial in results.trials if name in trial.params)


def _facts(results: Results) -> list[tuple[str, str, str]]:
    """Return (what, its number, a remark) for the head of the page."""
    facts = []
    best = results.best
    if best is not None and len(results.objectives) == 1:
        facts.append((f"best {results.metric}", format_number(best.values[0]), results.label(best)))
        if "test_accuracy" in best.last:
            facts.append(
                ("its test_accuracy", format_number(best.last["test_accuracy"]), "scored once, after the last epoch")
            )
    elif results.front:
        facts.append(("on the Pareto front", f"{len(results.front):,}", "trials that no other one beats in everything"))
    states = ", ".join(f"{count:,} {state}" for state, count in results.counts.most_common())
    facts.append(("trials", f"{len(results.trials):,}", states or "none yet"))
    remark = "with a run at work" if results.runs else "of all trials together"
    facts.append(("time", format_seconds(results.wall_seconds) or "0s", remark))
    return facts


def _figures(
    results: Results, published: Mapping[int, Published]
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Return the figures, and (title, reason) of those that would mean nothing."""
    from hpo.report import figures

    selection = figures.select_trials(results)
    made: list[dict[str, Any]] = []
    left_out: list[tuple[str, str]] = []
    families = figures.name_families(results)
    if len(results.curve_families) > len(families):
        left_out.append(
            ("Further curves", f"of {len(results.curve_families)} metrics, those of {len(families)} are drawn")
        )
    for family in families:
        texts = [figures.describe_styles(family.metrics, published), selection.text]
        made.append(
            {
                "name": family.name,
                "title": family.title,
                "caption": " ".join(filter(None, texts)),
                "plotly": figures.plot_curves(results, family.metrics, selection, published).to_json(),
                "drawn": figures.draw_families(results, [family], selection, published),
                "is_curve": True,
                "min_width": 0,
            }
        )
    if not families:
        left_out.append(("Curves over epochs", "no epoch has been reported yet"))
    titles = {
        "plot_parallel_coordinate": ("parallel_coordinates", "Parallel coordinates"),
        "plot_param_importances": ("importances", "Importance of the parameters"),
        "plot_pareto_front": ("pareto_front", "Pareto front"),
    }
    captions = {
        "plot_parallel_coordinate": _parallel_caption(results),
        "plot_param_importances": "What the best trials have in common, by Optuna's PED-ANOVA: it compares the best "
        "tenth of the completed trials with all of them.",
        "plot_pareto_front": "In orange the trials that no other one beats in every objective.",
    }
    for function, reason in figures.optuna_plots(results).items():
        name, title = titles[function]
        try:
            if not reason:
                axes = len(results.varying) + len(results.objectives)
                made.append(
                    {
                        "name": name,
                        "title": title,
                        "caption": captions[function],
                        "plotly": figures.plot_optuna(results, function).to_json(),
                        "drawn": figures.draw_optuna(results, function),
                        "is_curve": False,
                        "min_width": AXIS_PIXELS * axes if function == "plot_parallel_coordinate" else 0,
                    }
                )
        except (ValueError, RuntimeError, TypeError) as error:  # trials from elsewhere that Optuna's plot cannot take
            reason = f"Optuna cannot draw it: {error}"
        if reason:
            left_out.append((title, reason))
    return made, left_out


def _parallel_caption(results: Results) -> str:
    from hpo.report.figures import MAX_PARALLEL, parallel_trials

    drawn, completed = len(parallel_trials(results)), results.counts["COMPLETE"]
    text = "A line is a completed trial, from its result to its parameters."
    if drawn < completed:
        best = MAX_PARALLEL // 3
        text += f" {drawn} of {completed:,} are drawn: the best {best}, and others evenly spread over the ranks."
    return text


def _published_rows(results: Results, published: Mapping[int, Published]) -> list[dict[str, Any]]:
    """Return a row for each trial with a published twin, both at the trial's last epoch."""
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


def _cost(results: Results) -> list[tuple[str, str]]:
    images = sum(trial.images for trial in results.trials)
    seconds = sum(trial.seconds for trial in results.trials)
    devices = ", ".join(f"{name} ({count:,} trials)" for name, count in results.devices.most_common(5))
    return [
        (
            "wall-clock time with a run at work",
            format_seconds(results.wall_seconds if results.runs else None) or "none",
        ),
        ("time of all trials together", f"{format_seconds(seconds)} ({seconds:,.1f} s)"),
        ("GPU-hours", f"{results.gpu_hours:.2f}"),
        ("images trained on, each once an epoch", f"{images:,.0f}" if images else "not told by the trainable"),
        ("epochs", f"{sum(len(trial.epochs) for trial in results.trials):,}"),
        ("devices", devices or "not known"),
    ]


def _reproduce(results: Results) -> list[tuple[str, str]]:
    """Return what is needed to run the study again: (what, its text)."""
    said: Sequence[Mapping[str, Any]] = [run.provenance for run in results.runs]
    last = said[-1] if said else {}
    commands = list(dict.fromkeys(str(each["command"]) for each in said if "command" in each))
    pairs = [("command", command) for command in commands[-5:]]
    pairs += [("a trial again", f"hpo replay {results.study.name} NUMBER")] if said else []
    pairs += [(name, str(last[name])) for name in ("code", "python", "platform", "data_sha256") if last.get(name)]
    packages = last.get("packages") or {}
    pairs += [("packages", ", ".join(f"{name} {version}" for name, version in packages.items()))] if packages else []
    pairs += [("seed", str(results.settings["seed"]))] if "seed" in results.settings else []
    versions = {(each.get("code"), str(each.get("packages"))) for each in said}
    pairs += [("note", f"earlier runs used {len(versions) - 1} other versions")] if len(versions) > 1 else []
    return [*pairs, ("storage", results.study.database.url)]


def _settings_text(settings: Mapping[str, Any]) -> str:
    import yaml

    kept = {name: value for name, value in settings.items() if name != "name"}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True) if kept else ""


def _markdown_cell(text: object) -> str:
    """Return a text that stays in its cell of a Markdown table, whatever it holds."""
    escaped = re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", str(text))
    return " ".join(escaped.split())
