"""Lanes: the answers' way past the arbiter.

A lane is a socket pair between one dirty worker and one client, made by the arbiter for their first call.
By it go small answers and chunks, worker to client only, under the ids that the client gave. Nothing
depends on it: what it does not take at once (its buffer is full, for the client does not read; the body is
large) goes by the arbiter, which has the bounds for that, as does every error. So a lane has no outbox,
and a message on it is there whole or not at all (SOCK_SEQPACKET, unix(7)).

The arbiter is told of a call's end only after its last frame is in the client's socket. A worker that dies
in between has answered, and is said to have died: the client reads its lanes before it believes that
(`core.mux.BEHIND_LANES`).
"""

from __future__ import annotations

import _socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import gevent

from .blob import Blob
from .core import wire
from .core.wire import Frame, FrameDecoder, WireError
from .link import MAX_HOLD, Link, read_buffer

MAX_PAYLOAD = 65536
"""Bytes of the largest payload that goes by a lane. Two of them, and what is joined before them, are below
a socket buffer (208 KiB on Linux)."""

_PACKET = 65536
"""Bytes of frames that are joined to one packet."""

_PACKETS_PER_TURN = 512
"""Packets that are read before their frames are handed in. An answer behind the chunks of many streams then
waits until these are read, and not until their readers have worked on them."""

_SEND_BUFFER = wire.STREAM_WINDOW
"""Bytes that the kernel is asked to hold of a lane, about a stream's window. It doubles that for what a
packet costs beside its bytes (some 800), and gives no more than twice ``net.core.wmem_max`` (208 KiB)."""

MOST = 64
"""The most lanes of a worker: each is a descriptor there, of 1,024 that a process has by default. The
answers to clients beyond them go by the arbiter."""

_READ = 1  # gevent's io watcher event


class Lanes:
    """In the arbiter: which there are, between clients that take them and workers."""

    def __init__(self) -> None:
        self._numbers: dict[Link, dict[int, int]] = {}
        self._counts: Counter[int] = Counter()  # by worker
        self._last = 0

    def admit(self, client: Link) -> None:
        self._numbers.setdefault(client, {})

    def between(self, client: Link, worker: int, link: Link) -> int:
        """The number of a lane, made if there is none yet; 0 where there can be none."""
        number = self._numbers[client].get(worker, 0)
        if number or self._counts[worker] >= MOST:
            return number
        try:
            ends = make()
        except OSError:
            return 0
        self._last += 1
        for of, end in zip((link, client), ends, strict=True):
            of.send(wire.pack_lane(self._last, Blob(end.detach(), 0)))
        self._numbers[client][worker] = self._last
        self._counts[worker] += 1
        return self._last

    def client_gone(self, client: Link) -> None:
        self._counts.subtract(self._numbers.pop(client, {}).keys())

    def worker_gone(self, worker: int) -> None:
        del self._counts[worker]
        for numbers in self._numbers.values():
            numbers.pop(worker, None)


def make() -> tuple[_socket.socket, _socket.socket]:
    """A worker's end and a client's. Raises `OSError` when no descriptors are left."""
    kind = _socket.SOCK_SEQPACKET | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC
    worker, client = _socket.socketpair(_socket.AF_UNIX, kind)
    worker.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, _SEND_BUFFER)
    return worker, client


def _opened(descriptor: int) -> _socket.socket:
    sock = _socket.socket(fileno=descriptor)
    sock.setblocking(False)  # also where socket.setdefaulttimeout() says otherwise
    return sock


class Sent(Protocol):
    """What a lane needs of a task."""

    call_id: int
    client_id: int | None
    lane: Sender | None


class Host(Protocol):
    """What a lane needs of its worker."""

    def send(self, kind: int, call_id: int, payload: bytes) -> None: ...

    def break_silence(self, now: float) -> None: ...

    def sent_by_lane(self, ended: list[int], now: float) -> None: ...


class Sender:
    """A worker's end. Used by the hub's callbacks and greenlets; never blocks, never raises.

    As on a `link.Link`, the first frame of the hub's turn leaves at once, and what follows is kept for its
    end. Chunks are kept also when they are the first, for a millisecond: where many streams run, their
    chunks are fewer packets then, of which each wakes the client.
    """

    def __init__(self, host: Host, descriptor: int, on_close: Callable[[], None]) -> None:
        self._host = host
        self._on_close = on_close
        self._sock = _opened(descriptor)
        self._waiting: list[tuple[Sent, int, bytes]] = []
        self._turn_taken = False
        self._flushed_at = 0.0
        self._loop: Any = gevent.get_hub().loop
        # The client sends nothing: when there is something to read, it has gone.
        self._watcher = self._loop.io(self._sock.fileno(), _READ)
        self._watcher.start(self.close)

    def send(self, task: Sent, kind: int, payload: bytes) -> None:
        """Send a frame of a task's, or keep it for the end of the turn."""
        self._waiting.append((task, kind, payload))
        keep = self._turn_taken or kind == wire.CHUNK
        if not self._turn_taken:
            self._turn_taken = True
            self._loop.run_callback(self._end_turn)
        if not keep or time.monotonic() - self._flushed_at >= MAX_HOLD:
            self.flush()

    def _end_turn(self) -> None:
        self._turn_taken = False
        self.flush()

    def flush(self) -> None:
        """Send what has been kept."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        self._flushed_at = now = time.monotonic()
        start = 0
        while start < len(waiting):
            end, packet = _packet(waiting, start)
            ended = [task.call_id for task, kind, _ in waiting[start:end] if kind != wire.CHUNK]
            if ended:
                self._host.break_silence(now)
            try:
                self._sock.send(packet)
            except OSError:
                self._fall_back(waiting[start:])
                return
            self._host.sent_by_lane(ended, now)
            start = end

    def _fall_back(self, frames: list[tuple[Sent, int, bytes]]) -> None:
        for task, kind, payload in frames:
            task.lane = None  # what else it sends must not overtake this
            self._host.send(kind, task.call_id, payload)

    def close(self) -> None:
        self._watcher.stop()
        self._watcher.close()
        self._sock.close()
        self._on_close()


def _packet(frames: list[tuple[Sent, int, bytes]], start: int) -> tuple[int, bytes]:
    """Some frames as one packet, and where the next begins."""
    parts: list[bytes] = []
    size, at = 0, start
    while at < len(frames):
        task, kind, payload = frames[at]
        size += len(payload) + wire.HEADER_SIZE
        if parts and size > _PACKET:
            break
        assert task.client_id is not None
        parts.append(wire.pack_frame(kind, task.client_id, payload))
        at += 1
    return at, parts[0] if len(parts) == 1 else b"".join(parts)


class Receiver:
    """A client's end. From the hub come frames (`on_frames`), and once its end (`on_end`): "" when the
    worker has gone, or what is wrong."""

    def __init__(
        self,
        descriptor: int,
        on_frames: Callable[[list[Frame]], None],
        on_end: Callable[[Receiver, str], None],
    ) -> None:
        self._on_frames = on_frames
        self._on_end = on_end
        self._sock = _opened(descriptor)
        self._decoder = FrameDecoder(MAX_PAYLOAD, kinds=wire.BY_LANE)
        hub: Any = gevent.get_hub()
        self._buffer = read_buffer(hub)
        self._watcher = hub.loop.io(self._sock.fileno(), _READ)
        self._watcher.start(self._readable)
        self._open = True

    def _readable(self) -> None:
        try:
            frames = self._receive()
            if len(frames) > 1 or (frames and frames[0].kind == wire.CHUNK):
                frames += self._receive_more(_PACKETS_PER_TURN)
            if frames:
                self._on_frames(frames)
        except Exception:
            # As in `link`: a bug must not stop the watcher for good without a word.
            gevent.get_hub().handle_error(self, *sys.exc_info())
            self._end("internal error, see the traceback")

    def receive_all(self) -> list[Frame]:
        """What is there, instead of by `on_frames`. Nobody is woken meanwhile who would ask for more."""
        return self._receive_more(sys.maxsize)

    def _receive_more(self, packets: int) -> list[Frame]:
        found: list[Frame] = []
        while packets and (frames := self._receive()):
            found += frames
            packets -= 1
        return found

    def _receive(self) -> list[Frame]:
        """The frames of one packet; none if there is none."""
        if not self._open:
            return []
        try:
            size = self._sock.recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            size = 0
        if not size:
            self._end("")
            return []
        self._decoder.receive_data(bytes(self._buffer[:size]))
        try:
            frames = self._decoder.frames()
            if self._decoder.buffered:
                raise WireError("a packet on a lane that is no whole frames")
        except WireError as error:
            self._end(f"protocol error: {error}")
            return []
        return frames

    def shut(self) -> None:
        """Have the worker send nothing more here; what it has sent is still to be read."""
        self._sock.shutdown(_socket.SHUT_RD)

    def _end(self, reason: str) -> None:
        self.close()
        self._on_end(self, reason)

    def close(self) -> None:
        """Read nothing more."""
        if self._open:
            self._open = False
            self._watcher.stop()
            self._watcher.close()
            self._sock.close()

    def forget(self) -> None:
        """The hub is gone, and its loop with it."""
        self._open = False
        self._sock.close()
