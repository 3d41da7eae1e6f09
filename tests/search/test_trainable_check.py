"""Whether a search can run its trainable, found before trials start."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpo.errors import TrainableError
from hpo.search.trainable_check import TrainableCheck, check_values
from hpo.space.model import Space, load_space
from tests.end_to_end.processes import python, rows
from tests.factories import HpoHere, shipped_space, wait_until


def check(space: Space) -> None:
    check_values(space)
    with TrainableCheck(space) as started:
        started.start()
        started.wait()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parameters.optimizer=adm", "no optimizer 'adm', did you mean adam"),
        ("parameters.learning_rate=0.1", "has no parameter 'learning_rate'"),
        ("parameters.optimizer=[adam, sdg]", "no optimizer 'sdg', did you mean sgd"),
        ("parameters.lr=[0.1, -1]", "lr must be above 0"),
        ("parameters.batch_size=big", "batch_size must be of type int"),
    ],
)
def test_a_value_that_the_trainable_cannot_take_is_an_error(override: str, message: str) -> None:
    with pytest.raises(TrainableError, match=message):
        check(shipped_space("quick", override))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trainable: no_such_module:train", "1:1: trainable: no module 'no_such_module'"),
        ("trainable: hpo.train:trian", "1:1: trainable: hpo.train has no function 'trian', did you mean train?"),
        (
            "trainable: hpo.train.data:load",
            "1:1: trainable: hpo.train.data:load must be a generator function (params, *, data",
        ),
        ("command: pyhton train.py", "1:1: command: there is no program 'pyhton' on the PATH"),
        ("derived: {warmup: 2 * lr}", "1:11: parameters.warmup: hpo.train:train has no parameter 'warmup'"),
    ],
)
def test_a_trainable_that_cannot_be_used_is_named_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(f"{line}\nsampler: grid\nmax_epochs: 2\nparameters: {{lr: 0.1}}\n")
    with pytest.raises(TrainableError) as caught:
        check(load_space(str(path)))
    assert str(caught.value).startswith(f"{path}:{message}")


def test_all_mistakes_in_parameters_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("sampler: grid\nmax_epochs: 2\nparameters:\n  batchsize: 64\n  lr: [0.1, -1]\n  stem: cifr\n")
    with pytest.raises(TrainableError) as caught:
        check(load_space(str(path)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    expected = {4: "did you mean batch_size?", 5: "above 0, got -1", 6: "did you mean cifar?"}
    for line, (number, message) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"{path}:{number}:3: parameters.")
        assert message in line


# --- a trainable of the user, in its own process ----------------------------------------------------------------------


def own_space(folder: Path, code: str) -> Space:
    (folder / "mine.py").write_text(code)
    (folder / "space.yaml").write_text(
        "trainable: mine:train\nmetric: loss\nsampler: grid\nmax_epochs: 2\nparameters: {lr: 0.1}\n"
    )
    return load_space(str(folder / "space.yaml"))


def without_marks(text: str) -> str:
    """Leave out the marks below a line of code: newer versions of Python have more of them."""
    return re.sub(r"(?m)^[ ~^]+\n", "", text)


GOOD = "def train(params, *, data, seed, max_epochs, device, checkpoint=None):\n    yield\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import helper\n",
            "mine cannot be imported:\nTraceback (most recent call last):\n"
            """  File "FOLDER/mine.py", line 1, in <module>
    import helper
  File "FOLDER/helper.py", line 2, in <module>
    import a_package_that_is_not_installed
ModuleNotFoundError: No module named 'a_package_that_is_not_installed'""",
        ),
        (
            "def train(:\n",
            """mine cannot be imported:
  File "FOLDER/mine.py", line 1
    def train(:
              ^
SyntaxError: invalid syntax""",
        ),
        (
            "raise SystemExit('no license')",
            """mine cannot be imported:
Traceback (most recent call last):
  File "FOLDER/mine.py", line 1, in <module>
    raise SystemExit('no license')
SystemExit: no license""",
        ),
        ("import os\nos._exit(3)", "the process that imported mine:train ended with exit code 3"),
        # The forked process keeps the pipe open.
        (
            "import os, time\nif os.fork() == 0:\n    time.sleep(600)\nos._exit(3)",
            "the process that imported mine:train ended with exit code 3",
        ),
        ("import os\nos.kill(os.getpid(), 11)", "the process that imported mine:train was ended by SIGSEGV"),
        (
            """import importlib
try:
    importlib.import_module("helper")
except ImportError as error:
    raise ValueError("no helper") from error
""",
            """mine cannot be imported:
Traceback (most recent call last):
  File "FOLDER/mine.py", line 3, in <module>
    importlib.import_module("helper")
  File "FOLDER/helper.py", line 2, in <module>
    import a_package_that_is_not_installed
ModuleNotFoundError: No module named 'a_package_that_is_not_installed'

The above exception was the direct cause of the following exception:
""",
        ),
        (
            "input()",
            'mine cannot be imported:\nTraceback (most recent call last):\n  File "FOLDER/mine.py", line 1, in ',
        ),
        ("x = 1", "mine has no function 'train', and no other generator function"),
        (
            "from hpo import load_space, run_search\nrun_search(load_space('space.yaml'))",
            "the module starts a search when it is imported: do that below `if __name__ == '__main__':`",
        ),
        (
            "from hpo import load_space, plan_search\nplan_search(load_space('space.yaml'))",
            "the module starts a search when it is imported: do that below `if __name__ == '__main__':`",
        ),
        ("def train(params):\n    yield\n", "mine:train must be a generator function (params, *, data"),
    ],
)
def test_what_is_wrong_with_a_trainable_is_said_with_the_lines_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helper.py").write_text("\nimport a_package_that_is_not_installed\n")
    with pytest.raises(TrainableError) as caught:
        check(own_space(tmp_path, code))
    expected = f"{tmp_path}/space.yaml:1:1: trainable: {message.replace('FOLDER', str(tmp_path))}"
    assert without_marks(str(caught.value)).startswith(without_marks(expected))


@pytest.mark.slow
def test_a_message_is_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainableError) as caught:
        check(own_space(tmp_path, "raise ValueError('x' * 100_000)"))
    assert 9_000 < len(str(caught.value)) < 11_000


@pytest.mark.slow
def test_the_trainable_is_imported_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That one finds the modules that this one finds, and is gone when the answer is there."""
    monkeypatch.chdir(tmp_path)
    for folder, module in (("co:lon", "here_module"), ("other", "there_module")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{module}.py").touch()
    (tmp_path / "json.py").write_text("raise RuntimeError('replaced')")
    path: list[Any] = [*sys.path, str(tmp_path / "co:lon"), tmp_path / "other"]
    monkeypatch.setattr(sys, "path", path)
    code = "import os, here_module, there_module\nopen('pid', 'w').write(str(os.getpid()))\n"
    before = psutil.Process().children()
    space = own_space(tmp_path, code + GOOD)
    with TrainableCheck(space) as started:
        started.start()
        started.wait()
        assert psutil.Process().children() == before
        assert int((tmp_path / "pid").read_text()) != os.getpid()
    assert "mine" not in sys.modules
    assert sys.path == path


@pytest.mark.slow
def test_what_a_module_starts_and_makes_is_gone_after_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The environment is that of the driver: another Python would not start with the path of this one."""
    monkeypatch.chdir(tmp_path)
    code = """
import os, subprocess, tempfile
folder = tempfile.TemporaryDirectory(dir=".", prefix="scratch-")
sleeping = subprocess.Popen(["sleep", "600"])
open("pid", "w").write(str(sleeping.pid))
print("imported with", os.environ.get("PYTHONPATH"))
"""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    check(own_space(tmp_path, code + GOOD))
    assert capfd.readouterr().out == "imported with None\n"
    assert not list(tmp_path.glob("scratch-*"))
    wait_until(lambda: not psutil.pid_exists(int((tmp_path / "pid").read_text())))


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["leave", "kill"])
def test_a_check_that_nobody_waits_for_ends(tmp_path: Path, ending: str) -> None:
    own_space(tmp_path, f"import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)\n{GOOD}")
    program = """
import os, pathlib, signal, time
from hpo import load_space
from hpo.search.trainable_check import TrainableCheck
with TrainableCheck(load_space("space.yaml")) as started:
    started.start()
    while not (pathlib.Path("pid").exists() and pathlib.Path("pid").read_text()):
        time.sleep(0.05)
    started.look()
    if ENDING == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = python(tmp_path, "-c", program.replace("ENDING", repr(ending)))
    assert ended.returncode == (0 if ending == "leave" else -9), ended.stderr
    wait_until(lambda: not psutil.pid_exists(int((tmp_path / "pid").read_text())))


@pytest.mark.slow
def test_a_driver_without_standard_streams_is_answered(tmp_path: Path) -> None:
    own_space(tmp_path, f"print('imported')\n{GOOD}")
    program = """
import os
for number in range(3):
    os.close(number)
from hpo import load_space
from hpo.search.trainable_check import TrainableCheck
with TrainableCheck(load_space("space.yaml")) as started:
    started.start()
    started.wait()
open("answered", "w").close()
"""
    python(tmp_path, "-c", program)
    assert (tmp_path / "answered").exists()


@pytest.mark.slow
def test_a_mistake_that_is_known_is_said_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    go = tmp_path / "go"
    code = f"import os, time\nwhile not os.path.exists('go'):\n    time.sleep(0.05)\nraise ValueError\n{GOOD}"
    with TrainableCheck(own_space(tmp_path, code)) as started:
        started.start()
        started.look()
        go.touch()

        def keep_looking() -> None:
            for _ in range(1200):
                started.look()
                time.sleep(0.05)

        with pytest.raises(TrainableError, match="cannot be imported"):
            keep_looking()
        started.look()


@pytest.mark.slow
@pytest.mark.ray
def test_a_search_with_a_broken_trainable_stores_nothing(tmp_path: Path, hpo_here: HpoHere) -> None:
    own_space(tmp_path, "import a_package_that_is_not_installed")
    for verb in ("run", "plan"):
        ended = hpo_here(tmp_path, verb, "space.yaml")
        assert ended.returncode == 2
        assert ended.stderr.startswith("hpo: space.yaml:1:1: trainable: mine cannot be imported:\n")
        assert "importlib" not in ended.stderr
        assert rows(tmp_path / "runs/hpo.db", "SELECT count(*) FROM studies") in ([(0,)], [])
    missing = hpo_here(tmp_path, "run", "space.yaml", "--set", "trainable=no_such_module:train")
    assert "trainable: no module 'no_such_module' in the current folder" in missing.stderr
