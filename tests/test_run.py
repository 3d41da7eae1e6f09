"""The command line's own parts: exit codes, hints, passwords, help, completion. Searches are faked."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from optuna.trial import TrialState, create_trial

from hpo import api, run
from hpo.errors import SettingError
from hpo.paths import DEFAULT_STORAGE
from hpo.search.stop import Stop, StopCause
from storage import tables
from storage.database import open_database
from storage.errors import StorageError
from storage.optuna_internals import trial_id
from storage.studies import open_study
from tests.end_to_end.processes import python
from tests.factories import Finished, HpoHere, search_without_ray, toy_space
from tests.report.studies import finish_grid

INTERRUPTED = Stop(StopCause.INTERRUPTED)
OUT_OF_EXIT_TIME = Stop(StopCause.EXIT_TIME)
OUT_OF_TIME = Stop(StopCause.TIME_SPENT)
OUT_OF_GPU_HOURS = Stop(StopCause.GPU_HOURS_SPENT, "the trials have used 8.01 of 8 device-hours")
OUT_OF_MONEY = Stop(StopCause.COST_SPENT, "the trials have cost 20.1 of 20")
BROKEN = Stop(StopCause.BROKEN, "the last 4 trials on host failed before they trained an epoch")
ENDINGS = {
    INTERRUPTED: "Stopped: interrupted. The same command resumes it.",
    OUT_OF_EXIT_TIME: "Stopped: --exit-after is over. The same command resumes it.",
    OUT_OF_TIME: "Stopped: the time budget is spent. With a larger budget.time, the same command resumes it.",
    OUT_OF_GPU_HOURS: f"Stopped: {OUT_OF_GPU_HOURS}. With a larger budget.gpu_hours, the same command resumes it.",
    OUT_OF_MONEY: f"Stopped: {OUT_OF_MONEY}. With a larger budget.cost.limit, the same command resumes it.",
    BROKEN: f"Stopped: {BROKEN}. Fix the cause, retry the failed trials, and start the same command again.",
}


@pytest.fixture(scope="module")
def faked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Path]:
    """`faked(states)` returns a folder with `toy.yaml` and, in `faked.db`, its study with a trial in each state."""

    @functools.cache
    def make(states: tuple[str, ...]) -> Path:
        folder = tmp_path_factory.mktemp("faked")
        with open_database(f"sqlite:///{folder}/faked.db") as database:
            study = open_study(database, **toy_space(folder).study_options)
            for state in states:
                value = 0.5 if state == "COMPLETE" else None
                attrs = {"fail_reason": "its reason"} if state == "FAIL" else {}
                study.optuna_study.add_trial(create_trial(state=TrialState[state], value=value, user_attrs=attrs))
            rows = [{"trial": trial_id(each), "key": str(each.number)} for each in study.trials()]
            with database.engine.begin() as connection:  # without them, the trials would count as another program's
                connection.execute(tables.trials.insert().values(study=study.study_id), rows)
        return folder

    return make


@pytest.fixture
def fake_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faked: Callable[[tuple[str, ...]], Path]
) -> Callable[..., list[dict[str, Any]]]:
    """`fake_search(states, stopped)` replaces `run_search`; it returns the list of the keyword arguments it receives.

    `toy.yaml` and `faked.db` are in `tmp_path` after that.
    """

    def install(states: list[str], stopped: Stop | None = None) -> list[dict[str, Any]]:
        shutil.copytree(faked(tuple(states)), tmp_path, dirs_exist_ok=True)
        url = f"sqlite:///{tmp_path}/faked.db"
        received: list[dict[str, Any]] = []

        def run_search(_space: object, **options: Any) -> api.SearchResult:
            received.append(options)
            results = api.read_results("toy@1", storage=url)
            options["on_results"](results)
            return api.SearchResult(results, stopped=stopped)

        monkeypatch.setattr(api, "run_search", run_search)
        return received

    return install


@pytest.mark.parametrize(
    ("states", "stopped", "code"),
    [
        (["COMPLETE", "FAIL"], None, 0),
        (["FAIL", "FAIL"], None, 1),
        (["PRUNED"], None, 1),
        (["COMPLETE", "WAITING"], INTERRUPTED, 130),
        (["COMPLETE", "WAITING"], OUT_OF_EXIT_TIME, 130),
        (["COMPLETE", "WAITING"], OUT_OF_TIME, 0),
        (["PRUNED", "WAITING"], OUT_OF_TIME, 1),
        (["COMPLETE", "WAITING"], OUT_OF_GPU_HOURS, 0),
        (["WAITING"], OUT_OF_MONEY, 1),
        (["COMPLETE", "FAIL"], BROKEN, 2),
        (["FAIL", "FAIL"], BROKEN, 2),
    ],
)
def test_exit_codes(
    tmp_path: Path,
    hpo_here: HpoHere,
    fake_search: Callable[..., Any],
    states: list[str],
    stopped: Stop | None,
    code: int,
) -> None:
    fake_search(states, stopped)
    finished = hpo_here(tmp_path, "run", "toy.yaml")
    assert finished.returncode == code
    assert finished.stdout.count("failed: its reason") == states.count("FAIL")
    printed = [line for line in finished.stdout.splitlines() if line.startswith("Stopped: ")]
    assert printed == ([] if stopped is None else [ENDINGS[stopped]])


@pytest.mark.parametrize("error", [SettingError("no such folder"), StorageError("no such database")])
def test_an_error_that_the_user_can_change_is_one_line(
    tmp_path: Path, hpo_here: HpoHere, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(api, "list_studies", fail)
    assert hpo_here(tmp_path, "list") == Finished(2, "", f"hpo: {error}\n")


def test_what_is_written_to_stderr_has_no_control_characters(
    tmp_path: Path, hpo_here: HpoHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a traceback, nor what libraries write: both may quote a database."""
    strange = "a\x1b]0;b\x07c\u202ed\u061ce\u2028f\u200bg\ufeffh\x9bi"

    def fail(**_: object) -> None:
        sys.stderr.write(f"warning: {strange}\n")
        raise LookupError(strange)

    monkeypatch.setattr(api, "list_studies", fail)
    finished = hpo_here(tmp_path, "list")
    assert finished.returncode == 1
    lines = finished.stderr.splitlines()
    assert lines[0] == "warning: a]0;bcdefghi"
    assert lines[-1] == "LookupError: a]0;bcdefghi"
    assert "Traceback (most recent call last):" in lines
    assert not re.search(r"[^ -~\n]", finished.stderr)


def test_ctrl_c_outside_of_a_search_is_exit_code_130(
    tmp_path: Path, hpo_here: HpoHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "list_studies", interrupt)
    assert hpo_here(tmp_path, "list").returncode == 130


@pytest.mark.parametrize(("error", "said"), [(AssertionError(), ""), (SettingError("its words"), "hpo: its words\n")])
def test_an_error_to_which_ctrl_c_has_led_is_an_interruption(
    tmp_path: Path, hpo_here: HpoHere, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    """A connection that is being closed raises AssertionError after Ctrl-C."""

    def interrupt(**_: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise error  # noqa: B904 # libraries do so

    monkeypatch.setattr(api, "list_studies", interrupt)
    finished = hpo_here(tmp_path, "list")
    assert (finished.returncode, finished.stderr) == (130, said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: hpo"),
        (["rnu", "grid"], "there is no verb 'rnu': did you mean run?"),
        (["frobnicate"], "there is no verb 'frobnicate': allowed: run, plan, report, list, retry"),
        (["run"], "Missing argument 'SPACE'"),
        (["run", "grid", "--sett", "a=1"], "No such option"),
        (["replay", "grid", "first"], "'first' is not a valid integer"),
        (["run", "grid", "--exit-after", "soon"], "write a duration like 90s, 30m, 4h or 1d12h, got 'soon'"),
        (["run", "grid", "--exit-after", "0s"], "0s is no time at all"),
        (["dashboard", "--port", "http"], "'http' is not a valid integer"),
        (["completion", "tcsh"], "'tcsh' is not one of"),
    ],
)
def test_a_usage_error_is_exit_code_2(tmp_path: Path, hpo_here: HpoHere, arguments: list[str], message: str) -> None:
    finished = hpo_here(tmp_path, *arguments)
    assert finished.returncode == 2
    assert message in finished.stderr


# --- hints ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "variables", "options"),
    [
        ([], {}, ""),
        ([], {"UV_RUN_RECURSION_DEPTH": "1"}, ""),
        (["--storage", DEFAULT_STORAGE], {}, ""),
        (["--storage", "sqlite:///other.db"], {}, " --storage sqlite:///other.db"),
        (["--storage", "sqlite:///my studies.db"], {}, " --storage 'sqlite:///my studies.db'"),
        (["--storage", "postgresql://me@host/db"], {}, " --storage postgresql://me@host/db"),
        ([], {"HPO_STORAGE": "postgresql://me:secret@host/db"}, ""),
        (["--storage", "sqlite:///other.db"], {"HPO_STORAGE": "postgresql://host/db"}, " --storage sqlite:///other.db"),
        (
            ["--storage", DEFAULT_STORAGE],
            {"HPO_STORAGE": "postgresql://host/db"},
            f" --storage {DEFAULT_STORAGE}",
        ),
        ([], {"HPO_STORAGE_FILE": "url.txt"}, ""),
        (["--storage", "sqlite:///other.db"], {"HPO_STORAGE_FILE": "url.txt"}, " --storage sqlite:///other.db"),
    ],
)
def test_hints_can_be_copied(
    tmp_path: Path,
    hpo_here: HpoHere,
    fake_search: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    variables: dict[str, str],
    options: str,
) -> None:
    fake_search(["COMPLETE"])
    (tmp_path / "url.txt").write_text("postgresql://me:secret@host/db")
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    finished = hpo_here(tmp_path, "run", "toy.yaml", *arguments, **variables)
    python = "uv run python" if "UV_RUN_RECURSION_DEPTH" in variables else "python"
    assert finished.stdout.splitlines()[-2:] == [
        f"Dashboard: {python} -m hpo.dashboard{options}",
        f"Report again: {python} -m hpo.report toy{options}",
    ]
    assert "secret" not in finished.stdout + finished.stderr


# --- storage, data, passwords -----------------------------------------------------------------------------------------


def test_storage_and_data_come_from_options_or_variables(
    tmp_path: Path, hpo_here: HpoHere, fake_search: Callable[..., Any]
) -> None:
    received = fake_search(["COMPLETE"])
    hpo_here(tmp_path, "run", "toy.yaml")
    variables = {
        "HPO_STORAGE": "sqlite:///v.db",
        "HPO_DATA_DIR": "v",
        "RAY_ADDRESS": "ray:6379",
        "PGPASSWORD": "secret",
    }
    hpo_here(tmp_path, "run", "toy.yaml", **variables)
    hpo_here(tmp_path, "run", "toy.yaml", "--storage", "sqlite:///o.db", "--data-dir", "o", **variables)
    seen = [tuple(options[name] for name in ("storage", "data_dir", "ray_address", "password")) for options in received]
    assert seen == [
        (DEFAULT_STORAGE, Path("data"), None, None),
        ("sqlite:///v.db", Path("v"), "ray:6379", "secret"),
        ("sqlite:///o.db", Path("o"), "ray:6379", "secret"),
    ]


def test_on_finish_comes_from_the_environment_unless_it_is_overridden(
    tmp_path: Path, hpo_here: HpoHere, fake_search: Callable[..., Any]
) -> None:
    received = fake_search(["COMPLETE"])
    url = "https://hooks.example/secret"
    hpo_here(tmp_path, "run", "toy.yaml", HPO_ON_FINISH=url)
    hpo_here(tmp_path, "run", "toy.yaml", "--set", "on_finish=null", HPO_ON_FINISH=url)
    assert [options["on_finish"] for options in received] == [url, None]
    assert not [name for name, value in os.environ.items() if "secret" in value]
    assert hpo_here(tmp_path, "run", "toy.yaml", HPO_ON_FINISH="file:///secret").stderr.startswith(
        "hpo: HPO_ON_FINISH: a URL of file:// gets no POST: write a command"
    )


def test_a_url_of_on_finish_on_the_command_line_is_refused(tmp_path: Path, hpo_here: HpoHere) -> None:
    for value in ("https://hooks.example/secret", "[curl, https://hooks.example/secret]"):
        finished = hpo_here(tmp_path, "run", "toy.yaml", "--set", f"on_finish={value}")
        assert finished.returncode == 2
        assert "put it in the file of the search space, in HPO_ON_FINISH" in finished.stderr
        assert "secret:" in finished.stderr
        assert "/secret" not in finished.stderr


def test_the_typed_command_is_recorded(tmp_path: Path, hpo_here: HpoHere, fake_search: Callable[..., Any]) -> None:
    received = fake_search(["COMPLETE"])
    hpo_here(tmp_path, "run", "toy.yaml", "--set", "parameters.x=[1, 2]")
    assert received[0]["command"] == "hpo run toy.yaml --set 'parameters.x=[1, 2]'"


@pytest.mark.parametrize("verb", [["run", "toy.yaml"], ["list"], ["replay", "toy", "0"], ["report", "toy"]])
def test_no_verb_leaves_a_password_to_the_processes_that_it_starts(
    tmp_path: Path, hpo_here: HpoHere, fake_search: Callable[..., Any], verb: list[str]
) -> None:
    fake_search(["COMPLETE"])
    variables = dict.fromkeys(("HPO_STORAGE", "PGPASSWORD"), "postgresql://me:secret@host/db")
    hpo_here(tmp_path, *verb, "--storage", "sqlite:///x.db", HPO_DASHBOARD_PASSWORD="secret", **variables)
    assert not [name for name, value in os.environ.items() if "secret" in value]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--storage", "postgresql://me:secret@host/db"],
        ["--storage=postgresql://me:secret@host/db"],
        ["--storage", "postgresql://host/db?user=me&password=secret"],
        ["--storage", "postgresql://me@host/db?sslpassword=secret"],
        ["--storage", "postgresql://me:top@secret@host/db"],
        ["--storage", "postgresql://me:sec/ret@host/db"],
        ["--storage", "postgresql://me:secret@host/db", "--storage", "sqlite:///x.db"],
    ],
)
@pytest.mark.parametrize("verb", [["run", "toy.yaml"], ["plan", "toy.yaml"], ["list"], ["dashboard"], ["clean"]])
def test_a_password_on_the_command_line_is_refused(
    tmp_path: Path, hpo_here: HpoHere, verb: list[str], arguments: list[str]
) -> None:
    finished = hpo_here(tmp_path, *verb, *arguments)
    assert finished.returncode == 2
    assert finished.stderr.startswith("hpo: ")
    assert (
        "PGPASSWORD or ~/.pgpass" in finished.stderr
        or "write an @ in a user name or password as %40" in finished.stderr
    )
    assert not any(part in finished.stderr for part in ("secret", "top", "ret@"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "source",
    [
        "{study: grid, storage: 'postgresql://me:secret@host/db'}",
        "{study: grid, storage: postgresql://me:12,secret@host/db}",
        "{study: grid, storage: postgresql://host/db?user=me&password=secret}",
        "{study: grid@2, storage: postgresql://me:secret@host/db}",
    ],
)
def test_a_password_in_an_override_is_refused(tmp_path: Path, hpo_here: HpoHere, source: str) -> None:
    finished = hpo_here(tmp_path, "run", "toy.yaml", "--set", f"warm_start=[{source}]")
    assert finished.returncode == 2
    assert "PGPASSWORD or ~/.pgpass" in finished.stderr
    assert "secret" not in finished.stderr


@pytest.mark.parametrize("storage", ["postgresql://me@host:5432/db", "'postgresql://me@host/db?sslmode=require'"])
def test_an_override_may_name_a_database_without_a_password(
    tmp_path: Path, hpo_here: HpoHere, fake_search: Callable[..., Any], storage: str
) -> None:
    received = fake_search(["COMPLETE"])
    sources = f"warm_start=[{{study: grid@2, storage: {storage}}}, other@1]"
    finished = hpo_here(tmp_path, "run", "toy.yaml", "--set", sources, HPO_STORAGE="sqlite:///x.db")
    assert finished.returncode == 0, finished.stderr
    assert len(received) == 1


def test_the_storage_may_be_named_by_a_file(tmp_path: Path, hpo_here: HpoHere, fake_search: Callable[..., Any]) -> None:
    received = fake_search(["COMPLETE"])
    file = tmp_path / "url.txt"
    file.write_text("postgresql://me:secret@host/db\n")
    assert hpo_here(tmp_path, "run", "toy.yaml", HPO_STORAGE_FILE=str(file)).returncode == 0
    assert received[0]["storage"] == "postgresql://me:secret@host/db"
    hpo_here(tmp_path, "run", "toy.yaml", "--storage", "sqlite:///o.db")
    assert received[1]["storage"] == "sqlite:///o.db"


@pytest.mark.parametrize(
    ("content", "variables", "message"),
    [
        (None, {}, "HPO_STORAGE_FILE names url.txt, which cannot be read: No such file or directory"),
        (b"", {}, "HPO_STORAGE_FILE names url.txt, whose first line is empty"),
        (b"\xff", {}, "HPO_STORAGE_FILE names url.txt, which cannot be read: it is not UTF-8"),
        (b"sqlite:///x.db", {"HPO_STORAGE": "sqlite:///y.db"}, "HPO_STORAGE and HPO_STORAGE_FILE are both set"),
    ],
)
def test_a_storage_file_that_cannot_be_used_is_one_message(
    tmp_path: Path, hpo_here: HpoHere, content: bytes | None, variables: dict[str, str], message: str
) -> None:
    if content is not None:
        (tmp_path / "url.txt").write_bytes(content)
    finished = hpo_here(tmp_path, "list", HPO_STORAGE_FILE="url.txt", **variables)
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"hpo: {message}")


# --- the working folder and the files of the user ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("start", [["-m", "hpo"], ["-m", "hpo.run"], [str(Path(sys.executable).with_name("hpo"))]])
def test_a_file_in_the_working_folder_replaces_no_package(tmp_path: Path, start: list[str]) -> None:
    (tmp_path / "loaded.py").write_text("import sys; print(*sys.modules)")
    loaded = python(tmp_path, "-m", "loaded").stdout.split()  # by Python itself, before any code of ours
    packages = {"sqlalchemy", "click", "optuna", "pydantic", "google", "cuda", "mpl_toolkits"}
    for name in (packages | sys.stdlib_module_names) - {*loaded, "this", "antigravity"}:
        (tmp_path / f"{name}.py").write_text("import os\nos.write(2, b'replaced ' + __name__.encode())\nos._exit(7)")
    verb = ["toy.yaml"] if start[-1] == "hpo.run" else ["list"]
    finished = python(tmp_path, *start, *verb)
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.startswith(("hpo: there is no database", "hpo: cannot read the search space"))


@pytest.mark.slow
def test_a_style_in_the_working_folder_is_not_that_of_the_report(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        finish_grid(database)
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\ntext.latex.preamble: \\input{/etc/passwd}\n")
    finished = python(tmp_path, "-m", "hpo", "report", "grid", "--storage", "sqlite:///hpo.db")
    assert finished.returncode == 0, finished.stderr
    assert list((tmp_path / "runs/reports/grid").glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", ">&-"])
def test_a_closed_output_is_no_error(tmp_path: Path, closed: str) -> None:
    command = shlex.join([sys.executable, "-m", "hpo", "report", "nope", "--storage", "sqlite:///none.db"])
    assert subprocess.run(["sh", "-c", f"{command} {closed}"], cwd=tmp_path, check=False, timeout=120).returncode == 2


def test_new_files_are_private_unless_others_may_enter_the_folder(
    tmp_path: Path, hpo_here: HpoHere, fake_search: Callable[..., Any]
) -> None:
    fake_search(["COMPLETE"])
    os.umask(0o022)
    hpo_here(tmp_path, "report", "toy", "--storage", "sqlite:///faked.db")
    written = [tmp_path / "runs", *(tmp_path / "runs").rglob("*")]
    assert len(written) > 3
    assert [path for path in written if path.stat().st_mode & 0o077] == []
    hpo_here(tmp_path, "list", "--storage", "sqlite:///faked.db")
    assert os.umask(0o022) == 0o077, "the folder is private"
    (tmp_path / "runs").chmod(0o750)
    hpo_here(tmp_path, "list", "--storage", "sqlite:///faked.db")
    assert os.umask(0o022) == 0o022, "others may enter the folder"


@pytest.mark.parametrize(
    ("states", "hints"),
    [
        (["COMPLETE"], []),
        (["COMPLETE", "FAIL"], ["Retry failed trials: python -m hpo retry toy --storage sqlite:///x.db"]),
    ],
)
def test_failed_trials_are_offered_for_retry(
    tmp_path: Path,
    hpo_here: HpoHere,
    fake_search: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    states: list[str],
    hints: list[str],
) -> None:
    fake_search(states)
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    finished = hpo_here(tmp_path, "run", "toy.yaml", "--storage", "sqlite:///x.db")
    assert [line for line in finished.stdout.splitlines() if line.startswith("Retry")] == hints


def test_what_is_printed_names_the_revision_of_the_run(
    tmp_path: Path, hpo_here: HpoHere, fake_search: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_search(["COMPLETE", "FAIL"])
    storage = f"sqlite:///{tmp_path}/faked.db"
    with open_database(storage) as database:
        assert open_study(database, **toy_space(tmp_path, max_epochs=1).study_options).name == "toy@2"
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    lines = hpo_here(tmp_path, "run", "toy.yaml", HPO_STORAGE=storage).stdout.splitlines()
    assert "toy@1: 2 trials" in lines[0]
    assert lines[-3:] == [
        "Retry failed trials: python -m hpo retry toy@1",
        "Dashboard: python -m hpo.dashboard",
        "Report again: python -m hpo.report toy@1",
    ]
    listed = hpo_here(tmp_path, "list", "--json", HPO_STORAGE=storage).stdout
    assert [summary["name"] for summary in json.loads(listed)] == ["toy@1", "toy@2"]
    assert hpo_here(tmp_path, "retry", "toy", HPO_STORAGE=storage).stdout == "toy: no trial has failed\n"
    assert hpo_here(tmp_path, "report", "toy@1", HPO_STORAGE=storage).returncode == 0
    assert "by `hpo report toy@1`" in (tmp_path / "runs/reports/toy/report.md").read_text()
    retried = hpo_here(tmp_path, "retry", "toy@1", HPO_STORAGE=storage)
    assert retried.stdout.startswith("toy@1: waiting to run again: 1.")


def test_retry_lists_the_trials_that_wait_again(
    tmp_path: Path, hpo_here: HpoHere, faked: Callable[[tuple[str, ...]], Path]
) -> None:
    shutil.copytree(faked(("COMPLETE", "FAIL", "FAIL")), tmp_path, dirs_exist_ok=True)
    storage = ("--storage", f"sqlite:///{tmp_path}/faked.db")
    wrong = hpo_here(tmp_path, "retry", "toy", "0", "1", *storage)
    assert wrong == Finished(2, "", "hpo: trial 0 of study toy has not failed; failed trials: 1, 2\n")
    for numbers, text in (
        (["2"], "waiting to run again: 2"),
        ([], "waiting to run again: 1"),
        ([], "no trial has failed"),
    ):
        finished = hpo_here(tmp_path, "retry", "toy", *numbers, *storage)
        assert finished.returncode == 0
        assert finished.stdout.startswith(f"toy: {text}")


# --- verbs ------------------------------------------------------------------------------------------------------------


def test_run_with_plan_is_the_verb_plan(tmp_path: Path, hpo_here: HpoHere) -> None:
    toy_space(tmp_path)
    planned = hpo_here(tmp_path, "plan", "toy.yaml")
    assert planned.returncode == 0
    assert planned.stdout.startswith("toy: benchmarks.toy:chain\n2 configurations; storage has none of them.")
    assert "No estimate: " in planned.stdout
    assert hpo_here(tmp_path, "run", "toy.yaml", "--plan") == planned
    assert not (tmp_path / "runs").exists(), "a plan writes nothing"


def test_a_plan_says_that_nothing_is_left_to_train(tmp_path: Path, hpo_here: HpoHere) -> None:
    space = toy_space(tmp_path, resources={"cpu": 1})
    with open_database(f"sqlite:///{tmp_path}/toy.db") as database:
        search_without_ray(space, database, tmp_path)
    planned = hpo_here(tmp_path, "plan", "toy.yaml", "--storage", f"sqlite:///{tmp_path}/toy.db")
    assert planned.returncode == 0
    assert planned.stdout.endswith("\nNothing is left to train.\n")
    assert "No machine" not in planned.stdout


@pytest.mark.parametrize("verb", [["list"], ["report", "toy"]])
@pytest.mark.parametrize("options", [[], ["--storage", "sqlite:///no/hpo.db"]])
def test_a_verb_that_only_reads_creates_no_database(
    tmp_path: Path, hpo_here: HpoHere, verb: list[str], options: list[str]
) -> None:
    missing = hpo_here(tmp_path, *verb, *options)
    assert (missing.returncode, missing.stdout) == (2, "")
    url = options[1] if options else "sqlite:///runs/hpo.db"
    assert re.search(rf"there is no database {url} yet.*hpo run SPACE", missing.stderr)
    assert list(tmp_path.iterdir()) == []


def test_list_prints_a_table_or_json(tmp_path: Path, hpo_here: HpoHere, fake_search: Callable[..., Any]) -> None:
    open_database(f"sqlite:///{tmp_path}/empty.db").close()
    empty = hpo_here(tmp_path, "list", "--storage", "sqlite:///empty.db")
    assert empty == Finished(0, "sqlite:///empty.db has no studies yet; `hpo run SPACE` creates one\n", "")
    assert hpo_here(tmp_path, "list", "--json", "--storage", "sqlite:///empty.db") == Finished(0, "[]\n", "")
    fake_search(["COMPLETE", "FAIL"])
    table = hpo_here(tmp_path, "list", "--storage", "sqlite:///faked.db")
    assert "toy" in table.stdout
    (summary,) = json.loads(hpo_here(tmp_path, "list", "--json", "--storage", "sqlite:///faked.db").stdout)
    assert summary["name"] == "toy"


@pytest.mark.parametrize("name", sorted(run.cli.commands))
def test_the_help_of_each_verb_has_examples_that_parse(tmp_path: Path, hpo_here: HpoHere, name: str) -> None:
    shown = hpo_here(tmp_path, name, "--help")
    assert shown.returncode == 0
    examples = re.findall(r"(?<=hpo )[^|>)\n]+", shown.stdout.partition("Example")[2].partition("\n\n")[0])
    assert examples
    verb = run.cli.commands[name]
    for example in examples:
        words = example.strip().split()
        assert words[0] == name
        verb.make_context(name, words[1:])  # fails on an option that does not exist
    for parameter in verb.params:
        assert not isinstance(parameter, click.Option) or parameter.help, parameter.name


@pytest.mark.parametrize("shell", [pytest.param("bash", marks=pytest.mark.slow), "zsh", "fish"])
def test_completion_prints_a_script(tmp_path: Path, hpo_here: HpoHere, shell: str) -> None:
    script = hpo_here(tmp_path, "completion", shell)
    assert script.returncode == 0
    assert f"{run.COMPLETE_VARIABLE}={shell}_complete" in script.stdout
    if shell == "bash":  # starts a process
        subprocess.run(["bash", "-n"], input=script.stdout, text=True, check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "candidates"), [("hpo rep", {"replay", "report"}), ("hpo run q", {"quick"}), ("hpo list --j", {"--json"})]
)
def test_bash_completes_verbs_spaces_and_options(typed: str, candidates: set[str]) -> None:
    words = typed.split()
    variables = {"COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1), run.COMPLETE_VARIABLE: "bash_complete"}
    finished = subprocess.run(
        [sys.executable, "-m", "hpo"], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert {line.partition(",")[2] for line in finished.stdout.splitlines()} == candidates
