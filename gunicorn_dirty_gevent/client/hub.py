"""The channel under gevent: answers go from the hub's callback straight into the waiting greenlet."""

from __future__ import annotations

import _socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gevent
from gevent.event import Event
from gevent.hub import Waiter
from gevent.lock import BoundedSemaphore
from gevent.socket import socket as _GeventSocket

from ..blob import APART, apart, detach, few_left
from ..core.mux import BEHIND_LANES, Call, Mux, Phase, Why, nobody
from ..core.wire import LANE, Frame, FrameDecoder, Payload, WireError, unpack_lane
from ..lane import Receiver
from ..link import Link
from .reach import RETRY_PAUSE, connected
from .stock import StockChannel, probe


class HubChannel:
    """See `client.channels.Channel`. Used by the greenlets of one hub."""

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path
        self.stock: StockChannel | None = None
        self._stock = StockChannel(socket_path, _unix_socket, BoundedSemaphore, self.beside, self._lost_stock)
        self._mux = Mux(socket_path, detach, lanes=True)
        self._link: Link | None = None
        self._lanes: list[Receiver] = []  # of this link
        self._loop: Any = gevent.get_hub().loop
        self._connecting = False

    def start(self, call: Call) -> None:
        if len(call.body) >= APART and self._mux.detaches(call):
            call.blob = apart(len(call.body), detach, call.body)
        self._submit(call)
        self._move_on()

    def _submit(self, call: Call) -> None:
        parts = self._mux.submit(call, time.monotonic())
        if parts is not None:
            assert self._link is not None
            self._link.send(parts)
        elif self._mux.phase is Phase.DOWN:
            self._connect_soon(0.0)

    def wait(self, call: Call, seconds: float) -> None:
        waiter: Any = Waiter()
        hub = gevent.get_hub()

        def notify() -> None:
            if gevent.getcurrent() is hub:
                waiter.switch(None)
            else:  # another greenlet closed the connection
                self._loop.run_callback(waiter.switch, None)

        call.notify = notify
        timer = None
        if seconds != float("inf"):
            timer = self._loop.timer(seconds)
            timer.start(waiter.switch, None)
        try:
            waiter.get()
        finally:
            call.notify = nobody
            if timer is not None:
                timer.stop()
                timer.close()

    def find_stock(self, seconds: float) -> StockChannel | None:
        if self.stock is None and probe(self.socket_path, _unix_socket, seconds):
            self.stock = self._stock
        return self.stock

    def _lost_stock(self) -> None:
        self.stock = None  # the next one may be of either kind

    def withdraw(self, call: Call) -> bool:
        return self._mux.withdraw(call)

    def spawn(self, run: Callable[[], None]) -> None:
        gevent.spawn(run)

    def event(self) -> Event:
        return Event()

    def take_chunk(self, call: Call) -> Payload:
        payload, credit = self._mux.take_chunk(call)
        if credit is not None and self._link is not None:
            self._link.send(credit)
        return payload

    def cancel(self, call: Call, why: Why | None = None) -> None:
        parts = self._mux.cancel(call, why)
        if parts is not None and self._link is not None:
            self._link.send(parts)
        self._stock.cancel(call, why)

    def drop(self, call: Call) -> None:
        self.beside(lambda: self.cancel(call))

    def beside(self, run: Callable[[], None]) -> None:
        try:
            self._loop.run_callback_threadsafe(run)
        except Exception:  # the hub has been destroyed
            pass

    def close(self) -> None:
        self._stock.close()
        if self._link is not None:
            link, self._link = self._link, None
            link.close()
            self._close_lanes()
            self._mux.lost("this client closed the connection", link.flushed)
        self._mux.refuse("this client closed the connection")

    def forget(self) -> None:
        """The hub is gone, and its loop with it."""
        if self._link is not None:
            self._link.sock.close()
            self._link = None
        for lane in self._lanes:
            lane.forget()
        self._stock.forget()

    def abandon(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
        self._close_lanes()
        self._mux.abandon()
        self._stock.abandon()

    # The connection. Made in the hub, for its failure wakes greenlets.

    def _connect_soon(self, pause: float) -> None:
        if self._connecting:
            return
        self._connecting = True
        if pause:
            timer = self._loop.timer(pause)
            timer.start(self._connect_later, timer)
        else:
            self._loop.run_callback(self._connect)

    def _connect_later(self, timer: Any) -> None:
        timer.close()
        self._connect()

    def _connect(self) -> None:
        self._connecting = False
        if self._link is not None or not self._mux.waiting:
            return
        try:
            sock = connected(partial(_socket.socket, _socket.AF_UNIX), self.socket_path)
        except OSError as error:
            self._mux.refuse(f"cannot connect: {error.strerror or error}")
            return
        if sock is None:
            self._connect_soon(RETRY_PAUSE)
            return
        # The arbiter sees to the size of answers; it has our trust.
        decoder = FrameDecoder(0xFFFFFFFF)
        self._mux.takes_lanes = not few_left(sock.fileno())
        self._link = Link(sock, self._on_frames, self._on_close, decoder, lanes=True)
        self._link.send(self._mux.connected())

    def _on_frames(self, link: Link, frames: list[Frame]) -> None:
        now = time.monotonic()
        up_to_date = False
        for frame in frames:
            if frame.kind == LANE:
                self._open_lane(link, frame.payload)
                up_to_date = False
                continue
            if frame.kind in BEHIND_LANES and not up_to_date:
                # Once: what was sent before any of these frames is there, as they are.
                self._read_lanes()
                up_to_date = True
            for parts in self._mux.receive(frame, now):
                link.send(parts)
        self._move_on()

    def _open_lane(self, link: Link, payload: Payload) -> None:
        _, descriptor = unpack_lane(payload)
        if descriptor is None:
            raise WireError("the end of a lane was lost: this process has too many descriptors")
        lane = Receiver(descriptor, self._on_lane_frames, self._on_lane_end)
        if link is not self._link:  # a caller woken meanwhile has closed it
            lane.close()
            return
        self._lanes.append(lane)
        if few_left(descriptor):
            # Leave it to others. The worker then answers by the link.
            lane.shut()
            self._read_lanes()  # to its end

    def _on_lane_end(self, lane: Receiver, reason: str) -> None:
        if lane in self._lanes:
            self._lanes.remove(lane)
        if reason and self._link is not None:
            self._link.end(reason)

    def _on_lane_frames(self, frames: list[Frame]) -> None:
        for frame in frames:
            self._mux.receive(frame, 0.0)  # of these kinds none is answered
        self._move_on()

    def _read_lanes(self) -> None:
        frames = [frame for lane in list(self._lanes) for frame in lane.receive_all()]
        if frames:
            self._on_lane_frames(frames)

    def _close_lanes(self) -> None:
        lanes, self._lanes = self._lanes, []
        for lane in lanes:
            lane.close()

    def _move_on(self) -> None:
        if self._mux.moves_on and self._link is not None:
            link, self._link = self._link, None
            link.close("the arbiter hands over")
            self._close_lanes()
            self._mux.lost("the arbiter hands over", link.flushed)
            self._connect_soon(0.0)

    def _on_close(self, link: Link, reason: str) -> None:
        if link is not self._link:
            return
        greeted = self._mux.phase is not Phase.GREETING
        try:
            self._read_lanes()
        finally:
            self._link = None
            self._close_lanes()
            self._mux.lost(reason, link.flushed)
            if self._mux.waiting:
                self._connect_soon(0.0 if greeted else RETRY_PAUSE)


def _unix_socket() -> Any:
    return _GeventSocket(_socket.AF_UNIX, _socket.SOCK_STREAM)
