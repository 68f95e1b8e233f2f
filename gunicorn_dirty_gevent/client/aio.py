"""The client's asyncio side: the same connection with many calls, waited for with `await`."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
import weakref
from functools import partial
from typing import Any

from ..core.mux import Call, Mux, Phase, Why
from ..core.wire import Detached, FrameDecoder, Parts, Payload, WireError
from . import stock_loop
from .reach import RETRY_PAUSE, connected
from .results import expire, wait_time
from .stock_loop import StockLoopChannel
from .stock_loop import wait_for_news as _wait


class LoopChannel(asyncio.Protocol):
    """Like `client.channels.Channel`, for the tasks of one event loop."""

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path
        self.stock: StockLoopChannel | None = None
        self._stock = StockLoopChannel(socket_path, self._lost_stock)
        self._mux = Mux(socket_path)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._decoder = FrameDecoder(0xFFFFFFFF)
        self._connecting: asyncio.Task[None] | None = None
        self._written = 0
        self._sock: socket.socket | None = None

    def start(self, call: Call) -> None:
        parts = self._mux.submit(call, time.monotonic())
        if parts is not None:
            self._write(parts)
        elif self._mux.phase is Phase.DOWN and self._connecting is None:
            self._connect_soon()
        self._move_on()

    def _move_on(self) -> None:
        if self._mux.moves_on and self._transport is not None:
            self._transport.close()

    async def wait(self, call: Call, seconds: float) -> None:
        """Wait until something has arrived for the call, or the time is up."""
        await _wait(call, seconds)

    async def find_stock(self, seconds: float) -> StockLoopChannel | None:
        """Find out whether the arbiter there is a stock one."""
        if self.stock is None and await stock_loop.probe(self.socket_path, seconds):
            self.stock = self._stock
        return self.stock

    def _lost_stock(self) -> None:
        self.stock = None  # the next one may be of either kind

    def take_chunk(self, call: Call) -> Payload:
        payload, credit = self._mux.take_chunk(call)
        if credit is not None:
            self._write(credit)
        return payload

    def cancel(self, call: Call, why: Why | None = None) -> None:
        parts = self._mux.cancel(call, why)
        if parts is not None:
            self._write(parts)
        self._stock.cancel(call, why)

    def withdraw(self, call: Call) -> bool:
        return self._mux.withdraw(call)

    def drop(self, call: Call) -> None:
        """`cancel`, from a finalizer."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.cancel, call)

    def close(self) -> None:
        self._stock.close()
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        transport = self._transport
        if transport is not None:
            self.connection_lost(None)
            transport.abort()  # close() would yet send what is said not to have run
        self._mux.refuse("this client closed the connection")

    def abort(self) -> None:
        """The loop is closed, and can't close the connection any more."""
        if self._sock is not None:
            self._sock.close()

    # The connection.

    def _connect_soon(self, pause: float = 0.0) -> None:
        self._connecting = self._loop.create_task(self._connect(pause))
        # Not in the task, which may be cancelled before it has begun.
        self._connecting.add_done_callback(self._connect_ended)

    def _connect_ended(self, task: asyncio.Task[None]) -> None:
        if self._connecting is not task:  # `close` was there
            return
        self._connecting = None
        if task.cancelled():
            self._mux.refuse("cannot connect: the task that does it was cancelled")
        elif task.exception() is not None:
            self._mux.refuse(f"cannot connect: {task.exception()!r}")
        elif self._mux.waiting and self._transport is None:  # lost since
            self._connect_soon(RETRY_PAUSE)

    async def _connect(self, pause: float) -> None:
        """Until the waiting calls have a connection, or are refused."""
        while self._mux.waiting and self._transport is None:
            if pause:
                await asyncio.sleep(pause)
            pause = RETRY_PAUSE
            try:
                # Not by the loop's `sock_connect`, which takes a full backlog for a connection under way.
                sock = connected(partial(socket.socket, socket.AF_UNIX), self.socket_path)
                if sock is not None:
                    self._sock = sock
                    await self._loop.create_unix_connection(lambda: self, sock=sock)
            except OSError as error:
                self._mux.refuse(f"cannot connect: {error.strerror or error}")

    def _write(self, parts: Parts) -> None:
        if self._transport is not None:
            for part in parts:
                assert not isinstance(part, Detached)  # our mux makes none
                self._transport.write(part)
                self._written += len(part)

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._decoder = FrameDecoder(0xFFFFFFFF)
        self._written = 0
        self._write(self._mux.connected())

    def data_received(self, data: bytes) -> None:
        try:
            self._decoder.receive_data(data)
            now = time.monotonic()
            while frames := self._decoder.frames():
                for frame in frames:
                    for parts in self._mux.receive(frame, now):
                        self._write(parts)
            self._move_on()
        except WireError as error:
            if self._transport is not None:
                self._transport.abort()
            self.connection_lost(error)

    def connection_lost(self, error: Exception | None) -> None:
        transport, self._transport = self._transport, None
        if transport is None:
            return
        greeted = self._mux.phase is not Phase.GREETING
        flushed = self._written - transport.get_write_buffer_size()
        self._mux.lost(str(error or "the connection was closed"), flushed)
        if self._mux.waiting and self._connecting is None and not self._loop.is_closed():
            self._connect_soon(0.0 if greeted else RETRY_PAUSE)


_channels: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, LoopChannel]]
_channels = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # loops come and go in several threads


def get(socket_path: str) -> LoopChannel:
    """The channel of the running loop."""
    with _lock:
        ended = [_channels.pop(loop) for loop in list(_channels) if loop.is_closed()]
        mine = _channels.setdefault(asyncio.get_running_loop(), {})
    for channels in ended:
        # `asyncio.run` ended without a close_async(): nobody else closes the connection.
        for left in channels.values():
            left.abort()
    channel = mine.get(socket_path)
    if channel is None:
        channel = mine[socket_path] = LoopChannel(socket_path)
    return channel


async def perform(channel: LoopChannel, call: Call, timeout: float | None) -> None:
    """`channels.perform` for asyncio."""
    carrier: LoopChannel | StockLoopChannel = channel.stock or channel
    try:
        carrier.start(call)
        while not call.done:
            seconds = wait_time(call)
            if seconds <= 0:
                expire(carrier, call, timeout, channel.socket_path)
                break
            await carrier.wait(call, seconds)
            if call.unheard:
                carrier = await switched(channel, call)
    finally:
        if not call.done:
            carrier.cancel(call)


async def switched(channel: LoopChannel, call: Call) -> LoopChannel | StockLoopChannel:
    """`channels.switched` for asyncio."""
    call.unheard = False
    if call.done or call.id:
        return channel
    stock = await channel.find_stock(wait_time(call))
    if stock is None or not channel.withdraw(call):
        return channel
    stock.start(call)
    return stock


def release(socket_path: str) -> None:
    """Close the running loop's channel; the next call makes another."""
    with _lock:
        channel = _channels.get(asyncio.get_running_loop(), {}).pop(socket_path, None)
    if channel is not None:
        channel.close()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # a thread that is not here may hold the parent's


os.register_at_fork(after_in_child=_after_fork_in_child)
