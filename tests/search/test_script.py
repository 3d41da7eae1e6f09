"""A script in the place of a trainable: how it is called, what it may print, and that it never outlives its trial."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpo import command
from hpo.errors import TrainableError
from hpo.search.worker import TrialReport, TrialSpec, run_trial
from hpo.space.command import Epoch, ScriptError, build_arguments, check_program, find_command_mistakes, run_script

Start = Callable[..., Generator[Epoch, None, None]]

PRINT_EPOCHS = """
import json
for epoch in range(1, {epochs} + 1):
    print(json.dumps({{"loss": 1 / epoch, "name": "x", "ok": True}}))
"""


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Run Python code as a script."""

    def start(code: str, **options: Any) -> Generator[Epoch, None, None]:
        defaults = {"log": tmp_path / "trial/log.txt", "max_epochs": 3, "threads": 1, "needs_epoch": False}
        return run_script([sys.executable, "-c", code], **(defaults | options))

    return start


# --- arguments


def test_values_are_put_into_arguments_and_no_shell_reads_them() -> None:
    values = {"lr": 1e-5, "name": "a b; $(touch x) 'quoted' {lr}", "flag": True, "nothing": None, "seed": 3}
    text = "python 'my train.py' --lr {lr} --name={name} {flag} {nothing} --both={seed}-{lr} '{\"a\": 1}' {} $HOME *"
    assert build_arguments(text, values) == [
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


def test_an_argument_of_an_inactive_parameter_is_left_out_with_its_flag() -> None:
    text = "python t.py --lr {lr} --momentum {momentum} --beta={beta} {momentum} --last"
    assert build_arguments(text, {"lr": -1, "momentum": 0.9}) == [
        "python", "t.py", "--lr", "-1", "--momentum", "0.9", "0.9", "--last",
    ]  # fmt: skip
    assert build_arguments(text, {"lr": -1, "beta": 2}) == ["python", "t.py", "--lr", "-1", "--beta=2", "--last"]


def test_the_values_of_a_trial_need_not_be_parameters() -> None:
    text = "python t.py {seed} {max_epochs} {device} {data_dir} {checkpoint_dir} {warmup}"
    assert find_command_mistakes(text, ["warmup"]) == []
    assert len(find_command_mistakes(text, [])) == 1


def test_a_program_that_is_not_there_is_told_before_anything_starts() -> None:
    check_program("python train.py")
    with pytest.raises(TrainableError, match="command: there is no program 'pyhton'"):
        check_program("pyhton train.py")


# --- what it prints


def test_each_line_of_json_with_numbers_is_an_epoch_and_the_rest_is_kept_in_the_log(
    start: Start, tmp_path: Path
) -> None:
    code = PRINT_EPOCHS.format(epochs=3).replace(
        "    print", "    print('epoch', epoch); print('{not json'); print('{}'); print('[1]')\n    print"
    )
    code += "import sys\nprint('said at the end', file=sys.stderr)"
    epochs = list(start(code))
    assert epochs == [Epoch(i, {"loss": 1 / i}) for i in (1, 2, 3)]
    log = (tmp_path / "trial/log.txt").read_text().splitlines()
    for line in ("epoch 1", "{not json", "[1]", '{"loss": 0.5, "name": "x", "ok": true}', "said at the end"):
        assert line in log


def test_a_log_is_appended_to_when_a_trial_starts_again(start: Start, tmp_path: Path) -> None:
    for _ in range(2):
        assert len(list(start(PRINT_EPOCHS.format(epochs=3)))) == 3
    assert len((tmp_path / "trial/log.txt").read_text().splitlines()) == 6


def test_an_epoch_comes_when_it_is_printed_not_when_the_script_ends(start: Start) -> None:
    epochs = start("import time\nprint('{\"loss\": 1}')\ntime.sleep(60)")
    started = time.monotonic()
    assert next(epochs) == Epoch(1, {"loss": 1.0})
    assert time.monotonic() - started < 20
    epochs.close()


def test_a_script_may_say_its_epochs_and_go_on_from_a_later_one(start: Start) -> None:
    code = 'for epoch in (2, 3): print(\'{"epoch": %d, "loss": NaN}\' % epoch)'
    assert [epoch.epoch for epoch in start(code, needs_epoch=True)] == [2, 3]


def test_the_last_epoch_is_told_when_the_script_has_put_its_things_in_order(start: Start, tmp_path: Path) -> None:
    done = tmp_path / "done"
    code = f"{PRINT_EPOCHS.format(epochs=3)}\nimport time, pathlib\ntime.sleep(1)\npathlib.Path({str(done)!r}).touch()"
    epochs = start(code)
    for _ in range(3):
        next(epochs)
    assert done.exists()
    epochs.close()


def test_a_script_that_goes_on_beyond_the_last_epoch_is_not_waited_for(start: Start) -> None:
    code = "import time\nfor _ in range(600): print('{\"loss\": 1}'); time.sleep(0.1)"
    started = time.monotonic()
    assert [epoch.epoch for epoch in start(code)] == [1, 2, 3]
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('{\"loss\": 1}')\nraise ValueError('no such file')",
         ["ended with exit code 1 after epoch 1: ", "ValueError: no such file"]),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", ["was killed by SIGSEGV after epoch 0, without a word"]),
        ("print('all is well')", ["the script ended after epoch 0 of 3: all is well"]),
        (PRINT_EPOCHS.format(epochs=2), ["the script ended after epoch 2 of 3"]),
        ("print('{\"epoch\": 0, \"loss\": 1}')", ["counted up from 1", "told epoch 0 after epoch 0"]),
        ("print('{\"epoch\": 2, \"loss\": 1}\\n' * 2)", ["told epoch 2 after epoch 2"]),
        ("print('{\"epoch\": 1.5, \"loss\": 1}')", ["told epoch 1.5"]),
        (PRINT_EPOCHS.format(epochs=3) + "\nraise SystemExit(7)", ["ended with exit code 7 after epoch 3"]),
    ],
)  # fmt: skip
def test_a_script_that_fails_says_how_with_its_last_lines(start: Start, code: str, said: list[str]) -> None:
    with pytest.raises(ScriptError) as caught:
        list(start(code))
    assert "\n" not in str(caught.value)
    for words in said:
        assert words in str(caught.value)


def test_with_checkpoints_of_its_own_a_script_must_say_its_epochs(start: Start) -> None:
    with pytest.raises(ScriptError, match="must say its epoch"):
        list(start(PRINT_EPOCHS.format(epochs=3), needs_epoch=True))


# --- its end

FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print('{"loss": 1, "pid": %d, "child": %d}' % (os.getpid(), child.pid))
time.sleep(600)
"""


def is_gone(pid: float, seconds: float = 10.0) -> bool:
    """Whether a process ends within some seconds."""
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_script_that_is_stopped_is_gone_with_all_it_started(start: Start) -> None:
    epochs = start(FAMILY)
    metrics = next(epochs).metrics
    assert psutil.pid_exists(int(metrics["child"]))
    epochs.close()
    assert is_gone(metrics["pid"])
    assert is_gone(metrics["child"])
    assert not [child for child in psutil.Process().children() if "guard" in child.cmdline()]


def test_a_script_that_will_not_end_is_killed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "STOP_SECONDS", 0.5)
    epochs = start("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FAMILY)
    metrics = next(epochs).metrics
    epochs.close()
    assert is_gone(metrics["pid"])
    assert is_gone(metrics["child"])


def test_a_script_does_not_outlive_a_worker_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import sys, time, pathlib
from hpo.space.command import run_script
epochs = run_script([sys.executable, "-c", {FAMILY!r}], log=pathlib.Path({str(tmp_path)!r}) / "log.txt", max_epochs=3,
                    threads=1, needs_epoch=False)
metrics = next(epochs).metrics
print(int(metrics["pid"]), int(metrics["child"]), flush=True)
time.sleep(600)
"""
    worker = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    )
    assert worker.stdout is not None
    pids = [int(word) for word in worker.stdout.readline().split()]
    assert len(pids) == 2
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    assert all(map(is_gone, pids))


# --- as a trial


def trial_of(folder: Path, text: str, **changes: Any) -> list[TrialReport]:
    defaults: dict[str, Any] = {
        "trainable": "hpo.train:train",
        "command": f"{sys.executable} {text}",
        "params": {"lr": 0.5},
        "data": {"data_dir": str(folder)},
        "seed": 7,
        "max_epochs": 3,
        "stored_epoch": 0,
        "folder": str(folder / "trial"),
        "checkpoint_every": 1,
        "device": "cpu",
        "threads": 2,
        "timeout": None,
    }
    messages = []
    for message in run_trial(TrialSpec(**(defaults | changes))):
        messages.append(message)
        if message.failure or message.epoch >= 3:
            break
    return messages


SCRIPT = """
import json, os, pathlib, sys
lr, seed, folder, stop = float(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]), int(sys.argv[4])
saved = folder / "epoch"
done = int(saved.read_text()) if saved.exists() else 0
for epoch in range(done + 1, stop + 1):
    print(json.dumps({"epoch": epoch, "loss": lr / epoch, "seed": int(seed), "threads": int(os.environ["OMP_NUM_THREADS"])}))
    if folder.exists():
        saved.write_text(str(epoch))
"""


def test_a_script_is_a_trial_with_the_values_of_the_trial(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    messages = trial_of(tmp_path, f"{tmp_path}/train.py {{lr}} {{seed}} no-folder {{max_epochs}}")
    assert [message.epoch for message in messages] == [1, 2, 3]
    assert messages[1].metrics.items() >= {"loss": 0.25, "seed": 7.0, "threads": 2.0}.items()
    assert messages[0].provenance is not None
    assert not list((tmp_path / "trial").glob("*.pt"))


def test_a_script_starts_again_from_the_beginning_and_tells_its_epochs_again(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    failed = trial_of(tmp_path, f"{tmp_path}/train.py {{lr}} {{seed}} no-folder 2")
    assert [message.epoch for message in failed] == [1, 2, 0]
    assert failed[-1].failure.startswith("the script ended after epoch 2 of 3: ")
    again = trial_of(tmp_path, f"{tmp_path}/train.py {{lr}} {{seed}} no-folder 3", stored_epoch=2)
    assert [(message.epoch, message.recalled) for message in again] == [(1, False), (2, False), (3, False)]


def test_a_script_with_checkpoints_of_its_own_goes_on_from_them(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    trial_of(tmp_path, f"{tmp_path}/train.py {{lr}} {{seed}} {{checkpoint_dir}} 2")
    again = trial_of(tmp_path, f"{tmp_path}/train.py {{lr}} {{seed}} {{checkpoint_dir}} 3", stored_epoch=2)
    assert [(message.epoch, message.recalled) for message in again] == [(2, True), (3, False)]
    assert (tmp_path / "trial/script/epoch").read_text() == "3"


def test_a_script_that_cannot_be_started_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    messages = trial_of(tmp_path, "", command="no-such-program {lr}")
    assert len(messages) == 1
    assert "no-such-program" in messages[0].failure
