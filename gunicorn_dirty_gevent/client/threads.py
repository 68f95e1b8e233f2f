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
from collections.abc import Callable

from ..core.mux import Call, Mux, Phase, nobody
from ..core.wire import Detached, FrameDecoder, Parts, Payload, WireError
from .stock import StockChannel, probe

READ_SIZE = 262144
"""Bytes per read, as in `gunicorn_dirty_gevent.link`."""

_HERE = os.path.dirname(os.path.dirname(__file__))

_warned = False

RETRY_PAUSE = 0.05
"""Seconds until the next try when a connection ended before the arbiter said hello."""


class ThreadChannel:
    """See `client.channels.Channel`. Used by the threads of one process."""

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path
        self.stock: StockChannel | None = None
        self._mux = Mux(socket_path)
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._flushed = 0

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
            made = StockChannel(self.socket_path, _unix_socket, threading.BoundedSemaphore, self._lost_stock)
            with self._lock:
                self.stock = self.stock or made  # other threads find out at the same time
        return self.stock

    def _lost_stock(self) -> None:
        self.stock = None  # the next one may be of either kind

    def spawn(self, run: Callable[[], None]) -> None:
        threading.Thread(target=run, name="dirty-call", daemon=True).start()

    def event(self) -> threading.Event:
        return threading.Event()

    def take_chunk(self, call: Call) -> Payload:
        with self._lock:
            payload, credit = self._mux.take_chunk(call)
            if credit is not None:
                self._send(credit)
        return payload

    def cancel(self, call: Call) -> None:
        with self._lock:
            parts = self._mux.cancel(call)
            if parts is not None:
                self._send(parts)

    def drop(self, call: Call) -> None:
        # A finalizer may run in a thread that holds the lock.
        threading.Thread(target=self.cancel, args=(call,), daemon=True).start()

    def close(self) -> None:
        stock = self.stock
        if stock is not None:
            stock.close()
        with self._lock:
            sock, self._sock = self._sock, None
            if sock is not None:
                self._shut(sock)
                self._mux.lost("this client closed the connection", self._flushed)
            self._mux.refuse("this client closed the connection")

    def forget(self) -> None:
        """Never called: this channel is no single thread's."""

    def abandon(self) -> None:
        self.stock = None
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    # The connection; all of it under the lock.

    def _connect(self) -> None:
        sock = _unix_socket()
        try:
            sock.connect(self.socket_path)
        except OSError as error:
            sock.close()
            self._mux.refuse(f"cannot connect: {error.strerror or error}")
            return
        self._sock = sock
        self._flushed = 0
        self._send(self._mux.connected())
        name = "dirty-client"
        threading.Thread(target=self._read, args=(sock,), name=name, daemon=True).start()

    def _send(self, parts: Parts) -> None:
        """The arbiter always reads, so this never waits for long."""
        sock = self._sock
        try:
            for part in parts:
                assert not isinstance(part, Detached)  # our mux makes none
                view = memoryview(part)
                while view and sock is not None:
                    sent = sock.send(view)
                    self._flushed += sent
                    view = view[sent:]
        except OSError:
            pass  # the reader finds the end, after what the arbiter had still to say

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
            self._mux.lost(reason, self._flushed)
        if not greeted:
            time.sleep(RETRY_PAUSE)
        with self._lock:
            if self._mux.waiting and self._mux.phase is Phase.DOWN:
                self._connect()


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
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
