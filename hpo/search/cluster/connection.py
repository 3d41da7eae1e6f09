"""A Ray cluster, started or joined on a background thread while the driver prepares the search.

Starting Ray takes seconds, most of them spent waiting. The thread that starts Ray also stops it: Linux ends Ray's processes
with the thread that started them (PR_SET_PDEATHSIG), so none of them outlives a driver that is killed.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from hpo.errors import SettingError
from hpo.search.cluster.head import Head
from hpo.search.cluster.nodes import read_nodes
from hpo.search.cluster.private_ray import local_options, private_ray, stop_autoscaler
from hpo.search.cluster.ray_address import check_address, no_answer
from hpo.search.cluster.sigterm import sigterm_kept
from hpo.search.slots import Node

if TYPE_CHECKING:
    from hpo.search.cluster.node_checks import NodeChecks

# Ray reads these when it is imported. Its uv hook would start every worker through `uv run`, its usage report needs a
# network, and this process handles Ctrl-C itself.
os.environ.update(
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_AIR_NEW_OUTPUT="0",
    RAY_CHDIR_TO_TRIAL_DIR="0",
    RAY_DEDUP_LOGS_SKIP_REGEX=".",  # log_to_driver=False still prints "(raylet) A worker died"
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    TUNE_DISABLE_SIGINT_HANDLER="1",
    TUNE_DISABLE_STRICT_METRIC_CHECKING="1",
    TUNE_PRINT_ALL_TRIAL_ERRORS="0",
    TUNE_GLOBAL_CHECKPOINT_S="86400",
    TUNE_MAX_PENDING_TRIALS_PG="100000",  # trials start at the same time; the coordinator claims no more than can run
)

WATCH_SECONDS = 0.5  # between two looks at the processes of a Ray that was started here
GRACE_SECONDS = 2.0  # in which a search may end by itself after Ray has died
LEAVE_SECONDS = 60.0  # how long leaving waits for Ray to start and shut down
INTERRUPT_SECONDS = 0.1  # until a signal that arrived in an import is sent again


class RayCluster:
    """Ray on this machine, or a cluster that was joined. Use it as a context manager; leaving it shuts Ray down.

    Args:
        address: of the cluster to join, see `ray_address.read_address`; None starts Ray on this machine.
        code: a zip file, see `code_package.pack`, that each node unpacks for the workers of this search; None for none.
    """

    def __init__(self, address: str | None, code: bytes | None = None) -> None:
        self._address = address
        self._code = code
        self._thread = threading.Thread(target=self._run_ray, name="hpo-ray", daemon=True)
        self._has_answered = threading.Event()
        self._start_ended = threading.Event()
        self._must_stop = threading.Event()
        self._error: Exception | None = None
        self.checks: NodeChecks | None = None
        self._head: Head | None = None  # of a cluster that was joined
        self._on_death: Callable[[str], int] | None = None
        self._handlers_before: dict[int, Any] = {}
        self._imports_before = 0  # of a caller that runs a search while it is imported

    def __enter__(self) -> RayCluster:
        if threading.current_thread() is threading.main_thread():
            self._imports_before = _count_imports(sys._getframe())  # noqa: SLF001 # documented, of CPython
            self._handlers_before = {
                number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number in self._handlers_before:
            # Ray's C++ code would end the process, with another exit code, if a second Ctrl-C left while Ray starts.
            signal.signal(number, _ignore)
        self.stop()
        # A cluster that does not answer may keep `ray.init` waiting for many minutes; there is nothing to stop then.
        if self._thread.is_alive() and (self._address is None or self._start_ended.is_set()):
            self._thread.join(LEAVE_SECONDS)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt, for SIGTERM too: Ray's processes and folders are removed.

        An import is not interrupted, because Python may keep its lock: then every later import waits forever.
        """
        if _count_imports(frame) > self._imports_before:
            again = threading.Timer(INTERRUPT_SECONDS, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        raise KeyboardInterrupt

    @staticmethod
    def import_ray() -> None:
        """Import ray, which takes half a second. `start` does so if nothing has before."""
        import ray  # noqa: F401

    def start(self) -> None:
        """Start Ray, unless it was started before, and return as soon as Ray's processes are starting."""
        if self._thread.ident is None:
            self.import_ray()  # before the thread starts: other imports would compete with it
            self._thread.start()

    def stop(self) -> None:
        """Begin to shut Ray down, without waiting. Leaving the `with` block waits."""
        if not self._must_stop.is_set():
            # Tune leaves reference cycles with Ray's objects. Freed by this thread while Ray shuts down, they would end the
            # process ("The core worker has already been shutdown").
            gc.collect()
            self._must_stop.set()

    def wait_for_answer(self) -> None:
        """Wait until the cluster to join answers. `start` was called before.

        Raises:
            SettingError: see `ray_address.check_address`.
        """
        self._has_answered.wait()
        if isinstance(self._error, SettingError):
            raise self._error

    def nodes(self) -> list[Node]:
        """Wait until Ray is up, and return its machines.

        Raises:
            SettingError: see `ray_address.check_address`.
            Exception: any other error of starting Ray, unchanged.
        """
        self._start_ended.wait()
        if self._error is not None:
            raise self._error
        return [node for node in read_nodes() if not node.is_drained]

    @property
    def is_shared(self) -> bool:
        """Whether Ray was joined: its machines may come and go."""
        return self._address is not None

    @property
    def answers(self) -> bool:
        """Whether anything may be asked of Ray: the head of a cluster that was joined may be restarted now."""
        return self._head is None or not self._head.is_away

    @contextmanager
    def watched(self, on_death: Callable[[str], int]) -> Iterator[None]:
        """Watch the processes of a Ray that was started here, and the head of a cluster that was joined.

        If one dies, the thread that runs the search waits for it in Ray's C++ code, which ends the process after a minute.
        So another thread saves what can be saved, and ends the process at once.

        Args:
            on_death: gets what has died; does what has to be done before, in the other thread; returns the exit code.
        """
        self._on_death = on_death
        try:
            yield
        finally:
            self._on_death = None

    def _wait_for_death(self) -> str:
        """Wait until Ray is to be stopped, and return an empty text, or until it dies, and the search does not end."""
        while not self._must_stop.wait(WATCH_SECONDS):
            died = self._find_dead()
            if died and self._on_death is not None:
                return "" if self._must_stop.wait(GRACE_SECONDS) else died
        return ""

    def _find_dead(self) -> str:
        import ray

        if self._address is not None:
            return "" if self._head is None else self._head.look()
        node: Any = ray._private.worker._global_node  # noqa: SLF001
        return "Ray's processes have ended" if node is not None and node.dead_processes() else ""

    def check_nodes(self, folder: Path, note: Callable[[str], None]) -> None:
        """Wait until Ray is up, and check that each node can run trials, unless Ray was started here.

        Args:
            folder: for the checkpoints of all studies.
            note: receives what is to be said of nodes that join later.

        Raises:
            SettingError: see `NodeChecks.check_all` and `ray_address.check_address`.
            Exception: any other error of starting Ray, unchanged.
        """
        if self._address is None:
            return
        self.nodes()
        from hpo.search.cluster.node_checks import NodeChecks

        self.checks = NodeChecks(folder, note)
        self.checks.check_all()

    def _run_ray(self) -> None:
        import ray

        logging.getLogger("ray").setLevel(logging.CRITICAL)
        constants: Any = ray._private.ray_constants  # noqa: SLF001
        constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False  # the program may have imported ray before this module
        with (
            tempfile.TemporaryDirectory(prefix="hpo-ray-", ignore_cleanup_errors=True) as scratch,
            private_ray(Path(scratch)) if self._address is None else nullcontext(),
        ):
            try:
                folder = Path(scratch)
                options = local_options(folder) if self._address is None else self._options(self._address, folder)
                self._has_answered.set()
                job: Any = _without_driver_paths()
                with sigterm_kept():
                    ray.init(job_config=job, logging_level=logging.CRITICAL, log_to_driver=False, **options)
                if self._address is None:
                    stop_autoscaler()
                else:
                    self._head = _watch_head()
            except ConnectionError as error:
                self._error = no_answer(self._address, error)
            except Exception as error:  # noqa: BLE001 # raised again in the thread that waits for Ray
                self._error = _explain(error)
            self._has_answered.set()
            self._start_ended.set()
            died = self._wait_for_death()
            code = self._on_death(died) if died and self._on_death is not None else None
            if self._head is not None:
                self._head.close()
            if code is None:
                with sigterm_kept():
                    ray.shutdown()
        if code is not None:
            os._exit(code)  # Ray's other processes end with this one

    def _options(self, address: str, folder: Path) -> dict[str, Any]:
        """Return what `ray.init` gets to join a cluster that answers. The code for its nodes is written to a folder."""
        options: dict[str, Any] = {"address": _find(address)}
        check_address(options["address"])
        if self._code is not None and not _has_working_dir():
            package = folder / "code.zip"
            package.write_bytes(self._code)
            options["runtime_env"] = {"working_dir": str(package)}
        return options


def _watch_head() -> Head:
    """Return what looks after the head of the cluster that this process has joined."""
    import ray
    from ray._common.usage.usage_lib import get_extra_usage_tags_to_report

    # No public function names the cluster, or what keeps the state of its head; pyproject.toml bounds the version of Ray.
    raylet: Any = ray._raylet  # noqa: SLF001
    context = ray.get_runtime_context()
    (node,) = (each for each in ray.nodes() if each["NodeID"] == context.get_node_id())
    host, _, port = context.gcs_address.rpartition(":")
    client = raylet.GcsClient(address=context.gcs_address)
    return Head(
        (host.strip("[]"), int(port)),
        (node["NodeManagerAddress"], node["NodeManagerPort"]),
        lambda: raylet.GcsClient(address=context.gcs_address).cluster_id,
        is_durable=get_extra_usage_tags_to_report(client).get("gcs_storage") in {"redis", "rocksdb"},
    )


def _find(address: str) -> str:
    """Return HOST:PORT of a cluster. Of `auto`, Ray knows the last one here, which may have ended long ago.

    Raises:
        ConnectionError: it knows none.
    """
    if address != "auto":
        return address
    import ray

    services: Any = ray._private.services  # noqa: SLF001 # no public function says it; pyproject.toml bounds ray
    return str(services.canonicalize_bootstrap_address(address))


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing. Processes that are started inherit SIG_IGN, but not this handler."""


def _explain(error: Exception) -> Exception:
    """Return what the user can change about an error of joining a cluster; the error itself if that is unknown."""
    if "Version mismatch" in str(error):
        lines = " ".join(str(error).split())
        return SettingError(f"{lines}. Install the cluster's versions of Ray and Python here, or this machine's there")
    if "Failed to upload" in str(error):
        return SettingError(f"the code of the search cannot be sent to the Ray cluster: {error}")
    return error


def _has_working_dir() -> bool:
    """Return whether this process is a Ray job that brought a folder with it, by `ray job submit --working-dir`."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return bool((job.get("runtime_env") or {}).get("working_dir"))


class _NoPaths(list[str]):
    """Stays empty."""

    def extend(self, _: Iterable[str]) -> None:
        pass


def _without_driver_paths() -> Any:
    """Return the configuration of a job whose workers do not put the driver's folders first on their path.

    A file there, such as pandas.py, would replace a package. No option of Ray leaves them out, so it uses a private name.
    """
    import ray

    job: Any = ray.job_config.JobConfig()
    job._py_driver_sys_path = _NoPaths()  # noqa: SLF001
    return job


def _count_imports(frame: FrameType | None) -> int:
    """Return how many frames of Python's import system are on the stack of a frame."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return count
