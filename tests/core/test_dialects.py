"""The dialects beside our own: tables, and bytes in any pieces."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from gunicorn.dirty.protocol import BinaryProtocol, DirtyProtocol
from gunicorn.dirty.tlv import TLVEncoder
from hypothesis import given
from hypothesis import strategies as st
from support.beside import Beside

from gunicorn_dirty_gevent.core import dialects, wire
from gunicorn_dirty_gevent.core.dialects import Gd1, Gd2, Json, Opening, tlv_names
from gunicorn_dirty_gevent.core.wire import Frame, WireError

LIMIT = 100_000


def message(value: Any) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return len(text).to_bytes(4, "big") + text


def asked(**fields: Any) -> dict[str, Any]:
    return {"type": "request", "id": 1, "app_path": "m:A", "action": "go", **fields}


def stock(app: str = "m:A", action: str = "go", *args: Any, **kwargs: Any) -> bytes:
    return bytes(BinaryProtocol.encode_request(7, app, action, args, kwargs))


def parsed(decoder: Any, data: bytes) -> list[Frame]:
    decoder.receive_data(data)
    return list(decoder.frames())


# Which dialect it is


@pytest.mark.parametrize(
    ("first", "kind"),
    [
        (stock(), Gd1),
        (message(asked()), Json),
        (wire.pack_hello(), Gd2),
        (b"GET / HTTP/1.1\r\n", Gd2),
        (b"GD\x03", Gd2),
        (b"\xff\xff\xff", Gd2),
    ],
)
def test_the_first_bytes_tell(first: bytes, kind: type) -> None:
    opening = Opening(LIMIT)
    opening.receive_data(first)
    assert type(opening.dialect) is kind


@pytest.mark.parametrize("length", [0, 1, 2])
def test_too_few_bytes_tell_nothing(length: int) -> None:
    opening = Opening(LIMIT)
    opening.receive_data(stock()[:length])
    assert opening.dialect is None and opening.frames() == []
    opening.receive_data(stock()[length:])
    assert [frame.kind for frame in opening.frames()] == [wire.REQUEST]


@given(
    st.lists(
        st.sampled_from([message(asked(id=n)) for n in range(4)] + [message([1]), message(b"{")]), max_size=8
    ),
    st.integers(),
)
def test_json_in_any_pieces_gives_the_same_frames(messages: list[bytes], seed: int) -> None:
    data = message(asked()) + b"".join(messages)
    whole, pieces, found = Opening(LIMIT), Opening(LIMIT), []
    rest = data
    while rest:
        cut = random.Random(seed + len(rest)).randint(1, len(rest))
        found += parsed(pieces, rest[:cut])
        rest = rest[cut:]
    assert found == parsed(whole, data) and len(found) == 1 + len(messages)


@given(st.binary(max_size=200))
def test_garbage_only_ever_is_a_wire_error(data: bytes) -> None:
    for head in (b"", b"\x00\x00\x00", b"GD\x01", b"GD\x01\x01\x00\x00\x00", stock()):
        try:
            parsed(Opening(LIMIT), head + data)
        except WireError:
            pass


# JSON


def test_a_json_request_becomes_a_request_with_its_text_as_body() -> None:
    decoder = Json(LIMIT)
    (frame,) = parsed(decoder, message(asked(args=[1], kwargs={"x": 2})))
    request = wire.unpack_request(frame.payload)
    assert (request.app, request.action, request.codec) == ("m:A", "go", dialects.CODEC_JSON)
    assert request.budget == math.inf and request.stream
    assert json.loads(bytes(request.body)) == asked(args=[1], kwargs={"x": 2})


@pytest.mark.parametrize("theirs", [1, "one", None, 1.5, [1, {"a": 2}], {"é": "\u2028"}, True])
def test_answers_carry_the_id_that_was_sent_whatever_it_is(theirs: Any) -> None:
    decoder = Json(LIMIT)
    (frame,) = parsed(decoder, message(asked(id=theirs)))
    for kind, payload, answer in (
        (wire.CHUNK, b'"a"', {"type": "chunk", "data": "a"}),
        (wire.CHUNK, b"2", {"type": "chunk", "data": 2}),
        (wire.END, b"", {"type": "end"}),
    ):
        (packed,) = decoder.pack(kind, frame.call_id, payload)
        assert int.from_bytes(packed[:4], "big") == len(packed) - 4
        assert json.loads(packed[4:]) == {**answer, "id": theirs}


def test_ids_of_ended_calls_are_forgotten() -> None:
    decoder = Json(LIMIT)
    (frame,) = parsed(decoder, message(asked(id="x")))
    (first,) = decoder.pack(wire.RESPONSE, frame.call_id, b"1")
    (late,) = decoder.pack(wire.RESPONSE, frame.call_id, b"1")
    assert json.loads(first[4:])["id"] == "x" and json.loads(late[4:])["id"] is None


@pytest.mark.parametrize(
    ("text", "why", "theirs"),
    [
        (b"{", "not JSON", None),
        (b"\xff\xfe", "not JSON", None),
        (b"[" * 5000, "not JSON", None),
        (b"[1]", "a JSON object", None),
        (b"null", "a JSON object", None),
        (asked(type="response"), '"request"', 1),
        (asked(type=None), '"request"', 1),
        (asked(app_path=None), "both strings", 1),
        (asked(app_path=3, id="i"), "both strings", "i"),
        (asked(action=["go"]), "both strings", 1),
        ({"id": 5}, "both strings", 5),
        (asked(app_path="m:" + "A" * 70_000), "65535", 1),
    ],
)
def test_a_whole_message_that_makes_no_sense_has_an_answer(text: Any, why: str, theirs: Any) -> None:
    decoder = Json(LIMIT)
    bad, good = parsed(decoder, message(text) + message(asked(id="next")))
    assert bad.kind == dialects.UNREADABLE and why in bad.payload.decode()
    (packed,) = decoder.pack(wire.ERROR, bad.call_id, b"{}")
    assert json.loads(packed[4:]) == {"type": "error", "id": theirs, "error": {}}
    assert good.kind == wire.REQUEST


@pytest.mark.parametrize("length", [0, LIMIT + 1, 0xFFFFFFFF])
def test_a_length_that_cannot_be_is_a_wire_error(length: int) -> None:
    with pytest.raises(WireError):
        parsed(Json(LIMIT), length.to_bytes(4, "big"))


# Version 1


def test_a_stock_request_becomes_a_request_with_its_message_as_body() -> None:
    data = stock("m:A", "go", 1, x=2)
    (frame,) = parsed(Gd1(LIMIT), data)
    request = wire.unpack_request(frame.payload)
    assert (frame.call_id, request.app, request.action) == (7, "m:A", "go")
    assert request.codec == dialects.CODEC_TLV and bytes(request.body) == data[16:]


@pytest.mark.parametrize(
    ("kind", "payload", "said"),
    [
        (wire.RESPONSE, TLVEncoder.encode([1, "é"]), {"type": "response", "id": 7, "result": [1, "é"]}),
        (wire.CHUNK, TLVEncoder.encode(b"x"), {"type": "chunk", "id": 7, "data": b"x"}),
        (wire.END, b"", {"type": "end", "id": 7}),
        (
            wire.ERROR,
            TLVEncoder.encode({"error_type": "DirtyError", "message": "m", "details": {}}),
            {"type": "error", "id": 7, "error": {"error_type": "DirtyError", "message": "m", "details": {}}},
        ),
    ],
)
def test_a_stock_client_reads_our_answers(kind: int, payload: bytes, said: dict[str, Any]) -> None:
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(5)
        ours.sendall(b"".join(Gd1(LIMIT).pack(kind, 7, payload)))
        assert DirtyProtocol.read_message(theirs) == said


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.text(), st.text(), st.lists(VALUES, max_size=3), st.dictionaries(st.text(), VALUES, max_size=3))
def test_the_names_are_found_in_whatever_a_stock_client_sends(
    app: str, action: str, args: list[Any], kwargs: dict[str, Any]
) -> None:
    assert tlv_names(stock(app, action)[16:]) == (app, action)
    late = TLVEncoder.encode({"kwargs": kwargs, "args": args, "action": action, "app_path": app})
    assert tlv_names(late) == (app, action)


@given(st.binary(max_size=100), st.integers(0, 60))
def test_damaged_tlv_is_a_wire_error_or_two_names(noise: bytes, at: int) -> None:
    data = stock()[16:]
    try:
        app, action = tlv_names(data[:at] + noise + data[at + len(noise) :])
    except WireError:
        return
    assert isinstance(app, str) and isinstance(action, str)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "broken"),
        (TLVEncoder.encode([1]), "TLV dict"),
        (TLVEncoder.encode({"app_path": "m:A"}), "app_path and action"),
        (TLVEncoder.encode({"app_path": 1, "action": "go"}), "strings"),
        (TLVEncoder.encode({"x": [0] * 5000, "app_path": "m:A", "action": "go"}), "too far back"),
        (TLVEncoder.encode({**{str(n): n for n in range(40)}, "app_path": "m:A"}), "app_path and action"),
        (b"\x21\xff\xff\xff\xff\x11\xff\xff\xff\xff", "cut short"),
    ],
)
def test_a_stock_request_without_names_is_a_wire_error(body: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        tlv_names(body)


# Descriptors.


def test_a_body_may_come_in_the_same_read_as_the_first_bytes_of_its_connection():
    opening = dialects.Opening(1000_000)
    blob = Beside()
    (part,) = wire.pack_detached(wire.RESPONSE, 3, b"", blob)
    opening.receive_blob(blob)
    opening.receive_data(wire.pack_hello() + part.inline)
    hello, answer = opening.frames()
    assert (hello.kind, answer.call_id, answer.payload.blob) == (wire.HELLO, 3, blob)


@pytest.mark.parametrize("first", [wire.MAGIC + b"\x01", b"\0\0\0\x02{}"])
def test_the_other_dialects_drop_descriptors(first):
    opening = dialects.Opening(1000_000)
    for _ in range(2 * wire.MAX_LOOSE):
        opening.receive_blob(Beside())
    opening.receive_data(first)
    opening.receive_blob(Beside())
    opening.frames()
