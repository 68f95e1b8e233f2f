"""The client: what a view holds. Waits without blocking others, whatever the worker class.

`DirtyClient` is a light handle. The connection behind it is shared by all handles of the process
(under gevent: of the hub) that name the same socket, see `client.channels`.
"""

from __future__ import annotations

import copy
import math
import time
from typing import Any

from gunicorn.dirty.client import DirtyClient as _StockClient

from ..core import faults, values, wire
from ..core.faults import Fault
from ..core.mux import Call
from ..errors import (
    DirtyEncodeError,
    DirtyError,
    DirtyProtocolError,
    error_from_fault,
)
from . import channels

REPLY_GRACE = 0.5
"""Seconds past its deadline that a call which was sent waits for the arbiter's own word: it knows
whether the call had been started. Only an arbiter that does not answer makes a caller wait for it."""

DEFAULT_IDLE_TIMEOUT = 30.0
"""Seconds between two chunks of a stream; gunicorn's default."""


class DirtyClient(_StockClient):  # type: ignore[misc]
    """A client of the dirty arbiter.

    Has gunicorn's constructor and methods. May be used from any greenlet or thread at the same time,
    and after a fork. `timeout`, in seconds, is for a whole call or stream, queueing included; None
    is no limit (the action's own, ``dirty_timeout``, still holds). The default is gunicorn's.
    """

    def __init__(self, socket_path: str, timeout: float | None = 30.0) -> None:
        super().__init__(socket_path, timeout)
        self.timeout = _checked("timeout", timeout)
        self.idle_timeout: float | None = None

    def options(self, **options: float | None) -> DirtyClient:
        """A client like this one with other settings, for one call or to keep::

            client.options(timeout=5).execute("tasks:ImageApp", "thumbnail", data)

        `timeout`: as in the constructor. `idle_timeout`: seconds a stream waits for its next chunk
        (default: `timeout`, at most 30, gunicorn's rule). The settings stand apart from the call, so
        no keyword of an action is taken. Raises TypeError for an unknown option and ValueError for a
        time that is not a positive number.
        """
        other = copy.copy(self)
        for name, value in options.items():
            if name not in ("timeout", "idle_timeout"):
                raise TypeError(f"options() has no {name!r}; it takes timeout and idle_timeout")
            setattr(other, name, _checked(name, value))
        return other

    def connect(self) -> None:
        """Nothing to do: the connection is made when a call needs it. Kept for gunicorn's API."""

    def close(self) -> None:
        """Let go of the connection. It is closed when no other client of this process holds it."""
        channels.release(self)

    def execute(self, app_path: str, action: str, *args: Any, **kwargs: Any) -> Any:
        """Run an action of a dirty app and return its result.

        Raises `DirtyAppError` when the action does, `DirtyTimeoutError`, `DirtyWorkerDiedError`,
        `DirtyOverloadedError`, `DirtyConnectionError`, `DirtyEncodeError` (see
        `gunicorn_dirty_gevent.errors`); the attribute `may_have_run` says whether the action may
        have been started. If the waiting greenlet is killed or its `gevent.Timeout` fires, the call
        is cancelled.
        """
        call = self._call(app_path, action, args, kwargs, stream=False)
        channel = channels.get(self)
        try:
            channel.start(call)
            while not call.done:
                seconds = _wait_time(call)
                if seconds <= 0 or not channel.wait(call, seconds):
                    raise self._timed_out(call)
        finally:
            if not call.done:
                channel.cancel(call)
        return _result(call)

    def stream(self, app_path: str, action: str, *args: Any, **kwargs: Any) -> DirtyStream:
        """Run an action that returns a generator; iterate over its chunks as they come.

        The request is sent at the first `next()`. Closing or dropping the iterator closes the
        generator in the worker. Errors as for `execute`; one in mid-stream is raised after the
        chunks before it. An action that returns a plain value gives it as the only chunk.
        """
        return DirtyStream(self, app_path, action, args, kwargs)

    def _call(
        self,
        app_path: str,
        action: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        stream: bool,
    ) -> Call:
        try:
            body = values.dumps_call(args, kwargs)
            deadline = math.inf if self.timeout is None else time.monotonic() + self.timeout
            wire.pack_envelope(app_path, action, 0.0)
        except (values.UnencodableValue, ValueError, AttributeError) as error:
            message = f"{app_path}.{action} was not sent: {error}"
            refusal = DirtyEncodeError(message)
            refusal.may_have_run = False
            raise refusal from error
        return Call(app_path, action, body, deadline, stream)

    def _timed_out(self, call: Call) -> DirtyError:
        return error_from_fault(
            faults.no_answer(call.app, call.action, self.timeout, self.socket_path, sent=call.id != 0)
        )


class DirtyStream:
    """The chunks of one stream, in order. An iterator; also a context manager that closes it."""

    def __init__(
        self,
        client: DirtyClient,
        app_path: str,
        action: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._client = client
        self._request = (app_path, action, args, kwargs)
        self._call: Call | None = None
        self._channel: channels.Channel | None = None
        self._ended = False
        idle = client.idle_timeout
        self._idle = min(DEFAULT_IDLE_TIMEOUT, client.timeout or math.inf) if idle is None else idle

    def __iter__(self) -> DirtyStream:
        return self

    def __next__(self) -> Any:
        if self._ended:
            raise StopIteration
        try:
            call, channel = self._started()
            while not call.chunks and not call.done:
                self._wait(call, channel)
            if call.chunks:
                return _decode(channel.take_chunk(call), call)
            self._ended = True
            if call.last is not None and call.last.kind == wire.END:
                raise StopIteration
            return _result(call)
        except BaseException:
            # Also when the reader is killed while it waits: there is no one to come back.
            self.close()
            raise

    def _started(self) -> tuple[Call, channels.Channel]:
        if self._call is None or self._channel is None:
            app_path, action, args, kwargs = self._request
            self._call = self._client._call(app_path, action, args, kwargs, stream=True)
            self._channel = channels.get(self._client)
            self._channel.start(self._call)
        return self._call, self._channel

    def _wait(self, call: Call, channel: channels.Channel) -> None:
        seconds = _wait_time(call)
        if seconds <= 0:
            raise self._client._timed_out(call)
        if not channel.wait(call, min(seconds, self._idle)):
            if seconds <= self._idle:
                raise self._client._timed_out(call)
            fault = faults.idle_stream(call.app, call.action, self._idle, sent=call.id != 0)
            raise error_from_fault(fault)

    def close(self) -> None:
        """End the stream: the generator in the worker is closed, its `finally` blocks run."""
        self._ended = True
        if self._channel is not None and self._call is not None:
            if not self._call.done:
                self._channel.cancel(self._call)
            self._call.chunks.clear()

    def __enter__(self) -> DirtyStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        channel, call = getattr(self, "_channel", None), getattr(self, "_call", None)
        if channel is not None and call is not None and not call.done and not self._ended:
            channel.drop(call)


def _checked(name: str, seconds: float | None) -> float | None:
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"{name} is a positive number of seconds or None, not {seconds!r}")
    return float(seconds)


def _wait_time(call: Call) -> float:
    grace = REPLY_GRACE if call.id else 0.0
    return call.deadline + grace - time.monotonic()


def _result(call: Call) -> Any:
    """The value of an ended call, or its error."""
    if call.fault is not None:
        raise error_from_fault(call.fault)
    assert call.last is not None
    value = _decode(call.last.payload, call) if call.last.kind != wire.END else None
    if call.last.kind == wire.ERROR:
        fault: Fault = value if isinstance(value, dict) else {"message": str(value)}
        raise error_from_fault(fault)
    return value


def _decode(payload: bytes, call: Call) -> Any:
    try:
        return values.loads(payload)
    except values.UndecodableValue as error:
        message = f"the answer of {call.app}.{call.action} cannot be decoded: {error}"
        raise DirtyProtocolError(message) from error


__all__ = ["DirtyClient", "DirtyStream"]
