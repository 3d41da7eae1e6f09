"""A Ray cluster of several nodes on this machine, as `ray start` makes one. Nodes join, leave, and are drained.

Each node has its own home, working folder and temporary folder.
"""

from __future__ import annotations

import json
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.end_to_end.processes import environment
from tests.factories import ROOT, wait_until

RAY = str(Path(sys.executable).with_name("ray"))
JOIN_SECONDS = 120.0  # on two slow cores
HEAD = "head"
UNUSED_LISTS = (  # that the autoscaler requires
    "cluster_synced_files",
    "rsync_exclude",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


class RayNodes:
    """Starts a head node; `add` starts others. A context manager: leaving it ends all of them.

    Args:
        cores: of the head.
        most: how many nodes with one core Ray's autoscaler may add; None for a cluster without one.

    Attributes:
        folder: has what each node writes.
        variables: {name: value} with which a driver joins.
    """

    def __init__(self, *, cores: int = 0, most: int | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hpo-c-"))  # short: Ray's sockets are there
        with socket.create_server(("127.0.0.1", 0)) as found:
            self._port = found.getsockname()[1]
        self._address = f"127.0.0.1:{self._port}"
        self._cores = cores
        self._most = most
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.variables = {
            "RAY_ADDRESS": self._address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }

    def __enter__(self) -> RayNodes:
        options, variables = [f"--port={self._port}", "--include-dashboard=false"], {}
        if self._most is not None:
            config = self.folder / "autoscaling.yaml"
            config.write_text(json.dumps(autoscaling_config(self._address, self._most)))  # JSON is YAML
            options.append(f"--autoscaling-config={config}")
            variables = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        else:
            options.append("--node-ip-address=127.0.0.1")
        try:
            self._start(HEAD, "--head", f"--num-cpus={self._cores}", *options, **variables)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._kill(f"{self.folder}/", self._address)
        for started in self._processes.values():
            started.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(
        self,
        name: str,
        *,
        cores: int = 1,
        gpus: int = 0,
        gpu_kind: str = "",
        path: Path = ROOT,
        shell: Sequence[str] = (),
    ) -> None:
        """Start a node, and wait until it has joined.

        Args:
            name: of the node: its folders are called so.
            cores: that it has.
            gpus: that it says it has.
            gpu_kind: of the GPUs.
            path: of Python, where hpo is.
            shell: a command that gets `ray start` as its last argument, after a limit of open files, as in KubeRay.
        """
        kind = [f"--resources={json.dumps({f'accelerator_type:{gpu_kind}': 1})}"] if gpu_kind else []
        options = [f"--address={self._address}", "--node-ip-address=127.0.0.1", f"--num-cpus={cores}", *kind]
        self._start(name, *options, f"--num-gpus={gpus}", shell=shell, PYTHONPATH=str(path))

    def home(self, name: str) -> Path:
        """Return the home of a node."""
        return self.folder / "home" / name

    def terminate(self, name: str) -> None:
        """Send SIGTERM to a node, as an operator does: it is drained."""
        self._processes[name].terminate()

    def has_ended(self, name: str) -> bool:
        """Return whether a node has ended."""
        return self._processes[name].poll() is not None

    def kill(self, name: str) -> None:
        """Send SIGKILL to all processes of a node, as when its machine loses power."""
        self._kill(f"{self.folder / name}/", f"{self.folder / name} ")
        self._processes[name].wait()

    def _start(self, name: str, *options: str, shell: Sequence[str] = (), **variables: str) -> None:
        working = self.folder / "cwd" / name
        for folder in (self.home(name), working):
            folder.mkdir(parents=True)
        log = self.folder / f"{name}.log"
        command = [RAY, "start", "--block", "--disable-usage-stats", "--object-store-memory=100000000"]
        command += [f"--temp-dir={self.folder / name}", *options]
        if shell:
            command = [*shell, f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {shlex.join(command)} "]
        with log.open("w") as file:
            self._processes[name] = subprocess.Popen(
                command,
                cwd=working,
                env=environment(HOME=str(self.home(name)), **self.variables, **variables),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        wait_until(lambda: "Ray runtime started." in log.read_text(), JOIN_SECONDS)

    @staticmethod
    def _kill(*marks: str) -> None:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if any(mark in f"{' '.join(process.cmdline())} " for mark in marks):
                    process.kill()


def autoscaling_config(gcs: str, most: int) -> dict[str, Any]:
    """Return the configuration of Ray's autoscaler that adds nodes with one core each, as processes of this machine."""
    return {
        "cluster_name": "nodes",
        "max_workers": most,
        "idle_timeout_minutes": 1,
        "upscaling_speed": most,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "gcs_address": gcs,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": most},
        },
        "head_node_type": "ray.head.default",
        "file_mounts_sync_continuously": False,
        "auth": {},
        "file_mounts": {},
        **{name: [] for name in UNUSED_LISTS},
    }
