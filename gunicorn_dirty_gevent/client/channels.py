"""Which connection a client uses: one per process, socket path and hub (or, without gevent, one for
all threads).

A channel outlives its handles: `get_dirty_client()` may make a handle per request, and a connection
each time would cost more than the call. It is closed by the `close()` of the last handle that used
it, or with the process.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from gevent import get_hub
from gevent._hub_local import get_hub_if_exists
from gevent.monkey import get_original, is_module_patched

from ..core.mux import Call, Why
from ..core.wire import Payload
from .results import expire, wait_time
from .stock import StockChannel


class Carrier(Protocol):
    """What carries calls to an arbiter."""

    socket_path: str

    def start(self, call: Call) -> None:
        """Send the call, or keep it until there is a connection."""

    def wait(self, call: Call, seconds: float) -> None:
        """Wait until something has arrived for the call, or the time is up."""

    def take_chunk(self, call: Call) -> Payload:
        """The next chunk of a call that has one."""

    def cancel(self, call: Call, why: Why | None = None) -> None:
        """End the call if nothing else has: the caller has gone away (or `why`). Who waits for its answer
        is told."""

    def drop(self, call: Call) -> None:
        """`cancel`, from a finalizer: in any thread, at any moment."""


class Channel(Carrier, Protocol):
    """A connection with many calls on it, made when it is needed and made again when it is lost.

    `cancel` ends a call wherever it is, by way of `stock` too.
    """

    stock: StockChannel | None
    """Where calls go while the arbiter there is a stock one."""

    def find_stock(self, seconds: float) -> StockChannel | None:
        """Find out whether it is, in so many seconds."""

    def withdraw(self, call: Call) -> bool:
        """Whether the call still waited for a connection; it does no more."""

    def spawn(self, run: Callable[[], None]) -> None:
        """Run it in a greenlet or thread of its own."""

    def beside(self, run: Callable[[], None]) -> None:
        """Run it later, in the hub's thread (or a new one). May be called in any thread, at any moment."""

    def event(self) -> Any:
        """An event of the kind that waits here: `set()`, `wait(seconds)`."""

    def close(self) -> None:
        """Close the connection; calls on it end with an error."""

    def forget(self) -> None:
        """The thread whose hub it used has ended."""

    def abandon(self) -> None:
        """In a forked child: let go of the parent's connection without a trace on it."""


class Handle:
    """What a client and its `options()` hold together. Not the clients themselves: one made for a single
    call may live on in an error's traceback, and would keep the connection open."""


class _Shared:
    """A channel and the handles that use it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.thread = get_original("_thread", "get_ident")()
        self.handles: weakref.WeakSet[Handle] = weakref.WeakSet()


_channels: dict[tuple[str, int], _Shared] = {}
_hubs: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_hub_count = 0
_epoch = object()


class Client(Protocol):
    """What has a channel: a `DirtyClient`, a `StashClient`."""

    socket_path: str
    _found: Any
    _handle: Handle


def get(client: Client) -> Channel:
    """The channel for a client, in this process and hub."""
    found = client._found
    if found is not None and found[0] is _epoch and found[1] is get_hub_if_exists():
        channel: Channel = found[2]
        return channel
    hub = _cooperative_hub()
    key = (client.socket_path, 0 if hub is None else _number(hub))
    with _lock:
        shared = _channels.get(key) or _make(key, hub)
        shared.handles.add(client._handle)
        client._found = (_epoch, hub, shared.channel)
    return shared.channel


def perform(channel: Channel, call: Call, timeout: float | None) -> None:
    """Start the call and wait for its end. When the waiting is ended from outside, or by the call's deadline,
    it is cancelled.

    `timeout` is what an error says of the time it had.
    """
    carrier: Carrier = channel.stock or channel
    try:
        carrier.start(call)
        while not call.done:
            seconds = wait_time(call)
            if seconds <= 0:
                expire(carrier, call, timeout, channel.socket_path)
                break
            carrier.wait(call, seconds)
            if call.unheard:
                carrier = switched(channel, call)
    finally:
        if not call.done:
            carrier.cancel(call)


def switched(channel: Channel, call: Call) -> Carrier:
    """What carries on a call that nobody has heard yet: the same, unless the arbiter is a stock one."""
    call.unheard = False
    if call.done or call.id:
        return channel
    stock = channel.find_stock(wait_time(call))
    if stock is None or not channel.withdraw(call):  # meanwhile it may have been heard
        return channel
    stock.start(call)
    return stock


def release(client: Client) -> None:
    """The client lets go of its channels."""
    hub = get_hub_if_exists()
    number = 0 if hub is None else _number(hub)
    unused = []
    with _lock:
        _drop_ended(number)
        for key, shared in list(_channels.items()):
            if client._handle not in shared.handles:
                continue
            _forget()  # this client too: used again, it counts again
            shared.handles.discard(client._handle)
            if shared.handles:
                continue
            if key[1] in (0, number):
                unused.append(_channels.pop(key).channel)
            else:  # only its own thread may touch it; if that does not come to it, `_drop_ended` will
                shared.channel.beside(partial(_close_unused, key, shared))
    for channel in unused:
        channel.close()


def _close_unused(key: tuple[str, int], shared: _Shared) -> None:
    with _lock:
        if shared.handles or _channels.get(key) is not shared:
            return
        del _channels[key]
        _forget()
    shared.channel.close()


def _make(key: tuple[str, int], hub: Any) -> _Shared:
    _drop_ended(key[1])
    channel: Channel
    if hub is not None:
        from .hub import HubChannel

        channel = HubChannel(key[0])
    else:
        from .threads import ThreadChannel

        channel = ThreadChannel(key[0])
    shared = _channels[key] = _Shared(channel)
    return shared


def _cooperative_hub() -> Any:
    """The gevent hub to wait in, or None where waiting is left to (possibly green) threads.

    gevent is used where it has patched the sockets, and in threads that already run a hub.
    """
    hub = get_hub_if_exists()
    if hub is None and is_module_patched("socket"):
        hub = get_hub()
    return hub


def _drop_ended(number: int) -> None:
    """Let go of the channels of threads that have ended: their hubs will never run again. `number` is
    of this thread's own hub: another hub's with this thread's identity had it before."""
    alive = sys._current_frames()
    here = get_original("_thread", "get_ident")()
    for key, shared in list(_channels.items()):
        ended = shared.thread not in alive or (shared.thread == here and key[1] != number)
        if key[1] and ended:
            _channels.pop(key, None)
            shared.channel.forget()


def _forget() -> None:
    """What clients have found no longer holds."""
    global _epoch
    _epoch = object()


def _number(hub: Any) -> int:
    """A number for the hub that is never used again: an id() may be."""
    global _hub_count
    number = _hubs.get(hub)
    if number is None:
        with _lock:
            _hub_count += 1
            number = _hubs[hub] = _hub_count
    return number


def _after_fork_in_child() -> None:
    """The connections are the parent's. Letting go must not wait for the child's first call: until
    then its copy of the hub would read the parent's answers."""
    global _lock
    _lock = threading.RLock()
    hub = get_hub_if_exists()
    if hub is not None and _channels:
        hub.loop.reinit()  # before watchers are touched, see `process.run_child`
    for shared in _channels.values():
        shared.channel.abandon()
    _channels.clear()
    _forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
