"""Our client with gunicorn's own dirty arbiter: one connection for each call in flight.

A stock arbiter reads a connection's next message when it has answered the last one, so calls that
share a connection wait for each other; and an answer that nobody waited for would be the next
caller's. So each call has a connection to itself. One that answered its call whole is kept for
another call; one whose call was given up is closed.

Which arbiter it is shows on connecting: a stock one hangs up on our HELLO (and logs "Client connection
error" once), and answers a STATUS message. One that is being replaced may hang up too, but what
answers then says that it is ours.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from gunicorn.dirty import protocol
from gunicorn.dirty.tlv import TLVEncoder

from .. import settings
from ..core import faults, large, values, wire
from ..core.mux import Call, Why
from ..core.wire import Frame, FrameDecoder, Payload, WireError

MAX_OPEN = 256
"""Connections at once to one stock arbiter from one process: it forks few workers and runs one call in
each, so more would only wait there. Further calls wait here, within their own time."""

MAX_IDLE = 16
"""Connections kept for the next calls."""

PROBE_TIME = 5.0
"""Seconds for an arbiter to answer what it is."""

READ_SIZE = 65536

_KINDS = frozenset((wire.RESPONSE, wire.ERROR, wire.CHUNK, wire.END))

_STASH_ERRORS = {"Key not found": "StashKeyNotFoundError", "Table not found": "StashTableNotFoundError"}
"""What a stock arbiter means: its messages do not name the classes."""

_NOT_RUN = ("DirtyAppNotFoundError", "DirtyNoWorkersAvailableError")

MakeSocket = Callable[[], Any]


class Unencodable(Exception):
    """The call cannot be written in gunicorn's own encoding."""


def request(call: Call) -> bytes:
    """A call as gunicorn's own client writes it. Raises `Unencodable`."""
    try:
        if call.kind == wire.STASH:
            return _stash_request(values.loads(large.joined(call.body)))
        args, kwargs = values.loads_call(large.joined(call.body))
        return bytes(protocol.BinaryProtocol.encode_request(1, call.app, call.action, args, kwargs))
    except Unencodable:
        raise
    except Exception as error:
        raise Unencodable(f"gunicorn's own encoding has no form for it ({error})") from error


def _stash_request(message: dict[str, Any]) -> bytes:
    operation, table = message["op"], message["table"]
    if operation > protocol.STASH_OP_EXISTS or message.get("ttl") is not None:
        raise Unencodable(
            "gunicorn's own dirty arbiter is running, which has no add, incr, compare_and_set and ttl; "
            "gunicorn_dirty_gevent.install() in gunicorn.conf.py puts another in its place"
        )
    value = values.loads(message["value"])
    arguments = {"key": message.get("key"), "value": value, "pattern": message.get("pattern")}
    return bytes(protocol.BinaryProtocol.encode_stash(1, operation, table, **arguments))


def decoder() -> FrameDecoder:
    """For what a stock arbiter sends."""
    return FrameDecoder(protocol.MAX_MESSAGE_SIZE, version=1, kinds=_KINDS)


def take(call: Call, frame: Frame) -> Frame | None:
    """Take a chunk to the call, or return its end, in the form that our own arbiter sends."""
    kind, _, payload = frame
    told = TLVEncoder.decode_full(payload) if payload else {}
    if kind == wire.CHUNK:
        call.chunks.append(values.dumps(told.get("data"), "chunk"))
        return None
    if kind == wire.ERROR:
        return Frame(kind, 0, values.dumps(_fault(call, told.get("error")), "error"))
    return Frame(kind, 0, values.dumps(told.get("result"), "result"))


def _fault(call: Call, told: Any) -> faults.Fault:
    error: dict[str, Any] = told if isinstance(told, dict) else {"message": str(told)}
    message = str(error.get("message", "Unknown error"))
    details: dict[str, Any] = {**(error.get("details") or {})}
    details["may_have_run"] = error.get("error_type") not in _NOT_RUN
    if call.kind == wire.STASH:
        name = next((name for words, name in _STASH_ERRORS.items() if message.startswith(words)), None)
        details["stash_error"] = name
    return {"error_type": error.get("error_type", "DirtyError"), "message": message, "details": details}


def is_stock(answer: Frame) -> bool:
    """Whether an answer to `STATUS_REQUEST` is a stock arbiter's. (Older ones know no STATUS and answer
    with an error.)"""
    if answer.kind != wire.RESPONSE:
        return True
    try:
        result = TLVEncoder.decode_full(answer.payload).get("result")
    except Exception:  # gunicorn's decoder names no kinds
        return False
    return not (isinstance(result, dict) and "implementation" in result)


STATUS_REQUEST = wire.pack_frame(protocol.MSG_TYPE_STATUS, 1, TLVEncoder.encode({}), version=1)


class _Connection:
    """A socket and what has been read of it."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.decoder = decoder()
        self.users = 0
        """Who is about to read or write. The last of them closes a socket that was shut meanwhile: another
        may have its descriptor's number before a thread comes to wait for that."""
        self.is_shut = False

    def is_fresh(self) -> bool:
        """Whether the other side is still there, and has sent nothing that nobody asked for."""
        try:
            self.sock.settimeout(0)
            self.sock.recv(1, 0x2)  # MSG_PEEK
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        """Under the channel's lock, if somebody may use it."""
        self.is_shut = True
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        if not self.users:
            self.sock.close()

    def abandon(self, never: int) -> None:
        """In a forked child: let go without a trace on it, and without waking the copy of who waits there.
        `never` is a descriptor on which nothing ever comes."""
        if self.users:
            os.dup2(never, self.sock.fileno(), inheritable=False)
        else:
            self.sock.close()

    def read(self, until: float) -> bytes:
        """What has come; nothing when the time is up. Raises an error when there will be no more."""
        self.sock.settimeout(max(until - time.monotonic(), 0.001))
        try:
            data: bytes = self.sock.recv(READ_SIZE)
        except TimeoutError as error:
            if is_foreign(error):
                raise
            return b""
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "the other side closed the connection")
        return data

    def frames(self, data: bytes) -> list[Frame]:
        self.decoder.receive_data(data)
        return self.decoder.frames()


class StockChannel:
    """See `client.channels.Carrier`. The caller's own greenlet or thread reads its connection.

    `make_socket` and `make_semaphore` decide how it waits. `beside` runs a function later, elsewhere, and may
    be called at any moment. `lost` is told that the arbiter there may be another by now. `lock` gives the
    lock of the channel that this one is part of, under which a call gets its id, or ends: several threads may
    come to it at once (its own, one that cancels it, one that closes the client).

    A call is ended first and taken from those that are busy then: who finds it there no more finds it done.
    """

    def __init__(
        self,
        socket_path: str,
        make_socket: MakeSocket,
        make_semaphore: Any,
        beside: Callable[[Callable[[], None]], None],
        lost: Callable[[], None],
        lock: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.socket_path = socket_path
        self._make_socket = make_socket
        self._room = make_semaphore(MAX_OPEN)
        self._beside = beside
        self._lost = lost
        self._lock = lock
        self._idle: list[_Connection] = []
        self._busy: dict[Call, _Connection] = {}
        self._waiting = 0

    def start(self, call: Call) -> None:
        try:
            data = request(call)
        except Unencodable as error:
            message = f"{call.app}.{call.action} was not sent: {error}"
            self._settle(call, fault=faults.fault("DirtyEncodeError", message, may_have_run=False))
            return
        if call.done or not self._enter(call):
            return
        try:
            connection = self._connection(call.deadline)
        except BaseException as error:
            self._room.release()
            if not isinstance(error, OSError) or is_foreign(error):
                raise
            self._say_lost(call, error)
            return
        self._busy[call] = connection
        connection.users += 1
        try:
            with self._lock():
                if not call.done:
                    call.id = 1
            if not call.done:
                connection.sock.settimeout(_seconds(call.deadline))
                connection.sock.sendall(data)
        except BaseException as error:
            if not isinstance(error, OSError) or is_foreign(error):
                self.cancel(call)
                raise
            self._fail(call, error)
        finally:
            self._leave(connection)
        if call.done:  # perhaps when there was no connection to close
            self._end(call, keep=False)

    def _leave(self, connection: _Connection) -> None:
        with self._lock():
            connection.users -= 1
            if connection.is_shut:
                connection.close()

    def _enter(self, call: Call) -> bool:
        """Wait for room for one more connection. False: the call has ended instead."""
        limit = settings.current.calls_per_connection
        if self._waiting >= limit:
            what = f"{limit} calls wait for a connection to the dirty arbiter (calls_per_connection)"
            self._settle(call, fault=faults.overloaded(call.app, what))
            return False
        began = time.monotonic()
        self._waiting += 1
        try:
            if self._room.acquire(timeout=_seconds(call.deadline)):
                return True
        finally:
            self._waiting -= 1
        why = f"all {MAX_OPEN} connections to the dirty arbiter were in use"
        fault = faults.queue_timeout(call.app, call.action, time.monotonic() - began, why)
        self._settle(call, fault=fault)
        return False

    def wait(self, call: Call, seconds: float) -> None:
        with self._lock():
            connection = self._busy.get(call)
            if connection is None or call.chunks:
                return
            connection.users += 1
        try:
            data = connection.read(time.monotonic() + min(seconds, 1e6))
        except OSError as error:
            if is_foreign(error):
                raise
            self._fail(call, error)
            return
        finally:
            self._leave(connection)
        try:
            for frame in connection.frames(data):
                last = take(call, frame)
                if last is not None:
                    self._settle(call, last=last)
                    self._end(call, keep=True)
        except Exception as error:  # bytes that are no answer
            self._fail(call, error)

    def take_chunk(self, call: Call) -> Payload:
        return call.chunks.popleft()

    def cancel(self, call: Call, why: Why | None = None) -> None:
        try:
            with self._lock():
                call.give_up(why)
        finally:
            self._end(call, keep=False)

    def drop(self, call: Call) -> None:
        # Not here: a finalizer may run in the midst of what takes the semaphore.
        self._beside(lambda: self.cancel(call))

    def abandon(self) -> None:
        """In a forked child: let go of the parent's connections. Without the lock, which a thread that is not
        here may hold."""
        never = os.eventfd(0, os.EFD_CLOEXEC)
        for call, connection in list(self._busy.items()):
            if not connection.users and not call.done:
                call.fault = faults.connection_lost(call.app, call.action, "forked", True, self.socket_path)
            connection.abandon(never)
        while (idle := self._pop_idle()) is not None:
            idle.abandon(never)
        os.close(never)
        self._busy.clear()

    def forget(self) -> None:
        """The hub is gone, and its loop with it: no more than drop the sockets."""
        self._idle.clear()
        self._busy.clear()

    def close(self) -> None:
        for call in list(self._busy):
            self._fail(call, ConnectionError("this client closed the connection"))
        self._close_idle()

    def _close_idle(self) -> None:
        while (connection := self._pop_idle()) is not None:
            connection.close()

    def _connection(self, deadline: float) -> _Connection:
        while (connection := self._pop_idle()) is not None:
            if connection.is_fresh():
                return connection
            connection.close()
            self._lost()
        sock = self._make_socket()
        try:
            sock.settimeout(_seconds(deadline))
            sock.connect(self.socket_path)
        except BaseException:
            sock.close()
            raise
        return _Connection(sock)

    def _pop_idle(self) -> _Connection | None:
        try:
            return self._idle.pop()
        except IndexError:  # another thread may have been quicker
            return None

    def _fail(self, call: Call, error: Exception) -> None:
        """The call's connection is of no more use. A call that another greenlet or thread has ended
        keeps what that says of it: its connection fails because it was closed."""
        if not call.done:
            self._say_lost(call, error)
        self._end(call, keep=False)

    def _say_lost(self, call: Call, error: Exception) -> None:
        self._lost()
        self._close_idle()
        reason = str(getattr(error, "strerror", None) or error)
        sent = call.id != 0
        fault = faults.connection_lost(call.app, call.action, reason, sent, self.socket_path)
        self._settle(call, fault=fault)

    def _settle(self, call: Call, *, last: Frame | None = None, fault: faults.Fault | None = None) -> None:
        """End the call with this, unless it has ended."""
        with self._lock():
            if not call.done:
                call.last, call.fault = last, fault

    def _end(self, call: Call, *, keep: bool) -> None:
        """Only who takes the call from those that are busy gives its room back: with threads, its reader
        and who cancels it may both come here."""
        connection = self._busy.pop(call, None)
        if connection is None:
            return
        try:
            if keep and not connection.users and len(self._idle) < MAX_IDLE:
                self._idle.append(connection)
            else:
                with self._lock():
                    connection.close()
        finally:
            self._room.release()


def probe(socket_path: str, make_socket: MakeSocket, seconds: float) -> bool:
    """Whether a stock arbiter answers there."""
    until = time.monotonic() + min(seconds, PROBE_TIME)
    sock = None
    try:
        sock = make_socket()
        sock.settimeout(max(until - time.monotonic(), 0.001))
        sock.connect(socket_path)
        sock.sendall(STATUS_REQUEST)
        connection = _Connection(sock)
        frames: list[Frame] = []
        while not frames and time.monotonic() < until:
            frames = connection.frames(connection.read(until))
        return bool(frames) and is_stock(frames[0])
    except WireError:  # nothing that can be read
        return False
    except OSError as error:
        if is_foreign(error):
            raise
        return False  # not there, or no descriptor is left here: the next look may tell
    finally:
        if sock is not None:
            sock.close()


def is_foreign(error: BaseException) -> bool:
    """Whether this is no socket's own error but the caller's, as of ``gevent.Timeout(1, TimeoutError)``. The
    kernel's have a number; a socket's own timeout says the same with Python, gevent and eventlet."""
    return isinstance(error, OSError) and error.errno is None and error.args != ("timed out",)


def _seconds(deadline: float) -> float | None:
    return None if deadline == float("inf") else max(deadline - time.monotonic(), 0.001)
