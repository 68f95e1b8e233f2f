"""What `core.mux` promises: the caller's end of one link after another."""

import math

import pytest
from support.beside import Beside

from gunicorn_dirty_gevent.core import faults, wire
from gunicorn_dirty_gevent.core.mux import CREDIT_STEP, Call, Mux, Phase
from gunicorn_dirty_gevent.core.wire import Frame, FrameDecoder

HELLO = Frame(wire.HELLO, 0, wire.pack_hello(10_000)[wire.HEADER_SIZE :])
ENVELOPE = len(wire.pack_envelope(wire.pack_names("m:A", "large"), 0.0))
GOAWAY = Frame(wire.GOAWAY, 0, b"")


def call(name="go", body=b"args", deadline=math.inf, stream=False):
    return Call("m:A", name, body, deadline, stream)


def response(call_id, payload=b"result"):
    return Frame(wire.RESPONSE, call_id, payload)


DESCRIPTORS = Frame(wire.HELLO, 0, wire.pack_hello(2**30, wire.HELLO_DESCRIPTORS)[wire.HEADER_SIZE :])
LARGE = bytes(wire.DETACH_SIZE)


class Wired:
    """A mux and what it gave to its links."""

    def __init__(self):
        self.mux = Mux("/tmp/dirty.sock")
        self.sent = b""

    def send(self, parts):
        self.sent += b"".join(parts or ())

    def connect(self):
        self.sent = b""
        self.send(self.mux.connected())
        return self

    def open(self, now=0.0):
        self.connect()
        return self.receive(HELLO, now)

    def receive(self, *frames, now=0.0):
        for frame in frames:
            if isinstance(frame, Frame):
                for parts in self.mux.receive(frame, now):
                    self.send(parts)
        return self

    def submit(self, *calls, now=0.0):
        for one in calls:
            self.send(self.mux.submit(one, now))
        return self

    def cancel(self, one):
        self.send(self.mux.cancel(one))

    def frames(self):
        decoder = FrameDecoder()
        decoder.receive_data(self.sent)
        return decoder.frames()

    def requests(self):
        """Id and action of each request on this link."""
        found = [frame for frame in self.frames() if frame.kind == wire.REQUEST]
        return [(frame.call_id, wire.unpack_request(frame.payload).action) for frame in found]

    def kinds(self):
        return [wire.Kind(frame.kind).name for frame in self.frames()]


def opened():
    return Wired().open()


# Until the link is open.


def test_nothing_is_sent_before_the_arbiter_has_said_hello():
    wired = Wired()
    first, second = call("first"), call("second")
    wired.submit(first)
    assert (wired.sent, wired.mux.phase) == (b"", Phase.DOWN)
    wired.connect().submit(second)
    assert wired.kinds() == ["HELLO"] and wired.mux.phase is Phase.GREETING
    assert first.id == second.id == 0 and wired.mux.pending == 2
    wired.receive(HELLO)
    assert wired.requests() == [(1, "first"), (2, "second")]
    assert wired.mux.phase is Phase.OPEN and not wired.mux.waiting
    wired.submit(call("third"))
    assert wired.requests() == [(1, "first"), (2, "second"), (3, "third")]


def test_the_request_carries_what_is_left_of_its_time():
    wired = Wired().connect()
    wired.submit(call(deadline=110.0), call(deadline=math.inf), now=100.0)
    wired.receive(HELLO, now=104.0)
    requests = [wire.unpack_request(frame.payload) for frame in wired.frames()[1:]]
    assert [request.budget for request in requests] == [6.0, math.inf]
    assert [bytes(request.body) for request in requests] == [b"args"] * 2


@pytest.mark.parametrize("stream", [True, False])
def test_the_request_says_whether_the_caller_iterates(stream):
    wired = opened().submit(call(stream=stream))
    assert wire.unpack_request(wired.frames()[1].payload).stream is stream


@pytest.mark.parametrize(
    ("before", "frame"),
    [
        ([], response(1)),
        ([], Frame(wire.GOAWAY, 0, b"")),
        ([HELLO], HELLO),
        ([HELLO, GOAWAY], HELLO),
        ([], Frame(wire.HELLO, 0, b"short")),
        ([HELLO], Frame(wire.CREDIT, 1, b"\0\0\0\1")),
        ([HELLO], Frame(wire.REQUEST, 1, b"")),
        ([HELLO], Frame(wire.STOP, 1, b"")),
    ],
)
def test_frames_that_have_no_place_here(before, frame):
    wired = Wired().submit(call()).connect().receive(*before)
    with pytest.raises(wire.WireError):
        wired.receive(frame)


def test_names_that_cannot_be_sent_are_refused_before_anything_else():
    with pytest.raises(ValueError):
        call("x" * 70_000)


# Answers.


@pytest.mark.parametrize("kind", [wire.RESPONSE, wire.ERROR, wire.END])
def test_a_last_frame_ends_its_call_and_no_other(kind):
    wired, one, other = opened(), call("one"), call("other")
    woken = []
    one.notify, other.notify = (lambda: woken.append("one")), (lambda: woken.append("other"))
    wired.submit(one, other)
    frame = Frame(kind, other.id, b"value")
    wired.receive(frame)
    assert (other.last, other.done, one.done) == (frame, True, False)
    assert woken == ["other"] and wired.mux.pending == 1
    wired.receive(frame)  # again: late
    assert woken == ["other"] and wired.mux.late_frames == 1


def test_chunks_come_in_order_before_the_end():
    wired, one, other = opened(), call(stream=True), call(stream=True)
    wired.submit(one, other)
    for number in range(5):
        wired.receive(Frame(wire.CHUNK, one.id, b"one%d" % number))
        wired.receive(Frame(wire.CHUNK, other.id, b"other%d" % number))
    wired.receive(Frame(wire.END, one.id, b""))
    assert [wired.mux.take_chunk(one)[0] for _ in range(5)] == [b"one%d" % n for n in range(5)]
    assert list(other.chunks) == [b"other%d" % n for n in range(5)]
    assert one.done and not other.done


def test_late_frames_are_counted_and_reach_nobody():
    wired, one = opened(), call(stream=True)
    wired.submit(one).cancel(one)
    for kind in (wire.CHUNK, wire.RESPONSE, wire.ERROR, wire.END):
        wired.receive(Frame(kind, one.id, b"late"))
    wired.receive(response(12345))
    assert wired.mux.late_frames == 5
    assert not one.chunks and one.last is None and cancelled(one)


def cancelled(one):
    return one.fault["error_type"] == "DirtyCancelledError"


@pytest.mark.parametrize("sent", [True, False])
def test_a_cancelled_call_is_told_once_and_says_whether_it_may_have_run(sent):
    """By another greenlet or thread than the one that waits for it."""
    wired, one, told = opened() if sent else Wired(), call(), []
    one.notify = lambda: told.append(one.fault)
    wired.submit(one).cancel(one)
    wired.cancel(one)
    assert told == [one.fault] and cancelled(one)
    assert one.fault["details"]["may_have_run"] is sent
    wired.submit(one)
    assert wired.mux.pending == 0


def test_only_a_call_that_waits_can_go_another_way():
    wired, one, other = Wired(), call("one"), call("other")
    wired.submit(one, other)
    assert wired.mux.withdraw(one) and not wired.mux.withdraw(one)
    wired.open()
    assert not wired.mux.withdraw(other)
    assert [action for _, action in wired.requests()] == ["other"]
    assert not one.done and not other.done


def test_a_call_of_another_link_with_the_same_number_is_not_taken_for_ours():
    """A stock arbiter's calls are all number 1."""
    wired, ours, theirs = opened(), call("ours"), call("theirs")
    wired.submit(ours)
    theirs.id = ours.id
    wired.cancel(theirs)
    assert cancelled(theirs) and not ours.done
    wired.receive(response(ours.id))
    assert ours.last is not None


# Credit.


@pytest.mark.parametrize("size", [1, 100, 4096, 5000, 100_000, 300_000])
def test_credit_sums_up_to_what_was_taken(size):
    wired, one = opened(), call(stream=True)
    wired.submit(one)
    cost = wire.chunk_cost(b"x" * size)
    taken = 0
    for number in range(200):
        wired.receive(Frame(wire.CHUNK, one.id, b"x" * size))
        _, parts = wired.mux.take_chunk(one)
        wired.send(parts)
        taken += cost
        credits = [f for f in wired.frames() if f.kind == wire.CREDIT]
        given = sum(wire.unpack_credit(frame.payload) for frame in credits)
        # So a writer with a window of STREAM_WINDOW never runs dry under a reader who keeps up.
        assert 0 <= taken - given < CREDIT_STEP, f"after chunk {number}"
        assert all(frame.call_id == one.id for frame in credits)
    if cost < CREDIT_STEP:
        assert len(credits) < 200


def test_no_credit_for_a_stream_that_has_ended():
    wired, one = opened(), call(stream=True)
    wired.submit(one)
    wired.receive(Frame(wire.CHUNK, one.id, b"x" * CREDIT_STEP), Frame(wire.END, one.id, b""))
    assert wired.mux.take_chunk(one) == (b"x" * CREDIT_STEP, None)


# Calls that end before their answer.


def test_cancel_of_a_call_that_waits():
    wired, one, other = Wired(), call("one"), call("other")
    wired.submit(one, other).cancel(one)
    assert wired.mux.pending == 1
    wired.open()
    assert wired.requests() == [(1, "other")]


def test_cancel_of_a_call_that_was_sent():
    wired, one, other = opened(), call("one"), call("other")
    wired.submit(one, other)
    wired.cancel(one)
    wired.cancel(one)
    assert wired.kinds() == ["HELLO", "REQUEST", "REQUEST", "CANCEL"]
    assert wired.frames()[-1].call_id == one.id
    assert wired.mux.pending == 1


def test_cancel_of_a_call_that_has_ended():
    wired, one = opened(), call()
    wired.submit(one).receive(response(one.id))
    wired.cancel(one)
    assert wired.kinds() == ["HELLO", "REQUEST"]


def test_cancel_after_the_link_was_lost():
    wired, one, other = opened(), call("one"), call("other")
    wired.submit(one, other)
    wired.mux.lost("gone", 0)
    assert wired.mux.cancel(one) is None
    wired.open()
    assert wired.requests() == [(3, "other")]


@pytest.mark.parametrize("waits", [True, False])
def test_a_message_over_the_limit_is_refused_before_it_is_sent(waits):
    wired = Wired() if waits else opened()
    large, small = call("large", body=b"x" * 10_000), call("small")
    woken = []
    large.notify = lambda: woken.append(1)
    wired.submit(large, small)
    if waits:
        wired.open()
    assert [action for _, action in wired.requests()] == ["small"]
    assert large.fault["error_type"] == "DirtyMessageTooLargeError"
    assert large.fault["details"] == {"size": 10_000 + ENVELOPE, "limit": 10_000, "may_have_run": False}
    assert woken == [1] and large.id == 0 and wired.mux.pending == 1
    wired.submit(small2 := call("small"))
    assert small2.id  # the link is usable


def test_the_largest_message_that_fits():
    wired = opened().submit(call("large", body=b"x" * (10_000 - ENVELOPE)))
    assert len(wired.frames()[-1].payload) == 10_000


def test_refuse_ends_those_that_wait_and_says_that_they_have_not_run():
    wired, one = Wired(), call()
    wired.submit(one)
    wired.mux.refuse("cannot connect: no such file")
    assert one.fault["error_type"] == "DirtyConnectionError"
    assert one.fault["details"]["may_have_run"] is False
    assert "no such file" in one.fault["message"] and "not been sent" in one.fault["message"]
    assert wired.mux.pending == 0


def test_refuse_does_not_touch_those_that_were_sent():
    wired, one = opened(), call()
    wired.submit(one)
    wired.mux.refuse("closed")
    assert not one.done


# The link is lost.


def test_every_possible_end_of_what_the_kernel_took():
    """Whatever was taken: a call runs at most once, and is lost only if it may have run."""
    bodies = [b"a", b"b" * 50, b"", b"d" * 7]
    total = len(opened().submit(*[call(body=body) for body in bodies]).sent)
    for flushed in range(total + 1):
        wired = opened()
        calls = [call(f"n{number}", body) for number, body in enumerate(bodies)]
        wired.submit(*calls)
        first = wired.sent[:flushed]
        old_ids = [one.id for one in calls]
        decoder = FrameDecoder()
        decoder.receive_data(first)
        arrived = {frame.call_id for frame in decoder.frames()}
        wired.mux.lost("reset", flushed)
        assert wired.mux.phase is Phase.DOWN
        for one, old in zip(calls, old_ids, strict=True):
            assert one.done == (old in arrived)
            assert (one.id != 0) == one.done  # what says "was it sent?" to a caller whose time is up
            if one.done:
                assert one.fault["details"]["may_have_run"] is True
                assert "reset" in one.fault["message"]
        wired.open()
        again = [f"n{number}" for number, old in enumerate(old_ids) if old not in arrived]
        assert [action for _, action in wired.requests()] == again
        assert not {call_id for call_id, _ in wired.requests()} & set(old_ids)


def test_large_bodies_count_whole():
    wired, one = opened(), call(body=b"x" * 9000)
    wired.submit(one)
    wired.mux.lost("reset", len(wired.sent) - 1)
    assert not one.done and one in wired.mux.waiting
    wired.open()
    wired.mux.lost("reset", len(wired.sent))
    assert one.done


def test_what_else_was_sent_counts_too():
    """Credits and cancels move the place of the requests behind them."""
    wired, stream, gone, last = opened(), call("s", stream=True), call("g"), call("l")
    wired.submit(stream, gone)
    wired.receive(Frame(wire.CHUNK, stream.id, b"x" * CREDIT_STEP))
    wired.send(wired.mux.take_chunk(stream)[1])
    wired.cancel(gone)
    wired.submit(last)
    assert last.end == len(wired.sent)
    wired.mux.lost("reset", len(wired.sent) - 1)
    assert stream.done and list(wired.mux.waiting) == [last]


def test_a_link_lost_while_greeting_costs_nothing():
    wired, one = Wired(), call()
    for _ in range(3):
        wired.submit(one) if not wired.mux.waiting else None
        wired.connect()
        wired.mux.lost("reset", len(wired.sent))
        assert not one.done
    wired.open()
    assert wired.requests() == [(1, "go")]


def test_ids_are_never_used_again():
    wired, ids = Wired(), set()
    for _ in range(4):
        wired.open()
        for _ in range(3):
            wired.submit(one := call())
            assert one.id not in ids
            ids.add(one.id)
        wired.mux.lost("reset", 10**9)
    late = [response(call_id) for call_id in ids]
    wired.open().submit(fresh := call()).receive(*late)
    assert not fresh.done and wired.mux.late_frames == len(ids)


def test_calls_that_wait_again_go_before_new_ones():
    wired, old, new = opened(), [call("old1"), call("old2")], call("new")
    wired.submit(*old)
    wired.receive(GOAWAY).submit(new)
    wired.mux.lost("reset", 0)
    wired.open()
    assert [action for _, action in wired.requests()] == ["old1", "old2", "new"]


# The arbiter ends.


def test_after_goaway_answers_come_and_new_calls_wait():
    wired, one, other = opened(), call("one"), call("other")
    wired.submit(one, other).receive(GOAWAY)
    assert wired.kinds()[-1] == "GOAWAY" and wired.mux.phase is Phase.LEAVING
    wired.submit(new := call("new"))
    assert wired.kinds()[-1] == "GOAWAY" and new.id == 0
    wired.receive(response(one.id))
    assert one.done
    wired.cancel(other)
    assert wired.kinds()[-1] == "CANCEL"
    wired.mux.lost("the arbiter has ended", len(wired.sent))
    assert not new.done
    wired.open()
    assert wired.requests() == [(3, "new")]


@pytest.mark.parametrize("last_ends", ["answered", "cancelled"])
def test_the_shell_moves_on_when_the_leaving_link_is_of_no_more_use(last_ends):
    wired, one = opened(), call("one")
    wired.submit(one).receive(GOAWAY)
    assert not wired.mux.moves_on
    wired.submit(new := call("new"))
    assert not wired.mux.moves_on  # an answer is still to come
    if last_ends == "answered":
        wired.receive(response(one.id))
    else:
        wired.cancel(one)
    assert wired.mux.moves_on
    wired.mux.lost("moved on", len(wired.sent))
    assert not wired.mux.moves_on and not new.done
    wired.open()
    assert wired.requests() == [(2, "new")] and not wired.mux.moves_on


def test_nobody_moves_on_without_a_call_that_waits():
    assert not opened().receive(GOAWAY).mux.moves_on
    assert not Wired().submit(call()).mux.moves_on


# Callers that act while they are told. They run inside `notify` (greenlets do).


def test_a_caller_told_of_the_loss_cancels_others():
    wired = opened()
    calls = [call(f"n{number}") for number in range(4)]
    wired.submit(*calls)
    flushed = calls[1].end
    acted = []

    def act():
        acted.append([wired.mux.cancel(one) for one in calls[1:3]])
        wired.submit(call("new"))

    calls[0].notify = act
    told = []
    calls[1].notify = lambda: told.append(calls[1].fault)
    wired.mux.lost("reset", flushed)
    assert acted == [[None, None]]
    assert told == [calls[1].fault] and cancelled(calls[1])
    wired.open()
    assert [action for _, action in wired.requests()] == ["n3", "new"]


def test_a_caller_told_of_a_refusal_cancels_another_and_tries_again():
    wired, one, other = Wired(), call("one"), call("other")
    wired.submit(one, other)

    def act():
        wired.cancel(other)
        wired.submit(call("again"))

    one.notify = act
    told = []
    other.notify = lambda: told.append(other.fault)
    wired.mux.refuse("no socket")
    assert one.done and told == [other.fault] and cancelled(other)
    wired.open()
    assert [action for _, action in wired.requests()] == ["again"]


def test_a_caller_told_on_hello_acts_in_the_order_of_the_bytes():
    """What it sends must stand in the link where the mux believes it stands, or a loss of the link
    would be accounted to the wrong calls."""
    wired = Wired()
    first, large, second, third = call("1"), call("large", b"x" * 20_000), call("2"), call("3")
    extra = call("extra")

    def act():
        wired.submit(extra)
        wired.cancel(second)
        wired.cancel(first)

    large.notify = act
    wired.submit(first, large, second, third)
    wired.open()
    assert [action for _, action in wired.requests()] == ["1", "extra", "3"]
    ends, position = {}, 0
    for frame in wired.frames():
        position += wire.HEADER_SIZE + len(frame.payload)
        if frame.kind == wire.REQUEST:
            ends[frame.call_id] = position
    assert ends[extra.id] == extra.end and ends[third.id] == third.end


def test_the_fault_of_a_lost_link_is_the_documented_one():
    wired, one = opened(), call()
    wired.submit(one)
    wired.mux.lost("reset", 10**9)
    assert one.fault == faults.connection_lost("m:A", "go", "reset", True, "/tmp/dirty.sock")


# Large bodies.


def sent_large(hello, body=LARGE, detach=Beside):
    """The parts of one call's request, the call and its mux."""
    mux = Mux("/tmp/dirty.sock", detach)
    mux.connected()
    list(mux.receive(hello, 0.0))
    one = call(body=body)
    parts = mux.submit(one, 0.0)
    return parts, one, mux


def test_a_large_body_goes_beside_its_request_where_the_arbiter_takes_it():
    (part,), one, mux = sent_large(DESCRIPTORS)
    assert isinstance(part, wire.Detached)
    assert part.blob.data == LARGE
    request = wire.unpack_request(wire.Detached(part.inline[wire.HEADER_SIZE :], part.blob))
    assert request.flags & wire.FLAG_DETACH
    # Not handed over as long as the kernel has not taken all of it, the body included.
    assert one.end == len(wire.pack_hello()) + len(part)
    mux.lost("gone", one.end - 1)
    assert list(mux.waiting) == [one]


@pytest.mark.parametrize(
    ("hello", "body", "detach"),
    [
        (DESCRIPTORS, LARGE[1:], Beside),  # not large
        (DESCRIPTORS, LARGE, lambda body: None),  # no memory file can be made
        (DESCRIPTORS, LARGE, None),  # a client that has none
        (Frame(wire.HELLO, 0, wire.pack_hello(2**30)[wire.HEADER_SIZE :]), LARGE, Beside),  # such an arbiter
    ],
)
def test_other_bodies_go_in_the_frame(hello, body, detach):
    parts, _, _ = sent_large(hello, body, detach)
    (frame,) = received_frames(parts)
    request = wire.unpack_request(frame.payload)
    assert request.body == body
    both = detach is not None and hello is DESCRIPTORS
    assert bool(request.flags & wire.FLAG_DETACH) is both


def received_frames(parts):
    decoder = FrameDecoder()
    decoder.receive_data(b"".join(parts))
    return decoder.frames()


def test_a_body_that_was_detached_beforehand_is_sent_so():
    mux = Mux("/tmp/dirty.sock", lambda body: pytest.fail("detached again"))
    mux.connected()
    list(mux.receive(DESCRIPTORS, 0.0))
    one = call(body=wire.Pieces((b"head", LARGE)))
    assert mux.detaches(one)
    blob = one.blob = Beside(one.body)
    (part,) = mux.submit(one, 0.0)
    assert part.blob is blob
    assert one.blob is None  # its memory is not held for as long as the call runs


def test_pieces_are_counted_and_sent_as_one_body():
    pieces = wire.Pieces((b"head", LARGE, b"tail"))
    parts, one, mux = sent_large(DESCRIPTORS, pieces, lambda body: None)
    assert parts[2] is LARGE
    (frame,) = received_frames(parts)
    assert wire.unpack_request(frame.payload).body == b"head" + LARGE + b"tail"
    assert one.end == len(wire.pack_hello()) + sum(map(len, parts))
    mux.max_message = len(pieces)
    over = call(body=pieces)
    assert mux.submit(over, 0.0) is None
    assert over.fault["error_type"] == "DirtyMessageTooLargeError"


def test_the_stash_takes_no_descriptors():
    mux = Mux("/tmp/dirty.sock", Beside)
    mux.connected()
    list(mux.receive(DESCRIPTORS, 0.0))
    (frame,) = received_frames(mux.submit(Call("", "", LARGE, math.inf, False, wire.STASH), 0.0))
    assert (frame.kind, frame.payload) == (wire.STASH, LARGE)


def test_a_large_chunk_counts_whole_in_its_window():
    mux = Wired().open().mux
    one = call(stream=True)
    mux.submit(one, 0.0)
    chunk = wire.Detached(b"", Beside(bytes(CREDIT_STEP)))
    list(mux.receive(Frame(wire.CHUNK, one.id, chunk), 0.0))
    payload, credit = mux.take_chunk(one)
    assert payload is chunk
    assert received_frames(credit)[0][:2] == (wire.CREDIT, one.id)
