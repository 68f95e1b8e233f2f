"""The client of asyncio where tasks and event loops race: an arbiter that waits for its test."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from support.calls import APP, LARGE, LONG, SOON
from support.fake_arbiter import FakeArbiter, no_descriptor_left

from gunicorn_dirty_gevent.client import DirtyClient
from gunicorn_dirty_gevent.core.mux import Call
from gunicorn_dirty_gevent.errors import DirtyConnectionError, DirtyTimeoutError


@asynccontextmanager
async def client_of(path: str, timeout: float = LONG) -> AsyncIterator[DirtyClient]:
    client = DirtyClient(path, timeout=timeout)
    try:
        yield client
    finally:
        await client.close_async()
        await asyncio.sleep(0)  # the transport's own turn to close


async def outcome(what: Awaitable[Any]) -> Any:
    """What it returns, or raises."""
    try:
        return await what
    except Exception as error:
        return error


async def turns(n: int = 20) -> None:
    """Let all tasks go as far as they can without news."""
    for _ in range(n):
        await asyncio.sleep(0)


async def until(arbiter: FakeArbiter, condition: Callable[[], Any], what: str) -> None:
    """The loop goes on meanwhile."""
    await asyncio.to_thread(arbiter.wait, condition, what)


async def ended(task: asyncio.Task[Any]) -> Any:
    """The outcome of a task that has no more to wait for."""
    await asyncio.wait((task,), timeout=SOON)
    assert task.done(), "it still waits"
    return task.result()


# Calls and streams that end while somebody waits for them.


@pytest.mark.parametrize("first", [True, False], ids=["before a chunk", "after a chunk"])
def test_a_stream_that_is_closed_beside_its_reader_ends_there(arbiter: FakeArbiter, first: bool) -> None:
    async def main() -> None:
        async with client_of(arbiter.path) as client:
            action = "hold" if first else "first"
            stream = client.stream_async(APP, action, "one")
            if not first:
                assert await stream.__anext__() == "one"
            reader = asyncio.create_task(outcome(stream.__anext__()))
            await until(arbiter, lambda: arbiter.ran(action), "the call")
            await stream.aclose()
            assert isinstance(await ended(reader), StopAsyncIteration)

    asyncio.run(main())


def test_close_ends_the_calls_that_wait_for_a_stock_arbiter(theirs: FakeArbiter) -> None:
    async def main() -> None:
        async with client_of(theirs.path) as client:
            assert await client.execute_async(APP, "echo", 1) == 1
            waiting = [
                *(client.execute_async(APP, "hold", number) for number in range(3)),
                client.stream_async(APP, "hold", 3).__anext__(),
            ]
            tasks = [asyncio.create_task(outcome(one)) for one in waiting]
            await until(theirs, lambda: theirs.ran("hold") == 4, "4 calls")
            await client.close_async()
            errors = [await ended(task) for task in tasks]
            assert [(type(e), e.may_have_run) for e in errors] == [(DirtyConnectionError, True)] * 4
            await until(theirs, lambda: not theirs.open, "the connections to be closed")

    asyncio.run(main())


def test_close_amid_a_request_does_not_say_of_a_call_that_runs_that_it_has_not(ours: FakeArbiter) -> None:
    async def main() -> None:
        async with client_of(ours.path) as client:
            assert await client.execute_async(APP, "echo", 1) == 1
            ours.read(False)
            call = asyncio.create_task(outcome(client.execute_async(APP, "save", LARGE)))
            await turns()  # as much is written as the socket takes
            await client.close_async()
            ours.read(True)
            error = await ended(call)
            # Here the rest would be written.
            await until(ours, lambda: not ours.open, "the connection to be closed")
            assert isinstance(error, DirtyConnectionError)
            assert error.may_have_run or not ours.ran("save")

    asyncio.run(main())


def test_calls_cancelled_before_their_first_step_are_not_kept(theirs: FakeArbiter) -> None:
    async def main() -> None:
        async with client_of(theirs.path) as client:
            assert await client.execute_async(APP, "echo", 1) == 1
            before = calls()
            for _ in range(50):
                with pytest.raises(DirtyTimeoutError):
                    await client.options(timeout=1e-9).execute_async(APP, "echo", 2)
            await turns()
            assert calls() == before
            assert await client.execute_async(APP, "echo", 3) == 3

    asyncio.run(main())


def calls() -> int:
    gc.collect()
    return sum(isinstance(thing, Call) for thing in gc.get_objects())


# Connecting.


def test_a_backlog_that_is_full_for_a_while(tmp_path: Path) -> None:
    async def main() -> None:
        async with client_of(arbiter.path) as client:
            call = asyncio.create_task(outcome(client.execute_async(APP, "echo", 1)))
            await turns()  # it has been turned away
            arbiter.accept()
            assert await ended(call) == 1

    with (
        closing(FakeArbiter(str(tmp_path / "arbiter"), accepts=False, backlog=0)) as arbiter,
        socket.socket(socket.AF_UNIX) as other,
    ):
        other.connect(arbiter.path)  # and now it is full
        asyncio.run(main())
        assert arbiter.ran("echo") == 1


def test_an_arbiter_that_dies_when_it_has_accepted(tmp_path: Path) -> None:
    path = str(tmp_path / "arbiter")

    async def main() -> FakeArbiter:
        async with client_of(path) as client:
            call = asyncio.create_task(outcome(client.execute_async(APP, "echo", 1)))
            for _ in range(20):  # in the very turn in which it connects
                with suppress(BlockingIOError):
                    first.accept()[0].close()
                    break
                await asyncio.sleep(0)
            else:
                pytest.fail("it has not connected")
            os.unlink(path)
            arbiter = FakeArbiter(path)  # the next one
            with closing(arbiter):
                assert await ended(call) == 1
            return arbiter

    with socket.socket(socket.AF_UNIX) as first:
        first.setblocking(False)
        first.bind(path)
        first.listen()
        assert asyncio.run(main()).ran("echo") == 1


def test_without_descriptors_only_the_calls_of_that_time_fail(ours: FakeArbiter) -> None:
    async def main() -> None:
        async with client_of(ours.path, timeout=3) as client:
            with no_descriptor_left():
                error = await outcome(client.execute_async(APP, "echo", 1))
            assert isinstance(error, DirtyConnectionError) and error.may_have_run is False
            for number in (2, 3):
                assert await outcome(client.execute_async(APP, "echo", number)) == number
            assert [run.args for run in ours.runs] == [[2], [3]]

    asyncio.run(main())


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_who_cancels_all_tasks_while_one_connects_can_still_call(ours: FakeArbiter, turn: int) -> None:
    async def main() -> None:
        ours.greets = False
        async with client_of(ours.path, timeout=5) as client:
            call = asyncio.create_task(client.execute_async(APP, "echo", 1))
            await turns(turn)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.wait((call,), timeout=SOON)
            assert call.cancelled()
            ours.greet()
            for number in (2, 3):
                assert await outcome(client.execute_async(APP, "echo", number)) == number

    asyncio.run(main())


def test_a_call_whose_task_another_cancels_ends(theirs: FakeArbiter) -> None:
    """The task that carries a stock arbiter's call is none of the caller's."""

    async def main() -> None:
        async with client_of(theirs.path) as client:
            assert await client.execute_async(APP, "echo", 1) == 1
            call = asyncio.create_task(outcome(client.execute_async(APP, "hold", 2)))
            await until(theirs, lambda: theirs.ran("hold"), "the call")
            for task in asyncio.all_tasks() - {asyncio.current_task(), call}:
                task.cancel()
            error = await ended(call)
            assert isinstance(error, DirtyConnectionError) and error.may_have_run is True

    asyncio.run(main())


# Event loops that come and go, as asgiref's `async_to_sync` makes them.


class MetLoop(asyncio.SelectorEventLoop):
    """One that two threads find closed at the same time, if they can."""

    meeting: threading.Barrier | None = None

    def is_closed(self) -> bool:
        closed = super().is_closed()
        meeting = self.meeting
        if meeting is not None:
            with suppress(threading.BrokenBarrierError):
                meeting.wait(1)
            self.meeting = None
        return closed


def test_two_threads_let_go_of_a_closed_loops_connection(ours: FakeArbiter) -> None:
    async def call(number: int) -> Any:
        async with client_of(ours.path) as client:
            return await outcome(client.execute_async(APP, "echo", number))

    left = MetLoop()
    client = DirtyClient(ours.path, timeout=LONG)
    assert left.run_until_complete(client.execute_async(APP, "echo", 0)) == 0
    left.close()  # and not the connection
    left.meeting = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda number: asyncio.run(call(number)), (1, 2))) == [1, 2]
    ours.wait(lambda: not ours.open, "the connections to be closed")


def test_loops_of_many_threads_come_and_go(ours: FakeArbiter) -> None:
    client = DirtyClient(ours.path, timeout=LONG)

    async def call(number: int) -> Any:
        return await outcome(client.execute_async(APP, "echo", number))

    def come_and_go(first: int) -> list[Any]:
        return [asyncio.run(call(number)) for number in range(first, first + 20)]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(come_and_go, range(0, 160, 20)))
    finally:
        sys.setswitchinterval(before)
    assert answers == [list(range(first, first + 20)) for first in range(0, 160, 20)]

    async def last() -> None:
        async with client_of(ours.path) as client:
            assert await client.execute_async(APP, "echo", 160) == 160

    asyncio.run(last())
    ours.wait(lambda: not ours.open, "the connections to be closed")
