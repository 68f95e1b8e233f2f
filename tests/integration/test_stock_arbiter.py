"""Our client alone, with gunicorn's own dirty arbiter and workers."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from support.gunicorn import OURS, STOCK, Gunicorn, app_with
from support.waiting import wait_until

from gunicorn_dirty_gevent import DirtyClient, install
from gunicorn_dirty_gevent.client import aio
from gunicorn_dirty_gevent.client.stash import StashClient
from gunicorn_dirty_gevent.client.stock import MAX_IDLE
from gunicorn_dirty_gevent.errors import (
    DirtyAppError,
    DirtyConnectionError,
    DirtyEncodeError,
    DirtyTimeoutError,
)

CLIENT_ONLY = "import gunicorn_dirty_gevent\ngunicorn_dirty_gevent.install(arbiter=False)\n"

TASKS = """
import os, time
from gunicorn.dirty import DirtyApp

class App(DirtyApp):
    def echo(self, value, **named):
        return [value, named] if named else value

    def nap(self, seconds, value=None):
        time.sleep(seconds)
        return value

    def tokens(self, user, n, pause=0.0):
        for number in range(n):
            time.sleep(pause)
            yield f"{user}-{number}"

    def hold(self):
        print("holding", flush=True)
        time.sleep(60)

    def boom(self):
        raise ValueError("boo")

    def pid(self):
        return os.getpid()
"""

VIEWS = """
    import os
    import gevent
    from gunicorn.dirty import get_dirty_client

    @route("/call")
    def call(environ, query):
        return get_dirty_client().execute("tasks:App", query["action"], *json.loads(query["args"]))

    @route("/stream")
    def stream(environ, query):
        def chunks():
            for chunk in get_dirty_client().stream("tasks:App", query["action"], *json.loads(query["args"])):
                yield chunk + " "
                gevent.sleep(0.005)
        return chunks()

    @route("/one")
    def one(environ, query):
        chunks = get_dirty_client().stream("tasks:App", "tokens", "left", 100, 0.01)
        return next(chunks)

    @route("/timeout-then-calls")
    def timeout_then_calls(environ, query):
        client = get_dirty_client()
        with gevent.Timeout(0.2, False):
            client.execute("tasks:App", "nap", 1, "late")
        return [client.execute("tasks:App", "echo", number) for number in range(20)]

    @route("/future")
    def future(environ, query):
        futures = [get_dirty_client().submit("tasks:App", "nap", 0.3, number) for number in range(4)]
        return [future.get() for future in futures]

    @route("/turns")
    def turns(environ, query):
        # How often the hub comes round while a call waits.
        job = gevent.spawn(get_dirty_client().execute, "tasks:App", "nap", 0.5)
        turns = 0
        while not job.ready():
            gevent.sleep(0.005)
            turns += 1
        return turns

    @route("/descriptors")
    def descriptors(environ, query):
        return len(os.listdir("/proc/self/fd"))
"""

SETTINGS = {"dirty_apps": ["tasks:App"], "dirty_workers": 4, "dirty_timeout": 20}


def gunicorn(install: str, **options: Any) -> Gunicorn:
    return Gunicorn(app_with(VIEWS), TASKS, SETTINGS, install=install, **options)


def wait_workers(server: Gunicorn) -> None:
    for _ in range(4):
        wait_until(lambda: server.log_text().count(" listening on ") >= 5, 20, "arbiter and four workers")


@pytest.fixture(scope="module")
def server() -> Iterator[Gunicorn]:
    with gunicorn(CLIENT_ONLY) as running:
        wait_workers(running)
        yield running


@pytest.fixture
def path(server: Gunicorn) -> str:
    return socket_of(server)


def socket_of(server: Gunicorn) -> str:
    import re

    return re.findall(r"Dirty arbiter listening on (\S+)", server.log_text())[-1]


def url(path: str, action: str = "", *args: Any) -> str:
    return f"{path}?{urlencode({'action': action, 'args': json.dumps(args)})}"


def ask(server: Gunicorn, path: str, *args: Any) -> Any:
    response = server.get(url(path, *args), timeout=30)
    assert response.status == 200, response.text
    return response.json() if response.headers["content-type"] == "application/json" else response.text


def test_the_arbiter_is_gunicorns_own(server: Gunicorn) -> None:
    assert "/worker-" in server.log_text()  # its workers have sockets


def test_calls_run_at_once_as_far_as_stocks_workers_do(server: Gunicorn) -> None:
    started = time.monotonic()
    answers = server.get_many([url("/call", "nap", 0.5, number) for number in range(16)])
    assert [answer.text for answer in answers] == [str(number) for number in range(16)]
    assert time.monotonic() - started < 5  # 8 s one by one; four workers take 2


def test_every_stream_gets_its_own_chunks(server: Gunicorn) -> None:
    users = [f"user{number}" for number in range(8)]
    answers = server.get_many([url("/stream", "tokens", user, 30, 0.002) for user in users])
    for user, answer in zip(users, answers, strict=True):
        assert answer.text.split() == [f"{user}-{number}" for number in range(30)]


def test_a_timeout_costs_its_own_call_only(server: Gunicorn) -> None:
    assert ask(server, "/timeout-then-calls") == list(range(20))


def test_a_stream_that_is_left_disturbs_nobody(server: Gunicorn) -> None:
    assert ask(server, "/one") == "left-0"
    assert [ask(server, "/call", "echo", number) for number in range(10)] == list(range(10))


def test_the_hub_is_not_blocked(server: Gunicorn) -> None:
    assert int(ask(server, "/turns")) > 10  # about 90; a hub that waits for the answer itself makes one


def test_futures(server: Gunicorn) -> None:
    assert ask(server, "/future") == [0, 1, 2, 3]


def test_no_connection_is_left_beyond_those_kept(server: Gunicorn) -> None:
    before = int(ask(server, "/descriptors"))
    server.get_many([url("/call", "nap", 0.05) for _ in range(60)])
    wait_until(
        lambda: int(ask(server, "/descriptors")) <= before + MAX_IDLE + 2, 10, "the connections to be closed"
    )


@pytest.mark.parametrize(
    "value", [None, True, 7, 1.5, "é", b"\x00\xff", [1, [2]], {"a": {"b": 1}}, "x" * (2 << 20)]
)
def test_values(path: str, value: Any) -> None:
    with DirtyClient(path, timeout=20) as client:
        assert client.execute("tasks:App", "echo", value) == value
        assert client.execute("tasks:App", "echo", value, name=2) == [value, {"name": 2}]


def test_errors(path: str) -> None:
    with DirtyClient(path, timeout=10) as client:
        with pytest.raises(DirtyAppError) as raised:
            client.execute("tasks:App", "boom")
        assert "ValueError: boo" in raised.value.traceback and raised.value.may_have_run is True
        with pytest.raises(DirtyEncodeError, match=r"tasks:App\.echo was not sent") as refused:
            client.execute("tasks:App", "echo", object())
        assert refused.value.may_have_run is False
        with pytest.raises(Exception, match="tasks:Other"):
            client.execute("tasks:Other", "echo", 1)
        with pytest.raises(DirtyTimeoutError):
            client.options(timeout=0.2).execute("tasks:App", "nap", 1)
        assert client.execute("tasks:App", "echo", "after") == "after"


def test_threads(path: str) -> None:
    with DirtyClient(path, timeout=20) as client, ThreadPoolExecutor(8) as pool:
        echoed = pool.map(lambda n: client.execute("tasks:App", "echo", n), range(200))
        assert list(echoed) == list(range(200))
        streams = pool.map(lambda n: list(client.stream("tasks:App", "tokens", f"t{n}", 20)), range(8))
        assert list(streams) == [[f"t{n}-{i}" for i in range(20)] for n in range(8)]
        future = client.submit("tasks:App", "nap", 0.1, "later")
        assert future.get() == "later" and future.done()
        cancelled = client.submit("tasks:App", "nap", 5)
        assert cancelled.cancel() and cancelled.done()
    gc.collect()
    wait_until(lambda: "dirty-call" not in str(threading.enumerate()), 10, "the futures' threads to end")


def test_asyncio(path: str) -> None:
    async def use() -> tuple[Any, ...]:
        client = DirtyClient(path, timeout=20)
        try:
            echoed = await asyncio.gather(*(client.execute_async("tasks:App", "echo", n) for n in range(50)))
            stream = [chunk async for chunk in client.stream_async("tasks:App", "tokens", "a", 100)]
            with pytest.raises(DirtyAppError, match="boo"):
                await client.execute_async("tasks:App", "boom")
            with pytest.raises(DirtyTimeoutError):
                await client.options(timeout=0.2).execute_async("tasks:App", "nap", 1)
            first = await anext(client.stream_async("tasks:App", "tokens", "b", 100, 0.01))
            return echoed, stream, first, await client.execute_async("tasks:App", "echo", "after")
        finally:
            aio.release(path)
            await asyncio.sleep(0)

    echoed, stream, first, after = asyncio.run(use())
    assert echoed == list(range(50)) and stream == [f"a-{n}" for n in range(100)]
    assert (first, after) == ("b-0", "after")


def test_stash(path: str) -> None:
    with StashClient(path, timeout=10) as stash:
        stash.put("t", "k", {"n": [1]})
        assert stash.get("t", "k") == {"n": [1]}
        assert stash.get("t", "missing", "default") == "default"
        with pytest.raises(Exception, match="has no add, incr"):
            stash.incr("t", "n")
        stash.delete_table("t")


def test_a_killed_arbiter_costs_the_calls_in_flight_only() -> None:
    # Stock does not clean up after an arbiter that was killed.
    with gunicorn(CLIENT_ONLY, leftovers=["gunicorn-dirty-*", "gunicorn-dirty-*/*"]) as server:
        wait_workers(server)
        with DirtyClient(socket_of(server), timeout=20) as client, ThreadPoolExecutor(1) as pool:
            assert client.execute("tasks:App", "echo", 1) == 1
            lost = pool.submit(client.execute, "tasks:App", "hold")
            server.wait_log("^holding$")
            busy = client.execute("tasks:App", "pid")
            workers = server.dirty_worker_pids()
            assert busy in workers
            arbiter = server.dirty_arbiter_pid()
            server.kill(arbiter)
            error = lost.exception(10)
            assert isinstance(error, DirtyConnectionError) and error.may_have_run is True
            # Stock leaves them as orphans.
            for pid in workers:
                server.kill(pid)


def test_one_client_goes_from_one_kind_of_arbiter_to_the_other(tmp_path: Path) -> None:
    """Both arbiters have sockets of their own; a link stands for the one that a client knows."""
    link = str(tmp_path / "arbiter.sock")
    with gunicorn(OURS) as ours, gunicorn(STOCK) as stock, DirtyClient(link, timeout=20) as client:
        wait_workers(stock)
        ours.wait_log("Dirty worker ready")
        for turn in range(2):
            for server in (stock, ours):
                if os.path.lexists(link):
                    os.unlink(link)
                os.symlink(socket_of(server), link)
                client.close()
                assert client.execute("tasks:App", "echo", (1, turn)) == (
                    [1, turn] if server is stock else (1, turn)
                )
                assert client.execute("tasks:App", "pid") in server.dirty_worker_pids()


def test_our_own_arbiter_is_never_taken_for_a_stock_one() -> None:
    with gunicorn(OURS) as server:
        server.wait_log("Dirty worker ready")
        with DirtyClient(socket_of(server), timeout=20) as client:
            right = 0
            for _ in range(5):
                server.kill(server.dirty_arbiter_pid(), signal.SIGKILL)
                while True:
                    try:
                        answer = client.execute("tasks:App", "echo", (1, 2))
                    except DirtyConnectionError:
                        continue  # it was in flight
                    # A tuple comes back as a tuple only over our own protocol.
                    assert answer == (1, 2)
                    right += 1
                    break
            assert right == 5


def test_options_of_our_arbiter_need_our_arbiter() -> None:
    with pytest.raises(TypeError, match="gunicorn, which has no max_requests, queue_size"):
        install(arbiter=False, queue_size=5, max_requests=3)
