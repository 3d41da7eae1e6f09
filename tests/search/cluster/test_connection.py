"""Starting, joining and stopping a cluster. Ray is replaced: the end-to-end tests start it."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpo.errors import SettingError
from hpo.search.cluster.connection import RayCluster
from hpo.search.cluster.ray_address import check_address
from hpo.search.slots import Node
from tests.factories import wait_until

FOUND = "10.0.0.1:6379"  # what Ray finds for RAY_ADDRESS auto: it answers


class FakeRay(SimpleNamespace):
    """Stands in for the module `ray`, and keeps the calls."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []
        self.threads: set[threading.Thread] = set()
        self._error = error
        self.dead: list[str] = []  # of Ray's processes
        self.on_call: Callable[[], Any] = lambda: None
        node = SimpleNamespace(
            kill_monitor=lambda check_alive: self.calls.append(("kill_monitor", None)),
            dead_processes=lambda: self.dead,
        )
        self.environment: dict[str, str] = {}  # of Ray's processes
        constants = SimpleNamespace(ENABLE_RAY_CLUSTER=True, RAY_ENABLE_UV_RUN_RUNTIME_ENV=True)
        state = SimpleNamespace(state=SimpleNamespace(get_draining_nodes=lambda: {"b": 0}))
        self._private = SimpleNamespace(
            worker=SimpleNamespace(_global_node=node),
            ray_constants=constants,
            state=state,
            services=SimpleNamespace(
                ConsolePopen=subprocess.Popen, canonicalize_bootstrap_address={"auto": FOUND}.__getitem__
            ),
        )
        loader = SimpleNamespace(instance=lambda: SimpleNamespace(reset_cache=lambda: None))
        self._raylet = SimpleNamespace(
            Config=SimpleNamespace(initialize=lambda _: None), AuthenticationTokenLoader=loader
        )
        self.job_config = SimpleNamespace(JobConfig=SimpleNamespace)

    def init(self, **options: Any) -> None:
        self.on_call()
        self.calls.append(("init", options["address"]))
        self.num_cpus = options.get("num_cpus")
        working_dir = options.get("runtime_env", {}).get("working_dir")
        self.sent = None if working_dir is None else (Path(working_dir).suffix, Path(working_dir).read_bytes())
        options["job_config"]._py_driver_sys_path.extend(["/the/working/folder"])
        assert options["job_config"]._py_driver_sys_path == []
        self.environment = dict(os.environ)
        assert not self._private.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV, "workers would be started by `uv run`"
        self.threads.add(threading.current_thread())
        if self._error is not None:
            raise self._error

    def nodes(self) -> list[dict[str, Any]]:
        place = {"NodeManagerAddress": "10.0.0.1", "NodeManagerPort": 7, "NodeManagerHostname": "host"}
        alive = {"NodeID": "a", "Alive": True, "Resources": {"CPU": 6.0, "memory": 1e9}} | place
        leaving = {"NodeID": "b", "Alive": True, "Resources": {"CPU": 4.0}} | place
        return [alive, leaving, {"NodeID": "c", "Alive": False, "Resources": {}}]

    def shutdown(self) -> None:
        self.on_call()
        self.calls.append(("shutdown", None))
        self.threads.add(threading.current_thread())


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


@pytest.fixture(autouse=True)
def found_cluster_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(address: str) -> None:
        if address != FOUND:
            check_address(address)

    monkeypatch.setattr("hpo.search.cluster.connection.check_address", check)
    monkeypatch.setattr("hpo.search.cluster.connection._watch_head", FakeHead)


class FakeHead:
    """The head of a cluster that was joined."""

    died = ""
    is_away = False

    def look(self) -> str:
        return self.died

    def close(self) -> None:
        pass


def test_the_last_cluster_on_this_machine_may_have_ended(fake_ray: FakeRay) -> None:
    """Ray would try for minutes to reach it, and write a line of its log for each attempt."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ended = f"127.0.0.1:{server.getsockname()[1]}"
    fake_ray._private.services.canonicalize_bootstrap_address = {"auto": ended}.__getitem__
    with RayCluster("auto") as cluster:
        cluster.start()
        with pytest.raises(SettingError, match=f"no Ray cluster answers at RAY_ADDRESS {ended}: .*refused"):
            cluster.wait_for_answer()
    assert ("init", ended) not in fake_ray.calls


@pytest.mark.parametrize(
    ("address", "start_calls"),
    [
        (None, [("init", "local"), ("kill_monitor", None)]),
        ("auto", [("init", FOUND)]),  # the autoscaler of a cluster belongs to its owner
    ],
)
def test_a_cluster_is_started_once_and_stopped_once_by_the_same_thread(
    fake_ray: FakeRay, address: str | None, start_calls: list[tuple[str, str | None]]
) -> None:
    with RayCluster(address) as cluster:
        for _ in range(2):
            cluster.start()
        assert cluster.nodes() == [Node(6.0, id="a", name="host (10.0.0.1, a)", address=("10.0.0.1", 7))]
        assert fake_ray.calls == start_calls
        for _ in range(2):
            cluster.stop()
    assert fake_ray.calls == [*start_calls, ("shutdown", None)]
    (thread,) = fake_ray.threads
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_a_ray_of_our_own_is_private_and_a_joined_one_is_as_it_is(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the user's")
    for address, mode, loopback in ((None, "token", "0"), ("auto", "disabled", None)):
        with RayCluster(address) as cluster:
            cluster.start()
            cluster.nodes()
            assert fake_ray.environment["RAY_AUTH_MODE"] == mode
            assert fake_ray.environment.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == loopback
            assert fake_ray.environment.get("RAY_AUTH_TOKEN") == (None if address is None else "the user's")
            if address is None:
                token = Path(fake_ray.environment["RAY_AUTH_TOKEN_PATH"])
                assert token.stat().st_mode & 0o777 == 0o600
                assert token.parent.stat().st_mode & 0o777 == 0o700
                assert len(token.read_text()) == 64
            assert fake_ray._private.ray_constants.ENABLE_RAY_CLUSTER is (address is not None)
        assert os.environ["RAY_AUTH_MODE"] == "disabled"
        assert os.environ["RAY_AUTH_TOKEN"] == "the user's"
        assert {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_TOKEN_PATH"}.isdisjoint(os.environ)


@pytest.mark.parametrize(("allowed", "address", "told"), [(2, None, 2), (6, None, None), (2, "localhost:1", None)])
def test_a_ray_of_our_own_has_the_cores_that_this_process_may_use(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch, allowed: int, address: str | None, told: int | None
) -> None:
    """A queue such as Slurm gives a job some of the cores of a machine."""
    monkeypatch.setattr("hpo.search.cluster.connection.check_address", lambda _: None)
    monkeypatch.setattr("hpo.search.cluster.connection.os.sched_getaffinity", lambda _: set(range(allowed)))
    monkeypatch.setattr("hpo.search.cluster.connection.os.cpu_count", lambda: 6)
    with RayCluster(address) as cluster:
        cluster.start()
        cluster.nodes()
    assert fake_ray.num_cpus == told


@pytest.mark.parametrize("address", [None, "auto"])
def test_when_ray_dies_the_process_ends_after_what_must_be_done_before(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    ended: list[int] = []
    reasons: list[str] = []

    def die(reason: str) -> int:
        reasons.append(reason)
        return 130

    for name in ("WATCH_SECONDS", "GRACE_SECONDS"):
        monkeypatch.setattr(f"hpo.search.cluster.connection.{name}", 0.01)
    monkeypatch.setattr("hpo.search.cluster.connection.os._exit", ended.append)
    with RayCluster(address) as cluster:
        cluster.start()
        cluster.nodes()
        fake_ray.dead = ["gcs_server"]
        time.sleep(0.1)
        assert ended == [], "no search runs"
        with cluster.watched(die):
            if address is None:
                wait_until(lambda: ended == [130])
            else:
                time.sleep(0.1)  # its processes belong to its owner
                assert ended == []
                monkeypatch.setattr(FakeHead, "died", "the head has ended")
                wait_until(lambda: ended == [130])
    assert reasons == ["Ray's processes have ended" if address is None else "the head has ended"]


def test_nothing_is_asked_of_a_head_that_is_away(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    with RayCluster("auto") as cluster:
        assert cluster.answers
        cluster.start()
        cluster.nodes()
        assert cluster.answers
        monkeypatch.setattr(FakeHead, "is_away", True)
        assert not cluster.answers


def test_a_search_that_ends_by_itself_after_ray_has_died_is_left_alone(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr("hpo.search.cluster.connection.WATCH_SECONDS", 0.01)
    monkeypatch.setattr("hpo.search.cluster.connection.os._exit", ended.append)
    with RayCluster(None) as cluster:
        cluster.start()
        cluster.nodes()
        with cluster.watched(lambda _: 130):
            fake_ray.dead = ["raylet"]
            time.sleep(0.1)
    assert (ended, fake_ray.calls[-1]) == ([], ("shutdown", None))


@pytest.mark.parametrize(
    ("address", "job", "is_sent"),
    [
        ("auto", None, True),
        ("auto", {"runtime_env": {"env_vars": {"A": "b"}}}, True),
        ("auto", {"runtime_env": None}, True),
        ("auto", {"runtime_env": {"working_dir": "gcs://x.zip"}}, False),  # `ray job submit --working-dir`
        (None, None, False),
    ],
)
def test_code_is_sent_to_a_cluster_that_has_not_got_it(
    fake_ray: FakeRay,
    monkeypatch: pytest.MonkeyPatch,
    address: str | None,
    job: dict[str, Any] | None,
    is_sent: bool,
) -> None:
    if job is not None:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    with RayCluster(address, b"a zip file") as cluster:
        cluster.start()
        cluster.nodes()
    assert fake_ray.sent == ((".zip", b"a zip file") if is_sent else None)


def test_without_code_nothing_is_sent(fake_ray: FakeRay) -> None:
    with RayCluster("auto") as cluster:
        cluster.start()
        cluster.nodes()
    assert fake_ray.sent is None


def test_a_ray_of_our_own_has_no_nodes_to_check(fake_ray: FakeRay, tmp_path: Path) -> None:
    with RayCluster(None) as cluster:
        cluster.start()
        cluster.check_nodes(tmp_path, lambda _: None)
        assert cluster.checks is None


def test_leaving_the_context_stops_the_cluster_even_after_an_error(fake_ray: FakeRay) -> None:
    def fail() -> None:
        with RayCluster(None) as cluster:
            cluster.start()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [name for name, _ in fake_ray.calls] == ["init", "kill_monitor", "shutdown"]


def test_a_cluster_that_was_never_started_needs_no_ray(fake_ray: FakeRay) -> None:
    with RayCluster(None):
        pass
    assert fake_ray.calls == []


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            ConnectionError("timed out"),
            SettingError,
            "no Ray cluster answers at RAY_ADDRESS auto: timed out. Start one with `ray start --head`, or unset RAY_ADDRESS",
        ),
        (ValueError("no such option"), ValueError, "no such option"),
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n"),
            SettingError,
            "Version mismatch: The cluster was started with: Ray: 2.9.0. Install the cluster's versions of Ray and Python "
            "here, or this machine's there",
        ),
        (
            Exception("Failed to upload package code.zip to the Ray cluster: no room"),
            SettingError,
            "the code of the search cannot be sent to the Ray cluster: Failed to upload package code.zip to the Ray "
            "cluster: no room",
        ),
    ],
)
def test_an_error_of_ray_is_raised_where_the_size_is_needed(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
) -> None:
    fake = FakeRay(error)
    monkeypatch.setitem(sys.modules, "ray", fake)
    with RayCluster("auto") as cluster:
        cluster.start()
        with pytest.raises(kind) as caught:
            cluster.nodes()
    assert str(caught.value) == message
    assert [name for name, _ in fake.calls] == ["init", "shutdown"]


def test_an_address_where_nothing_listens_is_reported_at_once(fake_ray: FakeRay) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with RayCluster(f"127.0.0.1:{port}") as cluster:
        cluster.start()
        for wait in (cluster.wait_for_answer, cluster.nodes):
            with pytest.raises(SettingError, match=f"RAY_ADDRESS 127.0.0.1:{port}: .*Connection refused. Start one"):
                wait()
    assert [name for name, _ in fake_ray.calls] == ["shutdown"]


def test_an_interrupt_does_not_wait_for_a_cluster_that_does_not_answer(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(fake_ray, "init", lambda **_: answers.wait(60))

    def be_interrupted() -> None:
        with RayCluster("auto") as cluster:
            cluster.start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        be_interrupted()
    assert not answers.is_set()
    answers.set()
    wait_until(lambda: ("shutdown", None) in fake_ray.calls)


def test_a_second_interrupt_does_not_leave_while_ray_starts(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, started = threading.Event(), threading.Event()

    def start(**_: object) -> None:
        starts.set()
        time.sleep(0.4)
        started.set()

    monkeypatch.setattr(fake_ray, "init", start)
    again = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))

    def search() -> None:
        with RayCluster(None) as cluster:
            cluster.start()
            starts.wait()
            again.start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search()
    assert started.is_set()
    assert ("shutdown", None) in fake_ray.calls


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_an_interrupt_until_the_cluster_is_left(fake_ray: FakeRay, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), RayCluster(None):
        signal.raise_signal(number)
    assert signal.getsignal(number) == before


IMPORTED = """
import signal, time
signal.raise_signal(signal.SIGTERM)
time.sleep(0.3)
is_done = True
"""


def test_an_import_is_finished_before_the_interrupt(
    fake_ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported_in_a_test.py").write_text(IMPORTED)
    monkeypatch.syspath_prepend(tmp_path)

    def search() -> None:
        with RayCluster(None):
            assert importlib.import_module("imported_in_a_test").is_done
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        search()


SEARCHING = """
import signal
from hpo.search.cluster.connection import RayCluster
from hpo.search.cluster.ray_address import check_address
from hpo.search.slots import Node
try:
    with RayCluster(None):
        signal.raise_signal(signal.SIGTERM)
except KeyboardInterrupt:
    is_interrupted = True
"""


def test_a_script_that_is_imported_can_be_interrupted(
    fake_ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "searching_in_a_test.py").write_text(SEARCHING)
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.import_module("searching_in_a_test").is_interrupted


def test_ray_does_not_replace_what_sigterm_does(fake_ray: FakeRay) -> None:
    read, replace = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
    read.restype = ctypes.c_void_p
    fake_ray.on_call = lambda: replace(int(signal.SIGTERM), None)
    with RayCluster(None) as cluster:
        before = read(int(signal.SIGTERM))
        assert before is not None
        cluster.start()
        cluster.nodes()
        assert read(int(signal.SIGTERM)) == before
        cluster.stop()
        wait_until(lambda: not cluster._thread.is_alive())
        assert read(int(signal.SIGTERM)) == before


@pytest.mark.slow
@pytest.mark.ray(starts=1)
def test_sigterm_is_an_interrupt_once_ray_is_up_and_after_it_has_ended(tmp_path: Path) -> None:
    program = """
import os, signal
from hpo.search.cluster.connection import RayCluster

def interrupt():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    except KeyboardInterrupt:
        print("interrupted")

with RayCluster(None) as cluster:
    cluster.start()
    cluster.nodes()
    interrupt()
    cluster.stop()
    cluster._thread.join()
    interrupt()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\ninterrupted\n", "")
