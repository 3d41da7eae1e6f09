"""Problems of single keys: each message has the position, the key, what is wrong, and what is allowed."""

from __future__ import annotations

import re

import pytest

from hpo.errors import MAX_ALLOWED, nearest
from hpo.space.messages import MAX_VALUE_LENGTH
from tests.space.conftest import CheckError, ErrorOf
from tests.space.examples import HEAD, VALID

# » marks the position that the message must give.
MISTAKES = {
    "a key twice": (HEAD + "  lr: 1\n  »lr: 2\n", ["'lr'", "twice"]),
    "a section twice": ("sampler: grid\n»sampler: tpe\n", ["'sampler'", "twice"]),
    "an unknown key": (VALID + "»metrc: val_loss\n", ["metrc: unknown key", "did you mean metric?"]),
    "an unknown key of data": (
        VALID + "data: {»train_sample: 4}\n",
        ["data.train_sample: unknown key", "did you mean train_samples?"],
    ),
    "an unknown key of sampler": (
        "sampler: {name: grid, »sed: 1}\nmax_epochs: 2\nparameters: {lr: 1}\n",
        ["sampler.sed: unknown key", "did you mean seed?"],
    ),
    "an unknown key of scheduler": (
        VALID + "scheduler: {name: none, »grace_perod: 1}\n",
        ["scheduler.grace_perod: unknown key", "did you mean grace_period?"],
    ),
    "an unknown key of budget": (VALID + "budget: {»trial: 1}\n", ["budget.trial: unknown key", "mean trials?"]),
    "an unknown key of resources": (VALID + "resources: {»gpus: 1}\n", ["resources.gpus: unknown key", "mean gpu?"]),
    "an unknown key of a range": (
        HEAD + "  lr: {type: float, low: 1, high: 2, step: 1, »lgoo: true}\n",
        ["parameters.lr.lgoo: unknown key", "allowed: type, low, high, log, step, when, default"],
    ),
    "a key that belongs to another type of range": (
        HEAD + "  lr: {type: categorical, choices: [1], »low: 1}\n",
        ["parameters.lr.low: unknown key", "allowed: type, choices, when, default"],
    ),
    "a missing key": ("»sampler: grid\nparameters: {lr: 1}\n", ["'max_epochs'", "missing"]),
    "a missing bound of a range": (HEAD + "  »lr: {type: int, low: 1}\n", ["parameters.lr", "'high'", "missing"]),
    "a word for a number": (
        "sampler: grid\n»max_epochs: many\nparameters: {lr: 1}\n",
        ["max_epochs: ", "integer", "'many'"],
    ),
    "a fraction for a whole number": (
        "sampler: grid\n»max_epochs: 2.5\nparameters: {lr: 1}\n",
        ["max_epochs: ", "integer", "2.5"],
    ),
    "a boolean for a number": (
        "sampler: grid\n»max_epochs: true\nparameters: {lr: 1}\n",
        ["max_epochs: ", "integer", "True"],
    ),
    "a number for a string": (VALID + "»description: 5\n", ["description: ", "string", "5"]),
    "a metric without a name": (VALID + "»metric: ''\n", ["metric: string should have at least 1 character, got ''"]),
    "no epochs": ("sampler: grid\n»max_epochs: 0\nparameters: {lr: 1}\n", ["max_epochs: ", "greater than 0"]),
    "an unknown sampler": (
        "»sampler: grd\nmax_epochs: 2\nparameters: {lr: 1}\n",
        ["sampler: there is no sampler 'grd'", "did you mean grid?"],
    ),
    "low above high": (
        HEAD + "  »lr: {type: int, low: 5, high: 3}\n",
        ["parameters.lr: ", "low must not be above high", "low 5", "high 3"],
    ),
    "the logarithm of zero": (
        HEAD + "  »lr: {type: float, low: 0, high: 3, log: true}\n",
        ["parameters.lr: ", "log needs low > 0"],
    ),
    "the logarithm of a negative number": (
        HEAD + "  »lr: {type: int, low: -1, high: 3, log: true}\n",
        ["parameters.lr: ", "log needs low > 0", "low -1"],
    ),
    "log with a step": (
        HEAD + "  »lr: {type: int, low: 1, high: 9, step: 2, log: true}\n",
        ["parameters.lr: ", "log and step cannot be combined"],
    ),
    "a step that does not divide": (
        HEAD + "  »lr: {type: int, low: 0, high: 10, step: 3}\n",
        ["parameters.lr: ", "step 3 does not divide the range from 0 to 10"],
    ),
    "a fractional step that does not divide": (
        HEAD + "  »lr: {type: float, low: 0, high: 1, step: 0.3}\n",
        ["parameters.lr: ", "step 0.3 does not divide"],
    ),
    "a step of zero": (
        HEAD + "  lr: {type: float, low: 0, high: 1, »step: 0}\n",
        ["parameters.lr.step: ", "greater than 0"],
    ),
    "an infinite bound": (
        HEAD + "  lr: {type: float, low: 0, »high: .inf, step: 1}\n",
        ["parameters.lr.high: ", "finite", "inf"],
    ),
    "no choices": (HEAD + "  »lr: []\n", ["parameters.lr: ", "at least 1"]),
    "no choices in a mapping": (
        HEAD + "  lr: {type: categorical, »choices: []}\n",
        ["parameters.lr.choices: ", "at least 1"],
    ),
    "a choice twice": (
        HEAD + "  »lr: [1e-4, 0.0001]\n",
        ["parameters.lr: ", "the choices 0.0001 and 0.0001 are the same"],
    ),
    "choices that Optuna does not distinguish": (
        HEAD + "  »x: [1, 1.0, true]\n",
        ["parameters.x: ", "1 and 1.0 are the same"],
    ),
    "a choice that is a list": (
        HEAD + "  x: [»[1, 2], 3]\n",
        ["parameters.x.0: ", "a valid integer or a valid number"],
    ),
    "a value that is not finite": (HEAD + "  »x: .nan\n", ["parameters.x: ", "must be finite"]),
    "a step so small that the grid is too large": (
        HEAD.replace("parameters", "»parameters") + "  x: {type: float, low: 0, high: 1, step: 1e-12}\n",
        ["more than 100000"],
    ),
    "a range so wide that its steps overflow": (
        HEAD + "  »x: {type: float, low: -1e308, high: 1e308, step: 1}\n",
        ["parameters.x: ", "does not divide"],
    ),
    "a tag on a list": (HEAD + "  x: »!!python/object/apply:os.system ['echo hi']\n", ["tag", "not allowed"]),
    "a value that does not match its tag": (HEAD + "  x: »!!int abc\n", ["'abc' does not match its tag"]),
    "a range without a type": (
        HEAD + "  »lr: {low: 1, high: 2}\n",
        ["parameters.lr: ", "`type:`", "int, float or categorical"],
    ),
    "an unknown type of range": (
        HEAD + "  »lr: {type: floot, low: 1, high: 2}\n",
        ["parameters.lr: ", "int, float or categorical", "'floot'"],
    ),
    "no parameters": ("sampler: grid\nmax_epochs: 2\n»parameters: {}\n", ["parameters: ", "at least 1"]),
    "parameters as a list": ("sampler: grid\nmax_epochs: 2\n»parameters: [lr]\n", ["parameters: ", "dictionary"]),
    "a trainable without its function": (VALID + "»trainable: my_module\n", ["trainable: ", "module:function"]),
    "a duration with an unknown unit": (
        VALID + "budget: {»time: 4 hours}\n",
        ["budget.time: ", "90s, 30m, 4h or 1d12h"],
    ),
    "a price alone": (VALID + "budget: {»cost: 20}\n", ["budget.cost: write {gpu_hour: 2.5, limit: 20}, got 20"]),
    "a number for a section": (
        VALID + "»budget: 20\n",
        ["budget: write a mapping, whose keys are among trials, time, patience, gpu_hours, cost, got 20"],
    ),
    "a duration for hours": (VALID + "budget: {»gpu_hours: 8h}\n", ["gpu_hours: write a number of hours", "'8h'"]),
    "a source that is a number": (
        VALID + "warm_start: [»3]\n",
        ["warm_start.0: write the name of a study, or {study: grid, trials: best 20}, got 3"],
    ),
    "a source that is no list": (VALID + "»warm_start: grid\n", ["warm_start: write a list: [grid]"]),
    "a constraint that is no list": (VALID + "»constraints: lr < 1\n", ['constraints: write a list: ["lr < 1"]']),
    "a difference that there is not": (
        VALID + "warm_start: [{study: grid, despite: [»epochs]}]\n",
        ["warm_start.0.despite.0: ", "'max_epochs'", "did you mean max_epochs?"],
    ),
    "an unknown direction": (VALID + "»direction: minimise\n", ["direction: ", "did you mean minimize?"]),
    "a pattern with a backslash": (
        HEAD + "  lr: 1\ncommand: python x.py {lr}\nmetric: loss\nreport:\n  »loss: 'a\\d+'\n",
        [r"report.loss: 'a\d+' must have one group"],
    ),
    "a name": ("»name: other\n" + VALID, ["name: ", "the name of its file", "'space'"]),
    "an indentation with tabs": ("sampler: grid\nparameters:\n»\tlr: 1\n", ["not YAML", "with spaces, not with tabs"]),
    "an open bracket": ("sampler: [grid\nmax_epochs»: 3\n", ["not YAML", "','", "']'"]),
    "two colons": ("sampler: grid»: x\n", ["not YAML"]),
    "two documents": ("sampler: grid\n»---\nsampler: tpe\n", ["not YAML", "another document"]),
    "an alias of nothing": (HEAD + "  lr: »*rates\n", ["not YAML", "undefined alias"]),
    "a key that is a list": (HEAD + "  »[a, b]: 1\n", ["a key is a single word"]),
    "a file that is a list": ("»- a\n- b\n", ["a search space is a mapping"]),
    "a file that is a word": ("»hello\n", ["a search space is a mapping"]),
    "a python object": (
        HEAD + "  lr: »!!python/name:os.system x\n",
        ["the tag", "python/name:os.system", "not allowed"],
    ),
    "a custom tag": (HEAD + "  lr: »!rate x\n", ["the tag !rate is not allowed"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_its_position_and_a_remedy(check_error: CheckError, name: str) -> None:
    check_error(*MISTAKES[name])


def test_all_mistakes_of_a_file_are_reported_together(error_of: ErrorOf) -> None:
    error = error_of(
        "sampler: grd\nmax_epochs: -2\nmetrc: val_loss\nparameters:\n  a: {type: int, low: 5, high: 3}\n  b: []\n"
    )
    assert re.findall(r"space.yaml:(\d+):\d+: ([\w.]+): ", error) == [
        ("1", "sampler"),
        ("2", "max_epochs"),
        ("3", "metrc"),
        ("5", "parameters.a"),
        ("6", "parameters.b"),
    ]


def test_a_long_value_is_shortened(error_of: ErrorOf) -> None:
    error = error_of(f"sampler: grid\nmax_epochs: {'x' * 1000}\nparameters: {{lr: 1}}\n")
    assert error.endswith("x...")
    assert error.count("x") < MAX_VALUE_LENGTH + 10


def test_names_that_are_allowed_are_listed_in_part() -> None:
    names = [f"study{i}" for i in range(MAX_ALLOWED + 1)]
    assert nearest("other", names).endswith(f"study{MAX_ALLOWED - 1} and 1 more")
    assert nearest("other", names[:-1]).endswith(f"study{MAX_ALLOWED - 1}")
