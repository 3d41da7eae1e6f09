"""The examples, links and commands of README.md, hpo/README.md and CONTRIBUTING.md."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import hpo
from hpo import run
from hpo.space.model import load_space
from hpo.trainable import load_trainable
from storage.database import open_database
from tests.factories import ROOT, search_without_ray

# Pages whose examples are checked here. search_spaces/README.md and storage/README.md have tests in their packages.
PAGES = ("README.md", "hpo/README.md", "CONTRIBUTING.md")
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
OTHERS = ("CHANGELOG.md", "benchmarks/README.md", "deploy/README.md", "search_spaces/README.md", "storage/README.md")
ALL_PAGES = [*PAGES, *OTHERS]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Modules of this repository that are started as programs, with the verb that some of them are short for.
VERB_OF_MODULE = {"hpo.run": "run", "hpo.report": "report", "hpo.dashboard": "dashboard"}

# A space with the name and the metric of the shipped one, and a trainable that takes no time.
QUICK = """
trainable: instant:train
sampler: grid
max_epochs: 2
resources: {cpu: 1, gpu: 0}
parameters: {x: [1, 2]}
"""
INSTANT = """
from hpo.trainable import EpochReport


def train(params, *, data, seed, max_epochs, device, checkpoint=None):
    for epoch in range(1, max_epochs + 1):
        yield EpochReport(epoch, {"val_accuracy": params["x"] * epoch}, dict)
"""


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page in a language; the language is empty for plain text."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", TEXTS[page], re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def block(start: str) -> str:
    """Return the only code block of all pages that starts with a text."""
    fences = re.findall(r"^```\w*\n(.*?)^```$", "\n".join(TEXTS.values()), re.MULTILINE | re.DOTALL)
    matching: list[str] = [text for text in fences if text.startswith(start)]
    assert len(matching) == 1, f"{len(matching)} blocks start with {start!r}"
    return matching[0]


def inline_code(page: str) -> list[str]:
    """Return the code spans of a page, without its code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL))


def command_lines() -> list[str]:
    """Return every line of the shell blocks, and every code span that is a command."""
    lines = [line for page in PAGES for text in blocks(page, "sh") for line in text.splitlines()]
    spans = [span for page in PAGES for span in inline_code(page)]
    return [*lines, *(span for span in spans if re.match(r"(uv run |python -m |hpo [a-z])", span))]


def hpo_arguments(line: str) -> list[str] | None:
    """Return the arguments of `hpo` in a command line; None for another program."""
    found = re.search(r"(?:^|uv run |\()(?:python -m (hpo\.\w+)|hpo(?= ))([^#)|]*)", line)
    if found is None:
        return None
    module, rest = found.groups()
    return [*([VERB_OF_MODULE[module]] if module else []), *shlex.split(rest.partition(" > ")[0])]


# --- README.md ----------------------------------------------------------------------------------------------------------


def test_the_readme_has_at_most_130_lines() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 130


def test_the_table_of_commands_lists_every_verb() -> None:
    rows = re.findall(r"^\| `hpo (\w+)", TEXTS["README.md"], re.MULTILINE)
    assert sorted(rows) == sorted(run.cli.commands)


def test_ci_finds_the_test_command_in_the_readme() -> None:
    found = re.findall(r"^pip install uv && (uv run pytest.*)$", TEXTS["README.md"], re.MULTILINE)
    assert found == ["uv run pytest"]


def test_the_sample_output_is_that_of_the_shipped_quick() -> None:
    first, *lines = block("quick: ").splitlines()
    quick = load_space(str(ROOT / "search_spaces/quick.yaml"))
    assert first == f"quick: {quick.description}"
    rule = next(number for number, line in enumerate(lines) if "──" in line)
    header = lines[rule - 1].split()
    table = list(itertools.takewhile(str.strip, lines[rule + 1 :]))
    found = [dict(zip(header, row.split(), strict=False)) for row in table]
    points = [{name: str(value) for name, value in point.items()} for point in quick.grid_points()]
    by_number = sorted(found, key=lambda row: int(row["trial"]))
    assert [{name: row[name] for name in points[0]} for row in by_number] == points
    assert {row["epochs"] for row in found} == {str(quick.max_epochs)}
    started = re.findall(r"^trial (\d+) starts: (.*)$", "\n".join(lines), re.MULTILINE)
    for number, params in [
        *started,
        *re.findall(r"^trial (\d+) COMPLETE: .*\((.*)\)$", "\n".join(lines), re.MULTILINE),
    ]:
        assert params == ", ".join(f"{name} {value}" for name, value in points[int(number)].items())
    assert started


@pytest.mark.slow
@pytest.mark.ray
def test_the_python_example_of_the_readme_runs(tmp_path: Path) -> None:
    (code,) = blocks("README.md", "python")
    (tmp_path / "search_spaces").mkdir()
    (tmp_path / "search_spaces/quick.yaml").write_text(QUICK)
    (tmp_path / "instant.py").write_text(INSTANT)
    (tmp_path / "example.py").write_text(code)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HPO_", "RAY_"))}
    ended = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=variables | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "0 COMPLETE {'x': 1} (2.0,) 2.0",
        "1 COMPLETE {'x': 2} (4.0,) 4.0",
        "best: {'x': 2} (4.0,)",
    ]
    with (tmp_path / "trials.csv").open() as file:
        assert [row["params_x"] for row in csv.DictReader(file)] == ["1", "2"]


# --- hpo/README.md ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_trainable_runs_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("# digits.py")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    (tmp_path / "digits.py").write_text(code)
    (tmp_path / "digits.yaml").write_text(block("# search_spaces/digits.yaml"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "digits", raising=False)
    space = load_space(str(tmp_path / "digits.yaml"))
    assert load_trainable(space.trainable).__module__ == "digits"
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        study, _ = search_without_ray(space, database, tmp_path)
        trials = study.trials()
        assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
        assert all(list(trial.intermediate_values) == [1, 2, 3, 4, 5] for trial in trials)
        assert max(trial.value for trial in trials if trial.value is not None) > 0.9
        names = {name for epochs in study.metrics().values() for metrics in epochs.values() for name in metrics}
        assert names == {"accuracy", "epoch_seconds"}


@pytest.mark.slow
def test_the_script_runs_without_the_flag_of_an_inactive_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = block("# search_spaces/script.yaml")
    (tmp_path / "script.yaml").write_text(text.replace("command: python", f"command: {sys.executable}"))
    (tmp_path / "train.py").write_text(
        "import argparse, json\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--lr', type=float, required=True)\n"
        "parser.add_argument('--momentum', type=float)\n"
        "parser.add_argument('--epochs', type=int, required=True)\n"
        "given = parser.parse_args()\n"
        "for epoch in range(given.epochs):\n"
        "    print(json.dumps({'accuracy': given.lr, 'momentum': -1.0 if given.momentum is None else given.momentum}))\n"
    )
    monkeypatch.chdir(tmp_path)
    space = load_space("script.yaml")
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        study, _ = search_without_ray(space, database, tmp_path)
        trials, metrics = study.trials(), study.metrics()
        assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
        for trial in trials:
            assert len(metrics[trial.number]) == 3
            assert trial.value == pytest.approx(trial.params["lr"])
            assert metrics[trial.number][3]["momentum"] == pytest.approx(trial.params.get("momentum", -1.0))
        assert {trial.params["nesterov"] for trial in trials} == {True, False}
        assert list(tmp_path.glob("checkpoints/*/0/log.txt"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the study `quick`, two trials that take no time, in runs/hpo.db."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / "runs").mkdir()
    (folder / "quick.yaml").write_text(QUICK)
    (folder / "instant.py").write_text(INSTANT)
    with pytest.MonkeyPatch.context() as patch, open_database(f"sqlite:///{folder}/runs/hpo.db") as database:
        patch.syspath_prepend(folder)
        search_without_ray(load_space(str(folder / "quick.yaml")), database, folder)
        yield folder
        sys.modules.pop("instant", None)


@pytest.mark.slow
def test_the_python_example_of_the_package_runs(
    stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(stored)
    names: dict[str, Any] = {}
    exec(block("from hpo import list_studies"), names)
    assert capsys.readouterr().out == "quick finished {'COMPLETE': 2} 4.0\n"
    assert (names["epochs"], names["accuracies"]) == ([1, 2], [2.0, 4.0])
    assert list(names["frame"]["val_accuracy"]) == [1.0, 2.0, 2.0, 4.0]
    assert names["page"] == Path("runs/reports/quick/index.html")
    assert names["page"].is_file()


def test_the_example_of_a_new_verb_works(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stored)
    monkeypatch.setattr(run.cli, "commands", dict(run.cli.commands))
    exec(block("@cli.command()"), vars(run) | {})
    result = CliRunner().invoke(run.cli, ["best", "quick"], standalone_mode=False)
    assert (result.output, result.return_value) == ("{'x': 2}\n", 0)
    assert "Example:  hpo best grid" in CliRunner().invoke(run.cli, ["best", "--help"]).output


def test_the_page_names_the_whole_python_api() -> None:
    (names,) = re.findall(r"`from hpo import ([^`]+)`", TEXTS["hpo/README.md"])
    functions = {name for name in hpo.__all__ if name[0].islower()} - {"space_schema"}
    assert set(names.split(", ")) == functions
    assert all(callable(getattr(hpo, name)) for name in hpo.__all__)


@pytest.mark.parametrize("page", PAGES)
def test_the_classes_and_functions_that_a_page_names_exist(page: str) -> None:
    sources = "\n".join(path.read_text() for folder in ("hpo", "storage") for path in (ROOT / folder).rglob("*.py"))
    defined = set(re.findall(r"^\s*(?:class|def) (\w+)", sources, re.MULTILINE))
    spans = inline_code(page)
    named = {span for span in spans if re.fullmatch(r"[A-Z][a-z]+([A-Z][a-z]+)+", span)}
    named |= {name for span in spans if (found := re.match(r"(\w+)\(", span)) for name in [found[1]]}
    assert named - defined == set()


def test_the_glossary_has_ten_entries() -> None:
    glossary = TEXTS["hpo/README.md"].partition("## Glossary\n")[2].partition("\n## ")[0]
    assert glossary.count("\n- **") == 10
    for term in ("study", "revision", "trial", "configuration", "config key", "run", "lease", "claim", "epoch",
                 "checkpoint", "worker", "slot", "scheduler", "pruner", "command"):  # fmt: skip
        assert re.search(rf"\*\*{term}\*\*", glossary, re.IGNORECASE), term


def test_the_import_order_on_the_page_is_that_of_the_contract() -> None:
    (contract,) = (c for c in PYPROJECT["tool"]["importlinter"]["contracts"] if c.get("containers") == ["hpo"])
    layers = [layer for layer in contract["layers"] if layer != "__main__"]
    (order,) = (text for text in blocks("hpo/README.md", "") if text.startswith("run -> "))
    written = [set(re.findall(r"\w+", layer)) for layer in order.split("->")]
    assert written == [set(re.findall(r"\w+", layer)) for layer in layers]


# --- CONTRIBUTING.md ----------------------------------------------------------------------------------------------------


def test_the_table_of_markers_lists_every_marker() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", TEXTS["CONTRIBUTING.md"], re.MULTILINE)
    configured = [re.split(r"\W", marker)[0] for marker in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    assert sorted(rows) == sorted(configured)


def test_the_bound_of_optuna_on_the_page_is_that_of_the_project() -> None:
    (bound,) = (each for each in PYPROJECT["project"]["dependencies"] if each.startswith("optuna>"))
    assert bound in inline_code("CONTRIBUTING.md")
    (classifier,) = PYPROJECT["project"]["classifiers"]
    assert classifier in inline_code("CONTRIBUTING.md")


# --- all pages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "start"), [(p, text.partition("\n")[0]) for p in PAGES for text in blocks(p, "yaml")])
def test_every_search_space_on_a_page_loads(page: str, start: str, tmp_path: Path) -> None:
    path = tmp_path / "example.yaml"
    path.write_text(block(start))
    assert load_space(str(path)).parameters
    if page == "README.md":
        assert len(path.read_text().splitlines()) == 10


@pytest.mark.parametrize("line", [line for line in command_lines() if hpo_arguments(line) is not None])
def test_every_hpo_command_on_a_page_has_a_known_verb_and_known_flags(line: str) -> None:
    verb, *words = hpo_arguments(line) or []
    command = run.cli.commands[verb]
    known = {"--help", *(option for each in command.params for option in each.opts)}
    assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize("line", [line for line in command_lines() if "python -m benchmarks." in line])
def test_every_benchmark_command_on_a_page_knows_its_flags(line: str) -> None:
    found = re.search(r"python -m (benchmarks\.\w+)", line)
    assert found is not None
    spec = importlib.util.find_spec(found[1])
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    for flag in re.findall(r" (--[\w-]+)", line):
        assert f'"{flag}"' in source


@pytest.mark.parametrize("page", ALL_PAGES)
def test_every_relative_link_and_picture_exists(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = path if not name else path.parent / name
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}, link


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    named = {
        span
        for span in inline_code(page)
        if re.fullmatch(r"\.?(hpo|storage|benchmarks|tests|search_spaces|\.ci)/[\w./]*", span)
    }
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []
