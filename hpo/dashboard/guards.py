"""Middleware in front of optuna-dashboard, which has no authentication: anyone who can reach it can delete studies.

    headers -> Host check -> site check -> password or token -> who may change something -> refusal to rename
    -> whole body -> gzip -> optuna-dashboard

A web page that the user visits could send requests to the dashboard, too. The site check stops cross-site requests, the Host
check stops DNS rebinding. Files that somebody has uploaded run no script: the browser is told to sandbox them.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import ipaddress
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from a2wsgi import WSGIMiddleware
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("hpo.dashboard")
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1", "[::1]")
_RENAMING = re.compile(r"/+api/studies/\d+/rename/?")
_ARTIFACT = re.compile(r"/+artifacts/")
_SHOWN_TYPES = ("image/png", "text/plain")  # of artifacts that a browser may show as a page
CHANGES = "changes"  # the scope of those who may change something
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.05, 5.0  # after failed attempts
MAX_CLIENTS = 10_000  # whose failed attempts are counted
MAX_BODY_BYTES = 192 * 2**20  # optuna-dashboard takes 128 MiB, which a browser sends as base64
BODY_SECONDS = 300.0  # in which a request must arrive
GZIP_LEVEL = 5  # a large study: 15.3 MB to 3.1 MB in 0.2 s; level 9 saves 0.2 MB more in 0.5 s more


@dataclass(frozen=True)
class Access:
    """Who may do what. Without a password and a token, everyone who reaches the dashboard may do everything.

    Attributes:
        password: by HTTP Basic authentication, with any user name.
        reader_password: the same, of those who may look and change nothing.
        token: in the link that the owner opens first (`/?token=...`); a cookie remembers it. Programs may send it as a
            password, too.
        read_only: whether nobody may change anything.
    """

    password: str | None = None
    reader_password: str | None = None
    token: str | None = None
    read_only: bool = False

    @property
    def is_restricted(self) -> bool:
        """Whether a request needs a password or a token."""
        return any((self.password, self.reader_password, self.token))

    def scopes_of(self, secret: str) -> list[str] | None:
        """Return what a password or token allows; None if it is wrong."""
        scopes = None
        for known, allowed in ((self.reader_password, []), (self.password, [CHANGES]), (self.token, [CHANGES])):
            # Constant time: the duration of a refusal must not reveal how much of a guess was right.
            if known and hmac.compare_digest(secret.encode(errors="replace"), known.encode(errors="replace")):
                scopes = [] if self.read_only else allowed
        return scopes


OPEN = Access()


def protect(wsgi_app: Any, *, access: Access = OPEN, allowed_hosts: Sequence[str]) -> Starlette:
    """Return an ASGI application that checks requests before it passes them to a WSGI application.

    Args:
        wsgi_app: the application to protect.
        access: who may do what.
        allowed_hosts: the values of the Host header that are accepted; `*` accepts any.
    """
    middleware = [
        Middleware(HeadersMiddleware),
        Middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts), www_redirect=False),
        Middleware(SameSiteMiddleware),
    ]
    if access.is_restricted:
        attempts = Attempts()
        backend = SecretBackend(access, attempts)
        middleware += [
            Middleware(TokenLinkMiddleware, access=access, attempts=attempts),
            Middleware(AuthenticationMiddleware, backend=backend, on_error=_refuse(access)),
        ]
    middleware += [
        Middleware(ChangesMiddleware, access=access),
        Middleware(NoRenamingMiddleware),
        Middleware(WholeBodyMiddleware),
    ]
    # Checkpoints are slow to compress and do not get smaller.
    not_compressed = (*DEFAULT_EXCLUDED_CONTENT_TYPES, "application/octet-stream")
    middleware.append(Middleware(GZipMiddleware, compresslevel=GZIP_LEVEL, exclude_content_types=not_compressed))
    asgi_app: Any = WSGIMiddleware(wsgi_app)
    return Starlette(routes=[Mount("/", app=asgi_app)], middleware=middleware)


class HeadersMiddleware:
    """Tells browsers what pages of the dashboard may do: no other site frames them, and no artifact runs a script."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and add headers to its response."""
        is_artifact = _ARTIFACT.match(scope.get("path", "")) is not None

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Content-Security-Policy"] = "frame-ancestors 'none'"
                del headers["Access-Control-Allow-Origin"]
                if is_artifact:
                    headers["Content-Security-Policy"] = "sandbox; default-src 'none'; frame-ancestors 'none'"
                    if headers.get("Content-Type", "").partition(";")[0].strip().lower() not in _SHOWN_TYPES:
                        headers["Content-Disposition"] = "attachment"
            await send(message)

        await self._app(scope, receive, send_with_headers)


class SameSiteMiddleware:
    """Rejects requests from other sites.

    Browsers send an Origin header with every request that can change anything, and Sec-Fetch-Site with every request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or reject it with status 403."""
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            response = PlainTextResponse(f"cross-site request from {origin} rejected", status_code=403)
            await response(scope, receive, send)
        elif headers.get("sec-fetch-site") == "cross-site":
            text = "cross-site request rejected: open the dashboard by its address, not by a link on another site"
            await PlainTextResponse(text, status_code=403)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class WholeBodyMiddleware:
    """Passes a request on when all of it has arrived: optuna-dashboard has few threads, and each would wait for the rest."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with status 408 or 413: it arrives too slowly, or is too large."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return  # the client has gone
                    body += message.get("body", b"")
                    if len(body) > MAX_BODY_BYTES:
                        text = f"a request has at most {MAX_BODY_BYTES} bytes"
                        await PlainTextResponse(text, status_code=413)(scope, receive, send)
                        return
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            text = f"the request did not arrive within {BODY_SECONDS:.0f} s"
            await PlainTextResponse(text, status_code=408, headers={"Connection": "close"})(scope, receive, send)
            return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive_whole() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, receive_whole, send)


class NoRenamingMiddleware:
    """Refuses to rename a study: optuna-dashboard copies its trials and deletes it, with our metrics."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with status 400."""
        if _RENAMING.fullmatch(scope.get("path", "")):
            reason = (
                "hpo finds the metrics, the checkpoints and the revisions of a study by its name: it cannot be renamed"
            )
            await JSONResponse({"reason": reason}, status_code=400)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class Attempts:
    """Failed attempts to guess a password or token: each one of a client waits longer, one after another."""

    def __init__(self) -> None:
        self._failures: dict[str, int] = {}
        self._turns: dict[str, asyncio.Lock] = {}

    async def failed(self, client: str) -> None:
        """Log a failed attempt, and wait."""
        logger.warning("refused: a wrong password or token from %s", client)
        if len(self._failures) > MAX_CLIENTS:
            self._failures.clear()
            self._turns.clear()
        async with self._turns.setdefault(client, asyncio.Lock()):
            self._failures[client] = self._failures.get(client, 0) + 1
            await asyncio.sleep(min(MAX_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** min(self._failures[client], 20)))

    def succeeded(self, client: str) -> None:
        """Forget the failures of a client that may change everything, and so needs no more guesses."""
        self._failures.pop(client, None)


class TokenLinkMiddleware:
    """Answers the link with the token: it sets a cookie, and leads to the same page without the token in its address."""

    def __init__(self, app: ASGIApp, access: Access, attempts: Attempts) -> None:
        self._app = app
        self._access = access
        self._attempts = attempts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or redirect it."""
        connection = HTTPConnection(scope)
        token, known = connection.query_params.get("token"), self._access.token
        if not token or known is None or not hmac.compare_digest(token.encode(errors="replace"), known.encode()):
            if token and known is not None:
                await self._attempts.failed(_client(scope))
            await self._app(scope, receive, send)
            return
        url = connection.url.remove_query_params("token")
        path = "/" + url.path.lstrip("/")  # two slashes would begin the address of another site
        response = RedirectResponse(f"{path}?{url.query}" if url.query else path, status_code=303)
        response.set_cookie(
            cookie_name(scope), token, httponly=True, samesite="strict", secure=connection.url.scheme == "https"
        )
        await response(scope, receive, send)


def cookie_name(scope: Scope) -> str:
    """Return the name of the cookie. Browsers keep the cookies of all ports of a machine together."""
    _, port = scope.get("server") or ("", 0)
    return f"hpo-dashboard-{port}"


class SecretBackend(AuthenticationBackend):
    """Reads a password or token: from HTTP Basic authentication with any user name, or from the cookie."""

    def __init__(self, access: Access, attempts: Attempts) -> None:
        self._access = access
        self._attempts = attempts

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser]:
        """Return the user of a request, and what the user may do.

        Raises:
            AuthenticationError: the request has no password or token, or a wrong one.
        """
        scheme, _, encoded = conn.headers.get("authorization", "").partition(" ")
        user, secret = "", conn.cookies.get(cookie_name(conn.scope), "")
        if scheme.lower() == "basic":
            with contextlib.suppress(binascii.Error, ValueError):
                user, _, secret = base64.b64decode(encoded, validate=True).decode(errors="replace").partition(":")
        scopes = self._access.scopes_of(secret) if secret else None
        if scopes is None:
            if secret:
                await self._attempts.failed(_client(conn.scope))
            raise AuthenticationError
        if CHANGES in scopes:
            self._attempts.succeeded(_client(conn.scope))
        return AuthCredentials(scopes), SimpleUser(user)


def _refuse(access: Access) -> Callable[[HTTPConnection, AuthenticationError], Response]:
    """Return what answers a request without a password or token."""
    if access.token is not None:
        text = "open the link that `hpo dashboard` has printed: it contains a token, which a cookie then remembers"
        return lambda _connection, _error: PlainTextResponse(text, 401)
    challenge = {"WWW-Authenticate": 'Basic realm="hpo dashboard", charset="UTF-8"'}
    text = "the dashboard requires a password; any user name is accepted"
    return lambda _connection, _error: PlainTextResponse(text, 401, challenge)


class ChangesMiddleware:
    """Refuses changes of those who may only look, and logs all others."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with status 403."""
        connection = HTTPConnection(scope)
        what = f"{scope['method']} {scope['path']}"
        if scope["method"] in {"GET", "HEAD", "OPTIONS"}:
            await self._app(scope, receive, send)
        elif self._access.read_only or (self._access.is_restricted and CHANGES not in connection.auth.scopes):
            logger.warning("refused: %s from %s, who may only look", what, _client(scope))
            await JSONResponse({"reason": "you may look at this dashboard, and change nothing"}, 403)(
                scope, receive, send
            )
        else:
            logger.info("%s from %s", what, _client(scope))
            await self._app(scope, receive, send)


def _client(scope: Scope) -> str:
    host, _ = scope.get("client") or ("an unknown address", 0)
    return str(host)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
