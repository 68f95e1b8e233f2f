"""An arbiter of a few lines, ours or a stock one, that says each word when its test lets it: for races that a
real one leaves to chance. It runs in a native thread of the test's process."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gunicorn.dirty import protocol
from gunicorn.dirty.tlv import TLVEncoder

from gunicorn_dirty_gevent.core import values, wire

from .waiting import wait_until

_STOCK_KINDS = frozenset((wire.REQUEST, wire.STASH, protocol.MSG_TYPE_STATUS))
SEND_SECONDS = 10.0


class Run(NamedTuple):
    """A call that came."""

    action: str
    args: list[Any]
    connection: int  # the first one is 1


class FakeArbiter:
    """Listens at `path` until `close()`. Its actions, which are of any app:

    * ``echo(value, ...)`` answers with the value at once; ``hold(value)`` at the next `release()`. (A small
      value: this arbiter does not read while it sends.)
    * ``count(n)`` is a stream of n chunks; ``first(value)`` one of a single chunk, which has no end.
    * ``later(n)`` is a stream of n chunks: the first at once, the others when `release()` has been called.
    * ``hang_up()`` closes its connection.

    Lists grow only, and may be read by any thread.
    """

    def __init__(
        self,
        path: str,
        *,
        stock: bool = False,
        greets: bool = True,
        accepts: bool = True,
        backlog: int = 128,
    ) -> None:
        self.path = path
        self.stock = stock
        self.greets = greets
        """Whether it answers HELLO and STATUS; see `greet`."""
        self.reads = True
        """Whether it reads at all; see `read`."""
        self.runs: list[Run] = []
        self.opened: list[int] = []
        """Connections that it has accepted."""
        self.gone: list[int] = []
        """Connections that the client has closed."""
        self.hellos: list[int] = []
        self.asked: list[int] = []
        """Connections that asked for its STATUS."""
        self.cancelled: list[int] = []
        """The ids of CANCEL frames."""
        self.broken: list[str] = []
        """What no client should send."""
        self._ungreeted: list[Callable[[], None]] = []
        self._held: deque[Callable[[], None]] = deque()
        self._jobs: deque[Callable[[], None] | None] = deque()
        self._connections: set[_Connection] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(SEND_SECONDS)
        self._listener.bind(path)
        self._listener.listen(backlog)
        self._wakes, self._wake = os.pipe()
        self._selector = selectors.DefaultSelector()
        if accepts:  # else see `accept`
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wakes, selectors.EVENT_READ, self._work)
        self.thread = threading.Thread(target=self._serve, name="fake-arbiter", daemon=True)
        self.thread.start()

    # What a test does.

    def accept(self) -> None:
        """Take the first connection, and those after it."""

        def accept() -> None:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

        self._do(accept)

    def greet(self) -> None:
        """Answer each HELLO and STATUS, also those that wait for it."""

        def greet() -> None:
            self.greets = True
            self._answer_all(self._ungreeted)

        self._do(greet)

    def release(self) -> None:
        """Answer each ``hold`` that has come by now."""
        for _ in range(len(self._held)):
            self._do(self._held.popleft())

    def read(self, reads: bool) -> None:
        """Stop reading, or go on. It has stopped when this returns."""

        def change() -> None:
            self.reads = reads
            for connection in self._connections:
                self._watch(connection)
            done.set()

        done = threading.Event()
        self._do(change)
        assert done.wait(10)

    def settle(self) -> None:
        """Return when all that it was told has been done."""
        done = threading.Event()
        self._do(done.set)
        assert done.wait(10)

    @property
    def open(self) -> int:
        """How many connections neither side has closed."""
        return len(self._connections)

    def ran(self, action: str, *, value: object = None) -> int:
        """How many calls of an action have come (with this first argument)."""
        return sum(
            run.action == action and (value is None or run.args[:1] == [value]) for run in list(self.runs)
        )

    def left(self) -> set[int]:
        """Connections that neither side has closed. (A stock one hangs up on hellos.)"""
        return set(self.opened) - {*self.gone, *(self.hellos if self.stock else ())}

    def wait(self, predicate: Callable[[], Any], what: str, seconds: float = 10) -> None:
        wait_until(predicate, seconds, what, self.evidence)

    def evidence(self) -> str:
        names = ("opened", "gone", "hellos", "asked", "cancelled", "broken")
        lines = [f"{name}: {getattr(self, name)[-20:]}" for name in names]
        runs = [f"{run.action} on {run.connection}" for run in self.runs[-20:]]
        return "\n".join([*lines, f"ran: {runs}"])

    def close(self) -> None:
        """End, and all its connections."""
        if self.thread.is_alive():
            self._do(None)
            self.thread.join(10)
            assert not self.thread.is_alive(), "the fake arbiter hangs"

    # Its thread.

    def _do(self, job: Callable[[], None] | None) -> None:
        self._jobs.append(job)
        with contextlib.suppress(OSError):  # closed beside
            os.write(self._wake, b".")

    def _work(self) -> None:
        os.read(self._wakes, 1)
        job = self._jobs.popleft()
        if job is None:
            raise SystemExit
        job()

    def _serve(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select():
                    key.data()
        except SystemExit:
            pass
        finally:
            for connection in list(self._connections):
                connection.close()
            self._selector.close()
            self._listener.close()
            os.close(self._wakes)
            os.close(self._wake)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        self.opened.append(len(self.opened) + 1)
        connection = _Connection(self, sock, len(self.opened))
        self._connections.add(connection)
        self._watch(connection)

    def _watch(self, connection: _Connection) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(connection.sock)
        if self.reads and connection.open:
            self._selector.register(connection.sock, selectors.EVENT_READ, connection.read)

    def _answer_all(self, waiting: list[Callable[[], None]]) -> None:
        answers = waiting[:]
        waiting.clear()
        for answer in answers:
            answer()


class _Connection:
    def __init__(self, arbiter: FakeArbiter, sock: socket.socket, number: int) -> None:
        self.arbiter = arbiter
        self.sock = sock
        self.sock.settimeout(SEND_SECONDS)
        self.number = number
        self.open = True
        self.started = b""
        self.version = 1 if arbiter.stock else wire.VERSION
        if arbiter.stock:
            self.decoder = wire.FrameDecoder(1 << 30, version=1, kinds=_STOCK_KINDS)
        else:
            self.decoder = wire.FrameDecoder(1 << 30)

    def close(self) -> None:
        if self.open:
            self.open = False
            self.arbiter._connections.discard(self)
            self.arbiter._watch(self)
            self.sock.close()

    def read(self) -> None:
        if not (self.open and self.arbiter.reads):  # no more, since this turn began
            return
        try:
            data = self.sock.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            self.arbiter.gone.append(self.number)
            self.close()
            return
        if self.arbiter.stock and len(self.started) < 3:
            self.started = (self.started + data)[:3]
            if self.started == wire.MAGIC + bytes([wire.VERSION]):
                self.arbiter.hellos.append(self.number)  # and a stock one hangs up on it
                self.close()
                return
        try:
            self.decoder.receive_data(data)
            for frame in self.decoder.frames():
                self.take(frame)
        except (wire.WireError, values.UndecodableValue) as error:
            self.arbiter.broken.append(str(error))
            self.close()

    def send(self, kind: int, call_id: int, value: object = None) -> None:
        if not self.open:
            return
        if not self.arbiter.stock:
            payload = b"" if kind == wire.END else values.dumps(value)
        elif kind == wire.END:
            payload = TLVEncoder.encode({})
        else:
            payload = TLVEncoder.encode({"data" if kind == wire.CHUNK else "result": value})
        self.send_frame(wire.pack_frame(kind, call_id, payload, version=self.version))

    def send_frame(self, frame: bytes) -> None:
        try:
            if self.open:
                self.sock.sendall(frame)
        except OSError:
            pass  # what is read says that the client has gone

    def take(self, frame: wire.Frame) -> None:
        arbiter, call_id = self.arbiter, frame.call_id
        assert isinstance(frame.payload, bytes)
        if frame.kind == wire.HELLO:
            arbiter.hellos.append(self.number)
            self.greet(lambda: self.send_frame(wire.pack_hello(1 << 30)))
        elif frame.kind == protocol.MSG_TYPE_STATUS and arbiter.stock:
            arbiter.asked.append(self.number)
            self.greet(lambda: self.send(wire.RESPONSE, call_id, {"workers": []}))
        elif frame.kind == wire.CANCEL:
            arbiter.cancelled.append(call_id)
        elif frame.kind == wire.REQUEST:
            if arbiter.stock:
                told = TLVEncoder.decode_full(frame.payload)
                self.run(call_id, told["action"], told["args"])
            else:
                request = wire.unpack_request(frame.payload)
                assert isinstance(request.body, memoryview)
                self.run(call_id, request.action, values.loads_call(request.body)[0])

    def greet(self, answer: Callable[[], None]) -> None:
        if self.arbiter.greets:
            answer()
        else:
            self.arbiter._ungreeted.append(answer)

    def run(self, call_id: int, action: str, args: list[Any]) -> None:
        # First, for a test that sees the run may call `release`.
        if action == "hold":
            self.arbiter._held.append(lambda: self.send(wire.RESPONSE, call_id, args[0]))
        elif action == "later":
            self.arbiter._held.append(lambda: self.send_rest(call_id, args[0]))
        self.arbiter.runs.append(Run(action, args, self.number))
        if action == "count":
            for number in range(args[0]):
                self.send(wire.CHUNK, call_id, number)
            self.send(wire.END, call_id)
        elif action == "later":
            self.send(wire.CHUNK, call_id, 0)
        elif action == "first":
            self.send(wire.CHUNK, call_id, args[0])
        elif action == "hang_up":
            self.close()
        elif action != "hold":
            self.send(wire.RESPONSE, call_id, args[0] if args else None)

    def send_rest(self, call_id: int, n: int) -> None:
        for number in range(1, n):
            self.send(wire.CHUNK, call_id, number)
        self.send(wire.END, call_id)


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """In the block this process can open nothing."""
    gc.collect()  # what is closed later would make room
    free = os.dup(0)
    os.close(free)  # the lowest, so the next one
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
