"""`client.stock` for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..core import faults
from ..core.mux import Call, Why, nobody
from ..core.wire import FrameDecoder, Payload
from .stock import (
    MAX_IDLE,
    MAX_OPEN,
    PROBE_TIME,
    READ_SIZE,
    STATUS_REQUEST,
    Unencodable,
    decoder,
    is_stock,
    request,
    take,
)

READ_AHEAD = 16
"""Chunks that a stream's connection is read ahead of its reader; beyond, the kernel's buffers fill and
the arbiter waits."""


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.decoder: FrameDecoder = decoder()

    @property
    def is_fresh(self) -> bool:
        return not self.reader.at_eof() and not self.writer.is_closing()


class StockLoopChannel:
    """One connection for each call in flight; a task of each call reads it."""

    def __init__(self, socket_path: str, lost: Callable[[], None]) -> None:
        self.socket_path = socket_path
        self._lost = lost
        self._room = asyncio.Semaphore(MAX_OPEN)
        self._idle: list[_Connection] = []
        self._tasks: dict[Call, asyncio.Task[None]] = {}
        self._taken: dict[Call, asyncio.Event] = {}

    def start(self, call: Call) -> None:
        self._taken[call] = asyncio.Event()
        self._tasks[call] = task = asyncio.get_running_loop().create_task(self._run(call))
        # Not in the task, which may be cancelled before it has begun.
        task.add_done_callback(lambda _: self._forget(call))

    def _forget(self, call: Call) -> None:
        self._tasks.pop(call, None)
        self._taken.pop(call, None)
        if not call.done:
            self._say_lost(call, "the task that carried it was cancelled")
            call.notify()

    def _say_lost(self, call: Call, why: str) -> None:
        sent = call.id != 0
        call.fault = faults.connection_lost(call.app, call.action, why, sent, self.socket_path)

    async def wait(self, call: Call, seconds: float) -> None:
        await wait_for_news(call, seconds)

    def take_chunk(self, call: Call) -> Payload:
        payload = call.chunks.popleft()
        if call in self._taken:
            self._taken[call].set()
        return payload

    def cancel(self, call: Call, why: Why | None = None) -> None:
        call.give_up(why)
        self._stop(call)

    def _stop(self, call: Call) -> None:
        task = self._tasks.get(call)
        if task is not None:
            task.cancel()
            call.notify()

    def drop(self, call: Call) -> None:
        """`cancel`, from a finalizer."""
        task = self._tasks.get(call)
        if task is not None and not task.get_loop().is_closed():
            task.get_loop().call_soon_threadsafe(self.cancel, call)

    def close(self) -> None:
        for call in list(self._tasks):
            if not call.done:
                self._say_lost(call, "this client closed the connection")
            self._stop(call)
        while self._idle:
            self._idle.pop().writer.close()

    async def _run(self, call: Call) -> None:
        connection = None
        try:
            data = request(call)
            async with self._room:
                connection = await self._connection()
                call.id = 1
                connection.writer.write(data)
                await self._read(connection, call)
        except Unencodable as error:
            message = f"{call.app}.{call.action} was not sent: {error}"
            call.fault = faults.fault("DirtyEncodeError", message, may_have_run=False)
        except Exception as error:  # of the connection, or of bytes that are no answer
            self._lost()
            if not call.done:
                self._say_lost(call, str(error) or type(error).__name__)
        finally:
            if connection is not None:
                self._give_back(connection, whole=call.last is not None)
            call.notify()

    async def _read(self, connection: _Connection, call: Call) -> None:
        while call.last is None:
            while len(call.chunks) > READ_AHEAD:
                self._taken[call].clear()
                await self._taken[call].wait()
            data = await connection.reader.read(READ_SIZE)
            if not data:
                raise ConnectionResetError("the other side closed the connection")
            connection.decoder.receive_data(data)
            for frame in connection.decoder.frames():
                last = take(call, frame)
                if last is not None and not call.done:
                    call.last = last
            call.notify()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_fresh:
                return connection
            connection.writer.close()
            self._lost()
        return _Connection(*await asyncio.open_unix_connection(self.socket_path))

    def _give_back(self, connection: _Connection, *, whole: bool) -> None:
        if whole and len(self._idle) < MAX_IDLE and connection.is_fresh:
            self._idle.append(connection)
        else:
            connection.writer.close()


async def wait_for_news(call: Call, seconds: float) -> None:
    """Wait until something has arrived for the call, or the time is up."""
    arrived = asyncio.get_running_loop().create_future()
    call.notify = lambda: None if arrived.done() else arrived.set_result(None)
    try:
        # Not `asyncio.wait_for`: before Python 3.12 it swallows a cancellation that comes together
        # with the news, and a browser that has left would be read for to the end.
        await asyncio.wait((arrived,), timeout=None if seconds == float("inf") else seconds)
    finally:
        call.notify = nobody


async def probe(socket_path: str, seconds: float) -> bool:
    """Whether a stock arbiter answers there."""
    asking = asyncio.ensure_future(_ask(socket_path))
    try:
        await asyncio.wait((asking,), timeout=min(seconds, PROBE_TIME))  # see `wait_for_news`
        # Not there, or nothing that can be read: the next look may tell.
        return asking.done() and asking.exception() is None and asking.result()
    finally:
        asking.cancel()


async def _ask(socket_path: str) -> bool:
    reader, writer = await asyncio.open_unix_connection(socket_path)
    try:
        writer.write(STATUS_REQUEST)
        frames = decoder()
        while data := await reader.read(READ_SIZE):
            frames.receive_data(data)
            for frame in frames.frames():
                return is_stock(frame)
        return False
    finally:
        writer.close()
