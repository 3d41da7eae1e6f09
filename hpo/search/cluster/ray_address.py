"""Whether a Ray cluster answers at RAY_ADDRESS, and lets this user in. Does not import ray.

Ray itself would retry for up to many minutes, and write a line of its log for each attempt.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from hpo.errors import SettingError

CONNECT_SECONDS = 10.0  # how long a cluster may take to answer
CLIENT_SECONDS = 60.0  # how long a process may take that imports ray and asks the cluster
# In a process that may be ended: no public function of Ray asks a cluster once. pyproject.toml bounds the version of Ray.
_ASK = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"


def read_address(text: str | None) -> str | None:
    """Return the cluster that RAY_ADDRESS names: `auto` or HOST:PORT; None for a Ray on this machine.

    Raises:
        SettingError: it is no such address.
    """
    address = (text or "").strip()
    if address in {"", "local"}:
        return None
    expected = (
        "On a machine of the cluster, set it to auto, or to HOST:PORT as `ray start --head` prints it, usually with port "
        "6379. Unset it to run Ray on this machine"
    )
    if address.startswith("ray://"):
        raise SettingError(f"RAY_ADDRESS {address}: Ray Client cannot run a search. {expected}")
    host, _, port = address.rpartition(":")
    is_port = port.isascii() and port.isdigit() and 0 < int(port) < 2**16
    if address != "auto" and not (host and is_port and "/" not in host):
        raise SettingError(f"RAY_ADDRESS {address} is not the address of a Ray cluster. {expected}")
    return address


def check_address(address: str) -> None:
    """Return if a cluster answers.

    Args:
        address: HOST:PORT.

    Raises:
        SettingError: no cluster answers there, or it refuses this user's token.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: a name such as `gpu..3`, which no host can have
        raise no_answer(address, error) from None
    try:
        asked = subprocess.run(
            [sys.executable, "-P", "-c", _ASK, address],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CLIENT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise no_answer(address, f"timed out after {CLIENT_SECONDS:g} s") from None
    if asked.returncode != 0:
        raise _refusal(address, asked.stderr)


def no_answer(address: str | None, reason: object) -> SettingError:
    """Return the error of a cluster that does not answer."""
    return SettingError(
        f"no Ray cluster answers at RAY_ADDRESS {address}: {reason}. Start one with `ray start --head`, or unset RAY_ADDRESS"
    )


def _refusal(address: str, log: str) -> SettingError:
    """Return the error of a cluster that did not answer well.

    Args:
        address: of the cluster.
        log: what Ray has written.
    """
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if "RAY_AUTH_TOKEN_PATH is set but" in log:
        return SettingError(f"the file {path}, which RAY_AUTH_TOKEN_PATH names, cannot be read or is empty")
    if "couldn't find an authentication token" in log:
        return SettingError(
            "RAY_AUTH_MODE is token, but there is no token: RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, and "
            "~/.ray/auth_token are missing or empty. On the cluster, `ray get-auth-token` prints it. Unset RAY_AUTH_MODE if "
            "the cluster requires none"
        )
    if "Timed out while waiting for GCS" in log:
        return no_answer(address, "something listens there, but it does not answer as the head of a Ray cluster does")
    if "Unauthenticated" not in log:
        lines = [line for line in log.splitlines() if line.strip()]
        return no_answer(address, lines[-1].strip() if lines else "Ray's client failed without a message")
    source = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else path or "~/.ray/auth_token"
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        remedy = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
    else:
        remedy = f"{source} does not have it. On the cluster, `ray get-auth-token` prints it"
    return SettingError(f"the Ray cluster at RAY_ADDRESS {address} requires its token: {remedy}")
