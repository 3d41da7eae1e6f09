"""A server that speaks the protocol of S3, in this process: moto's. It can go away, and come back with what it had."""

from __future__ import annotations

import itertools
import urllib.request

from moto.server import ThreadedMotoServer

_numbers = itertools.count()


class S3Server:
    """The server.

    Attributes:
        endpoint: its address, for AWS_ENDPOINT_URL.
    """

    def __init__(self) -> None:
        self._server = self._start(0)
        host, self._port = self._server.get_host_and_port()
        self.endpoint = f"http://{host}:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "SecretOfTheBucket",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def create_bucket(self) -> str:
        """Return the URL of a folder in a new bucket."""
        name = f"bucket{next(_numbers)}"
        self._request("PUT", name)
        return f"s3://{name}/runs"

    def refuse(self, *, everything: bool) -> None:
        """Refuse the keys of all clients, or accept them again."""
        self._request("POST", "moto-api/reset-auth", b"0" if everything else b"1000000")

    def stop(self) -> None:
        """Go away: nothing listens any more."""
        self._server.stop()
        assert self._server._server is not None
        self._server._server.server_close()

    def start(self) -> None:
        """Come back, at the same address."""
        self._server = self._start(self._port)

    @staticmethod
    def _start(port: int) -> ThreadedMotoServer:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        server.start()
        return server

    def _request(self, method: str, path: str, content: bytes | None = None) -> None:
        request = urllib.request.Request(
            f"{self.endpoint}/{path}", content, {"Content-Type": "text/plain"}, method=method
        )
        urllib.request.urlopen(request).close()
