from __future__ import annotations

import pytest

from hpo.space.command import (
    PLACEHOLDERS,
    build_arguments,
    find_command_mistakes,
    positional_placeholders,
    uses_checkpoint_dir,
)


def test_values_are_inserted_into_arguments_without_a_shell() -> None:
    values = {"lr": 1e-5, "name": "a b; $(touch x) 'quoted' {lr}", "flag": True, "nothing": None, "seed": 3}
    command = "python 'my train.py' --lr {lr} --name={name} {flag} {nothing} --both={seed}-{lr} '{\"a\": 1}' {} $HOME *"
    assert build_arguments(command, values) == [
        "python",
        "my train.py",
        "--lr",
        "1e-05",
        "--name=a b; $(touch x) 'quoted' {lr}",
        "true",
        "null",
        "--both=3-1e-05",
        '{"a": 1}',
        "{}",
        "$HOME",
        "*",
    ]


@pytest.mark.parametrize(
    ("values", "arguments"),
    [
        ({"lr": -1, "momentum": 0.9}, ["--lr", "-1", "--momentum", "0.9", "0.9", "--last"]),
        ({"lr": -1, "beta": 2}, ["--lr", "-1", "--beta=2", "--last"]),
    ],
)
def test_the_argument_of_an_inactive_parameter_is_left_out_with_its_flag(
    values: dict[str, float], arguments: list[str]
) -> None:
    command = "python t.py --lr {lr} --momentum {momentum} --beta={beta} {momentum} --last"
    assert build_arguments(command, values) == ["python", "t.py", *arguments]


def test_placeholders_are_known_names_and_the_values_of_a_trial() -> None:
    command = "python t.py {warmup} " + " ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    assert find_command_mistakes(command, ["warmup"]) == []


@pytest.mark.parametrize(
    ("command", "mistakes"),
    [
        ("python t.py {warmup}",
         ["there is no value {warmup}, allowed: lr, seed, max_epochs, device, data_dir, checkpoint_dir"]),
        ("python t.py {lrr} {sed}",
         ["there is no value {lrr}, did you mean lr?", "there is no value {sed}, did you mean seed?"]),
        ("python t.py {lr:.3f}", ["write {lr} without ':.3f'"]),
        ("python 't.py", ["cannot be split into arguments: No closing quotation"]),
        ("", ["is empty"]),
        ("{lr} t.py", ["the program cannot be a placeholder"]),
    ],
)  # fmt: skip
def test_every_mistake_is_described(command: str, mistakes: list[str]) -> None:
    assert find_command_mistakes(command, ["lr"]) == mistakes


@pytest.mark.parametrize(
    ("command", "expected"),
    [("python t.py {checkpoint_dir}", True), ("python t.py checkpoint_dir", False), ("python t.py {data_dir}", False)],
)
def test_a_command_with_the_placeholder_uses_a_checkpoint_dir(command: str, expected: bool) -> None:
    assert uses_checkpoint_dir(command) is expected


def test_a_positional_value_that_looks_like_an_option_is_refused() -> None:
    command = "python t.py {mode} --lr {lr} --flag {flag} --x={x} {lr}"
    assert positional_placeholders(command) == {"mode", "lr"}
    values = {"mode": "fast", "lr": -1, "flag": "-f", "x": "-x"}
    assert build_arguments(command, values)[2:] == ["fast", "--lr", "-1", "--flag", "-f", "--x=-x", "-1"]
    with pytest.raises(ValueError, match="mode '-rf': the script would take it for an option"):
        build_arguments(command, values | {"mode": "-rf"})
