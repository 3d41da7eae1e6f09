"""Whether the head of a Ray cluster is still there. Does not import ray.

Ray ends a driver, with a page of its log, when the head has been away for a minute. If another head answers in its place,
the first call does so at once: without a database, a head that was restarted knows nothing of the cluster before.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

CONNECT_SECONDS = 3.0  # within which a head answers
ASK_SECONDS = 10.0  # between two questions to a head that seems to be there
PATIENCE_SECONDS = 40.0  # how long a head may be away; Ray ends the driver after 60 s


class Head:
    """Looks after the head of a cluster that was joined, and the node of Ray next to the driver.

    A connection to each is held: it ends as soon as they do, long before a restarted one listens. That of a machine that has
    lost its power or its network stays open, so the head is also asked from time to time.

    Args:
        address: host and port of the head.
        node: host and port of the driver's node, which nothing replaces.
        read_id: returns the identity of the cluster at the head's address now, without Ray's own connection.
        is_durable: whether a head that is restarted knows the cluster before, because it has a database.
    """

    def __init__(
        self, address: tuple[str, int], node: tuple[str, int], read_id: Callable[[], object], *, is_durable: bool
    ) -> None:
        self._address = address
        self._is_durable = is_durable
        self._node = node
        self._read_id = read_id
        self._identity = read_id()
        self._connections: dict[tuple[str, int], socket.socket] = {}
        self._away_since: float | None = None
        self._ask_at = time.monotonic() + ASK_SECONDS
        self._lost = ""
        self.look()

    @property
    def is_away(self) -> bool:
        """Whether nothing must be asked of the cluster now."""
        return self._away_since is not None

    def look(self) -> str:
        """Return why the cluster is lost permanently; empty while it is not. Takes seconds if a machine does not answer."""
        self._lost = self._lost or self._find_loss()
        return self._lost

    def _find_loss(self) -> str:
        if not self._listens(self._node):
            return "the node of the Ray cluster on this machine has ended"
        started = time.monotonic()
        try:
            if not self._is_connected(self._address):
                self._away_since = self._away_since or started
                self._connect(self._address)
            if self._away_since is not None or started >= self._ask_at:
                if self._read_id() != self._identity:
                    return "the head of the Ray cluster was restarted, and has forgotten the cluster"
                self._ask_at = time.monotonic() + ASK_SECONDS
            self._away_since = None
        except Exception as error:  # noqa: BLE001 # of the connection, or of Ray
            if isinstance(error, ConnectionRefusedError) and not self._is_durable:
                return "the head of the Ray cluster has ended"
            self._away_since = self._away_since or started
            if time.monotonic() - self._away_since >= PATIENCE_SECONDS:
                return f"the head of the Ray cluster has not answered for {PATIENCE_SECONDS:g} s: {_first_line(error)}"
        return ""

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def _listens(self, address: tuple[str, int]) -> bool:
        """Return False if a process has ended; a machine that is busy may not answer."""
        try:
            if not self._is_connected(address):
                self._connect(address)
        except ConnectionRefusedError:
            return False
        except OSError:
            pass
        return True

    def _connect(self, address: tuple[str, int]) -> None:
        connection = socket.create_connection(address, CONNECT_SECONDS)
        connection.setblocking(False)
        self._connections[address] = connection

    def _is_connected(self, address: tuple[str, int]) -> bool:
        """Return whether a connection is open. A server also closes one over which nothing is asked, after a while."""
        connection = self._connections.get(address)
        if connection is None:
            return False
        try:
            while connection.recv(4096):  # a server may say something first
                pass
        except BlockingIOError:
            return True
        except OSError:
            pass
        self._connections.pop(address).close()
        return False


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
