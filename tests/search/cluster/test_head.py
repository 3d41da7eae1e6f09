"""A cluster whose head ends, is restarted, or answers no more: sockets on this machine stand in for it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from hpo.search.cluster import head as module
from hpo.search.cluster.head import ASK_SECONDS, PATIENCE_SECONDS, Head
from tests.factories import wait_until


class FakeServer:
    """Listens at an address. It can be ended, and started again at the same address."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._socket.getsockname()
        self.identity: object = "first"

    def end(self) -> None:
        """End it, with its connections."""
        self.drop_connection()
        self._socket.close()

    def drop_connection(self) -> None:
        """Close the oldest connection that was made, as a server does with one over which nothing is asked."""
        self._socket.accept()[0].close()

    def restart(self, identity: object) -> None:
        self._socket = socket.create_server(self.address)
        self.identity = identity

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def node() -> Iterator[FakeServer]:
    node = FakeServer()
    yield node
    node.close()


@pytest.fixture
def head(server: FakeServer, node: FakeServer) -> Iterator[Head]:
    head = Head(server.address, node.address, lambda: server.identity, is_durable=True)
    assert (head.look(), head.is_away) == ("", False)
    yield head
    head.close()


def _wait_until_away(head: Head) -> None:
    def is_away() -> bool:
        assert head.look() == ""
        return head.is_away

    wait_until(is_away)


def test_a_head_that_comes_back_with_what_it_knew_is_fine(head: Head, server: FakeServer) -> None:
    server.end()
    _wait_until_away(head)
    server.restart("first")
    assert (head.look(), head.is_away) == ("", False)


def test_a_head_that_has_forgotten_the_cluster_must_not_be_asked(head: Head, server: FakeServer) -> None:
    server.end()
    _wait_until_away(head)
    server.restart("second")
    for _ in range(2):
        assert head.look() == "the head of the Ray cluster was restarted, and has forgotten the cluster"
        assert head.is_away


def test_a_head_that_is_away_for_too_long_has_ended(
    head: Head, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    server.end()
    while not head.is_away:
        assert head.look() == ""
    now[0] += PATIENCE_SECONDS - 1
    assert head.look() == ""
    now[0] += 1
    assert head.look().startswith("the head of the Ray cluster has not answered for 40 s: [Errno 111]")


@pytest.mark.parametrize("is_durable", [True, False])
def test_a_head_whose_machine_has_lost_its_network_is_asked_and_given_up(
    server: FakeServer, node: FakeServer, monkeypatch: pytest.MonkeyPatch, is_durable: bool
) -> None:
    """Its connection stays open."""
    now, asked = [100.0], [0]

    def ask() -> str:
        asked[0] += 1
        if now[0] > 100 + ASK_SECONDS:
            raise RuntimeError("Deadline Exceeded")
        return "first"

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    head = Head(server.address, node.address, ask, is_durable=is_durable)
    for _ in range(3):
        assert (head.look(), head.is_away, asked) == ("", False, [2])
    now[0] += ASK_SECONDS + 1
    assert (head.look(), head.is_away) == ("", True)
    now[0] += PATIENCE_SECONDS
    assert head.look() == "the head of the Ray cluster has not answered for 40 s: Deadline Exceeded"
    head.close()


def test_without_a_database_a_head_that_has_ended_is_not_waited_for(server: FakeServer, node: FakeServer) -> None:
    """As soon as another one listens in its place, Ray would end this process."""
    head = Head(server.address, node.address, lambda: "first", is_durable=False)
    server.end()
    wait_until(lambda: head.look() == "the head of the Ray cluster has ended")
    head.close()


def test_a_connection_that_a_head_closes_is_made_again(head: Head, server: FakeServer) -> None:
    server.drop_connection()
    for _ in range(3):
        assert (head.look(), head.is_away) == ("", False)


def test_the_node_of_the_driver_must_stay(head: Head, node: FakeServer) -> None:
    node.end()
    wait_until(lambda: head.look() == "the node of the Ray cluster on this machine has ended")
