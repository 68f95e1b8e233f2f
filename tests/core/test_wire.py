"""What `core.wire` promises: the same frames however the bytes come, and no harm from any bytes."""

import itertools
import math
import struct

import gunicorn.dirty.protocol as stock
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.beside import Beside

from gunicorn_dirty_gevent.core import wire
from gunicorn_dirty_gevent.core.wire import Frame, FrameDecoder, Kind, WireError

ids = st.integers(0, 2**64 - 1)
frames_lists = st.lists(
    st.builds(Frame, st.sampled_from([int(kind) for kind in Kind]), ids, st.binary(max_size=300)),
    max_size=12,
)
names = st.text(max_size=40)
budgets = st.floats(allow_nan=False).filter(lambda budget: budget != -math.inf)
GOOD = wire.pack_frame(wire.END, 7, b"abc")


def split(data, cuts):
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def decoded(pieces, **options):
    decoder = FrameDecoder(**options)
    found = []
    for piece in pieces:
        decoder.receive_data(piece)
        found += decoder.frames()
    return decoder, found


def envelope(app="m:A", action="go", budget=5.0, **options):
    return wire.pack_envelope(wire.pack_names(app, action), budget, **options)


# The header is gunicorn's.


def test_the_header_is_gunicorns_with_version_2():
    assert (wire.HEADER_SIZE, wire.MAGIC) == (stock.HEADER_SIZE, stock.MAGIC)
    assert wire.VERSION == 2 != stock.VERSION
    for kind in (wire.REQUEST, wire.RESPONSE, wire.ERROR, wire.CHUNK, wire.END):
        theirs = bytearray(stock.BinaryProtocol.encode_header(kind, 2**63 + 5, 77))
        assert theirs[2] == stock.VERSION
        theirs[2] = wire.VERSION
        assert wire.pack_frame(kind, 2**63 + 5, b"x" * 77)[: wire.HEADER_SIZE] == bytes(theirs)


def test_kinds_that_gunicorn_has_are_gunicorns_and_ours_are_new():
    for kind in Kind:
        name = f"MSG_TYPE_{kind.name}"
        if hasattr(stock, name):
            assert getattr(stock, name) == kind
        else:
            assert kind not in stock.MSG_TYPE_TO_STR
    assert {kind.name for kind in Kind if kind in stock.MSG_TYPE_TO_STR} == {
        "REQUEST",
        "RESPONSE",
        "ERROR",
        "CHUNK",
        "END",
        "STASH",
    }


def test_stock_bytes_are_no_frames_of_ours():
    with pytest.raises(WireError):
        decoded([stock.BinaryProtocol.encode_header(stock.MSG_TYPE_REQUEST, 1, 0)])


# Frames in any pieces.


@settings(deadline=None)
@given(frames_lists, st.lists(st.integers(0, 10_000), max_size=30))
def test_any_split_gives_the_same_frames(frames, cuts):
    data = b"".join(wire.pack_frame(*frame) for frame in frames)
    decoder, found = decoded(split(data, cuts))
    assert found == frames
    assert decoder.buffered == 0


def test_single_bytes():
    frames = [Frame(wire.CHUNK, n, b"." * n) for n in range(20)]
    data = b"".join(wire.pack_frame(*frame) for frame in frames)
    assert decoded([data[n : n + 1] for n in range(len(data))])[1] == frames


def test_frames_come_as_soon_as_they_are_whole():
    decoder = FrameDecoder()
    decoder.receive_data(GOOD + GOOD[:-1])
    assert decoder.frames() == [Frame(wire.END, 7, b"abc")]
    assert decoder.buffered == len(GOOD) - 1
    assert decoder.frames() == []
    decoder.receive_data(GOOD[-1:])
    assert decoder.frames() == [Frame(wire.END, 7, b"abc")]
    assert decoder.buffered == 0


# Hostile bytes.


@settings(deadline=None)
@given(frames_lists, st.binary(max_size=400), st.lists(st.integers(0, 10_000), max_size=10))
def test_garbage_only_ever_is_a_wire_error(frames, garbage, cuts):
    data = b"".join(wire.pack_frame(*frame) for frame in frames) + garbage
    decoder, found = FrameDecoder(max_message=1000), []
    broken = False
    for piece in split(data, cuts):
        decoder.receive_data(piece)
        try:
            found += decoder.frames()
            assert not broken, "frames after an error"
        except WireError:
            broken = True
    assert found[: len(frames)] == frames
    if broken:
        assert decoder.buffered == 0


@pytest.mark.parametrize(
    "bad",
    [
        b"GE" + GOOD[2:],
        b"GD\x01" + GOOD[3:],
        b"GD\x03" + GOOD[3:],
        b"GD\x02\x00" + GOOD[4:],
        b"GD\x02\x11" + GOOD[4:],  # gunicorn's STATUS
        b"GD\x02\xff" + GOOD[4:],
        wire.pack_frame(wire.CHUNK, 1, b"x" * 101)[: wire.HEADER_SIZE],
        b'\x00\x00\x00\x10{"app": "m:A"}',
        b"GET / HTTP/1.1\r\n",
    ],
)
def test_frames_before_an_error_are_delivered_and_after_it_nothing(bad):
    decoder = FrameDecoder(max_message=100)
    decoder.receive_data(GOOD + bad + GOOD)
    assert decoder.frames() == [Frame(wire.END, 7, b"abc")]
    errors = []
    for _ in range(3):
        with pytest.raises(WireError) as caught:
            decoder.frames()
        errors.append(caught.value)
        decoder.receive_data(GOOD * 1000)
        assert decoder.buffered == 0  # nobody will ask for it
    assert errors[0] is errors[1] is errors[2]


def test_an_error_is_raised_at_once_when_nothing_comes_before_it():
    decoder = FrameDecoder()
    decoder.receive_data(b"GET / HTTP/1.1\r\n")
    with pytest.raises(WireError, match=b"GET / HTTP/1.1\r\n".hex()):
        decoder.frames()


@pytest.mark.parametrize(("size", "fits"), [(99, True), (100, True), (101, False), (2**32 - 1, False)])
def test_the_limit_is_checked_by_the_header_alone(size, fits):
    decoder = FrameDecoder(max_message=100)
    decoder.receive_data(struct.pack(">2sBBIQ", b"GD", 2, wire.CHUNK, size, 1))
    if fits:
        assert decoder.frames() == []
        decoder.receive_data(b"x" * size)
        assert decoder.frames() == [Frame(wire.CHUNK, 1, b"x" * size)]
    else:
        with pytest.raises(WireError, match=f"{size} bytes; 100 may"):
            decoder.frames()


# Requests.


@given(names, names, budgets, st.integers(0, 255), st.integers(0, 255), st.binary(max_size=100), ids)
def test_requests_come_back_as_they_were(app, action, budget, flags, codec, body, call_id):
    parts = wire.pack_request(call_id, envelope(app, action, budget, flags=flags, codec=codec), body)
    (frame,) = decoded(parts)[1]
    assert frame[:2] == (wire.REQUEST, call_id)
    request = wire.unpack_request(frame.payload)
    assert request[:5] == (app, action, budget, flags, codec)
    assert bytes(request.body) == body
    assert request.stream == bool(flags & wire.FLAG_STREAM)


@pytest.mark.parametrize("size", [0, 10, 65536, 65537, 1_000_000])
def test_repacking_keeps_all_but_id_and_budget(size):
    body = bytes(range(256)) * (size // 256) + b"z" * (size % 256)
    packed = wire.pack_request(3, envelope("m:Ä", "gö", 9.5, flags=1, codec=4), body)
    before = wire.unpack_request(decoded(packed)[1][0].payload)
    (frame,) = decoded(wire.repack_request(2**40, before, 1.25))[1]
    after = wire.unpack_request(frame.payload)
    assert frame.call_id == 2**40
    assert after.budget == 1.25
    assert after._replace(budget=9.5, payload=b"") == before._replace(payload=b"")
    assert after.payload[8:] == before.payload[8:]
    assert bytes(after.body) == body


def test_large_bodies_are_not_copied():
    body = b"x" * 100_000
    assert wire.pack_request(1, envelope(), body)[1] is body
    request = wire.unpack_request(envelope() + body)
    part = wire.repack_request(2, request, 1.0)[1]
    assert isinstance(part, memoryview) and part.obj is request.payload


def test_an_answer_in_pieces_is_one_frame():
    pieces = wire.Pieces((b"a" * 5, b"b" * 70_000))
    parts = wire.pack_parts(wire.RESPONSE, 9, pieces)
    assert parts[2] is pieces.parts[1]
    assert decoded(parts)[1] == [Frame(wire.RESPONSE, 9, b"a" * 5 + b"b" * 70_000)]


def broken_envelopes():
    good = envelope("app", "act", 1.0)
    yield from (good[:size] for size in range(len(good)))
    yield struct.pack(">dBBHH", math.nan, 0, 0, 0, 0)
    yield struct.pack(">dBBHH", -math.inf, 0, 0, 0, 0)
    yield struct.pack(">dBBHH", 1.0, 0, 0, 0xFFFF, 0xFFFF) + b"short"
    yield struct.pack(">dBBHH", 1.0, 0, 0, 1, 0) + b"\xff"
    yield struct.pack(">dBBHH", 1.0, 0, 0, 0, 1) + b"\xff"
    yield struct.pack(">dBBHH", 1.0, 0, 0, 1, 1) + "ä".encode()  # cut in the middle


@pytest.mark.parametrize("payload", list(broken_envelopes()))
def test_broken_envelopes(payload):
    with pytest.raises(WireError):
        wire.unpack_request(payload)


@given(st.binary(max_size=60))
def test_envelope_garbage_is_a_request_or_a_wire_error(payload):
    try:
        request = wire.unpack_request(payload)
    except WireError:
        return
    assert request.body_at <= len(payload)
    assert request.budget > -math.inf


@pytest.mark.parametrize("name", ["a" * 65536, "ä" * 32768, "\ud800"])
def test_names_that_cannot_be_sent(name):
    with pytest.raises(ValueError):
        wire.pack_names(name, "b")
    with pytest.raises(ValueError):
        wire.pack_names("a", name)


def test_the_longest_names():
    request = wire.unpack_request(envelope("a" * 65535, "b" * 65535))
    assert (request.app, request.action) == ("a" * 65535, "b" * 65535)


# Bodies that come beside their frames.


def sent(parts):
    """What a link would send of these parts: the bytes, and the bodies that go beside them."""
    parts = [(part.inline, part.blob) if isinstance(part, wire.Detached) else (part, None) for part in parts]
    return b"".join(data for data, _ in parts), [blob for _, blob in parts if blob is not None]


def received(data, *blobs, **options):
    decoder = FrameDecoder(**options)
    for blob in blobs:
        decoder.receive_blob(blob)
    decoder.receive_data(data)
    return decoder.frames()


def test_a_request_with_its_body_beside_it_goes_through_an_arbiter():
    blob = Beside(b"b" * 70_000)
    data, blobs = sent(wire.pack_detached(wire.REQUEST, 5, envelope(budget=9.0, flags=3), blob))
    (frame,) = received(data, *blobs)
    assert (frame.kind, frame.call_id) == (wire.REQUEST, 5)
    request = wire.unpack_request(frame.payload)
    assert request[:5] == ("m:A", "go", 9.0, 3, 0)
    assert len(request.payload) == len(envelope()) + 70_000  # what queues and limits count
    data, blobs = sent(wire.repack_request(77, request, 4.0))
    assert blobs == [blob]
    assert len(data) < 100
    (frame,) = received(data, *blobs)
    request = wire.unpack_request(frame.payload)
    assert (frame.call_id, request.budget, request.body) == (77, 4.0, blob)


@pytest.mark.parametrize("kind", [wire.RESPONSE, wire.CHUNK])
def test_an_answer_beside_its_frame(kind):
    blob = Beside()
    data, blobs = sent(wire.pack_detached(kind, 5, b"", blob))
    (frame,) = received(data, *blobs)
    assert (frame.kind, frame.call_id, len(frame.payload)) == (kind, 5, wire.MIN_DETACHED)
    assert wire.chunk_cost(frame.payload) == wire.MIN_DETACHED
    data, blobs = sent(wire.pack_parts(kind, 9, frame.payload))
    assert blobs == [blob]
    assert received(data, *blobs)[0].payload.blob is blob


def test_bodies_and_frames_are_matched_in_order_however_the_bytes_come():
    first, second = Beside(b"1" * 70_000), Beside(b"2" * 80_000)
    one, _ = sent(wire.pack_detached(wire.RESPONSE, 1, b"", first))
    two, _ = sent(wire.pack_detached(wire.RESPONSE, 2, b"", second))
    decoder = FrameDecoder()
    found = []
    for place, byte in enumerate(GOOD + one + GOOD + two):
        # Each body is there with the first byte of its frame.
        if place == len(GOOD):
            decoder.receive_blob(first)
        if place == len(GOOD + one + GOOD):
            decoder.receive_blob(second)
        decoder.receive_data(bytes([byte]))
        found += decoder.frames()
    assert [frame.call_id for frame in found] == [7, 1, 7, 2]
    assert [frame.payload.blob for frame in found[1::2]] == [first, second]


def test_a_body_that_could_not_be_kept_as_a_descriptor_counts_as_sent_inline():
    body = b"b" * 70_000
    data, _ = sent(wire.pack_detached(wire.REQUEST, 5, envelope(), Beside(body)))
    (frame,) = received(data, body)
    assert frame == Frame(wire.REQUEST, 5, envelope() + body)


REQUESTED = sent(wire.pack_detached(wire.REQUEST, 5, envelope(), Beside()))[0]


@pytest.mark.parametrize(
    ("data", "blobs", "said"),
    [
        (REQUESTED, [], "none came with it"),
        (REQUESTED, [Beside(bytes(wire.MIN_DETACHED - 1))], "the least is"),
        (REQUESTED, [Beside(b"")], "of an empty file"),
        (REQUESTED, [Beside(bytes(100_000))], "may be sent"),
        (wire.pack_frame(wire.RESPONSE | wire.DETACHED, 1, b"x"), [Beside()], "and in a descriptor"),
        (wire.pack_frame(wire.HELLO | wire.DETACHED, 1, b""), [Beside()], "not a frame"),
        (wire.pack_frame(wire.CANCEL | wire.DETACHED, 1, b""), [Beside()], "not a frame"),
        (GOOD, [Beside()] * (wire.MAX_LOOSE + 1), "without their frames"),
    ],
)
def test_bodies_that_are_refused(data, blobs, said):
    with pytest.raises(WireError, match=said):
        received(data, *blobs, max_message=99_999)


def test_a_good_frame_before_a_body_that_is_missing_still_counts():
    decoder = FrameDecoder()
    decoder.receive_data(GOOD + REQUESTED)
    assert [frame.call_id for frame in decoder.frames()] == [7]
    with pytest.raises(WireError):
        decoder.frames()


def test_a_request_has_its_body_in_one_place():
    data, _ = sent(wire.pack_detached(wire.REQUEST, 5, envelope() + b"more", Beside()))
    (frame,) = received(data, Beside())
    with pytest.raises(WireError, match="in its frame and in a descriptor"):
        wire.unpack_request(frame.payload)


# The small ones.


@given(st.integers(0, 2**64 - 1), st.binary(max_size=20))
def test_hello(limit, later):
    (frame,) = decoded([wire.pack_hello(limit, wire.HELLO_DESCRIPTORS)])[1]
    assert frame[:2] == (wire.HELLO, 0)
    assert wire.unpack_hello(frame.payload) == (limit, wire.HELLO_DESCRIPTORS)
    assert wire.unpack_hello(frame.payload + later) == (limit, wire.HELLO_DESCRIPTORS)
    assert wire.unpack_hello(frame.payload[:8]) == (limit, 0)  # an arbiter of an earlier version


@given(ids, st.integers(0, 2**32 - 1))
def test_credit(call_id, amount):
    (frame,) = decoded([wire.pack_credit(call_id, amount)])[1]
    assert frame[:2] == (wire.CREDIT, call_id)
    assert wire.unpack_credit(frame.payload) == amount


@pytest.mark.parametrize("payload", [b"", b"\0" * 3, b"\0" * 5])
def test_credit_of_the_wrong_size(payload):
    with pytest.raises(WireError):
        wire.unpack_credit(payload)


@pytest.mark.parametrize("payload", [b"", b"\0" * 7])
def test_hello_cut_short(payload):
    with pytest.raises(WireError):
        wire.unpack_hello(payload)


@pytest.mark.parametrize(("size", "cost"), [(0, 8192), (1, 8192), (8192, 8192), (8193, 8193), (10**6, 10**6)])
def test_what_a_chunk_takes_of_its_window(size, cost):
    assert wire.chunk_cost(b"x" * size) == cost
