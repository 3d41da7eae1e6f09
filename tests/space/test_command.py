"""A script's command line: placeholders become arguments, without a shell."""

from __future__ import annotations

import pytest

from hpo.space.command import PLACEHOLDERS, build_arguments, find_command_mistakes, uses_checkpoint_dir


def test_a_value_replaces_its_placeholder_and_is_never_interpreted_by_a_shell() -> None:
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


def test_a_command_can_use_derived_values_and_values_of_the_trial() -> None:
    command = "python t.py {warmup} " + " ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    assert find_command_mistakes(command, ["warmup"]) == []
    assert find_command_mistakes(command, []) == [
        "there is no value {warmup}, allowed: seed, max_epochs, device, data_dir, checkpoint_dir"
    ]


def test_every_mistake_of_a_command_is_found() -> None:
    assert find_command_mistakes("python t.py {lrr} {lr:.3f} {x}", ["lr"]) == [
        "there is no value {lrr}, did you mean lr?",
        "write {lr} without ':.3f'",
        "there is no value {x}, allowed: lr, seed, max_epochs, device, data_dir, checkpoint_dir",
    ]


def test_a_script_resumes_if_its_command_has_the_checkpoint_folder() -> None:
    assert uses_checkpoint_dir("python t.py --out {checkpoint_dir}/last")
    assert not uses_checkpoint_dir("python t.py --out checkpoint_dir")
