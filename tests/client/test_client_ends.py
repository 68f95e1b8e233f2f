"""How calls of threads end when two threads decide it at once. One of them is stopped at each line of the
package in turn, and the other goes first."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from support.calls import APP, check_places, hang_up_on, wait_for_threads
from support.fake_arbiter import FakeArbiter
from support.waiting import poll, wait_until

import gunicorn_dirty_gevent
from gunicorn_dirty_gevent.client import DirtyClient, DirtyFuture, stock
from gunicorn_dirty_gevent.errors import DirtyConnectionError, DirtyError, DirtyTimeoutError

PACKAGE = os.path.dirname(gunicorn_dirty_gevent.__file__)
ENCODING = tuple(os.path.join(PACKAGE, "core", name) for name in ("values.py", "wire.py", "large.py"))
"""Where no thread can notice another."""

ERRORS = tuple(os.path.join(PACKAGE, name) for name in ("errors.py", "core/faults.py"))
"""Likewise; but that one is being made is a moment to stop at."""

MOST_LINES = 600
STUCK_SECONDS = 0.1
"""When the other thread gets no further within this time, it needs what the stopped one holds: a lock. Then
the order was not this one. (Too short a time would have the test see less, not fail.)"""


class Turn:
    """In its block, or in the next thread that starts in `in_the_next_thread`, the line of that number (of
    the package) waits until `other` has run, in a thread of its own."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.patience = STUCK_SECONDS
        self.other: Callable[[], Any] = lambda: None
        self.begins: Callable[[], bool] = lambda: True
        """Lines count from when this is first true."""
        self.stopped: threading.Thread | None = None
        self.called = False
        self._ran: Future[Any] = Future()
        self._thread = threading.Thread(target=self._run, name="the other", daemon=True)

    @contextmanager
    def here(self, other: Callable[[], Any]) -> Iterator[None]:
        self.other = other
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(before)

    @contextmanager
    def in_the_next_thread(self, other: Callable[[], Any]) -> Iterator[None]:
        self.other = other
        threading.settrace(self._trace)
        try:
            yield
            wait_until(lambda: self.stopped, 10, "the next thread")
        finally:
            threading.settrace(None)  # type: ignore[arg-type]

    def join(self) -> Any:
        """The other's result, when all is over."""
        if not self.called:
            return None
        return self._ran.result(20)

    def _trace(self, frame: Any, event: str, _: Any) -> Any:
        code = frame.f_code
        if not self._watches(code.co_filename):
            return None
        self.stopped = self.stopped or threading.current_thread()
        if self.called or threading.current_thread() is not self.stopped:
            return None
        if event == ("call" if code.co_filename in ERRORS else "line") and self.begins():
            self.begins = lambda: True
            self.left -= 1
            if self.left < 0:
                self._call()
        return self._trace

    def _watches(self, name: str) -> bool:
        return name.startswith(PACKAGE) and name not in ENCODING

    def _call(self) -> None:
        self.called = True
        self._thread.start()
        self._thread.join(self.patience)

    def _run(self) -> None:
        try:
            self._ran.set_result(self.other())
        except BaseException as error:
            self._ran.set_exception(error)


class Inline(Turn):
    """`other` runs in the very thread that has come to the line, as a finalizer does."""

    def _watches(self, name: str) -> bool:
        return super()._watches(name) or name == threading.__file__

    def _call(self) -> None:
        self.called = True
        self._run()


def each_line(kind: type[Turn] = Turn) -> Iterator[Turn]:
    for number in range(MOST_LINES):
        turn = kind(number)
        yield turn
        if not turn.called:
            assert number > 1, "no line was seen"
            return
    raise AssertionError("the lines do not end")


@pytest.fixture
def silent(path: str) -> Iterator[FakeArbiter]:
    """One of ours, that does not greet."""
    arbiter = FakeArbiter(path, greets=False)
    yield arbiter
    arbiter.close()


@contextmanager
def beside(what: Callable[[], Any]) -> Iterator[Future[Any]]:
    """It runs in a thread of its own, beside the block."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(what)


def end_of(future: DirtyFuture) -> tuple[Any, ...]:
    """What `get` says: a result, or the error's name and whether the call may have run."""
    try:
        return ("result", future.get(10))
    except DirtyError as error:
        return (type(error).__name__, error.may_have_run)


def is_cancelled(end: tuple[Any, ...]) -> bool:
    return end[0] == "DirtyCancelledError"


# Futures, line by line.


def test_cancel_comes_with_the_answer(arbiter: FakeArbiter, client: DirtyClient) -> None:
    """It is True if and only if `get` says "cancelled", to everybody and always."""
    for turn in each_line():
        value = arbiter.ran("hold")
        future = client.submit(APP, "hold", value)
        arbiter.wait(lambda: arbiter.ran("hold") > value, "the call to run")  # noqa: B023

        def answer() -> tuple[Any, ...]:
            arbiter.release()
            return end_of(future)  # noqa: B023

        with turn.here(answer):
            cancelled = future.cancel()
        told = turn.join()
        assert told in (None, ("result", value), ("DirtyCancelledError", True))
        assert end_of(future) == (told or ("DirtyCancelledError", True))
        assert cancelled is is_cancelled(end_of(future))
        assert future.cancel() is False


def test_cancel_comes_with_the_sending(
    theirs: FakeArbiter, client: DirtyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While `cancel` runs, the call's own thread, which waited for room, gets it."""
    monkeypatch.setattr(stock, "MAX_OPEN", 1)
    assert client.execute(APP, "echo", "first") == "first"
    before = set(threading.enumerate())
    for turn in each_line():
        held = client.submit(APP, "hold", 0)
        theirs.wait(lambda: theirs.runs[-1].action == "hold", "the place to be taken")
        name = f"late-{turn.left}"
        future = client.submit(APP, "echo", name)

        def make_room() -> tuple[Any, ...]:
            theirs.release()
            held.get(10)  # noqa: B023
            poll(lambda: theirs.ran("echo", value=name), STUCK_SECONDS / 2)  # noqa: B023
            return end_of(future) if future.done() else ()  # noqa: B023

        with turn.here(make_room):
            cancelled = future.cancel()
        told, said = turn.join(), end_of(future)
        theirs.release()
        wait_for_threads(before)
        assert said == end_of(future) == (told or said)
        assert cancelled is is_cancelled(said)
        assert said[1] or not theirs.ran("echo", value=name)
        assert client.execute(APP, "echo", "next") == "next"


def test_cancel_comes_with_the_end_of_the_time(silent: FakeArbiter, client: DirtyClient) -> None:
    """Then a future has timed out for everybody, or is cancelled for everybody."""
    hasty = client.options(timeout=0.05)
    for turn in each_line():
        late = time.monotonic() + 0.05
        turn.begins = lambda: time.monotonic() > late  # noqa: B023
        future = hasty.submit(APP, "echo", "late")
        with turn.here(lambda: (future.cancel(), end_of(future))):  # noqa: B023
            said = end_of(future)
        assert turn.join() in (None, (is_cancelled(said), said))
        assert end_of(future) == said
        assert said in (("DirtyTimeoutError", False), ("DirtyCancelledError", False))
    assert not silent.runs


def test_a_future_is_cancelled_while_its_thread_works(theirs: FakeArbiter, client: DirtyClient) -> None:
    assert client.execute(APP, "echo", "first") == "first"
    for turn in each_line():
        came = theirs.ran("echo", value="late")
        future, told = submit_and_stop(client, turn, lambda future: (future.cancel(), end_of(future)))
        said = end_of(future)
        assert told in (None, (is_cancelled(said), said))
        assert said != ("DirtyCancelledError", False) or theirs.ran("echo", value="late") == came
        assert client.execute(APP, "echo", "next") == "next"


def test_a_future_is_cancelled_while_its_thread_finds_no_arbiter(path: str) -> None:
    before = set(threading.enumerate())
    for turn in each_line():
        theirs, client = FakeArbiter(path, stock=True), DirtyClient(path, timeout=20)
        assert client.execute(APP, "echo", "first") == "first"
        theirs.close()
        future, told = submit_and_stop(client, turn, lambda future: (future.cancel(), end_of(future)))
        said = end_of(future)
        assert said[1] is False
        assert told in (None, (is_cancelled(said), said))
        client.close()
        wait_for_threads(before)


def test_a_cancelled_future_whose_arbiter_is_replaced(path: str) -> None:
    """By one of the other kind: it does not run there."""
    before = set(threading.enumerate())
    for turn in each_line():
        theirs, client = FakeArbiter(path, stock=True), DirtyClient(path, timeout=20)
        assert client.execute(APP, "echo", "first") == "first"
        replaced: list[FakeArbiter] = []

        def replace(future: DirtyFuture) -> tuple[Any, ...]:
            future.cancel()
            said = end_of(future)
            theirs.close()  # noqa: B023
            replaced.append(FakeArbiter(path))  # noqa: B023
            for _ in range(2):  # the first finds out
                with suppress(DirtyConnectionError):
                    client.execute(APP, "echo", "another")  # noqa: B023
            return said

        turn.patience = 0.25
        future, told = submit_and_stop(client, turn, replace)
        for arbiter in replaced:
            assert client.execute(APP, "echo", "last") == "last"
            assert end_of(future) == told
            assert told[1] or not arbiter.ran("echo", value="late")
            arbiter.close()
        client.close()
        theirs.close()
        wait_for_threads(before)


def submit_and_stop(
    client: DirtyClient, turn: Turn, other: Callable[[DirtyFuture], Any]
) -> tuple[DirtyFuture, Any]:
    """A future whose own thread is stopped, and what the other says."""
    made: Future[DirtyFuture] = Future()
    with turn.in_the_next_thread(lambda: other(made.result(10))):
        made.set_result(client.submit(APP, "echo", "late"))
    assert turn.stopped is not None
    turn.stopped.join(10)
    return made.result(), turn.join()


def test_cancel_comes_with_the_loss_of_the_arbiter(theirs: FakeArbiter, client: DirtyClient) -> None:
    """The call's connection is closed all the same, and its thread ends."""
    before = set(threading.enumerate())
    for turn in each_line():
        assert client.execute(APP, "echo", "first") == "first"
        future = client.submit(APP, "hold", 1)
        theirs.wait(lambda: theirs.runs[-1].action == "hold", "the call to run")
        connection = theirs.runs[-1].connection
        with turn.here(lambda: hang_up_on(client)):
            assert future.cancel() is True
        turn.join()
        theirs.wait(lambda: connection in theirs.gone, "its connection to be closed", 8)  # noqa: B023
        assert end_of(future) == ("DirtyCancelledError", True)
    wait_for_threads(before)


# Streams, line by line.


def test_a_stream_that_waits_too_long_for_an_arbiter(path: str) -> None:
    """It says that it has not run only if that is certain, though the arbiter greets at that moment."""
    for turn in each_line():
        arbiter, client = FakeArbiter(path, greets=False), DirtyClient(path, timeout=20)
        late = time.monotonic() + 0.05
        turn.begins = lambda: time.monotonic() > late  # noqa: B023

        def greet() -> None:
            arbiter.greet()  # noqa: B023
            client.execute(APP, "echo", "behind it")  # noqa: B023

        stream = client.options(idle_timeout=0.05).stream(APP, "hold", 1)
        with turn.here(greet), pytest.raises(DirtyTimeoutError) as caught:
            next(stream)
        turn.join()
        arbiter.greet()
        assert client.execute(APP, "echo", "after") == "after"
        assert caught.value.may_have_run or not arbiter.ran("hold")
        client.close()
        arbiter.close()


@pytest.mark.parametrize("chunks", [0, 1])
def test_a_stream_is_closed_while_another_thread_waits(
    arbiter: FakeArbiter, client: DirtyClient, chunks: int
) -> None:
    """For its first chunk, or the next: the wait ends at once."""
    assert client.execute(APP, "echo", "first") == "first"
    for turn in each_line():
        stream = client.stream(APP, "first" if chunks else "hold", 0)
        assert [next(stream) for _ in range(chunks)] == [0] * chunks

        def read() -> list[Any]:
            with turn.here(stream.close):  # noqa: B023
                return list(stream)  # noqa: B023

        with beside(read) as reading:
            if not poll(lambda: turn.called, STUCK_SECONDS):  # noqa: B023
                stream.close()  # that line comes after the wait, if at all
            assert reading.result(8) == []
        turn.join()


def test_a_stream_is_dropped_anywhere(
    theirs: FakeArbiter, client: DirtyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector may run in the midst of what gives a place back, or takes one."""
    monkeypatch.setattr(stock, "MAX_OPEN", 2)
    assert client.execute(APP, "echo", "first") == "first"
    for turn in each_line(Inline):
        left = [client.stream(APP, "first", 0)]
        assert next(left[0]) == 0
        got = []

        def call() -> None:
            with turn.here(left.clear):  # noqa: B023
                got.append(client.execute(APP, "echo", 1))  # noqa: B023

        thread = threading.Thread(target=call, daemon=True)  # which may hang for ever
        thread.start()
        thread.join(5)
        assert got == [1]
        turn.join()
        left.clear()
    check_places(client, theirs, 2)


# Handles.


def test_a_handle_is_closed_at_the_first_use_of_another(path: str) -> None:
    """No connection is left that nobody closes."""
    arbiter = FakeArbiter(path)
    before = set(threading.enumerate())
    for turn in each_line():
        one, another = (DirtyClient(path, timeout=20) for _ in range(2))
        assert one.execute(APP, "echo", 1) == 1
        with turn.here(one.close):
            assert another.execute(APP, "echo", 2) == 2
        turn.join()
        one.close()
        another.close()
        wait_for_threads(before)
        arbiter.wait(lambda: not arbiter.left(), "the connections to be closed", 8)
    arbiter.close()


def test_a_handle_is_used_again_after_its_close(arbiter: FakeArbiter) -> None:
    """Then the close of another does not end its calls."""
    before = set(threading.enumerate())
    one, another = (DirtyClient(arbiter.path, timeout=20) for _ in range(2))
    assert one.execute(APP, "echo", 1) == another.execute(APP, "echo", 1) == 1
    one.close()
    with beside(lambda: one.execute(APP, "hold", 2)) as held:
        arbiter.wait(lambda: arbiter.ran("hold"), "the call to run")
        another.close()
        arbiter.release()
        assert held.result(10) == 2
    one.close()
    wait_for_threads(before)
    arbiter.wait(lambda: not arbiter.left(), "the connections to be closed", 8)
