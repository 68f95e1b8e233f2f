"""The caller's end: many calls over one link, which may be lost and made again.

Frames in, parts to send and notified calls out; no socket, no clock. The shell around it makes the
connection whenever calls are waiting, hands in what arrives and says how many bytes the kernel took
before a link was lost: from that alone it follows which calls may have run.

A link is DOWN, then GREETING (connected, our HELLO is out, the arbiter's is not there yet), then
OPEN, and LEAVING when the arbiter has said that it ends: answers still come, new calls wait for the
next link. Requests go out only when it is OPEN: a connection that waits in the backlog of an arbiter that
is being replaced has no call's fate tied to it.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from . import faults, wire
from .faults import Fault
from .wire import Blob, Body, Frame, Parts, Payload

CREDIT_STEP = wire.STREAM_WINDOW // 2
"""A reader gives credit back in steps of half a window: the writer never runs dry while the reader
keeps up, and small chunks do not cost a frame each."""


BEHIND_LANES = frozenset((wire.CHUNK, wire.ERROR, wire.END))
"""Frames that come by the link when all that their worker sent before by a lane is there to be read: the
rest of a stream, or the error of a call whose worker has died after it answered."""


class Phase(enum.Enum):
    DOWN = "down"
    GREETING = "greeting"
    OPEN = "open"
    LEAVING = "leaving"


def nobody() -> None:
    """A call that nobody waits for yet."""


Why = Callable[[bool], Fault]
"""The fault that a call ends with, of whether it was sent."""


class Call:
    """One call and what has come back for it. Raises `ValueError` for names that cannot be sent.

    `kind` is REQUEST, or STASH for an operation on the stash, of which `body` is the whole message.
    """

    __slots__ = (
        "action",
        "app",
        "blob",
        "body",
        "chunks",
        "consumed",
        "deadline",
        "end",
        "fault",
        "id",
        "kind",
        "last",
        "names",
        "notify",
        "stream",
        "unheard",
    )

    def __init__(
        self,
        app: str,
        action: str,
        body: Body,
        deadline: float,
        stream: bool,
        kind: int = wire.REQUEST,
    ) -> None:
        self.kind = kind
        self.app = app
        self.action = action
        self.names = wire.pack_names(app, action)
        self.body = body
        self.blob: Blob | None = None  # the body, if the shell has detached it beforehand
        self.deadline = deadline
        self.stream = stream
        self.id = 0  # 0: not on a link
        self.end = 0  # where the request ends in the bytes of its link
        self.chunks: deque[Payload] = deque()
        self.consumed = 0
        self.last: Frame | None = None  # RESPONSE, ERROR or END
        self.unheard = False  # it waits, and a link ended before the arbiter said hello
        self.fault: Fault | None = None  # what this side has to say of its end
        self.notify: Callable[[], None] = nobody

    @property
    def done(self) -> bool:
        """Nothing more will arrive."""
        return self.last is not None or self.fault is not None

    def give_up(self, why: Why | None = None) -> None:
        """End it as cancelled, or with `why`, unless it has ended."""
        if not self.done:
            sent = self.id != 0
            self.fault = faults.cancelled(self.app, self.action, sent=sent) if why is None else why(sent)


class Mux:
    """See the module's text."""

    def __init__(
        self, socket_path: str, detach: Callable[[Body], Blob | None] | None = None, lanes: bool = False
    ) -> None:
        """`detach` makes a large body a blob (None: it cannot just now); without it, the link takes
        none either way. `lanes`: the shell takes answers by lanes; what comes by one it hands in before
        what came later by the link (see `BEHIND_LANES`)."""
        self.socket_path = socket_path
        self.takes_lanes = lanes
        """Whether the next link does."""
        self._detach = detach
        self._detaches = False  # and so does the arbiter
        self.phase = Phase.DOWN
        self.max_message = 0
        """The largest payload that the arbiter takes; 0 until it has said so."""
        self.late_frames = 0
        """Frames for calls that had ended: dropped, counted."""
        self.waiting: dict[Call, None] = {}  # in order; not on a link yet
        self._calls: dict[int, Call] = {}
        self._last_id = 0  # never used again on a later link: a late frame fits no call
        self._sent = 0  # bytes given to the link

    @property
    def pending(self) -> int:
        return len(self._calls) + len(self.waiting)

    @property
    def moves_on(self) -> bool:
        """The link is of no more use, and calls wait for another: the shell is to end it."""
        return self.phase is Phase.LEAVING and not self._calls and bool(self.waiting)

    # The link.

    def connected(self) -> Parts:
        """A connection stands: what to send first."""
        self.phase = Phase.GREETING
        self._sent = 0
        return self._send((wire.pack_hello(0, wire.HELLO_LANES if self.takes_lanes else 0),))

    def receive(self, frame: Frame, now: float) -> Iterable[Parts]:
        """A frame has arrived: what to send for it. Each is to be sent before the next is asked for:
        in between, woken callers may start and cancel calls, whose bytes then follow."""
        kind, call_id, payload = frame
        if kind == wire.HELLO:
            self._greeted(wire.unpack_hello(payload))
            return self._submit_waiting(now)
        if self.phase is Phase.GREETING:
            raise wire.WireError("the arbiter answered before it said hello")
        if kind == wire.GOAWAY:
            self.phase = Phase.LEAVING
            return [self._send((wire.pack_frame(wire.GOAWAY, 0),))]
        call = self._calls.get(call_id)
        if call is None:
            self.late_frames += 1
            return []
        if kind == wire.CHUNK:
            call.chunks.append(payload)
        elif kind in (wire.RESPONSE, wire.ERROR, wire.END):
            del self._calls[call_id]
            call.last = frame
        else:
            raise wire.WireError(f"the arbiter sent a frame of kind {kind:#x}")
        call.notify()
        return []

    def _greeted(self, hello: wire.Hello) -> None:
        if self.phase is not Phase.GREETING:
            raise wire.WireError("the arbiter said hello twice")
        self.phase = Phase.OPEN
        self.max_message = hello.max_message
        self._detaches = self._detach is not None and bool(hello.flags & wire.HELLO_DESCRIPTORS)

    def _submit_waiting(self, now: float) -> Iterator[Parts]:
        for call in list(self.waiting):
            if call not in self.waiting:
                continue  # a caller woken meanwhile has cancelled it
            del self.waiting[call]
            parts = self.submit(call, now)
            if parts is not None:
                yield parts

    def lost(self, reason: str, flushed: int) -> None:
        """The link has ended; the kernel took its first `flushed` bytes.

        Calls whose request was not handed over whole have certainly not run: they wait for the next
        link. The others end.
        """
        greeting, self.phase = self.phase is Phase.GREETING, Phase.DOWN
        # Those that wait again come first: callers that are told may start new calls, and cancel any.
        unsent = [call for call in self._calls.values() if call.end > flushed]
        for call in unsent:
            del self._calls[call.id]
            call.id = 0
        self.waiting = {**dict.fromkeys(unsent), **self.waiting}
        for call in list(self._calls.values()):
            if self._calls.pop(call.id, None) is not None:
                self._fail(call, reason, sent=True)
        if greeting:
            self._tell_unheard()

    def _tell_unheard(self) -> None:
        """The other side may be none that speaks as we do: callers that can find out shall."""
        for call in list(self.waiting):
            if call in self.waiting:
                call.unheard = True
                call.notify()

    def refuse(self, reason: str) -> None:
        """No link can be made: the waiting calls end."""
        for call in list(self.waiting):
            if call in self.waiting:
                del self.waiting[call]
                self._fail(call, reason, sent=False)

    def _fail(self, call: Call, reason: str, *, sent: bool) -> None:
        call.fault = faults.connection_lost(call.app, call.action, reason, sent, self.socket_path)
        call.notify()

    # The calls.

    def submit(self, call: Call, now: float) -> Parts | None:
        """A new call: what to send, or None when it has to wait for the link.

        A message over the arbiter's limit ends the call with a fault, before anything is sent. A call that
        has ended (cancelled, before it came here) stays so.
        """
        if call.done:
            return None
        if self.phase is not Phase.OPEN:
            self.waiting[call] = None
            return None
        envelope = b""
        if call.kind == wire.REQUEST:
            flags = wire.FLAG_STREAM if call.stream else 0
            if self._detaches:
                flags |= wire.FLAG_DETACH
            envelope = wire.pack_envelope(call.names, call.deadline - now, flags)
        size = len(envelope) + len(call.body)
        if size > self.max_message:
            call.fault = faults.message_too_large(
                f"the arguments of {call.app}.{call.action}", size, self.max_message, ran=False
            )
            call.notify()
            return None
        self._last_id += 1
        call.id = self._last_id
        self._calls[call.id] = call
        parts = self._send(self._pack(call, envelope))
        call.end = self._sent
        return parts

    def detaches(self, call: Call) -> bool:
        """Whether the body of the call is going to be detached."""
        return self._detaches and len(call.body) >= wire.DETACH_SIZE and call.kind == wire.REQUEST

    def _pack(self, call: Call, envelope: bytes) -> Parts:
        if self.detaches(call):
            assert self._detach is not None
            blob, call.blob = call.blob or self._detach(call.body), None
            if blob is not None:
                return wire.pack_detached(wire.REQUEST, call.id, envelope, blob)
        return wire.pack_request(call.id, envelope, call.body, call.kind)

    def cancel(self, call: Call, why: Why | None = None) -> Parts | None:
        """`Call.give_up`; who waits for it is told. Nothing further reaches it."""
        self.waiting.pop(call, None)
        linked = self._calls.get(call.id) is call  # a stock arbiter's calls have ids of their own
        if linked:
            del self._calls[call.id]
        if not call.done:
            call.give_up(why)
            call.notify()
        if not linked or self.phase is Phase.DOWN:
            return None
        return self._send((wire.pack_frame(wire.CANCEL, call.id),))

    def withdraw(self, call: Call) -> bool:
        """Whether the call still waited for a link; then it is the caller's again, to go another way."""
        return self.waiting.pop(call, self) is None

    def abandon(self) -> None:
        """In a forked child: the calls are the parent's, which sends those that wait."""
        self.phase = Phase.DOWN
        self.waiting.clear()
        self._calls.clear()

    def take_chunk(self, call: Call) -> tuple[Payload, Parts | None]:
        """The next chunk of a stream that has one, and the credit to send for it."""
        payload = call.chunks.popleft()
        call.consumed += wire.chunk_cost(payload)
        if call.consumed < CREDIT_STEP or call.id not in self._calls:
            return payload, None
        credit, call.consumed = call.consumed, 0
        return payload, self._send((wire.pack_credit(call.id, credit),))

    def _send(self, parts: Parts) -> Parts:
        self._sent += sum(map(len, parts))
        return parts
