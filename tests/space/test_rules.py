"""Problems between sections of a search space."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpo.space.model import load_space
from tests.space.conftest import CheckError, ErrorOf
from tests.space.examples import CONDITIONAL, HEAD, OBJECTIVES, SAMPLED, VALID

# » marks the key that the message must give.
POINTS = """\
sampler: random
max_epochs: 4
budget: {trials: 9}
parameters:
  optimizer: [sgd, adam]
  lr: {type: float, low: 0.001, high: 1.0, log: true}
  momentum: {type: float, low: 0.0, high: 0.9, step: 0.3, when: {optimizer: sgd}}
  width: {type: int, low: 2, high: 8, step: 2, default: 4}
  stem: cifar
constraints: [lr <= 0.1 or optimizer == 'sgd']
points_to_evaluate:
"""
POPULATION = """\
scheduler: {name: pbt}
max_epochs: 9
parameters:
  lr: {type: float, low: 0.001, high: 1.0, log: true}
  momentum: {type: float, low: 0.0, high: 0.9}
  width: 1.0
"""
PROMOTION = POPULATION.replace("name: pbt", "name: asha, mode: promote") + "budget: {time: 1h}\n"
RULES = {
    "a point with a misspelled parameter": (
        POINTS + "  - {optimizer: adam, lr: 0.1, »wdith: 2}\n",
        ["points_to_evaluate.0.wdith: there is no parameter 'wdith', did you mean width?"],
    ),
    "a point with a value outside of a range": (
        POINTS + "  - {optimizer: adam, lr: 0.1}\n  - {optimizer: adam, »lr: 2}\n",
        ["points_to_evaluate.1.lr: lr cannot be 2, allowed: 0.001 to 1.0"],
    ),
    "a point between two steps": (
        POINTS + "  - {optimizer: adam, lr: 0.1, »width: 3}\n",
        ["width cannot be 3, allowed: 2 to 8 in steps of 2"],
    ),
    "a point with another choice": (
        POINTS + "  - {»optimizer: adamw, lr: 0.1}\n",
        ["points_to_evaluate.0.optimizer: optimizer cannot be adamw, did you mean adam?"],
    ),
    "a point with a text that looks like a number": (
        POINTS + "  - {optimizer: adam, lr: 0.1, »width: '4'}\n",
        ['width cannot be "4", allowed: 2 to 8 in steps of 2'],
    ),
    "a point with another fixed value": (
        POINTS + "  - {optimizer: adam, lr: 0.1, »stem: imagenet}\n",
        ["stem cannot be imagenet, allowed: cifar"],
    ),
    "a point without a parameter": (
        POINTS + "  - »{optimizer: adam}\n",
        ["points_to_evaluate.0: lr is missing, and has no default: give 0.001 to 1.0"],
    ),
    "a point without a conditional parameter": (
        POINTS + "  - »{optimizer: sgd, lr: 0.1}\n",
        ["momentum is missing, and has no default: give 0.0 to 0.9 in steps of 0.3"],
    ),
    "a point with a parameter that is not active": (
        POINTS + "  - {optimizer: adam, lr: 0.1, »momentum: 0.3}\n",
        ["momentum is not active here, see its `when`: leave it out"],
    ),
    "a point that breaks a constraint": (
        POINTS + "  - »{optimizer: adam, lr: 0.2}\n",
        ["points_to_evaluate.0: it breaks a constraint: lr <= 0.1 or optimizer == 'sgd'"],
    ),
    "the same point twice": (
        POINTS + "  - {optimizer: adam, lr: 0.1}\n  - »{lr: 0.10, width: 4.0, optimizer: adam}\n",
        ["points_to_evaluate.1: it is the same configuration as points_to_evaluate.0: leave it out"],
    ),
    "a point of which a derived value cannot be computed": (
        POINTS.replace("constraints", "derived: {decay: log(lr - 0.01)}\nconstraints")
        + "  - »{optimizer: adam, lr: 0.01}\n",
        ["points_to_evaluate.0: a value cannot be derived: log(lr - 0.01) "],
    ),
    "a point with a very large integer": (
        POINTS + f"  - {{optimizer: adam, lr: 0.1, »width: 1{'0' * 400}}}\n",
        [f"width cannot be 1{'0' * 79}..., allowed: 2 to 8 in steps of 2"],
    ),
    "a point without a value that has no default": (
        POINTS.replace("log: true}", "log: true, default: null}") + "  - »{optimizer: adam}\n",
        ["lr is missing, and has no default"],
    ),
    "points of a grid that the budget cuts off": (
        "sampler: grid\nmax_epochs: 2\nbudget: {trials: 2}\nparameters: {x: [1, 2, 3], flag: true}\n"
        "»points_to_evaluate: [{x: 3}]\n",
        ["budget.trials 2 leaves out points of this grid of 3", "leave points_to_evaluate out, raise budget.trials"],
    ),
    "points of a population": (
        POPULATION + "»points_to_evaluate: [{lr: 0.1, momentum: 0}]\n",
        ["points_to_evaluate: pbt draws its members at random: leave it out"],
    ),
    "a grid over a continuous range": (
        HEAD + "  »lr: {type: float, low: 0, high: 1}\n",
        ["parameters.lr: ", "is continuous", "give a list or a step", "sampler random or tpe"],
    ),
    "a search that never ends": (
        "»sampler: tpe\nmax_epochs: 2\nparameters: {lr: 1}\n",
        [
            "sampler tpe never ends",
            "budget.trials, budget.time, budget.patience, budget.gpu_hours or budget.cost.limit",
        ],
    ),
    "a price does not end a search": (
        "»sampler: tpe\nmax_epochs: 2\nparameters: {lr: 1}\nbudget: {cost: {gpu_hour: 2.5}}\n",
        ["sampler tpe never ends"],
    ),
    "a grace period as long as the training": (
        VALID + "scheduler: {name: asha, »grace_period: 2}\n",
        ["scheduler.grace_period: ", "grace_period 2 must be below max_epochs 2"],
    ),
    "a scheduler over one epoch": (
        VALID.replace("max_epochs: 2", "max_epochs: 1") + "»scheduler: asha\n",
        ["scheduler: asha stops trials between epochs, but max_epochs is 1"],
    ),
    "a reduction factor for median": (
        VALID + "scheduler: {name: median, »reduction_factor: 2}\n",
        ["scheduler.reduction_factor: median has no reduction_factor"],
    ),
    "a parameter name that is not an identifier": (HEAD + "  »batch-size: 1\n", ["Python identifier", "'batch-size'"]),
    "an option of another sampler": (
        SAMPLED.replace("tpe", "{name: random, »n_startup_trials: 3}") + "  lr: 1\n",
        ["sampler.n_startup_trials: unknown key, allowed: name, seed"],
    ),
    "a misspelled option of a sampler": (
        SAMPLED.replace("tpe", "{name: tpe, »multivariat: true}") + "  lr: 1\n",
        ["sampler.multivariat: unknown key, did you mean multivariate?"],
    ),
    "an unknown name among a sampler's options": (
        SAMPLED.replace("tpe", "{»name: tpee, seed: 1}") + "  lr: 1\n",
        ["sampler.name: there is no sampler 'tpee', did you mean tpe?"],
    ),
    "a sampler without a name": (
        SAMPLED.replace("sampler: tpe", "»sampler: {seed: 1}") + "  lr: 1\n",
        ["sampler: write a name"],
    ),
    "group without multivariate sampling": (
        SAMPLED.replace("tpe", "{name: tpe, multivariate: false, »group: true}") + "  lr: 1\n",
        ["sampler.group: group needs multivariate sampling"],
    ),
    "cmaes with choices only": (
        "»" + SAMPLED.replace("tpe", "cmaes") + "  lr: [1, 2]\n",
        ["sampler: cmaes needs an int or float range", "use sampler tpe"],
    ),
    "qmc with a condition": (
        "»" + CONDITIONAL.replace("tpe", "qmc"),
        ["sampler: qmc samples all parameters jointly", "momentum", "`when`", "tpe, random or nsga2"],
    ),
    "cmaes with a condition": ("»" + CONDITIONAL.replace("tpe", "cmaes"), ["sampler: cmaes samples all", "momentum"]),
    "gp with a condition": ("»" + CONDITIONAL.replace("tpe", "gp"), ["sampler: gp samples all", "momentum"]),
    "a condition on an unknown parameter": (
        CONDITIONAL.replace("{optimizer: sgd}", "{»optimiser: sgd}"),
        ["parameters.momentum.when.optimiser: there is no parameter 'optimiser', did you mean optimizer?"],
    ),
    "a condition on a value that never occurs": (
        CONDITIONAL.replace("{optimizer: sgd}", "{»optimizer: sdg}"),
        ["parameters.momentum.when.optimizer: optimizer is never sdg, did you mean sgd?"],
    ),
    "a condition on a value outside a range": (
        SAMPLED + "  n: {type: int, low: 1, high: 3}\n  x: {choices: [1], when: {»n: [3, 4]}}\n",
        ["parameters.x.when.n: n is never 4, allowed: 1 to 3"],
    ),
    "a condition without a value": (
        CONDITIONAL.replace("{optimizer: sgd}", "{»optimizer: []}"),
        ["parameters.momentum.when.optimizer: ", "at least 1"],
    ),
    "a cycle of conditions": (
        SAMPLED
        + "  a: {choices: [1], »when: {b: 1}}\n  b: {choices: [1], when: {c: 1}}\n  c: {choices: [1], when: {a: 1}}\n",
        ["parameters.a.when: the conditions form a cycle: a -> b -> c -> a"],
    ),
    "a condition on itself": (
        SAMPLED + "  a: {choices: [1], »when: {a: 1}}\n",
        ["parameters.a.when: the conditions form a cycle: a -> a"],
    ),
    "a constraint on an unknown parameter": (
        SAMPLED + "  lr: [1, 2]\nconstraints: [»lr < batchsize]\n",
        ["constraints.0: there is no parameter 'batchsize', allowed: lr, max_epochs"],
    ),
    "a constraint that is not a comparison": (
        SAMPLED + "  lr: [1, 2]\nconstraints: [»lr + 1]\n",
        ["constraints.0: a constraint is a comparison", "'lr + 1'"],
    ),
    "a constraint that cannot be parsed": (
        SAMPLED + "  lr: [1, 2]\nconstraints: [»lr <= ]\n",
        ["constraints.0: 'lr <=' is not an expression"],
    ),
    "a constraint that calls an unknown function": (
        SAMPLED + "  lr: [1, 2]\nconstraints: [»open('x') == 1]\n",
        ["constraints.0: ", "no function 'open'", "sqrt"],
    ),
    "a constraint that reads an attribute": (
        SAMPLED + "  lr: [1, 2]\nconstraints: [»lr.__class__ == 1]\n",
        ["constraints.0: ", "only arithmetic"],
    ),
    "a constraint that is too long": (
        SAMPLED + "  lr: [1, 2]\nconstraints: [»" + "lr + " * 50 + "1 > 0]\n",
        ["constraints.0: ", "at most 200 characters"],
    ),
    "a constraint that no sample meets": (
        SAMPLED + "  lr: {type: float, low: 0, high: 1}\nconstraints: [lr > 0.1, »lr > 2]\n",
        ["constraints.1: none of 1000 random configurations meets it: lr > 2"],
    ),
    "constraints that no sample meets together": (
        SAMPLED + "  lr: {type: float, low: 0, high: 1}\n»constraints: [lr > 0.5, lr < 0.5]\n",
        ["constraints: none of 1000 random configurations meets all of them together"],
    ),
    "a constraint that no grid point meets": (
        VALID + "constraints: [»lr * batch_size > 100]\n",
        ["constraints.0: no configuration of the grid meets it"],
    ),
    "a derived value that cannot be computed": (
        VALID + "»derived: {x: 1 / (lr - lr)}\n",
        ["derived: no configuration of the grid meets it", "1 / (lr - lr) cannot be computed", "zero"],
    ),
    "a derived value that uses an unknown name": (
        VALID + "derived: {»x: 0.05 * max_epoch}\n",
        ["derived.x: there is no parameter 'max_epoch', did you mean max_epochs?"],
    ),
    "a derived value with the name of a parameter": (
        VALID + "derived: {»lr: 2 * 3}\n",
        ["derived.lr: another value has this name already"],
    ),
    "a cycle of derived values": (
        VALID + "derived: {»a: b + 1, b: a + 1}\n",
        ["derived.a: the derived values form a cycle: a -> b -> a"],
    ),
    "a derived value that is a number": (VALID + "derived: {»a: 3}\n", ["derived.a: ", "string", "3"]),
    "a default that is not a choice": (
        HEAD + "  lr: {type: categorical, choices: [1, 2], »default: 3}\n",
        ["parameters.lr.default: 3 is none of the choices [1, 2]"],
    ),
    "a default outside its range": (
        SAMPLED + "  lr: {type: float, low: 0, high: 1, »default: 2}\n",
        ["parameters.lr.default: 2.0 is not in the range from 0.0 to 1.0"],
    ),
    "a default between two steps": (
        SAMPLED + "  n: {type: int, low: 0, high: 10, step: 5, »default: 4}\n",
        ["parameters.n.default: 4 is not in the range from 0 to 10 in steps of 5"],
    ),
    "a validation metric without validation images": (
        VALID + "data: {»val_samples: 0}\n",
        ["data.val_samples: without validation images there is no val_accuracy", "`metric: train_accuracy`"],
    ),
    "another validation metric without validation images": (
        VALID + "metric: val_loss\ndata: {»val_samples: 0}\n",
        ["data.val_samples: without validation images there is no val_loss"],
    ),
    "a test metric of the built-in training": (
        VALID + "»metric: test_accuracy\n",
        ["metric: the test images are scored once", "such as val_accuracy"],
    ),
    "a command and a trainable": (
        VALID + "trainable: my_module:train\n»command: python train.py --lr {lr}\n",
        ["command: give either command or trainable"],
    ),
    "a placeholder for an unknown value": (
        VALID + "»command: python train.py --lr {lrr}\n",
        ["command: there is no value {lrr}, did you mean lr?"],
    ),
    "a placeholder with a format": (
        VALID + "»command: python train.py --lr {lr:.3f}\n",
        ["command: write {lr} without ':.3f'"],
    ),
    "an open quote in a command": (
        VALID + "»command: python 'train.py\n",
        ["command: cannot be split into arguments", "quotation"],
    ),
    "an empty command": (VALID + "»command: ''\n", ["command: is empty"]),
    "a placeholder as the program": (VALID + "»command: '{lr} x'\n", ["command: the program cannot be a placeholder"]),
    "a positional value that looks like an option": (
        "sampler: grid\nmax_epochs: 1\ncommand: python train.py {mode} --lr {lr} --mode={mode}\n"
        "parameters: {lr: [-1, -2], »mode: [fast, -rf]}\n",
        ["parameters.mode: '-rf': the script would take it for an option: write --mode={mode} in the command"],
    ),
    "formulas that take too long": (
        "sampler: grid\nmax_epochs: 1\nparameters: {a: {type: int, low: 1, high: 300}, b: {type: int, low: 1, high: 300}}\n"
        f"»constraints: [{' + '.join(['a * b'] * 20)} < 0]\n",
        ["constraints: ", "operations for each of 90,000 configurations are more than 2,000,000: simplify"],
    ),
    "a pattern without a script": (
        VALID + "»report: {val_accuracy: 'Accuracy: (.+)'}\n",
        ["report: patterns read the output of a script: give a command, or leave report out"],
    ),
    "a pattern without a group": (
        VALID + "command: python train.py\nmetric: acc\nreport: {»acc: 'Accuracy: .+'}\n",
        ["report.acc: 'Accuracy: .+' must have one group, parentheses around the number, and has 0"],
    ),
    "no pattern for the metric": (
        VALID + "command: python train.py\nmetric: acc\n»report: {loss: 'Loss: (.+)', accu: 'Acc: (.+)'}\n",
        ["report: no pattern reads the metric acc, did you mean accu?"],
    ),
    "no pattern for the epoch of a script that resumes": (
        VALID + "command: python train.py {checkpoint_dir}\nmetric: acc\n»report: {acc: 'Acc: (.+)'}\n",
        ["report: with {checkpoint_dir}, a pattern must read the epoch: give report.epoch"],
    ),
    "objectives next to a metric": (
        VALID + f"»metric: val_loss\n{OBJECTIVES}",
        ["metric: give either objectives or metric, not both"],
    ),
    "objectives next to a direction": (
        VALID + f"{OBJECTIVES}»direction: minimize\n",
        ["direction: give either objectives or direction, not both"],
    ),
    "one objective next to a metric": (
        VALID + "»metric: val_loss\nobjectives: [{metric: val_loss, direction: minimize}]\n",
        ["metric: give either objectives or metric, not both"],
    ),
    "a metric that is named twice": (
        VALID + "objectives: [{metric: a, direction: maximize}, {»metric: a, direction: minimize}]\n",
        ["objectives.1.metric: a is an objective already: name each metric once"],
    ),
    "an objective without a direction": (
        VALID + "objectives: [{metric: a, direction: maximize}, »{metric: b}]\n",
        ["objectives.1", "direction", "missing"],
    ),
    "an objective that is only a name": (
        VALID + "objectives: [{metric: a, direction: maximize}, »cost]\n",
        ["objectives.1: write a mapping with both keys, such as {metric: cost, direction: minimize}"],
    ),
    "an empty list of objectives": (VALID + "»objectives: []\n", ["objectives: ", "at least 1"]),
    "too many objectives": (
        VALID + f"»objectives: [{', '.join(f'{{metric: m{i}, direction: minimize}}' for i in range(5))}]\n",
        ["objectives: ", "at most 4"],
    ),
    "several objectives with a scheduler": (
        SAMPLED + f"  lr: [1, 2]\n{OBJECTIVES}»scheduler: asha\n",
        ["scheduler: asha stops a trial", "with 2 objectives there is no such order: leave the scheduler out"],
    ),
    "a range with too many values for gp": (
        SAMPLED.replace("tpe", "gp") + "  »n: {type: int, low: 1, high: 1000000000}\n",
        [
            "parameters.n: gp would keep all values of this range in memory: it may have 1,000,000. Give it a larger step"
        ],
    ),
    "several objectives with cmaes": (
        f"»{SAMPLED.replace('tpe', 'cmaes')}  lr: {{type: float, low: 0, high: 1}}\n{OBJECTIVES}",
        ["sampler: cmaes searches for one objective, and there are 2: use sampler tpe, nsga2, gp, random, qmc or grid"],
    ),
    "an objective of the test images": (
        VALID
        + "objectives: [{metric: val_accuracy, direction: maximize}, {»metric: test_loss, direction: minimize}]\n",
        ["objectives.1.metric: the test images are scored once"],
    ),
    "an objective without validation images": (
        VALID + f"data: {{»val_samples: 0}}\n{OBJECTIVES}",
        ["data.val_samples: without validation images there is no val_accuracy"],
    ),
    "no pattern for an objective": (
        VALID
        + f"command: python train.py\n{OBJECTIVES}»report: {{val_accuracy: 'Acc: (.+)', train_second: 'T: (.+)'}}\n",
        ["report: no pattern reads the metric train_seconds, did you mean train_second?"],
    ),
    # Keys of features that are not built are refused, not ignored.
    "a warm start from the same study": (
        VALID + "warm_start: [grid, {study: grid, storage: 'sqlite:///a.db'}, »{study: grid, trials: best 3}]\n",
        ["warm_start.2: ", "grid is named twice"],
    ),
    "a script whose replicates would be the same": (
        VALID + "command: python train.py\nmetric: acc\n»replicates: 3\n",
        ["replicates: the 3 trainings of a configuration differ by their seed alone: use {seed} in the command"],
    ),
    "seeds beyond the largest": (
        VALID + "replicates: 3\n»seed: 4294967294\n",
        ["seed: the last of 3 seeds is above 4294967295: lower it"],
    ),
    "promotion without patience": (
        PROMOTION.replace("time: 1h", "»patience: 3"),
        ["budget.patience: with mode promote, trials end only when the search does, so patience cannot end it"],
    ),
    "promotion of scripts without checkpoints": (
        PROMOTION.replace("mode", "»mode") + "command: python train.py --lr {lr}\nmetric: acc\n",
        [
            "scheduler.mode: a trial that is promoted trains on from its checkpoint",
            "use {checkpoint_dir} in the command",
        ],
    ),
    "promotion by median": (
        PROMOTION.replace("name: asha, mode", "name: median, »mode"),
        ["scheduler.mode: median has no mode: leave it out"],
    ),
    "an unknown mode": (
        PROMOTION.replace("mode: promote", "»mode: pause"),
        ["scheduler.mode: ", "'stop' or 'promote', got 'pause'"],
    ),
    "promotion with several objectives": (
        PROMOTION.replace("scheduler", "»scheduler")
        + "objectives: [{metric: a, direction: maximize}, {metric: b, direction: minimize}]\n",
        ["scheduler: asha stops a trial whose value is worse", "with 2 objectives there is no such order"],
    ),
    "a population of a grid": (
        "scheduler: {name: pbt}\nmax_epochs: 9\n»sampler: grid\nparameters: {lr: [0.1, 0.2]}\n",
        [
            "sampler: the members of a population start from independent draws, so pbt takes sampler random or qmc, not grid"
        ],
    ),
    "a population that a sampler draws that learns": (
        POPULATION + "»sampler: tpe\n",
        ["sampler: ", "pbt takes sampler random or qmc, not tpe"],
    ),
    "another number of trials than members": (
        POPULATION + "budget: {»trials: 20}\n",
        [
            "budget.trials: ",
            "scheduler.population is the number of trials, 8: leave budget.trials out, or set population to 20",
        ],
    ),
    "a population without patience": (
        POPULATION + "budget: {»patience: 3}\n",
        ["budget.patience: ", "pbt takes no patience: leave it out, or limit time or gpu_hours"],
    ),
    "a population with several seeds": (
        POPULATION + "»replicates: 2\n",
        ["replicates: pbt compares single trainings: leave replicates out"],
    ),
    "a population with several objectives": (
        POPULATION.replace("scheduler", "»scheduler")
        + "objectives: [{metric: a, direction: maximize}, {metric: b, direction: minimize}]\n",
        ["scheduler: pbt stops a trial whose value is worse", "with 2 objectives there is no such order"],
    ),
    "a population of scripts": (
        POPULATION.replace("scheduler", "»scheduler")
        + "command: python train.py --lr {lr} --save {checkpoint_dir}\nmetric: acc\n",
        ["scheduler: pbt copies the checkpoint of a training that runs", "use a Python trainable"],
    ),
    "a population that is warm-started": (
        POPULATION + "»warm_start: [grid]\n",
        ["warm_start: pbt starts its members afresh and learns from no other study: leave it out"],
    ),
    "a population that continues": (
        POPULATION + "»continue: all\n",
        ["continue: pbt starts its members afresh: leave it out"],
    ),
    "an interval as long as the training": (
        POPULATION.replace("name: pbt", "name: pbt, »interval: 9"),
        ["scheduler.interval: scheduler pbt never compares members: interval 9 must be below max_epochs 9"],
    ),
    "a population over one epoch": (
        POPULATION.replace("scheduler", "»scheduler").replace("max_epochs: 9", "max_epochs: 1"),
        ["scheduler: pbt stops trials between epochs, but max_epochs is 1"],
    ),
    "a grace period for a population": (
        POPULATION.replace("name: pbt", "name: pbt, »grace_period: 2"),
        ["scheduler.grace_period: pbt has no grace_period: leave it out"],
    ),
    "a population for another scheduler": (
        VALID + "scheduler: {name: asha, »population: 4}\n",
        ["scheduler.population: asha has no population: leave it out"],
    ),
    "an unknown hyperparameter that changes": (
        POPULATION.replace("name: pbt", "name: pbt, explore: [lr, »momentun]"),
        ["scheduler.explore.1: there is no parameter 'momentun', did you mean momentum?"],
    ),
    "a fixed hyperparameter that changes": (
        POPULATION.replace("name: pbt", "name: pbt, explore: [»width]"),
        ["scheduler.explore.0: width has a single value: name a range or choices"],
    ),
    "a share of more than half": (
        POPULATION.replace("name: pbt", "name: pbt, »quantile: 0.6"),
        ["scheduler.quantile: "],
    ),
    "a factor that changes nothing": (
        POPULATION.replace("name: pbt", "name: pbt, »factor: 1.0"),
        ["scheduler.factor: "],
    ),
    "a single member": (
        POPULATION.replace("name: pbt", "name: pbt, »population: 1"),
        ["scheduler.population: "],
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_a_broken_rule_is_one_line_with_its_position_and_a_remedy(check_error: CheckError, name: str) -> None:
    check_error(*RULES[name])


def test_all_mistakes_of_a_point_are_reported(error_of: ErrorOf) -> None:
    text = POINTS.replace("log: true}", "log: true}\n  flag: [true, null]")
    message = error_of(text + "  - {optimizer: adamw, lr: 7, width: 3, flag: false, decay: 0.2, momentum: 7}\n")
    found = re.findall(r"points_to_evaluate\.0\.(\w+): (.*)", message)
    assert dict(found) == {
        "decay": "there is no parameter 'decay', allowed: optimizer, lr, flag, momentum, width, stem",
        "optimizer": "optimizer cannot be adamw, did you mean adam?",
        "lr": "lr cannot be 7, allowed: 0.001 to 1.0",
        "width": "width cannot be 3, allowed: 2 to 8 in steps of 2",
        "flag": "flag cannot be false, allowed: true, null",
    }, "whether momentum is active is unknown"


def test_broken_rules_and_invalid_keys_are_reported_together(error_of: ErrorOf) -> None:
    """An invalid section hides no other problem, and no rule guesses about it."""
    error = error_of(
        "sampler: cmaes\nmax_epochs: many\nbudgett: {trials: 3}\nparameters:\n"
        "  lr: {type: float, low: 5, high: 3}\n  m: {choices: [1, 2], when: {lrr: 1}}\n"
        "constraints: [zzz > 1, lr > 1]\nderived: {w: 1 +}\nwarm_start: [a, a]\n"
    )
    assert re.findall(r"space.yaml:(\d+):\d+: ([\w.]+): ", error) == [
        ("1", "sampler"),  # cmaes and `when`
        ("1", "sampler"),  # no end
        ("2", "max_epochs"),
        ("3", "budgett"),
        ("5", "parameters.lr"),
        ("6", "parameters.m.when.lrr"),
        ("7", "constraints.0"),
        ("8", "derived.w"),
        ("9", "warm_start.1"),
    ]


@pytest.mark.parametrize(
    "line", ["metric: train_accuracy", "trainable: mine:train", "command: python train.py --lr {lr}"]
)
def test_no_image_needs_to_be_held_out_for_a_metric_that_exists(tmp_path: Path, line: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(f"{VALID}data: {{val_samples: 0}}\n{line}\n")
    assert load_space(str(path)).data.val_samples == 0
