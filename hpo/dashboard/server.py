"""Serves optuna-dashboard on the storage, and keeps its plots, notes and artifacts up to date."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from hpo.dashboard.guards import LOOPBACK_HOSTS, is_loopback, protect
from hpo.dashboard.publishing import publish
from hpo.errors import SettingError
from hpo.paths import RunsDir
from storage.studies import all_studies

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from storage.database import Database

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

    def _close_if_unfinished(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


def serve(database: Database, host: str, port: int, *, password: str | None, runs_dir: RunsDir) -> None:
    """Serve the dashboard until interrupted.

    Args:
        database: the database with the studies.
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one.
        password: required by HTTP Basic authentication; None requires none.
        runs_dir: the folder of the artifacts and checkpoints.

    Raises:
        SettingError: other machines can reach the address and there is no password, or the address cannot be listened on.
    """
    if password is None and not is_loopback(host):
        raise SettingError(
            f"anyone who can reach {host}:{port} could delete studies: set HPO_DASHBOARD_PASSWORD to the password that the "
            "dashboard requires, or keep --host 127.0.0.1"
        )
    app = build_app(database, password=password, runs_dir=runs_dir)
    stopped = threading.Event()
    publisher = threading.Thread(target=publish_repeatedly, args=(database, runs_dir, stopped), daemon=True)
    with listen(host, port) as listener:
        address = f"[{host}]" if ":" in host else host
        print(f"http://{address}:{listener.getsockname()[1]}/ shows {database.url}; Ctrl-C stops it", flush=True)
        publisher.start()
        with contextlib.suppress(KeyboardInterrupt):
            build_server(app).run(sockets=[listener])
        stopped.set()


def build_app(database: Database, *, password: str | None, runs_dir: RunsDir) -> Starlette:
    """Return the dashboard with its guards, as an ASGI application.

    Args:
        database: the database with the studies.
        password: required by HTTP Basic authentication; None requires none, and accepts only a loopback name as Host.
        runs_dir: the folder of the artifacts.
    """
    from optuna.artifacts import FileSystemArtifactStore
    from optuna.storages import get_storage
    from optuna_dashboard import wsgi

    runs_dir.artifacts.mkdir(parents=True, exist_ok=True)
    # `get_storage` adds Optuna's cache: a response with 5,000 ended trials takes 2 s with it and 10 s without.
    dashboard = wsgi(get_storage(database.optuna_storage), artifact_store=FileSystemArtifactStore(runs_dir.artifacts))
    # With a password, any Host is safe: after DNS rebinding, the browser does not send the password to the other name.
    return protect(dashboard, password=password, allowed_hosts=LOOPBACK_HOSTS if password is None else ("*",))


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


def build_server(app: Starlette) -> uvicorn.Server:
    """Return a server for `run(sockets=[...])`. Setting `should_exit`, Ctrl-C and SIGTERM stop it."""
    # The timeout is short because browsers keep their connections open.
    options: dict[str, Any] = {"ws": "none", "lifespan": "off", "timeout_graceful_shutdown": 1}
    options |= {"http": PatientH11Protocol, "limit_concurrency": MAX_CONNECTIONS}
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
