"""A Ray that is started on this machine for one search: private, and away from the signals of the driver's process group."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

# It listens on the loopback interface only, as on Windows and macOS, and requires a token, which is in a file in its
# folder. The usual file, ~/.ray/auth_token, may be readable for others. Trials get their own workers, so none is started
# in advance.
_LOCAL_VARIABLES = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_prestart_worker_first_driver": "0",
}
_TOKEN, _TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

OBJECT_STORE_BYTES = 100 * 2**20  # reports are small; the workers read data sets from disk


def local_options(folder: Path) -> dict[str, Any]:
    """Return what `ray.init` gets to start Ray.

    Args:
        folder: private. Ray opens its own folder to all users; nobody else may enter this one.
    """
    options: dict[str, Any] = {"address": "local", "include_dashboard": False, "_temp_dir": f"{folder}/r"}
    options["object_store_memory"] = OBJECT_STORE_BYTES
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores != os.cpu_count():  # Ray counts those, too, that Slurm or taskset keeps from this process
        options["num_cpus"] = cores
    return options


@contextmanager
def private_ray(folder: Path) -> Iterator[None]:
    """Set what keeps other machines, users and signals out of a Ray that is started and stopped in this context.

    A queue or a shell may send SIGTERM to the process group of this process. Ray would die before the trials are saved, so
    its processes get other groups. Linux ends them with their driver in any case. They read the rest from the environment.
    This process may have imported ray before, so it uses private names; pyproject.toml bounds the version of Ray.

    Args:
        folder: private; the token is written to it.
    """
    import ray

    private: Any = ray
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    before = {name: os.environ.pop(name, None) for name in (*_LOCAL_VARIABLES, _TOKEN, _TOKEN_PATH)}
    popen = private._private.services.ConsolePopen  # noqa: SLF001

    def read_environment() -> None:
        private._raylet.Config.initialize("")  # noqa: SLF001
        private._raylet.AuthenticationTokenLoader.instance().reset_cache()  # noqa: SLF001

    try:
        os.environ.update(_LOCAL_VARIABLES, **{_TOKEN_PATH: str(token)})
        private._private.ray_constants.ENABLE_RAY_CLUSTER = False  # noqa: SLF001
        if sys.platform == "linux":
            private._private.services.ConsolePopen = partial(popen, process_group=0)  # noqa: SLF001
        read_environment()
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})
        private._private.ray_constants.ENABLE_RAY_CLUSTER = True  # noqa: SLF001
        private._private.services.ConsolePopen = popen  # noqa: SLF001
        read_environment()


def stop_autoscaler() -> None:
    """Stop Ray's autoscaler: it has nothing to scale on one machine, and `ray.shutdown` would wait a second for it.

    No option of `ray.init` leaves it out, so it uses a private name; pyproject.toml bounds the version of Ray.
    """
    import ray

    node: Any = ray._private.worker._global_node  # noqa: SLF001
    node.kill_monitor(check_alive=False)
