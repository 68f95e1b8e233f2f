"""The channel without gevent: threads wait on locks, one reader thread hands out the answers.

Under eventlet's monkey patching the same code is cooperative: its threads are greenlets.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable

from ..core.mux import Call, Mux, Phase, Why, nobody
from ..core.wire import Detached, FrameDecoder, Parts, Payload, WireError
from .reach import RETRY_PAUSE, connected
from .stock import StockChannel, is_foreign, probe

READ_SIZE = 262144
"""Bytes per read, as in `gunicorn_dirty_gevent.link`."""

_HERE = os.path.dirname(os.path.dirname(__file__))

_warned = False


class ThreadChannel:
    """See `client.channels.Channel`. Used by the threads of one process."""

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path
        self.stock: StockChannel | None = None
        self._stock = StockChannel(
            socket_path,
            _unix_socket,
            threading.BoundedSemaphore,
            self.beside,
            self._lost_stock,
            lambda: self._lock,
        )
        self._mux = Mux(socket_path)
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._flushed = 0
        self._outbox: deque[memoryview] = deque()
        self._retrying = False

    def start(self, call: Call) -> None:
        with self._lock:
            parts = self._mux.submit(call, time.monotonic())
            if parts is not None:
                self._send(parts)
            elif self._mux.phase is Phase.DOWN and not call.done:
                self._connect()
            self._move_on()

    def _move_on(self) -> None:
        if self._mux.moves_on and self._sock is not None:
            self._shut(self._sock)

    def wait(self, call: Call, seconds: float) -> None:
        _warn_in_coroutine()
        arrived = threading.Event()
        call.notify = arrived.set
        try:
            if not (call.chunks or call.done):  # it may have come before we looked
                arrived.wait(min(seconds, threading.TIMEOUT_MAX))
        finally:
            call.notify = nobody

    def find_stock(self, seconds: float) -> StockChannel | None:
        if self.stock is None and probe(self.socket_path, _unix_socket, seconds):
            self.stock = self._stock
        return self.stock

    def _lost_stock(self) -> None:
        self.stock = None  # the next one may be of either kind

    def withdraw(self, call: Call) -> bool:
        with self._lock:
            return self._mux.withdraw(call)

    def spawn(self, run: Callable[[], None]) -> None:
        self.beside(run)

    def beside(self, run: Callable[[], None]) -> None:
        threading.Thread(target=run, name="dirty-call", daemon=True).start()

    def event(self) -> threading.Event:
        return threading.Event()

    def take_chunk(self, call: Call) -> Payload:
        with self._lock:
            payload, credit = self._mux.take_chunk(call)
            if credit is not None:
                self._send(credit)
        return payload

    def cancel(self, call: Call, why: Why | None = None) -> None:
        with self._lock:
            parts = self._mux.cancel(call, why)
            if parts is not None:
                self._send(parts)
        self._stock.cancel(call, why)

    def drop(self, call: Call) -> None:
        # A finalizer may run in a thread that holds the lock.
        self.beside(lambda: self.cancel(call))

    def close(self) -> None:
        self._stock.close()
        with self._lock:
            sock, self._sock = self._sock, None
            self._outbox.clear()
            if sock is not None:
                self._shut(sock)
                self._mux.lost("this client closed the connection", self._flushed)
            self._mux.refuse("this client closed the connection")

    def forget(self) -> None:
        """Never called: this channel is no single thread's."""

    def abandon(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self._outbox.clear()
        self._lock = threading.Lock()  # a thread that is not here may hold the parent's
        self._mux.abandon()
        self._stock.abandon()

    # The connection; all of it under the lock, but for `_retry`, which takes it.

    def _connect(self) -> None:
        try:
            sock = connected(_unix_socket, self.socket_path)
        except OSError as error:
            self._mux.refuse(f"cannot connect: {error.strerror or error}")
            return
        if sock is None:
            self._connect_later()
            return
        sock.setblocking(True)
        try:
            name = "dirty-client"
            threading.Thread(target=self._read, args=(sock,), name=name, daemon=True).start()
        except RuntimeError as error:  # this process has too many
            sock.close()
            self._mux.refuse(f"cannot connect: {error}")
            return
        self._sock = sock
        self._flushed = 0
        self._send(self._mux.connected())

    def _connect_later(self) -> None:
        if not self._retrying:
            try:
                self._retrying = True
                self.beside(self._retry)
            except RuntimeError as error:  # this process has too many threads
                self._retrying = False
                self._mux.refuse(f"cannot connect: {error}")

    def _retry(self) -> None:
        time.sleep(RETRY_PAUSE)
        with self._lock:
            self._retrying = False
            if self._mux.waiting and self._mux.phase is Phase.DOWN:
                self._connect()

    def _send(self, parts: Parts) -> None:
        """The arbiter always reads, so this never waits for long.

        What a caller was kept from sending (its time was up, it was killed) the next one sends first: a frame
        of which a part is out must be followed by its rest, not by another's.
        """
        sock = self._sock
        if sock is None:
            return
        for part in parts:
            assert not isinstance(part, Detached)  # our mux makes none
            self._outbox.append(memoryview(part))
        flushed = self._flushed
        try:
            while self._outbox:
                part = self._outbox[0]
                self._flushed = flushed + len(part)  # until the kernel says how much it has taken
                sent = sock.send(part)
                self._flushed = flushed = flushed + sent
                if sent < len(part):
                    self._outbox[0] = part[sent:]
                else:
                    self._outbox.popleft()
        except BaseException as error:
            if isinstance(error, OSError) and not is_foreign(error):
                # The reader finds the end, after what the arbiter had still to say.
                self._flushed = flushed
            elif type(sock).__module__ == "socket":
                # A signal handler's exception: the kernel may have bytes that nobody has counted.
                self._shut(sock)
                raise
            else:  # a greenlet's, which came while it waited
                self._flushed = flushed
                raise

    def _shut(self, sock: socket.socket) -> None:
        try:
            sock.shutdown(socket.SHUT_RDWR)  # wakes the reader, which closes it
        except OSError:
            pass

    # The reader thread.

    def _read(self, sock: socket.socket) -> None:
        decoder = FrameDecoder(0xFFFFFFFF)
        reason = "the other side closed the connection"
        try:
            while data := sock.recv(READ_SIZE):
                decoder.receive_data(data)
                with self._lock:
                    if sock is not self._sock:
                        break  # closed meanwhile; the mux may be on the next one
                    now = time.monotonic()
                    while frames := decoder.frames():
                        for frame in frames:
                            for parts in self._mux.receive(frame, now):
                                self._send(parts)
                    self._move_on()
        except (OSError, WireError) as error:
            reason = str(error)
        self._lost(sock, reason)

    def _lost(self, sock: socket.socket, reason: str) -> None:
        with self._lock:
            sock.close()
            if sock is not self._sock:
                return
            greeted = self._mux.phase is not Phase.GREETING
            self._sock = None
            self._outbox.clear()
            self._mux.lost(reason, self._flushed)
            if self._mux.waiting and greeted:
                self._connect()
            elif self._mux.waiting:
                self._connect_later()


def _warn_in_coroutine() -> None:
    """Once, where a wait blocks an event loop. (eventlet's hub may be one: it waits there as it should.)"""
    global _warned
    running = getattr(
        sys.modules.get("asyncio"), "_get_running_loop", None
    )  # where it has been imported whole
    if _warned or running is None or "eventlet" in sys.modules or running() is None:
        return
    _warned = True
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        "a dirty call in a coroutine keeps its event loop from running until the answer is there: use "
        "execute_async(), stream_async() and, for the stash, stash.client().aget() and its like",
        RuntimeWarning,
        stacklevel=level,
    )


def _unix_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(None)  # whatever socket.setdefaulttimeout() says
    return sock
