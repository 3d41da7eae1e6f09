"""Middleware in front of optuna-dashboard, which has no authentication: anyone who can reach it can delete studies.

    headers -> Host check -> site check -> password or token -> who may change something -> refusal to rename
    -> whole body -> gzip -> optuna-dashboard

A web page that the user visits could send requests to the dashboard, too. The site check stops cross-site requests, the Host
check stops DNS rebinding. Files that somebody has uploaded run no script: a header makes the browser sandbox them.
Passwords and tokens are in `hpo.dashboard.access`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from a2wsgi import WSGIMiddleware
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Mount

from hpo.dashboard.access import OPEN, Access, Attempts, ChangesMiddleware, SecretMiddleware, TokenLinkMiddleware

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("hpo.dashboard")
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1", "[::1]")
_RENAMING = re.compile(r"/+api/studies/\d+/rename/?")
_ARTIFACT = re.compile(r"/+artifacts/")
_SHOWN_TYPES = ("image/png", "text/plain")  # of artifacts that a browser may show as a page
MAX_BODY_BYTES = 192 * 2**20  # optuna-dashboard takes 128 MiB, which a browser sends as base64
BODY_SECONDS = 300.0  # in which a request must arrive
GZIP_LEVEL = 5  # a large study: 15.3 MB to 3.1 MB in 0.2 s; level 9 saves 0.2 MB more in 0.5 s more


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
        middleware += [
            Middleware(TokenLinkMiddleware, access=access, attempts=attempts),
            Middleware(SecretMiddleware, access=access, attempts=attempts),
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
