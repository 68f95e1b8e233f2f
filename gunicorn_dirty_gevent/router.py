"""The arbiter's frames: between clients, the dispatcher and workers, in the hub's callbacks.

Nothing here blocks. What has to fork, log or call hooks is handed to the main greenlet (`soon`).
"""

from __future__ import annotations

import _socket
import struct
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import gevent

from . import desk
from .codecs import CODECS
from .core import calls, dialects, dispatch, faults, values, wire
from .core.wire import Frame, FrameDecoder
from .lane import Lanes
from .link import PEER_GONE, Link
from .listener import Listener
from .settings import Settings
from .stash_desk import Refusal

GOAWAY_TIME = 1.0
"""Seconds a client gets to confirm that it sends its new calls to the next arbiter."""

FLUSH_TIME = 1.0
"""Seconds for clients to take the last answers before the arbiter ends."""

UNREAD_SLACK = 1024 * 1024
"""Bytes above `unread_bytes` for errors and other small frames, before their client is dropped."""

ACCEPT_PAUSE = 0.5
"""Seconds without accepting after the process ran out of descriptors."""

_ACCEPTS_PER_TURN = 64

_OF_CALLS = frozenset((wire.CHUNK, wire.RESPONSE, wire.ERROR, wire.END, wire.DONE))

_CREDENTIALS = struct.Struct("3i")  # unix(7), SO_PEERCRED: pid, uid, gid


class Supervisor(Protocol):
    """What the router needs of the main greenlet. What a worker said or is goes through `soon`."""

    log: Any

    def soon(self, what: Callable[[], None]) -> None: ...

    def status(self) -> dict[str, Any]: ...

    def resize(self, change: int) -> tuple[int, int]: ...

    def worker_said(self, key: int, kind: int, told: Any) -> None: ...

    def worker_cut_off(self, key: int, reason: str) -> None: ...

    def worker_worn(self, key: int, why: str) -> None: ...

    def worker_stuck(self, key: int, why: str) -> None: ...


class Router:
    """Owns the dispatcher and every link."""

    def __init__(
        self, supervisor: Supervisor, apps: Iterable[str], options: Settings, listener: Listener
    ) -> None:
        limits = calls.Limits(options.queue_size, options.queue_bytes, options.calls_per_connection)
        self.dispatcher = dispatch.Dispatcher(apps, limits)
        self.wakes_at = 0.0
        """When the main greenlet will call `tick` by itself."""
        self.stopping = False
        """The main greenlet waits for the last calls to end."""
        self._supervisor = supervisor
        self._options = options
        self._listener = listener.sock
        self._clients: dict[Link, int] = {}  # and the pid of who connected
        self._workers: dict[int, Link] = {}
        self._owed: dict[Link, list[tuple[int, int]]] = {}  # credit, once the kernel has the chunks
        self._lanes = Lanes()
        self._credit: dict[int, dict[int, int]] = {}  # for calls of workers whose link is busy
        self._leaving: set[Link] = set()  # clients that have not confirmed a GOAWAY
        self._hand_over_by: float | None = None
        self.desk = desk.Desk(supervisor, options.stash_size, listener.journal)
        self._loop: Any = gevent.get_hub().loop
        self._accepter: Any = self._loop.io(self._listener.fileno(), 1)

    # For the main greenlet.

    def open(self) -> None:
        """Accept clients (again)."""
        self._hand_over_by = None
        self._leaving.clear()
        if not self._accepter.active:
            self._accepter.start(self._accept)

    def hand_over(self, now: float) -> None:
        """The next arbiter takes the new calls: they wait at the listener until it is there."""
        self._accepter.stop()
        self._hand_over_by = now + GOAWAY_TIME
        for link in self._clients:
            dialect = link.decoder.dialect  # type: ignore[attr-defined]
            if isinstance(dialect, dialects.Gd2):  # the others have no such message
                self._leaving.add(link)
                link.send((wire.pack_frame(wire.GOAWAY, 0),))

    def handing_over(self, now: float) -> float | None:
        """Until when clients may still confirm the hand-over; None when nothing is to wait for."""
        by = self._hand_over_by
        return by if by is not None and self._leaving and now < by else None

    def tick(self, now: float) -> None:
        self.act(self.dispatcher.tick(now))

    def refuse_all(self, why: str) -> None:
        """End every call with an error."""
        self.act(self.dispatcher.stop(why))

    def flush(self) -> None:
        """Give the last answers to the kernel; clients read them after we have gone."""
        until = time.monotonic() + FLUSH_TIME
        gevent.sleep(0)
        while any(link.outbox_bytes for link in self._clients) and time.monotonic() < until:
            gevent.sleep(0.01)

    def abandon(self) -> None:
        """In a process just forked: let go of every link."""
        self._accepter.stop()
        self._accepter.close()
        self.desk.abandon()
        for link in [*self._clients, *self._workers.values()]:
            link.close("forked")

    def add_worker(self, key: int, sock: _socket.socket) -> None:
        frames = partial(self._on_worker_frames, key)
        closed = partial(self._on_worker_close, key)
        decoder = FrameDecoder(self._options.max_message_size)
        # First: what a worker says before it answers by a lane is known when that caller's next call comes.
        self._workers[key] = Link(sock, frames, closed, decoder, first=True)

    def stop_worker(self, key: int) -> None:
        """Send the worker nothing more, and have it end when it has finished."""
        self.dispatcher.worker_draining(key)
        self._workers[key].send((wire.pack_frame(wire.STOP, 0),))

    def finish_worker(self, key: int) -> None:
        """The process has ended. What it wrote before counts: its answers come before its loss."""
        link = self._workers[key]
        self.dispatcher.worker_draining(key)  # the slots that its answers free are nobody's
        link.read_rest()
        link.close("the worker has ended")
        del self._workers[key]
        self._credit.pop(key, None)
        self._lanes.worker_gone(key)

    # Workers.

    def _on_worker_frames(self, key: int, link: Link, frames: list[Frame]) -> None:
        now = time.monotonic()
        supervisor = self._supervisor
        for kind, call_id, payload in frames:
            if kind in _OF_CALLS:
                self.act(self.dispatcher.frame_from_worker(key, kind, call_id, payload, now))
            elif kind == wire.PACE:
                self.dispatcher.worker_paced(key, call_id, wire.unpack_pace(payload), now)
            elif kind == wire.PING:
                self.dispatcher.worker_heard(key, now)
            elif kind == wire.PONG:
                self.act(self.dispatcher.worker_answered(key, now))
            elif kind == wire.BLOCKED:
                self.dispatcher.worker_blocked(key, call_id, now)
            elif kind in (wire.READY, wire.CLASSES, wire.STOP):
                told = values.loads(wire.inline_bytes(payload)) if payload else None
                supervisor.soon(partial(supervisor.worker_said, key, kind, told))
            else:
                raise wire.WireError(f"a dirty worker sent a frame of kind {kind:#x}")
        self._wake_if_due()

    def _on_worker_close(self, key: int, link: Link, reason: str) -> None:
        self._supervisor.soon(partial(self._supervisor.worker_cut_off, key, reason))

    # Clients.

    def _ask(self, link: Link, kind: int, call_id: int, payload: bytes) -> None:
        """A question that the arbiter itself answers."""
        dialect = _dialect(link)
        try:
            result = self.desk.answer(kind, payload, dialect.codec)
        except Refusal as refusal:
            self.refuse(link, call_id, refusal.fault)
        else:
            self._send(link, dialect.pack(wire.RESPONSE, call_id, result))

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                # The public accept() is socket.socket's, which gevent may have patched.
                number, _address = self._listener._accept()  # type: ignore[attr-defined]
            except BlockingIOError:
                return
            except OSError as error:
                self._pause_accepting(error)
                return
            sock = _socket.socket(fileno=number)
            opening = dialects.Opening(self._options.max_message_size)
            peer = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _CREDENTIALS.size)
            link = Link(sock, self._on_client_frames, self._on_client_close, opening)
            self._clients[link] = _CREDENTIALS.unpack(peer)[0]

    def _pause_accepting(self, error: OSError) -> None:
        """Out of descriptors, most likely: a readable listener would spin."""
        self._accepter.stop()
        timer = self._loop.timer(ACCEPT_PAUSE)
        timer.start(self._accepter.start, self._accept)
        message = "Cannot accept a dirty client: %s; trying again"
        self._supervisor.soon(partial(self._supervisor.log.error, message, error.strerror))

    def _on_client_frames(self, link: Link, frames: list[Frame]) -> None:
        now = time.monotonic()
        dispatcher = self.dispatcher
        for kind, call_id, payload in frames:
            if kind == wire.REQUEST:
                request = wire.unpack_request(payload)
                self.act(dispatcher.submit(link, call_id, request, now))
            elif kind == wire.CREDIT:
                self.act(dispatcher.credit(link, call_id, payload, now))
            elif kind == wire.CANCEL:
                self.act(dispatcher.cancel(link, call_id, now))
            elif kind == wire.GOAWAY:
                self._leaving.discard(link)
            elif kind == wire.HELLO:
                if wire.unpack_hello(payload).flags & wire.HELLO_LANES:
                    self._lanes.admit(link)
                    dispatcher.takes_lanes(link)
                hello = wire.pack_hello(self._options.max_message_size, wire.HELLO_DESCRIPTORS)
                self._send(link, (hello,))
            elif kind in (dialects.STASH, dialects.STATUS, dialects.MANAGE):
                self._ask(link, kind, call_id, wire.inline_bytes(payload))
            elif kind == dialects.UNREADABLE:
                reason = wire.inline_bytes(payload).decode()
                self.refuse(link, call_id, faults.protocol(reason, may_have_run=False))
            else:
                raise wire.WireError(f"a client sent a frame of kind {kind:#x}")
        self._wake_if_due()

    def _on_client_close(self, link: Link, reason: str) -> None:
        pid = self._clients.pop(link)
        self._lanes.client_gone(link)
        self._leaving.discard(link)
        self._owed.pop(link, None)
        self.act(self.dispatcher.client_lost(link, time.monotonic()))
        if not reason.startswith(PEER_GONE):
            message = "Dropped a dirty client (pid: %s): %s"
            self._supervisor.soon(partial(self._supervisor.log.warning, message, pid, reason))
        self._wake_if_due()

    def _wake_if_due(self) -> None:
        due = self.dispatcher.next_deadline()
        if self.stopping or (due is not None and due < self.wakes_at):
            self._supervisor.soon(_nothing)

    # Actions of the dispatcher.

    def act(self, actions: Iterable[calls.Action]) -> None:
        """Carry them out."""
        supervisor = self._supervisor
        for action in actions:
            if isinstance(action, calls.Reply):  # most are
                self._reply(action)
            elif isinstance(action, calls.Assign):
                self._assign(action)
            elif isinstance(action, calls.Forward) and action.kind == wire.CREDIT:
                self._pass_credit(action)
            elif isinstance(action, calls.Forward):
                frame = wire.pack_frame(action.kind, action.call_id, action.payload)
                self._workers[action.worker].send((frame,))
            elif isinstance(action, calls.Refuse):
                self.refuse(action.client, action.call_id, action.fault)
            elif isinstance(action, calls.Worn):
                supervisor.soon(partial(supervisor.worker_worn, action.worker, action.why))
            else:
                self.dispatcher.worker_draining(action.worker)
                supervisor.soon(partial(supervisor.worker_stuck, action.worker, action.why))

    def _assign(self, assign: calls.Assign) -> None:
        worker, call_id, request, budget, client, client_id = assign
        link, route = self._workers[worker], b""
        if client is not None:
            number = self._lanes.between(client, worker, link)
            if number:
                route = wire.pack_route(number, client_id)
            else:
                self.dispatcher.not_by_lane(worker, call_id)
        link.send(wire.repack_request(call_id, request, budget, route))
        if link.refused:
            self.act(self.dispatcher.undelivered(worker, call_id, request, time.monotonic()))

    def _pass_credit(self, action: calls.Forward) -> None:
        """A worker whose link is busy gets the sum: for a call that is answered by a lane a client may send
        any number of them."""
        link = self._workers[action.worker]
        if link.outbox_bytes:
            sums = self._credit.setdefault(action.worker, {})
            before = sums.get(action.call_id, 0)
            sums[action.call_id] = min(before + wire.unpack_credit(action.payload), wire.MAX_CREDIT)
            link.on_drained = partial(self._pay_worker, action.worker)
        else:
            link.send((wire.pack_frame(action.kind, action.call_id, action.payload),))

    def _pay_worker(self, worker: int) -> None:
        for call_id, amount in self._credit.pop(worker, {}).items():
            self._workers[worker].send((wire.pack_credit(call_id, amount),))

    def refuse(self, link: Link, call_id: int, fault: faults.Fault) -> None:
        """Answer with an error."""
        dialect = _dialect(link)
        self._send(link, dialect.pack(wire.ERROR, call_id, CODECS[dialect.codec].dumps_fault(fault)))

    def _reply(self, reply: calls.Reply) -> None:
        link, kind, call_id, payload = reply
        size = link.outbox_bytes + len(payload)
        if kind in (wire.RESPONSE, wire.CHUNK) and size > self._options.unread_bytes and link.outbox_bytes:
            if kind == wire.CHUNK:
                self.act(self.dispatcher.cancel(link, call_id, time.monotonic()))
            self.refuse(link, call_id, faults.answer_dropped(len(payload), self._options.unread_bytes))
            return
        dialect = _dialect(link)
        self._send(link, dialect.pack(kind, call_id, payload))
        if kind == wire.CHUNK and not dialect.gives_credit:
            self._give_credit(link, call_id, wire.chunk_cost(payload))

    def _send(self, link: Link, parts: wire.Parts) -> None:
        """Send to a client. One that reads nothing and goes on asking is dropped."""
        link.send(parts)
        if link.outbox_cost > self._options.unread_bytes + UNREAD_SLACK:
            reason = (
                f"it leaves more than {self._options.unread_bytes} bytes of answers unread (unread_bytes)"
            )
            link.end(reason)

    def _give_credit(self, link: Link, call_id: int, amount: int) -> None:
        """For a client that says nothing of what it has read: once the kernel has taken the chunk."""
        self._owed.setdefault(link, []).append((call_id, amount))
        if link.outbox_bytes == 0:
            self._pay(link)
        else:
            link.on_drained = partial(self._pay, link)

    def _pay(self, link: Link) -> None:
        now = time.monotonic()
        for call_id, amount in self._owed.pop(link, ()):
            self.act(self.dispatcher.credit(link, call_id, wire.pack_credit_payload(amount), now))


def _dialect(link: Link) -> dialects.Dialect:
    dialect: dialects.Dialect = link.decoder.dialect  # type: ignore[attr-defined]
    return dialect


def _nothing() -> None:
    """To wake the main greenlet is all."""
