"""The client without gevent: native threads and asyncio, in this process and in HTTP workers."""

from __future__ import annotations

import asyncio
import gc
import math
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from support.gunicorn import Gunicorn, app_with
from support.waiting import wait_until

from gunicorn_dirty_gevent.client import DirtyClient, channels
from gunicorn_dirty_gevent.client.stock_loop import wait_for_news
from gunicorn_dirty_gevent.core.mux import Call, nobody
from gunicorn_dirty_gevent.errors import (
    DirtyAppError,
    DirtyCancelledError,
    DirtyConnectionError,
    DirtyTimeoutError,
)

APP = "tasks:App"

TASKS = """
import os
import time
from gunicorn.dirty import DirtyApp


class App(DirtyApp):
    def double(self, number):
        return number * 2

    def nap(self, value, seconds):
        time.sleep(seconds)
        return value

    def wrong(self):
        raise KeyError("no such thing")

    def hold(self, name):
        # Until the test makes the file.
        print(f"holding {name}", flush=True)
        try:
            while not os.path.exists(f"release-{name}"):
                time.sleep(0.005)
            return name
        finally:
            print(f"left {name}", flush=True)

    def count(self, start, n, pause=0.0):
        for number in range(start, start + n):
            time.sleep(pause)
            yield number

    def endless(self, name):
        try:
            number = 0
            while True:
                yield number
                number += 1
        finally:
            print(f"closed {name}", flush=True)
"""

SETTINGS = {"dirty_workers": 1, "dirty_threads": 220, "dirty_timeout": 30, "dirty_apps": [APP]}

VIEWS = """
import os
import threading
from gunicorn.dirty import get_dirty_client

@route("/double")
def double(environ, query):
    return {"result": get_dirty_client().execute("tasks:App", "double", int(query["n"])), "pid": os.getpid()}

@route("/nap")
def nap(environ, query):
    return {"result": get_dirty_client().execute("tasks:App", "nap", query["value"], float(query["seconds"]))}

@route("/count")
def count(environ, query):
    for number in get_dirty_client().stream("tasks:App", "count", int(query["start"]), 50, 0.002):
        yield f"{number}\\n"

@route("/endless")
def endless(environ, query):
    for number in get_dirty_client().stream("tasks:App", "endless", "browser"):
        yield f"{number}\\n"

@route("/hold")
def hold(environ, query):
    return {"result": get_dirty_client().execute("tasks:App", "hold", query["name"])}

@route("/patched")
def patched(environ, query):
    import sys
    return {"gevent": "gevent" in sys.modules, "lock": type(threading.Lock()).__module__}
"""


@pytest.fixture(scope="module")
def served() -> Iterator[Gunicorn]:
    with Gunicorn(
        app_with(VIEWS), TASKS, SETTINGS, worker_class="sync", ready_log="Dirty worker ready"
    ) as gunicorn:
        yield gunicorn


def socket_path(gunicorn: Gunicorn) -> str:
    return gunicorn.wait_log(r"Dirty arbiter listening on (\S+)").group(1)


@pytest.fixture
def client(served: Gunicorn) -> Iterator[DirtyClient]:
    """A client of this process, whose connection (and its thread) is gone afterwards."""
    assert channels._cooperative_hub() is None
    client = DirtyClient(socket_path(served), timeout=20)
    yield client
    client.close()


@contextmanager
def in_threads(n: int, what: Callable[[int], Any]) -> Iterator[list[Future[Any]]]:
    """`what(0)` ... `what(n - 1)`, started at once beside the block."""
    start = threading.Barrier(n)

    def run(number: int) -> Any:
        start.wait(10)
        return what(number)

    with ThreadPoolExecutor(n) as pool:
        yield [pool.submit(run, number) for number in range(n)]


def results(futures: list[Future[Any]], timeout: float = 20) -> list[Any]:
    return [future.result(timeout) for future in futures]


def kill_arbiter(gunicorn: Gunicorn) -> None:
    arbiter = gunicorn.dirty_arbiter_pid()
    gunicorn.kill(arbiter, signal.SIGKILL)
    gunicorn.wait_gone(arbiter)


def reader_threads() -> int:
    return sum(thread.name == "dirty-client" for thread in threading.enumerate())


# Threads.


def test_50_threads_share_a_connection(client: DirtyClient) -> None:
    started = time.monotonic()
    with in_threads(50, lambda n: client.execute(APP, "nap", n, 0.3)) as calls:
        assert results(calls) == list(range(50))
    assert time.monotonic() - started < 3  # 15 s one after the other
    with in_threads(50, lambda n: [client.execute(APP, "double", n * 100 + k) for k in range(20)]) as calls:
        assert results(calls) == [[(n * 100 + k) * 2 for k in range(20)] for n in range(50)]
    assert reader_threads() == 1


def test_streams_of_threads_keep_apart(client: DirtyClient) -> None:
    with in_threads(12, lambda n: list(client.stream(APP, "count", n * 1000, 200))) as streams:
        assert results(streams) == [list(range(n * 1000, n * 1000 + 200)) for n in range(12)]


def test_errors_and_timeouts_end_their_call_only(served: Gunicorn, client: DirtyClient) -> None:
    short = client.options(timeout=0.3)

    def call(n: int) -> Any:
        try:
            if n % 3 == 0:
                return short.execute(APP, "hold", f"late-{n}")
            return client.execute(APP, "wrong") if n % 3 == 1 else client.execute(APP, "nap", n, 0.5)
        except (DirtyTimeoutError, DirtyAppError) as error:
            return type(error)

    started = time.monotonic()
    with in_threads(12, call) as calls:
        expected = [[DirtyTimeoutError, DirtyAppError, n][n % 3] for n in range(12)]
        assert results(calls) == expected
    assert time.monotonic() - started < 3
    for n in (0, 3, 6, 9):
        served.wait_log(f"left late-{n}")  # the action was stopped, not left to run
    with pytest.raises(DirtyTimeoutError, match="idle_timeout"):
        list(client.options(idle_timeout=0.2).stream(APP, "count", 0, 3, 5.0))
    assert client.execute(APP, "double", 4) == 8


def test_cancelling(served: Gunicorn, client: DirtyClient) -> None:
    stream = client.stream(APP, "endless", "closing")
    assert [next(stream) for _ in range(100)] == list(range(100))
    stream.close()
    served.wait_log("closed closing")
    assert list(stream) == []
    dropped = client.stream(APP, "endless", "dropping")
    assert next(dropped) == 0
    del dropped
    gc.collect()
    served.wait_log("closed dropping")
    with client.stream(APP, "endless", "block") as block:
        assert next(block) == 0
    served.wait_log("closed block")
    future = client.submit(APP, "hold", "future")
    served.wait_log("holding future")
    with pytest.raises(DirtyTimeoutError):
        future.get(timeout=0.05)
    assert future.cancel()
    served.wait_log("left future")
    with pytest.raises(DirtyCancelledError):
        future.get()
    assert client.submit(APP, "double", 21).get(timeout=10) == 42


def test_a_future_is_waited_for_by_several_threads(served: Gunicorn, client: DirtyClient) -> None:
    future = client.submit(APP, "hold", "shared")
    served.wait_log("holding shared")
    assert not future.done()
    with in_threads(5, lambda n: future.get(timeout=15)) as waiting:
        served.write("release-shared", "")
        assert results(waiting) == ["shared"] * 5
    assert future.done()


def test_threads_live_through_the_death_of_the_arbiter(served: Gunicorn, client: DirtyClient) -> None:
    count = 12

    def call(n: int) -> Any:
        try:
            return client.execute(APP, "hold", "crash")
        except DirtyConnectionError as error:
            # At once from the same thread: it waits for the next arbiter.
            return error.may_have_run, client.execute(APP, "double", n)

    with in_threads(count, call) as calls:
        held = lambda: served.log_text().count("holding crash") == count  # noqa: E731
        wait_until(held, 10, "the calls to run", served.evidence)
        kill_arbiter(served)
        assert results(calls) == [(True, n * 2) for n in range(count)]
    assert list(client.stream(APP, "count", 5, 3)) == [5, 6, 7]
    assert reader_threads() == 1


def test_a_broken_stream_says_so(served: Gunicorn, client: DirtyClient) -> None:
    stream = client.stream(APP, "endless", "broken")
    assert [next(stream) for _ in range(10)] == list(range(10))
    kill_arbiter(served)
    with pytest.raises(DirtyConnectionError):
        for _ in stream:
            pass
    assert client.execute(APP, "double", 1) == 2


def test_close_does_not_wait_for_clients_that_options_made(client: DirtyClient) -> None:
    kept = client.options(timeout=5)  # as an error's traceback would keep it
    assert kept.execute(APP, "double", 4) == client.execute(APP, "double", 4) == 8
    client.close()
    wait_until(lambda: reader_threads() == 0, 10, "the connection to be closed")
    assert kept.execute(APP, "double", 4) == 8


def test_close_ends_calls_and_the_next_makes_a_connection(served: Gunicorn, client: DirtyClient) -> None:
    with in_threads(1, lambda n: client.execute(APP, "hold", "closed")) as calls:
        served.wait_log("holding closed")
        client.close()
        with pytest.raises(DirtyConnectionError, match="closed the connection"):
            results(calls)
    served.wait_log("left closed")
    wait_until(lambda: reader_threads() == 0, 5, "the reader to end")
    assert client.execute(APP, "double", 3) == 6


def test_no_arbiter_is_an_error_at_once(tmp_path: Any) -> None:
    client = DirtyClient(str(tmp_path / "nobody.sock"))
    started = time.monotonic()
    with pytest.raises(DirtyConnectionError, match="cannot connect") as caught:
        client.execute(APP, "double", 1)
    assert not caught.value.may_have_run
    assert time.monotonic() - started < 2
    client.close()


FORK = """
import os, sys, threading
from gunicorn_dirty_gevent.client import DirtyClient

client = DirtyClient(sys.argv[1], timeout=15)
stop, wrong, done = threading.Event(), [], [0] * 10

def work(me):
    while not stop.is_set():
        number = me * 1_000_000 + done[me]
        if client.execute("tasks:App", "double", number) != number * 2:
            wrong.append(number)
        done[me] += 1

threads = [threading.Thread(target=work, args=(me,)) for me in range(10)]
for thread in threads:
    thread.start()

children = []
for turn in range(8):
    reached = [n + 3 for n in done]
    while any(n < want for n, want in zip(done, reached)):
        stop.wait(0.001)
    child = os.fork()
    if child == 0:
        try:
            answers = [client.execute("tasks:App", "double", n) for n in range(20)]
            chunks = list(client.stream("tasks:App", "count", 7, 5))
            os._exit(0 if answers == [n * 2 for n in range(20)] and chunks == list(range(7, 12)) else 1)
        except BaseException as error:
            os.write(2, repr(error).encode())
        os._exit(2)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
stop.set()
for thread in threads:
    thread.join(10)
print(codes, wrong, min(done) > 0, sum(t.is_alive() for t in threads))
"""


def test_fork_in_a_process_of_threads(served: Gunicorn) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, socket_path(served)],
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert (done.stdout, done.stderr) == (f"{[0] * 8} [] True 0\n", "")


# asyncio.


@asynccontextmanager
async def async_client(gunicorn: Gunicorn) -> AsyncIterator[DirtyClient]:
    client = DirtyClient(socket_path(gunicorn), timeout=20)
    try:
        yield client
    finally:
        await client.close_async()
        await asyncio.sleep(0)  # the transport's own turn to close


async def until_logged(gunicorn: Gunicorn, regex: str, times: int = 1) -> None:
    """`wait_log` beside a running loop."""
    there = lambda: len(re.findall(regex, gunicorn.log_text())) >= times  # noqa: E731
    await asyncio.to_thread(wait_until, there, 10, f"log to match {regex}", gunicorn.evidence)


def test_200_calls_at_once_on_one_loop(served: Gunicorn) -> None:
    async def main() -> list[Any]:
        async with async_client(served) as client:
            return await asyncio.gather(*(client.execute_async(APP, "nap", n, 0.3) for n in range(200)))

    started = time.monotonic()
    assert asyncio.run(main()) == list(range(200))
    assert time.monotonic() - started < 6  # 60 s one after the other


def test_streams_on_one_loop_keep_apart(served: Gunicorn) -> None:
    async def read(client: DirtyClient, n: int) -> list[int]:
        return [chunk async for chunk in client.stream_async(APP, "count", n * 1000, 200)]

    async def main() -> list[list[int]]:
        async with async_client(served) as client:
            return await asyncio.gather(*(read(client, n) for n in range(12)))

    assert asyncio.run(main()) == [list(range(n * 1000, n * 1000 + 200)) for n in range(12)]


def test_asyncio_cancels_and_times_out(served: Gunicorn) -> None:
    async def main() -> None:
        async with async_client(served) as client:
            task = asyncio.create_task(client.execute_async(APP, "hold", "task"))
            await until_logged(served, "holding task")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until_logged(served, "left task")
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.execute_async(APP, "hold", "wait-for"), 0.2)
            await until_logged(served, "left wait-for")
            with pytest.raises(DirtyTimeoutError):
                await client.options(timeout=0.2).execute_async(APP, "hold", "own-time")
            await until_logged(served, "left own-time")
            with pytest.raises(DirtyAppError, match="no such thing"):
                await client.execute_async(APP, "wrong")
            assert await client.execute_async(APP, "double", 4) == 8

    asyncio.run(main())


def test_asyncio_is_cancelled_though_news_has_come() -> None:
    # Before Python 3.12 `asyncio.wait_for` would swallow it.
    async def cancelled() -> bool:
        call = Call("tasks:App", "go", b"", math.inf, True)
        waiting = asyncio.ensure_future(wait_for_news(call, 40.0))
        while call.notify is nobody:
            await asyncio.sleep(0)
        call.notify()
        waiting.cancel()
        await asyncio.wait((waiting,))
        return waiting.cancelled() and call.notify is nobody

    assert asyncio.run(cancelled())


def test_asyncio_streams_end_when_they_are_left(served: Gunicorn) -> None:
    async def main() -> None:
        async with async_client(served) as client:
            async with client.stream_async(APP, "endless", "async-block") as stream:
                assert await stream.__anext__() == 0
            await until_logged(served, "closed async-block")
            stream = client.stream_async(APP, "endless", "async-close")
            assert [await stream.__anext__() for _ in range(100)] == list(range(100))
            await stream.aclose()
            await until_logged(served, "closed async-close")
            dropped = client.stream_async(APP, "endless", "async-drop")
            assert await dropped.__anext__() == 0
            del dropped
            gc.collect()
            await until_logged(served, "closed async-drop")

    asyncio.run(main())


def test_asyncio_lives_through_the_death_of_the_arbiter(served: Gunicorn) -> None:
    async def call(client: DirtyClient, n: int) -> Any:
        try:
            return await client.execute_async(APP, "hold", "async-crash")
        except DirtyConnectionError as error:
            return error.may_have_run, await client.execute_async(APP, "double", n)

    async def main() -> list[Any]:
        async with async_client(served) as client:
            calls = [asyncio.create_task(call(client, n)) for n in range(20)]
            await until_logged(served, "holding async-crash", 20)
            await asyncio.to_thread(kill_arbiter, served)
            answers = await asyncio.gather(*calls)
            assert [c async for c in client.stream_async(APP, "count", 5, 3)] == [5, 6, 7]
            return answers

    assert asyncio.run(main()) == [(True, n * 2) for n in range(20)]


def test_loops_of_several_threads(served: Gunicorn) -> None:
    async def main(n: int) -> list[Any]:
        async with async_client(served) as client:
            return await asyncio.gather(
                *(client.execute_async(APP, "double", n * 100 + k) for k in range(20))
            )

    with in_threads(5, lambda n: asyncio.run(main(n))) as loops:
        assert results(loops) == [[(n * 100 + k) * 2 for k in range(20)] for n in range(5)]


# gunicorn's other worker classes.


@pytest.mark.parametrize("kind", ["gthread", "sync"])
def test_http_workers_of_other_classes(kind: str) -> None:
    threads = 8 if kind == "gthread" else 1
    changed = SETTINGS | {"workers": 1 if kind == "gthread" else 2, "threads": threads}
    with Gunicorn(
        app_with(VIEWS), TASKS, changed, worker_class=kind, ready_log="Dirty worker ready"
    ) as gunicorn:
        assert gunicorn.get("/patched").json()["lock"] == "_thread"
        many = gunicorn.get_many([f"/double?n={n}" for n in range(40)], concurrency=8)
        assert [response.json()["result"] for response in many] == [n * 2 for n in range(40)]
        if kind == "gthread":
            started = time.monotonic()
            naps = gunicorn.get_many([f"/nap?value={n}&seconds=0.4" for n in range(8)])
            assert [response.json()["result"] for response in naps] == [str(n) for n in range(8)]
            assert time.monotonic() - started < 2
        with ThreadPoolExecutor(4) as pool:
            streams = list(pool.map(lambda n: read_count(gunicorn, n * 1000), range(4)))
        assert streams == [[str(n * 1000 + k) for k in range(50)] for n in range(4)]
        with gunicorn.open("/endless") as stream:
            lines = iter(stream)
            assert [next(lines) for _ in range(5)] == ["0", "1", "2", "3", "4"]
        gunicorn.wait_log("closed browser")  # the browser hung up
        check_arbiter_and_stop(gunicorn)


def read_count(gunicorn: Gunicorn, start: int) -> list[str]:
    with gunicorn.open(f"/count?start={start}") as stream:
        return list(stream)


def check_arbiter_and_stop(gunicorn: Gunicorn) -> None:
    workers = gunicorn.http_worker_pids()
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(gunicorn.get, "/hold?name=it", 20)
        gunicorn.wait_log("holding it")
        kill_arbiter(gunicorn)
        assert held.result(10).json()["error"] == "DirtyConnectionError"
        assert gunicorn.get("/double?n=4").json()["result"] == 8
        assert gunicorn.http_worker_pids() == workers
        last = pool.submit(gunicorn.get, "/hold?name=last", 20)
        gunicorn.wait_log("holding last")
        gunicorn.kill(gunicorn.master_pid, signal.SIGTERM)
        gunicorn.wait_log("Handling signal: term")
        gunicorn.write("release-last", "")
        assert last.result(10).json()["result"] == "last"
    report = gunicorn.stop()
    assert (report.exit_code, report.left) == (0, [])
    gunicorn.assert_clean()


ASGI = """
import asyncio
import json
from urllib.parse import parse_qsl

from gunicorn.dirty import get_dirty_client_async
from gunicorn_dirty_gevent import DirtyClient

APP = "tasks:App"


async def double(client, query):
    result = await client.execute_async(APP, "double", int(query["n"]))
    return {"result": result, "ours": isinstance(client, DirtyClient)}


async def gather(client, query):
    calls = [client.execute_async(APP, "nap", n, 0.2) for n in range(int(query["n"]))]
    return {"result": await asyncio.gather(*calls)}


async def hold(client, query):
    return {"result": await client.execute_async(APP, "hold", query["name"])}


async def ready(client, query):
    return {"result": "ready"}

VIEWS = {"/ready": ready, "/double": double, "/gather": gather, "/hold": hold}


async def lifespan(receive, send):
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    query = dict(parse_qsl(scope["query_string"].decode()))
    client = await get_dirty_client_async()
    if scope["path"] == "/count":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async for number in client.stream_async(APP, "count", int(query["start"]), 50, 0.002):
            await send({"type": "http.response.body", "body": b"%d\\n" % number, "more_body": True})
        return await send({"type": "http.response.body", "body": b""})
    try:
        said = await VIEWS[scope["path"]](client, query)
    except Exception as error:
        said = {"error": type(error).__name__, "message": str(error)}
    body = json.dumps(said).encode()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
"""


def test_asgi_http_workers() -> None:
    pytest.importorskip("gunicorn.workers.gasgi")
    # gunicorn 25's asgi worker waits for connections that its clients have left, as long as this.
    settings = {**SETTINGS, "graceful_timeout": 5}
    with Gunicorn(ASGI, TASKS, settings, worker_class="asgi", ready_log="Dirty worker ready") as gunicorn:
        assert gunicorn.get("/double?n=21").json() == {"result": 42, "ours": True}
        many = gunicorn.get_many([f"/double?n={n}" for n in range(40)], concurrency=10)
        assert [response.json()["result"] for response in many] == [n * 2 for n in range(40)]
        started = time.monotonic()
        assert gunicorn.get("/gather?n=200").json() == {"result": list(range(200))}
        assert time.monotonic() - started < 5
        with ThreadPoolExecutor(4) as pool:
            streams = list(pool.map(lambda n: read_count(gunicorn, n * 1000), range(4)))
        assert streams == [[str(n * 1000 + k) for k in range(50)] for n in range(4)]
        check_arbiter_and_stop(gunicorn)
