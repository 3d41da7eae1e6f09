"""Search spaces that the tests of this package share, as YAML."""

from __future__ import annotations

HEAD = "sampler: grid\nmax_epochs: 2\nparameters:\n"
VALID = HEAD + "  batch_size: [64, 256]\n  lr: 0.01\n"
SAMPLED = "sampler: tpe\nmax_epochs: 2\nbudget: {trials: 5}\nparameters:\n"
CONDITIONAL = (
    SAMPLED + "  optimizer: [sgd, adam]\n  momentum: {type: float, low: 0, high: 0.9, when: {optimizer: sgd}}\n"
)
OBJECTIVES = "objectives: [{metric: val_accuracy, direction: maximize}, {metric: train_seconds, direction: minimize}]\n"

# Every key that is built, and every kind of parameter.
FULL = """\
description: every key
command: python train.py --lr={lr} --momentum={momentum} {seed}
metric: accuracy
direction: maximize
sampler: {name: tpe, seed: 0, n_startup_trials: 5}
scheduler: {name: asha, grace_period: 5, reduction_factor: 3}
max_epochs: 100
data: {dataset: fashion_mnist, train_samples: null, val_samples: 5000}
parameters:
  batch_size: {type: int, low: 16, high: 1024, log: true, default: 64}
  layers: {type: int, low: 2, high: 8, step: 2}
  lr: {type: float, low: 1e-4, high: 1.0, log: true}
  optimizer: {type: categorical, choices: [sgd, adam, adamw], default: adam}
  momentum: {type: float, low: 0.0, high: 0.9, step: 0.3, when: {optimizer: sgd}, default: 0.9}
  nesterov: {choices: [true, false], when: {momentum: [0.3, 0.6], optimizer: [sgd]}}
  stem: &stem [imagenet, cifar, null]
  other: *stem
  weight_decay: 0
constraints: ["lr <= 0.004 * batch_size", optimizer == 'sgd' or lr < 0.1]
derived: {warmup_epochs: "0.05 * max_epochs", decay: "1 - momentum * warmup_epochs"}
points_to_evaluate: [{layers: 2, lr: 1e-2, momentum: 0.3, nesterov: true, optimizer: sgd, stem: null, other: cifar}]
budget: {trials: 200, time: 1d12h}
resources: {cpu: 2, gpu: auto}
replicates: 1
max_failures: 2
trial_timeout: 30m
checkpoint_every: 2
checkpoints: {keep: best 5}
seed: 0
"""


def unmark(text: str) -> tuple[str, str]:
    """Remove the mark » from a text. Return the text and the mark's position as `line:column`, both from 1."""
    before, mark, after = text.partition("»")
    assert mark, "the text has no mark"
    line, column = before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1
    return before + after, f"{line}:{column}"
