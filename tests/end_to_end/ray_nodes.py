"""A Ray cluster of several nodes on this machine, as `ray start` makes one. Nodes join, leave, and are drained."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.end_to_end.processes import environment
from tests.factories import wait_until

RAY = str(Path(sys.executable).with_name("ray"))
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
JOIN_SECONDS = 120.0  # on two slow cores


class RayNodes:
    """Starts a head node without cores, and nodes that run trials. A context manager: leaving it ends all of them.

    Args:
        folder: for the logs.
        most: how many nodes with one core Ray's autoscaler may add; None for a cluster without one.

    Attributes:
        address: of the head, for RAY_ADDRESS.
        variables: {name: value} that a driver needs to be let in.
    """

    def __init__(self, folder: Path, *, most: int | None = None) -> None:
        self._folder = folder
        self._session = tempfile.mkdtemp(prefix="hpo-ray-")  # short: Ray's sockets are there
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.address = f"127.0.0.1:{found.getsockname()[1]}"
        self.variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

        self._autoscaling = []
        if most is not None:
            config = folder / "autoscaling.yaml"
            config.write_text(json.dumps(autoscaling_config(self.address, most)))  # JSON is YAML
            self._autoscaling = [f"--autoscaling-config={config}"]
            self.variables |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}

    def __enter__(self) -> RayNodes:
        port = self.address.rpartition(":")[2]
        head = ["--head", f"--port={port}", "--num-cpus=0", *self._autoscaling]
        try:
            self._start("head", *head)
            wait_until(lambda: self._count() == 1, JOIN_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                command = " ".join(process.cmdline())
                if self._session in command or self.address in command:
                    process.kill()
        for started in self._processes.values():
            started.wait()
        shutil.rmtree(self._session, ignore_errors=True)

    def add(self, name: str, *, cores: int = 1, gpus: int = 0, gpu_kind: str = "") -> None:
        """Add a node, and wait until it has joined."""
        count = self._count()
        kind = [f"--resources={json.dumps({f'accelerator_type:{gpu_kind}': 1})}"] if gpu_kind else []
        self._start(name, f"--address={self.address}", f"--num-cpus={cores}", f"--num-gpus={gpus}", *kind)
        wait_until(lambda: self._count() > count, JOIN_SECONDS)

    def terminate(self, name: str) -> None:
        """Send SIGTERM to a node, as an operator does: it is drained."""
        self._processes[name].terminate()

    def has_ended(self, name: str) -> bool:
        """Return whether a node has ended."""
        return self._processes[name].poll() is not None

    def kill(self, name: str) -> None:
        """Send SIGKILL to all processes of a node, as when its machine loses power."""
        root = psutil.Process(self._processes[name].pid)
        for process in [*root.children(recursive=True), root]:
            with suppress(psutil.Error):
                process.kill()
        self._processes[name].wait()

    def _start(self, name: str, *options: str) -> None:
        with (self._folder / f"{name}.log").open("w") as log:
            self._processes[name] = subprocess.Popen(
                # In one folder, a node that joins would unpack the code of the search anew, under the trials of the others.
                [
                    *(RAY, "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"),
                    f"--temp-dir={self._session}/{name}",
                    *options,
                ],
                cwd=self._folder,
                env=environment(**self.variables),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _count(self) -> int:
        """Return how many nodes have joined."""
        status = subprocess.run(
            [RAY, "status", f"--address={self.address}"],
            env=environment(**self.variables),
            capture_output=True,
            text=True,
            check=False,
        )
        active = status.stdout.partition("Active:")[2].partition("Pending:")[0]
        return sum(map(int, re.findall(r"^ *(\d+) \w+", active, re.MULTILINE)))


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
