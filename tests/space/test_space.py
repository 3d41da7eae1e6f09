"""The search-space file: what it means, and that every mistake is named with its place and its remedy."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from hpo.errors import SettingError, SpaceError, TrainableError
from hpo.space.document import MAX_FILE_BYTES
from hpo.space.model import Space, known_spaces, load_space, load_trainable

ROOT = Path(__file__).parent.parent
HEAD = "sampler: grid\nmax_epochs: 2\nparameters:\n"
VALID = HEAD + "  batch_size: [64, 256]\n  lr: 0.01\n"

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a search space; its name is `space`."""

    def write(text: str) -> Path:
        path = tmp_path / "space.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def error_of(path: Path | str, *overrides: str) -> str:
    with pytest.raises(SpaceError) as caught:
        load_space(str(path), overrides)
    return str(caught.value)


def unmark(text: str) -> tuple[str, str]:
    """Take out the mark » and return the text and the `line:column` where it stood, both counted from 1."""
    before, mark, after = text.partition("»")
    assert mark, "the case has no mark"
    line, column = before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1
    return before + after, f"{line}:{column}"


# --- what a file means --------------------------------------------------------------------------------------------


def test_the_documented_grid_is_exactly_its_three_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    space = load_space("grid")
    grid = space.grid_points()
    assert grid is not None
    assert list(grid) == [{"batch_size": size, "lr": 0.01} for size in (64, 256, 512)]
    assert (space.name, space.max_epochs, space.sampler.name, space.scheduler.name) == ("grid", 50, "grid", "none")
    assert space.data.dataset == "fashion_mnist"
    assert space.trainable == "hpo.train:train"
    assert (space.metric, space.direction) == ("val_accuracy", "maximize")


@pytest.mark.parametrize("path", sorted((ROOT / "search_spaces").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_search_space_that_ships_loads(path: Path) -> None:
    space = load_space(str(path))
    assert space.name == path.stem
    assert list(space.distributions()) == list(space.parameters)


def test_grid_and_quick_ship(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert {"grid", "quick"} <= set(known_spaces())


def test_a_scalar_is_fixed_a_list_is_choices_a_mapping_is_a_range(write: Write) -> None:
    path = write(
        "sampler: tpe\nmax_epochs: 2\nbudget: {trials: 5}\nparameters:\n"
        "  stem: cifar\n"
        "  optimizer: [sgd, adam]\n"
        "  activation: {type: categorical, choices: [relu, gelu]}\n"
        "  batch_size: {type: int, low: 16, high: 1024, log: true}\n"
        "  layers: {type: int, low: 2, high: 8, step: 2}\n"
        "  lr: {type: float, low: 1e-4, high: 1, log: true}\n"
        "  momentum: {type: float, low: 0, high: 0.75, step: 0.25}\n"
    )
    assert load_space(str(path)).distributions() == {
        "stem": CategoricalDistribution(["cifar"]),
        "optimizer": CategoricalDistribution(["sgd", "adam"]),
        "activation": CategoricalDistribution(["relu", "gelu"]),
        "batch_size": IntDistribution(16, 1024, log=True),
        "layers": IntDistribution(2, 8, step=2),
        "lr": FloatDistribution(1e-4, 1.0, log=True),
        "momentum": FloatDistribution(0.0, 0.75, step=0.25),
    }


def test_a_grid_is_the_product_of_its_columns_the_last_parameter_fastest(write: Write) -> None:
    path = write(
        HEAD + "  a: [x, y]\n  b: {type: int, low: 1, high: 5, step: 2}\n"
        "  c: {type: float, low: 0, high: 0.5, step: 0.25}\n  d: 7\n"
    )
    grid = load_space(str(path)).grid()
    assert grid is not None
    columns = itertools.product(["x", "y"], [1, 3, 5], [0.0, 0.25, 0.5], [7])
    assert list(grid) == [dict(zip("abcd", point, strict=True)) for point in columns]


def test_the_grid_of_a_continuous_range_is_its_ends(write: Write) -> None:
    path = write(
        "sampler: random\nmax_epochs: 2\nbudget: {trials: 5}\nparameters: {lr: {type: float, low: 0, high: 1}}\n"
    )
    assert list(load_space(str(path)).grid()) == [{"lr": 0.0}, {"lr": 1.0}]


def test_the_grid_of_a_stepped_float_never_leaves_its_range(write: Write) -> None:
    path = write("sampler: grid\nmax_epochs: 2\nparameters: {x: {type: float, low: 0, high: 0.3, step: 0.1}}\n")
    space = load_space(str(path))
    points = [point["x"] for point in space.grid_points()]
    assert points == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert max(points) <= 0.3
    distribution = space.distributions()["x"]
    assert all(distribution._contains(distribution.to_internal_repr(point)) for point in points)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("0.0001", 1e-4),
        ("1E3", 1e3),
        (".5", 0.5),
        ("-2", -2),
        ("+3", 3),
        ("010", 10),
        ("true", True),
        ("null", None),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-4'", "1e-4"),
        ("!!str 5", "5"),
    ],
)
def test_a_scalar_is_what_the_user_wrote(write: Write, written: str, value: object) -> None:
    path = write(HEAD + f"  p: {written}\n  q: [{written}, other]\n")
    grid = load_space(str(path)).grid()
    assert grid is not None
    points = list(grid)
    assert [point["q"] for point in points] == [value, "other"]
    for point in points:
        assert point["p"] == value
        assert type(point["p"]) is type(value)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("90s", 90),
        ("30m", 30 * 60),
        ("4h", 4 * 60 * 60),
        ("1d12h", 36 * 60 * 60),
        ("1h1m1s", 60 * 60 + 60 + 1),
        ("2.5", 2.5),
    ],
)
def test_a_time_is_read_with_its_units_and_a_bare_number_is_seconds(write: Write, written: str, seconds: float) -> None:
    path = write(f"sampler: tpe\nmax_epochs: 2\nparameters: {{lr: 1}}\nbudget: {{time: {written}}}\n")
    assert load_space(str(path)).budget.time == seconds


def test_a_yaml_anchor_is_the_value_it_stands_for(write: Write) -> None:
    path = write(HEAD + "  a: &sizes [1, 2]\n  b: *sizes\n")
    grid = load_space(str(path)).grid()
    assert grid is not None
    assert list(grid) == [{"a": a, "b": b} for a in (1, 2) for b in (1, 2)]


def test_the_examples_are_every_choice_and_both_ends_of_each_range(write: Write) -> None:
    path = write(HEAD + "  a: 5\n  b: [x, y]\n  c: {type: int, low: 2, high: 9}\n")
    assert list(load_space(str(path)).examples()) == [("a", 5), ("b", "x"), ("b", "y"), ("c", 2), ("c", 9)]


def test_a_space_cannot_be_changed_after_it_was_checked(write: Write) -> None:
    space = load_space(str(write(VALID)))
    with pytest.raises(ValueError, match="frozen"):
        space.max_epochs = 3


# --- mistakes -----------------------------------------------------------------------------------------------------

# » stands where the message must point to.
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
    "a missing end of a range": (HEAD + "  »lr: {type: int, low: 1}\n", ["parameters.lr", "'high'", "missing"]),
    "a word for a number": (
        "sampler: grid\n»max_epochs: many\nparameters: {lr: 1}\n",
        ["max_epochs: ", "integer", "'many'"],
    ),
    "a fraction for a whole number": (
        "sampler: grid\n»max_epochs: 2.5\nparameters: {lr: 1}\n",
        ["max_epochs: ", "integer", "2.5"],
    ),
    "a truth value for a number": (
        "sampler: grid\n»max_epochs: true\nparameters: {lr: 1}\n",
        ["max_epochs: ", "integer", "True"],
    ),
    "a number for a text": (VALID + "»description: 5\n", ["description: ", "string", "5"]),
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
        ["parameters.lr: ", "log and step exclude each other"],
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
    "an infinite end": (
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
    "choices that are one to Optuna": (
        HEAD + "  »x: [1, 1.0, true]\n",
        ["parameters.x: ", "1 and 1.0 are the same"],
    ),
    "a choice that is a list": (
        HEAD + "  x: [»[1, 2], 3]\n",
        ["parameters.x.0: ", "a valid integer or a valid number"],
    ),
    "a value that is not finite": (HEAD + "  »x: .nan\n", ["parameters.x: ", "must be finite"]),
    "a step so small that the grid has no end": (
        HEAD.replace("parameters", "»parameters") + "  x: {type: float, low: 0, high: 1, step: 1e-12}\n",
        ["more than 100000"],
    ),
    "a range so wide that its steps overflow": (
        HEAD + "  »x: {type: float, low: -1e308, high: 1e308, step: 1}\n",
        ["parameters.x: ", "does not divide"],
    ),
    "a tag on a list": (HEAD + "  x: »!!python/object/apply:os.system ['echo hi']\n", ["tag", "not allowed"]),
    "a number that is none": (HEAD + "  x: »!!int abc\n", ["'abc' is not what the tag"]),
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
    "a duration in words": (
        VALID + "budget: {»time: 4 hours}\n",
        ["budget.time: ", "90s, 30m, 4h or 1d12h"],
    ),
    "a name": ("»name: other\n" + VALID, ["name: ", "named after its file", "'space'"]),
    "an indentation by tabs": ("sampler: grid\nparameters:\n»\tlr: 1\n", ["not YAML"]),
    "a bracket left open": ("sampler: [grid\nmax_epochs»: 3\n", ["not YAML", "','", "']'"]),
    "two colons": ("sampler: grid»: x\n", ["not YAML"]),
    "two documents": ("sampler: grid\n»---\nsampler: tpe\n", ["not YAML", "another document"]),
    "an alias of nothing": (HEAD + "  lr: »*rates\n", ["not YAML", "undefined alias"]),
    "a key of several words": (HEAD + "  »[a, b]: 1\n", ["a key is a single word"]),
    "a list alone": ("»- a\n- b\n", ["a search space is a mapping"]),
    "a word alone": ("»hello\n", ["a search space is a mapping"]),
    "a python object": (
        HEAD + "  lr: »!!python/name:os.system x\n",
        ["the tag", "python/name:os.system", "not allowed"],
    ),
    "a tag of someone's own": (HEAD + "  lr: »!rate x\n", ["the tag !rate is not allowed"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_file_line_column_and_remedy(write: Write, name: str) -> None:
    marked, fragments = MISTAKES[name]
    text, place = unmark(marked)
    path = write(text)
    error = error_of(path)
    assert error.startswith(f"{path}:{place}: ")
    assert "\n" not in error
    for fragment in fragments:
        assert fragment in error


DRAWN = "sampler: tpe\nmax_epochs: 2\nbudget: {trials: 5}\nparameters:\n"
CONDITIONAL = DRAWN + "  optimizer: [sgd, adam]\n  momentum: {type: float, low: 0, high: 0.9, when: {optimizer: sgd}}\n"

# What does not go together; » stands at the key that the message names.
RULES = {
    "a grid over a continuous range": (
        HEAD + "  »lr: {type: float, low: 0, high: 1}\n",
        ["parameters.lr: ", "is continuous", "give a list or a step", "sampler random or tpe"],
    ),
    "a sampler without an end": (
        "»sampler: tpe\nmax_epochs: 2\nparameters: {lr: 1}\n",
        ["sampler tpe never ends", "budget.trials or budget.time"],
    ),
    "a grace period as long as the training": (
        VALID + "scheduler: {name: asha, »grace_period: 2}\n",
        ["scheduler.grace_period: ", "grace_period 2 must be below max_epochs 2"],
    ),
    "a scheduler over one epoch": (
        VALID.replace("max_epochs: 2", "max_epochs: 1") + "»scheduler: asha\n",
        ["scheduler: asha stops trials between epochs, but max_epochs is 1"],
    ),
    "a factor that median does not have": (
        VALID + "scheduler: {name: median, »reduction_factor: 2}\n",
        ["scheduler.reduction_factor: median has no reduction_factor"],
    ),
    "a parameter's name that is none": (HEAD + "  »batch-size: 1\n", ["Python identifier", "'batch-size'"]),
    "an option of another sampler": (
        DRAWN.replace("tpe", "{name: random, »n_startup_trials: 3}") + "  lr: 1\n",
        ["sampler.n_startup_trials: unknown key, allowed: name, seed"],
    ),
    "a misspelled option of a sampler": (
        DRAWN.replace("tpe", "{name: tpe, »multivariat: true}") + "  lr: 1\n",
        ["sampler.multivariat: unknown key, did you mean multivariate?"],
    ),
    "an unknown name among a sampler's options": (
        DRAWN.replace("tpe", "{»name: tpee, seed: 1}") + "  lr: 1\n",
        ["sampler.name: there is no sampler 'tpee', did you mean tpe?"],
    ),
    "a sampler without a name": (
        DRAWN.replace("sampler: tpe", "»sampler: {seed: 1}") + "  lr: 1\n",
        ["sampler: write a name"],
    ),
    "group without multivariate": (
        DRAWN.replace("tpe", "{name: tpe, multivariate: false, »group: true}") + "  lr: 1\n",
        ["sampler.group: group is a kind of multivariate"],
    ),
    "cmaes over choices alone": (
        "»" + DRAWN.replace("tpe", "cmaes") + "  lr: [1, 2]\n",
        ["sampler: cmaes learns int and float ranges", "take sampler tpe"],
    ),
    "qmc with a condition": (
        "»" + CONDITIONAL.replace("tpe", "qmc"),
        ["sampler: qmc draws all parameters jointly", "momentum", "`when`", "tpe, random or nsga2"],
    ),
    "cmaes with a condition": ("»" + CONDITIONAL.replace("tpe", "cmaes"), ["sampler: cmaes draws all", "momentum"]),
    "gp with a condition": ("»" + CONDITIONAL.replace("tpe", "gp"), ["sampler: gp draws all", "momentum"]),
    "a condition on an unknown parameter": (
        CONDITIONAL.replace("{optimizer: sgd}", "{»optimiser: sgd}"),
        ["parameters.momentum.when.optimiser: there is no parameter 'optimiser', did you mean optimizer?"],
    ),
    "a condition on a value that is never taken": (
        CONDITIONAL.replace("{optimizer: sgd}", "{»optimizer: sdg}"),
        ["parameters.momentum.when.optimizer: optimizer is never 'sdg', did you mean sgd?"],
    ),
    "a condition on a value outside a range": (
        DRAWN + "  n: {type: int, low: 1, high: 3}\n  x: {choices: [1], when: {»n: [3, 4]}}\n",
        ["parameters.x.when.n: n is never 4, it lies from 1 to 3"],
    ),
    "a condition of no value": (
        CONDITIONAL.replace("{optimizer: sgd}", "{»optimizer: []}"),
        ["parameters.momentum.when.optimizer: ", "at least 1"],
    ),
    "conditions in a circle": (
        DRAWN
        + "  a: {choices: [1], »when: {b: 1}}\n  b: {choices: [1], when: {c: 1}}\n  c: {choices: [1], when: {a: 1}}\n",
        ["parameters.a.when: in a circle each depends on the next: a -> b -> c -> a"],
    ),
    "a condition on itself": (
        DRAWN + "  a: {choices: [1], »when: {a: 1}}\n",
        ["parameters.a.when: in a circle", "a -> a"],
    ),
    "a constraint on an unknown parameter": (
        DRAWN + "  lr: [1, 2]\nconstraints: [»lr < batchsize]\n",
        ["constraints.0: there is no parameter 'batchsize', allowed: lr, max_epochs"],
    ),
    "a constraint that is no comparison": (
        DRAWN + "  lr: [1, 2]\nconstraints: [»lr + 1]\n",
        ["constraints.0: a constraint is a comparison", "'lr + 1'"],
    ),
    "a constraint that cannot be read": (
        DRAWN + "  lr: [1, 2]\nconstraints: [»lr <= ]\n",
        ["constraints.0: 'lr <=' is not an expression"],
    ),
    "a constraint that calls out": (
        DRAWN + "  lr: [1, 2]\nconstraints: [»open('x') == 1]\n",
        ["constraints.0: ", "no function 'open'", "sqrt"],
    ),
    "a constraint that looks into objects": (
        DRAWN + "  lr: [1, 2]\nconstraints: [»lr.__class__ == 1]\n",
        ["constraints.0: ", "only arithmetic"],
    ),
    "a constraint too long": (
        DRAWN + "  lr: [1, 2]\nconstraints: [»" + "lr + " * 50 + "1 > 0]\n",
        ["constraints.0: ", "at most 200 characters"],
    ),
    "a constraint that no sample meets": (
        DRAWN + "  lr: {type: float, low: 0, high: 1}\nconstraints: [lr > 0.1, »lr > 2]\n",
        ["constraints.1: none of 1000 random configurations is possible with it: lr > 2"],
    ),
    "constraints that no sample meets together": (
        DRAWN + "  lr: {type: float, low: 0, high: 1}\n»constraints: [lr > 0.5, lr < 0.5]\n",
        ["constraints: none of 1000 random configurations meets all of them together"],
    ),
    "a constraint that removes the whole grid": (
        VALID + "constraints: [»lr * batch_size > 100]\n",
        ["constraints.0: no configuration of the grid is possible with it"],
    ),
    "a derived value that never has a value": (
        VALID + "»derived: {x: 1 / (lr - lr)}\n",
        ["derived: no configuration of the grid is possible with it", "1 / (lr - lr) cannot be computed", "zero"],
    ),
    "a derived value of an unknown name": (
        VALID + "derived: {»x: 0.05 * max_epoch}\n",
        ["derived.x: there is no parameter 'max_epoch', did you mean max_epochs?"],
    ),
    "a derived value that has the name of a parameter": (
        VALID + "derived: {»lr: 2 * 3}\n",
        ["derived.lr: another value has this name already"],
    ),
    "derived values in a circle": (
        VALID + "derived: {»a: b + 1, b: a + 1}\n",
        ["derived.a: in a circle each is derived from the next: a -> b -> a"],
    ),
    "a derived value that is a number already": (VALID + "derived: {»a: 3}\n", ["derived.a: ", "string", "3"]),
    "a default that is no choice": (
        HEAD + "  lr: {type: categorical, choices: [1, 2], »default: 3}\n",
        ["parameters.lr.default: 3 is none of the choices [1, 2]"],
    ),
    "a default outside its range": (
        DRAWN + "  lr: {type: float, low: 0, high: 1, »default: 2}\n",
        ["parameters.lr.default: 2.0 is not in the range from 0.0 to 1.0"],
    ),
    "a default between the steps": (
        DRAWN + "  n: {type: int, low: 0, high: 10, step: 5, »default: 4}\n",
        ["parameters.n.default: 4 is not in the range from 0 to 10 in steps of 5"],
    ),
    "a command and a trainable": (
        VALID + "trainable: my_module:train\n»command: python train.py --lr {lr}\n",
        ["command: give either command or trainable"],
    ),
    "a placeholder of an unknown value": (
        VALID + "»command: python train.py --lr {lrr}\n",
        ["command: there is no value {lrr}, did you mean lr?"],
    ),
    "a placeholder with a format": (
        VALID + "»command: python train.py --lr {lr:.3f}\n",
        ["command: write {lr} without ':.3f'"],
    ),
    "a quote left open in a command": (
        VALID + "»command: python 'train.py\n",
        ["command: cannot be split into arguments", "quotation"],
    ),
    "a command of nothing": (VALID + "»command: ''\n", ["command: names no program"]),
    "a program by placeholder": (VALID + "»command: '{lr} x'\n", ["command: the program cannot be a placeholder"]),
    # What comes later is refused, never ignored.
    "several objectives": (
        VALID + "»objectives: [{metric: a, direction: minimize}, {metric: b}]\n",
        ["objectives: ", "not built yet"],
    ),
    "a warm start": (VALID + "»warm_start: [grid]\n", ["warm_start: ", "not built yet"]),
    "replicates": (VALID + "»replicates: 3\n", ["replicates: ", "not built yet"]),
    "a budget of GPU-hours": (VALID + "budget: {»gpu_hours: 8}\n", ["budget.gpu_hours: ", "not built yet"]),
    "population-based training": (VALID + "»scheduler: pbt\n", ["scheduler: pbt is not built yet"]),
}


@pytest.mark.parametrize("name", RULES)
def test_a_broken_rule_is_one_line_with_file_line_column_and_remedy(write: Write, name: str) -> None:
    marked, fragments = RULES[name]
    text, place = unmark(marked)
    path = write(text)
    error = error_of(path)
    assert error.startswith(f"{path}:{place}: ")
    assert "\n" not in error
    for fragment in fragments:
        assert fragment in error


def test_rules_and_single_keys_are_told_together(write: Write) -> None:
    """A section with a mistake of its own hides no other, and no rule is guessed about it."""
    path = write(
        "sampler: cmaes\nmax_epochs: many\nbudgett: {trials: 3}\nparameters:\n"
        "  lr: {type: float, low: 5, high: 3}\n  m: {choices: [1, 2], when: {lrr: 1}}\n"
        "constraints: [zzz > 1, lr > 1]\nderived: {w: 1 +}\nwarm_start: [grid]\n"
    )
    found = re.findall(re.escape(str(path)) + r":(\d+):\d+: ([\w.]+): ", error_of(path))
    assert found == [
        ("1", "sampler"),  # cmaes and `when`
        ("1", "sampler"),  # no end
        ("2", "max_epochs"),
        ("3", "budgett"),
        ("5", "parameters.lr"),
        ("6", "parameters.m.when.lrr"),
        ("7", "constraints.0"),
        ("8", "derived.w"),
        ("9", "warm_start"),
    ]


def test_all_mistakes_of_a_file_are_reported_at_once(write: Write) -> None:
    lines = [
        "sampler: grd",
        "max_epochs: -2",
        "metrc: val_loss",
        "parameters:",
        "  a: {type: int, low: 5, high: 3}",
        "  b: []",
    ]
    path = write("\n".join(lines) + "\n")
    found = dict(re.findall(re.escape(str(path)) + r":(\d+):\d+: ([\w.]+): ", error_of(path)))
    keys = ["sampler", "max_epochs", "metrc", "parameters.a", "parameters.b"]
    assert found == {"1": keys[0], "2": keys[1], "3": keys[2], "5": keys[3], "6": keys[4]}


@pytest.mark.parametrize("text", ["", "\n\n", "# only a remark\n", "---\n"])
def test_an_empty_file_is_told_what_it_needs(write: Write, text: str) -> None:
    path = write(text)
    error = error_of(path)
    assert error.startswith(f"{path}: ")
    for fragment in ("empty", "sampler", "max_epochs", "parameters"):
        assert fragment in error


def test_a_binary_file_is_not_read_as_yaml(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(bytes(range(256)))
    error = error_of(path)
    assert error.startswith(f"{path}: ")
    assert "UTF-8" in error


def test_a_control_character_is_not_yaml(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(VALID.encode() + b"description: \x00\n")
    error = error_of(path)
    assert error.startswith(f"{path}:")
    assert "not YAML" in error


def test_a_file_may_have_the_size_limit_and_not_a_byte_more(write: Write) -> None:
    filler = "#" * (MAX_FILE_BYTES - len(VALID))
    assert load_space(str(write(VALID + filler))).max_epochs == 2
    path = write(VALID + filler + "#")
    error = error_of(path)
    assert error.startswith(f"{path}: {MAX_FILE_BYTES + 1} bytes")
    assert f"at most {MAX_FILE_BYTES}" in error


def test_a_yaml_bomb_is_refused_before_it_goes_off(write: Write) -> None:
    # Nine levels of ten aliases each: a thousand million values out of a few hundred bytes.
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for inner, outer in itertools.pairwise("abcdefghi"):
        lines.append(f"{outer}: &{outer} [{', '.join([f'*{inner}'] * 10)}]")
    path = write("\n".join(lines) + "\n")
    error = error_of(path)
    assert re.match(re.escape(str(path)) + r":\d+:\d+: ", error)
    assert "expands to more than" in error


@pytest.mark.parametrize("text", [HEAD + "  lr: &x »[1, *x]\n", "sampler: grid\nparameters: &x\n  lr: »*x\n"])
def test_an_alias_that_contains_itself_is_refused(write: Write, text: str) -> None:
    path = write(unmark(text)[0])
    error = error_of(path)
    assert re.match(re.escape(str(path)) + r":\d+:\d+: ", error)
    assert "expands to more than" in error


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "absent.yaml"
    with pytest.raises(SettingError, match=re.escape(str(path))):
        load_space(str(path))


def test_a_folder_is_not_a_search_space(tmp_path: Path) -> None:
    path = tmp_path / "folder.yaml"
    path.mkdir()
    with pytest.raises(SettingError, match=re.escape(str(path))):
        load_space(str(path))


def test_an_unknown_name_gets_the_nearest_or_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "search_spaces"
    folder.mkdir()
    for name in ("wide", "deep"):
        (folder / f"{name}.yaml").write_text(VALID)
    with pytest.raises(SettingError, match=r"'wde'.*did you mean wide\?"):
        load_space("wde")
    with pytest.raises(SettingError, match=r"'zzz'.*deep, wide"):
        load_space("zzz")


def test_a_folder_without_search_spaces_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match=r"'grid'.*none here"):
        load_space("grid")


# --- overrides ----------------------------------------------------------------------------------------------------


def test_an_override_reaches_a_dotted_path_and_is_read_as_yaml(write: Write) -> None:
    path = str(write(VALID))
    space = load_space(
        path,
        ["max_epochs=1", "parameters.lr=1e-3", "parameters.batch_size=[8, 16]", "data.train_samples=2048", "metric=no"],
    )
    grid = space.grid_points()
    assert grid is not None
    assert list(grid) == [{"batch_size": 8, "lr": 1e-3}, {"batch_size": 16, "lr": 1e-3}]
    assert (space.max_epochs, space.data.train_samples, space.metric) == (1, 2048, "no")
    assert load_space(path).max_epochs == 2


def test_the_last_of_two_overrides_of_a_key_holds(write: Write) -> None:
    assert load_space(str(write(VALID)), ["seed=1", "seed=2"]).seed == 2


def test_an_override_adds_a_parameter_or_changes_a_part_of_a_range(write: Write) -> None:
    path = write(HEAD + "  lr: {type: int, low: 1, high: 3}\n")
    space = load_space(str(path), ["parameters.lr.high=2", "parameters.stem=cifar"])
    assert space.distributions() == {"lr": IntDistribution(1, 2), "stem": CategoricalDistribution(["cifar"])}


def test_a_sampler_given_by_name_grows_into_a_mapping(write: Write) -> None:
    path = write("sampler: tpe\nmax_epochs: 2\nbudget: {trials: 5}\nparameters: {lr: 1}\n")
    sampler = load_space(str(path), ["sampler.seed=3"]).sampler
    assert (sampler.name, sampler.seed) == ("tpe", 3)


def test_an_override_repairs_a_mistake_of_the_file(write: Write) -> None:
    path = write(VALID.replace("max_epochs: 2", "max_epochs: many"))
    assert load_space(str(path), ["max_epochs=4"]).max_epochs == 4


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("max_epoch=1", ["max_epoch: unknown key", "did you mean max_epochs?"]),
        ("data.train_sample=4", ["data.train_sample: unknown key", "did you mean train_samples?"]),
        ("max_epochs=many", ["max_epochs: ", "integer", "'many'"]),
        ("max_epochs=", ["max_epochs: ", "integer", "None"]),
        ("parameters.lr={type: int, low: 2, high: 1}", ["parameters.lr: ", "low must not be above high"]),
        ("parameters.lr=[1", ["not YAML"]),
        ("parameters.lr=!!python/name:os.system x", ["the tag", "not allowed"]),
        ("name=other", ["name: ", "named after its file"]),
    ],
)
def test_a_mistake_in_an_override_names_the_override(write: Write, override: str, fragments: list[str]) -> None:
    error = error_of(write(VALID), override)
    assert error.startswith(f"--set {override}: ")
    assert "\n" not in error
    for fragment in fragments:
        assert fragment in error


@pytest.mark.parametrize("override", ["max_epochs", "=1", "data.=1", ".lr=1", "max_epochs.low=1", "data.dataset.x.y=1"])
def test_an_override_that_has_no_place_is_a_setting_error(write: Write, override: str) -> None:
    path = write(VALID + "data: {dataset: [a]}\n")
    with pytest.raises(SettingError, match=re.escape(f"--set {override}: ")):
        load_space(str(path), [override])


def test_mistakes_of_file_and_override_come_together(write: Write) -> None:
    path = write(VALID + "metrc: val_loss\n")
    lines = error_of(path, "seed=-1").splitlines()
    assert len(lines) == 2
    assert sum(line.startswith("--set seed=-1: seed: ") for line in lines) == 1
    assert sum(line.startswith(f"{path}:6:1: metrc: ") for line in lines) == 1


# --- identity -----------------------------------------------------------------------------------------------------


@pytest.fixture
def space_with(write: Write) -> Callable[..., Space]:
    path = write(VALID)
    return lambda *overrides: load_space(str(path), overrides)


@pytest.mark.parametrize(
    "override",
    [
        "description=another text",
        "budget.trials=7",
        "budget.time=4h",
        "resources.cpu=2",
        "resources.gpu=0.5",
        "max_failures=0",
        "sampler=random",
    ],
)
def test_the_fingerprint_is_the_same_after_a_change_of(space_with: Callable[..., Space], override: str) -> None:
    assert space_with("budget.trials=5", override).fingerprint == space_with().fingerprint


@pytest.mark.parametrize(
    "override",
    [
        "parameters.lr=0.02",
        "parameters.batch_size=[64, 128]",
        "parameters.batch_size=64",
        "parameters.momentum=0.9",
        "parameters.batch_size={type: int, low: 64, high: 256}",
        "max_epochs=3",
        "data.dataset=fashion_mnist_sample",
        "data.train_samples=100",
        "data.val_samples=100",
        "metric=val_loss",
        "direction=minimize",
        "trainable=my_module:train",
        "seed=1",
    ],
)
def test_the_fingerprint_is_another_after_a_change_of(space_with: Callable[..., Space], override: str) -> None:
    assert space_with(override).fingerprint != space_with().fingerprint


def test_the_fingerprint_is_of_the_meaning_not_of_the_spelling(write: Write) -> None:
    one = load_space(str(write(VALID))).fingerprint
    other = load_space(str(write("parameters: {lr: 1e-2, batch_size: [64, 0256]}\nmax_epochs: 2\nsampler: grid\n")))
    assert other.fingerprint == one


# Of every kind of parameter that there was before conditions, constraints and derived values were built.
WIDE = """\
sampler: {name: random, seed: 0}
scheduler: {name: asha, grace_period: 2, reduction_factor: 3}
max_epochs: 20
data: {train_samples: 10000}
parameters:
  batch_size: {type: int, low: 16, high: 1024, log: true}
  layers: {type: int, low: 2, high: 8, step: 2}
  lr: {type: float, low: 1e-4, high: 1, log: true}
  momentum: {type: float, low: 0, high: 0.75, step: 0.25}
  optimizer: {type: categorical, choices: [adam, sgd]}
  stem: [imagenet, cifar]
  weight_decay: 0
budget: {trials: 40, time: 4h}
"""


def test_studies_from_before_a_feature_are_found_again_and_none_of_their_trials_is_run_twice(write: Write) -> None:
    """Literals of version 0.1.0 before `when`: another digest would start every study over."""
    grid, quick = (load_space(str(ROOT / f"search_spaces/{name}.yaml")) for name in ("grid", "quick"))
    assert grid.fingerprint == "475886d446719131"
    assert [grid.key(params) for params in grid.grid()] == ["99058fac81d3300c", "3ec2cfd63f40bab5", "50983ba13ed684c3"]
    assert quick.fingerprint == "51c3ed6ceba00e43"
    assert [quick.key(params) for params in quick.grid()] == [
        "e7b4f8f9687d3c8e",
        "b3e5a54b3618432b",
        "e2fefd34cb428f7f",
    ]
    wide = load_space(str(write(WIDE)))
    assert wide.fingerprint == "4768357b85cb7b71"
    params = {"lr": 0.01, "batch_size": 64, "stem": "cifar", "x": None, "y": True}
    assert wide.key(params) == "724a0f7eae686d82"


@pytest.mark.parametrize(
    ("override", "is_other", "has_other_keys"),
    [
        ("parameters.layers.default=4", False, False),
        ("constraints=[]", False, False),
        ("derived={}", False, False),
        ("replicates=1", False, False),
        ("sampler=tpe", False, False),
        ("parameters.layers.when={stem: cifar}", True, False),
        ("constraints=[lr < 0.5]", True, False),
        ("derived={twice: 2 * lr}", True, True),
        ("command=python train.py {lr}", True, True),
    ],
)
def test_what_is_used_of_the_new_features_is_part_of_the_identity(
    write: Write, override: str, is_other: bool, has_other_keys: bool
) -> None:
    path, params = str(write(WIDE)), {"lr": 0.01}
    one, other = load_space(path), load_space(path, [override])
    assert (other.fingerprint != one.fingerprint) == is_other
    assert (other.key(params) != one.key(params)) == has_other_keys


PARAMS = {"batch_size": 64, "lr": 0.01}


@pytest.mark.parametrize(
    "override",
    ["max_epochs=3", "parameters.batch_size=[64, 512]", "metric=val_loss", "budget.trials=7", "max_failures=0"],
)
def test_a_configuration_keeps_its_key_after_a_change_of(space_with: Callable[..., Space], override: str) -> None:
    assert space_with(override).key(PARAMS) == space_with().key(PARAMS)


@pytest.mark.parametrize(
    "override", ["seed=1", "data.train_samples=100", "data.val_samples=100", "trainable=my_module:train"]
)
def test_a_configuration_has_another_key_after_a_change_of(space_with: Callable[..., Space], override: str) -> None:
    assert space_with(override).key(PARAMS) != space_with().key(PARAMS)


def test_a_key_is_of_the_parameters_in_any_order(space_with: Callable[..., Space]) -> None:
    space = space_with()
    assert space.config_key({"lr": 0.01, "batch_size": 64}) == space.config_key(PARAMS)
    keys = {
        space.config_key(params)
        for params in (PARAMS, {**PARAMS, "lr": 0.02}, {"lr": 0.01}, {**PARAMS, "stem": "cifar"})
    }
    assert len(keys) == 4


# --- the trainable ------------------------------------------------------------------------------------------------

OWN_TRAINABLE = """
from hpo.train.loop import EpochReport

def train(params, *, data, seed, max_epochs, device, checkpoint=None):
    for epoch in range(1, max_epochs + 1):
        yield EpochReport(epoch, {"val_accuracy": params["x"] * epoch}, dict)

def evaluate(params, *, data, seed, max_epochs, device, checkpoint=None):
    return []

def train_short(params, *, data):
    yield from []

SIZE = 3
"""


def test_the_default_trainable_is_the_training_loop() -> None:
    from hpo.train.loop import train

    assert load_trainable(Space.model_fields["trainable"].default) is train


def test_a_function_of_the_users_own_is_a_trainable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_trainable_a.py").write_text(OWN_TRAINABLE)
    monkeypatch.syspath_prepend(tmp_path)
    own = load_trainable("own_trainable_a:train")
    reports = list(own({"x": 0.25}, data={}, seed=0, max_epochs=2, device="cpu"))
    assert [report.metrics["val_accuracy"] for report in reports] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("own_trainable_absent:train", ["no module 'own_trainable_absent'", "folder that the command runs in"]),
        ("own_trainable_b.absent:train", ["no module 'own_trainable_b.absent'"]),
        ("own_trainable_b:trian", ["own_trainable_b has no function 'trian'", "did you mean train?"]),
        ("own_trainable_b:evaluate", ["own_trainable_b:evaluate must be a generator function", "checkpoint=None"]),
        ("own_trainable_b:train_short", ["must be a generator function", "(params, *, data, seed, max_epochs, device"]),
        ("own_trainable_b:SIZE", ["own_trainable_b:SIZE must be a generator function"]),
    ],
)
def test_a_trainable_that_is_none_is_told_why(
    name: str, fragments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_trainable_b.py").write_text(OWN_TRAINABLE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrainableError) as caught:
        load_trainable(name)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_trainable_whose_own_import_fails_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_trainable_c.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        load_trainable("own_trainable_c:train")
