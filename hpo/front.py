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

from hpo.errors import SettingError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1", "[::1]")
GZIP_LEVEL = 5  # 15.3 MB of a large study: to 3.1 MB in 0.2 s; level 9 gains 0.2 MB for 0.5 s more


def build_app(wsgi: Any, *, password: str | None, hosts: Sequence[str]) -> Starlette:
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
