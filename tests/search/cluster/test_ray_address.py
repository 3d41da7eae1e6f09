"""What the user hears about RAY_ADDRESS: Ray's client is replaced by a process that writes what it would write."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpo.errors import SettingError
from hpo.search.cluster import ray_address
from hpo.search.cluster.ray_address import check_address, read_address
from tests.factories import wait_until

REFUSED = "gcs_client.cc:210: Failed to get cluster ID: Unauthenticated: RPC error: InvalidAuthToken"


@pytest.fixture
def address() -> Iterator[str]:
    """Something listens there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def client_writes(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def set_text(text: str) -> None:
        monkeypatch.setattr(ray_address, "_ASK", f"import sys; sys.exit({text!r})")

    return set_text


def test_a_cluster_that_answers_is_fine(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_address, "_ASK", f"import sys; assert sys.argv[1:] == [{address!r}]")
    check_address(address)


def test_a_file_in_the_working_folder_replaces_no_package(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "yaml.py").write_text("raise RuntimeError('replaced')")
    monkeypatch.setattr(ray_address, "_ASK", "import yaml")
    monkeypatch.chdir(tmp_path)
    check_address(address)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (None, None),
        ("", None),
        ("local", None),
        ("auto", "auto"),
        (" head:6379\n", "head:6379"),
        ("[::1]:6379", "[::1]:6379"),
    ],
)
def test_an_address_is_read(text: str | None, address: str | None) -> None:
    assert read_address(text) == address


@pytest.mark.parametrize("text", ["head", ":6379", "head:", "head:0", "head:99999", "head:x", "http://head:8265"])
def test_what_is_no_address_is_refused_with_what_to_use_instead(text: str) -> None:
    with pytest.raises(
        SettingError, match=r"RAY_ADDRESS .* is not the address of a Ray cluster\. .* set it to auto, or"
    ):
        read_address(text)


def test_ray_client_is_refused_with_what_to_use_instead() -> None:
    with pytest.raises(SettingError, match=r"RAY_ADDRESS ray://head:10001: .* set it to auto, or to HOST:PORT"):
        read_address("ray://head:10001")


@pytest.mark.parametrize(
    ("variables", "remedy"),
    [
        ({}, "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"),
        (
            {"RAY_AUTH_TOKEN": "x"},
            "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token",
        ),
        (
            {"RAY_AUTH_MODE": "token"},
            "~/.ray/auth_token does not have it. On the cluster, `ray get-auth-token` prints it",
        ),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}, "RAY_AUTH_TOKEN does not have it"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/a/file"}, "/a/file does not have it"),
    ],
)
def test_a_token_that_is_wrong_or_missing_is_one_message(
    address: str,
    client_writes: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    remedy: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    client_writes(REFUSED)
    with pytest.raises(SettingError) as caught:
        check_address(address)
    assert str(caught.value).startswith(f"the Ray cluster at RAY_ADDRESS {address} requires its token: {remedy}")
    assert "secret" not in str(caught.value)


def test_a_token_file_that_cannot_be_read_is_named(
    address: str, client_writes: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/a/file")
    client_writes("Check failed: RAY_AUTH_TOKEN_PATH is set but file cannot be opened\n*** StackTrace")
    with pytest.raises(SettingError, match="the file /a/file, which RAY_AUTH_TOKEN_PATH names, cannot be read"):
        check_address(address)


@pytest.mark.slow
def test_a_mode_without_a_token_is_one_message(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray's own client says it: a page of its log, whose last line is a line of its stack."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", " ")
    with pytest.raises(SettingError, match=r"^RAY_AUTH_MODE is token, but there is no token: .* missing or empty"):
        check_address(address)


def test_what_is_no_head_of_a_cluster_is_said(address: str, client_writes: Callable[[str], None]) -> None:
    client_writes("ray.exceptions.RpcError: Timed out while waiting for GCS to become available.\n")
    with pytest.raises(SettingError, match="something listens there, but it does not answer as the head of a Ray"):
        check_address(address)


@pytest.mark.parametrize("host", ["gpu..3", ".example", "a" * 80 + ".example"])
def test_a_name_that_no_host_can_have_is_no_answer(host: str) -> None:
    with pytest.raises(SettingError, match="no Ray cluster answers at RAY_ADDRESS"):
        check_address(f"{host}:6379")


def test_another_failure_shows_the_last_line(address: str, client_writes: Callable[[str], None]) -> None:
    client_writes("Traceback:\n\nRuntimeError: version mismatch\n")
    with pytest.raises(SettingError, match=f"no Ray cluster answers at RAY_ADDRESS {address}: RuntimeError: version"):
        check_address(address)


def test_a_cluster_that_accepts_and_says_nothing_is_given_up(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_address, "_ASK", "import time; time.sleep(60)")
    monkeypatch.setattr(ray_address, "CLIENT_SECONDS", 0.5)
    with pytest.raises(SettingError, match=r"timed out after 0.5 s"):
        check_address(address)


def _is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@pytest.mark.slow
@pytest.mark.ray(starts=1)
def test_a_real_cluster_lets_in_who_has_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tempfile.mkdtemp(prefix="hpo-ray-")  # short: Ray's sockets are there
    token = tmp_path / "token"
    token.write_text("ab" * 32)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ray = Path(sys.executable).with_name("ray")
    options = [
        "--head",
        f"--port={port}",
        "--num-cpus=1",
        "--include-dashboard=false",
        "--disable-usage-stats",
        "--block",
    ]
    private = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    head = subprocess.Popen(
        [ray, "start", *options, "--temp-dir", folder],
        env=os.environ | private,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"127.0.0.1:{port}"
        for name, value in private.items():
            monkeypatch.setenv(name, value)
        wait_until(lambda: _is_listening(port))
        check_address(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "cd" * 32)
        with pytest.raises(SettingError, match="RAY_AUTH_TOKEN does not have it"):
            check_address(address)
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "missing"))
        with pytest.raises(SettingError, match="which RAY_AUTH_TOKEN_PATH names, cannot be read"):
            check_address(address)
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
