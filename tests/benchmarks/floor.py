"""The floor: bare gevent processes that call each other over Unix sockets.

A 12-byte header (length, id), ormsgpack bodies, calls multiplexed by id. No deadlines, no greenlet per
task, no errors, no streams, no bounds. Of two kinds:

* ``sockets``: gevent's sockets as one uses them: a greenlet reads, whoever has something sends it.
* ``callbacks``: everything in the hub's callbacks, and the sends of one read joined to one. The least that
  processes on gevent can do; no library would be below.

As a program: ``floor.py KIND serve PATH`` answers "add" and "echo"; ``floor.py KIND relay PATH SERVER...``
passes calls on to servers in turn. Either prints "ready" and ends when its stdin does.
"""

from __future__ import annotations

import _socket
import itertools
import os
import struct
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import gevent
import gevent.socket
from gevent.event import AsyncResult
from gevent.hub import Waiter
from gevent.lock import BoundedSemaphore
from ormsgpack import packb, unpackb

HEADER = struct.Struct(">IQ")
READ_SIZE = 262144

OnFrame = Callable[["Link", int, bytes], None]


class Link:
    """A framed socket."""

    def __init__(self, on_frame: OnFrame) -> None:
        self.on_frame = on_frame
        self.parts: list[bytes] = []
        self.size = 0
        self.needed = HEADER.size

    def send(self, call_id: int, body: bytes) -> None:
        raise NotImplementedError

    def received(self, data: bytes) -> None:
        self.parts.append(data)
        self.size += len(data)
        if self.size >= self.needed:
            self.split(b"".join(self.parts))

    def split(self, data: bytes) -> None:
        at = 0
        self.needed = HEADER.size
        while len(data) - at >= HEADER.size:
            length, call_id = HEADER.unpack_from(data, at)
            start = at + HEADER.size
            if len(data) - start < length:
                self.needed = HEADER.size + length
                break
            at = start + length
            self.on_frame(self, call_id, data[start:at])
        self.parts = [data[at:]]
        self.size = len(data) - at


class SocketLink(Link):
    """On a gevent socket."""

    def __init__(self, sock: _socket.socket, on_frame: OnFrame) -> None:
        super().__init__(on_frame)
        self.sock = gevent.socket.socket(fileno=sock.detach())
        self.sending = BoundedSemaphore()
        gevent.spawn(self.read)

    def send(self, call_id: int, body: bytes) -> None:
        with self.sending:
            self.sock.sendall(HEADER.pack(len(body), call_id) + body)

    def read(self) -> None:
        while data := self.sock.recv(READ_SIZE):
            self.received(data)


class CallbackLink(Link):
    """In the hub's callbacks. What is sent while some link reads goes out, joined, when the read is done."""

    reading = False
    unsent: list[CallbackLink] = []

    def __init__(self, sock: _socket.socket, on_frame: OnFrame) -> None:
        super().__init__(on_frame)
        sock.setblocking(False)
        self.sock = sock
        self.out: list[bytes | memoryview] = []
        loop = gevent.get_hub().loop
        self.reader = loop.io(sock.fileno(), 1)
        self.writer = loop.io(sock.fileno(), 2)
        self.reader.start(self.readable)

    def send(self, call_id: int, body: bytes) -> None:
        self.out.append(HEADER.pack(len(body), call_id) + body)
        if len(self.out) > 1:
            return
        if CallbackLink.reading:
            CallbackLink.unsent.append(self)
        else:
            self.flush()

    def flush(self) -> None:
        data = self.out[0] if len(self.out) == 1 else b"".join(self.out)
        self.out.clear()
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self.out.append(memoryview(data)[sent:])
            self.writer.start(self.writable)

    def writable(self) -> None:
        self.writer.stop()
        self.flush()

    def readable(self) -> None:
        data = self.sock.recv(READ_SIZE)
        if not data:
            self.reader.stop()
            return
        CallbackLink.reading = True
        self.received(data)
        CallbackLink.reading = False
        for link in CallbackLink.unsent:
            link.flush()
        CallbackLink.unsent.clear()


class Kind(NamedTuple):
    link: Callable[[_socket.socket, OnFrame], Link]
    waiter: Callable[[], Any]
    wake: str  # the waiter's method


KINDS = {
    "sockets": Kind(SocketLink, AsyncResult, "set"),
    "callbacks": Kind(CallbackLink, Waiter, "switch"),  # from the hub only
}


class Client:
    """Many greenlets, one link."""

    def __init__(self, kind: Kind, path: str) -> None:
        self.new_waiter, self.wake = kind.waiter, kind.wake
        self.waiters: dict[int, Any] = {}
        self.ids = itertools.count(1)
        self.link = kind.link(connect(path), self.answered)

    def execute(self, action: str, *args: Any) -> Any:
        call_id = next(self.ids)
        waiter = self.waiters[call_id] = self.new_waiter()
        self.link.send(call_id, packb((action, args)))
        return unpackb(waiter.get())

    def answered(self, link: Link, call_id: int, body: bytes) -> None:
        getattr(self.waiters.pop(call_id), self.wake)(body)


class Relay:
    """Passes calls on under ids of its own, to one server after the other."""

    def __init__(self, kind: Kind, servers: list[str]) -> None:
        self.pending: dict[int, tuple[Link, int]] = {}
        self.ids = itertools.count(1)
        self.servers = itertools.cycle([kind.link(connect(path), self.answered) for path in servers])

    def asked(self, link: Link, call_id: int, body: bytes) -> None:
        own_id = next(self.ids)
        self.pending[own_id] = link, call_id
        next(self.servers).send(own_id, body)

    def answered(self, link: Link, own_id: int, body: bytes) -> None:
        client, call_id = self.pending.pop(own_id)
        client.send(call_id, body)


def answer(link: Link, call_id: int, body: bytes) -> None:
    action, args = unpackb(body)
    link.send(call_id, packb(args[0] + args[1] if action == "add" else args[0]))


def connect(path: str) -> _socket.socket:
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    sock.connect(path)
    return sock


def serve(kind: Kind, path: str, on_frame: OnFrame) -> None:
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(16)
    links: list[Link] = []

    def accept() -> None:
        descriptor, _ = listener._accept()  # type: ignore[attr-defined]
        links.append(kind.link(_socket.socket(fileno=descriptor), on_frame))

    hub = gevent.get_hub()
    accepter = hub.loop.io(listener.fileno(), 1)
    accepter.start(accept)
    parent = hub.loop.io(sys.stdin.fileno(), 1)
    parent.start(partial(os._exit, 0))
    print("ready", flush=True)
    hub.join()


if __name__ == "__main__":
    _, kind_name, role, own_path, *others = sys.argv
    own_kind = KINDS[kind_name]
    serve(own_kind, own_path, Relay(own_kind, others).asked if role == "relay" else answer)
