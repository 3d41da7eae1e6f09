"""Describe a planned search: how trials share the machine, how long they take, which configurations are left."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from hpo.report.formatting import describe_seeds, format_amount, format_command, format_device_time, format_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hpo.search.estimate import SearchEstimate
    from hpo.search.slots import Slots
    from hpo.space.model import Space

MAX_ROWS = 50  # of a listed grid
LONG_SECONDS = 900.0  # a longer search on the CPU gets a hint how to shorten it


def plan_lines(space: Space, slots: Slots, estimate: SearchEstimate | None, device_seconds: float = 0.0) -> list[str]:
    """Return how trials share the machine, what they leave on disk and how long they take, one sentence per line.

    Args:
        space: the search.
        slots: how many trials run at a time, and on what.
        estimate: as measured; None where nothing was.
        device_seconds: what the study has used already.
    """
    lines = [describe_slots(slots, estimate)]
    if space.replicates > 1:
        lines.append(
            f"Trains each configuration {space.replicates} times, {describe_seeds(space)}: its value is their mean."
        )
    if space.sampler_reason:
        lines.append(f"Sampler {space.sampler.name}: {space.sampler_reason}.")
    if estimate is not None:
        lines.append(describe_time(estimate))
    if space.budget.shows_device_time:
        lines += describe_budget(space, slots, estimate, device_seconds)
    if space.saves_checkpoints:
        lines.append(f"Keeps the checkpoints of {space.checkpoints.description}.")
    if estimate is not None and slots.device == "cpu" and estimate.seconds > LONG_SECONDS:
        lines += [
            f"Shorter: `{format_command('run', 'quick')}` (a small sample, about a minute), or",
            f"  {format_command('run', space.name, '--set', 'max_epochs=2', '--set', 'data.train_samples=2048')}",
        ]
    return lines


def describe_slots(slots: Slots, estimate: SearchEstimate | None) -> str:
    """Return how trials share the machine, and the throughput of every way that was measured."""
    share = f"{slots.gpu:.3g} GPU" if slots.gpu else f"{slots.threads} CPU thread{'s' if slots.threads > 1 else ''}"
    if slots.count == 0:
        gpus = f" and {slots.gpu:.3g} GPU" if slots.gpu else ""
        return f"No machine of the cluster has {slots.cpu:g} CPU{gpus} for a trial: waiting for one to join."
    text = f"{slots.count} {'trial' if slots.count == 1 else 'trials'} at a time, {share} each"
    if estimate is not None and len(estimate.tried) > 1:
        tried = ", ".join(f"{speed:,.0f} with {count}" for count, speed in estimate.tried.items())
        text += f" (measured total images/s: {tried} at a time)"
    return f"{text}."


def describe_time(estimate: SearchEstimate) -> str:
    """Return how long the search takes, and the measured speeds."""
    subject, seconds = (
        ("this search", estimate.seconds) if estimate.trials is not None else ("a trial", estimate.trial_seconds)
    )
    took = f"{subject} takes about {format_seconds(seconds)}"
    took = f"{took} and {estimate.gpu_hours:.2f} GPU-hours" if estimate.slots.gpu else f"No GPU: {took} on this CPU"
    measured = ", ".join(f"{speed.images_per_second:,.0f} at {name}" for name, speed in estimate.speeds.items())
    return f"{took[0].upper()}{took[1:]} (measured, images/s of one trial: {measured})."


def describe_budget(space: Space, slots: Slots, estimate: SearchEstimate | None, device_seconds: float) -> list[str]:
    """Return what was used of a budget of device time or money, and how many trials fit into the rest."""
    budget, lines = space.budget, []
    if slots.device == "cpu":
        lines.append("Trials run on the CPU: for budget.gpu_hours and budget.cost, each of them counts as one GPU.")
    used = f"Used so far: {format_device_time(budget, device_seconds)}"
    if estimate is None:
        return [*lines, f"{used}."]
    if estimate.trials is not None:
        price = "" if budget.cost is None else f", a cost of {format_amount(budget.cost.of(estimate.device_seconds))}"
        hours = format_amount(estimate.device_seconds / 3600)
        lines.append(f"All trials that are left together take about {hours} device-hours{price}.")
    if not budget.limits_device_time:
        return [*lines, f"{used}."]
    # A scheduler that stops trials early makes room for more.
    share = max(0.0, budget.device_seconds - device_seconds) * (estimate.trials or 1) / estimate.device_seconds
    least = "at least " if space.saves_epochs else "about "
    if estimate.trials is None:
        fits = f"{least}{int(share):,} trials fit"
    elif share >= estimate.trials:
        fits = "all trials that are left fit"
    else:
        fits = f"{least}{int(share):,} of the {estimate.trials:,} trials that are left fit"
    return [*lines, f"{used}; {fits} into the rest."]


def speed_table(estimate: SearchEstimate, space: Space) -> Table:
    """Return the measured training steps as a table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("training step", "images/s of one trial", "memory of one trial", "checkpoint"):
        table.add_column(column, justify="left" if column == "training step" else "right")
    for name, speed in estimate.speeds.items():
        memory = f"{speed.memory_bytes / 2**30:.2f} GiB{' of the GPU' if estimate.slots.gpu else ''}"
        table.add_row(name, f"{speed.images_per_second:,.0f}", memory, f"{speed.checkpoint_seconds:.2f} s")
    pruned = "; the scheduler stops some trials earlier" if space.saves_epochs else ""
    trainings = f" of each of its {space.replicates} trainings" if space.replicates > 1 else ""
    table.caption = f"{space.max_epochs} epochs per trial{trainings}{pruned}"
    return table


def configuration_table(
    space: Space, states: Mapping[str, str], outlooks: Mapping[str, str] | None = None
) -> RenderableType:
    """Return the number of configurations and how many of them storage holds; for a grid, also each one's state.

    Args:
        space: the search.
        states: {`Space.config_key`: state} of the stored configurations.
        outlooks: see `PlannedSearch.outlooks`.
    """
    total, outlooks = space.total_trials, outlooks or {}
    counts = ", ".join(f"{n} {state}" for state, n in sorted(Counter(states.values()).items()))
    stored = f"storage has {counts}" if counts else "storage has none of them"
    if not space.is_grid:
        budget = f"{total} trials" if total is not None else "as many trials as the budget allows"
        return f"{budget}, drawn by {space.sampler.name}; {stored}."
    points = list(space.planned_points())
    left = len(outlooks)
    if outlooks:  # in the order of the grid, with those that are left as they are
        planned = space.point_keys()
        left = len(outlooks.keys() - planned)
        points = [each for each in space.grid_points() if space.config_key(each) in planned | outlooks.keys()]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in [*space.parameters, "state"]:
        table.add_column(name, justify="left" if name == "state" else "right")
    for point in points[:MAX_ROWS]:
        row, key = [str(point.get(name, "")) for name in space.parameters], space.config_key(point)
        table.add_row(*row, states.get(key) or outlooks.get(key, "to be run"))
    if len(points) > MAX_ROWS:
        table.caption = f"and {len(points) - MAX_ROWS} more"
    left_as_is = f", {left} of which {'is left as it is' if left == 1 else 'are left as they are'}" if left else ""
    return Group(f"{len(points)} configurations{left_as_is}; {stored}.", table)
