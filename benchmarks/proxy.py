"""A TCP proxy on 127.0.0.1 whose network can be interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # of SO_LINGER: close sends RST


class Proxy:
    """Forwards connections to a port of this machine. It runs when the constructor returns.

    Args:
        target: the port to forward to.

    Attributes:
        port: where it listens.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._requests = asyncio.Event()  # set while they are forwarded
        self._answers = asyncio.Event()
        self._requests.set()
        self._answers.set()
        # The loop runs in its own thread from the start: the caller's thread may have a running loop already.
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(timeout=10)
        self.port: int = self._server.sockets[0].getsockname()[1]

    def swallow(self, *, only_answers: bool = False) -> None:
        """Forward nothing any more, in either direction, and connect no one.

        Args:
            only_answers: still forward what clients send, such as a COMMIT.
        """

        def clear() -> None:
            self._answers.clear()
            if not only_answers:
                self._requests.clear()

        self._loop.call_soon_threadsafe(clear)

    def recover(self) -> None:
        """Forward again, beginning with everything that arrived meanwhile, as TCP does when packets are lost for a while."""
        self._loop.call_soon_threadsafe(self._open)

    def reset(self) -> None:
        """Drop what was not forwarded, reset all connections, and accept new ones."""

        def cut() -> None:
            self._cut()
            self._open()

        self._loop.call_soon_threadsafe(cut)

    def close(self) -> None:
        """Reset all connections and stop listening."""

        async def end() -> None:
            self._server.close()
            self._cut()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _open(self) -> None:
        self._requests.set()
        self._answers.set()

    def _cut(self) -> None:
        for writer in self._writers:
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = {writer}
        self._writers |= ends
        try:
            await self._requests.wait()
            if writer.transport.is_closing():  # cut while it waited
                return
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
            ends.add(server_writer)
            self._writers |= ends
            # When one side ends, both do: PostgreSQL's protocol has no half-closed connections.
            pumps = [
                asyncio.ensure_future(_pump(reader, server_writer, self._requests)),
                asyncio.ensure_future(_pump(server_reader, writer, self._answers)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # the server does not listen, or the proxy is closed: asyncio logs tasks that end as cancelled
        finally:
            for end in ends:
                end.close()
            self._writers -= ends
            self._tasks.discard(task)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            await gate.wait()
            writer.write(data)
            await writer.drain()
