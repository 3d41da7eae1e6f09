"""How `on_finish` is notified: a command, and a server that answers, refuses, redirects or hangs."""

from __future__ import annotations

import base64
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hpo import delivery
from hpo.delivery import deliver
from tests.factories import is_running, wait_until

ENDING: dict[str, Any] = {
    "study": "grid",
    "revision": 2,
    "storage": "sqlite:///runs/hpo.db",
    "state": "stopped",
    "cause": "interrupted",
    "exit_code": 130,
    "best": {"trial": 1, "value": 0.5},
    "report": None,
    "text": "grid@2 stopped",
}


class Server(ThreadingHTTPServer):
    """Records POSTs. The path is the status of the answer; `/slow` sends an endless one."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.received: list[tuple[str, Any, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, self.headers, json.loads(body)))
        if self.path == "/slow":
            self.send_response_only(200)
            self.end_headers_slowly()
            return
        self.send_response(int(self.path.strip("/")))
        self.send_header("Location", f"{self.server.url}/200")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def end_headers_slowly(self) -> None:
        """Each byte is in time; the answer never ends."""
        self.flush_headers()
        while True:
            try:
                self.wfile.write(b"X")
            except OSError:
                return
            time.sleep(0.05)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_url_gets_a_post_of_json(server: Server) -> None:
    url = server.url.replace("//", "//me:s%40cret@")
    assert deliver(f"{url}/204", ENDING) == ""
    ((path, headers, body),) = server.received
    assert (path, body, headers["Content-Type"]) == ("/204", ENDING, "application/json")
    assert headers["Authorization"] == f"Basic {base64.b64encode(b'me:s@cret').decode()}"


@pytest.mark.parametrize(("status", "problem"), [(500, "status 500"), (404, "status 404")])
def test_another_status_than_success_is_a_problem(server: Server, status: int, problem: str) -> None:
    assert deliver(f"{server.url}/{status}", ENDING) == problem


@pytest.mark.parametrize("status", [301, 302, 307])
def test_a_redirect_is_not_followed(server: Server, status: int) -> None:
    assert "a redirect, which is not followed" in deliver(f"{server.url}/{status}", ENDING)
    assert len(server.received) == 1


def test_a_server_that_is_not_there_is_a_problem(server: Server) -> None:
    server.shutdown()
    server.server_close()
    assert deliver(f"{server.url}/secret", ENDING) == "Connection refused"


def test_an_answer_that_does_not_end_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "DELIVERY_SECONDS", 0.3)
    started = time.monotonic()
    assert deliver(f"{server.url}/slow", ENDING) == "no answer within 0.3 s"
    assert time.monotonic() < started + 3


def test_a_command_gets_json_and_variables(tmp_path: Path) -> None:
    file = tmp_path / "got"
    variables = "$HPO_STUDY@$HPO_REVISION $HPO_STATE $HPO_EXIT_CODE $HPO_BEST_VALUE [$HPO_REPORT] $HPO_CAUSE"
    assert deliver(["sh", "-c", f'(cat; echo; echo "{variables}") > {file}'], ENDING) == ""
    got, line = file.read_text().splitlines()
    assert json.loads(got) == ENDING
    assert line == "grid@2 stopped 130 0.5 [] interrupted"


def test_a_command_need_not_read_its_input() -> None:
    assert deliver("true", ENDING | {"text": "x" * 200_000} | {"cause": ""}) in {
        "",
        "cannot be run: Argument list too long",
    }


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("false", "exit code 1"),
        ("sh -c 'kill -9 $$'", "killed by SIGKILL"),
        ("no-such-program", "cannot be run: No such file or directory"),
        ([sys.executable + "\0"], "cannot be run: embedded null byte"),
    ],
)
def test_a_command_that_fails_is_a_problem(command: Any, problem: str) -> None:
    assert deliver(command, ENDING) == problem


def test_a_command_that_takes_too_long_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "DELIVERY_SECONDS", 0.5)
    file = tmp_path / "pid"
    assert deliver(["sh", "-c", f"sleep 600 & echo $! > {file}; wait"], ENDING).startswith(
        "killed, because it took longer"
    )
    pid = int(file.read_text())
    wait_until(lambda: not is_running(pid), 10)
