"""The command line as a user types it: real processes, real Ray, the database read back with plain SQL."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa
from tests.test_readme import block

from benchmarks.chaos import run_rounds, violations
from benchmarks.postgres import Postgres

ROOT = Path(__file__).parent.parent
SAMPLE = ("data.dataset=fashion_mnist_sample", "data.val_samples=200", "data.train_samples=512", "max_epochs=2")

# A search over toys: four chains of six epochs each, half a second an epoch.
CHAINS = {
    "sampler": "grid",
    "trainable": "benchmarks.toy:chain",
    "metric": "value",
    "max_epochs": 6,
    "parameters": {"x": [1, 2, 3, 4], "epoch_seconds": 0.5},
}


def command(*arguments: str) -> list[str]:
    """`hpo ARGUMENTS`, run from this checkout."""
    return [sys.executable, "-c", "from hpo.run import main; main()", *arguments]


def environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HPO_", "RAY_"))}
    return clean | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | more


def hpo(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


_started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _leave_no_process_behind() -> Iterator[None]:
    """A test that fails half-way must not slow or fail the ones after it."""
    yield
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the command as a terminal does: in a process group of its own, which Ctrl-C reaches as a whole."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    _started.append(process)
    return process


def write_space(folder: Path, name: str, space: dict[str, Any]) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(space))  # JSON is YAML
    return str(path)


def rows(database: Path | str, query: str) -> list[tuple[Any, ...]]:
    """What a plain SQL query finds; nothing while the database or the table is not there yet."""
    url = f"sqlite:///{database}" if isinstance(database, Path) else database
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(query))]
    except (sa.exc.OperationalError, sa.exc.ProgrammingError):
        return []
    finally:
        engine.dispose()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it never came to that:\n{process.communicate()[0]}")
        time.sleep(0.05)


def epochs_stored(database: Path | str) -> int:
    return len(rows(database, "SELECT 1 FROM hpo_metrics WHERE name = 'value'"))


def check_chains_are_whole(database: Path | str) -> None:
    url = f"sqlite:///{database}" if isinstance(database, Path) else database
    assert violations(url, [1, 2, 3, 4], 6) == []


# --- the documented grid ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The documented grid, two short epochs on the sample, run once for the tests that look at it."""
    folder = tmp_path_factory.mktemp("grid")
    overrides = [argument for key_value in SAMPLE for argument in ("--set", key_value)]
    done = hpo(folder, "run", str(ROOT / "search_spaces/grid.yaml"), *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def test_the_grid_completes_three_trials_with_every_metric_of_every_epoch(
    grid: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = grid
    database = folder / "runs/hpo.db"
    assert rows(database, "SELECT study_name FROM studies") == [("grid",)]
    assert rows(database, "SELECT number, state FROM trials ORDER BY number") == [(n, "COMPLETE") for n in range(3)]
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        query = f"SELECT trial, epoch, value FROM hpo_metrics WHERE name = '{name}' ORDER BY trial, epoch"
        found = rows(database, query)
        assert [(trial, epoch) for trial, epoch, _ in found] == [(t, e) for t in (1, 2, 3) for e in (1, 2)]
        assert all(value >= 0 if name.endswith("loss") else 0 <= value <= 1 for _, _, value in found)
    stored = rows(database, "SELECT trial, epoch, value FROM hpo_metrics WHERE name = 'val_accuracy' ORDER BY 1, 2")
    optuna = "SELECT trial_id, step, intermediate_value FROM trial_intermediate_values ORDER BY 1, 2"
    assert rows(database, optuna) == stored
    tests = rows(database, "SELECT trial, epoch FROM hpo_metrics WHERE name = 'test_accuracy' ORDER BY trial")
    assert tests == [(trial, 2) for trial in (1, 2, 3)], "the test images are scored once, at the end"
    assert rows(database, "SELECT count(*) FROM hpo_runs WHERE ended IS NOT NULL") == [(1,)]
    notes = rows(database, "SELECT count(*) FROM study_system_attributes WHERE key LIKE 'dashboard%note_ver'")
    assert notes == [(3,)], "what the dashboard shows is there when the run ends"
    assert len(list((folder / "runs/artifacts").iterdir())) == 2


def test_the_grid_shows_progress_and_a_table_and_no_noise(
    grid: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, done = grid
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert sum("epoch 1/2" in line for line in lines) == 3
    assert any("No GPU: this search takes about" in line for line in lines)
    table = lines[lines.index(next(line for line in lines if line.startswith("grid: 3 trials"))) :]
    for word in ("batch_size", "lr", "last", "best", "val_accuracy", "test_accuracy", "seconds", "images/s"):
        assert any(word in line for line in table), word
    assert not any("ray" in line.lower() or "Warning" in line for line in lines if "Storage:" not in line)


def test_a_finished_grid_is_not_run_again(grid: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = grid
    before = (folder / "runs/hpo.db").read_bytes()
    overrides = [argument for key_value in SAMPLE for argument in ("--set", key_value)]
    again = hpo(folder, "run", str(ROOT / "search_spaces/grid.yaml"), *overrides)
    assert again.returncode == 0
    assert "Nothing is left to do" in again.stdout
    assert "Going on with what storage holds: 3 COMPLETE" in again.stdout
    assert (folder / "runs/hpo.db").read_bytes() == before


def test_a_trial_is_replayed_to_the_last_digit_and_a_difference_is_seen(
    grid: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = grid
    database = folder / "runs/hpo.db"
    recorded = json.loads(rows(database, "SELECT provenance FROM hpo_runs")[0][0])
    assert {"code", "packages", "python", "platform", "command", "data_sha256"} <= set(recorded)
    assert {"torch", "optuna", "ray"} <= set(recorded["packages"])
    trial = json.loads(rows(database, "SELECT provenance FROM hpo_trials WHERE trial = 2")[0][0])
    assert trial["device"] == "cpu"
    assert trial["threads"] >= 1
    same = hpo(folder, "replay", "grid", "1")
    assert same.returncode == 0, same.stdout + same.stderr
    assert same.stdout.endswith("epoch 1: 4 metrics equal\nepoch 2: 6 metrics equal\n")
    with sqlite3.connect(database) as connection:
        connection.execute(
            "UPDATE hpo_metrics SET value = value + 1e-9 WHERE trial = 2 AND name = 'val_loss' AND epoch = 2"
        )
    connection.close()
    other = hpo(folder, "replay", "grid", "1")
    assert other.returncode == 1
    assert "epoch 2: val_loss" in other.stdout


def test_the_report_shows_the_study_again_and_an_unknown_study_is_named(
    grid: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = grid
    page = folder / "runs/reports/grid/index.html"
    page.unlink()  # it was written as the run ended
    report = hpo(folder, "report", "grid")
    assert report.returncode == 0
    assert "grid: 3 trials" in report.stdout
    assert "Report: runs/reports/grid/index.html" in report.stdout
    assert report.stderr == ""
    assert "<dd><code>hpo run " in page.read_text(), "the command as it was typed"
    unknown = hpo(folder, "report", "gird")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "there is no study 'gird'" in unknown.stderr
    assert "did you mean grid?" in unknown.stderr


# --- what the user got wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gird"], "there is no search space 'gird' in search_spaces/: did you mean grid?"),
        (["grid", "--set", "max_epoch=1"], "max_epoch: unknown key, did you mean max_epochs?"),
        (["grid", "--set", "max_epochs=two"], "max_epochs: input should be a valid integer, got 'two'"),
        (
            ["quick", "--set", "trainable=hpo.train:trian"],
            "--set trainable=hpo.train:trian: trainable: hpo.train has no",
        ),
        (["quick", "--storage", "mysql://me:do-not-show-me@host/db"], "mysql is not supported"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "search_spaces").symlink_to(ROOT / "search_spaces")
    done = hpo(tmp_path, "run", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("hpo: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "do-not-show-me" not in done.stdout + done.stderr


def test_a_mistake_leaves_no_study_behind(tmp_path: Path) -> None:
    done = hpo(tmp_path, "run", str(ROOT / "search_spaces/quick.yaml"), "--set", "parameters.learning_rate=0.1")
    assert done.returncode == 2
    assert "has no parameter 'learning_rate'" in done.stderr
    assert rows(tmp_path / "runs/hpo.db", "SELECT count(*) FROM studies") == [(0,)]


def test_a_runs_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    done = hpo(tmp_path, "run", str(ROOT / "search_spaces/quick.yaml"))
    assert done.returncode == 2
    assert f"cannot write to {tmp_path}/runs" in done.stderr


def test_the_command_line_starts_without_the_heavy_imports(tmp_path: Path) -> None:
    code = "import sys; from hpo.run import main\ntry: main()\nexcept SystemExit: print(*sys.modules)"
    for arguments in (["--help"], ["run", "gird"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        loaded = set(done.stdout.split())
        assert "hpo.run" in loaded
        assert not loaded & {"torch", "ray", "optuna", "sqlalchemy"}


# --- failures, and what dies --------------------------------------------------------------------------------------


def test_each_failure_has_its_state_and_reason_and_the_others_go_on(tmp_path: Path) -> None:
    reasons = {
        "ok": None,
        "nan": "value is nan after epoch 2",
        "inf": "value is inf after epoch 2",
        "raise": "ValueError: the trainable's own words",
        "memory": "out of memory: MemoryError: no room for the batch",
        "die": "the worker process died (max_failures 1)",
        "die_once": None,
        "hang": "no epoch within trial_timeout 2 s, worker killed (max_failures 1)",
        "end_early": "the trainable ended after epoch 1 of 3",
        "forget_metric": "the trainable reported no metric 'value', did you mean valeu?",
    }
    space = {
        "sampler": "grid",
        "trainable": "benchmarks.toy:failing",
        "metric": "value",
        "max_epochs": 3,
        "max_failures": 1,
        "trial_timeout": "2s",
        "parameters": {"how": list(reasons), "folder": str(tmp_path)},
    }
    done = hpo(tmp_path, "run", write_space(tmp_path, "failing", space))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    database = tmp_path / "runs/hpo.db"
    for number, (how, reason) in enumerate(reasons.items()):
        state, crashes = rows(
            database, f"SELECT state, crashes FROM trials JOIN hpo_trials ON trial = trial_id WHERE number = {number}"
        )[0]
        attrs = dict(
            rows(
                database,
                f"SELECT key, value_json FROM trial_user_attributes JOIN trials USING (trial_id) WHERE number = {number}",
            )
        )
        assert state == ("COMPLETE" if reason is None else "FAIL"), how
        assert json.loads(attrs.get("fail_reason", "null")) == reason
        if reason is not None:
            assert f"trial {number} failed: {reason}" in done.stdout
        assert crashes == {"die": 2, "hang": 2, "die_once": 1}.get(how, 0), how
        if how in {"raise", "memory"}:
            assert "benchmarks/toy.py" in attrs["traceback"]
        if how == "hang":
            assert "time.sleep" in attrs["traceback"] or "toy.py" in attrs["traceback"]


def test_kill_9_of_the_driver_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    log = tmp_path / "epochs.log"
    space = CHAINS | {"parameters": {**CHAINS["parameters"], "log": str(log)}}  # type: ignore[dict-item]
    path, database = write_space(tmp_path, "chains", space), tmp_path / "runs/hpo.db"
    process = start(tmp_path, "run", path)
    wait_until(lambda: epochs_stored(database) >= 3, process)
    process.kill()
    process.communicate()
    running = rows(database, "SELECT count(*) FROM trials WHERE state = 'RUNNING'")
    assert running != [(0,)]
    done = hpo(tmp_path, "run", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on after epoch" in done.stdout
    check_chains_are_whole(database)
    computed = len(log.read_text().splitlines())
    assert 24 <= computed <= 24 + 2, "of each of the two trials in flight at most one epoch is computed again"


def test_one_signal_stops_after_the_epoch_in_flight_and_leaves_all_resumable(tmp_path: Path) -> None:
    path, database = write_space(tmp_path, "chains", CHAINS), tmp_path / "runs/hpo.db"
    process = start(tmp_path, "run", path)
    wait_until(lambda: epochs_stored(database) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    sent = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert time.monotonic() - sent < 0.5 + 15
    assert "chains: " in output, "the summary is printed"
    assert "The same command goes on" in output
    states = dict(rows(database, "SELECT state, count(*) FROM trials GROUP BY state"))
    assert set(states) <= {"WAITING", "COMPLETE"}
    assert states["WAITING"] >= 1
    done = hpo(tmp_path, "run", path)
    assert done.returncode == 0, done.stdout + done.stderr
    check_chains_are_whole(database)


def test_two_signals_stop_at_once_and_leave_all_resumable(tmp_path: Path) -> None:
    space = CHAINS | {"parameters": {"x": [1, 2], "epoch_seconds": 30.0}}
    path, database = write_space(tmp_path, "slow", space), tmp_path / "runs/hpo.db"
    process = start(tmp_path, "run", path)
    running = "SELECT count(*) FROM trials WHERE state = 'RUNNING'"
    wait_until(lambda: rows(database, running) == [(2,)], process)
    time.sleep(8)  # into the first epoch
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert time.monotonic() - sent < 15
    assert rows(database, "SELECT state, count(*) FROM trials GROUP BY state") == [("WAITING", 2)]


def test_two_drivers_share_a_grid_on_sqlite(tmp_path: Path) -> None:
    path, database = write_space(tmp_path, "chains", CHAINS), tmp_path / "runs/hpo.db"
    drivers = [start(tmp_path, "run", path) for _ in range(2)]
    outputs = [driver.communicate(timeout=200)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], outputs
    check_chains_are_whole(database)
    assert rows(database, "SELECT count(*) FROM hpo_runs") == [(2,)]


def test_a_restart_of_postgresql_in_the_middle_is_waited_out(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.create_database("restarted")
    path = write_space(tmp_path, "chains", CHAINS)
    process = start(tmp_path, "run", path, "--storage", url)

    wait_until(lambda: epochs_stored(url) >= 3, process)
    postgres.stop(immediate=True)
    time.sleep(3)
    postgres.start()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "the database is away" in output
    check_chains_are_whole(url)
    assert postgres.password not in output
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert postgres.password.encode() not in file.read_bytes(), file


def test_pruned_trials_are_stored_as_pruned_with_all_their_values(tmp_path: Path) -> None:
    space = CHAINS | {
        "sampler": {"name": "random", "seed": 1},
        "scheduler": {"name": "asha", "grace_period": 1, "reduction_factor": 2},
        "budget": {"trials": 12},
        "parameters": {"x": {"type": "float", "low": 0.0, "high": 1.0}},
    }
    done = hpo(tmp_path, "run", write_space(tmp_path, "asha", space))
    assert done.returncode == 0, done.stdout + done.stderr
    database = tmp_path / "runs/hpo.db"
    ended = rows(database, "SELECT trial_id, state FROM trials")
    assert len(ended) == 12
    assert {state for _, state in ended} == {"COMPLETE", "PRUNED"}
    for trial, state in ended:
        steps = rows(database, f"SELECT count(*) FROM trial_intermediate_values WHERE trial_id = {trial}")[0][0]
        stored = rows(database, f"SELECT count(*) FROM hpo_metrics WHERE trial = {trial} AND name = 'value'")[0][0]
        assert steps == stored
        assert steps == 6 if state == "COMPLETE" else 1 <= steps < 6


TRAIN_PY = """
import argparse, json, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
for name in ("lr", "momentum", "half"):
    parser.add_argument(f"--{name}", type=float)
parser.add_argument("--epochs", type=int)
given = parser.parse_args()
assert given.half == given.lr / 2

def stop(*_):
    pathlib.Path(f"stopped-{given.lr}").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
print("starting with", given, file=sys.stderr)
for epoch in range(given.epochs):
    time.sleep(2.0 if epoch == given.epochs - 1 else 0.2)  # long enough to be stopped before its end
    accuracy = given.lr - (given.momentum or 0) / 10 - 1 / (epoch + 2)
    print(f"epoch {epoch} is done")
    print(json.dumps({"accuracy": accuracy}))
    if accuracy > 0.6:
        raise ValueError("too good to be true")
"""


def test_a_script_is_searched_over_pruned_killed_logged_and_replayed(tmp_path: Path) -> None:
    """The README's space over a script, with a scheduler and a derived value beside."""
    (tmp_path / "train.py").write_text(TRAIN_PY)
    (tmp_path / "search_spaces").mkdir()
    (tmp_path / "search_spaces/script.yaml").write_text(block("# search_spaces/script.yaml"))
    changes = [
        f"command={sys.executable} train.py --lr {{lr}} --momentum {{momentum}} --epochs {{max_epochs}} --half {{half}}",
        "derived.half=lr / 2",
        "parameters.lr={type: float, low: 0.01, high: 1.0}",
        "constraints=[lr < 0.95]",
        "sampler={name: random, seed: 3}",
        "scheduler={name: asha, reduction_factor: 2}",
        "budget.trials=10",
    ]
    done = hpo(tmp_path, "run", "script", *(word for change in changes for word in ("--set", change)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    database = tmp_path / "runs/hpo.db"
    trials = rows(database, "SELECT trial_id, number, state FROM trials JOIN hpo_trials ON trial = trial_id ORDER BY 1")
    assert len(trials) == 10
    assert {state for _, _, state in trials} >= {"COMPLETE", "PRUNED"}
    conditional = set()
    for trial, number, state in trials:
        params = dict(rows(database, f"SELECT param_name, param_value FROM trial_params WHERE trial_id = {trial}"))
        attrs = dict(rows(database, f"SELECT key, value_json FROM trial_user_attributes WHERE trial_id = {trial}"))
        conditional.add("momentum" in params)
        assert ("momentum" in params) == (params["nesterov"] == 0), "the first choice, true"
        assert json.loads(attrs["derived"]) == {"half": params["lr"] / 2}
        values = dict(
            rows(
                database, f"SELECT epoch, value FROM hpo_metrics WHERE trial = {trial} AND name = 'accuracy' ORDER BY 1"
            )
        )
        expected = {e: params["lr"] - params.get("momentum", 0) / 10 - 1 / (e + 1) for e in values}
        assert values == expected
        (log,) = tmp_path.glob(f"runs/checkpoints/script-*/{number}/log.txt")
        assert "starting with Namespace" in log.read_text()
        assert log.read_text().count(" is done") >= len(values)
        stopped = (tmp_path / f"stopped-{params['lr']}").exists()
        assert stopped == (state == "PRUNED"), "a script that is pruned is asked to end, no other one"
        if state == "FAIL":
            assert "too good to be true" in json.loads(attrs["fail_reason"])
    assert conditional == {True, False}
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] and "train.py" in p.info["cmdline"]]
    complete = next(number for _, number, state in trials if state == "COMPLETE")
    replay = hpo(tmp_path, "replay", "script", str(complete))
    assert replay.returncode == 0, replay.stdout + replay.stderr
    assert replay.stdout.endswith("epoch 1: 1 metrics equal\nepoch 2: 1 metrics equal\nepoch 3: 1 metrics equal\n")


def test_no_password_reaches_a_process_or_a_file_of_ray(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.create_database("secrets")
    path = write_space(tmp_path, "chains", CHAINS)
    process = start(tmp_path, "run", path, "--storage", url)
    wait_until(lambda: epochs_stored(url) >= 2, process)
    driver = psutil.Process(process.pid)
    assert postgres.password not in " ".join(driver.cmdline())
    workers = driver.children(recursive=True)
    assert any("ray::TrialWorker" in " ".join(child.cmdline()) for child in workers)
    for child in workers:
        assert postgres.password not in " ".join([*child.cmdline(), *child.environ().values()])
    scratch = {Path(word) for child in workers for word in child.cmdline() if "/hpo-ray-" in word}
    folders = {Path("/", *part.parts[1:3]) for part in scratch if part.parts[1] == "tmp"}
    assert folders
    files = [file for folder in [*folders, tmp_path] for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 10
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # the trial goes on, and drops its older checkpoints
            assert postgres.password.encode() not in file.read_bytes(), file
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode in {0, 130}, output  # looking at every file may take longer than the search
    assert postgres.password not in output
    stored = rows(url, "SELECT CAST(provenance AS TEXT) FROM hpo_runs")
    assert len(stored) == 1
    assert postgres.password not in str(stored)


def test_a_short_chaos_leaves_every_study_whole() -> None:
    """The long one is `python -m benchmarks.chaos --rounds 100`."""
    found = run_rounds(1, seed=7, storage="postgresql", kills=3)
    assert found["violations"] == []
    assert sum(found["events"].values()) >= 1
