"""The chunks of a stream, for `for` and for `async for`."""

from __future__ import annotations

import time
from typing import Any

from ..core import faults, wire
from ..core.mux import Call
from . import aio, channels
from .results import decode, expire, result, wait_time

DEFAULT_IDLE_TIMEOUT = 30.0
"""Seconds between two chunks of a stream; gunicorn's default."""

_END = object()


class _Stream:
    """What both kinds have in common: a call that is made when the first chunk is asked for."""

    def __init__(
        self, client: Any, app_path: str, action: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._client = client
        self._request = (app_path, action, args, kwargs)
        self._call: Call | None = None
        self._channel: Any = None
        self._ended = False
        self._idle, self._idle_option = client.idle_timeout, "idle_timeout"
        if self._idle is None:
            self._idle = DEFAULT_IDLE_TIMEOUT
            if client.timeout is not None and client.timeout <= self._idle:
                self._idle, self._idle_option = client.timeout, "timeout"

    def _started(self) -> Call:
        if self._call is None:
            app_path, action, args, kwargs = self._request
            self._call = self._client._call(app_path, action, args, kwargs, stream=True)
            self._channel = self._find_channel()
            self._channel.start(self._call)
        return self._call

    def _find_channel(self) -> Any:
        raise NotImplementedError

    def _take(self, call: Call) -> Any:
        """What has arrived: a chunk, the value of an action that is none, or `_END`."""
        if call.chunks:
            try:
                payload = self._channel.take_chunk(call)
            except IndexError:  # another thread has closed it, just now
                return _END
            return decode(payload, call)
        self._ended = True
        if call.last is not None and call.last.kind == wire.END:
            return _END
        return result(call)

    def _wait_time(self, call: Call, idle_at: float) -> float:
        """Seconds until the stream or its next chunk is late. When one of them is, the call is ended."""
        seconds = wait_time(call)
        idle = idle_at - time.monotonic()
        if seconds <= 0:
            expire(self._channel, call, self._client.timeout, self._client.socket_path)
        elif idle <= 0:
            self._channel.cancel(call, self._idle_fault)
        return max(min(seconds, idle), 0.0)

    def _idle_fault(self, sent: bool) -> faults.Fault:
        app, action, _, _ = self._request
        return faults.idle_stream(app, action, self._idle, sent=sent, option=self._idle_option)

    def _end(self) -> None:
        self._ended = True
        if self._channel is not None and self._call is not None:
            if not self._call.done:
                self._channel.cancel(self._call)
            self._call.chunks.clear()

    def __del__(self) -> None:
        channel, call = getattr(self, "_channel", None), getattr(self, "_call", None)
        if channel is not None and call is not None and not call.done and not self._ended:
            channel.drop(call)


class DirtyStream(_Stream):
    """The chunks of one stream, in order. An iterator; also a context manager that closes it."""

    def _find_channel(self) -> channels.Carrier:
        channel = channels.get(self._client)
        return channel.stock or channel

    def __iter__(self) -> DirtyStream:
        return self

    def __next__(self) -> Any:
        if self._ended:
            raise StopIteration
        try:
            call = self._started()
            idle_at = time.monotonic() + self._idle
            while not (call.chunks or call.done or self._ended):
                self._channel.wait(call, self._wait_time(call, idle_at))
                if call.unheard:
                    self._channel = channels.switched(self._channel, call)
            if self._ended:  # another greenlet or thread has closed it
                raise StopIteration
            chunk = self._take(call)
        except BaseException:
            # Also when the reader is killed while it waits: there is no one to come back.
            self._end()
            raise
        if chunk is _END:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """End the stream: the generator in the worker is closed, its `finally` blocks run."""
        self._end()

    def __enter__(self) -> DirtyStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class DirtyAsyncStream(_Stream):
    """`DirtyStream` for ``async for`` and ``async with``."""

    def _find_channel(self) -> Any:
        channel = aio.get(self._client.socket_path)
        return channel.stock or channel

    def __aiter__(self) -> DirtyAsyncStream:
        return self

    async def __anext__(self) -> Any:
        if self._ended:
            raise StopAsyncIteration
        try:
            call = self._started()
            idle_at = time.monotonic() + self._idle
            while not (call.chunks or call.done or self._ended):
                await self._channel.wait(call, self._wait_time(call, idle_at))
                if call.unheard:
                    self._channel = await aio.switched(self._channel, call)
            if self._ended:  # another task has closed it
                raise StopAsyncIteration
            chunk = self._take(call)
        except BaseException:
            self._end()
            raise
        if chunk is _END:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """End the stream: the generator in the worker is closed, its `finally` blocks run."""
        self._end()

    async def __aenter__(self) -> DirtyAsyncStream:
        return self

    async def __aexit__(self, *error: object) -> None:
        self._end()
