"""`gunicorn_dirty_gevent.blob`: memory files, and what is taken for one."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import resource
import socket
import threading
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from gevent.event import Event
from gevent.monkey import get_original
from support.waiting import wait_until

from gunicorn_dirty_gevent import blob, link
from gunicorn_dirty_gevent.blob import APART, Blob, apart, detach, received
from gunicorn_dirty_gevent.core import wire
from gunicorn_dirty_gevent.core.wire import FrameDecoder, WireError

BODY = os.urandom(1 << 20)


def rights(*descriptors: int) -> list[tuple[int, int, bytes]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())]


def memory_file(data: bytes, seals: int) -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(descriptor, data)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError as error:
        assert error.errno == errno.EBADF
        return False
    return True


def test_a_blob_has_the_bytes_and_nobody_can_change_them() -> None:
    made = detach(BODY)
    assert made is not None
    assert (len(made), bytes(made.view())) == (len(BODY), BODY)
    with pytest.raises(PermissionError):
        os.pwrite(made.descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(made.descriptor, 10)
    with pytest.raises(PermissionError):
        fcntl.fcntl(made.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_view_outlives_its_blob_whose_descriptor_is_closed_at_once() -> None:
    made = detach(BODY)
    assert made is not None
    descriptor, view = made.descriptor, made.view()
    del made
    assert not is_open(descriptor)
    assert bytes(view) == BODY


def test_where_no_memory_file_can_be_made_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(os, "memfd_create", refused)
    assert detach(BODY) is None
    monkeypatch.delattr(os, "memfd_create")
    assert detach(BODY) is None


@pytest.mark.parametrize(
    "parts", [(BODY,), (b"head", BODY, b"", b"tail"), tuple(bytes([n]) * (n + 1) * 1000 for n in range(40))]
)
def test_pieces_are_written_one_behind_the_other(parts: tuple[bytes, ...]) -> None:
    made = detach(wire.Pieces(parts))
    assert made is not None
    whole = b"".join(parts)
    assert (len(made), bytes(made.view())) == (len(whole), whole)
    assert made.read(3, len(whole) - 4) == whole[3:-1]


def test_a_write_that_takes_less_goes_on_where_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (b"a" * 700, b"b" * 1300, b"", b"c" * 10)
    written: list[bytes] = []

    def short(descriptor: int, buffers: list[memoryview]) -> int:
        written.append(b"".join(buffers)[:500])
        return os.write(descriptor, written[-1])

    monkeypatch.setattr(os, "writev", short)
    made = detach(wire.Pieces(parts))
    assert made is not None
    assert bytes(made.view()) == b"".join(written) == b"".join(parts)


@pytest.fixture
def threads(gevent_hub: Any) -> Iterator[None]:
    """gevent's pool keeps its threads until it is told."""
    yield
    gevent_hub.threadpool.kill()


def identity() -> int:
    return int(get_original("_thread", "get_ident")())


@pytest.mark.usefixtures("threads")
def test_much_is_copied_in_a_thread_where_a_greenlet_can_wait() -> None:
    here = identity()
    assert apart(APART - 1, identity) == here
    assert gevent.spawn(apart, APART, identity).get() != here
    hub = gevent.get_hub()
    seen: list[int] = []
    hub.loop.run_callback(lambda: seen.append(apart(APART, identity)))  # in the hub nobody can wait
    gevent.sleep(0)
    assert seen == [here]


@pytest.mark.usefixtures("threads")
def test_other_greenlets_run_while_much_is_copied() -> None:
    let_go, copying = os.pipe(), gevent.get_hub().loop.async_()
    started = Event()
    copying.start(started.set)

    def copy() -> bytes:
        copying.send()
        return os.read(let_go[0], 1)  # not patched: this blocks its thread

    waiting = gevent.spawn(apart, APART, copy)
    assert started.wait(10)
    os.write(let_go[1], b"x")  # by this greenlet, which therefore ran
    assert waiting.get(timeout=10) == b"x"
    copying.stop()
    copying.close()
    for end in let_go:
        os.close(end)


@pytest.mark.usefixtures("threads")
def test_a_caller_that_leaves_while_its_body_is_copied_leaves_no_descriptor() -> None:
    copied = gevent.get_hub().loop.async_()
    done = Event()
    copied.start(done.set)
    held = threading.Lock()
    held.acquire()
    made: list[int] = []

    def copy() -> Blob | None:
        with held:
            body = detach(BODY)
            assert body is not None
            made.append(body.descriptor)
        copied.send()
        return body

    with gevent.Timeout(0.01, False):
        apart(APART, copy)
    held.release()
    assert done.wait(10)
    wait_until(lambda: not is_open(made[0]), 10, "the descriptor to be closed")
    copied.stop()
    copied.close()


def test_what_has_come_is_the_same_bytes() -> None:
    made = detach(BODY)
    assert made is not None
    (got,) = received(rights(os.dup(made.descriptor)))
    assert isinstance(got, Blob)
    assert (len(got), bytes(got.view())) == (len(BODY), BODY)


def test_near_the_limit_of_descriptors_it_is_read_at_once() -> None:
    made = detach(BODY)
    assert made is not None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    descriptor = fcntl.fcntl(made.descriptor, fcntl.F_DUPFD_CLOEXEC, limit - blob.RESERVE + 1)
    assert received(rights(descriptor)) == [BODY]
    assert not is_open(descriptor)


def test_a_file_larger_than_any_message_is_not_read() -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    file = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
    os.truncate(file, 1 << 40)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, SOME_SEALS | fcntl.F_SEAL_WRITE)
    descriptor = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, limit - blob.RESERVE + 1)
    os.close(file)
    (got,) = received(rights(descriptor))
    assert isinstance(got, Blob)
    assert len(got) == 1 << 40


SOME_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@pytest.mark.parametrize("what", ["not sealed", "may be written", "a pipe", "a second one"])
def test_what_is_no_sealed_memory_file_is_refused_and_closed(what: str) -> None:
    descriptors = []
    if what == "a second one":
        made = detach(BODY)
        assert made is not None
        descriptors = [os.dup(made.descriptor)]
    if what == "a pipe":
        descriptors = list(os.pipe())
    else:
        descriptors.append(memory_file(BODY, SOME_SEALS if what == "may be written" else 0))
    with pytest.raises(WireError, match="no sealed memory file"):
        received(rights(*descriptors))
    assert not any(map(is_open, descriptors))


# Through a link.


class End:
    """One end of a socket pair with a link."""

    def __init__(self, sock: socket.socket) -> None:
        self.frames: list[wire.Frame] = []
        self.ended = ""
        self.link = link.Link(sock, self._on_frames, self._on_close, FrameDecoder())

    def _on_frames(self, _: link.Link, frames: list[wire.Frame]) -> None:
        self.frames += frames

    def _on_close(self, _: link.Link, reason: str) -> None:
        self.ended = reason


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    pair = [End(sock) for sock in socket.socketpair()]
    yield pair[0], pair[1]
    for end in pair:
        end.link.close()
        end.frames.clear()
    gevent.get_hub().destroy(destroy_loop=True)


def until(condition: object, what: str) -> None:
    wait_until(lambda: gevent.sleep(0.001) or condition(), 10, what)  # type: ignore[operator, func-returns-value]


def test_bodies_of_all_sizes_arrive_in_order(ends: tuple[End, End]) -> None:
    one, other = ends
    sent = []
    for number in range(200):
        body = os.urandom(100) * (1 if number % 3 else 3000)
        sent.append(body)
        made = detach(body) if len(body) >= wire.MIN_DETACHED else None
        plain = wire.pack_parts(wire.RESPONSE, number, body)
        one.link.send(wire.pack_detached(wire.RESPONSE, number, b"", made) if made else plain)
        del made
        if number % 7 == 0:
            gevent.sleep(0)
    until(lambda: len(other.frames) == 200, "200 frames")
    got = [frame.payload for frame in other.frames]
    assert [p.blob.view() if isinstance(p, wire.Detached) else p for p in got] == sent
    assert [isinstance(p, wire.Detached) for p in got] == [number % 3 == 0 for number in range(200)]
    assert (one.link.outbox_bytes, one.link.flushed) == (0, sum(map(len, sent)) + 200 * wire.HEADER_SIZE)


def test_a_link_whose_peer_does_not_read_counts_the_bodies_that_wait(ends: tuple[End, End]) -> None:
    one, other = ends
    other.link._reader.stop()
    for number in range(400):  # the kernel holds some 280 small messages
        made = detach(BODY[: wire.MIN_DETACHED])
        assert made is not None
        one.link.send(wire.pack_detached(wire.RESPONSE, number, b"", made))
        del made
    assert 0 < one.link.outbox_bytes < 400 * wire.MIN_DETACHED
    assert one.link.outbox_bytes + one.link.flushed == 400 * (wire.MIN_DETACHED + wire.HEADER_SIZE)
    other.link._reader.start(other.link._readable)
    until(lambda: len(other.frames) == 400, "400 frames")
    assert one.link.outbox_bytes == 0


@pytest.mark.parametrize("count", [1, 3])
def test_a_foreign_descriptor_ends_the_link_and_none_stays_open(count: int) -> None:
    left, right = socket.socketpair()
    end = End(right)
    before = set(os.listdir("/proc/self/fd"))
    foreign = [memory_file(b"x", 0) for _ in range(count)]
    socket.send_fds(left, [wire.pack_frame(wire.END, 1)], foreign)
    for descriptor in foreign:
        os.close(descriptor)
    until(lambda: end.ended, "the end of the link")
    assert "protocol error: a descriptor" in end.ended
    left.close()
    assert set(os.listdir("/proc/self/fd")) <= before
    gevent.get_hub().destroy(destroy_loop=True)
