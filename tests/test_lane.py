"""`gunicorn_dirty_gevent.lane`: both ends of one, on real sockets."""

from __future__ import annotations

import _socket
import itertools
import math
import os
import resource
import socket
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from support.waiting import wait_until

from gunicorn_dirty_gevent import lane, link
from gunicorn_dirty_gevent.blob import Blob
from gunicorn_dirty_gevent.client.hub import HubChannel
from gunicorn_dirty_gevent.core import wire
from gunicorn_dirty_gevent.core.mux import Call
from gunicorn_dirty_gevent.core.wire import FrameDecoder


class Task:
    def __init__(self, number: int, by: lane.Sender | None) -> None:
        self.call_id = number
        self.client_id = 1000 + number
        self.lane = by


class Lane:
    """A lane, what its worker was told to send another way, and what its client has got."""

    def __init__(self) -> None:
        worker, client = lane.make()
        self.fell_back: list[tuple[int, int, bytes]] = []
        self.told: list[list[int]] = []
        self.order: list[str] = []
        self.closed = 0
        self.got: list[wire.Frame] = []
        self.ended: list[str] = []
        self.client = _socket.socket(fileno=os.dup(client.fileno()))
        self.sender = lane.Sender(self, worker.detach(), self._on_close)
        self.receiver = lane.Receiver(client.detach(), self.got.extend, lambda _, why: self.ended.append(why))

    # What a lane needs of its worker.

    def send(self, kind: int, call_id: int, payload: bytes) -> None:
        self.fell_back.append((kind, call_id, payload))

    def break_silence(self, now: float) -> None:
        self.order.append("about to answer")

    def sent_by_lane(self, ended: list[int], now: float) -> None:
        self.told.append(ended)
        self.order.append("sent")

    def _on_close(self) -> None:
        self.closed += 1

    # For the tests.

    def task(self, number: int) -> Task:
        return Task(number, self.sender)

    def read(self) -> list[wire.Frame]:
        """Also what is there and has not been read."""
        self.got += self.receiver.receive_all()
        return self.got

    def stop_reading(self) -> None:
        self.receiver._watcher.stop()

    def end(self) -> None:
        self.receiver.close()
        self.client.close()
        if not self.closed:
            self.sender.close()


@pytest.fixture
def made() -> Iterator[Lane]:
    one = Lane()
    yield one
    one.end()
    gevent.get_hub().destroy(destroy_loop=True)


def until(condition: Any, what: str) -> None:
    wait_until(lambda: gevent.sleep(0.001) or condition(), 10, what)  # type: ignore[func-returns-value]


def test_frames_arrive_under_the_clients_ids_and_ends_are_told(made: Lane) -> None:
    for number in range(1, 4):
        task = made.task(number)
        made.sender.send(task, wire.CHUNK, b"c%d" % number)
        made.sender.send(task, wire.RESPONSE, b"r%d" % number)
    until(lambda: len(made.got) == 6, "6 frames")
    expected = []
    for number in range(1, 4):
        expected += [
            (wire.CHUNK, 1000 + number, b"c%d" % number),
            (wire.RESPONSE, 1000 + number, b"r%d" % number),
        ]
    assert made.got == expected
    assert list(itertools.chain(*made.told)) == [1, 2, 3] and not made.fell_back


def test_the_first_answer_of_a_turn_leaves_at_once(made: Lane) -> None:
    made.sender.send(made.task(1), wire.RESPONSE, b"now")
    assert made.told == [[1]]
    assert made.order == ["about to answer", "sent"]
    assert [frame.payload for frame in made.read()] == [b"now"]


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """For `lane` no time passes, so that what may be kept is kept."""
    monkeypatch.setattr(lane, "time", types.SimpleNamespace(monotonic=lambda: 1000.0))


@pytest.mark.usefixtures("frozen")
def test_the_arbiter_hears_of_an_end_when_the_kernel_has_the_answer_and_not_before(made: Lane) -> None:
    made.sender.send(made.task(1), wire.RESPONSE, b"first")
    made.sender.send(made.task(2), wire.RESPONSE, b"kept for the end of the turn")
    assert made.told == [[1]]
    gevent.sleep(0)
    assert made.told == [[1], [2]]


@pytest.mark.usefixtures("frozen")
def test_chunks_are_kept_for_the_end_of_the_turn_while_others_have_just_left(made: Lane) -> None:
    made.sender.send(made.task(1), wire.CHUNK, b"none has left")
    assert made.told == [[]]
    gevent.sleep(0)
    made.sender.send(made.task(2), wire.CHUNK, b"kept")
    assert made.told == [[]]
    gevent.sleep(0)
    assert made.told == [[], []] and [frame.payload for frame in made.read()] == [b"none has left", b"kept"]


def test_nothing_blocks_whatever_the_default_timeout_of_sockets_is() -> None:
    socket.setdefaulttimeout(30.0)
    try:
        made = Lane()
    finally:
        socket.setdefaulttimeout(None)
    started = time.monotonic()
    made.stop_reading()
    assert made.read() == []
    task = made.task(1)
    while task.lane is not None:
        made.sender.send(task, wire.CHUNK, bytes(4000))
    assert time.monotonic() - started < 10
    made.end()
    gevent.get_hub().destroy(destroy_loop=True)


def test_what_a_full_lane_does_not_take_goes_another_way_in_order(made: Lane) -> None:
    made.stop_reading()
    stream, others = made.task(1), [made.task(number) for number in range(2, 500)]
    sent = []
    while stream.lane is not None:
        sent.append(b"%05d" % len(sent) + bytes(3000))
        made.sender.send(stream, wire.CHUNK, sent[-1])
        made.sender.flush()
    made.sender.send(others[0], wire.RESPONSE, b"small")
    made.sender.flush()
    made.read()
    chunks = [payload for kind, _, payload in made.got if kind == wire.CHUNK]
    behind = [payload for kind, _, payload in made.fell_back if kind == wire.CHUNK]
    assert chunks and behind and chunks + behind == sent
    assert all(call_id == stream.call_id for kind, call_id, _ in made.fell_back if kind == wire.CHUNK)
    # The others use it again when there is room.
    made.sender.send(others[1], wire.RESPONSE, b"again")
    made.sender.flush()
    assert made.read()[-1] == (wire.RESPONSE, others[1].client_id, b"again")
    assert others[1].lane is made.sender
    ended = [call_id for kind, call_id, _ in made.fell_back if kind != wire.CHUNK]
    ended += itertools.chain(*made.told)
    assert ended == [others[0].call_id, others[1].call_id]


def test_a_lane_holds_a_good_part_of_a_window(made: Lane) -> None:
    made.stop_reading()
    task, sent = made.task(1), 0
    while task.lane is not None:
        made.sender.send(task, wire.CHUNK, bytes(wire.MIN_CHUNK_COST))
        made.sender.flush()
        sent += 1
    assert sent * wire.MIN_CHUNK_COST > wire.STREAM_WINDOW // 2


@pytest.mark.usefixtures("frozen")
def test_many_frames_of_one_turn_are_few_packets(made: Lane) -> None:
    made.stop_reading()
    made.sender.send(made.task(1), wire.RESPONSE, b"leaves at once")
    tasks = [made.task(number) for number in range(2, 42)]
    for task in tasks:
        made.sender.send(task, wire.RESPONSE, bytes(4000))
    gevent.sleep(0)
    sizes = [len(made.client.recv(link.READ_SIZE)) for _ in range(4)]
    assert sum(sizes[1:]) == 40 * (4000 + wire.HEADER_SIZE)
    assert max(sizes) <= lane.MAX_PAYLOAD
    with pytest.raises(BlockingIOError):
        made.client.recv(1)


def test_the_largest_payload_has_a_packet_of_its_own(made: Lane) -> None:
    for number in (1, 2):
        made.sender.send(made.task(number), wire.RESPONSE, bytes(lane.MAX_PAYLOAD))
        made.sender.flush()
        made.read()
    assert [len(frame.payload) for frame in made.got] == 2 * [lane.MAX_PAYLOAD]
    assert made.told == [[1], [2]]


def test_when_the_client_has_gone_the_rest_goes_another_way(made: Lane) -> None:
    made.receiver.close()
    made.client.close()
    task = made.task(1)
    made.sender.send(task, wire.RESPONSE, b"too late")
    assert made.fell_back == [(wire.RESPONSE, 1, b"too late")] and task.lane is None
    until(lambda: made.closed, "the worker to notice")
    late = made.task(2)
    made.sender.send(late, wire.RESPONSE, b"closed")
    assert made.fell_back[-1] == (wire.RESPONSE, 2, b"closed")


def test_a_client_that_writes_costs_itself_the_lane(made: Lane) -> None:
    made.client.send(b"hello")
    until(lambda: made.closed, "the worker to close its end")
    task = made.task(1)
    made.sender.send(task, wire.RESPONSE, b"safe")
    assert made.fell_back == [(wire.RESPONSE, 1, b"safe")]


@pytest.mark.parametrize(
    "packet",
    [
        b"garbage that is no frame at all",
        wire.pack_frame(wire.RESPONSE, 1, b"cut short")[:-1],
        wire.pack_frame(wire.HELLO, 0, bytes(9)),
        wire.pack_frame(wire.ERROR, 1, b"errors do not come by lanes"),
        wire.pack_frame(wire.GOAWAY, 0),
    ],
    ids=["garbage", "cut short", "hello", "error", "goaway"],
)
def test_what_is_no_answer_breaks_the_lane(made: Lane, packet: bytes) -> None:
    made.sender._sock.send(packet)
    until(lambda: made.ended, "the client to say so")
    assert made.ended[0].startswith("protocol error: ") and not made.got
    assert made.read() == [] and len(made.ended) == 1


def test_a_worker_that_has_died_leaves_what_it_sent(made: Lane) -> None:
    made.stop_reading()
    made.sender.send(made.task(1), wire.RESPONSE, b"its last word")
    made.sender.close()
    assert [frame.payload for frame in made.read()] == [b"its last word"]
    assert made.ended == [""]


def test_a_client_that_shuts_its_end_gets_what_was_sent_and_no_more(made: Lane) -> None:
    made.stop_reading()
    made.sender.send(made.task(1), wire.RESPONSE, b"before")
    made.receiver.shut()
    made.sender.send(made.task(2), wire.RESPONSE, b"after")
    made.sender.flush()
    assert made.fell_back == [(wire.RESPONSE, 2, b"after")]
    assert [frame.payload for frame in made.read()] == [b"before"] and made.ended == [""]
    made.client.close()
    until(lambda: made.closed, "the worker to close its end")


def test_a_reader_whose_code_fails_says_so(made: Lane, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(frames: list[wire.Frame]) -> None:
        raise ZeroDivisionError("a bug")

    made.receiver._on_frames = fail
    made.sender.send(made.task(1), wire.RESPONSE, b"x")
    until(lambda: made.ended, "the client to say so")
    assert "internal error" in made.ended[0] and "ZeroDivisionError: a bug" in capsys.readouterr().err


def test_a_link_that_is_first_is_read_first_whichever_became_ready_first() -> None:
    order: list[str] = []
    pairs = {name: socket.socketpair() for name in ("a", "first", "b")}
    links = [
        link.Link(
            near, lambda *_, n=name: order.append(n), lambda *_: None, FrameDecoder(), first=name == "first"
        )
        for name, (near, _) in pairs.items()
    ]
    for _, far in pairs.values():
        far.send(wire.pack_frame(wire.PING, 0))
    until(lambda: len(order) == 3, "all")
    assert order[0] == "first"
    for one, (_, far) in zip(links, pairs.values(), strict=True):
        one.close()
        far.close()
    gevent.get_hub().destroy(destroy_loop=True)


# How an end travels.


class Peer:
    def __init__(self, sock: socket.socket, lanes: bool) -> None:
        self.frames: list[wire.Frame] = []
        self.ended: list[str] = []
        self.link = link.Link(
            sock, lambda _, frames: self.frames.extend(frames), self._closed, FrameDecoder(), lanes
        )

    def _closed(self, _: link.Link, reason: str) -> None:
        self.ended.append(reason)


def sent_to(peer_takes_lanes: bool) -> tuple[Peer, Peer, socket.socket]:
    """Two links, the end of a lane on its way from the first to the second, and its other end."""
    left, right = socket.socketpair()
    one, other = Peer(left, False), Peer(right, peer_takes_lanes)
    worker, client = lane.make()
    one.link.send((wire.pack_frame(wire.PING, 0),))
    one.link.send(wire.pack_lane(7, Blob(worker.detach(), 0)))
    one.link.send((wire.pack_frame(wire.PING, 0),))
    return one, other, client


def test_an_end_comes_with_its_number_between_other_frames() -> None:
    one, other, client = sent_to(True)
    until(lambda: len(other.frames) == 3, "3 frames")
    assert [frame.kind for frame in other.frames] == [wire.PING, wire.LANE, wire.PING]
    number, descriptor = wire.unpack_lane(other.frames[1].payload)
    assert number == 7 and descriptor is not None
    other.frames.clear()
    os.write(descriptor, b"through it")
    assert client.recv(100) == b"through it"
    os.close(descriptor)
    assert client.recv(100) == b""  # nobody has the other end any more
    for end in (one.link, other.link, client):
        end.close()
    gevent.get_hub().destroy(destroy_loop=True)


def test_no_client_can_hand_the_arbiter_a_socket() -> None:
    one, other, client = sent_to(False)
    until(lambda: other.ended, "the end of the link")
    assert "no sealed memory file" in other.ended[0]
    assert client.recv(100) == b""
    one.link.close()
    client.close()
    gevent.get_hub().destroy(destroy_loop=True)


def test_an_end_that_is_lost_for_want_of_descriptors_is_no_end_of_the_link() -> None:
    one, other, client = sent_to(True)
    other.link._reader.stop()
    until(lambda: one.link.outbox_bytes == 0, "all to be under way")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno() + 20, hard))
    filled = []
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                filled.append(os.dup(0))
        other.link._reader.start(other.link._readable)
        until(lambda: len(other.frames) == 3 or other.ended, "3 frames")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for descriptor in filled:
        os.close(descriptor)
    assert not other.ended
    assert wire.unpack_lane(other.frames[1].payload) == (7, None)
    for end in (one.link, other.link, client):
        end.close()
    gevent.get_hub().destroy(destroy_loop=True)


# A client's channel, and an arbiter by hand.


class Arbiter:
    """It has said hello to a channel, and has a call of it."""

    def __init__(self, path: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()
        self.channel = HubChannel(path)
        self.call = Call("m:A", "go", b"", math.inf, False)
        self.channel.start(self.call)
        gevent.sleep(0)
        self.sock, _ = self.listener.accept()
        assert wire.unpack_hello(self.next().payload).flags & wire.HELLO_LANES
        self.sock.sendall(wire.pack_hello(10**6))
        until(lambda: self.call.id, "the request to be sent")
        self.next()

    def next(self) -> wire.Frame:
        decoder = FrameDecoder()
        while not (frames := decoder.frames()):
            decoder.receive_data(self.sock.recv(65536))
        return frames[0]

    def make_lane(self) -> socket.socket:
        """A worker's end."""
        worker, client = lane.make()
        frame = wire.pack_frame(wire.LANE | wire.DETACHED, 0, b"\0\0\0\1")
        socket.send_fds(self.sock, [frame], [client.fileno()])
        client.close()
        return socket.socket(fileno=worker.detach())

    def end(self) -> None:
        self.channel.close()
        self.sock.close()
        self.listener.close()
        gevent.get_hub().destroy(destroy_loop=True)


@pytest.fixture
def arbiter(tmp_path: Path) -> Iterator[Arbiter]:
    one = Arbiter(str(tmp_path / "arbiter.sock"))
    yield one
    one.end()


@pytest.mark.parametrize("then", ["an error", "the end of the link"])
def test_an_answer_by_a_lane_comes_before_what_the_arbiter_says_later(arbiter: Arbiter, then: str) -> None:
    call_id = arbiter.call.id
    worker = arbiter.make_lane()
    until(lambda: arbiter.channel._lanes, "the client to have its end")
    arbiter.channel._lanes[0]._watcher.stop()  # as if the hub had come to the link first
    worker.send(wire.pack_frame(wire.RESPONSE, call_id, b"the answer"))
    worker.close()  # it has died
    if then == "an error":
        arbiter.sock.sendall(wire.pack_frame(wire.ERROR, call_id, b"died"))
    else:
        arbiter.sock.close()
    until(lambda: arbiter.call.done, "the call to end")
    assert arbiter.call.last == (wire.RESPONSE, call_id, b"the answer")


def test_a_lane_that_comes_when_the_channel_has_been_closed_is_closed(arbiter: Arbiter) -> None:
    """By a caller that the frame before it has woken."""
    arbiter.call.notify = arbiter.channel.close
    arbiter.sock.sendall(wire.pack_frame(wire.RESPONSE, arbiter.call.id, b""))
    worker = arbiter.make_lane()
    until(lambda: arbiter.call.done, "the call to end")
    assert worker.recv(10) == b""
    worker.close()


def test_what_is_no_answer_on_a_lane_ends_the_link(arbiter: Arbiter) -> None:
    worker = arbiter.make_lane()
    worker.send(b"garbage")
    until(lambda: arbiter.call.done, "the call to end")
    assert arbiter.call.fault is not None and "no whole frames" in arbiter.call.fault["message"]
    worker.close()


class End:
    """What the arbiter sends to one peer."""

    def __init__(self) -> None:
        self.sent: list[wire.Parts] = []

    def send(self, parts: wire.Parts) -> None:
        self.sent.append(parts)


def test_the_arbiter_makes_one_lane_for_a_worker_and_a_client_and_not_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lane, "MOST", 2)
    lanes: Any = lane.Lanes()
    one, two = End(), End()
    clients = [End() for _ in range(4)]
    for client in clients:
        lanes.admit(client)
    assert [lanes.between(client, 1, one) for client in clients[:3]] == [1, 2, 0]
    assert [lanes.between(client, 1, one) for client in clients[:3]] == [1, 2, 0]
    assert [len(peer.sent) for peer in (one, *clients)] == [2, 1, 1, 0, 0]
    # Each worker has its own.
    assert [lanes.between(client, 2, two) for client in clients[1:]] == [3, 4, 0]
    # Whose client has gone leaves room for another, at each of its workers.
    lanes.client_gone(clients[1])
    lanes.client_gone(End())  # one that took none
    assert [lanes.between(client, 1, one) for client in clients[2:]] == [5, 0]
    assert [lanes.between(client, 2, two) for client in clients[2:]] == [4, 6]
    # A worker's next of that number begins anew.
    lanes.worker_gone(1)
    assert [lanes.between(clients[place], 1, one) for place in (0, 3, 2)] == [7, 8, 0]
    assert lanes.between(clients[2], 2, two) == 4


def test_without_descriptors_there_is_no_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left() -> None:
        raise OSError(24, "Too many open files")

    lanes: Any = lane.Lanes()
    client, worker = End(), End()
    lanes.admit(client)
    with monkeypatch.context() as patched:
        patched.setattr(lane, "make", none_left)
        assert lanes.between(client, 1, worker) == 0
    assert not client.sent and not worker.sent
    assert lanes.between(client, 1, worker) == 1
