"""What people look at when a search has ended. Reads storage only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from storage.records import Metrics
    from storage.studies import Study


def trial_table(study: Study, *, last: int = 50) -> Table:
    """Return the table of a study's trials, best objective first; of a large study only the best ones.

    Columns: parameters, state, epochs, the objective's last and best value, test accuracy, seconds, images per second.
    """
    trials, metrics = study.run_trials(), study.metrics()
    names = sorted({name for trial in trials for name in trial.params}, key=_first_seen(trials))
    columns = [
        "state",
        "epochs",
        f"last\n{study.metric}",
        f"best\n{study.metric}",
        "\ntest_accuracy",
        "seconds",
        "images/s",
    ]
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{study.name}: {len(trials)} trials", title_justify="left", pad_edge=False
    )
    for column in ("trial", *names, *columns):
        table.add_column(column, justify="left" if column == "state" else "right", vertical="bottom")
    sign = -1 if study.optuna.direction.name == "MAXIMIZE" else 1
    ranked = sorted(trials, key=lambda t: (t.value is None, sign * (t.value or 0.0), t.number))
    for trial in ranked[:last]:
        row = _row(metrics.get(trial.number, {}), study.metric, study.optuna.direction.name)
        table.add_row(
            str(trial.number),
            *(_text(trial.params.get(name, "")) for name in names),
            trial.state.name,
            *map(_text, row),
        )
    if len(ranked) > last:
        table.caption = f"and {len(ranked) - last} more"
    return table


def failures(study: Study) -> list[str]:
    """Return a line for each failed trial: its number and the reason."""
    return [
        f"trial {trial.number} failed: {trial.user_attrs.get('fail_reason', 'for an unknown reason')}"
        for trial in study.run_trials()
        if trial.state.name == "FAIL"
    ]


def is_timing(metric: str) -> bool:
    """Tell the metrics that say how fast a trial ran, and differ each time, from those that say how good it is."""
    return metric.endswith(("_seconds", "_per_second"))


def _row(epochs: Metrics, metric: str, direction: str) -> list[Any]:
    values = [values[metric] for values in epochs.values() if metric in values]
    if not values:
        return [0, "", "", "", "", ""]
    last = epochs[max(epochs)]
    seconds = sum(values.get("epoch_seconds", 0.0) for values in epochs.values())
    speeds = [values["images_per_second"] for values in epochs.values() if "images_per_second" in values]
    return [
        max(epochs),
        f"{values[-1]:.4f}",
        f"{max(values) if direction == 'MAXIMIZE' else min(values):.4f}",
        f"{last['test_accuracy']:.4f}" if "test_accuracy" in last else "",
        f"{seconds:.1f}",
        f"{sum(speeds) / len(speeds):,.0f}" if speeds else "",
    ]


def _first_seen(trials: list[Any]) -> Any:
    order: dict[str, int] = {}
    for trial in trials:
        for name in trial.params:
            order.setdefault(name, len(order))
    return lambda name: order[name]


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    from hpo.run import main

    main(["report"])
