"""What stands in front of the dashboard, which itself lets whoever reaches it delete studies.

    Host check -> Origin check -> password -> gzip -> the dashboard

Without a password it is for this machine alone, and a page of another site that the user visits is kept out: its requests
name its own site as their Origin, or, where its name was bent to point to this machine, as their Host.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hmac
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import uvicorn
from a2wsgi import WSGIMiddleware
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount

from hpo.dashboard.publishing import publish
from hpo.errors import SettingError
from hpo.paths import RunsDir

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from storage.database import Database

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1", "[::1]")
GZIP_LEVEL = 5  # 15.3 MB of a large study: to 3.1 MB in 0.2 s; level 9 gains 0.2 MB for 0.5 s more
PUBLISH_SECONDS = 60.0  # between looks, while the dashboard is served, for studies in which a trial has ended


def protect(wsgi: Any, *, password: str | None, hosts: Sequence[str]) -> Starlette:
    """Return a WSGI application behind its guards.

    Args:
        wsgi: the application.
        password: asked for by HTTP Basic, with any user name; None asks for none.
        hosts: the names by which a browser may call it; `*` is any.
    """
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False), Middleware(_SameOrigin)]
    if password is not None:
        guards.append(Middleware(AuthenticationMiddleware, backend=_Password(password), on_error=_ask_for_password))
    packed = (*DEFAULT_EXCLUDED_CONTENT_TYPES, "application/octet-stream")  # checkpoints: slow to press, and no smaller
    guards.append(Middleware(GZipMiddleware, compresslevel=GZIP_LEVEL, exclude_content_types=packed))
    served: Any = WSGIMiddleware(wsgi)
    return Starlette(routes=[Mount("/", app=served)], middleware=guards)


class _SameOrigin:
    """Refuses what the pages of other sites send. Browsers name the site with all that changes anything."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            response = PlainTextResponse(f"a page of {origin} may not use this dashboard", status_code=403)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _Password(AuthenticationBackend):
    """HTTP Basic: one password, any user name."""

    def __init__(self, password: str) -> None:
        self._password = password.encode()

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser]:
        scheme, _, encoded = conn.headers.get("authorization", "").partition(" ")
        given = b""
        with contextlib.suppress(binascii.Error, ValueError):
            given = base64.b64decode(encoded, validate=True)
        user, _, password = given.partition(b":")
        # In constant time: how long the refusal takes must not tell how much of a guess was right.
        if not hmac.compare_digest(password, self._password) or scheme.lower() != "basic":
            raise AuthenticationError
        return AuthCredentials(), SimpleUser(user.decode(errors="replace"))


def _ask_for_password(_connection: HTTPConnection, _error: AuthenticationError) -> Response:
    challenge = {"WWW-Authenticate": 'Basic realm="hpo dashboard", charset="UTF-8"'}
    return PlainTextResponse("the dashboard asks for a password; any user name will do", 401, challenge)


def is_loopback(host: str) -> bool:
    """Tell the addresses that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        SettingError: no such address on this machine, or the port is taken or forbidden.
    """
    if not 0 <= port < 2**16:  # where Python's own check comes late, and leaves the socket open
        raise SettingError(f"cannot listen on port {port}: --port is a number from 0 to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server((address[0], port), family=family)
    except socket.gaierror as error:
        reason = str(error.strerror)
    except OSError as error:
        reason = os.strerror(error.errno or 0)  # the text of `create_server` names the address once more
    raise SettingError(f"cannot listen on {host}:{port}: {reason}; name another --host or --port")


def build_server(app: Starlette) -> uvicorn.Server:
    """Return a server for `run(sockets=[...])`. It ends with `should_exit`, Ctrl-C or SIGTERM."""
    # No wait for browsers that keep their connection open.
    options: dict[str, Any] = {"ws": "none", "lifespan": "off", "timeout_graceful_shutdown": 1}
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, **options))


def serve(database: Database, host: str, port: int, *, password: str | None, runs_dir: RunsDir) -> None:
    """Serve the dashboard until interrupted, and keep what it shows of our own up to date.

    Args:
        database: whose studies.
        host: the address to listen on.
        port: the port to listen on.
        password: asked for by HTTP Basic; None asks for none.
        runs_dir: where the artifacts and checkpoints of the runs lie.

    Raises:
        SettingError: an address beyond this machine without a password, or one that cannot be listened on.
    """
    if password is None and not is_loopback(host):
        raise SettingError(
            f"whoever reaches {host}:{port} could delete studies: set HPO_DASHBOARD_PASSWORD to the password that it is to "
            "ask for, or keep --host 127.0.0.1"
        )
    app = build_app(database, password=password, runs_dir=runs_dir)
    stopped = threading.Event()
    publisher = threading.Thread(target=_keep_published, args=(database, runs_dir, stopped), daemon=True)
    with listen(host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{port}/ shows {database.url}; Ctrl-C ends it", flush=True)
        publisher.start()
        with contextlib.suppress(KeyboardInterrupt):
            build_server(app).run(sockets=[listening])
        stopped.set()


def build_app(database: Database, *, password: str | None, runs_dir: RunsDir) -> Starlette:
    """Return the dashboard behind its guards, as an ASGI application."""
    from optuna.artifacts import FileSystemArtifactStore
    from optuna.storages import get_storage
    from optuna_dashboard import wsgi

    artifacts = runs_dir.artifacts
    artifacts.mkdir(parents=True, exist_ok=True)
    # Optuna's cache: of 5,000 trials that have ended, an answer takes 2 s with it and 10 s without.
    dashboard = wsgi(get_storage(database.optuna_storage), artifact_store=FileSystemArtifactStore(artifacts))
    # Another name that leads to this machine is another site's, unless the password shows that it is the user's own.
    hosts = LOOPBACK_NAMES if password is None else ("*",)
    return protect(dashboard, password=password, hosts=hosts)


def _keep_published(database: Database, runs_dir: RunsDir, stopped: threading.Event) -> None:
    from storage.studies import all_studies

    while not stopped.is_set():
        started = time.monotonic()
        with contextlib.suppress(Exception):  # the database is away, say; there is a next time
            for study in all_studies(database):
                publish(study, runs_dir)
        # A large study is read in seconds; that must not slow the answers of the dashboard.
        stopped.wait(max(PUBLISH_SECONDS, 20 * (time.monotonic() - started)))
