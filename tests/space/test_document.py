"""Reading YAML: what a scalar means, limits, positions, and overrides."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution

from hpo.errors import SettingError, SpaceError
from hpo.space.document import MAX_FILE_BYTES, MAX_PROBLEMS, MAX_YAML_DEPTH, MAX_YAML_NODES, Document
from hpo.space.messages import fields_by_key
from hpo.space.model import Space, load_space
from tests.space.conftest import ErrorOf, Load, Write
from tests.space.examples import FULL, HEAD, VALID, unmark

SECONDS = 5  # of CPU time until a costly file is refused: half a second on a fast machine

# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("0.0001", 1e-4),
        ("1E3", 1e3),
        (".5", 0.5),
        (".5e3", 500.0),
        ("5.", 5.0),
        ("-2", -2),
        ("+3", 3),
        ("010", 10),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0x1F", "0x1F"),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        (r'"\ud83d\ude00"', "😀"),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
        ("&anchor 7", 7),
        ("|\n    two\n    lines", "two\nlines\n"),
        (">-\n    one\n    line", "one line"),
    ],
)
def test_a_scalar_has_the_value_of_yaml_1_2_and_a_plain_python_type(write: Write, written: str, value: object) -> None:
    document = Document(write(f"a: {written}\nb: [x, y]\n"))
    assert document.data == {"a": value, "b": ["x", "y"]}
    assert type(document.data["a"]) is type(value)


@pytest.mark.parametrize("name", ["1", "null", "true", "<<", "on", "'quoted'"])
def test_a_key_is_a_string(write: Write, name: str) -> None:
    data = Document(write(f"{name}: {{{name}: 1}}\n")).data
    key = name.strip("'")
    assert data == {key: {key: 1}}
    assert [type(part) for part in (data, *data, data[key])] == [dict, str, dict]


@pytest.mark.parametrize(
    ("text", "description"),
    [
        ("description:\ta\t# comment\n", "a"),
        ("description\t: a\t\n", "a"),
        ("description: a\tb \t c\n", "a\tb \t c"),
        ("description: a \t\n  b\n  \t c\n\n  d\t\n", "a b c\nd"),
        ("description: a\n \t# comment\n", "a"),
        ("description: |\n  a\tb\n", "a\tb\n"),
        ("description: 'a\tb'\t\n", "a\tb"),
        ("description: a\u2028b\x85 c\n", "a\u2028b\x85 c"),
    ],
)
def test_tabs_separate_words_as_spaces_do(write: Write, text: str, description: str) -> None:
    document = Document(write(text + "seed:\t1\n"))
    assert document.data == {"description": description, "seed": 1}


def test_infinity_and_nan_are_numbers(write: Write) -> None:
    data = Document(write("a: [.inf, -.INF, .nan]\n")).data
    assert str(data["a"]) == "[inf, -inf, nan]"


def test_a_directive_does_not_change_the_rules(write: Write) -> None:
    assert Document(write("%YAML 1.1\n---\na: [yes, 010, 1e-4, 1:30]\n")).data == {"a": ["yes", 10, 1e-4, "1:30"]}


def test_an_alias_has_the_value_of_its_anchor(load: Load) -> None:
    space = load(HEAD + "  a: &sizes [1, 2]\n  b: *sizes\n")
    assert list(space.grid_points()) == [{"a": a, "b": b} for a in (1, 2) for b in (1, 2)]


def test_an_anchor_may_be_redefined(write: Write) -> None:
    assert Document(write("a: &x 1\nb: *x\nc: &x 2\nd: *x\n")).data == {"a": 1, "b": 1, "c": 2, "d": 2}


def test_json_is_yaml(write: Write) -> None:
    data = {"text": 'é "😀" \\ \n', "list": [1, 2.5, None, True, {"a": {}}], "tiny": 1e-300}
    assert Document(write(json.dumps(data))).data == data


# --- files that are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_an_empty_file_is_refused_with_the_required_keys(tmp_path: Path, error_of: ErrorOf, text: str) -> None:
    error = error_of(text)
    assert error.startswith(f"{tmp_path}/space.yaml: the file is empty")
    for key in ("sampler", "max_epochs", "parameters"):
        assert key in error


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(SpaceError, match=re.escape(f"{path}: not a text file in UTF-8")):
        load_space(str(path))


def test_a_control_character_is_refused_with_its_position(error_of: ErrorOf) -> None:
    assert re.search(r"space\.yaml:6:16: not YAML: .*'\\x01'", error_of(VALID + "description: a \x01\n"))


@pytest.mark.parametrize("text", [r'HEAD  a: "\ud83d"', r'HEAD  a: !!int "\ude00"'])
def test_half_a_character_is_refused(error_of: ErrorOf, text: str) -> None:
    assert re.search(r"space\.yaml:4:6: ", error_of(text.replace("HEAD", HEAD)))


def test_a_file_of_the_maximum_size_is_read_and_a_larger_one_is_refused(write: Write, tmp_path: Path) -> None:
    comment = "#" * (MAX_FILE_BYTES - len(VALID))
    assert load_space(str(write(VALID + comment))).max_epochs == 2
    path = write(VALID + comment + "#")
    with pytest.raises(SpaceError) as caught:
        load_space(str(path))
    assert str(caught.value) == f"{path}: {MAX_FILE_BYTES + 1} bytes; a search space has at most {MAX_FILE_BYTES}"


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_bytes(b"a" * 10_000_000)
    started = time.process_time()
    with pytest.raises(SpaceError, match="10000000 bytes; a search space has at most"):
        load_space(str(path))
    assert time.process_time() - started < SECONDS


@pytest.mark.parametrize("kind", ["absent", "folder", "fifo", "/dev/zero"])
def test_a_path_that_is_not_a_file_is_refused_with_its_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "space.yaml"
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "/dev/zero":
            path.symlink_to(kind)
    with pytest.raises(SettingError, match=re.escape(str(path)) + ": (not a|no such) file"):
        load_space(str(path))


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + VALID.encode())
    assert load_space(str(path)).max_epochs == 2


def test_windows_line_endings_count_as_one_line(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(FULL.replace("\n", "\r\n").replace("seed: 0\r", "sed: 0\r").encode())
    with pytest.raises(SpaceError) as caught:
        load_space(str(path))
    line = FULL.splitlines().index("seed: 0") + 1
    assert f"{path}:{line}:1: sed: unknown key, did you mean seed?" in str(caught.value).splitlines()


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_yaml_bomb_is_refused_before_it_is_expanded(error_of: ErrorOf) -> None:
    # Nine levels of ten aliases: 1e9 values from a few hundred bytes.
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for inner, outer in itertools.pairwise("abcdefghi"):
        lines.append(f"{outer}: &{outer} [{', '.join([f'*{inner}'] * 10)}]")
    started = time.process_time()
    error = error_of("\n".join(lines) + "\n")
    assert time.process_time() - started < SECONDS
    assert re.search(rf"space\.yaml:\d+:\d+: more than {MAX_YAML_NODES} values", error)


@pytest.mark.parametrize("text", [HEAD + "  lr: &x [1, »*x]\n", "sampler: grid\nparameters: &x\n  lr: »*x\n"])
def test_an_alias_that_contains_itself_is_refused(error_of: ErrorOf, text: str) -> None:
    text, position = unmark(text)
    assert f"space.yaml:{position}: an alias cannot contain itself" in error_of(text)


def test_values_up_to_the_limits_are_allowed(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpo.space.document.MAX_YAML_NODES", 100)
    nested: list[object] = []
    for _ in range(MAX_YAML_DEPTH - 2):
        nested = [nested]
    values = [1] * 98
    assert Document(write(f"a: {nested}\n")).data == {"a": nested}
    assert Document(write(f"a: {values}\n")).data == {"a": values}
    for text, problem in [(f"a: [[[{nested}]]]\n", "inside each other"), (f"a: {[*values, 1]}\n", "values")]:
        with pytest.raises(SpaceError, match=f"more than .* {problem}"):
            Document(write(text))


GRID = "sampler: grid\nmax_epochs: 2\nparameters: "
COSTLY = {
    "nested lists": "a: " + "[" * 90_000,
    "nested mappings": "a: " + "{a: " * 20_000,
    "nested block lists": "- " * 40_000,
    "nested aliases": "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 500)),
    "many values in a line": "a: [" + "1," * 49_000 + "1]",
    "many lists": "a: [" + "[]," * 30_000 + "1]",
    "many lines": "a:\n" + "- x\n" * 24_000,
    "a long string": "a: '" + "x y\n  " * 16_000 + "'",
    "a long number": GRID.replace("2", "9" * 5000) + "{lr: 1}\n",
    "a long value": GRID + "{lr: " + "9" * 5000 + "}\n",
    "too many parameters": GRID + "\n" + "".join(f"  p{i}: 1\n" for i in range(9000)),
    "a large grid": GRID + "\n" + "".join(f"  p{i}: [1, 2, 3]\n" for i in range(200)),
    "many unknown keys": GRID + "{lr: 1}\n" + "".join(f"parametrs{i}: 1\n" for i in range(4000)),
    "many invalid ranges": GRID
    + "\n"
    + "".join(f"  p{i}: {{type: int, low: 5, high: 1, steb: 1}}\n" for i in range(200)),
    "constraints with large powers": "sampler: tpe\nmax_epochs: 2\nbudget: {trials: 2}\n"
    "parameters: {lr: {type: float, low: 0, high: 1}}\nconstraints:\n"
    + "  - lr ** 999 * (lr + 1) ** 999 < 0 and lr > 0\n"
    * 10,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_file_is_refused_quickly(error_of: ErrorOf, name: str) -> None:
    started = time.process_time()
    error = error_of(COSTLY[name])
    assert time.process_time() - started < SECONDS
    assert len(error) < 100_000


# --- error messages ---------------------------------------------------------------------------------------------------


def test_only_the_first_problems_of_many_are_reported(error_of: ErrorOf) -> None:
    lines = error_of(GRID + "{lr: 1}\n" + "".join(f"key{i}: 1\n" for i in range(500))).splitlines()
    assert len(lines) == MAX_PROBLEMS + 1
    for i, line in enumerate(lines[:-1]):
        assert f"space.yaml:{i + 4}:1: key{i}: unknown key" in line
    assert lines[-1].endswith(f"space.yaml: and {500 - MAX_PROBLEMS} more mistakes")


def test_a_problem_inside_an_alias_has_the_position_of_the_anchor(error_of: ErrorOf) -> None:
    error = error_of(HEAD + "  a: &range {type: int, low: 1, high: 2, »lgo: true}\n  b: *range\n".replace("»", ""))
    assert re.findall(r"space\.yaml:(\d+:\d+): parameters\.(\w)\.lgo", error) == [("4:42", "a"), ("4:42", "b")]


def test_the_position_of_a_missing_key_is_that_of_its_section(write: Write) -> None:
    document = Document(write("# comment\na: 1\nb:\n  - {c: 1}\n"))
    path = str(document.path)
    assert document.position(()) == f"{path}:2:1: "
    assert document.position(("b", 0, "d")) == f"{path}:4:5: "
    assert document.position(("b", 7)) == f"{path}:3:1: "
    assert document.position(("a", "x", "y")) == f"{path}:2:1: "


# --- overrides --------------------------------------------------------------------------------------------------------


def test_an_override_sets_a_dotted_path_to_a_yaml_value(load: Load) -> None:
    space = load(
        VALID,
        "max_epochs=1",
        "parameters.lr=1e-3",
        "parameters.batch_size=[8, 16]",
        "data.train_samples=2048",
        "metric=no",
    )
    assert list(space.grid_points()) == [{"batch_size": 8, "lr": 1e-3}, {"batch_size": 16, "lr": 1e-3}]
    assert (space.max_epochs, space.data.train_samples, space.metric) == (1, 2048, "no")
    assert load(VALID).max_epochs == 2


def test_the_last_override_of_a_key_wins(load: Load) -> None:
    assert load(VALID, "seed=1", "seed=2").seed == 2


def test_an_override_can_add_a_parameter_or_change_a_bound(load: Load) -> None:
    space = load(HEAD + "  lr: {type: int, low: 1, high: 3}\n", "parameters.lr.high=2", "parameters.stem=cifar")
    assert space.distributions() == {"lr": IntDistribution(1, 2), "stem": CategoricalDistribution(["cifar"])}


def test_an_override_can_add_an_option_to_a_sampler_that_is_only_a_name(load: Load) -> None:
    sampler = load("sampler: tpe\nmax_epochs: 2\nbudget: {trials: 5}\nparameters: {lr: 1}\n", "sampler.seed=3").sampler
    assert (sampler.name, sampler.seed) == ("tpe", 3)


def test_an_override_can_replace_an_invalid_value(load: Load) -> None:
    assert load(VALID.replace("max_epochs: 2", "max_epochs: many"), "max_epochs=4").max_epochs == 4


def test_null_means_that_a_key_is_not_given(load: Load) -> None:
    text = f"{VALID}warm_start: [grid]\nscheduler: {{name: median, grace_period: 1}}\ntrainable: a:b\n"
    text += "constraints: [lr < 1]\nbudget: {time: 1h}\n"
    overrides = [
        f"{key}=null" for key in ("warm_start", "scheduler.grace_period", "trainable", "constraints", "budget.time")
    ]
    space = load(text, *overrides)
    assert (space.warm_start, space.trainable, space.constraints) == ([], "hpo.train:train", [])
    assert (space.scheduler.name, space.scheduler.grace_period, space.budget.time) == ("median", "auto", None)
    everything = load(
        VALID, *(f"{key}=null" for key in fields_by_key(Space) if key not in {"name", "parameters", "max_epochs"})
    )
    plain = load(VALID, "sampler=null")
    assert everything.model_dump() == plain.model_dump()
    assert everything.fingerprint == plain.fingerprint


def test_null_is_a_value_of_a_parameter(load: Load) -> None:
    space = load(VALID, "parameters.lr=null", "parameters.kind={choices: [null, a], default: null}")
    assert space.parameters["lr"].grid_values() == [None]
    assert space.parameters["kind"].model_fields_set == {"choices", "default"}


def test_a_script_may_be_set_aside_with_null(load: Load, error_of: ErrorOf) -> None:
    text = VALID.replace("sampler:", "command: python a.py --lr {lr} --batch-size {batch_size}\nsampler:")
    assert load(text, "trainable=null").command is not None
    assert load(text, "command=null").command is None
    assert "trainable" in error_of(text, "trainable=a:b")


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("max_epoch=1", ["max_epoch: unknown key", "did you mean max_epochs?"]),
        ("data.train_sample=4", ["data.train_sample: unknown key", "did you mean train_samples?"]),
        ("max_epochs=many", ["max_epochs: ", "integer", "'many'"]),
        ("max_epochs=", ["max_epochs: ", "integer", "None"]),
        ("max_epoch=null", ["max_epoch: unknown key", "did you mean max_epochs?"]),
        ("budget.tmie=null", ["budget.tmie: unknown key", "did you mean time?"]),
        ("parameters.lr={type: int, low: 2, high: 1}", ["parameters.lr: ", "low must not be above high"]),
        ("parameters.lr={type: int, low: 2, high: 3, stp: 1}", ["parameters.lr.stp: unknown key", "mean step?"]),
        ("parameters.lr=[1", ["not YAML"]),
        ("parameters.lr=!!python/name:os.system x", ["the tag", "not allowed"]),
        ("name=other", ["name: ", "the name of its file"]),
    ],
)
def test_a_mistake_in_an_override_names_the_override(error_of: ErrorOf, override: str, fragments: list[str]) -> None:
    error = error_of(VALID, override)
    assert error.startswith(f"--set {override}: ")
    assert "\n" not in error
    for fragment in fragments:
        assert fragment in error


@pytest.mark.parametrize("override", ["max_epochs", "=1", "data.=1", ".lr=1", "max_epochs.low=1", "data.dataset.x.y=1"])
def test_an_override_without_a_value_or_a_possible_key_is_refused(write: Write, override: str) -> None:
    path = write(VALID + "data: {dataset: [a]}\n")
    with pytest.raises(SettingError, match=re.escape(f"--set {override}: ")):
        load_space(str(path), [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_epochs.a=1", "max_epochs is a single value: it has no key 'a'"),
        ("constraints.0=a", "constraints is a list: it has no key '0'"),
        ("constraints.0.b=a", "constraints is a list: it has no key '0'"),
    ],
)
def test_an_override_below_a_value_says_what_that_is(write: Write, override: str, message: str) -> None:
    path = write(VALID + "constraints: [lr < 1]\n")
    with pytest.raises(SettingError, match=message):
        load_space(str(path), [override])


def test_mistakes_of_the_file_and_of_overrides_are_reported_together(error_of: ErrorOf, tmp_path: Path) -> None:
    lines = error_of(VALID + "metrc: val_loss\n", "seed=-1").splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{tmp_path}/space.yaml:6:1: metrc: ")
    assert lines[1].startswith("--set seed=-1: seed: ")
