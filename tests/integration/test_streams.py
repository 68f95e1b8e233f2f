"""`stream()` from views of a real gunicorn with gevent HTTP workers."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from asking import app_source, ask, ask_many, asking, collect, failure, path, wait_ready
from support.gunicorn import Gunicorn
from support.waiting import wait_until

APP = "tasks:App"
ONE = "tasks:One"  # in one worker only

TASKS = """
import asyncio
import os
import sys
import time
from gunicorn.dirty import DirtyApp


class App(DirtyApp):
    def echo(self, value):
        return value

    def tokens(self, who, count, seconds=0.0):
        for n in range(count):
            if seconds:
                time.sleep(seconds)
            yield f"{who}-{n}"

    def endless(self, name, seconds=0.01):
        print(f"begun {name}", flush=True)
        try:
            n = 0
            while True:
                yield f"{name}-{n}"
                n += 1
                time.sleep(seconds)
        finally:
            print(f"closed {name}", flush=True)

    def stuck_after(self, name, count):
        try:
            yield from range(count)
            time.sleep(60)
        finally:
            print(f"closed {name}", flush=True)

    def wrong_after(self, count):
        yield from range(count)
        raise KeyError("in mid-stream")

    def unsendable_after(self, count):
        yield from range(count)
        yield [object()]

    def big(self, count, size):
        for n in range(count):
            yield bytes([n]) * size

    def held(self, data):
        yield "begun"
        yield sys.getrefcount(data)

    async def held_by_coroutine(self, data):
        await asyncio.sleep(0)
        return sys.getrefcount(data)

    def never(self):
        print("the generator ran", flush=True)
        yield "never"


class One(App):
    workers = 1

    def init(self):
        self.made = {}

    def counted(self, name, count, size):
        for n in range(count):
            self.made[name] = n + 1
            yield f"{n} " + "x" * size

    def progress(self, name):
        return self.made.get(name, 0)
"""

VIEWS = '''
import gc
import hashlib
import random
from gevent.event import Event

APP, ONE = "tasks:App", "tasks:One"
go_on = {}
kept = []


@route("/sse")
def sse(environ, query):
    """Server-sent events, with other greenlets' turns between the chunks."""
    sleeps = random.Random(query["who"])
    for token in get_dirty_client().stream(APP, "tokens", query["who"], int(query["count"]), 0.001):
        gevent.sleep(sleeps.choice((0, 0, 0.001, 0.005)))
        yield f"data: {token}\\n\\n"


@route("/endless")
def endless(environ, query):
    for token in get_dirty_client().stream(APP, "endless", query["name"]):
        yield f"{token}\\n"


@route("/leave")
def leave(environ, query):
    """Take two chunks, then leave the iterator in one of several ways."""
    stream = get_dirty_client().stream(APP, "endless", query["how"])
    taken = [next(stream), next(stream)]
    if query["how"] == "close":
        stream.close()
        taken += list(stream)
    elif query["how"] == "with":
        with stream:
            taken.append(next(stream))
    elif query["how"] == "drop":
        del stream
    elif query["how"] == "cycle":
        loop = [stream]
        loop.append(loop)
        del loop, stream
        gc.collect()
    elif query["how"] == "timeout":
        with gevent.Timeout(0.1, False):
            for token in stream:
                taken.append(token)
        taken = taken[:2]
    elif query["how"] == "kill":
        reader = gevent.spawn(list, stream)
        gevent.sleep(0)
        reader.kill()
    # Later streams of this client, while the one before may still have chunks under way.
    taken.append(list(get_dirty_client().stream(APP, "tokens", "later", 50)))
    return taken


@route("/slow")
def slow(environ, query):
    """Read one chunk, and the rest when told to."""
    go_on[query["name"]] = Event()
    arguments = query["name"], int(query["count"]), int(query["size"])
    stream = get_dirty_client().stream(ONE, "counted", *arguments)
    seen = [next(stream)]
    yield "one\\n"
    go_on[query["name"]].wait(30)
    seen += stream
    right = seen == [f"{n} " + "x" * arguments[2] for n in range(arguments[1])]
    yield f"{len(seen)} {right}\\n"


@route("/go-on")
def tell(environ, query):
    go_on[query["name"]].set()
    return "told"


@route("/big")
def big(environ, query):
    yield from get_dirty_client().stream(APP, "big", int(query["count"]), int(query["size"]))


@route("/paused")
def paused(environ, query):
    arguments = "paused", int(query["count"]), int(query["size"])
    yield from get_dirty_client().stream(ONE, "counted", *arguments)


@route("/interleaved")
def interleaved(environ, query):
    """Several streams and calls, in turns, in one greenlet."""
    client = get_dirty_client()
    streams = [client.stream(APP, "tokens", who, 100) for who in range(5)]
    wrong = []
    for n in range(100):
        for who, stream in enumerate(streams):
            if (got := next(stream)) != f"{who}-{n}":
                wrong.append(got)
        if (got := client.execute(APP, "echo", n)) != n:
            wrong.append(got)
    ends = [next(stream, "end") for stream in streams]
    return {"wrong": wrong, "ends": ends}
'''

DIRTY = {
    "dirty_apps": [APP, ONE],
    "dirty_workers": 2,
    "dirty_threads": 100,
    "dirty_timeout": 30,
}


@pytest.fixture(scope="module")
def streams() -> Iterator[Gunicorn]:
    with Gunicorn(app_source(VIEWS), TASKS, DIRTY) as gunicorn:
        wait_ready(gunicorn, 2)
        yield gunicorn


def check_service(gunicorn: Gunicorn) -> None:
    paths = [path(APP, "echo", n) for n in range(10)]
    assert ask_many(gunicorn, paths, 10) == list(range(10))
    assert collect(gunicorn, APP, "tokens", "after", 5) == [f"after-{n}" for n in range(5)]


# Right chunks


def test_forty_readers_get_their_own_chunks_in_order(streams: Gunicorn) -> None:
    def read(who: str) -> list[str]:
        with streams.open(f"/sse?who={who}&count=60", timeout=30) as stream:
            assert stream.status == 200
            return [line for line in stream if line]

    names = [f"reader{n}" for n in range(40)]
    with ThreadPoolExecutor(len(names)) as pool:
        read_by = list(pool.map(read, names))
    for name, lines in zip(names, read_by, strict=True):
        assert lines == [f"data: {name}-{n}" for n in range(60)]


def test_streams_and_calls_may_take_turns_in_one_greenlet(streams: Gunicorn) -> None:
    assert streams.get("/interleaved").json() == {"wrong": [], "ends": ["end"] * 5}


def test_a_stream_of_two_thousand_chunks(streams: Gunicorn) -> None:
    assert collect(streams, APP, "tokens", "long", 2000) == [f"long-{n}" for n in range(2000)]


def test_large_chunks_arrive_right(streams: Gunicorn) -> None:
    size, wanted = 1 << 20, hashlib.sha256()
    for n in range(20):
        wanted.update(bytes([n]) * size)
    body = streams.get(f"/big?count=20&size={size}", timeout=30).body
    assert len(body) == 20 * size
    assert hashlib.sha256(body).digest() == wanted.digest()


def test_nobody_else_holds_the_arguments_of_what_goes_on(streams: Gunicorn) -> None:
    """Or they could not be let go of by who has no more use for them."""

    def alone(data: object) -> Iterator[int]:
        yield sys.getrefcount(data)

    fewest = next(alone([1000, 2000]))
    assert collect(streams, APP, "held", [1000, 2000]) == ["begun", fewest]
    assert ask(streams, APP, "held_by_coroutine", [1000, 2000]) == fewest


def test_an_empty_stream_and_a_plain_value(streams: Gunicorn) -> None:
    assert collect(streams, APP, "tokens", "nobody", 0) == []
    assert collect(streams, APP, "echo", {"plain": [1]}) == [{"plain": [1]}]
    assert collect(streams, APP, "echo", None) == [None]


# Readers that leave


def test_a_client_that_hangs_up_closes_the_generator(streams: Gunicorn) -> None:
    with streams.open("/endless?name=hangup") as stream:
        lines = iter(stream)
        assert [next(lines) for _ in range(3)] == [f"hangup-{n}" for n in range(3)]
        assert "closed hangup" not in streams.log_text()
    streams.wait_log("^closed hangup$")
    check_service(streams)


@pytest.mark.parametrize("how", ["close", "with", "drop", "cycle", "timeout", "kill"])
def test_a_view_that_leaves_its_iterator_closes_the_generator(streams: Gunicorn, how: str) -> None:
    mark = streams.mark()
    *first, later = streams.get(f"/leave?how={how}").json()
    assert first == [f"{how}-{n}" for n in range(len(first))]
    assert len(first) == (3 if how == "with" else 2)
    assert later == [f"later-{n}" for n in range(50)]
    streams.wait_log(f"^begun {how}$", since=mark)
    streams.wait_log(f"^closed {how}$", since=mark)
    check_service(streams)


# Errors


def test_an_error_in_mid_stream_comes_after_the_chunks_before_it(streams: Gunicorn) -> None:
    said = failure(collect(streams, APP, "wrong_after", 200), "DirtyAppError")
    assert said.chunks == list(range(200))
    assert "in mid-stream" in said.message
    assert said.attrs["action"] == "wrong_after"
    assert 'raise KeyError("in mid-stream")' in said.attrs["traceback"]
    assert failure(collect(streams, APP, "wrong_after", 0), "DirtyAppError").chunks == []
    check_service(streams)


def test_a_chunk_that_cannot_be_sent_is_named(streams: Gunicorn) -> None:
    said = failure(collect(streams, APP, "unsendable_after", 3), "DirtyEncodeError")
    assert said.chunks == [0, 1, 2]
    assert "object" in said.message
    assert "chunk 3[0]" in said.message
    check_service(streams)


def test_unknown_actions_fail_at_the_first_chunk(streams: Gunicorn) -> None:
    assert failure(collect(streams, APP, "nothing"), "DirtyActionNotFoundError").chunks == []
    assert failure(collect(streams, "tasks:Nobody", "x"), "DirtyAppNotFoundError").chunks == []


def test_execute_of_a_generator_says_what_to_call(streams: Gunicorn) -> None:
    said = failure(ask(streams, APP, "never"), "DirtyProtocolError")
    assert "stream()" in said.message
    assert f"{APP}.never" in said.message
    check_service(streams)
    assert "the generator ran" not in streams.log_text()
    assert collect(streams, APP, "never") == ["never"]
    streams.wait_log("^the generator ran$")


def test_an_idle_stream_times_out(streams: Gunicorn) -> None:
    # Enough for the chunks before it, and for each of those that come in time.
    options = {"idle_timeout": "1"}
    said = failure(collect(streams, APP, "stuck_after", "idle", 3, options=options), "DirtyTimeoutError")
    assert said.chunks == [0, 1, 2]
    assert "idle_timeout" in said.message
    assert 1 <= said.elapsed < 10
    streams.wait_log("^closed idle$")
    # The same limit does not end a stream that goes on for longer in all.
    many = collect(streams, APP, "tokens", "steady", 40, 0.03, options=options)
    assert many == [f"steady-{n}" for n in range(40)]


def test_a_whole_stream_times_out(streams: Gunicorn) -> None:
    said = failure(collect(streams, APP, "endless", "whole", options={"timeout": "1"}), "DirtyTimeoutError")
    assert len(said.chunks) > 3
    assert said.chunks == [f"whole-{n}" for n in range(len(said.chunks))]
    assert 1 <= said.elapsed < 10
    streams.wait_log("^closed whole$")
    check_service(streams)


# Flow control


@pytest.mark.parametrize(("size", "most"), [(1, 500), (65536, 40)])
def test_a_slow_reader_holds_up_its_own_generator_only(streams: Gunicorn, size: int, most: int) -> None:
    name, count = f"slow{size}", 2000 if size == 1 else 200
    with streams.open(f"/slow?name={name}&count={count}&size={size}", timeout=30) as slow:
        lines = iter(slow)
        assert next(lines) == "one"
        # Calls of the same worker: the generator has its turn between them.
        started = time.monotonic()
        assert ask_many(streams, [path(ONE, "echo", n) for n in range(200)], 4) == list(range(200))
        assert collect(streams, ONE, "tokens", "other", 300) == [f"other-{n}" for n in range(300)]
        assert time.monotonic() - started < 10
        made = ask(streams, ONE, "progress", name)
        assert 1 < made <= most
        assert ask(streams, ONE, "progress", name) == made
        assert streams.get(f"/go-on?name={name}").text == "told"
        assert next(lines) == f"{count} True"
    assert ask(streams, ONE, "progress", name) == count


def test_a_slow_http_client_holds_up_the_generator(streams: Gunicorn) -> None:
    """The window reaches from the socket of the browser to the generator."""
    size = 1 << 18
    with streams.open(f"/paused?count=400&size={size}", timeout=30) as stream:
        assert len(stream.read_chunk(10)) == 10

        def paused() -> bool:
            before = ask(streams, ONE, "progress", "paused")
            ask_many(streams, [path(ONE, "echo", n) for n in range(50)], 2)
            return before > 1 and ask(streams, ONE, "progress", "paused") == before

        wait_until(paused, 20, "the generator to pause", streams.evidence)
        made = ask(streams, ONE, "progress", "paused")
        assert made < 200, "more than socket buffers and windows hold"
        rest = sum(len(chunk) for chunk in stream.chunks())
    assert rest + 10 == sum(len(f"{n} ") + size for n in range(400))


def test_many_streams_beside_many_calls(streams: Gunicorn) -> None:
    paths = [path(APP, "tokens", n, 100, route="/collect") for n in range(20)]
    with asking(streams, paths) as chunks:
        assert ask_many(streams, [path(APP, "echo", n) for n in range(300)], 10) == list(range(300))
        for n, future in enumerate(chunks):
            assert future.result() == [f"{n}-{k}" for k in range(100)]
