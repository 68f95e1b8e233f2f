"""Frames of the ``GD`` version 2 wire: bytes in, frames out.

A frame is gunicorn's 16-byte dirty header with version 2 (magic ``GD``, version, kind, payload
length, call id; big-endian) and a payload. The layout of the header is gunicorn's
(``gunicorn/dirty/protocol.py``), so one socket can tell both versions apart by the third byte.

A REQUEST's payload starts with an envelope: what the arbiter must know to place the call. The body
after it is only read by the worker.

A large body may come beside its frame, in a descriptor (`Detached`): the kind then has the bit
`DETACHED`, the payload is what stands before the body, and the arbiter hands the descriptor on
without touching the bytes.

Ids are chosen by the side that opens the call and mean nothing beyond that one link.
"""

from __future__ import annotations

import enum
import functools
import math
import struct
from collections import deque
from typing import NamedTuple, Protocol

MAGIC = b"GD"
VERSION = 2

_HEADER = struct.Struct(">2sBBIQ")
HEADER_SIZE = _HEADER.size
_ENVELOPE = struct.Struct(">dBBHH")  # budget, flags, codec, length of app, length of action
_BUDGET = struct.Struct(">d")
_LIMITS = struct.Struct(">dBB")
_NAMES = struct.Struct(">HH")
_HELLO = struct.Struct(">Q")
_HELLO_FLAGS = struct.Struct(">B")
_CREDIT = struct.Struct(">I")
_LANE = struct.Struct(">I")
_ROUTE = struct.Struct(">IQ")  # lane, the caller's id
ROUTE_SIZE = _ROUTE.size
"""Bytes by which a ROUTED is longer than the REQUEST it was."""

DEFAULT_MAX_MESSAGE = 128 * 1024 * 1024
"""Bytes of one payload. Twice gunicorn's 64 MiB (``MAX_MESSAGE_SIZE``), so that a value which is
itself 64 MiB fits together with its framing; the length field would allow 4 GiB."""

MIN_CHUNK_COST = 8192
"""The least that a chunk takes of its stream's window, in bytes: bounds the *number* of chunks under
way too (32 with the default window), for tiny chunks cost memory beyond their bytes, and what is under
way is what everybody else's answers wait behind: with 20 busy streams a small call took 5.0 ms with 64
chunks, 2.9 with 32 and 2.0 with 16, for 135,000, 120,000 and 94,000 chunks a second."""

MAX_CREDIT = 0xFFFFFFFF
"""The most that one CREDIT gives."""

STREAM_WINDOW = 32 * MIN_CHUNK_COST
"""Bytes of chunks (256 KiB) a worker may send ahead of its reader: above a socket buffer (208 KiB on
Linux), so a fast reader never waits for credit; small enough for thousands of streams."""


class Kind(enum.IntEnum):
    """What a frame says. Values below 0x06 are gunicorn's."""

    REQUEST = 0x01
    RESPONSE = 0x02
    ERROR = 0x03
    CHUNK = 0x04
    END = 0x05
    CANCEL = 0x06  # the caller has gone away: stop the call, answer with any last frame
    CREDIT = 0x07  # the reader took chunks: so many bytes more may be sent
    HELLO = 0x08  # first frame both ways on a client's link; the arbiter's carries its limits
    GOAWAY = 0x09  # arbiter: it ends, send new calls to the next one; client: nothing more comes
    LANE = 0x0A  # arbiter, to a client and to a worker: the ends of a lane between them
    ROUTED = 0x0B  # arbiter, to a worker: a REQUEST, and the lane by which it is to be answered
    STASH = 0x10  # an operation on the stash, gunicorn's number; the arbiter itself answers
    CLASSES = 0x20  # worker: what the app classes declare
    READY = 0x21  # worker: apps are loaded; from now on it takes calls
    BLOCKED = 0x23  # worker: this call keeps the hub from running
    PING = 0x24  # arbiter: is your hub running? worker, without being asked: it is
    DONE = 0x25  # worker: this call's last frame has gone by its lane
    PACE = 0x26  # worker: a stream has sent chunks by its lane, and goes on or waits for its reader
    PONG = 0x27  # worker: the answer to a PING, and to all that came before it
    STOP = 0x22  # arbiter: finish what runs, then exit; worker: send me nothing more, I go


REQUEST = int(Kind.REQUEST)
RESPONSE = int(Kind.RESPONSE)
ERROR = int(Kind.ERROR)
CHUNK = int(Kind.CHUNK)
END = int(Kind.END)
CANCEL = int(Kind.CANCEL)
CREDIT = int(Kind.CREDIT)
HELLO = int(Kind.HELLO)
GOAWAY = int(Kind.GOAWAY)
LANE = int(Kind.LANE)
ROUTED = int(Kind.ROUTED)
STASH = int(Kind.STASH)
CLASSES = int(Kind.CLASSES)
READY = int(Kind.READY)
BLOCKED = int(Kind.BLOCKED)
PING = int(Kind.PING)
DONE = int(Kind.DONE)
PACE = int(Kind.PACE)
PONG = int(Kind.PONG)
STOP = int(Kind.STOP)

FLAG_STREAM = 0x01
"""Envelope flag: the caller iterates; without it an action that returns a generator is an error."""

FLAG_DETACH = 0x02
"""Envelope flag: the caller can take large answers as descriptors."""

DETACHED = 0x80
"""Bit of a frame's kind: its body is in the descriptor that came with it."""

DETACHABLE = frozenset((REQUEST, ROUTED, RESPONSE, CHUNK))
"""Kinds whose body may be in a descriptor."""

BY_LANE = frozenset((RESPONSE, CHUNK, END))
"""Kinds that may come by a lane."""

_KINDS = frozenset(int(kind) for kind in Kind) | {kind | DETACHED for kind in (*DETACHABLE, LANE)}

DETACH_SIZE = 262144
"""Bytes from which a body is put into a descriptor, where both sides can: about a socket buffer (208 KiB
on Linux), above which each bufferful costs a turn of every process on the way. Measured: a socket copies
256 KiB in 23 us, a file takes 142; but an echo of 1 MiB takes 5.9 ms inline and 1.7 by descriptor."""

MIN_DETACHED = 65536
"""Bytes below which a body in a descriptor is refused: a hostile peer would hold descriptors for
nothing."""

MAX_LOOSE = 64
"""Descriptors that may have come ahead of the frames they belong to. An honest peer sends each with its
frame's first bytes, so at most what one read holds."""

CODEC_MSGPACK = 0

STASH_ADD, STASH_INCR, STASH_COMPARE_AND_SET = 0x21, 0x22, 0x23
"""Stash operations beside gunicorn's, which end at 0x0A (``gunicorn/dirty/protocol.py``)."""


class WireError(Exception):
    """The peer sent bytes that are no frames. The link can't be used any further."""


class Blob(Protocol):
    """Bytes that are somewhere else (`gunicorn_dirty_gevent.blob`)."""

    @property
    def descriptor(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, start: int, size: int) -> bytes: ...

    def view(self) -> memoryview: ...

    def take(self) -> int: ...


class Detached:
    """A payload, or a part to send, whose end is in a `Blob`: `inline` and then the blob's bytes."""

    __slots__ = ("blob", "inline")

    def __init__(self, inline: bytes, blob: Blob) -> None:
        self.inline = inline
        self.blob = blob

    def __len__(self) -> int:
        return len(self.inline) + len(self.blob)


Payload = bytes | Detached


class Pieces:
    """A large body that nobody has joined."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: tuple[bytes, ...]) -> None:
        self.parts = parts
        self.size = sum(map(len, parts))

    def __len__(self) -> int:
        return self.size


Body = bytes | Pieces
"""What is encoded, before it is sent."""


class Frame(NamedTuple):
    """One frame; `kind` is a `Kind` as a plain int (hot path)."""

    kind: int
    call_id: int
    payload: Payload


_frame = functools.partial(tuple.__new__, Frame)
"""`Frame` from a tuple, without the Python function that a NamedTuple's class calls: 0.12 us for 0.21."""


class Request(NamedTuple):
    """A REQUEST as the arbiter needs it: the envelope read, the rest as it came."""

    app: str
    action: str
    budget: float  # seconds the caller will still wait; inf for no limit
    flags: int
    codec: int
    payload: Payload  # the whole payload, envelope and body
    body_at: int

    @property
    def name(self) -> str:
        """What is called, for people."""
        return f"{self.app}.{self.action}"

    @property
    def stream(self) -> bool:
        return bool(self.flags & FLAG_STREAM)

    @property
    def body(self) -> memoryview | Blob:
        """The encoded arguments."""
        payload = self.payload
        if isinstance(payload, Detached):
            return payload.blob
        return memoryview(payload)[self.body_at :]


Parts = tuple[bytes | memoryview | Detached, ...]
"""To be sent one after the other."""


def inline_bytes(payload: Payload) -> bytes:
    """The payload of a frame whose kind is not in `DETACHABLE`."""
    assert isinstance(payload, bytes)
    return payload


def pack_frame(kind: int, call_id: int, payload: bytes = b"", version: int = VERSION) -> bytes:
    """One frame as bytes."""
    return _HEADER.pack(MAGIC, version, kind, len(payload), call_id) + payload


def pack_detached(kind: int, call_id: int, inline: bytes, blob: Blob) -> Parts:
    """A frame whose body is in a descriptor."""
    header = _HEADER.pack(MAGIC, VERSION, kind | DETACHED, len(inline), call_id)
    return (Detached(header + inline, blob),)


def pack_parts(kind: int, call_id: int, payload: Payload | Pieces) -> Parts:
    """`pack_frame` for payloads of any size."""
    if isinstance(payload, Detached):
        return pack_detached(kind, call_id, payload.inline, payload.blob)
    header = _HEADER.pack(MAGIC, VERSION, kind, len(payload), call_id)
    if isinstance(payload, Pieces):
        return (header, *payload.parts)
    return (header + payload,) if len(payload) <= _JOIN_LIMIT else (header, payload)


_JOIN_LIMIT = 65536
"""Bodies above this are handed to the socket as a part of their own instead of being copied behind
their header; below, one copy is cheaper than a second part."""


@functools.lru_cache(maxsize=1024)
def pack_names(app: str, action: str) -> bytes:
    """App and action as they stand in an envelope. Cached: a program calls few of them, often.

    Raises `ValueError` when they have no place in it (over 65,535 bytes, or not UTF-8).
    """
    app_bytes = app.encode()
    action_bytes = action.encode()
    if len(app_bytes) > 0xFFFF or len(action_bytes) > 0xFFFF:
        raise ValueError("the names of app and action are limited to 65535 bytes each")
    return _NAMES.pack(len(app_bytes), len(action_bytes)) + app_bytes + action_bytes


def pack_envelope(names: bytes, budget: float, flags: int = 0, codec: int = 0) -> bytes:
    """The envelope of a REQUEST; the body follows it."""
    return _LIMITS.pack(budget, flags, codec) + names


def pack_request(call_id: int, envelope: bytes, body: Body, kind: int = REQUEST) -> Parts:
    """A REQUEST frame (or a STASH one, which has no envelope)."""
    size = len(envelope) + len(body)
    header = _HEADER.pack(MAGIC, VERSION, kind, size, call_id)
    if isinstance(body, Pieces):
        return (header + envelope, *body.parts)
    if len(body) <= _JOIN_LIMIT:
        return (header + envelope + body,)
    return (header + envelope, body)


def repack_request(call_id: int, request: Request, budget: float, route: bytes = b"") -> Parts:
    """The same request for the next link: another id, less time, nothing else touched; ROUTED, if there
    is a route (`pack_route`)."""
    payload = request.payload
    kind = ROUTED if route else REQUEST
    if isinstance(payload, Detached):
        inline = route + _BUDGET.pack(budget) + payload.inline[_BUDGET.size :]
        return pack_detached(kind, call_id, inline, payload.blob)
    size = len(route) + len(payload)
    head = _HEADER.pack(MAGIC, VERSION, kind, size, call_id) + route + _BUDGET.pack(budget)
    if len(payload) <= _JOIN_LIMIT:
        return (head + payload[_BUDGET.size :],)
    return (head, memoryview(payload)[_BUDGET.size :])


def pack_route(lane: int, call_id: int) -> bytes:
    """By which lane, and under which id, a call is to be answered."""
    return _ROUTE.pack(lane, call_id)


def unpack_routed(payload: Payload) -> tuple[int, int, Request]:
    """Lane, id and `Request` of a ROUTED's payload, which only the arbiter makes."""
    inline = payload.inline if isinstance(payload, Detached) else payload
    lane, call_id = _ROUTE.unpack_from(inline)
    return lane, call_id, unpack_request(payload, _ROUTE.size)


def unpack_request(payload: Payload, start: int = 0) -> Request:
    """Read a REQUEST's payload, from `start` on. Raises `WireError` when the envelope is broken."""
    inline = payload.inline if isinstance(payload, Detached) else payload
    names_at = start + _ENVELOPE.size
    if len(inline) < names_at:
        raise WireError(f"request envelope cut short at {len(inline)} bytes")
    budget, flags, codec, app_size, action_size = _ENVELOPE.unpack_from(inline, start)
    app_end = names_at + app_size
    end = app_end + action_size
    if end > len(inline):
        raise WireError("request envelope names more bytes than the frame has")
    if end < len(inline) and inline is not payload:
        raise WireError("a request has its body in its frame and in a descriptor")
    if not budget > -math.inf:
        raise WireError("request envelope has no number for its time budget")
    try:
        app = inline[names_at:app_end].decode()
        action = inline[app_end:end].decode()
    except UnicodeDecodeError as error:
        raise WireError("app or action in a request envelope is not UTF-8") from error
    return Request(app, action, budget, flags, codec, payload, end)


class Hello(NamedTuple):
    """What a side says of itself first."""

    max_message: int = 0  # bytes of the largest payload that it takes
    flags: int = 0


HELLO_DESCRIPTORS = 0x01
"""Hello flag: the arbiter takes requests with their body in a descriptor."""

HELLO_LANES = 0x02
"""Hello flag: the client takes answers by lanes."""


def pack_hello(max_message: int = 0, flags: int = 0) -> bytes:
    """The first frame of either side."""
    return pack_frame(HELLO, 0, _HELLO.pack(max_message) + _HELLO_FLAGS.pack(flags))


def unpack_hello(payload: Payload) -> Hello:
    """The peer's `Hello`. Longer payloads are read too: room for later versions; one without flags
    has none set."""
    data = inline_bytes(payload)
    if len(data) < _HELLO.size:
        raise WireError("hello cut short")
    flags = data[_HELLO.size] if len(data) > _HELLO.size else 0
    return Hello(int(_HELLO.unpack_from(data)[0]), flags)


def pack_lane(number: int, end: Blob) -> Parts:
    """A LANE frame, with one of its ends beside it."""
    return pack_detached(LANE, 0, _LANE.pack(number), end)


def unpack_lane(payload: Payload) -> tuple[int, int | None]:
    """The lane's number, and its descriptor, now the caller's; None if it was lost on the way."""
    if isinstance(payload, Detached):
        return int(_LANE.unpack(payload.inline)[0]), payload.blob.take()
    return int(_LANE.unpack(payload)[0]), None


def pack_credit_payload(amount: int) -> bytes:
    """So many bytes more may be sent on the stream."""
    return _CREDIT.pack(amount)


def pack_credit(call_id: int, amount: int) -> bytes:
    """A CREDIT frame."""
    return pack_frame(CREDIT, call_id, pack_credit_payload(amount))


def unpack_credit(payload: Payload) -> int:
    if len(payload) != _CREDIT.size:
        raise WireError("credit frame of the wrong size")
    return int(_CREDIT.unpack(inline_bytes(payload))[0])


def pack_pace(waits: bool) -> bytes:
    """A stream waits for its reader, or goes on."""
    return bytes((waits,))


def unpack_pace(payload: Payload) -> bool:
    return inline_bytes(payload) != b"\0"


def chunk_cost(payload: Payload | Pieces) -> int:
    """What a chunk takes of its stream's window."""
    size = len(payload)
    return size if size > MIN_CHUNK_COST else MIN_CHUNK_COST


class FrameDecoder:
    """Bytes of one link in, whole frames out.

    `receive_data` only stores; `frames` returns what is complete. After an error the frames before
    it are still returned, then every further call raises the same `WireError`.

    A descriptor is handed in by `receive_blob`, before the bytes it came with.
    """

    def __init__(
        self, max_message: int = DEFAULT_MAX_MESSAGE, version: int = VERSION, kinds: frozenset[int] = _KINDS
    ) -> None:
        self.max_message = max_message
        self._version = version
        self._kinds = kinds
        self._parts: list[bytes] = []
        self._size = 0
        # Nothing can be complete before so many bytes are there: a large frame is joined once, not
        # at each read.
        self._needed = HEADER_SIZE
        self._error: WireError | None = None
        self._blobs: deque[Blob | bytes] = deque()  # their frames are not complete yet

    @property
    def buffered(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return self._size

    def receive_data(self, data: bytes) -> None:
        if self._error is None:
            self._parts.append(data)
            self._size += len(data)

    def receive_blob(self, blob: Blob | bytes) -> None:
        """The body of a frame that is to come; as bytes where no descriptor could be kept for it, which
        are none if it is lost."""
        if len(self._blobs) < MAX_LOOSE:
            self._blobs.append(blob)
        elif self._error is None:
            self._error = WireError(f"{MAX_LOOSE} descriptors came without their frames")
            self._blobs.clear()

    def frames(self) -> list[Frame]:
        if self._error is not None:
            raise self._error
        if self._size < self._needed:
            return []
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        found: list[Frame] = []
        position = 0
        size = len(data)
        self._needed = HEADER_SIZE
        while size - position >= HEADER_SIZE:
            magic, version, kind, length, call_id = _HEADER.unpack_from(data, position)
            if magic != MAGIC or version != self._version or kind not in self._kinds:
                return self._fail(found, data[position : position + HEADER_SIZE])
            if length > self.max_message:
                return self._fail(found, b"", f"a frame of {length} bytes; {self.max_message} may be sent")
            start = position + HEADER_SIZE
            if size - start < length:
                self._needed = HEADER_SIZE + length
                break
            position = start + length
            if kind < DETACHED:
                found.append(_frame((kind, call_id, data[start:position])))
                continue
            try:
                payload = self._with_blob(kind - DETACHED, data[start:position])
            except WireError as error:
                return self._fail(found, b"", str(error))
            found.append(Frame(kind - DETACHED, call_id, payload))
        self._parts = [data[position:]] if position < size else []
        self._size = size - position
        return found

    def _with_blob(self, kind: int, inline: bytes) -> Payload:
        """The payload of a frame whose body came beside it."""
        if not self._blobs:
            raise WireError("a frame names a descriptor, and none came with it")
        blob = self._blobs.popleft()
        if kind == LANE:
            return inline if isinstance(blob, bytes) else Detached(inline, blob)
        if not len(blob):
            raise WireError("a descriptor was lost (this process has too many), or is of an empty file")
        size = len(inline) + len(blob)
        if size > self.max_message:
            raise WireError(f"a frame of {size} bytes; {self.max_message} may be sent")
        if len(blob) < MIN_DETACHED:
            raise WireError(f"{len(blob)} bytes in a descriptor; the least is {MIN_DETACHED}")
        if inline and kind not in (REQUEST, ROUTED):
            raise WireError("an answer stands in its frame and in a descriptor")
        return inline + blob if isinstance(blob, bytes) else Detached(inline, blob)

    def _fail(self, found: list[Frame], header: bytes, why: str = "") -> list[Frame]:
        self._error = WireError(why or f"not a frame of this protocol: {header.hex()}")
        self._parts = []
        self._size = 0
        if not found:
            raise self._error
        return found
