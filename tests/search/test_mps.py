"""CUDA's MPS, with a script instead of the program that controls it: no GPU is needed."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hpo import plan_search, run_search
from hpo.search import mps
from hpo.search.estimate import SearchEstimate
from hpo.search.listener import NullListener
from hpo.search.mps import PIPE_VARIABLE, make_contexts, start_mps
from hpo.search.probes import Probes
from hpo.search.slots import Node, Slots, may_share_gpu
from tests.factories import ROOT, is_running, shipped_space, toy_space, wait_until

pytestmark = pytest.mark.slow  # each test starts processes

# Its daemon is `sleep`, and the file `server` says that a client has connected.
CONTROL = """#!/bin/sh
folder=${CUDA_MPS_PIPE_DIRECTORY:-@default@}
echo "$* pipe=$CUDA_MPS_PIPE_DIRECTORY log=$CUDA_MPS_LOG_DIRECTORY visible=${CUDA_VISIBLE_DEVICES-unset}" \
    "mode=$(stat -c %a "$folder")" >> @calls@
if [ "$1" = -d ]; then
    case "$FAKE_MPS" in
        failing) echo "warning"; echo "an instance of this daemon is already running"; exit 1 ;;
        hanging) exec sleep 1000 ;;
        silent) exit 0 ;;
    esac
    sleep 1000 < /dev/null > /dev/null 2>&1 &
    echo $! > "$folder/pid"
    exit 0
fi
read command
echo "$command" >> @commands@
pid=$(cat "$folder/pid" 2> /dev/null)
kill -0 "$pid" 2> /dev/null || { echo "Cannot find MPS control daemon process"; exit 1; }
case "$command" in
    get_server_list) cat "$folder/server" 2> /dev/null ;;
    quit*) [ "$FAKE_MPS" = deaf ] && exec sleep 1000; kill "$pid" ;;
esac
exit 0
"""
CONNECTING = ("sh", "-c", 'echo $$ > "$CUDA_MPS_PIPE_DIRECTORY/server"')


@dataclass
class FakeMps:
    """A machine with a GPU and MPS."""

    folder: Path
    default: Path  # instead of /tmp/nvidia-mps

    @property
    def calls(self) -> list[str]:
        return self._lines("calls")

    @property
    def commands(self) -> list[str]:
        return self._lines("commands")

    def _lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def folders(self) -> list[Path]:
        return list(self.folder.glob("hpo-mps-*"))

    def start_daemon(self, folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        daemon = subprocess.Popen(["sleep", "1000"])
        (folder / "pid").write_text(str(daemon.pid))
        return daemon


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeMps]:  # pytest's folder is elsewhere
    folder = Path(tempfile.mkdtemp(prefix="mps-", dir="/tmp"))  # a short name, for MPS's sockets
    found = FakeMps(folder, folder / "default")
    script = CONTROL
    for name in ("default", "calls", "commands"):
        script = script.replace(f"@{name}@", str(folder / name))
    (folder / "bin").mkdir()
    (folder / "bin" / mps.CONTROL).write_text(script)
    (folder / "bin" / mps.CONTROL).chmod(0o755)
    (folder / "dev").mkdir()
    (folder / "dev" / "nvidia0").touch()
    monkeypatch.setenv("PATH", f"{folder}/bin{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for name in (PIPE_VARIABLE, mps.VISIBLE_VARIABLE, "FAKE_MPS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mps, "DEVICES", folder / "dev")
    monkeypatch.setattr(mps, "DEFAULT_PIPES", found.default)
    monkeypatch.setattr(mps, "CLIENT", CONNECTING)
    yield found
    shutil.rmtree(folder)


def daemon_pid(folder: str) -> int:
    return int((Path(folder) / "pid").read_text())


# --- start and stop ---------------------------------------------------------------------------------------------------


def test_mps_runs_in_a_private_folder_inside_the_block(fake: FakeMps) -> None:
    with start_mps(is_wanted=True) as running:
        assert (running.is_active, running.failure) == (True, "")
        folder = os.environ[PIPE_VARIABLE]
        pid = daemon_pid(folder)
        assert is_running(pid)
    assert fake.calls[0] == f"-d pipe={folder} log={folder} visible=unset mode=700"
    assert fake.commands[-1].startswith("quit -t ")
    assert PIPE_VARIABLE not in os.environ
    assert not running.is_active
    assert not is_running(pid)
    assert fake.folders == []


@pytest.mark.parametrize(
    ("visible", "passed_on"), [("2,3", "unset"), ("GPU-8932f937,GPU-1", "GPU-8932f937,GPU-1")], ids=["numbers", "UUIDs"]
)
def test_gpus_are_not_numbered_twice(
    visible: str, passed_on: str, fake: FakeMps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(mps.VISIBLE_VARIABLE, visible)
    with start_mps(is_wanted=True) as running:
        assert running.is_active
        assert os.environ[mps.VISIBLE_VARIABLE] == visible
    assert f"visible={passed_on} " in fake.calls[0]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_mps_is_stopped_after_an_error(error: type[BaseException], fake: FakeMps) -> None:
    pids = []

    def fail() -> None:
        with start_mps(is_wanted=True):
            pids.append(daemon_pid(os.environ[PIPE_VARIABLE]))
            raise error

    with pytest.raises(error):
        fail()
    assert not is_running(pids[0])
    assert fake.folders == []


def test_it_can_be_stopped_early(fake: FakeMps) -> None:
    with start_mps(is_wanted=True) as running:
        running.stop()
        assert (running.is_active, fake.folders, PIPE_VARIABLE in os.environ) == (False, [], False)
        running.stop()
    assert len([each for each in fake.commands if each.startswith("quit")]) == 1


def test_a_daemon_that_does_not_quit_is_killed(fake: FakeMps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MPS", "deaf")
    monkeypatch.setattr(mps, "STOP_SECONDS", 0.3)
    with start_mps(is_wanted=True):
        pid = daemon_pid(os.environ[PIPE_VARIABLE])
    assert not is_running(pid)
    assert fake.folders == []


DRIVER = """
import os, sys, time
from hpo.search import mps
from pathlib import Path
mps.DEVICES, mps.DEFAULT_PIPES, mps.CLIENT = Path(sys.argv[1]), Path(sys.argv[2]), tuple(sys.argv[3:])
with mps.start_mps(is_wanted=True) as running:
    print(os.environ[mps.PIPE_VARIABLE], running._watcher.pid, flush=True)
    time.sleep(100)
"""


def start_driver(fake: FakeMps) -> tuple[subprocess.Popen[str], str, int]:
    command = [sys.executable, "-c", DRIVER, str(fake.folder / "dev"), str(fake.default), *CONNECTING]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    folder, watcher = driver.stdout.readline().split()
    return driver, folder, int(watcher)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_mps_ends_with_a_driver_that_is_killed(number: signal.Signals, fake: FakeMps) -> None:
    driver, folder, watcher = start_driver(fake)
    pid = daemon_pid(folder)
    with driver:
        driver.send_signal(number)
    wait_until(lambda: not is_running(pid) and not is_running(watcher), timeout_seconds=20)
    assert fake.folders == []


def test_signals_of_a_terminal_do_not_end_the_watcher_before_the_driver(fake: FakeMps) -> None:
    driver, _, watcher = start_driver(fake)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(watcher, number)
    time.sleep(0.2)
    assert is_running(watcher)
    with driver:
        driver.kill()
    wait_until(lambda: not is_running(watcher), timeout_seconds=20)


def test_a_watcher_that_was_killed_leaves_nothing_after_the_search(fake: FakeMps) -> None:
    with start_mps(is_wanted=True) as running:
        assert running._watcher is not None
        pid = daemon_pid(os.environ[PIPE_VARIABLE])
        running._watcher.kill()
    wait_until(lambda: not is_running(pid), timeout_seconds=20)
    assert fake.folders == []


def test_the_next_search_removes_what_a_killed_one_left(fake: FakeMps) -> None:
    driver, folder, watcher = start_driver(fake)
    pid = daemon_pid(folder)
    os.kill(watcher, signal.SIGKILL)
    with driver:
        driver.kill()
    wait_until(lambda: not is_running(watcher))
    assert is_running(pid)
    with start_mps(is_wanted=True) as running:
        assert running.is_active
        assert os.environ[PIPE_VARIABLE] != folder
        wait_until(lambda: not is_running(pid), timeout_seconds=20)
        assert [str(each) for each in fake.folders] == [os.environ[PIPE_VARIABLE]]


def test_two_searches_at_a_time_leave_each_other_alone(fake: FakeMps) -> None:
    driver, folder, watcher = start_driver(fake)
    with start_mps(is_wanted=True):
        assert os.environ[PIPE_VARIABLE] != folder
    assert is_running(daemon_pid(folder))
    with driver:
        driver.kill()
    wait_until(lambda: not is_running(watcher), timeout_seconds=20)


# --- where it is not used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", ["not wanted", "no GPU", "hidden GPU", "not installed"])
def test_nothing_is_started_without_need(hidden: str, fake: FakeMps, monkeypatch: pytest.MonkeyPatch) -> None:
    if hidden == "no GPU":
        (fake.folder / "dev" / "nvidia0").unlink()
    if hidden == "hidden GPU":
        monkeypatch.setenv(mps.VISIBLE_VARIABLE, "")
    if hidden == "not installed":
        (fake.folder / "bin" / mps.CONTROL).unlink()
    with start_mps(is_wanted=hidden != "not wanted") as running:
        assert (running.is_active, running.failure) == (False, "")
    assert fake.calls == []


@pytest.mark.parametrize(
    ("how", "client", "failure"),
    [
        ("failing", CONNECTING, "an instance of this daemon is already running"),
        ("hanging", CONNECTING, "nvidia-cuda-mps-control -d did not end within 0.5 s"),
        ("silent", CONNECTING, "nvidia-cuda-mps-control does not answer"),
        ("", ("sh", "-c", "echo warning; echo 'cuInit: no device (100)'; exit 1"), "cuInit: no device (100)"),
        ("", ("false",), "the process that makes a CUDA context in it ended with 1"),
        ("", ("sleep", "1000"), "no CUDA context could be made in it within 0.5 s"),
        ("", ("true",), "a new process does not use it"),
    ],
)
def test_an_mps_that_cannot_be_used_is_stopped_and_says_why(
    how: str, client: tuple[str, ...], failure: str, fake: FakeMps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MPS", how)
    monkeypatch.setattr(mps, "CLIENT", client)
    if "within" in failure or how == "silent":  # the others get their usual time: this machine may be busy
        monkeypatch.setattr(mps, "CLIENT_SECONDS" if client == ("sleep", "1000") else "START_SECONDS", 0.5)
    with start_mps(is_wanted=True) as running:
        assert (running.is_active, running.failure) == (False, failure)
        assert PIPE_VARIABLE not in os.environ
        assert fake.folders == []


def test_a_system_that_cannot_start_processes_is_no_error_of_the_search(
    fake: FakeMps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mps, "WATCHER", ("/no/such/program",))
    with start_mps(is_wanted=True) as running:
        assert not running.is_active
        assert running.failure == "[Errno 2] No such file or directory: '/no/such/program'"


def test_on_this_machine_the_real_client_says_what_is_missing(fake: FakeMps, monkeypatch: pytest.MonkeyPatch) -> None:
    if list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there is a GPU")
    monkeypatch.undo()
    ended = subprocess.run([*mps.CLIENT], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "libcuda" in ended.stderr or "cuInit" in ended.stderr


@pytest.mark.parametrize("place", ["named", "default"])
def test_an_mps_that_runs_is_used_and_left_alone(place: str, fake: FakeMps, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fake.folder / "theirs" if place == "named" else fake.default
    if place == "named":
        monkeypatch.setenv(PIPE_VARIABLE, str(folder))
    with fake.start_daemon(folder) as daemon:
        for _ in range(2):
            with start_mps(is_wanted=True) as running:
                assert (running.is_active, running.failure) == (True, "")
                assert os.environ.get(PIPE_VARIABLE) == (str(folder) if place == "named" else None)
        assert daemon.poll() is None
        daemon.kill()
    assert fake.commands == ["get_server_list"] * 2
    assert os.environ.get(PIPE_VARIABLE) == (str(folder) if place == "named" else None)


def test_a_named_mps_that_does_not_answer_is_said(fake: FakeMps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PIPE_VARIABLE, "/nowhere")
    with start_mps(is_wanted=True) as running:
        assert (running.is_active, running.failure) == (False, "no MPS answers at CUDA_MPS_PIPE_DIRECTORY=/nowhere")
    (fake.folder / "bin" / mps.CONTROL).unlink()  # as in a container whose MPS runs outside: nobody can be asked
    with start_mps(is_wanted=True) as running:
        assert running.is_active


# --- the client -------------------------------------------------------------------------------------------------------


class FakeDriver:
    """Stands in for libcuda.so.1, with two GPUs."""

    def __init__(self, failing: str = "", gpus: int = 2) -> None:
        self.calls: list[str] = []
        self._failing, self._gpus = failing, gpus

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "cuDeviceGetCount":
                arguments[0]._obj.value = self._gpus
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"the MPS server is not ready"
            return 807 if name == self._failing else 0

        return call


def test_a_client_makes_a_context_on_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver if name == "libcuda.so.1" else None)
    make_contexts()
    assert driver.calls == ["cuInit", "cuDeviceGetCount", *["cuDeviceGet", "cuDevicePrimaryCtxRetain"] * 2]


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (FakeDriver("cuInit"), r"cuInit: the MPS server is not ready \(807\)"),
        (FakeDriver("cuDevicePrimaryCtxRetain"), "cuDevicePrimaryCtxRetain: the MPS server is not ready"),
        (FakeDriver(gpus=0), "there is no GPU"),
    ],
)
def test_a_client_says_what_failed(driver: FakeDriver, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    with pytest.raises(RuntimeError, match=message):
        make_contexts()


# --- in a search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], True),  # three trials, gpu auto
        (["parameters.batch_size=64"], False),  # one trial
        (["resources.gpu=0.5"], True),
        (["resources.gpu=0.6"], False),
        (["resources.gpu=1"], False),
        (["resources.gpu=0"], False),
        (["trainable=mine:train"], False),  # with auto, each trial of it has a GPU
        (["trainable=mine:train", "resources.gpu=0.25"], True),
    ],
)
def test_mps_is_wanted_where_several_trials_may_share_a_gpu(overrides: list[str], expected: bool) -> None:
    assert may_share_gpu(shipped_space("grid", *overrides)) == expected


def test_a_search_without_a_number_of_trials_may_share_a_gpu() -> None:
    space = shipped_space(
        "grid", "sampler=random", "budget={time: 1h}", "parameters.lr={type: float, low: 0.1, high: 1}"
    )
    assert may_share_gpu(space)


class Notes(NullListener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def plan(fake: FakeMps, monkeypatch: pytest.MonkeyPatch, slots: Slots) -> tuple[list[str], list[bool]]:
    """Plan a search whose estimate says how many trials share a GPU; return the notes, and whether probes saw MPS."""
    seen = []

    def measured(*arguments: Any) -> SearchEstimate:
        seen.append(PIPE_VARIABLE in os.environ)
        return SearchEstimate(slots, {}, {}, 3, 1.0, 1.0)

    monkeypatch.setattr("hpo.search.estimate.this_machine", lambda: Node(16.0, 1.0))
    monkeypatch.setattr("hpo.search.estimate.can_measure", lambda _: True)
    monkeypatch.setattr("hpo.search.estimate.estimate_search", measured)
    monkeypatch.setattr("hpo.search.probes.Probes.describe_data", lambda _: ("", (1, 1, 1)))
    notes = Notes()
    plan_search(shipped_space("grid"), storage=f"sqlite:///{fake.folder}/hpo.db", runs_dir=fake.folder, listener=notes)
    return notes.texts, seen


def test_a_plan_measures_under_mps_and_says_that_trials_share_a_gpu(
    fake: FakeMps, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, seen = plan(fake, monkeypatch, Slots(3, 5.0, 1 / 3))
    assert notes == ["3 trials share a GPU under CUDA MPS: their kernels run at the same time"]
    assert seen == [True]
    assert fake.folders == []


def test_a_failure_is_noted_once_and_the_search_goes_on(fake: FakeMps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MPS", "failing")
    notes, seen = plan(fake, monkeypatch, Slots(3, 5.0, 1 / 3))
    reason = "an instance of this daemon is already running"
    assert notes == [f"CUDA MPS is not used, so trials that share a GPU take turns: {reason}"]
    assert seen == [False]


def test_one_trial_a_gpu_needs_no_mps_and_no_note(fake: FakeMps, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(fake, monkeypatch, Slots(1, 16.0, 1.0)) == ([], [True])


def test_probes_inherit_the_environment(fake: FakeMps) -> None:
    with start_mps(is_wanted=True), Probes({}, fake.folder) as probes:
        environment = Path(f"/proc/{probes._processes[0][0].pid}/environ")
        expected = f"{PIPE_VARIABLE}={os.environ[PIPE_VARIABLE]}"
        wait_until(lambda: expected in environment.read_text().split("\0"))  # Linux fills it in after the start


@pytest.mark.parametrize(("address", "is_started"), [(None, True), ("127.0.0.1:1", False)])
def test_ray_starts_under_mps_and_mps_ends_with_a_search_that_fails(
    address: str | None, is_started: bool, fake: FakeMps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    class FailingCluster:
        def __init__(self, *_: object) -> None:
            seen.append(PIPE_VARIABLE in os.environ)
            raise KeyboardInterrupt

    monkeypatch.setattr("hpo.search.cluster.connection.RayCluster", FailingCluster)
    space = toy_space(tmp_path, resources={"gpu": 0.5})
    with pytest.raises(KeyboardInterrupt):
        run_search(space, storage=f"sqlite:///{tmp_path}/hpo.db", runs_dir=tmp_path / "runs", ray_address=address)
    assert seen == [is_started]
    assert fake.folders == []
    assert PIPE_VARIABLE not in os.environ


@pytest.mark.ray
def test_workers_of_ray_inherit_the_environment(fake: FakeMps) -> None:
    import ray

    from hpo.search.cluster.connection import RayCluster

    with start_mps(is_wanted=True), RayCluster(None) as cluster:
        cluster.start()
        cluster.nodes()

        @ray.remote
        def environment() -> str | None:
            return os.environ.get("CUDA_MPS_PIPE_DIRECTORY")

        assert ray.get(environment.remote()) == os.environ[PIPE_VARIABLE]
    assert fake.folders == []
