"""A call that runs while its caller goes on."""

from __future__ import annotations

import time
from typing import Any

from ..core import faults
from ..core.mux import Call
from ..errors import error_from_fault
from . import channels
from .results import expire, result, wait_time


class DirtyFuture:
    """The result of `DirtyClient.submit`. May be waited for by several greenlets or threads."""

    def __init__(self, client: Any, channel: channels.Channel, call: Call) -> None:
        self._client = client
        self._channel = channel
        self._call = call
        self._ended = channel.event()
        self._looking = False  # at what kind the arbiter is, or on its way there
        call.notify = self._on_news
        if channel.stock is None:
            channel.start(call)
        else:
            channel.spawn(self._perform)

    def _on_news(self) -> None:
        """One at a time: called by the channel, under its lock or in its hub."""
        if self._call.done:
            self._ended.set()
        elif self._call.unheard:
            self._call.unheard = False
            if not self._looking:
                self._looking = True
                self._channel.spawn(self._fall_back)

    def _fall_back(self) -> None:
        """Nobody has heard the call yet: the arbiter may be a stock one."""
        moved = False
        try:
            found = self._channel.find_stock(wait_time(self._call))
            moved = found is not None and self._channel.withdraw(self._call)
        finally:
            self._looking = moved  # if not, until the next connection that nobody greets
        if moved:
            self._perform()

    def _perform(self) -> None:
        """With a stock arbiter somebody has to read the call's own connection."""
        try:
            channels.perform(self._channel, self._call, self._client.timeout)
        finally:
            self._ended.set()

    def done(self) -> bool:
        """Whether `get` would return (or raise) at once."""
        return self._call.done

    def get(self, timeout: float | None = None) -> Any:
        """The result; errors as for `DirtyClient.execute`.

        Waits for `timeout` seconds at most, None for as long as the client's own timeout lasts. A
        `DirtyTimeoutError` for the first leaves the call running, and `get` may be called again.
        """
        call = self._call
        until = None if timeout is None else time.monotonic() + timeout
        while not call.done:
            seconds = wait_time(call)
            if seconds <= 0:
                expire(self._channel, call, self._client.timeout, self._client.socket_path)
                break
            if until is not None:
                seconds = min(seconds, until - time.monotonic())
                if seconds <= 0:
                    raise error_from_fault(faults.not_yet(call.app, call.action, timeout))
            self._ended.wait(None if seconds == float("inf") else seconds)
        return result(call)

    def cancel(self) -> bool:
        """Cancel the call: dropped if it waits, stopped if it runs. False if it had ended."""
        if self._call.done:
            return False
        self._channel.cancel(self._call)
        self._ended.set()
        fault = self._call.fault
        return fault is not None and fault["error_type"] == faults.CANCELLED  # or another end came first
