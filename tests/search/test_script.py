"""The output that a script may print, how a trial of a script resumes, and that no script outlives its trial."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpo.errors import TrainableError
from hpo.search import script
from hpo.search.messages import Ending, TrialReport, TrialSpec
from hpo.search.script import ScriptEpoch, ScriptError, check_program, run_script
from hpo.search.worker import end_trial, run_trial
from hpo.space.model import load_space
from storage.database import Database
from tests.factories import ROOT, search_without_ray, take_reports, trial_spec, wait_until

pytestmark = pytest.mark.slow

Start = Callable[..., Generator[ScriptEpoch, None, None]]

PRINT_EPOCHS = """
import json
for epoch in range(1, {epochs} + 1):
    print(json.dumps({{"loss": 1 / epoch, "name": "x", "ok": True}}))
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "trial" / "log.txt"


@pytest.fixture
def start(log: Path) -> Start:
    """Run Python code as a script of three epochs."""

    def start(
        code: str, *, needs_epoch: bool = False, patterns: dict[str, str] | None = None
    ) -> Generator[ScriptEpoch, None, None]:
        return run_script(
            [sys.executable, "-c", code],
            log=log,
            max_epochs=3,
            threads=1,
            needs_epoch=needs_epoch,
            patterns=patterns,
        )

    return start


def test_a_missing_program_is_an_error_before_anything_starts() -> None:
    check_program("python train.py")
    with pytest.raises(TrainableError, match="command: there is no program 'pyhton'"):
        check_program("pyhton train.py")


def test_a_script_runs_in_its_folder(log: Path, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "run.sh").write_text("""#!/bin/sh\necho "{\\"value\\": $(cat number)}"\n""")
    (tmp_path / "code" / "run.sh").chmod(0o700)
    (tmp_path / "code" / "number").write_text("7")
    epochs = run_script(["./run.sh"], log=log, max_epochs=1, threads=1, needs_epoch=False, folder=tmp_path / "code")
    assert [epoch.metrics for epoch in epochs] == [{"value": 7.0}]


# --- patterns ---------------------------------------------------------------------------------------------------------

# Prints what the MNIST example of PyTorch prints.
LIKE_MNIST = r"""
for epoch in range(1, 4):
    for done in range(0, 60000, 20000):
        print(f"Train Epoch: {epoch} [{done}/60000 ({done / 600:.0f}%)]\tLoss: {2.3 / (epoch + done):.6f}")
    print(f"\nTest set: Average loss: {0.1 / epoch:.4f}, Accuracy: {9800 + epoch}/10000 (98%)\n")
"""
MNIST = {"epoch": r"Train Epoch: (\d+)", "accuracy": r"Accuracy: (\d+/\d+)"}


@pytest.mark.parametrize("needs_epoch", [False, True])
def test_patterns_read_the_output_of_a_script_that_nobody_changes(start: Start, log: Path, needs_epoch: bool) -> None:
    epochs = list(start(LIKE_MNIST, patterns=MNIST, needs_epoch=needs_epoch))
    assert epochs == [ScriptEpoch(epoch, {"accuracy": (9800 + epoch) / 10000}) for epoch in (1, 2, 3)]
    assert "Accuracy: 9803/10000 (98%)" in log.read_text()


def test_without_a_pattern_for_the_epoch_they_are_counted(start: Start) -> None:
    epochs = list(start(LIKE_MNIST, patterns={"loss": r"Average loss: ([\d.]+)"}))
    assert epochs == [ScriptEpoch(epoch, {"loss": value}) for epoch, value in ((1, 0.1), (2, 0.05), (3, 0.0333))]


def test_a_search_reads_the_output_of_such_a_script(tmp_path: Path, database: Database) -> None:
    (tmp_path / "main.py").write_text(LIKE_MNIST)
    keys = {
        "sampler": "grid",
        "max_epochs": 3,
        "command": f"{sys.executable} {tmp_path}/main.py --lr {{lr}}",
        "metric": "accuracy",
        "report": MNIST,
        "parameters": {"lr": [1]},
    }
    path = tmp_path / "mnist.yaml"
    path.write_text(json.dumps(keys))
    space = load_space(str(path))
    study, _ = search_without_ray(space, database, tmp_path)
    assert study.trials()[0].value == 0.9803
    assert study.metrics()[0][2]["accuracy"] == 0.9802
    path.write_text(json.dumps(keys | {"report": {"accuracy": "(1)"}}))
    assert load_space(str(path)).config_key({"lr": 1}) != space.config_key({"lr": 1}), "it measures something else"


def test_patterns_read_what_a_script_logs_in_the_order_of_its_output(start: Start, log: Path) -> None:
    code = """
import logging
logging.basicConfig(level=logging.INFO)  # it writes to stderr
for epoch in range(1, 4):
    logging.info("Train Epoch: %d", epoch)
    print(f"Accuracy: {epoch}/10")
"""
    patterns = {"epoch": r"Train Epoch: (\d+)", "accuracy": r"Accuracy: (\d+/\d+)"}
    epochs = [(epoch.epoch, epoch.metrics) for epoch in start(code, patterns=patterns)]
    assert epochs == [(1, {"accuracy": 0.1}), (2, {"accuracy": 0.2}), (3, {"accuracy": 0.3})]
    lines = [line for epoch in (1, 2, 3) for line in (f"INFO:root:Train Epoch: {epoch}", f"Accuracy: {epoch}/10")]
    assert log.read_text().splitlines() == lines


def test_with_patterns_json_is_text_like_any_other(start: Start) -> None:
    with pytest.raises(ScriptError, match="the script ended after epoch 0 of 3"):
        list(start(PRINT_EPOCHS.format(epochs=3), patterns=MNIST))


def test_a_pattern_that_finds_no_number_fails_the_trial_with_the_last_lines(start: Start) -> None:
    with pytest.raises(ScriptError, match=r"report.accuracy found '98%', which is no number[\s\S]*Test set"):
        list(start(LIKE_MNIST, patterns={"accuracy": r"\((98%)\)"}))


# --- output -----------------------------------------------------------------------------------------------------------


def test_each_line_of_json_with_numbers_is_an_epoch_and_all_output_is_in_the_log(start: Start, log: Path) -> None:
    code = PRINT_EPOCHS.format(epochs=3).replace(
        "    print", "    print('epoch', epoch); print('{not json'); print('{}'); print('[1]')\n    print"
    )
    code += "import sys\nprint('the last words', file=sys.stderr)"
    assert list(start(code)) == [ScriptEpoch(i, {"loss": 1 / i}) for i in (1, 2, 3)]
    lines = log.read_text().splitlines()
    for line in ("epoch 1", "{not json", "[1]", '{"loss": 0.5, "name": "x", "ok": true}', "the last words"):
        assert line in lines


def test_a_line_of_stderr_stays_whole_when_stdout_is_printed_meanwhile(start: Start, log: Path) -> None:
    code = f"""
import pathlib, sys, time
log = pathlib.Path({str(log)!r})
deadline = time.monotonic() + 60
for epoch in (1, 2, 3):
    sys.stderr.write("one ")
    line = '{{"loss": %d}}' % epoch
    print(line)
    while line not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    sys.stderr.write("line\\n")
"""
    assert len(list(start(code))) == 3
    assert sorted(log.read_text().splitlines()) == sorted([*["one line"] * 3, *[f'{{"loss": {i}}}' for i in (1, 2, 3)]])


def test_stderr_is_read_while_nobody_asks_for_the_next_epoch(start: Start, log: Path) -> None:
    code = """
import sys
print('{"loss": 1}')
sys.stderr.write("x" * 200_000 + "\\ndone\\n")
print('{"loss": 1}')
print('{"loss": 1}')
"""
    epochs = start(code)
    next(epochs)
    wait_until(lambda: "\ndone\n" in log.read_text())  # the first epoch may follow it
    assert len(list(epochs)) == 2


def test_the_log_is_appended_to_when_a_trial_starts_again(start: Start, log: Path) -> None:
    for _ in range(2):
        assert len(list(start(PRINT_EPOCHS.format(epochs=3)))) == 3
    assert len(log.read_text().splitlines()) == 6


def test_an_epoch_arrives_when_it_is_printed(start: Start) -> None:
    epochs = start("import time\nprint('{\"loss\": 1}')\ntime.sleep(600)")
    assert next(epochs) == ScriptEpoch(1, {"loss": 1.0})
    epochs.close()


def test_a_script_may_start_with_a_later_epoch(start: Start) -> None:
    code = 'for epoch in (2, 3): print(\'{"epoch": %d, "loss": NaN}\' % epoch)'
    assert [epoch.epoch for epoch in start(code, needs_epoch=True)] == [2, 3]


def test_the_last_epoch_arrives_when_the_script_has_ended(start: Start, tmp_path: Path) -> None:
    done = tmp_path / "done"
    code = (
        f"{PRINT_EPOCHS.format(epochs=3)}\nimport time, pathlib\ntime.sleep(0.3)\npathlib.Path({str(done)!r}).touch()"
    )
    epochs = start(code)
    for _ in range(3):
        next(epochs)
    assert done.exists()
    epochs.close()


def test_a_script_that_trains_beyond_the_last_epoch_is_stopped(start: Start) -> None:
    code = "import time\nwhile True: print('{\"loss\": 1}'); time.sleep(0.1)"
    assert [epoch.epoch for epoch in start(code)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("print('{\"loss\": 1}')\nraise ValueError('no such file')",
         ["ended with exit code 1 after epoch 1: ", "ValueError: no such file"]),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
         ["was killed by SIGSEGV after epoch 0, without any output"]),
        ("print('all is well')", ["the script ended after epoch 0 of 3: all is well"]),
        (PRINT_EPOCHS.format(epochs=2), ["the script ended after epoch 2 of 3"]),
        ("print('{\"epoch\": 0, \"loss\": 1}')",
         ["must count up from 1", "reported epoch 0 after epoch 0; if it reports none, they are counted"]),
        ("print('{\"epoch\": 2, \"loss\": 1}\\n' * 2)", ["reported epoch 2 after epoch 2"]),
        ("print('{\"epoch\": 1.5, \"loss\": 1}')", ["reported epoch 1.5"]),
        (PRINT_EPOCHS.format(epochs=3) + "\nraise SystemExit(7)", ["ended with exit code 7 after epoch 3"]),
    ],
)  # fmt: skip
def test_the_error_of_a_failed_script_has_the_reason_and_its_last_lines(
    start: Start, code: str, parts: list[str]
) -> None:
    with pytest.raises(ScriptError) as caught:
        list(start(code))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("patterns", [None, {"epoch": r"epoch.: (\d+)", "loss": r"loss.: (\d+)"}])
def test_a_script_with_its_own_checkpoints_must_not_count_from_0(start: Start, patterns: dict[str, str] | None) -> None:
    """It would be unclear whether the epoch that it reports after a resume is the one before."""
    with pytest.raises(
        ScriptError, match=r"reported epoch 0 after epoch 0; one that counts from 0 must report the next"
    ):
        list(
            start(
                'for epoch in range(3): print(\'{"epoch": %d, "loss": 1}\' % epoch)',
                needs_epoch=True,
                patterns=patterns,
            )
        )


def test_a_script_with_its_own_checkpoints_must_report_the_epoch(start: Start) -> None:
    with pytest.raises(ScriptError, match="must have an epoch"):
        list(start(PRINT_EPOCHS.format(epochs=3), needs_epoch=True))


# --- end of the process -----------------------------------------------------------------------------------------------

START_CHILD = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print('{"loss": 1, "pid": %d, "child": %d}' % (os.getpid(), child.pid))
time.sleep(600)
"""


def is_running(pid: float) -> bool:
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_stopped_script_and_its_children_are_killed(start: Start) -> None:
    epochs = start(START_CHILD)
    metrics = next(epochs).metrics
    assert is_running(metrics["child"])
    epochs.close()
    wait_until(lambda: not is_running(metrics["pid"]) and not is_running(metrics["child"]))
    assert not [child for child in psutil.Process().children() if "guard" in child.cmdline()]


def test_a_script_that_ignores_sigterm_is_killed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "STOP_SECONDS", 0.2)
    epochs = start("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + START_CHILD)
    metrics = next(epochs).metrics
    epochs.close()
    wait_until(lambda: not is_running(metrics["pid"]) and not is_running(metrics["child"]))


def test_a_daemon_of_the_script_does_not_delay_the_end_of_the_trial(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "STDERR_SECONDS", 0.1)
    code = START_CHILD.replace('time.sleep(600)"])', 'time.sleep(600)"], start_new_session=True)')
    epochs = start(code)
    metrics = next(epochs).metrics
    started = time.monotonic()
    epochs.close()
    try:
        assert time.monotonic() - started < 60
        assert is_running(metrics["child"]), "it is in another session, and holds stdout and stderr open"
    finally:
        os.kill(int(metrics["child"]), signal.SIGKILL)


def test_a_script_is_killed_with_its_worker(tmp_path: Path) -> None:
    code = f"""
import sys, time, pathlib
from hpo.search.script import run_script
epochs = run_script([sys.executable, "-c", {START_CHILD!r}], log=pathlib.Path({str(tmp_path)!r}) / "log.txt", max_epochs=3,
                    threads=1, needs_epoch=False)
metrics = next(epochs).metrics
print(int(metrics["pid"]), int(metrics["child"]), flush=True)
time.sleep(600)
"""
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert worker.stdout is not None
    pids = [int(word) for word in worker.stdout.readline().split()]
    assert len(pids) == 2
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    wait_until(lambda: not any(map(is_running, pids)))


# --- as a trial -------------------------------------------------------------------------------------------------------

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


def run_command(folder: Path, arguments: str, **changes: Any) -> list[TrialReport]:
    """Run a command as a trial of three epochs."""
    (folder / "train.py").write_text(SCRIPT)
    options = {"params": {"lr": 0.5}, "data": {"data_dir": str(folder)}, "seed": 7, "max_epochs": 3, "threads": 2}
    command = f"{sys.executable} {folder}/train.py {arguments}"
    reports = []
    for report in run_trial(trial_spec(folder, **(options | {"command": command} | changes))):
        reports.append(report)
        if report.failure or report.epoch >= 3:
            break
    return reports


def test_a_script_receives_the_values_of_the_trial(tmp_path: Path) -> None:
    reports = run_command(tmp_path, "{lr} {seed} no-folder {max_epochs}")
    assert [report.epoch for report in reports] == [1, 2, 3]
    assert reports[1].metrics.items() >= {"loss": 0.25, "seed": 7.0, "threads": 2.0}.items()
    assert reports[0].provenance is not None
    assert not list((tmp_path / "trial").glob("*.pt"))


def test_a_script_without_checkpoints_starts_from_the_beginning_and_reports_its_epochs_again(tmp_path: Path) -> None:
    failed = run_command(tmp_path, "{lr} {seed} no-folder 2")
    assert [report.epoch for report in failed] == [1, 2, 0]
    assert failed[-1].failure.startswith("the script ended after epoch 2 of 3: ")
    again = run_command(tmp_path, "{lr} {seed} no-folder 3", stored_epoch=2)
    assert [(report.epoch, report.is_recalled) for report in again] == [(1, False), (2, False), (3, False)]


def test_a_script_resumes_from_its_own_checkpoints(tmp_path: Path) -> None:
    run_command(tmp_path, "{lr} {seed} {checkpoint_dir} 2")
    again = run_command(tmp_path, "{lr} {seed} {checkpoint_dir} 3", stored_epoch=2)
    assert [(report.epoch, report.is_recalled) for report in again] == [(2, True), (3, False)]
    assert (tmp_path / "trial/script/epoch").read_text() == "3"


def test_a_script_that_cannot_be_started_is_a_failed_trial(tmp_path: Path) -> None:
    reports = run_command(tmp_path, "", command="no-such-program {lr}")
    assert len(reports) == 1
    assert "no-such-program" in reports[0].failure


def spec_that_may_wait(folder: Path, source: str, last_wait: int) -> TrialSpec:
    """Return a trial of this script, which gets the folder of its checkpoints."""
    (folder / "train.py").write_text(source)
    command = f"{sys.executable} {folder}/train.py {{checkpoint_dir}}"
    return trial_spec(folder, command=command, params={}, data={"data_dir": "data"}, last_wait=last_wait)


def test_a_script_that_may_wait_trains_no_epoch_that_nobody_reads(tmp_path: Path) -> None:
    """It handles SIGTERM as many do: it finishes its epoch, and saves."""
    spec = spec_that_may_wait(
        tmp_path,
        "import json, pathlib, signal, sys, time\n"
        "folder, stops = pathlib.Path(sys.argv[1]), []\n"
        "signal.signal(signal.SIGTERM, lambda *_: stops.append(1))\n"
        "state = folder / 'state'\n"
        "done = int(state.read_text()) if state.exists() else 0\n"
        "for epoch in range(done + 1, 5):\n"
        "    time.sleep(0.5)\n"
        "    state.write_text(str(epoch))\n"
        "    print(json.dumps({'epoch': epoch, 'value': epoch}), flush=True)\n"
        "    if stops:\n"
        "        break\n",
        last_wait=1,
    )
    reports = run_trial(spec)
    assert next(reports).epoch == 1
    assert end_trial(reports, Ending.SAVE_ONLY, spec) == ""
    assert (tmp_path / "trial/script/state").read_text() == "1"
    resumed = take_reports(replace(spec, stored_epoch=1), 4)
    assert [(each.epoch, each.is_recalled) for each in resumed] == [(1, True), (2, False), (3, False), (4, False)]


def test_a_script_that_cannot_wait_any_more_is_not_stopped(tmp_path: Path) -> None:
    spec = spec_that_may_wait(
        tmp_path,
        "import json, pathlib, sys, time\n"
        "for epoch in range(1, 5):\n"
        "    time.sleep(0.5)\n"  # or it has ended before it can be stopped
        "    (pathlib.Path(sys.argv[1]) / 'state').write_text(str(epoch))\n"
        "    print(json.dumps({'epoch': epoch, 'value': epoch}), flush=True)\n",
        last_wait=2,
    )
    reports, state = run_trial(spec), tmp_path / "trial/script/state"
    for epoch in (1, 2):
        assert next(reports).epoch == epoch
        time.sleep(0.7)
        assert state.read_text() == str(epoch), "it is stopped"
    assert next(reports).epoch == 3
    wait_until(lambda: state.read_text() == "4")
    reports.close()
