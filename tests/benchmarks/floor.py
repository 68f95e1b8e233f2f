"""The floor: the least that processes on gevent can do to call each other. No library would be below.

Unix sockets, a 12-byte header (length, id), ormsgpack bodies, calls multiplexed by id, everything in
the hub's callbacks, and the sends of one read batched into one. No deadlines, no greenlet per task, no
errors, no streams, no bounds.

As a program: ``floor.py serve PATH`` answers "add" and "echo"; ``floor.py relay PATH SERVER...`` passes
calls on to servers in turn. Either prints "ready" and ends when its stdin does. ``floor.py pipe SIZE COUNT``
prints how many seconds it takes to copy SIZE bytes to another process and back, through pipes.
"""

from __future__ import annotations

import _socket
import itertools
import os
import struct
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gevent
from gevent.hub import Waiter
from ormsgpack import packb, unpackb

HEADER = struct.Struct(">IQ")
READ_SIZE = 262144

OnFrame = Callable[["Link", int, bytes], None]


class Link:
    """A framed socket. What is sent while some link reads goes out, joined, when the read is done."""

    reading = False
    unsent: list[Link] = []

    def __init__(self, sock: _socket.socket, on_frame: OnFrame) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.on_frame = on_frame
        self.parts: list[bytes] = []
        self.size = 0
        self.needed = HEADER.size
        self.out: list[bytes | memoryview] = []
        loop = gevent.get_hub().loop
        self.reader = loop.io(sock.fileno(), 1)
        self.writer = loop.io(sock.fileno(), 2)
        self.reader.start(self.readable)

    def send(self, call_id: int, body: bytes) -> None:
        self.out.append(HEADER.pack(len(body), call_id) + body)
        if len(self.out) > 1:
            return
        if Link.reading:
            Link.unsent.append(self)
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
        self.parts.append(data)
        self.size += len(data)
        if self.size < self.needed:
            return
        Link.reading = True
        self.split(b"".join(self.parts))
        Link.reading = False
        for link in Link.unsent:
            link.flush()
        Link.unsent.clear()

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


class Client:
    """Many greenlets, one link."""

    def __init__(self, path: str) -> None:
        self.waiters: dict[int, Any] = {}
        self.ids = itertools.count(1)
        self.link = Link(connect(path), self.answered)

    def execute(self, action: str, *args: Any) -> Any:
        call_id = next(self.ids)
        waiter = self.waiters[call_id] = Waiter()
        self.link.send(call_id, packb((action, args)))
        return unpackb(waiter.get())

    def answered(self, link: Link, call_id: int, body: bytes) -> None:
        self.waiters.pop(call_id).switch(body)


class Relay:
    """Passes calls on under ids of its own, to one server after the other."""

    def __init__(self, servers: list[str]) -> None:
        self.pending: dict[int, tuple[Link, int]] = {}
        self.ids = itertools.count(1)
        self.servers = itertools.cycle([Link(connect(path), self.answered) for path in servers])

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


def serve(path: str, on_frame: OnFrame) -> None:
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(16)
    links: list[Link] = []

    def accept() -> None:
        descriptor, _ = listener._accept()  # type: ignore[attr-defined]
        links.append(Link(_socket.socket(fileno=descriptor), on_frame))

    hub = gevent.get_hub()
    accepter = hub.loop.io(listener.fileno(), 1)
    accepter.start(accept)
    parent = hub.loop.io(sys.stdin.fileno(), 1)
    parent.start(partial(os._exit, 0))
    print("ready", flush=True)
    hub.join()


def copy(size: int, count: int) -> None:
    theirs, out = os.pipe()
    back, other = os.pipe()
    if os.fork() == 0:
        os.close(out)
        os.close(back)
        while data := read(theirs, size):
            write(other, data)
        os._exit(0)
    value = bytes(size)
    for _ in range(count):
        started = time.perf_counter()
        write(out, value)
        got = read(back, size)
        print(time.perf_counter() - started, flush=True)
        assert len(got) == size
    os.close(out)
    os.wait()


def write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def read(descriptor: int, size: int) -> bytes:
    parts, left = [], size
    while left and (part := os.read(descriptor, min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


if __name__ == "__main__":
    _, role, own_path, *others = sys.argv
    if role == "pipe":
        copy(int(own_path), int(others[0]))
        sys.exit()
    serve(own_path, Relay(others).asked if role == "relay" else answer)
