"""`client.stock.StockChannel` with threads: a call that is ended beside while its own thread works on it."""

from __future__ import annotations

import math
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from gunicorn.dirty import protocol

from gunicorn_dirty_gevent.client.stock import MAX_OPEN, StockChannel
from gunicorn_dirty_gevent.core import values, wire
from gunicorn_dirty_gevent.core.mux import Call


def nothing(sock: socket.socket) -> None:
    pass


def beside(run: Callable[[], None]) -> None:
    pytest.fail("nobody dropped a call")


class Arbiter:
    """A socket that listens, and a channel to it whose sockets say when they connect, send and read."""

    def __init__(self, path: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()
        self.on_connect: Callable[[socket.socket], None] = nothing
        self.on_send: Callable[[socket.socket], None] = nothing
        self.on_read: Callable[[socket.socket], None] = nothing
        self.made: list[socket.socket] = []
        self.lost = 0
        self.channel = StockChannel(
            path, self._make_socket, threading.BoundedSemaphore, beside, self._on_lost
        )

    def _on_lost(self) -> None:
        self.lost += 1

    def _make_socket(self) -> socket.socket:
        arbiter = self

        class Socket(socket.socket):
            def connect(self, address: Any) -> None:
                arbiter.on_connect(self)
                super().connect(address)

            def sendall(self, data: Any, flags: int = 0) -> None:
                arbiter.on_send(self)
                super().sendall(data, flags)

            def recv(self, size: int, flags: int = 0) -> bytes:
                arbiter.on_read(self)
                return super().recv(size, flags)

        self.made.append(Socket(socket.AF_UNIX))
        return self.made[-1]

    def check_nothing_left(self) -> None:
        assert all(sock.fileno() == -1 for sock in self.made)
        assert not self.channel._busy
        assert self.channel._room._value == MAX_OPEN  # type: ignore[attr-defined]

    def close(self) -> None:
        self.channel.close()
        self.listener.close()


@pytest.fixture
def arbiter() -> Iterator[Arbiter]:
    with tempfile.TemporaryDirectory() as directory:
        made = Arbiter(os.path.join(directory, "arbiter.sock"))
        yield made
        made.close()


def a_call() -> Call:
    return Call("tasks:App", "echo", values.dumps_call((), {}), math.inf, False, wire.REQUEST)


def test_cancelled_while_it_connects(arbiter: Arbiter) -> None:
    call = a_call()
    arbiter.on_connect = lambda sock: arbiter.channel.cancel(call)
    arbiter.on_send = lambda sock: pytest.fail("sent")
    arbiter.channel.start(call)
    assert call.fault is not None and call.fault["details"]["may_have_run"] is False
    arbiter.check_nothing_left()


def test_cancelled_while_it_is_sent(arbiter: Arbiter) -> None:
    call = a_call()
    arbiter.on_send = lambda sock: arbiter.channel.cancel(call)  # and so closed
    arbiter.channel.start(call)
    assert call.fault is not None and "cancelled" in call.fault["message"]
    assert call.fault["details"]["may_have_run"] is True
    arbiter.check_nothing_left()
    assert arbiter.lost == 0  # that connection said nothing of the arbiter


def test_cancelled_while_it_is_read(arbiter: Arbiter) -> None:
    call = a_call()
    arbiter.channel.start(call)
    arbiter.on_read = lambda sock: arbiter.channel.cancel(call)
    arbiter.channel.wait(call, 10)
    assert call.fault is not None and "cancelled" in call.fault["message"]
    arbiter.check_nothing_left()
    assert arbiter.lost == 0


def test_a_connection_that_another_still_reads_is_not_kept(arbiter: Arbiter) -> None:
    """Two threads wait for the same call: the second would take the next call's answer."""
    call = a_call()
    arbiter.channel.start(call)
    accepted, _ = arbiter.listener.accept()
    accepted.sendall(protocol.BinaryProtocol.encode_response(1, "mine"))

    def read_within(sock: socket.socket) -> None:
        arbiter.on_read = nothing
        arbiter.channel.wait(call, 10)

    arbiter.on_read = read_within
    arbiter.channel.wait(call, 10)
    accepted.close()
    assert call.last is not None and call.fault is None
    arbiter.check_nothing_left()


def test_a_socket_in_use_is_closed_when_its_user_leaves_it(arbiter: Arbiter) -> None:
    """Its descriptor's number may be another's by the time that a thread comes to the kernel with it."""
    call, seen = a_call(), []

    def cancel(sock: socket.socket) -> None:
        arbiter.channel.cancel(call)
        seen.append(sock.fileno())

    arbiter.on_send = cancel
    arbiter.channel.start(call)
    assert seen != [-1]
    arbiter.check_nothing_left()


def test_a_connection_that_cannot_be_made(arbiter: Arbiter) -> None:
    arbiter.listener.close()
    call = a_call()
    arbiter.channel.start(call)
    assert call.fault is not None and call.fault["error_type"] == "DirtyConnectionError"
    assert call.fault["details"]["may_have_run"] is False
    arbiter.check_nothing_left()
    assert arbiter.lost == 1


def test_an_end_from_outside_while_it_connects(arbiter: Arbiter) -> None:
    def interrupt(sock: socket.socket) -> None:
        raise KeyboardInterrupt

    arbiter.on_connect = interrupt
    with pytest.raises(KeyboardInterrupt):
        arbiter.channel.start(a_call())
    arbiter.check_nothing_left()


def test_a_connection_that_is_lost(arbiter: Arbiter) -> None:
    call = a_call()
    arbiter.channel.start(call)
    accepted, _ = arbiter.listener.accept()
    accepted.close()
    arbiter.channel.wait(call, 10)
    assert call.fault is not None and call.fault["details"]["may_have_run"] is True
    arbiter.check_nothing_left()
    assert arbiter.lost == 1
