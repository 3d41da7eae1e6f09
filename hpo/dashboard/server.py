"""Serves optuna-dashboard on the storage, and keeps its plots, notes and artifacts up to date."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from hpo.dashboard.access import OPEN, Access, is_loopback
from hpo.dashboard.guards import LOOPBACK_HOSTS, protect
from hpo.dashboard.learned import show_trial
from hpo.dashboard.publishing import publish
from hpo.errors import SettingError, printable
from hpo.paths import RunsDir
from storage.studies import all_studies

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from storage.database import Database

logger = logging.getLogger("hpo.dashboard")
PUBLISH_INTERVAL_SECONDS = 60.0
HEADER_SECONDS = 10.0  # in which the headers of a request must arrive
MAX_CONNECTIONS = 200


class PatientH11Protocol(H11Protocol):
    """Closes connections on which the headers of a request do not arrive in time: uvicorn would wait for them forever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for a request."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEADER_SECONDS, self._close_if_unfinished)

    def data_received(self, data: bytes) -> None:
        """Take a part of a request. After an answer, the next request begins with it."""
        super().data_received(data)
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._close_if_unfinished)

    def on_response_complete(self) -> None:
        """End a connection whose request was answered before all of it arrived: the rest may never come."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self.transport.close()

    def _close_if_unfinished(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


@dataclass(frozen=True)
class Certificate:
    """A certificate for HTTPS.

    Attributes:
        certfile: the certificate, with those that signed it, in PEM format.
        keyfile: its private key, in PEM format; None if `certfile` contains it.
    """

    certfile: Path
    keyfile: Path | None = None

    def check(self) -> None:
        """Raise SettingError if a server cannot use it."""
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certfile, self.keyfile, password=lambda: "")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            files = ", ".join(str(file) for file in (self.certfile, self.keyfile) if file is not None)
            raise SettingError(
                f"the certificate in {files} cannot be used ({reason}): give a PEM file with its key"
            ) from None


def serve(
    database: Database,
    host: str,
    port: int,
    *,
    access: Access,
    runs_dir: RunsDir,
    certificate: Certificate | None = None,
) -> None:
    """Serve the dashboard until interrupted.

    Args:
        database: the database with the studies.
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one.
        access: who may do what. Without a password, a new token is required, which the printed link contains.
        runs_dir: the folder of the artifacts and checkpoints.
        certificate: for HTTPS; None serves plain HTTP.

    Raises:
        SettingError: other machines can reach the address and there is no password, or the address cannot be listened on.
    """
    if not access.is_restricted:
        if not is_loopback(host):
            raise SettingError(
                f"anyone who can reach {host}:{port} could delete studies: set HPO_DASHBOARD_PASSWORD to the password that "
                "the dashboard requires, or keep --host 127.0.0.1"
            )
        access = replace(access, token=secrets.token_urlsafe(24))
    if certificate is not None:
        certificate.check()
    app = build_app(database, access=access, runs_dir=runs_dir)
    stopped = threading.Event()
    publisher = threading.Thread(target=publish_repeatedly, args=(database, runs_dir, stopped), daemon=True)
    with listen(host, port) as listener, _logged():
        address = f"[{host}]" if ":" in host else host
        scheme = "http" if certificate is None else "https"
        link = f"{scheme}://{address}:{listener.getsockname()[1]}/"
        link += f"?token={access.token}" if access.token else ""
        print(f"{link} shows {database.url}; Ctrl-C stops it", flush=True)
        if certificate is None and not is_loopback(host):
            logger.warning("passwords and results travel in plain text: --certfile serves HTTPS")
        publisher.start()
        with contextlib.suppress(KeyboardInterrupt):
            build_server(app, certificate).run(sockets=[listener])
        stopped.set()


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """Print what the guards log, such as refusals and deletions, with the time."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record)).replace("\n", " ")


def build_app(database: Database, *, access: Access = OPEN, runs_dir: RunsDir) -> Starlette:
    """Return the dashboard with its guards, as an ASGI application.

    Args:
        database: the database with the studies.
        access: who may do what. Without a password, only a loopback name is accepted as Host.
        runs_dir: the folder of the artifacts.
    """
    from optuna.artifacts import FileSystemArtifactStore
    from optuna_dashboard import wsgi

    from storage.optuna_internals import ShownStorage

    runs_dir.artifacts.mkdir(parents=True, exist_ok=True)
    # It has Optuna's cache: a response with 5,000 ended trials takes 2 s with it and 10 s without.
    storage = ShownStorage(database.optuna_storage, show_trial)
    dashboard = wsgi(storage, artifact_store=FileSystemArtifactStore(runs_dir.artifacts))
    # With a password, any Host is safe: after DNS rebinding, the browser does not send the password to the other name.
    has_password = access.password or access.reader_password
    return protect(dashboard, access=access, allowed_hosts=("*",) if has_password else LOOPBACK_HOSTS)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        SettingError: this machine does not have the address, or the port is in use or not permitted.
    """
    if not 0 <= port < 2**16:  # Python's own check comes later and leaves the socket open
        raise SettingError(f"cannot listen on port {port}: --port is a number from 0 to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server((address[0], port), family=family)
    except socket.gaierror as error:
        reason = str(error.strerror)
    except OSError as error:
        reason = os.strerror(error.errno or 0)  # the error's own text repeats the address
    raise SettingError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port")


def build_server(app: Starlette, certificate: Certificate | None = None) -> uvicorn.Server:
    """Return a server for `run(sockets=[...])`. Setting `should_exit`, Ctrl-C and SIGTERM stop it."""
    # The timeout is short because browsers keep their connections open.
    options: dict[str, Any] = {"ws": "none", "lifespan": "off", "timeout_graceful_shutdown": 1}
    options |= {"http": PatientH11Protocol, "limit_concurrency": MAX_CONNECTIONS}
    # uvicorn believes what 127.0.0.1 says in X-Forwarded-For and X-Forwarded-Proto, but every user of this machine is there.
    options |= {"proxy_headers": False}
    if certificate is not None:
        options |= {"ssl_certfile": certificate.certfile, "ssl_keyfile": certificate.keyfile}
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, **options))


def publish_repeatedly(database: Database, runs_dir: RunsDir, stopped: threading.Event) -> None:
    """Publish all studies, and again after each interval, until stopped."""
    while not stopped.is_set():
        started = time.monotonic()
        with contextlib.suppress(Exception):  # such as a database that is down: the next round tries again
            for study in all_studies(database):
                publish(study, runs_dir)
        # Reading a large study takes seconds of CPU time: at most 5 % of the time is spent on it.
        stopped.wait(max(PUBLISH_INTERVAL_SECONDS, 20 * (time.monotonic() - started)))
