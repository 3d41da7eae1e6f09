"""Who may use the dashboard, and who may change something: passwords, tokens, cookies, and how often one may guess."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import ipaddress
import logging
import math
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.authentication import AuthCredentials
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("hpo.dashboard")
CHANGES = "changes"  # the scope of those who may change something
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.05, 5.0  # after failed attempts
MAX_WAITING, MAX_WAITING_IN_ALL = 10, 100  # failed attempts that wait for their answer, of a client and of all clients
MAX_GUESSES, GUESSES_PER_SECOND = 20, 1.0  # passwords of a client that are compared
LOG_SECONDS = 10.0  # between two lines about attempts that are refused at once
MAX_CLIENTS = 10_000  # whose failed attempts are counted


@dataclass(frozen=True)
class Access:
    """Who may do what. Without a password and a token, everyone who reaches the dashboard may do everything.

    Attributes:
        password: by HTTP Basic authentication, with any user name.
        reader_password: the same, of those who may look and change nothing.
        token: in the link that the owner opens first (`/?token=...`); a cookie remembers it. Programs may send it as a
            password, too.
        read_only: whether all changes are refused.
    """

    password: str | None = None
    reader_password: str | None = None
    token: str | None = None
    read_only: bool = False

    @property
    def is_restricted(self) -> bool:
        """Whether a request needs a password or a token."""
        return any((self.password, self.reader_password, self.token))

    def is_token(self, secret: str) -> bool:
        """Return whether it is the token."""
        return self.token is not None and hmac.compare_digest(secret.encode(errors="replace"), self.token.encode())

    def scopes_of(self, secret: str) -> list[str] | None:
        """Return what a password or token allows; None if it is wrong."""
        scopes = None
        for known, allowed in ((self.reader_password, []), (self.password, [CHANGES]), (self.token, [CHANGES])):
            # Constant time: the duration of a refusal must not reveal how much of a guess was right.
            if known and hmac.compare_digest(secret.encode(errors="replace"), known.encode(errors="replace")):
                scopes = [] if self.read_only else allowed
        return scopes


OPEN = Access()


@dataclass
class _Client:
    """The wrong attempts of a client.

    Attributes:
        failures: since it last was right.
        waiting: how many of them have not been answered yet.
        turn: which of these is next.
        guesses: how many passwords may still be compared, at `counted_at`.
        counted_at: seconds of `time.monotonic`.
    """

    failures: int = 0
    waiting: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    guesses: float = field(default_factory=lambda: float(MAX_GUESSES))
    counted_at: float = field(default_factory=time.monotonic)


class Attempts:
    """Bounds how fast a client guesses a password or token.

    Wrong attempts of a client are answered one after another, each later than the one before. Few wait at a time, because
    each takes part of what the server does at once; further ones are refused at once.

    A right password is answered at once, while wrong ones wait. So an attacker knows that a guess was wrong without
    waiting, and the comparisons must be limited, too. After `MAX_GUESSES` wrong ones, `GUESSES_PER_SECOND` passwords are
    compared, and all others are refused unread, the right one included: otherwise, any number of guesses could be tried.
    Two things are always compared: a token, which is too long to be guessed, and a password that the browser proves to have
    been right before (`SecretMiddleware`). So an attacker at the owner's address (all users of a machine have one) cannot
    lock out the link or a browser that is logged in. A first login with the password may need several attempts then.
    """

    def __init__(self) -> None:
        self._clients: dict[str, _Client] = {}
        self._waiting = 0
        self._refused = 0  # since that was last logged
        self._logged_at = -math.inf

    def may_guess(self, address: str) -> bool:
        """Return whether a password that may be a guess is compared; log that not."""
        client, now = self._client(address), time.monotonic()
        client.guesses = min(MAX_GUESSES, client.guesses + GUESSES_PER_SECOND * (now - client.counted_at))
        client.counted_at = now
        if client.guesses < 1:
            self._log_refusal(address)
        return client.guesses >= 1

    async def failed(self, address: str) -> bool:
        """Count a wrong attempt, log it, and wait; return whether it waited. If not, it is to be refused with status 429."""
        client = self._client(address)
        client.failures += 1
        client.guesses = max(0.0, client.guesses - 1)
        if client.waiting >= MAX_WAITING or self._waiting >= MAX_WAITING_IN_ALL:
            self._log_refusal(address)
            return False
        logger.warning("refused: a wrong password or token from %s", address)
        client.waiting += 1
        self._waiting += 1
        try:
            async with client.turn:
                await asyncio.sleep(min(MAX_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** min(client.failures, 20)))
        finally:
            client.waiting -= 1
            self._waiting -= 1
        return True

    def succeeded(self, address: str) -> None:
        """Forget the failures of a client that may change everything, and so needs no more guesses."""
        self._client(address).failures = 0

    def _client(self, address: str) -> _Client:
        if len(self._clients) > MAX_CLIENTS:
            self._clients.clear()
        return self._clients.setdefault(_machine(address), _Client())

    def _log_refusal(self, address: str) -> None:
        self._refused += 1
        if time.monotonic() - self._logged_at >= LOG_SECONDS:
            logger.warning("refused: %d more attempts, the last one from %s", self._refused, address)
            self._refused, self._logged_at = 0, time.monotonic()


def _machine(address: str) -> str:
    """Return what the addresses have in common that one machine can choose from."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_loopback:  # all of 127.0.0.0/8
        return "this machine"
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((int(ip) >> 64 << 64, 64)))


def _refuse_attempt() -> Response:
    text = "too many wrong passwords or tokens from this address: try again in some seconds"
    headers = {"Retry-After": f"{MAX_DELAY_SECONDS:.0f}", "Connection": "close"}  # an open connection counts, too
    return PlainTextResponse(text, 429, headers)


class TokenLinkMiddleware:
    """Answers the link with the token: it sets a cookie, and leads to the same page without the token in its address."""

    def __init__(self, app: ASGIApp, access: Access, attempts: Attempts) -> None:
        self._app = app
        self._access = access
        self._attempts = attempts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or redirect it, or refuse it with status 429."""
        connection = HTTPConnection(scope)
        token = connection.query_params.get("token")
        if not token or not self._access.is_token(token):
            # An old link in a browser that has the present token is no guess.
            is_guess = token and self._access.token and not self._access.is_token(_cookie(connection))
            if is_guess and not await self._attempts.failed(_client(scope)):
                await _refuse_attempt()(scope, receive, send)
            else:
                await self._app(scope, receive, send)
            return
        url = connection.url.remove_query_params("token")
        path = "/" + url.path.lstrip("/")  # two slashes would begin the address of another site
        response = RedirectResponse(f"{path}?{url.query}" if url.query else path, status_code=303)
        _set_cookie(response, connection, cookie_name(scope), token)
        await response(scope, receive, send)


def cookie_name(scope: Scope) -> str:
    """Return the name of the cookie. Browsers keep the cookies of all ports of a machine together."""
    _, port = scope.get("server") or ("", 0)
    return f"hpo-dashboard-{port}"


def _cookie(connection: HTTPConnection) -> str:
    return connection.cookies.get(cookie_name(connection.scope), "")


def _set_cookie(response: Response, connection: HTTPConnection, name: str, value: str) -> None:
    response.set_cookie(name, value, httponly=True, samesite="strict", secure=connection.url.scheme == "https")


class SecretMiddleware:
    """Asks for a password or token: by HTTP Basic authentication with any user name, or in the cookie.

    Who sends a right password gets a second cookie: the proof that this very password was right, which holds until the
    dashboard stops. It opens nothing without the password.
    """

    def __init__(self, app: ASGIApp, access: Access, attempts: Attempts) -> None:
        self._app = app
        self._access = access
        self._attempts = attempts
        self._key = secrets.token_bytes(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it: with status 401, or with 429 without having compared the password."""
        connection, address = HTTPConnection(scope), _client(scope)
        secret = _read_secret(connection)
        proof_name = f"{cookie_name(scope)}-proof"
        proof = hmac.digest(self._key, secret.encode(errors="replace"), "sha256").hex()
        is_proved = hmac.compare_digest(connection.cookies.get(proof_name, "").encode(), proof.encode())
        is_token = self._access.is_token(secret)
        if not secret:
            await self._unauthorized()(scope, receive, send)
        elif not (is_proved or is_token or self._attempts.may_guess(address)):
            await _refuse_attempt()(scope, receive, send)
        elif (scopes := self._access.scopes_of(secret)) is None:
            has_waited = await self._attempts.failed(address)
            await (self._unauthorized() if has_waited else _refuse_attempt())(scope, receive, send)
        else:
            if CHANGES in scopes:
                self._attempts.succeeded(address)
            scope["auth"] = AuthCredentials(scopes)
            cookie = Response()
            if not (is_proved or is_token):
                _set_cookie(cookie, connection, proof_name, proof)

            async def send_with_proof(message: Message) -> None:
                if message["type"] == "http.response.start" and "Set-Cookie" in cookie.headers:
                    MutableHeaders(scope=message).append("Set-Cookie", cookie.headers["Set-Cookie"])
                await send(message)

            await self._app(scope, receive, send_with_proof)

    def _unauthorized(self) -> Response:
        if self._access.token is not None:
            text = "open the link that `hpo dashboard` has printed: it contains a token, which a cookie then remembers"
            return PlainTextResponse(text, 401)
        challenge = {"WWW-Authenticate": 'Basic realm="hpo dashboard", charset="UTF-8"'}
        return PlainTextResponse("the dashboard requires a password; any user name is accepted", 401, challenge)


def _read_secret(connection: HTTPConnection) -> str:
    """Return the password or token of a request; an empty one if it has none."""
    scheme, _, encoded = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error, ValueError):
            return base64.b64decode(encoded, validate=True).decode(errors="replace").partition(":")[2]
    return _cookie(connection)


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
