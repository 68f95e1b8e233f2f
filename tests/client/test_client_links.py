"""The connections of a client of threads: what ends, interrupts or delays one leaves nothing behind, and
mixes no caller's bytes with another's."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from support.calls import APP, check_places, hang_up_on, started_since, wait_for_threads
from support.fake_arbiter import FakeArbiter
from support.waiting import poll

from gunicorn_dirty_gevent.client import DirtyClient, channels, stock
from gunicorn_dirty_gevent.client.results import result
from gunicorn_dirty_gevent.client.threads import ThreadChannel
from gunicorn_dirty_gevent.core import values
from gunicorn_dirty_gevent.core.mux import Call
from gunicorn_dirty_gevent.errors import DirtyConnectionError, DirtyError, DirtyTimeoutError


class Interrupted(BaseException):
    """As a greenlet's kill, or a signal's handler, raises it where a caller stands."""


def as_it_is(sock: socket.socket, data: bytes) -> bytes:
    return data


def nothing(*_: Any) -> None:
    pass


class Sockets:
    """What happens in the sockets that clients make from here on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.on_make: Callable[[], None] = nothing
        self.on_connect: Callable[[socket.socket], None] = nothing
        self.on_send: Callable[[socket.socket, bytes], bytes] = as_it_is
        """What is given to the kernel, of what shall be sent."""
        self.on_data: Callable[[socket.socket, bytes], None] = nothing
        self.connected: list[socket.socket] = []
        self.made = self._a_class()
        self.made.__module__ = "socket"  # native ones
        patch.setattr(socket, "socket", self.made)

    def be_cooperative(self) -> None:
        """They are of another module than ``socket``, as eventlet's."""
        self.made.__module__ = "green.socket"

    def _a_class(self) -> type[socket.socket]:
        sockets = self

        class Socket(socket.socket):
            is_client = False

            def __init__(self, *args: Any, fileno: int | None = None, **kwargs: Any) -> None:
                if fileno is None:
                    sockets.on_make()
                super().__init__(*args, fileno=fileno, **kwargs)

            def connect(self, address: Any) -> None:
                sockets.on_connect(self)
                super().connect(address)
                self.is_client = True
                sockets.connected.append(self)

            def send(self, data: Any, flags: int = 0) -> int:
                return super().send(sockets.on_send(self, bytes(data)) if self.is_client else data, flags)

            def sendall(self, data: Any, flags: int = 0) -> None:
                super().sendall(sockets.on_send(self, bytes(data)) if self.is_client else data, flags)

            def recv(self, size: int, flags: int = 0) -> bytes:
                data = super().recv(size, flags)
                if self.is_client:
                    sockets.on_data(self, data)
                return data

        return Socket


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Sockets:
    return Sockets(monkeypatch)


@contextmanager
def beside(*what: Callable[[], Any]) -> Iterator[list[Future[Any]]]:
    """Each in a thread of its own, beside the block."""
    with ThreadPoolExecutor(len(what)) as pool:
        yield [pool.submit(one) for one in what]


def outcome(ask: Callable[[], Any]) -> Any:
    """Its result, or the error of the connection."""
    try:
        return ask()
    except DirtyConnectionError:
        return DirtyConnectionError


# Sends.


def test_an_interruption_when_the_bytes_are_out_sends_none_of_them_again(
    ours: FakeArbiter, client: DirtyClient
) -> None:
    """A signal handler's exception, at each line that sends."""
    code = ThreadChannel._send.__code__
    for line in sorted({line for _, _, line in code.co_lines() if line is not None}):

        def interrupt(frame: Any, event: str, _: Any, line: int = line) -> Any:
            if frame.f_code is not code:
                return None
            if event == "line" and frame.f_lineno == line:
                sys.settrace(None)
                raise Interrupted
            return interrupt

        assert client.execute(APP, "echo", "before") == "before"
        sys.settrace(interrupt)
        try:
            outcome(lambda: client.execute(APP, "echo", f"once-{line}"))  # noqa: B023
        except Interrupted:
            pass
        finally:
            sys.settrace(None)
        assert client.execute(APP, "echo", "after") == "after"
        assert ours.ran("echo", value=f"once-{line}") <= 1


def by_signal() -> None:
    def handle(*_: Any) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR2, handle)
    try:
        signal.raise_signal(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)


def by_itself() -> None:
    raise Interrupted


@pytest.mark.parametrize("cooperative", [False, True], ids=["native", "cooperative"])
def test_a_caller_that_is_interrupted_in_mid_frame(
    ours: FakeArbiter, client: DirtyClient, sockets: Sockets, cooperative: bool
) -> None:
    """The rest of its frame is not made up of other callers' bytes."""
    if cooperative:
        sockets.be_cooperative()
    body = b"mine" * 125_000
    turns = 0

    def in_parts(sock: socket.socket, data: bytes) -> bytes:
        nonlocal turns
        turns += 1
        if turns == 3:
            sockets.on_send = as_it_is
            (by_itself if cooperative else by_signal)()
        return data[:100_000]

    secrets = [f"secret of caller {n}".encode() * 12_000 for n in range(3)]
    with beside(lambda: outcome(lambda: client.execute(APP, "hold", "early"))) as [early]:
        ours.wait(lambda: ours.ran("hold"), "the early call to run")
        sockets.on_send = in_parts
        with pytest.raises(Interrupted):
            client.execute(APP, "save", "it", body)
        calls = [lambda n=n: client.execute(APP, "echo", n, secrets[n]) for n in range(3)]
        with beside(*calls) as others:
            assert [other.result(10) for other in others] == [0, 1, 2]
        ours.release()
        assert early.result(10) == "early" if cooperative else DirtyConnectionError
    assert not ours.broken
    assert all(run.args == ["it", body] for run in ours.runs if run.action == "save")
    assert all(run.args == [run.args[0], secrets[run.args[0]]] for run in ours.runs if run.action == "echo")
    assert ours.opened == ([1] if cooperative else [1, 2])


@pytest.mark.parametrize("way", ["execute", "stream"])
def test_a_first_call_at_a_stock_arbiter_that_is_interrupted(
    theirs: FakeArbiter,
    client: DirtyClient,
    sockets: Sockets,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    """While it is sent, and the client has just found out which arbiter it is."""
    monkeypatch.setattr(stock, "MAX_OPEN", 1)

    def interrupt(sock: socket.socket, data: bytes) -> bytes:
        if b"large" in data:
            raise Interrupted
        return data

    sockets.on_send = interrupt
    with pytest.raises(Interrupted):
        if way == "execute":
            client.execute(APP, "echo", "large")
        else:
            next(client.stream(APP, "count", 3, "large"))
    theirs.wait(lambda: not theirs.left(), "its connection to be closed", 8)
    check_places(client, theirs, 1)


def test_the_process_default_of_socket_timeouts(path: str) -> None:
    """It is not for our connections: an answer may take longer, and so may a send."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.1)
    ours, client = FakeArbiter(path), DirtyClient(path, timeout=20)
    try:
        with beside(lambda: client.execute(APP, "hold", 1)) as [held]:
            ours.wait(lambda: ours.ran("hold"), "the call to run")
            assert not poll(held.done, 0.4)
            ours.release()
            assert held.result(10) == 1
        ours.read(False)
        with beside(lambda: client.execute(APP, "echo", 2, bytes(3_000_000))) as [sent]:
            assert not poll(sent.done, 0.4)
            ours.read(True)
            assert sent.result(10) == 2
        assert ours.opened == [1]
    finally:
        client.close()
        ours.close()
        socket.setdefaulttimeout(before)


# Connecting.


def test_a_backlog_that_is_full(path: str) -> None:
    """Callers end in their time, and `close()` waits for no one."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        client = DirtyClient(path, timeout=0.5)

        def ended() -> Any:
            with pytest.raises(DirtyError) as caught:
                client.execute(APP, "echo", 1)
            return type(caught.value), caught.value.may_have_run

        with beside(ended, ended) as calls:
            try:
                assert [call.result(5) for call in calls] == [(DirtyTimeoutError, False)] * 2
            finally:
                listener.close()  # what still connects is refused
    client.close()


def test_close_while_the_backlog_is_full(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        client, connecting = DirtyClient(path, timeout=20), threading.Event()
        with pytest.MonkeyPatch.context() as patch:
            Sockets(patch).on_connect = lambda sock: connecting.set()
            with beside(lambda: outcome(lambda: client.execute(APP, "echo", 1))) as [call]:
                assert connecting.wait(10)
                with beside(client.close) as [closing]:
                    try:
                        closing.result(5)
                        assert call.result(5) is DirtyConnectionError
                    finally:
                        listener.close()
    client.close()


@pytest.mark.parametrize("way", ["execute", "submit"])
def test_no_descriptor_is_left(ours: FakeArbiter, client: DirtyClient, sockets: Sockets, way: str) -> None:
    def fail() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    sockets.on_make = fail
    try:
        if way == "execute":
            client.execute(APP, "echo", "never")
        else:
            client.submit(APP, "echo", "never").get()
    except Exception as error:
        told = error
    sockets.on_make = nothing
    assert client.execute(APP, "echo", "later") == "later"
    assert not ours.ran("echo", value="never")
    assert isinstance(told, DirtyConnectionError), told
    assert "Too many open files" in str(told)
    assert told.may_have_run is False


def test_a_reader_that_comes_late(ours: FakeArbiter, client: DirtyClient, sockets: Sockets) -> None:
    """What it has read of a connection that was closed meanwhile is not taken for the next one's."""
    has_read, go_on, readers = threading.Event(), threading.Event(), []

    def hold_up(sock: socket.socket, data: bytes) -> None:
        sockets.on_data = nothing
        readers.append(threading.current_thread())
        has_read.set()
        assert go_on.wait(20)

    sockets.on_data = hold_up
    channel = channels.get(client)  # as a call has it that begins when another handle closes the last one
    with beside(lambda: outcome(lambda: perform(channel, 1))) as [first]:
        assert has_read.wait(10)
        ours.greets = False
        channel.close()
        assert first.result(10) is DirtyConnectionError
    with beside(lambda: perform(channel, 2)) as [second]:
        ours.wait(lambda: len(ours.hellos) == 2, "the next connection")
        go_on.set()
        readers[0].join(10)
        assert not readers[0].is_alive()
        ours.greet()
        ours.wait(lambda: ours.ran("hold"), "the call to run")
        ours.release()
        assert second.result(10) == 2
    assert ours.opened == [1, 2]
    channel.close()


def perform(channel: channels.Channel, value: int) -> Any:
    call = Call(APP, "hold", values.dumps_call((value,), {}), time.monotonic() + 20, False)
    channels.perform(channel, call, 20)
    return result(call)


# Stock arbiters.


def test_a_future_that_has_timed_out_while_its_thread_connects(
    theirs: FakeArbiter, client: DirtyClient, sockets: Sockets
) -> None:
    before = set(threading.enumerate())
    assert client.execute(APP, "echo", 1) == 1
    busy = client.submit(APP, "hold", "busy")  # and the next call needs another connection
    theirs.wait(lambda: theirs.ran("hold"), "the first call to run")
    connecting, go_on = threading.Event(), threading.Event()

    def hold_up(sock: socket.socket) -> None:
        connecting.set()
        assert go_on.wait(20)

    sockets.on_connect = hold_up
    late = client.options(timeout=0.2).submit(APP, "echo", "late")
    try:
        assert connecting.wait(10)
        with pytest.raises(DirtyTimeoutError) as first:
            late.get()
    finally:
        go_on.set()
    theirs.release()
    assert busy.get(10) == "busy"
    wait_for_threads(before)
    assert first.value.may_have_run or not theirs.ran("echo", value="late")
    with pytest.raises(DirtyTimeoutError) as again:
        late.get()
    assert (str(again.value), again.value.may_have_run) == (str(first.value), first.value.may_have_run)
    assert (late.done(), late.cancel()) == (True, False)


def test_a_stock_arbiter_that_says_late_what_it_is(
    theirs: FakeArbiter, client: DirtyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each future asks once at a time, runs once, and gives its place back."""
    monkeypatch.setattr(stock, "MAX_OPEN", 3)
    count = 20
    before = set(threading.enumerate())
    theirs.greets = False
    futures = [client.submit(APP, "hold", n) for n in range(count)]
    # The client tries again and again meanwhile, and each time it learns that it was not heard.
    poll(lambda: len(theirs.hellos) >= 6, 1)
    theirs.wait(lambda: theirs.asked, "the question")
    at_once = len(started_since(before))
    theirs.greet()
    theirs.wait(lambda: theirs.release() or all(future.done() for future in futures), "the calls to end")
    assert [future.get(10) for future in futures] == list(range(count))
    wait_for_threads(before)
    assert sorted(run.args[0] for run in theirs.runs) == list(range(count))
    assert at_once <= count + 3  # one for each, and a few of the connection's
    assert len(theirs.asked) <= count
    check_places(client, theirs, 3)


def test_a_cancelled_future_that_waited_for_room(
    theirs: FakeArbiter, client: DirtyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays cancelled when its time has passed."""
    monkeypatch.setattr(stock, "MAX_OPEN", 1)
    assert client.execute(APP, "echo", 1) == 1
    busy = client.submit(APP, "hold", "busy")
    theirs.wait(lambda: theirs.ran("hold"), "the first call to run")
    before = set(threading.enumerate())
    late = client.options(timeout=0.3).submit(APP, "echo", "late")
    assert late.cancel() is True
    told = []
    for _ in range(2):
        with pytest.raises(DirtyError) as caught:
            late.get()
        told.append((type(caught.value).__name__, caught.value.may_have_run))
        wait_for_threads(before)
    assert told == [("DirtyCancelledError", False)] * 2
    theirs.release()
    assert busy.get(10) == "busy"
    assert not theirs.ran("echo", value="late")


def test_close_ends_calls_at_a_stock_arbiter_that_was_lost(theirs: FakeArbiter, client: DirtyClient) -> None:
    with beside(lambda: client.execute(APP, "hold", 1)) as [held]:
        theirs.wait(lambda: theirs.ran("hold"), "the call to run")
        hang_up_on(client)
        client.close()
        with pytest.raises(DirtyConnectionError, match="closed the connection"):
            held.result(8)


def test_cancel_of_a_call_at_a_stock_arbiter_that_was_lost(theirs: FakeArbiter, client: DirtyClient) -> None:
    held = client.submit(APP, "hold", 1)
    theirs.wait(lambda: theirs.ran("hold"), "the call to run")
    connection = theirs.runs[0].connection
    hang_up_on(client)
    assert held.cancel() is True
    theirs.wait(lambda: connection in theirs.gone, "its connection to be closed", 8)
    with pytest.raises(DirtyError, match="cancelled"):
        held.get()
