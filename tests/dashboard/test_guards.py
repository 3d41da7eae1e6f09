"""The requests that the guards pass on to the application. The application here only records them."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hpo.dashboard import access, guards, server
from hpo.dashboard.access import Access, is_loopback
from hpo.dashboard.guards import LOOPBACK_HOSTS, protect
from tests.dashboard.builders import PASSWORD, basic_auth, request, serving

TOKEN = "a-token-of-the-link"
SCRIPT = b"<script>fetch('/api/studies/1', {method: 'DELETE'})</script>"
CONTENT = {
    "/api/studies": ("application/json", b'{"name": "search"}' * 1000),
    "/artifacts/1/1": ("application/octet-stream", bytes(20_000)),
    "/artifacts/1/2": ("text/html", SCRIPT),
    "//artifacts/1/2": ("text/html; charset=utf-8", SCRIPT),
    "/artifacts/1/3": ("image/svg+xml", SCRIPT),
    "/artifacts/1/4": ("image/png", b"an image"),
}


class RecordingApp:
    """A WSGI application that keeps what it received."""

    def __init__(self) -> None:
        self.requests: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        content_type, content = CONTENT.get(environ["PATH_INFO"], ("text/plain", b"search"))
        environ["wsgi.input"].read()
        headers = [("Content-Type", content_type), ("Content-Length", str(len(content)))]
        start_response("200 OK", [*headers, ("Access-Control-Allow-Origin", "*")])
        return [content]


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "FIRST_DELAY_SECONDS", 0.0)


@pytest.fixture(scope="module")
def app() -> RecordingApp:
    return RecordingApp()


@pytest.fixture(scope="module")
def open_port(app: RecordingApp) -> Iterator[int]:
    """The port of a server without a password."""
    with serving(protect(app, allowed_hosts=LOOPBACK_HOSTS)) as port:
        yield port


@pytest.fixture(scope="module")
def password_port(app: RecordingApp) -> Iterator[int]:
    with serving(protect(app, access=Access(PASSWORD), allowed_hosts=("*",))) as port:
        yield port


@pytest.fixture(scope="module")
def token_port(app: RecordingApp) -> Iterator[int]:
    with serving(protect(app, access=Access(token=TOKEN), allowed_hosts=LOOPBACK_HOSTS)) as port:
        yield port


@pytest.mark.parametrize("path", ["/", "/dashboard", "/api/studies", "/static/bundle.js", "/artifacts/1/1", "/csv/1"])
def test_every_path_requires_the_password(password_port: int, app: RecordingApp, path: str) -> None:
    app.requests.clear()
    status, headers, content = request(password_port, "GET", path)
    assert status == 401
    assert headers["WWW-Authenticate"].startswith("Basic ")
    assert content == b"the dashboard requires a password; any user name is accepted"
    assert app.requests == []


@pytest.mark.parametrize(
    "authorization",
    [
        basic_auth("wrong"),
        basic_auth(""),
        basic_auth(PASSWORD + "x"),
        basic_auth(PASSWORD[:-1]),
        basic_auth(PASSWORD).replace("Basic", "Bearer"),
        PASSWORD,
        "Basic",
        "Basic %%%",
        "Bearer x",
    ],
)
def test_a_wrong_password_is_rejected(password_port: int, app: RecordingApp, authorization: str) -> None:
    app.requests.clear()
    header = authorization.encode().decode("latin-1")
    assert request(password_port, "DELETE", "/api/studies/1", Authorization=header)[0] == 401
    assert app.requests == []


def test_the_right_password_is_accepted_with_any_user_and_host_but_not_from_another_site(
    password_port: int, app: RecordingApp
) -> None:
    app.requests.clear()
    for user in ("anyone", "", "someone else"):
        assert request(password_port, "GET", "/", Authorization=basic_auth(PASSWORD, user))[0] == 200
    assert request(password_port, "GET", "/", Authorization=basic_auth(PASSWORD), Host="gpu.example:80")[0] == 200
    assert app.requests == ["GET /"] * 4
    foreign = {"Authorization": basic_auth(PASSWORD), "Origin": "http://other.example"}
    assert request(password_port, "DELETE", "/api/studies/1", **foreign)[0] == 403
    assert app.requests == ["GET /"] * 4


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize(
    "origin", ["http://other.example", "null", "http://other.example:{port}", "http://127.0.0.1:1"]
)
def test_requests_from_other_sites_are_rejected(open_port: int, app: RecordingApp, method: str, origin: str) -> None:
    app.requests.clear()
    status, _, _ = request(open_port, method, "/api/studies", Origin=origin.format(port=open_port))
    assert status == 403
    assert app.requests == []


@pytest.mark.parametrize("path", ["/", "/api/studies", "/artifacts/1/1", "/?token=wrong", "/?token="])
def test_without_the_token_nothing_is_shown(app: RecordingApp, token_port: int, path: str) -> None:
    app.requests.clear()
    for headers in ({}, {"Cookie": f"hpo-dashboard-{token_port}=wrong"}, {"Authorization": basic_auth("wrong")}):
        status, _, content = request(token_port, "GET", path, **headers)
        assert status == 401
        assert content.startswith(b"open the link that `hpo dashboard` has printed")
    assert app.requests == []


def test_the_link_with_the_token_sets_a_cookie(app: RecordingApp, token_port: int) -> None:
    app.requests.clear()
    status, headers, _ = request(token_port, "GET", f"/dashboard/studies/1?token={TOKEN}&tab=best")
    assert (status, headers["Location"]) == (303, "/dashboard/studies/1?tab=best")
    cookie, *flags = headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=strict"} <= set(flags)
    assert request(token_port, "GET", "/api/studies", Cookie=cookie)[0] == 200
    assert request(token_port, "DELETE", "/api/studies/1", Cookie=cookie)[0] == 200
    assert request(token_port, "GET", "/api/studies", Authorization=basic_auth(TOKEN))[0] == 200, "for programs"
    assert app.requests == ["GET /api/studies", "DELETE /api/studies/1", "GET /api/studies"]
    assert request(token_port, "GET", "/", Cookie=cookie, Host="other.example")[0] == 400


@pytest.mark.parametrize(
    ("access", "password"),
    [
        (Access(PASSWORD, "looks"), "looks"),
        (Access(None, "looks"), "looks"),
        (Access(PASSWORD, read_only=True), PASSWORD),
        (Access(None, None, TOKEN, read_only=True), TOKEN),
        (Access(read_only=True), ""),
    ],
)
def test_a_reader_changes_nothing(
    app: RecordingApp, caplog: pytest.LogCaptureFixture, access: Access, password: str
) -> None:
    app.requests.clear()
    headers = {"Authorization": basic_auth(password)}
    with serving(protect(app, access=access, allowed_hosts=LOOPBACK_HOSTS)) as port:
        assert request(port, "GET", "/api/studies", **headers)[0] == 200
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            status, _, content = request(port, method, "/api/studies/1", **headers)
            assert status == 403
            assert json.loads(content) == {"reason": "you may look at this dashboard, and change nothing"}
        if access.password and not access.read_only:
            owner = {"Authorization": basic_auth(PASSWORD)}
            assert request(port, "DELETE", "/api/studies/1", **owner)[0] == 200
            assert app.requests.pop() == "DELETE /api/studies/1"
    assert app.requests == ["GET /api/studies"]
    assert "refused: DELETE /api/studies/1 from 127.0.0.1, who may only look" in caplog.text


def test_failed_attempts_are_logged_and_slow_the_next_ones_down(
    app: RecordingApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access, "FIRST_DELAY_SECONDS", 0.02)
    monkeypatch.setattr(access, "MAX_DELAY_SECONDS", 0.3)
    with serving(protect(app, access=Access(PASSWORD), allowed_hosts=("*",))) as port:
        seconds = []
        for _ in range(6):
            started = time.monotonic()
            assert request(port, "GET", "/", Authorization=basic_auth("guess"))[0] == 401
            seconds.append(time.monotonic() - started)
        started = time.monotonic()
        assert request(port, "GET", "/", Authorization=basic_auth(PASSWORD))[0] == 200
        assert time.monotonic() - started < 0.3, "who knows the password does not wait"
    assert seconds[0] < 0.3 <= seconds[-1]
    assert caplog.text.count("refused: a wrong password or token from 127.0.0.1") == 6
    assert "guess" not in caplog.text


def test_neither_a_reader_nor_links_nor_haste_make_guesses_faster(
    app: RecordingApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "FIRST_DELAY_SECONDS", 0.1)
    monkeypatch.setattr(access, "MAX_DELAY_SECONDS", 0.1)
    reader = {"Authorization": basic_auth("looks")}
    readers = Access(reader_password="looks", token=TOKEN)
    with serving(protect(app, access=readers, allowed_hosts=LOOPBACK_HOSTS)) as port:
        started = time.monotonic()
        for _ in range(3):
            assert request(port, "GET", "/", **reader)[0] == 200
            assert request(port, "GET", "/?token=looks")[0] == 401, "a link takes the token only"
        assert time.monotonic() - started >= 0.3
        started = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(request, port, "GET", "/", Authorization=basic_auth("guess")) for _ in range(8)]
        assert {answer.result()[0] for answer in answers} == {401}
        assert time.monotonic() - started >= 0.8, "one after another"
        status, headers, _ = request(port, "GET", f"//other.example/?token={TOKEN}")
        assert (status, headers["Location"]) == (303, "/other.example/")


def hold(port: int, head: str, number: int) -> list[socket.socket]:
    """Send requests, and do not read their answers."""
    held = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(number)]
    for connection in held:
        connection.sendall(f"GET {head}\r\nHost: 127.0.0.1\r\n\r\n".encode())
    return held


def test_attempts_whose_clients_have_gone_do_not_keep_the_owner_out(
    app: RecordingApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """More than the server answers at a time, each of which would wait for seconds."""
    monkeypatch.setattr(access, "FIRST_DELAY_SECONDS", 5.0)
    with serving(protect(app, access=Access(token=TOKEN), allowed_hosts=LOOPBACK_HOSTS)) as port:
        for _ in range(5):  # a server that sees too many at once refuses all of them before it looks at the token
            for connection in hold(port, "/?token=no HTTP/1.1", server.MAX_CONNECTIONS // 4):
                connection.close()
            noticed_before = time.monotonic() + access.FIRST_DELAY_SECONDS / 2  # the server has to see that they closed
            while request(port, "GET", "/", Authorization=basic_auth(TOKEN))[0] == 503:
                assert time.monotonic() < noticed_before, "attempts without a client are held until their delay is over"
        for headers in ({"Authorization": basic_auth(TOKEN)}, {"Cookie": f"hpo-dashboard-{port}={TOKEN}"}):
            assert [request(port, "GET", "/", **headers)[0] for _ in range(20)] == [200] * 20
        assert request(port, "GET", f"/?token={TOKEN}")[0] == 303
        assert request(port, "GET", "/?token=old", **headers)[0] == 200, "an old link is no guess of who has the cookie"
    assert len(caplog.records) < 20
    assert re.search(r"refused: \d+ more attempts, the last one from 127\.0\.0\.1", caplog.text)


@pytest.mark.parametrize("head", ["/?token=no HTTP/1.1", f"/ HTTP/1.1\r\nAuthorization: {basic_auth('guess')}"])
def test_few_wrong_attempts_wait_and_what_is_right_is_answered_at_once(
    app: RecordingApp, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    monkeypatch.setattr(access, "FIRST_DELAY_SECONDS", 5.0)
    both = Access(PASSWORD, token=TOKEN)
    with serving(protect(app, access=both, allowed_hosts=("*",))) as port, contextlib.ExitStack() as stack:
        for connection in hold(port, head, access.MAX_WAITING):
            stack.enter_context(connection)
        started = time.monotonic()
        [refused] = hold(port, head, 1)
        with refused:
            answer = b""
            while part := refused.recv(4096):  # until the server closes the connection
                answer += part
        assert answer.startswith(b"HTTP/1.1 429")
        assert b"retry-after: 5" in answer.lower()
        for secret in (PASSWORD, TOKEN):
            assert request(port, "GET", "/", Authorization=basic_auth(secret))[0] == 200
        assert time.monotonic() - started < 4


def test_passwords_are_compared_at_a_bounded_rate_unless_the_browser_has_been_logged_in(
    app: RecordingApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess that is refused at once must not have been compared: otherwise it would cost the guesser no time."""
    monkeypatch.setattr(access, "MAX_GUESSES", 3)
    monkeypatch.setattr(access, "GUESSES_PER_SECOND", 0.0)
    owner, reader, wrong = ({"Authorization": basic_auth(password)} for password in (PASSWORD, "looks", "guess"))
    with serving(protect(app, access=Access(PASSWORD, "looks"), allowed_hosts=("*",))) as port:
        for _ in range(5):
            status, headers, _ = request(port, "GET", "/", **owner)
            assert status == 200
        cookie, *flags = headers["Set-Cookie"].split("; ")
        assert {"HttpOnly", "SameSite=strict"} <= set(flags)
        owner_proof, reader_proof = {"Cookie": cookie}, {"Cookie": request(port, "GET", "/", **reader)[1]["Set-Cookie"]}
        assert request(port, "GET", "/", **owner_proof)[0] == 401, "the cookie is no password"
        assert [request(port, "GET", "/", **wrong)[0] for _ in range(5)] == [401] * 3 + [429] * 2
        for guess in (owner, owner | reader_proof, wrong | reader_proof, reader | owner_proof):
            assert request(port, "GET", "/", **guess)[0] == 429
        assert "Set-Cookie" not in request(port, "GET", "/", **owner, **owner_proof)[1]
        assert request(port, "DELETE", "/", **owner, **owner_proof)[0] == 200
        assert request(port, "GET", "/", **reader, **reader_proof)[0] == 200
        monkeypatch.setattr(access, "GUESSES_PER_SECOND", 1000.0)
        assert request(port, "GET", "/", **owner)[0] == 200, "once nobody guesses, or between two guesses"


def test_all_addresses_of_a_machine_are_one_client_and_all_clients_together_keep_few_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(access, "MAX_WAITING", 2)
    monkeypatch.setattr(access, "MAX_WAITING_IN_ALL", 5)

    async def attempt(addresses: tuple[str, ...]) -> list[bool]:
        attempts = access.Attempts()
        return list(await asyncio.gather(*map(attempts.failed, addresses)))

    def waited(*addresses: str) -> list[bool]:
        with ThreadPoolExecutor(1) as thread:  # after tests in a browser, this one has an event loop
            return thread.submit(lambda: asyncio.run(attempt(addresses))).result()

    for same in (
        ("127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.3"),
        ("2001:db8::1", "2001:db8::2", "2001:db8:0:0:ffff::", "2001:db8::3"),
        ("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.1", "192.0.2.1"),
    ):
        assert waited(*same) == [True, True, False, False]
    different = ("192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8:0:1::1", "unknown", "192.0.2.3")
    assert waited(*different) == [*[True] * 5, False]


def test_a_client_cannot_say_that_it_is_another_one_or_that_it_came_by_https(
    app: RecordingApp, token_port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise, every user of this machine could guess without delays, and write any address to the log."""
    monkeypatch.setattr(access, "FIRST_DELAY_SECONDS", 0.1)
    monkeypatch.setattr(access, "MAX_DELAY_SECONDS", 0.1)
    started = time.monotonic()
    for number in range(3):
        forged = {"X_Forwarded_For": f"10.0.0.{number}", "Forwarded": f"for=10.0.0.{number}"}
        assert request(token_port, "GET", "/", Authorization=basic_auth("guess"), **forged)[0] == 401
    assert time.monotonic() - started >= 0.3
    assert caplog.text.count("a wrong password or token from 127.0.0.1") == 3
    assert "10.0.0." not in caplog.text
    _, headers, _ = request(token_port, "GET", f"/?token={TOKEN}", X_Forwarded_Proto="https")
    assert "Secure" not in headers["Set-Cookie"], "the browser would not send it back"


def test_a_request_that_is_refused_early_ends_its_connection(password_port: int) -> None:
    """Otherwise, whoever knows no password could hold all connections by sending a body slowly."""
    with socket.create_connection(("127.0.0.1", password_port), timeout=30) as connection:
        connection.sendall(b"POST /api/studies HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n{")
        answer = b""
        while part := connection.recv(4096):  # until the server closes the connection
            answer += part
    assert answer.startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_requests_that_a_browser_says_are_cross_site_are_rejected(
    open_port: int, app: RecordingApp, method: str
) -> None:
    app.requests.clear()
    assert request(open_port, method, "/api/studies", Sec_Fetch_Site="cross-site")[0] == 403
    for site in ("same-origin", "none"):
        assert request(open_port, method, "/api/studies", Sec_Fetch_Site=site)[0] == 200
    assert app.requests == [f"{method} /api/studies"] * 2


@pytest.mark.parametrize("path", ["/", "/api/studies", "/artifacts/1/2", "//artifacts/1/2", "/artifacts/1/3"])
def test_no_page_can_be_framed_and_no_artifact_runs_a_script(open_port: int, path: str) -> None:
    _, headers, _ = request(open_port, "GET", path)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in headers
    is_artifact = "artifacts" in path
    assert headers["Content-Security-Policy"].startswith("sandbox; default-src 'none'") is is_artifact
    assert (headers["Content-Disposition"] == "attachment") is is_artifact


def test_an_image_is_shown(open_port: int) -> None:
    _, headers, content = request(open_port, "GET", "/artifacts/1/4")
    assert "Content-Disposition" not in headers
    assert content == b"an image"


HALF_SENT = [
    b"POST /api/studies HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{",
    b"POST /api/studies HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le",
    b"",
]


@pytest.mark.parametrize("half", HALF_SENT, ids=["body", "headers", "nothing"])
def test_requests_that_are_sent_in_part_keep_nobody_else_waiting(
    open_port: int, monkeypatch: pytest.MonkeyPatch, half: bytes
) -> None:
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(guards, "BODY_SECONDS", 0.5)
    waiting = [socket.create_connection(("127.0.0.1", open_port)) for _ in range(30)]
    for each in waiting:
        each.sendall(half)
    started = time.monotonic()
    assert request(open_port, "GET", "/api/studies")[0] == 200
    assert time.monotonic() - started < 5
    for each in waiting:
        each.settimeout(30)
        answer = b""
        while part := each.recv(4096):  # until the server closes the connection
            answer += part
        assert answer.startswith(b"HTTP/1.1 408") if b"{" in half else not answer
        each.close()


def test_a_request_that_is_too_large_is_refused(
    open_port: int, app: RecordingApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app.requests.clear()
    monkeypatch.setattr(guards, "MAX_BODY_BYTES", 1000)
    assert request(open_port, "POST", "/api/studies", {"note": "x" * 900})[0] == 200
    assert request(open_port, "POST", "/api/studies", {"note": "x" * 1000})[0] == 413
    assert app.requests == ["POST /api/studies"]


@pytest.mark.parametrize("path", ["/api/studies/1/rename", "//api/studies/1/rename", "/api/studies/1/rename/"])
def test_a_study_is_not_renamed(open_port: int, app: RecordingApp, path: str) -> None:
    """optuna-dashboard would copy its trials and delete it, and our rows with it."""
    app.requests.clear()
    status, _, content = request(open_port, "POST", path, {"study_name": "other"})
    assert status == 400
    assert "cannot be renamed" in json.loads(content)["reason"]
    assert app.requests == []


@pytest.mark.parametrize("host", ["other.example", "other.example:{port}", "127.0.0.1.other.example"])
def test_dns_rebinding_is_rejected(open_port: int, app: RecordingApp, host: str) -> None:
    app.requests.clear()
    host = host.format(port=open_port)
    assert request(open_port, "GET", "/api/studies", Host=host)[0] == 400
    assert request(open_port, "DELETE", "/api/studies/1", Host=host, Origin=f"http://{host}")[0] == 400
    assert app.requests == []


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "[::1]:{port}"])
def test_the_pages_of_the_dashboard_itself_are_accepted(open_port: int, app: RecordingApp, host: str) -> None:
    app.requests.clear()
    host = host.format(port=open_port)
    assert request(open_port, "GET", "/", Host=host)[0] == 200
    assert request(open_port, "DELETE", "/", Host=host, Origin=f"http://{host}")[0] == 200
    assert app.requests == ["GET /", "DELETE /"]


def test_responses_are_compressed_if_the_browser_accepts_it(open_port: int) -> None:
    _, headers, plain = request(open_port, "GET", "/api/studies", Accept_Encoding="identity")
    assert "Content-Encoding" not in headers
    _, headers, compressed = request(open_port, "GET", "/api/studies", Accept_Encoding="gzip")
    assert headers["Content-Encoding"] == "gzip"
    assert len(compressed) < len(plain) / 3
    assert gzip.decompress(compressed) == plain


def test_checkpoints_are_not_compressed(open_port: int) -> None:
    _, headers, content = request(open_port, "GET", "/artifacts/1/1", Accept_Encoding="gzip")
    assert "Content-Encoding" not in headers
    assert content == CONTENT["/artifacts/1/1"][1]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.0.0.2", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("gpu.example", False),
    ],
)
def test_only_loopback_addresses_are_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
