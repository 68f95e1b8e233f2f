"""`DirtyClient`: what a view holds."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

from gunicorn.dirty.client import DirtyClient as _StockClient

from ..core import large, values
from ..core.mux import Call
from ..errors import DirtyEncodeError
from . import aio, channels
from .channels import perform
from .future import DirtyFuture
from .results import checked_time, result
from .streams import DirtyAsyncStream, DirtyStream


class DirtyClient(_StockClient):  # type: ignore[misc]
    """A client of the dirty arbiter.

    A light handle: the connection behind it is shared by all clients of the process that name the
    same socket. May be used from any greenlet, thread or asyncio task at the same time, and after a
    fork. Has gunicorn's constructor and methods.

    `timeout`, in seconds, is for a whole call or stream, queueing included; None is no limit (the
    action's own, ``dirty_timeout``, still holds). The default is gunicorn's.
    """

    def __init__(self, socket_path: str, timeout: float | None = 30.0) -> None:
        super().__init__(socket_path, timeout)
        self.timeout = checked_time("timeout", timeout)
        self.idle_timeout: float | None = None
        self._found: Any = None  # kept by `channels`
        self._handle = channels.Handle()

    def options(self, **options: float | None) -> DirtyClient:
        """A client like this one with other settings, for one call or to keep::

            client.options(timeout=5).execute("tasks:ImageApp", "thumbnail", data)

        `timeout`: as in the constructor. `idle_timeout`: seconds a stream waits for its next chunk
        (default: `timeout`, at most 30, gunicorn's rule). The settings stand apart from the call, so
        no keyword of an action is taken. Raises TypeError for an unknown option and ValueError for a
        time that is not a positive number.
        """
        other = copy.copy(self)
        other._found = None
        for name, value in options.items():
            if name not in ("timeout", "idle_timeout"):
                raise TypeError(f"options() has no {name!r}; it takes timeout and idle_timeout")
            setattr(other, name, checked_time(name, value))
        return other

    # Greenlets and threads.

    def execute(self, app_path: str, action: str, *args: Any, **kwargs: Any) -> Any:
        """Run an action of a dirty app and return its result.

        Raises `DirtyAppError` when the action does, `DirtyTimeoutError`, `DirtyWorkerDiedError`,
        `DirtyOverloadedError`, `DirtyConnectionError`, `DirtyEncodeError` (see
        `gunicorn_dirty_gevent.errors`); the attribute `may_have_run` says whether the action may
        have been started. If the waiting greenlet is killed or its `gevent.Timeout` fires, the call
        is cancelled.
        """
        call = self._call(app_path, action, args, kwargs)
        perform(channels.get(self), call, self.timeout)
        return result(call)

    def stream(self, app_path: str, action: str, *args: Any, **kwargs: Any) -> DirtyStream:
        """Run an action that returns a generator; iterate over its chunks as they come.

        The request is sent at the first `next()`. Closing or dropping the iterator closes the
        generator in the worker. Errors as for `execute`; one in mid-stream is raised after the
        chunks before it. An action that returns a plain value gives it as the only chunk.
        """
        return DirtyStream(self, app_path, action, args, kwargs)

    def submit(self, app_path: str, action: str, *args: Any, **kwargs: Any) -> DirtyFuture:
        """Start an action and go on; the result is fetched from the future.

        Raises `DirtyEncodeError` at once when the arguments cannot be sent. A future that is dropped
        does not cancel its call.
        """
        call = self._call(app_path, action, args, kwargs)
        return DirtyFuture(self, channels.get(self), call)

    def connect(self) -> None:
        """Nothing to do: the connection is made when a call needs it. Kept for gunicorn's API."""

    def close(self) -> None:
        """Let go of the connection, for this client and all that `options()` made of it. It is closed when
        no other client of this process holds it."""
        channels.release(self)

    # asyncio.

    async def execute_async(self, app_path: str, action: str, *args: Any, **kwargs: Any) -> Any:
        """`execute` for asyncio. Cancelling the waiting task cancels the call."""
        call = self._call(app_path, action, args, kwargs)
        await aio.perform(aio.get(self.socket_path), call, self.timeout)
        return result(call)

    def stream_async(self, app_path: str, action: str, *args: Any, **kwargs: Any) -> DirtyAsyncStream:
        """`stream` for asyncio."""
        return DirtyAsyncStream(self, app_path, action, args, kwargs)

    async def connect_async(self) -> None:
        """Nothing to do, as for `connect`."""

    async def close_async(self) -> None:
        """Close the connection of the running event loop."""
        aio.release(self.socket_path)

    # Shared.

    def _call(
        self,
        app_path: str,
        action: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        stream: bool = False,
    ) -> Call:
        deadline = math.inf if self.timeout is None else time.monotonic() + self.timeout
        try:
            if not (isinstance(app_path, str) and isinstance(action, str)):
                raise ValueError("the names of app and action are strings")
            return Call(app_path, action, large.dumps_call(args, kwargs), deadline, stream)
        except (values.UnencodableValue, ValueError) as error:
            refusal = DirtyEncodeError(f"{app_path}.{action} was not sent: {error}")
            refusal.may_have_run = False
            raise refusal from error
