"""Rules for what is trained and measured: objectives, scripts and seeds."""

from __future__ import annotations

from collections.abc import Iterator

from hpo.errors import nearest
from hpo.space.command import (
    CHECKPOINT_DIR,
    describe_option,
    find_command_mistakes,
    looks_like_option,
    positional_placeholders,
    uses_checkpoint_dir,
    uses_placeholder,
)
from hpo.space.messages import KeyPath, Problem
from hpo.space.parameters import Choices
from hpo.space.patterns import EPOCH, PatternError, compile_pattern
from hpo.space.sections import MAX_SEED
from hpo.space.valid_sections import Rule, ValidSections
from hpo.trainable import DEFAULT_TRAINABLE


def _objectives(sections: ValidSections) -> list[tuple[KeyPath, str]]:
    """Return the key of each objective's metric in the file, and the metric."""
    if "objectives" not in sections.data or sections.data["objectives"] is None:
        return [(("metric",), sections["metric"])]
    several = sections["objectives"] or [None]  # one alone is held as metric and direction
    return [
        (("objectives", i, "metric"), sections["metric"] if each is None else each.metric)
        for i, each in enumerate(several)
    ]


def _objectives_are_clear(sections: ValidSections) -> Iterator[Problem]:
    if sections.data.get("objectives") is None:
        return
    for key in ("metric", "direction"):
        if key in sections.data:
            yield (key,), f"give either objectives or {key}, not both: each objective has its own metric and direction"
    seen: set[str] = set()
    for path, metric in _objectives(sections):
        if metric in seen:
            yield path, f"{metric} is an objective already: name each metric once"
        seen.add(metric)


def _several_objectives_can_be_searched(sections: ValidSections) -> Iterator[Problem]:
    count = len(_objectives(sections))
    if count == 1:
        return
    scheduler = sections["scheduler"]
    if scheduler.stops_trials_early:
        yield (
            ("scheduler",),
            f"{scheduler.name} stops a trial whose value is worse than that of others, and with {count} objectives there is "
            "no such order: leave the scheduler out, or give one `metric` and `direction`",
        )
    sampler = sections["sampler"]
    if not sampler.allows_objectives:
        yield (
            ("sampler",),
            f"{sampler.name} searches for one objective, and there are {count}: use sampler tpe, nsga2, gp, random, qmc or "
            "grid",
        )


def _metric_is_reported(sections: ValidSections) -> Iterator[Problem]:
    if sections["command"] is not None or sections["trainable"] != DEFAULT_TRAINABLE:
        return
    for path, metric in _objectives(sections):
        if metric.startswith("test_"):
            yield (
                path,
                "the test images are scored once, after the last epoch: no decision may depend on them. Give another "
                "metric, such as val_accuracy",
            )
        if sections["data"].val_samples == 0 and metric.startswith("val_"):
            yield (
                ("data", "val_samples"),
                f"without validation images there is no {metric}: give another metric, such as `metric: train_accuracy`, or "
                "hold images out",
            )


def _command_is_complete(sections: ValidSections) -> Iterator[Problem]:
    if sections["command"] is None:
        return
    if "trainable" in sections.data:
        yield ("command",), "give either command or trainable, not both"
    mistakes = find_command_mistakes(sections["command"], [*sections.names(), *sections.names("derived")])
    for text in mistakes:
        yield ("command",), text
    positional = set() if mistakes else positional_placeholders(sections["command"])
    for name, parameter in sections["parameters"].items():
        for value in parameter.choices if isinstance(parameter, Choices) and name in positional else ():
            if looks_like_option(value):
                yield ("parameters", name), f"{value!r}: {describe_option(name)}"


def _patterns_are_valid(sections: ValidSections) -> Iterator[Problem]:
    patterns, command = sections["report"], sections["command"]
    if not patterns:
        return
    if command is None:
        yield ("report",), "patterns read the output of a script: give a command, or leave report out"
    for name, text in patterns.items():
        try:
            compile_pattern(text)
        except PatternError as error:
            yield ("report", name), str(error)
    for _, metric in _objectives(sections):
        if metric not in patterns:
            yield ("report",), f"no pattern reads the metric {metric}, {nearest(metric, patterns)}"
    if command is not None and uses_checkpoint_dir(command) and EPOCH not in patterns:
        yield ("report",), f"with {{{CHECKPOINT_DIR}}}, a pattern must read the epoch: give report.{EPOCH}"


def _replicates_differ(sections: ValidSections) -> Iterator[Problem]:
    command, replicates = sections["command"], sections["replicates"]
    if sections["seed"] + replicates > MAX_SEED + 1:
        yield ("seed",), f"the last of {replicates} seeds is above {MAX_SEED}: lower it"
    if command is not None and replicates > 1 and not uses_placeholder(command, "seed"):
        text = f"the {replicates} trainings of a configuration differ by their seed alone: use {{seed}} in the command"
        yield (
            ("replicates",),
            f"{text}, such as `python train.py --seed {{seed}}` or `env SEED={{seed}} python train.py`",
        )


RULES: tuple[Rule, ...] = (
    _objectives_are_clear,
    _several_objectives_can_be_searched,
    _metric_is_reported,
    _command_is_complete,
    _patterns_are_valid,
    _replicates_differ,
)
