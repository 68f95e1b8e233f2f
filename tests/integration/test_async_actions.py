"""``async def`` actions, async generators and their like, in dirty workers of a real gunicorn."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode

import pytest
from support.gunicorn import Gunicorn, app_with
from support.waiting import wait_until

TASKS = """
import asyncio, contextvars, os, socket, sys, threading, time
from gunicorn.dirty import DirtyApp, get_dirty_client_async
from gunicorn_dirty_gevent import action

seen = []

class Numbers:
    '''An async iterator that is no generator.'''
    def __init__(self, n):
        self.left = n
    def __aiter__(self):
        return self
    async def __anext__(self):
        if not self.left:
            raise StopAsyncIteration
        self.left -= 1
        return self.left

class Later:
    def __await__(self):
        return (yield from asyncio.sleep(0.01, "later").__await__())

class Async(DirtyApp):
    async def init(self):
        await asyncio.sleep(0.05)
        self.lock = asyncio.Lock()
        self.inside = 0

    async def close(self):
        await asyncio.sleep(0.01)
        print("closed in", os.getpid(), flush=True)

    async def nap(self, seconds):
        await asyncio.sleep(seconds)
        return {"slept": seconds}

    async def locked(self):
        async with self.lock:
            self.inside += 1
            most = self.inside
            await asyncio.sleep(0.005)
            self.inside -= 1
            return most

    async def gather(self, n):
        async def one(i):
            await asyncio.sleep(0.05)
            return i * i
        return await asyncio.gather(*(one(i) for i in range(n)))

    async def network(self):
        async def serve(reader, writer):
            writer.write((await reader.readline()).upper())
            await writer.drain()
            writer.close()
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("localhost", port, family=socket.AF_INET)
        writer.write(b"over tcp\\n")
        answer = await reader.readline()
        writer.close()
        server.close()
        return answer

    async def threads(self, n):
        here = []
        def work(i):
            # Until all are here. (No threading.Barrier: its locks are gevent's, whose way from one native
            # thread to another is not what is tested.)
            here.append(i)
            end = time.monotonic() + 15
            while len(here) < n and time.monotonic() < end:
                time.sleep(0.01)
            return i if len(here) == n else "alone"
        return await asyncio.gather(*(asyncio.to_thread(work, i) for i in range(n)))

    async def thread_error(self):
        def fail():
            raise ValueError("in a thread")
        await asyncio.to_thread(fail)

    async def subprocess(self):
        await asyncio.create_subprocess_exec("true")

    async def calls_others(self):
        client = await get_dirty_client_async()
        return await client.execute_async("tasks:Async", "nap", 0.01)

    async def boom(self):
        await asyncio.sleep(0)
        raise ValueError("boo from a coroutine")

    async def leave(self):
        sys.exit(3)

    def later(self):
        return Later()

    async def hold(self, name):
        try:
            await asyncio.sleep(60)
        finally:
            seen.append("end of " + name)

    async def stubborn(self):
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass

    async def block(self, name):
        while not os.path.exists(f"release-{name}"):
            pass
        return "blocked"

    def seen(self):
        return list(seen)

    def pid(self):
        return os.getpid()

    async def tokens(self, user, n, pause=0.0):
        try:
            for number in range(n):
                await asyncio.sleep(pause)
                yield f"{user}-{number}"
        finally:
            await asyncio.sleep(0)
            seen.append(f"end of {user}")

    async def endless(self, name):
        number = 0
        try:
            while True:
                number += 1
                yield "x" * 10000
        finally:
            seen.append(f"{name} made {number}")

    async def half(self):
        yield 1
        yield 2
        raise ValueError("boo in mid-stream")

    @action(timeout=0.5)
    async def pausing(self):
        yield "first"
        await asyncio.sleep(60)

    def numbers(self, n):
        return Numbers(n)

    async def returns_stream(self, n):
        await asyncio.sleep(0)
        return Numbers(n)

    def plain(self, n):
        return iter(range(n))

    def mapped(self, n):
        return map(str, range(n))


class Spinner(DirtyApp):
    dirty_timeout = 1

    async def spin(self):
        while True:
            pass

    async def stubborn(self):
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass

    def pid(self):
        return os.getpid()
"""

VIEWS = """
    import gevent
    from gunicorn.dirty import get_dirty_client
    from gunicorn_dirty_gevent import DirtyClient

    def client(query):
        options = {k: float(query[k]) for k in ("timeout", "idle_timeout") if k in query}
        return get_dirty_client().options(**options)

    @route("/call")
    def call(environ, query):
        args = json.loads(query.get("args", "[]"))
        return client(query).execute(query.get("app", "tasks:Async"), query["action"], *args)

    @route("/stream")
    def stream(environ, query):
        args = json.loads(query.get("args", "[]"))
        chunks = client(query).stream(query.get("app", "tasks:Async"), query["action"], *args)
        def lines():
            with chunks:
                for chunk in chunks:
                    yield json.dumps(chunk) + "\\n"
                    gevent.sleep(0)
        return lines()

    @route("/one")
    def one(environ, query):
        chunks = client(query).stream("tasks:Async", query["action"], *json.loads(query["args"]))
        first = next(chunks)
        chunks.close()
        return first

    @route("/given-up")
    def given_up(environ, query):
        with gevent.Timeout(0.3, False):
            return client(query).execute("tasks:Async", query["action"], *json.loads(query["args"]))
        return "given up"
"""

SETTINGS = {
    "dirty_apps": ["tasks:Async", "tasks:Spinner"],
    "dirty_workers": 1,
    "dirty_threads": 100,
    "dirty_timeout": 20,
    "dirty_graceful_timeout": 10,
}


def gunicorn() -> Gunicorn:
    return Gunicorn(app_with(VIEWS), TASKS, SETTINGS, ready_log=r"Dirty worker ready")


@pytest.fixture(scope="module")
def server() -> Iterator[Gunicorn]:
    with gunicorn() as running:
        yield running


def url(path: str, action: str, *args: Any, **query: Any) -> str:
    return f"{path}?{urlencode({'action': action, 'args': json.dumps(args), **query})}"


def ask(server: Gunicorn, action: str, *args: Any, **query: Any) -> Any:
    response = server.get(url("/call", action, *args, **query), timeout=30)
    assert response.status == 200, response.text
    return response.json() if response.headers["content-type"] == "application/json" else response.text


def failure(server: Gunicorn, path: str, action: str, *args: Any, **query: Any) -> dict[str, Any]:
    response = server.get(url(path, action, *args, **query), timeout=30)
    assert response.status == 500, response.text
    told: dict[str, Any] = json.loads(response.text)
    return told


def chunks(server: Gunicorn, action: str, *args: Any, **query: Any) -> list[Any]:
    response = server.get(url("/stream", action, *args, **query), timeout=30)
    assert response.status == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def wait_seen(server: Gunicorn, what: str) -> None:
    wait_until(lambda: what in json.dumps(ask(server, "seen")), 10, f"{what!r} to be seen")


def test_fifty_coroutines_wait_at_once(server: Gunicorn) -> None:
    started = time.monotonic()
    answers = server.get_many([url("/call", "nap", 0.5)] * 50)
    assert [json.loads(answer.text) for answer in answers] == [{"slept": 0.5}] * 50
    assert time.monotonic() - started < 5  # 25 s one by one


@pytest.mark.parametrize(
    ("action", "args", "answer"),
    [
        ("gather", [4], [0, 1, 4, 9]),
        ("network", [], "OVER TCP\n"),
        ("threads", [8], [0, 1, 2, 3, 4, 5, 6, 7]),
        ("calls_others", [], {"slept": 0.01}),
        ("later", [], "later"),
    ],
)
def test_what_asyncio_offers_works(server: Gunicorn, action: str, args: list[Any], answer: Any) -> None:
    assert ask(server, action, *args) == answer


def test_threads_of_a_coroutine_run_at_once(server: Gunicorn) -> None:
    assert ask(server, "threads", 20) == list(range(20))


def test_calls_share_the_loop_and_its_locks(server: Gunicorn) -> None:
    answers = server.get_many([url("/call", "locked")] * 20)
    assert [answer.text for answer in answers] == ["1"] * 20


def test_what_cannot_work_says_so(server: Gunicorn) -> None:
    assert "cannot start subprocesses" in failure(server, "/call", "subprocess")["message"]


@pytest.mark.parametrize(
    ("action", "message"),
    [("boom", "boo from a coroutine"), ("thread_error", "in a thread"), ("leave", "SystemExit: 3")],
)
def test_an_error_is_the_callers(server: Gunicorn, action: str, message: str) -> None:
    told = failure(server, "/call", action)
    assert told["error"] == "DirtyAppError"
    assert told["message"].startswith(f"{message}: ")
    assert f"in {action}" in told["attrs"]["traceback"]
    assert "coroutines.py" not in told["attrs"]["traceback"].split("tasks.py")[0]
    assert ask(server, "nap", 0) == {"slept": 0}


def test_a_coroutine_is_ended_at_its_callers_time(server: Gunicorn) -> None:
    told = failure(server, "/call", "hold", "late", timeout=0.3)
    assert told["error"] == "DirtyTimeoutError"
    wait_seen(server, "end of late")


def test_a_caller_that_goes_away_cancels_its_coroutine(server: Gunicorn) -> None:
    assert server.get(url("/given-up", "hold", "left")).text == "given up"
    wait_seen(server, "end of left")


def test_streams_of_async_generators_keep_apart(server: Gunicorn) -> None:
    users = [f"user{number}" for number in range(20)]
    answers = server.get_many([url("/stream", "tokens", user, 30, 0.002) for user in users])
    for user, answer in zip(users, answers, strict=True):
        assert [json.loads(line) for line in answer.text.splitlines()] == [f"{user}-{n}" for n in range(30)]


@pytest.mark.parametrize(
    ("action", "args", "expected"),
    [
        ("tokens", ["none", 0], []),
        ("numbers", [3], [2, 1, 0]),
        ("returns_stream", [3], [2, 1, 0]),
        ("plain", [3], [0, 1, 2]),
        ("mapped", [3], ["0", "1", "2"]),
        ("nap", [0], [{"slept": 0}]),
    ],
)
def test_what_streams(server: Gunicorn, action: str, args: list[Any], expected: list[Any]) -> None:
    assert chunks(server, action, *args) == expected


def test_an_error_in_mid_stream_comes_after_its_chunks(server: Gunicorn) -> None:
    with server.open(url("/stream", "half")) as stream:
        assert [next(iter(stream)), next(iter(stream))] == ["1", "2"]
    server.wait_log(r"Error executing tasks:Async.half: boo in mid-stream")


def test_execute_of_an_async_generator_says_what_to_call(server: Gunicorn) -> None:
    told = failure(server, "/call", "tokens", "nobody", 3)
    assert "async_generator" in told["message"] and "client.stream()" in told["message"]


def test_a_stream_that_is_left_closes_its_generator(server: Gunicorn) -> None:
    assert server.get(url("/one", "tokens", "leaver", 1000, 0.01)).text == "leaver-0"
    wait_seen(server, "end of leaver")


def test_a_reader_that_stops_reading_pauses_the_generator(server: Gunicorn) -> None:
    server.get(url("/one", "endless", "greedy"))
    wait_seen(server, "greedy made")
    made = re.search(r"greedy made (\d+)", json.dumps(ask(server, "seen")))
    assert made is not None and int(made[1]) <= 48  # a window is 32 chunks at most


def test_the_limit_of_an_action_is_for_each_chunk(server: Gunicorn) -> None:
    told = failure(server, "/call", "pausing")
    assert "client.stream()" in told["message"]
    response = server.get(url("/one", "pausing"))
    assert response.text == "first"


@pytest.mark.parametrize("query", [{"timeout": 0.3}, {"idle_timeout": 0.3}])
def test_late_streams_time_out(server: Gunicorn, query: dict[str, float]) -> None:
    name = "-".join(query)
    told = failure(server, "/stream", "tokens", name, 2, 60, **query)
    assert told["error"] == "DirtyTimeoutError"
    wait_seen(server, f"end of {name}")


def test_what_blocks_the_loop_is_named_and_the_hub_goes_on(server: Gunicorn) -> None:
    with ThreadPoolExecutor(1) as pool:
        blocking = pool.submit(ask, server, "block", "loop")
        try:
            server.wait_log(r"tasks:Async.block has blocked the asyncio loop for")
            assert ask(server, "pid")  # no coroutine: not held up
            assert not blocking.done()
        finally:
            server.write("release-loop", "")
        assert blocking.result(20) == "blocked"
    assert "in block" in server.log_text()


@pytest.mark.parametrize("action", ["spin", "stubborn"])
def test_a_coroutine_that_never_gives_in_ends_with_its_worker(action: str) -> None:
    with gunicorn() as server:
        first = ask(server, "pid", app="tasks:Spinner")
        told = failure(server, "/call", action, app="tasks:Spinner")
        assert told["error"] == "DirtyTimeoutError"
        assert "is killed" in told["message"]
        server.wait_log(r"DIRTY WORKER TIMEOUT")
        assert ask(server, "pid", app="tasks:Spinner") != first


def test_a_stop_lets_coroutines_finish() -> None:
    with gunicorn() as server:
        pid = ask(server, "pid")
        with server.open(url("/stream", "tokens", "last", 10, 0.1)) as stream, ThreadPoolExecutor(1) as pool:
            lines = [next(iter(stream))]
            rest = pool.submit(lambda: lines.extend(stream))
            server.stop()
            rest.result(10)
        assert lines == [f'"last-{number}"' for number in range(10)]
        assert f"closed in {pid}" in server.log_text()
