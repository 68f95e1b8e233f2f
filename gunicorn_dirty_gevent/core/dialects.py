"""The three ways to speak on the one socket, told apart by a connection's first bytes.

    GD version 2   our client                      ``GD`` 0x02   frames as in `core.wire`
    GD version 1   stock clients, ``gunicornc``    ``GD`` 0x01   the same header, a TLV body
    JSON           any language, netcat            0x00          4-byte length, then a JSON object

A dialect turns what it reads into the frames of version 2, whose REQUEST names in its envelope the
codec of the body, and packs version 2's frames in its own way. Values are never looked into: a body
goes to the worker as it came, and a worker's answer comes encoded for the dialect that asked.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any, Protocol

from . import wire
from .wire import Blob, Frame, FrameDecoder, Parts, Payload, WireError, inline_bytes

CODEC_TLV, CODEC_JSON = 1, 2
"""Codecs of a REQUEST's body beside `wire.CODEC_MSGPACK`: the whole message of its dialect."""

STASH, STATUS, MANAGE = wire.STASH, 0x11, 0x12
"""Message types of version 1 that the arbiter answers itself (``gunicorn/dirty/protocol.py``)."""

UNREADABLE = -1
"""Kind of a frame that stands for a message which was whole, but makes no sense; its payload says why.
Its sender gets an error and may go on."""


class Dialect(Protocol):
    """One connection's side of the arbiter."""

    codec: int
    """How answers are encoded."""

    gives_credit: bool
    """Whether the reader of a stream says how much it has taken. If not, what the kernel has taken
    counts as read."""

    def receive_data(self, data: bytes) -> None: ...

    def frames(self) -> list[Frame]: ...

    def pack(self, kind: int, call_id: int, payload: Payload) -> Parts: ...


class Gd2(FrameDecoder):
    """Version 2."""

    codec = wire.CODEC_MSGPACK
    gives_credit = True

    def pack(self, kind: int, call_id: int, payload: Payload) -> Parts:
        return wire.pack_parts(kind, call_id, payload)


class Gd1:
    """Version 1: gunicorn's own."""

    codec = CODEC_TLV
    gives_credit = False

    _KEYS = {wire.RESPONSE: b"result", wire.ERROR: b"error", wire.CHUNK: b"data"}

    def __init__(self, max_message: int) -> None:
        kinds = frozenset((wire.REQUEST, STASH, STATUS, MANAGE))
        self._decoder = FrameDecoder(max_message, version=1, kinds=kinds)

    def receive_data(self, data: bytes) -> None:
        self._decoder.receive_data(data)

    def frames(self) -> list[Frame]:
        return [self._read(frame) for frame in self._decoder.frames()]

    def _read(self, frame: Frame) -> Frame:
        if frame.kind != wire.REQUEST:
            return frame
        body = inline_bytes(frame.payload)
        app, action = tlv_names(body)
        return _request(frame.call_id, app, action, CODEC_TLV, body)

    def pack(self, kind: int, call_id: int, payload: Payload) -> Parts:
        key = self._KEYS.get(kind)
        if key is None:
            return (wire.pack_frame(kind, call_id, b"", version=1),)
        # A TLV dict of one entry around the value that the worker encoded.
        head = b"\x21\x00\x00\x00\x01\x11" + struct.pack(">I", len(key)) + key
        return (wire.pack_frame(kind, call_id, head + inline_bytes(payload), version=1),)


class Json:
    """A 4-byte big-endian length and a JSON object (gunicorn 25.0's protocol)."""

    codec = CODEC_JSON
    gives_credit = False

    _ANSWERS = {
        wire.RESPONSE: ("response", "result"),
        wire.ERROR: ("error", "error"),
        wire.CHUNK: ("chunk", "data"),
        wire.END: ("end", ""),
    }

    def __init__(self, max_message: int) -> None:
        self._max_message = max_message
        self._buffer = bytearray()
        self._ids: dict[int, str] = {}  # ours -> the client's, as JSON
        self._last_id = 0

    def receive_data(self, data: bytes) -> None:
        self._buffer += data

    def frames(self) -> list[Frame]:
        found = []
        while len(self._buffer) >= 4:
            length = int.from_bytes(self._buffer[:4], "big")
            if not length:
                raise WireError("a message of 0 bytes")
            if length > self._max_message:
                raise WireError(f"a message of {length} bytes; {self._max_message} may be sent")
            if len(self._buffer) < 4 + length:
                break
            text = bytes(self._buffer[4 : 4 + length])
            del self._buffer[: 4 + length]
            found.append(self._read(text))
        return found

    def _read(self, text: bytes) -> Frame:
        self._last_id += 1
        try:
            message = json.loads(text)
            if not isinstance(message, dict):
                raise WireError("a message is a JSON object")
            self._ids[self._last_id] = json.dumps(message.get("id"))
            if message.get("type", "request") != "request":
                raise WireError('the type of a message to the arbiter is "request"')
            app, action = message.get("app_path"), message.get("action")
            if not isinstance(app, str) or not isinstance(action, str):
                raise WireError('a request has "app_path" and "action", both strings')
            return _request(self._last_id, app, action, CODEC_JSON, text)
        except (ValueError, RecursionError) as error:
            reason = f"the message is not JSON: {error}"
        except WireError as error:
            reason = str(error)
        return Frame(UNREADABLE, self._last_id, reason.encode("utf-8", "replace"))

    def pack(self, kind: int, call_id: int, payload: Payload) -> Parts:
        name, key = self._ANSWERS[kind]
        theirs = self._ids.get(call_id, "null") if kind == wire.CHUNK else self._ids.pop(call_id, "null")
        head = f'{{"type": "{name}", "id": {theirs}'.encode()
        tail = b', "%s": %s}' % (key.encode(), inline_bytes(payload)) if key else b"}"
        return ((len(head) + len(tail)).to_bytes(4, "big") + head + tail,)


class Opening:
    """The decoder of a connection whose dialect is not known yet; then the dialect's own."""

    def __init__(self, max_message: int) -> None:
        self.dialect: Dialect | None = None
        self._max_message = max_message
        self._data = b""
        self._blobs: list[Blob | bytes] = []  # one for each of the first bytes at most

    def receive_data(self, data: bytes) -> None:
        if self.dialect is None:
            self._data += data
            if len(self._data) >= 3:
                self.dialect = self._choose()
                data, self._data = self._data, b""
                blobs, self._blobs = self._blobs, []
                for blob in blobs:
                    self.receive_blob(blob)
        if self.dialect is not None:
            self.dialect.receive_data(data)

    def receive_blob(self, blob: Blob | bytes) -> None:
        if self.dialect is None:  # a read may hold a hello and a request that came with it
            self._blobs.append(blob)
        elif isinstance(self.dialect, Gd2):  # the others know no descriptors
            self.dialect.receive_blob(blob)

    def frames(self) -> list[Frame]:
        return [] if self.dialect is None else self.dialect.frames()

    def _choose(self) -> Dialect:
        if self._data.startswith(wire.MAGIC + b"\x01"):
            return Gd1(self._max_message)
        if self._data[0] == 0:  # a JSON message under 16 MiB
            return Json(self._max_message)
        return Gd2(self._max_message)  # or its error


def _request(call_id: int, app: str, action: str, codec: int, body: bytes) -> Frame:
    """A REQUEST of version 2. These clients name no time budget, and do not say whether they iterate."""
    try:
        names = wire.pack_names(app, action)
    except ValueError as error:
        raise WireError(str(error)) from error
    payload = wire.pack_envelope(names, math.inf, wire.FLAG_STREAM, codec) + body
    return Frame(wire.REQUEST, call_id, payload)


# TLV, as far as finding two strings in a dict. The format is gunicorn's (``gunicorn/dirty/tlv.py``).

_BOOL, _STRING, _LIST, _DICT = 0x01, 0x11, 0x20, 0x21
_FIXED = {0x00: 0, _BOOL: 1, 0x05: 8, 0x06: 8}  # None, bool, int64, float64
_SIZED = (0x10, _STRING)

_MAX_ENTRIES, _MAX_SKIPPED = 16, 1024
"""How far into a dict, and into one of its values, the arbiter looks: gunicorn's clients write app and
action first, and a larger search would hold up everybody."""


def tlv_names(data: bytes) -> tuple[str, str]:
    """`app_path` and `action` of a TLV dict, whose other entries are skipped, not decoded."""
    wanted: dict[str, Any] = {"app_path": None, "action": None}
    try:
        if data[0] != _DICT:
            raise WireError("the body of a request is a TLV dict")
        position = 5
        for _ in range(min(_count(data, 1), _MAX_ENTRIES)):
            key, position = _string(data, position)
            if key in wanted:
                wanted[key], position = _string(data, position)
                if None not in wanted.values():
                    return wanted["app_path"], wanted["action"]
            else:
                position = _skip(data, position)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise WireError("the TLV body of a request is broken") from error
    raise WireError("a request has app_path and action")


def _count(data: bytes, position: int) -> int:
    return int(struct.unpack_from(">I", data, position)[0])


def _string(data: bytes, position: int) -> tuple[str, int]:
    if data[position] != _STRING:
        raise WireError("app_path, action and keys are strings")
    start = position + 5
    end = start + _count(data, position + 1)
    if end > len(data):
        raise WireError("the TLV body of a request is cut short")
    return data[start:end].decode(), end


def _skip(data: bytes, position: int) -> int:
    """The position after a value. No recursion: nesting is the sender's choice."""
    left = 1
    for _ in range(_MAX_SKIPPED):
        if not left:
            return position
        left -= 1
        kind = data[position]
        position += 1
        if kind in _FIXED:
            position += _FIXED[kind]
        elif kind in _SIZED:
            position += 4 + _count(data, position)
        elif kind in (_LIST, _DICT):
            left += _count(data, position) * (2 if kind == _DICT else 1)
            position += 4
        else:
            raise WireError(f"unknown TLV type {kind:#x}")
    raise WireError("app_path and action stand too far back in a request")
