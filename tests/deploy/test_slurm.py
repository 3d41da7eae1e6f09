"""deploy/slurm without Slurm: its variables are set, and scripts play srun, scontrol, ray and hpo."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

from benchmarks.postgres import Postgres
from tests.end_to_end.processes import environment, rows
from tests.factories import ROOT, TOY

SCRIPTS = ("array.sh", "symmetric.sh")
CALLS = "calls.txt"
# Each notes how it was called. srun runs its program once, and ray what follows --.
PROGRAMS = {
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": '[ "$1" = requeue ] || printf "node7\\nnode8\\n"',
    "ray": 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
    "hpo": """\
[ -z "$RAY_ADDRESS" ] || echo "$RAY_ADDRESS $RAY_AUTH_MODE $(stat -c %a:%s "$RAY_AUTH_TOKEN_PATH")" > seen
sleep $SLEEP
exit $CODE""",
}


@pytest.fixture
def submitted(tmp_path: Path) -> Path:
    """The folder from which a job was submitted, with the programs that it calls in .venv/bin."""
    shutil.copytree(ROOT / "deploy/slurm", tmp_path / "deploy/slurm")
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    for name, does in PROGRAMS.items():
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/{CALLS}\n{does}\n')
        (programs / name).chmod(0o755)
    return tmp_path


def variables_of(folder: Path, *, limit: float, **variables: str) -> dict[str, str]:
    """The environment of a job whose time limit is so many seconds away."""
    slurm = {
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_END_TIME": str(int(time.time() + limit)),
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
    }
    return environment(**{"HOME": str(folder), "CODE": "0", "SLEEP": "0"} | slurm | variables)


def run(
    folder: Path, script: str, *arguments: str, limit: float = 3600, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as Slurm does."""
    command = ["bash", str(folder / "deploy/slurm" / script), *arguments]
    env = variables_of(folder, limit=limit, **variables)
    return subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=60, check=False)


def calls(folder: Path, program: str) -> list[list[str]]:
    """How a program was called, as words."""
    lines = map(shlex.split, (folder / CALLS).read_text().splitlines())
    return [words[1:] for words in lines if words[0] == program]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_search_stops_before_the_time_limit(submitted: Path, script: str) -> None:
    done = run(submitted, script, "grid", "--set", "max_epochs=2", limit=4000)
    assert (done.returncode, done.stderr) == (0, "")
    ((*words, exit_after),) = calls(submitted, "hpo")
    assert words == ["run", "grid", "--set", "max_epochs=2", "--exit-after"]
    assert 3380 <= int(exit_after.removesuffix("s")) <= 3400
    assert "--cpus-per-task=1" in calls(submitted, "srun")[0]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_a_search_that_ends_by_itself_or_is_cancelled_is_not_requeued(submitted: Path, script: str, code: int) -> None:
    assert run(submitted, script, "grid", CODE=str(code)).returncode == code
    assert ["requeue", "4711"] not in calls(submitted, "scontrol")


LATE = {"HPO_RESERVE_SECONDS": "0", "SLEEP": "2.1", "CODE": "130"}  # hpo ends when --exit-after, 1 or 2 s, is over


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_search_that_is_not_done_at_the_time_limit_is_requeued(submitted: Path, script: str) -> None:
    assert run(submitted, script, "grid", limit=2, **LATE).returncode == 130
    assert calls(submitted, "scontrol")[-1] == ["requeue", "4711"]


@pytest.mark.slow
def test_a_job_is_not_requeued_forever(submitted: Path) -> None:
    done = run(submitted, "array.sh", "grid", limit=2, SLURM_RESTART_COUNT="3", HPO_MAX_RESTARTS="3", **LATE)
    assert "not requeued after 3 restarts" in done.stderr
    assert not calls(submitted, "scontrol")


def test_a_time_limit_that_leaves_no_time_is_one_message(submitted: Path) -> None:
    done = run(submitted, "array.sh", "grid", limit=500)
    message = "the job ends in less than 600 s: raise --time, or lower HPO_RESERVE_SECONDS"
    assert (done.returncode, done.stderr) == (2, f"until-limit.sh: {message}\n")
    assert not (submitted / CALLS).exists()


@pytest.mark.parametrize("value", ["10m", "0900", "-1"])
@pytest.mark.parametrize("name", ["HPO_RESERVE_SECONDS", "HPO_MAX_RESTARTS"])
def test_a_number_that_is_none_is_one_message(submitted: Path, name: str, value: str) -> None:
    done = run(submitted, "array.sh", "grid", limit=3600, **{name: value})
    assert done.returncode == 2
    assert done.stderr.endswith(f"are whole numbers, such as 600, not {value}\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_file_with_the_url_is_named_only_where_there_is_no_url(submitted: Path, script: str) -> None:
    """hpo refuses both together."""
    (submitted / ".venv/bin/hpo").write_text('#!/bin/sh\necho "$HPO_STORAGE $HPO_STORAGE_FILE"\n')
    assert run(submitted, script, "grid", HPO_STORAGE="sqlite:///a.db").stdout == "sqlite:///a.db \n"
    assert run(submitted, script, "grid").stdout == f" {submitted}/.hpo-storage\n"
    assert run(submitted, script, "grid", HPO_STORAGE_FILE="/a").stdout == " /a\n"


def test_one_ray_has_a_token_that_others_cannot_read_and_that_goes_with_the_job(submitted: Path) -> None:
    assert run(submitted, "symmetric.sh", "grid").returncode == 0
    assert (submitted / "seen").read_text() == "node7:6379 token 600:64\n"
    assert not list(submitted.glob(".ray-token-*"))
    (words,) = calls(submitted, "ray")
    assert words[:5] == ["symmetric-run", "--address", "node7:6379", "--min-nodes", "2"]


def test_ray_takes_the_options_of_symmetric_run(submitted: Path) -> None:
    """As the installed version of Ray reads them."""
    assert run(submitted, "symmetric.sh", "grid").returncode == 0
    (words,) = calls(submitted, "ray")
    options = words[1 : words.index("--")]
    assert curate_and_validate_ray_start_args(options) == ["--num-cpus", "1"]
    assert words[words.index("--") + 1 :][:3] == ["env", "RAY_ADDRESS=node7:6379", "hpo"]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.postgres
@pytest.mark.ray(starts=2)
def test_two_tasks_of_an_array_share_a_search(submitted: Path, postgres: Postgres) -> None:
    url = postgres.create_database("slurm")
    (submitted / ".hpo-storage").write_text(url)
    (submitted / ".venv/bin/hpo").write_text(f'#!/bin/sh\nexec {sys.executable} -m hpo "$@"\n')
    (submitted / "search_spaces").mkdir()
    parameters = {"x": [1, 2, 3, 4], "epoch_seconds": 0.3}
    (submitted / "search_spaces/toy.yaml").write_text(json.dumps(TOY | {"parameters": parameters}))
    told = submitted / "told.json"
    tasks = [
        subprocess.Popen(
            ["bash", str(submitted / "deploy/slurm/array.sh"), "toy"],
            env=variables_of(
                submitted, limit=3600, SLURM_ARRAY_TASK_ID=str(task), HPO_ON_FINISH=f"sh -c 'cat >> {told}'"
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for task in range(2)
    ]
    printed = [task.communicate(timeout=240)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], printed
    assert rows(url, "SELECT state::text, count(*) FROM trials GROUP BY state") == [("COMPLETE", 4)]
    assert rows(url, "SELECT count(*), count(DISTINCT run) FROM hpo_trials") == [(4, 2)]
    assert json.loads(told.read_text())["state"] == "finished", "announced once"
