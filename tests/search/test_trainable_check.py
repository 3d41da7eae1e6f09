"""Whether a search can run its trainable, found before trials start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from hpo.errors import TrainableError
from hpo.search.trainable_check import TrainableCheck, check_values
from hpo.space.model import Space, load_space
from tests.factories import shipped_space, wait_until


def check(space: Space) -> None:
    check_values(space)
    with TrainableCheck(space) as started:
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


# --- a trainable of the user, in a process of its own -----------------------------------------------------------------


def own_space(folder: Path, code: str) -> Space:
    (folder / "mine.py").write_text(code)
    (folder / "space.yaml").write_text(
        "trainable: mine:train\nmetric: loss\nsampler: grid\nmax_epochs: 2\nparameters: {lr: 0.1}\n"
    )
    return load_space(str(folder / "space.yaml"))


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
        ("import os\nos._exit(3)", "the process that imported mine:train was ended with exit code 3"),
        ("import os\nos.kill(os.getpid(), 11)", "the process that imported mine:train was ended by signal 11"),
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
    assert str(caught.value).startswith(expected)


@pytest.mark.slow
def test_the_trainable_is_imported_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    check(own_space(tmp_path, f"import os\nopen('pid', 'w').write(str(os.getpid()))\n{GOOD}"))
    assert int((tmp_path / "pid").read_text()) != os.getpid()
    assert "mine" not in sys.modules
    assert sys.path == path


@pytest.mark.slow
def test_a_check_that_nobody_waits_for_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = own_space(tmp_path, f"import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)\n{GOOD}")
    pid = tmp_path / "pid"
    with TrainableCheck(space):
        wait_until(lambda: pid.exists() and pid.read_text() != "")
    assert not psutil.pid_exists(int(pid.read_text()))
