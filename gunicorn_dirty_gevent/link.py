"""A framed gevent socket: frames in by callback, parts out, one reason for its end.

Everything happens in the hub's own callbacks: a frame costs no greenlet switch. So the callbacks
given to a link must never block; `on_frames` may switch into greenlets that wait for a frame.

A send goes to the kernel at once when it is the first of the hub's current turn; what follows in
the same turn is kept and written together at the turn's end. One caller has the latency of a direct
send, two hundred share a system call.

A part may have a descriptor that goes with its bytes (`core.wire.Detached`). A read never joins what
came with a descriptor to what came after it (unix(7)), so each is there before its frame is complete.
"""

from __future__ import annotations

import _socket
import array
import errno
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import gevent

from . import blob
from .core.wire import Blob, Detached, Frame, Parts, WireError

READ_SIZE = 262144
"""Bytes per read: a little above Linux's default socket buffer (208 KiB), so that one read empties
it."""

_READS_PER_TURN = 4
"""Reads in one turn of the hub before others get theirs."""

_JOIN_LIMIT = 65536
"""Bytes of parts that are joined for one system call: copying small ones is cheaper than handing them
over one by one."""

_PART_COST = 64
"""Bytes of memory that a part takes beside its own."""

MAX_HOLD = 0.001
"""Seconds that a turn of the hub may keep what is sent in it. Greenlets that compute would otherwise
hold back the answers of those before them."""

_ANCILLARY = _socket.CMSG_SPACE(array.array("i").itemsize)
"""Bytes for what comes beside a read: one descriptor."""

_TOO_MANY_PAUSE = 0.01
"""Seconds until the next try when this user's processes have too many descriptors under way."""

_READ, _WRITE = 1, 2  # gevent's io watcher events


class Decoder(Protocol):
    """Bytes in, frames out (`core.wire.FrameDecoder`, `core.dialects.Opening`)."""

    def receive_data(self, data: bytes) -> None: ...

    def receive_blob(self, blob: Blob | bytes) -> None: ...

    def frames(self) -> list[Frame]: ...


PEER_GONE = "the other side closed the connection"

OnFrames = Callable[["Link", list[Frame]], None]
OnClose = Callable[["Link", str], None]


def read_buffer(hub: Any) -> memoryview:
    """`READ_SIZE` bytes to read into, for all sockets of a hub: it is copied from before anything else of
    that hub can run. Other threads have other hubs. (A recv() of this size would map memory each time:
    19 us against 2.)"""
    buffer: memoryview | None = hub.__dict__.get("_dirty_buffer")
    if buffer is None:
        buffer = hub.__dict__["_dirty_buffer"] = memoryview(bytearray(READ_SIZE))
    return buffer


class Link:
    """One end of a stream socket. Used by one hub only.

    `on_frames(link, frames)` gets what has arrived; `on_close(link, reason)` is called exactly once,
    from the hub, when the link has ended for a reason other than `close()`.
    """

    def __init__(
        self,
        sock: _socket.socket,
        on_frames: OnFrames,
        on_close: OnClose,
        decoder: Decoder,
        lanes: bool = False,
        first: bool = False,
    ) -> None:
        """`lanes`: the peer may send ends of lanes. `first`: of what has come, this is read before others."""
        self.sock = sock
        self.decoder = decoder
        self.on_drained: Callable[[], None] | None = None
        """Called when the kernel has taken everything, after it had not."""
        self.closed = ""  # the reason
        self.flushed = 0
        """Bytes that the kernel has taken."""
        self.outbox_bytes = 0
        """Bytes that wait for the kernel."""
        self._on_frames = on_frames
        self._on_close = on_close
        self._lanes = lanes
        self._outbox: deque[bytes | memoryview | Detached] = deque()
        self._turn_taken = False
        self.flushed_at = 0.0
        """When `send` last gave something to the kernel."""
        self._blocked = False  # the kernel's buffer is full; the writer waits for room
        sock.setblocking(False)
        hub: Any = gevent.get_hub()
        self._loop: Any = hub.loop
        self._buffer = read_buffer(hub)
        self._buffers = [self._buffer]
        self.refused = False
        """A write failed: the peer is gone, and what was sent since has not reached it."""
        priority = getattr(self._loop, "MAXPRI", None) if first else None
        self._reader = self._loop.io(sock.fileno(), _READ, priority=priority)
        self._writer = self._loop.io(sock.fileno(), _WRITE)
        self._pause = self._loop.timer(_TOO_MANY_PAUSE)
        self._reader.start(self._readable)

    @property
    def outbox_cost(self) -> int:
        """Bytes of memory, roughly, that wait for the kernel."""
        return self.outbox_bytes + _PART_COST * len(self._outbox)

    # Writing.

    def send(self, parts: Parts) -> None:
        """Send, or keep for the end of the turn. On a link that has ended: nothing."""
        if self.closed:
            return
        for part in parts:
            self._outbox.append(part)
            self.outbox_bytes += len(part)
        now = time.monotonic()
        if not self._turn_taken:
            self._turn_taken = True
            self._loop.run_callback(self._end_turn)
        elif now - self.flushed_at < MAX_HOLD:
            return
        self.flushed_at = now
        self._flush()

    def flush(self) -> None:
        """Send now what is kept for the end of the turn."""
        if self._outbox and not self.closed:
            self._flush()

    def _end_turn(self) -> None:
        self._turn_taken = False
        self.flush()
        self._tell_drained()

    def _writable(self) -> None:
        self._writer.stop()
        self._pause.stop()
        self._blocked = False
        self._flush()
        self._tell_drained()

    def _tell_drained(self) -> None:
        if not self._outbox and not self.closed and self.on_drained is not None:
            told, self.on_drained = self.on_drained, None
            told()

    def _flush(self) -> None:
        if self._blocked:
            return
        outbox = self._outbox
        try:
            while outbox:
                if len(outbox) > 1:
                    self._join_small()
                part = outbox[0]
                if isinstance(part, Detached):
                    self._send_detached(part)
                else:
                    self._taken(self.sock.send(part))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
                self._blocked = True
                self._writer.start(self._writable)
            elif error.errno == errno.ETOOMANYREFS:
                self._blocked = True
                self._pause.start(self._writable)
            elif error.errno != errno.EINTR:
                # The peer is gone. What it wrote before may still wait to be read, so the reader
                # finds the end.
                self._blocked = self.refused = True
                outbox.clear()
                self.outbox_bytes = 0

    def _join_small(self) -> None:
        """Make one part of those at the front that are small enough together."""
        outbox = self._outbox
        size = 0
        front: list[Any] = []
        while outbox and size + len(outbox[0]) <= _JOIN_LIMIT and outbox[0].__class__ is not Detached:
            part = outbox.popleft()
            size += len(part)
            front.append(part)
        if front:
            outbox.appendleft(front[0] if len(front) == 1 else b"".join(front))

    def _send_detached(self, part: Detached) -> None:
        """Send a part's inline bytes, its descriptor with the first of them."""
        descriptor = array.array("i", [part.blob.descriptor])
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, descriptor)]
        sent = self.sock.sendmsg([part.inline], rights)
        # The body has left with it, and counts.
        self._outbox[0] = part.inline
        self.flushed += len(part.blob)
        self.outbox_bytes -= len(part.blob)
        self._taken(sent)

    def _taken(self, sent: int) -> None:
        self.flushed += sent
        self.outbox_bytes -= sent
        outbox: deque[Any] = self._outbox
        while sent:
            size = len(outbox[0])
            if sent < size:
                outbox[0] = memoryview(outbox[0])[sent:]
                return
            sent -= size
            outbox.popleft()

    # Reading.

    def _receive(self) -> int:
        """One read into the buffer; descriptors that came with it go to the decoder."""
        size, ancillary, flags, _ = self.sock.recvmsg_into(
            self._buffers, _ANCILLARY, _socket.MSG_CMSG_CLOEXEC
        )
        if ancillary:
            for body in blob.received(ancillary, self._lanes):
                self.decoder.receive_blob(body)
        if flags & _socket.MSG_CTRUNC and self._lanes and not ancillary:
            self.decoder.receive_blob(b"")
        elif flags & _socket.MSG_CTRUNC:
            raise WireError("a descriptor was lost: this process has too many, or two came at once")
        return size

    def _readable(self) -> None:
        try:
            for _ in range(_READS_PER_TURN):
                size = self._receive()
                if not size:
                    self.end(PEER_GONE)
                    return
                self.decoder.receive_data(bytes(self._buffer[:size]))
                # Until it has none: an error behind good frames is raised only then.
                while not self.closed and (frames := self.decoder.frames()):
                    self._on_frames(self, frames)
                if size < READ_SIZE or self.closed:
                    return
        except WireError as error:
            self.end(f"protocol error: {error}")
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR):
                self.end(f"{PEER_GONE} ({error.strerror})")
        except Exception:
            # A bug here must cost one connection, not stop the watcher for good without a word.
            gevent.get_hub().handle_error(self, *sys.exc_info())
            self.end("internal error, see the traceback")

    def read_rest(self) -> None:
        """Read what is there, after the peer is known to have ended."""
        while not self.closed:
            try:
                size = self._receive()
            except (OSError, WireError):
                return
            if not size:
                return
            self.decoder.receive_data(bytes(self._buffer[:size]))
            try:
                frames = self.decoder.frames()
            except WireError:
                return
            self._on_frames(self, frames)

    # The end.

    def close(self, reason: str = "closed") -> None:
        """End the link now; what has not been written is lost. `on_close` is not called."""
        if self.closed:
            return
        self.closed = reason
        self._reader.stop()
        self._writer.stop()
        self._pause.stop()
        self._reader.close()
        self._writer.close()
        self._pause.close()
        self.sock.close()
        self._outbox.clear()

    def end(self, reason: str) -> None:
        """`close`, and tell `on_close`."""
        if self.closed:
            return
        self.close(reason)
        # In a callback of its own: the reason may have come up in the middle of a caller's send.
        self._loop.run_callback(self._on_close, self, reason)
