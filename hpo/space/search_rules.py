"""Rules for the sampler, the scheduler and the budget."""

from __future__ import annotations

from collections.abc import Iterator

from hpo.errors import nearest
from hpo.space.command import CHECKPOINT_DIR, uses_checkpoint_dir
from hpo.space.messages import Problem
from hpo.space.parameters import MAX_GP_VALUES, FloatRange, IntRange, find_too_large
from hpo.space.valid_sections import Rule, ValidSections

POPULATION_SAMPLERS = ("random", "qmc")  # of the first members: they learn from no results


def _search_ends(sections: ValidSections) -> Iterator[Problem]:
    sampler, budget = sections["sampler"], sections["budget"]
    if "scheduler" in sections.values and sections["scheduler"].replaces_trials:
        return  # after the last epoch of each member
    if not sampler.is_grid and not budget.ends_search:
        limits = "budget.trials, budget.time, budget.patience, budget.gpu_hours or budget.cost.limit"
        chosen = "" if "sampler" in sections.data else "there are infinitely many configurations, and "
        yield ("sampler",), f"{chosen}sampler {sampler.name} never ends: give {limits}"


def _sampler_fits_parameters(sections: ValidSections) -> Iterator[Problem]:
    sampler, parameters = sections["sampler"], sections["parameters"]
    conditional = [name for name, parameter in parameters.items() if parameter.when]
    if conditional and not sampler.allows_conditions:
        yield (
            ("sampler",),
            f"{sampler.name} samples all parameters jointly and cannot leave out {conditional[0]}, which depends on another "
            "parameter by `when`: use sampler tpe, random or nsga2",
        )
    large = find_too_large(parameters) if sampler.name == "gp" else None
    if large is not None:
        yield (
            ("parameters", large),
            f"gp would keep all values of this range in memory: it may have {MAX_GP_VALUES:,}. Give it a larger step, make "
            "it a float without a step, or use sampler tpe",
        )
    if sampler.needs_range:
        everything = sections.all_parameters().values()
        if not any(isinstance(p, IntRange | FloatRange) and p.low < p.high for p in everything):
            yield (
                ("sampler",),
                f"{sampler.name} needs an int or float range, and there is none: use sampler tpe or grid",
            )


def _scheduler_fits_max_epochs(sections: ValidSections) -> Iterator[Problem]:
    scheduler, max_epochs = sections["scheduler"], sections["max_epochs"]
    for name in sorted(scheduler.unused_options & scheduler.model_fields_set):
        yield ("scheduler", name), f"{scheduler.name} has no {name}: leave it out"
    if scheduler.stops_trials_early and max_epochs == 1:
        yield (
            ("scheduler",),
            f"{scheduler.name} stops trials between epochs, but max_epochs is 1: leave the scheduler out",
        )
    elif scheduler.replaces_trials:
        if scheduler.interval >= max_epochs:
            yield (
                ("scheduler", "interval"),
                f"scheduler {scheduler.name} never compares members: interval {scheduler.interval} must be below max_epochs "
                f"{max_epochs}",
            )
    elif scheduler.stops_trials_early and scheduler.min_epochs(max_epochs) >= max_epochs:
        yield (
            ("scheduler", "grace_period"),
            f"scheduler {scheduler.name} never stops a trial: grace_period {scheduler.grace_period} must be below "
            f"max_epochs {max_epochs}",
        )


def _promotion_fits_search(sections: ValidSections) -> Iterator[Problem]:
    scheduler, command = sections["scheduler"], sections["command"]
    if not scheduler.promotes_trials:
        return
    if command is not None and not uses_checkpoint_dir(command):
        yield (
            ("scheduler", "mode"),
            f"a trial that is promoted trains on from its checkpoint, and this script saves none: use {{{CHECKPOINT_DIR}}} "
            "in the command, or mode stop",
        )
    if sections["budget"].patience is not None:
        text = (
            f"with mode {scheduler.mode}, trials end only when the search does, so patience cannot end it: leave it out"
        )
        yield ("budget", "patience"), f"{text}, limit trials, time or gpu_hours, or use mode stop"


def _population_fits_search(sections: ValidSections) -> Iterator[Problem]:
    scheduler, budget = sections["scheduler"], sections["budget"]
    if not scheduler.replaces_trials:
        return
    if "sampler" in sections.values and sections["sampler"].name not in POPULATION_SAMPLERS:
        yield (
            ("sampler",),
            f"the members of a population start from independent draws, so {scheduler.name} takes sampler "
            f"{' or '.join(POPULATION_SAMPLERS)}, not {sections['sampler'].name}",
        )
    if budget.trials not in {None, scheduler.population}:
        yield (
            ("budget", "trials"),
            f"with scheduler {scheduler.name}, scheduler.population is the number of trials, {scheduler.population}: leave "
            f"budget.trials out, or set population to {budget.trials}",
        )
    if budget.patience is not None:
        text = f"the members of a population train side by side, so {scheduler.name} takes no patience: leave it out"
        yield ("budget", "patience"), f"{text}, or limit time or gpu_hours"
    if sections["replicates"] > 1:
        text = f"{scheduler.name} compares single trainings: leave replicates out, or use scheduler asha or median"
        yield ("replicates",), text
    if sections["command"] is not None:
        yield (
            ("scheduler",),
            f"{scheduler.name} copies the checkpoint of a training that runs, and the files of a script may change "
            "meanwhile: use a Python trainable, or scheduler asha, hyperband or median",
        )
    if sections["warm_start"]:
        yield (
            ("warm_start",),
            f"{scheduler.name} starts its members afresh and learns from no other study: leave it out",
        )
    if "continue" in sections.data:
        yield ("continue",), f"{scheduler.name} starts its members afresh: leave it out"
    if sections["points_to_evaluate"]:
        yield ("points_to_evaluate",), f"{scheduler.name} draws its members at random: leave it out"
    yield from _explored_parameters_exist(sections)


def _explored_parameters_exist(sections: ValidSections) -> Iterator[Problem]:
    scheduler, parameters = sections["scheduler"], sections["parameters"]
    for i, name in enumerate(scheduler.explore or ()):
        path = ("scheduler", "explore", i)
        if name not in sections.names():
            yield path, f"there is no parameter {name!r}, {nearest(name, sections.names())}"
        elif name in parameters and parameters[name].count == 1:
            yield path, f"{name} has a single value: name a range or choices"


RULES: tuple[Rule, ...] = (
    _search_ends,
    _sampler_fits_parameters,
    _scheduler_fits_max_epochs,
    _promotion_fits_search,
    _population_fits_search,
)
